"""Backend "scan": any pointwise cell over time by `jax.lax.scan`, with derived derivatives.

Platforms: all.  Lengths, resets, states and gates: yes.  Dtypes: all floating ones; products take and
give the dtype of their operands and follow `jax.default_matmul_precision`, forward and backward.
Differentiation: "any" gives forward and reverse mode to every order, vmap, remat and their
compositions (`recur.py`); "reverse" gives reverse mode of first order and vmap, faster and in less
memory (`inplace.py`).  Memory: see `recompute` in `rnncore.unroll`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array
from rnncore.cells import pointwise
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.recurrence import inplace, recur, sweep
from rnncore.recurrence.chunks import run_chunks
from rnncore.recurrence.request import Operands, Request, Result


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request, or None."""
    if not isinstance(request.cell, PointwiseCell):
        return f"{type(request.cell).__name__} is not a PointwiseCell, so its derivative rules cannot be derived"
    return None


def keeps_time_axis(request: Request) -> bool:
    """Whether inputs and outputs may have time where the caller has it, see `Request.time_axis`."""
    return request.differentiation == "reverse"


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    xs, carry, target, lengths, resets, mask, stay = operands
    assert isinstance(cell, PointwiseCell)
    mixing = CellParams(None, params.recurrent_kernel, None, params.recurrent_bias, ())  # type: ignore[arg-type]
    projection = CellParams(params.input_kernel, None, params.bias, None, ())  # type: ignore[arg-type]
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, carry.h.shape), params.units)
    first = cell.project(params, jnp.take(xs, 0, request.time_axis))
    step = _step(cell, p, carry, first, mixing, request.states, lengths is not None)
    rules = recur.Rules(
        cell.mix,
        lambda kernel, h: cell.recurrence.mix_transposed(kernel, h.astype(kernel.dtype)),
        lambda mixing: cell.recurrence.transposed(mixing.recurrent_kernel),
    )
    every = request.checkpoint_every or default_chunk(request)
    if request.differentiation == "reverse":
        plan = sweep.Sweep(
            cell.project, step, rules, request.steps, every, request.time_axis, request.states, request.recompute,
            request.residual_dtype,
        )  # fmt: skip
        moving = sweep.Moving(projection, mixing, p, xs, carry, target)
        return Result(*inplace.run(plan, moving, sweep.Given(lengths, resets, mask, stay)))
    rules = dataclasses.replace(rules, recompute=request.recompute == "gates")

    def chunk(carry: Any, first: Any, now: Any) -> Any:
        (carry, last), (xs, resets, stay) = carry, now
        back = None if resets is None else target
        zs = cell.split(cell.project(projection, xs))
        carry, outputs, (carries, gates) = recur.run(
            step, rules, recur.Inputs(mixing, p, zs, carry, back, resets, mask, stay)
        )
        last = carry if lengths is None else _lengths.last_valid(last, carries, lengths, first)
        return (carry, last), (outputs, carries if request.states else None, gates)

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
    """The cell's pointwise update as a step, which reads its inputs gate by gate."""
    additive = pointwise.additive_gates(cell, p, cell.split(z), cell.split(cell.mix(mixing, carry.h)), carry)

    def update(p: Any, zs: Any, rest: Any, carry: Any) -> Any:
        pieces = iter(rest or ())
        rs = cell.Gates(*(jnp.zeros_like(zg) if a else next(pieces) for zg, a in zip(zs, additive, strict=True)))
        new, gates = cell.pointwise(p, zs, rs, carry)
        return new, gates if states else None

    def fold(zs: Any, r: Array) -> Any:
        """Gates that see only z + r take r into z; the others keep theirs apart."""
        pairs = list(zip(zs, cell.split(r), additive, strict=True))
        folded = cell.Gates(*(zg + rg if a else zg for zg, rg, a in pairs))
        return folded, tuple(rg for _, rg, a in pairs if not a) or None

    def join(zs: Any) -> Array:
        return jnp.concatenate(zs, -1)

    def fold_joined(z: Array, r: Array) -> Any:
        if all(additive):
            return z + r, None
        zs, rest = fold(cell.split(z), r)
        return join(zs), join(rest)

    def part(z: Array, rest: Array | None) -> Any:
        if rest is None:
            return cell.split(z), None
        count = len(cell.gates) - sum(additive)
        return cell.split(z), tuple(jax.lax.split(rest, [cell.hidden_size] * count, rest.ndim - 1))

    return recur.Step(update, fold, states or carries, join, fold_joined, part)
