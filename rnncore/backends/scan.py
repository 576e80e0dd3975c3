"""Backend "scan": any pointwise cell over time by `jax.lax.scan`, with derived derivatives.

Platforms: all.  Lengths, resets, states and gates: yes.  Dtypes: all floating ones.
Differentiation: "any" gives forward and reverse mode to every order, vmap, remat and their
compositions; "reverse" gives reverse mode of first order and vmap; measured, it costs the same today.
Cost in reverse mode, in arrays of T x B x H: see `recompute` in `rnncore.unroll`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths, pointwise
from rnncore._types import Array
from rnncore.backends import recur
from rnncore.backends.chunks import run_chunks
from rnncore.backends.request import Operands, Request, Result
from rnncore.cells.base import CellParams, PointwiseCell


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request, or None."""
    if not isinstance(request.cell, PointwiseCell):
        return f"{type(request.cell).__name__} is not a PointwiseCell, so its derivative rules cannot be derived"
    return None


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    xs, carry, target, lengths, resets, mask, stay = operands
    assert isinstance(cell, PointwiseCell)
    mixing = CellParams(None, params.recurrent_kernel, None, params.recurrent_bias, ())  # type: ignore[arg-type]
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, carry.h.shape), params.units)
    step = _step(cell, p, carry, cell.project(params, xs[0]), mixing, request.states, lengths is not None)
    rules = recur.Rules(
        cell.mix,
        lambda kernel, h: cell.recurrence.mix_transposed(kernel, h.astype(kernel.dtype)),
        lambda mixing: cell.recurrence.transposed(mixing.recurrent_kernel),
        request.differentiation,
        request.recompute == "gates",
    )

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, resets, stay) = carry, now
        back = None if resets is None else target
        inputs = recur.Inputs(mixing, p, cell.project(params, xs), carry, back, resets, mask, stay)
        carry, outputs, (carries, gates) = recur.run(step, rules, inputs)
        last = carry if lengths is None else _lengths.last_valid(last, carries, lengths, first)
        return (carry, last), (outputs, carries if request.states else None, gates)

    every = request.checkpoint_every or default_chunk(request)
    if request.recompute == "gates":
        # The projected inputs are formed again too: they are four times the carries.
        policy = jax.checkpoint_policies.save_only_these_names(recur.CARRIES)
        # Inside a scan XLA cannot merge both forms; of a single chunk it would.
        chunk = jax.checkpoint(chunk, policy=policy, prevent_cse=every >= request.steps)
    again = request.recompute == "chunk"
    (_, last), ys = run_chunks(chunk, (carry, carry), (xs, resets, stay), request.steps, every, again)
    return Result(last, *ys)


def default_chunk(request: Request) -> int:
    """Steps to a chunk where the caller names none.

    With `recompute` about sqrt(T), which keeps least of a run that is formed again chunk by chunk.
    Else T, except on one CPU.  There a slab of all steps that outgrows the caches costs page faults
    and memory traffic: above 4 MiB it is cut into chunks of about 2 MiB, at least 8 steps.  Either way
    a divisor of T, if one is near.
    """
    if request.recompute != "nothing":
        wanted = max(8, math.isqrt(request.steps))
    else:
        size = len(request.cell.gates) * request.cell.hidden_size  # type: ignore[attr-defined]
        step_bytes = math.prod(request.batch_shape) * size * jnp.dtype(request.dtype).itemsize
        if request.platform != "cpu" or request.devices > 1 or step_bytes * request.steps <= 4 * 2**20:
            return request.steps
        wanted = max(8, 2 * 2**20 // step_bytes)
    near = [k for k in range(wanted // 2 + 1, 2 * wanted) if request.steps % k == 0]
    return min(near, key=lambda k: abs(k - wanted), default=wanted)


def _step(cell: PointwiseCell, p: Any, carry: Any, z: Array, mixing: Any, states: bool, carries: bool) -> recur.Step:
    """The cell's pointwise update as a step on slabs."""
    additive = pointwise.additive_gates(cell, p, cell.split(z), cell.split(cell.mix(mixing, carry.h)), carry)

    count = len(cell.gates) - sum(additive)

    def update(p: Any, z: Array, rest: Array | None, carry: Any) -> Any:
        zs = cell.split(z)
        pieces = iter(() if rest is None else jax.lax.split(rest, [cell.hidden_size] * count, rest.ndim - 1))
        rs = cell.Gates(*(jnp.zeros_like(zg) if a else next(pieces) for zg, a in zip(zs, additive, strict=True)))
        new, gates = cell.pointwise(p, zs, rs, carry)
        return new, gates if states else None

    return recur.Step(update, functools.partial(_fold, cell, additive), states or carries)


def _fold(cell: PointwiseCell, additive: Sequence[bool], z: Array, r: Array) -> tuple[Array, Array | None]:
    """Gates that see only z + r take r into z; the others keep theirs apart, in a slab of their own."""
    if all(additive):
        return z + r, None
    zs, rs = cell.split(z), cell.split(r)
    rest = jnp.concatenate([rg for rg, a in zip(rs, additive, strict=True) if not a], -1)
    if not any(additive):
        return z, rest
    return jnp.concatenate([zg + rg if a else zg for zg, rg, a in zip(zs, rs, additive, strict=True)], -1), rest
