"""From the arrays of a run to the kernels' and back, and what all steps have in one product: dU, dW, dx, biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body
from rnncore.kernels.cuda import kernels
from rnncore.recurrence.batching import HEADS, LAST, Units, over_batch
from rnncore.recurrence.run import Constants, Differentiable, Request, Result


class Operands(NamedTuple):
    """What is differentiable, as the kernels have it: z (T, B, G*H), and see `kernels.Run`."""

    z: Array
    kernel: Array
    rest_bias: Array | None
    units: tuple[Array, ...]
    start: tuple[Array, ...]
    reset_carry: tuple[Array, ...] | None


class Arrays:
    """The arrays of a run as the kernels have them, with one batch axis."""

    def __init__(self, request: Request, differentiable: Differentiable, constants: Constants):
        assert isinstance(request.cell, PointwiseCell)
        self.request, self.cell, self.constants = request, request.cell, constants
        self.part = kernel_body.of(self.cell, (1, 1), "float32", request.return_states)
        self.rows = math.prod(request.batch_shape)
        self.heads = host.head_count(self.cell)
        self.stored = request.residual_dtype or request.dtype
        self.dtypes = [a.dtype for a in differentiable.initial_carry]

    # ------------------------------------------------------------------------------------ there

    def operands(self, differentiable: Differentiable) -> Operands:
        """What the kernels read of what is differentiable."""
        params, xs, start, reset_carry = differentiable
        count, size = len(self.cell.gates), self.cell.hidden_size // self.heads
        z = self.cell.project(params, xs.reshape(self.request.steps, self.rows, -1))
        added, rest = self.part.recurrent_biases(params)
        z = z if added is None else z + added.reshape(-1)
        return Operands(
            z, params.recurrent_kernel.reshape(self.heads, size, count, size).astype(z.dtype),
            jnp.stack(rest).astype(jnp.float32) if rest else None,
            tuple(a.astype(jnp.float32) for a in params.units), self._carry(start),
            None if self.constants.resets is None else self._carry(reset_carry),
        )  # fmt: skip

    def run(self, operands: Operands) -> kernels.Run:
        """The same, with the constants."""
        lengths, resets, mask, zoneout = self.constants
        steps, hidden = self.request.steps, self.cell.hidden_size
        return kernels.Run(
            *operands[1:],
            mask=None if mask is None else mask.reshape(self.rows, hidden),
            lengths=None if lengths is None else lengths.reshape(self.rows),
            resets=None if resets is None else resets.reshape(steps, self.rows),
            zoneout=jax.tree.map(lambda a: self.flat(a) if a.ndim else a, None if zoneout is None else tuple(zoneout)),
        )

    def flat(self, a: Array) -> Array:
        """(T, *batch, H) with one batch axis."""
        return a.reshape(self.request.steps, self.rows, -1)

    def residuals(self, slab: Array) -> tuple[Array, ...]:
        """Each (T, *batch, H)."""
        request = self.request
        return tuple(a.reshape(request.steps, *request.batch_shape, -1) for a in self._apart(slab))

    def _apart(self, slab: Array) -> list[Array]:
        """(T, B, n*H) as n arrays (T, B, H)."""
        return jnp.split(slab, slab.shape[-1] // self.cell.hidden_size, -1)

    def _carry(self, fields: Any) -> tuple[Array, ...]:
        return tuple(a.reshape(self.rows, -1).astype(jnp.float32) for a in fields)

    # ------------------------------------------------------------------------------------- back

    def result(self, found: kernels.Outputs) -> Result:
        steps, batch, hidden = self.request.steps, self.request.batch_shape, self.cell.hidden_size

        def carry(arrays: Any) -> Any:
            return self.cell.Carry(*(a.astype(d) for a, d in zip(arrays, self.dtypes, strict=True)))

        def stack(a: Array) -> Array:
            return a.reshape(steps, *batch, hidden)

        last = carry([a.reshape(*batch, hidden) for a in found.last])
        outputs = stack(found.hs).astype(self.dtypes[self.part.hidden])
        if not self.request.return_states:
            return Result(last, outputs, None, None)
        carries = [] if found.others is None else [stack(a) for a in self._apart(found.others)]
        carries.insert(self.part.hidden, outputs)
        leaves, tree = jax.tree.flatten(self.part.gates)
        # A cell may call a boolean or an integer a gate.
        dtypes = [self.request.dtype if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype for a in leaves]
        slabs = [] if found.gates is None else self._apart(found.gates)
        gates = [stack(a).astype(d) for a, d in zip(slabs, dtypes, strict=True)]
        return Result(last, outputs, carry(carries), jax.tree.unflatten(tree, gates))

    def forward(self, settings: kernels.Settings, differentiable: Differentiable, keep: bool) -> kernels.Outputs:
        operands = self.operands(differentiable)
        states, stored = self.request.return_states, self.stored if keep else None

        def step(run: kernels.Run, rows: int) -> float | None:
            of = stored or run.kernel.dtype.name
            return kernels.step(settings, self.cell, "forward", run, rows, of, keeps=keep, states=states)

        return _mapped(
            lambda run, z: kernels.forward(settings, self.cell, run, z, stored, states),
            step,
            self.run(operands),
            operands.z,
        )

    def backward(
        self, settings: kernels.Settings, differentiable: Differentiable, hs: Array, residuals: Array,
        cotangents: Result,
    ) -> Differentiable:  # fmt: skip
        """The cotangents of what is differentiable; hs are the outputs, (T, B, H)."""
        part = self.part
        operands, back = jax.vjp(self.operands, differentiable)
        run = self.run(operands)
        dhs = self.flat(cotangents.outputs)
        dothers = dgates = None
        if self.request.return_states:
            stacks = [self.flat(a).astype(jnp.float32) for a in cotangents.carries]
            dhs = dhs.astype(jnp.float32) + stacks.pop(part.hidden)
            dothers = jnp.concatenate(stacks, -1) if stacks else None
            gates = jax.tree.leaves(cotangents.gates)
            # A cell may call a boolean or an integer a gate.
            floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(part.gates)]
            zeros = jnp.zeros_like(dhs)
            slabs = [self.flat(a).astype(jnp.float32) if m else zeros for a, m in zip(gates, floating, strict=True)]
            dgates = jnp.concatenate(slabs, -1) if slabs else None
        dlast = self._carry(cotangents.carry)

        def call(run: kernels.Run, *stacks: Any) -> host.Cotangents:
            return kernels.backward(settings, self.cell, run, *stacks, states=self.request.return_states)

        def step(run: kernels.Run, rows: int) -> float | None:
            return kernels.step(
                settings, self.cell, "backward", run, rows, self.stored, states=self.request.return_states
            )

        found = _mapped(call, step, run, residuals, dhs, dlast, dothers, dgates)
        h = host.previous(run, part.hidden, hs.astype(jnp.float32))
        h = (h if run.mask is None else h * run.mask.astype(jnp.float32)).astype(run.kernel.dtype)
        dr, drest, dunits, dstart = host.summed(part, found, run.lengths, dlast)
        dkernel = host.kernel_cotangent(run.kernel, h, dr.astype(h.dtype))
        cotangents_of = Operands(found.z, dkernel, drest, dunits, dstart, found.reset_carry)
        return back(jax.tree.map(lambda d, a: d.astype(a.dtype), cotangents_of, operands))[0]


_SHARED = ("kernel", "rest_bias", "units")
"""What all sequences of a run share."""


def _mapped(
    call: Callable[..., Any], step: Callable[[kernels.Run, int], float | None], run: kernels.Run, *stacks: Any
) -> Any:
    """`call(run, *stacks)` under any number of maps; stacks are (..., B, H), and so are the results.

    Maps of parameters are more heads where that is predicted to be faster, `step` being what a step of a run of so many
    sequences is predicted to take, or None.
    """
    leaves, tree = jax.tree.flatten((run, stacks))
    names = [name for name, field in run._asdict().items() for _ in jax.tree.leaves(field)]
    axes = [_axis(name, a) for name, a in zip(names, leaves, strict=False)]
    axes += [a.ndim - 2 for a in jax.tree.leaves(stacks)]

    def whole(groups: int, *flat: Array) -> Any:
        run, stacks = jax.tree.unflatten(tree, flat)
        return call(run, *stacks)

    def worthwhile(size: int, together: Sequence[Any], one: Sequence[Any]) -> bool:
        wide, single = (jax.tree.unflatten(tree, flat)[0] for flat in (together, one))
        rows = single.start[0].shape[0]
        at_once, alone = step(wide, rows), step(single, rows)
        return at_once is not None and alone is not None and at_once <= size * alone

    of_units: list[int | None] = [_units(name, a) for name, a in zip(names, leaves, strict=False)]
    of_units += [LAST] * len(jax.tree.leaves(stacks))
    units = Units(run.start[0].shape[-1], of_units, worthwhile)
    return over_batch(whole, axes, lambda a: a.ndim - 2, units)(*leaves)


def _axis(field: str, a: Array) -> int | None:
    if field in _SHARED or a.ndim == 0:
        return None
    return 0 if field == "lengths" else 1 if field == "resets" else a.ndim - 2


def _units(field: str, a: Array) -> int | None:
    if field in ("lengths", "resets") or a.ndim == 0:
        return None
    return HEADS if field == "kernel" else LAST
