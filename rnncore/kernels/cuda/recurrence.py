"""From the arrays of a run to the kernels' and back, and what all steps have in one product: dU, dW, dx, biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.kernels import host
from rnncore.kernels.cuda import kernels
from rnncore.recurrence.batching import HEADS, LAST, Units, over_batch
from rnncore.recurrence.run import Differentiable, Result


class Arrays(host.Arrays):
    """The arrays of a run, to the kernels and back."""

    @property
    def _stored(self) -> str:
        """The dtype of the residuals."""
        return self.request.residual_dtype or self.request.dtype

    def residuals(self, slab: Array) -> tuple[Array, ...]:
        """Each (T, *batch, H)."""
        request = self.request
        return tuple(a.reshape(request.steps, *request.batch_shape, -1) for a in self._apart(slab))

    def _apart(self, slab: Array) -> list[Array]:
        """(T, B, n*H) as n arrays (T, B, H)."""
        return jnp.split(slab, slab.shape[-1] // self.cell.hidden_size, -1)

    def result(self, found: kernels.Outputs) -> Result:
        steps, batch, hidden = self.request.steps, self.request.batch_shape, self.cell.hidden_size

        def stacks(slab: Array | None) -> list[Array]:
            return [] if slab is None else [a.reshape(steps, *batch, hidden) for a in self._apart(slab)]

        last = [a.reshape(*batch, hidden) for a in found.last]
        (outputs,) = stacks(found.hs)
        return host.result(
            self.request, self.part, self.dtypes, last, outputs, stacks(found.others), stacks(found.gates)
        )  # fmt: skip

    def forward(self, settings: kernels.Settings, differentiable: Differentiable, keep: bool) -> kernels.Outputs:
        operands = self.operands(differentiable)
        states, stored = self.request.return_states, self._stored if keep else None

        def step(run: host.Loop, rows: int) -> float | None:
            of = stored or run.kernel.dtype.name
            return kernels.step(settings, self.cell, "forward", run, rows, of, keeps=keep, states=states)

        def call(run: host.Loop, z: Array) -> kernels.Outputs:
            return kernels.forward(settings, self.cell, run, z, stored, states)

        return _mapped(call, step, self.loop(operands), operands.z)

    def backward(
        self, settings: kernels.Settings, differentiable: Differentiable, hs: Array, residuals: Array,
        cotangents: Result,
    ) -> Differentiable:  # fmt: skip
        """The cotangents of what is differentiable; hs are the outputs, (T, B, H)."""
        part, states = self.part, self.request.return_states
        operands, back = jax.vjp(self.operands, differentiable)
        run = self.loop(operands)
        dhs = self.flat(cotangents.outputs)
        dothers = dgates = None
        if states:
            stacks = [self.flat(a).astype(jnp.float32) for a in cotangents.carries]
            dhs = dhs.astype(jnp.float32) + stacks.pop(part.hidden)
            dothers = jnp.concatenate(stacks, -1) if stacks else None
            gates = jax.tree.leaves(cotangents.gates)
            # A cell may call a boolean or an integer a gate.
            floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(part.gates)]
            zeros = jnp.zeros_like(dhs)
            slabs = [self.flat(a).astype(jnp.float32) if m else zeros for a, m in zip(gates, floating, strict=True)]
            dgates = jnp.concatenate(slabs, -1) if slabs else None
        dlast = self.carry(cotangents.carry)

        def call(run: host.Loop, *stacks: Any) -> host.Cotangents:
            return kernels.backward(settings, self.cell, run, *stacks, states=states)

        def step(run: host.Loop, rows: int) -> float | None:
            return kernels.step(settings, self.cell, "backward", run, rows, self._stored, states=states)

        found = _mapped(call, step, run, residuals, dhs, dlast, dothers, dgates)
        h = host.previous(run, part.hidden, hs.astype(jnp.float32))
        h = (h if run.mask is None else h * run.mask.astype(jnp.float32)).astype(run.kernel.dtype)
        return back(self.cotangents(operands, found, h, dlast))[0]


_SHARED = ("kernel", "rest_bias", "units")
"""What all sequences of a run share."""


def _mapped(
    call: Callable[..., Any], step: Callable[[host.Loop, int], float | None], run: host.Loop, *stacks: Any
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
