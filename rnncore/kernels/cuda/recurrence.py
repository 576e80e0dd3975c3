"""Between the arrays of a run and the layout of the kernels; and dU, dW, dx and biases, products over all steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.kernels import host
from rnncore.kernels.cuda import kernels
from rnncore.recurrence.run import Differentiable, Result


class Arrays(host.Arrays):
    """The arrays of a run, to the kernels and back."""

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
        z, loop = self.operands(differentiable)
        states, stored = self.request.return_states, self.stored if keep else None
        step = functools.partial(
            kernels.step, settings, self.cell, "forward", stored=stored or self.request.dtype, keeps=keep, states=states
        )

        def call(run: host.Loop, z: Array) -> kernels.Outputs:
            return kernels.forward(settings, self.cell, run, z, stored, states)

        return host.mapped(call, self.with_constants(loop), z, step=step)

    def backward(
        self, settings: kernels.Settings, differentiable: Differentiable, hs: Array, residuals: Array,
        cotangents: Result,
    ) -> Differentiable:  # fmt: skip
        """The cotangents of what is differentiable; hs are the outputs, (T, B, H)."""
        part, states = self.part, self.request.return_states
        operands, back = jax.vjp(self.operands, differentiable)
        run = self.with_constants(operands[1])
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

        step = functools.partial(kernels.step, settings, self.cell, "backward", stored=self.stored, states=states)
        found = host.mapped(call, run, residuals, dhs, dlast, dothers, dgates, step=step)
        h = host.previous(run, part.hidden, hs.astype(jnp.float32))
        h = (h if run.mask is None else h * run.mask.astype(jnp.float32)).astype(run.kernel.dtype)
        return back(self.cotangents(operands, found, h, dlast))[0]
