"""Backend "autodiff": `cell.update` under `jax.lax.scan`, differentiated by JAX.

Any cell, any platform, every mode of differentiation and every order, lengths and resets.  Reverse
mode carries the gradients of all weights through the loop and keeps every intermediate value of a
step: it is the reference for the other backends, and the one for cells that are not pointwise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore import _lengths
from rnncore._types import PyTree
from rnncore.cells.base import PointwiseCell
from rnncore.recurrence.chunks import run_chunks
from rnncore.recurrence.recur import keep
from rnncore.recurrence.request import Operands, Request, Result


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request, or None."""
    if request.mask and not isinstance(request.cell, PointwiseCell):
        return (
            f"{type(request.cell).__name__} is not a PointwiseCell, so it does not show where h enters its recurrent "
            "product, which recurrent_mask masks"
        )
    return None


def run(request: Request, params: PyTree, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    xs, carry, target, lengths, resets, mask, stay = operands

    def step(carry: Any, now: Any) -> Any:
        z, reset, stay = now
        if reset is not None:
            carry = jax.tree.map(lambda a, b: jnp.where(reset, a, b), target, carry)
        new, gates = cell.update(params, carry, z, **({} if mask is None else {"mask": mask}))
        new = keep(stay, carry, jax.tree.map(lambda n, c: n.astype(c.dtype), new, carry))
        carries = new if request.states or lengths is not None else None
        return new, (cell.output(new), carries, gates if request.states else None)

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, resets, stay) = carry, now
        carry, (outputs, carries, gates) = lax.scan(step, carry, (cell.project(params, xs), resets, stay))
        last = carry if lengths is None else _lengths.last_valid(last, carries, lengths, first)
        return (carry, last), (outputs, carries if request.states else None, gates)

    every = request.checkpoint_every or request.steps
    again = request.recompute != "nothing"
    (_, last), ys = run_chunks(chunk, (carry, carry), (xs, resets, stay), request.steps, every, again)
    return Result(last, *ys)
