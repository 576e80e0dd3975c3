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
from rnncore._types import Array, PyTree
from rnncore.backends.chunks import run_chunks
from rnncore.backends.request import Request, Result


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request; there is none."""
    del request
    return None


def run(
    request: Request, params: PyTree, xs: Array, carry: Any, lengths: Array | None, resets: Array | None
) -> Result:
    """Runs the cell; everything time-major, see `Result`."""
    cell, start = request.cell, carry

    def step(carry: Any, now: Any) -> Any:
        z, reset = now
        if reset is not None:
            carry = jax.tree.map(lambda a, b: jnp.where(reset, a, b), start, carry)
        new, gates = cell.update(params, carry, z)
        new = jax.tree.map(lambda n, c: n.astype(c.dtype), new, carry)
        carries = new if request.states or lengths is not None else None
        return new, (cell.output(new), carries, gates if request.states else None)

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, resets) = carry, now
        carry, (outputs, carries, gates) = lax.scan(step, carry, (cell.project(params, xs), resets))
        last = carry if lengths is None else _lengths.last_valid(last, carries, lengths, first)
        return (carry, last), (outputs, carries if request.states else None, gates)

    every = request.checkpoint_every or request.steps
    again = request.recompute != "nothing"
    (_, last), ys = run_chunks(chunk, (carry, carry), (xs, resets), request.steps, every, again)
    return Result(last, *ys)
