"""Backend "autodiff": `cell.update` under `jax.lax.scan`, differentiated by JAX.

Any cell, any platform, every mode of differentiation and every order, lengths and resets.  Reverse
mode carries the gradients of all weights through the loop and keeps every intermediate value of a
step: it is the reference for the other backends, and the one for cells that are not pointwise.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from rnncore import _lengths
from rnncore.cells.base import GatedCell
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.recurrence import step as steps
from rnncore.recurrence.backend import Backend
from rnncore.recurrence.chunks import chunk_size, scan_chunks
from rnncore.recurrence.run import Problem, Request, Result


class Autodiff(Backend):
    """See the module."""

    name = "autodiff"
    takes_symbolic = True

    def takes_product(self, recurrence: Recurrence) -> bool:
        return True

    def unsupported(self, request: Request) -> str | None:
        if request.recurrent_mask and not isinstance(request.cell, GatedCell):
            return (
                f"{type(request.cell).__name__} is not a PointwiseCell, so it does not show where h enters its "
                "recurrent product, which recurrent_mask masks"
            )
        return None

    def run(self, problem: Problem) -> Result:
        request, (params, xs, start, reset_carry), constants = problem
        cell, lengths, mask = request.cell, constants.lengths, constants.recurrent_mask
        options = {} if mask is None else {"mask": mask}

        def step(carry: Any, now: Any) -> Any:
            z, resets, zoneout = now
            carry = steps.reset(resets, reset_carry, carry)
            new, gates = cell.update(params, carry, z, **options)
            new = steps.blend(zoneout, carry, new)
            carries = new if request.return_states or lengths is not None else None
            return new, (cell.output(new), carries, gates if request.return_states else None)

        def chunk(carry: Any, first: Any, now: Any) -> Any:
            (carry, last), (xs, resets, zoneout) = carry, now
            carry, (outputs, carries, gates) = lax.scan(step, carry, (cell.project(params, xs), resets, zoneout))
            last = carry if lengths is None else _lengths.last_valid(last, carries, lengths, first)
            return (carry, last), (outputs, carries if request.return_states else None, gates)

        stacks = (jnp.moveaxis(xs, request.time_axis, 0), *steps.per_step(request, constants))
        rematerialize = request.recompute != "nothing"
        size = chunk_size(request) if rematerialize else request.checkpoint_every or request.steps
        (_, last), ys = scan_chunks(chunk, (start, start), stacks, request.steps, size, rematerialize)
        return Result(last, *ys)
