"""Runs whose batch is sharded by an explicit mesh, for loops that XLA cannot partition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rnncore import _compat
from rnncore.recurrence.run import Constants, Differentiable, Problem, Result, operand_axes, result_axes


def by_device(run: Callable[[Problem], Result], problem: Problem) -> Result:
    """`run`, inside `jax.shard_map` over the axes of an explicit mesh that shard the batch of xs."""
    request, differentiable, constants = problem
    sharding = jax.typeof(differentiable.xs).sharding
    mesh = sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return run(problem)
    axis, spec = request.time_axis, tuple(sharding.spec)
    spec += (None,) * (differentiable.xs.ndim - len(spec))
    batch = spec[:axis] + spec[axis + 1 : -1]

    def spec_of(axis: int) -> P:
        return P() if axis < 0 else P(*[None] * axis, *batch)

    ndims = jax.tree.map(lambda a: a.ndim, constants)
    specs = jax.tree.map(spec_of, operand_axes(request, differentiable, ndims))
    arrays = jax.tree.map(jax.sharding.reshard, (differentiable, constants), specs)
    names = [part if isinstance(part, tuple) else () if part is None else (part,) for part in batch]
    axes = frozenset().union(*names)
    if not axes:
        return run(Problem(request, *arrays))
    sizes = [
        n // math.prod(mesh.shape[name] for name in own) for n, own in zip(request.batch_shape, names, strict=True)
    ]
    one = dataclasses.replace(request, batch_shape=tuple(sizes))

    def local(differentiable: Differentiable, constants: Constants) -> Result:
        # Parameters vary over the devices as the data does: their gradients are then summed once, outside the run.
        return run(Problem(one, *jax.tree.map(lambda a: _compat.vary_over(a, axes), (differentiable, constants))))

    shapes = jax.eval_shape(lambda *arrays: run(Problem(request, *arrays)), *arrays)
    out = jax.tree.map(spec_of, result_axes(request, shapes))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(*arrays)
