"""Runs whose batch is sharded by an explicit mesh, for loops that XLA cannot partition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rnncore import _compat
from rnncore.recurrence.run import Constants, Differentiable, Request, Result

Run = Callable[[Request, Differentiable, Constants], Result]


def by_device(run: Run, request: Request, differentiable: Differentiable, constants: Constants) -> Result:
    """`run`, inside `jax.shard_map` over the axes of an explicit mesh that shard the batch of xs."""
    sharding = jax.typeof(differentiable.xs).sharding
    mesh = sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return run(request, differentiable, constants)
    axis, spec = request.time_axis, tuple(sharding.spec)
    spec += (None,) * (differentiable.xs.ndim - len(spec))
    batch = spec[:axis] + spec[axis + 1 : -1]
    parted = Differentiable(
        _all(P(), differentiable.params), P(*batch[:axis], None, *batch[axis:], None),
        _all(P(*batch, None), differentiable.initial_carry), _all(P(*batch, None), differentiable.reset_carry),
    )  # fmt: skip
    in_time = P(None, *batch, None)
    fixed = Constants(
        _all(P(*batch), constants.lengths), _all(P(None, *batch), constants.resets),
        _all(P(*batch, None), constants.recurrent_mask),
        jax.tree.map(lambda a: in_time if a.ndim else P(), constants.zoneout),
    )  # fmt: skip
    differentiable, constants = jax.tree.map(jax.sharding.reshard, (differentiable, constants), (parted, fixed))
    names = frozenset(name for part in batch if part is not None for name in _names(part))
    if not names:
        return run(request, differentiable, constants)
    sizes = tuple(n // math.prod(mesh.shape[name] for name in _names(part)) for n, part in
                  zip(request.batch_shape, batch, strict=True))  # fmt: skip
    one = dataclasses.replace(request, batch_shape=sizes)

    def local(differentiable: Differentiable, constants: Constants) -> Result:
        # Parameters vary over the devices as the data does: their gradients are then summed once, outside the run.
        return run(one, *jax.tree.map(lambda a: _compat.vary_over(a, names), (differentiable, constants)))

    shapes = jax.eval_shape(lambda *arrays: run(request, *arrays), differentiable, constants)
    out = Result(
        _all(P(*batch, None), shapes.carry), parted.xs, _all(in_time, shapes.carries), _all(in_time, shapes.gates)
    )
    return jax.shard_map(local, mesh=mesh, in_specs=(parted, fixed), out_specs=out)(differentiable, constants)


def _all(spec: P, tree: Any) -> Any:
    return jax.tree.map(lambda _: spec, tree)


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)
