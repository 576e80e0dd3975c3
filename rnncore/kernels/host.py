"""What backends that run all steps in one kernel share: everything but the kernels.

z_t is projected for all steps at once, outside, where JAX differentiates it.  The recurrence itself is a
`jax.custom_vjp`: its forward kernel keeps the carries and nothing else, so that the loop is as short as can
be.  Reverse mode forms the recurrent products of all steps again, in one product, and from them what the
derivative needs of every step (`Body.residuals`); its kernel is the loop that is left,

  dr_t, dz_t, ds_{t-1} = transposed linearised step (ds_t),   dh_{t-1} += U^T dr_t

and dU = sum_t h_{t-1}^T dr_t is one product again: no weight gradient in the loop, no atomic sums.

vmap over sequences becomes more of a batch; over the kernel U it is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from rnncore import _compat
from rnncore._types import Array
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.kernels import kernel_body
from rnncore.recurrence.batching import into_batch, out_of_batch
from rnncore.recurrence.request import Operands, Request, Result, only_reverse_and_without


class Loop(NamedTuple):
    """What the loops of both kernels read besides their stacks.

    Fields:
      kernel: (N, H/N, G, H/N), N = 1 for a dense one.
      rest_bias: (n, H) float32, added to r of the gates in `Body.rest`; None where there are none.
      units: per-unit parameters, each (H,) float32.
      start, target: (B, H) per field of the carry: the carry before the first step, and the one that
        resets return to, None without resets.
      lengths: (B,) int32 from 0 to T, or None.
      resets: (T, B) booleans, or None.
    """

    kernel: Array
    rest_bias: Array | None
    units: tuple[Array, ...]
    start: tuple[Array, ...]
    target: tuple[Array, ...] | None
    lengths: Array | None
    resets: Array | None


class Kept(NamedTuple):
    """What the forward kernel gives.

    Fields:
      hs: (T, B, H), in z's dtype.
      others: the carry's other fields after every step, in their order, (T, B, H) in the dtype that was
        asked for; nothing where none was.
      last: (B, H) float32 per field of the carry, after the last valid step, `start` where there is none.
    """

    hs: Array
    others: tuple[Array, ...]
    last: tuple[Array, ...]


class Cotangents(NamedTuple):
    """What the backward kernel gives.

    Fields:
      z: (T, B, G*H), in the residuals' dtype: of z, and of r of the gates that see their sum alone.
      rest: (T, B, n*H), of r of the other gates; None where there are none.
      start: (B, H) float32 per field of the carry: of what came before step 0, for a reset there nothing.
      target: (B, H) float32 per field, summed over the resets; None without resets.
      units: (B, H) float32 per unit parameter, summed over the steps.
    """

    z: Array
    rest: Array | None
    start: tuple[Array, ...]
    target: tuple[Array, ...] | None
    units: tuple[Array, ...]


class Kernels(NamedTuple):
    """The two kernels of a backend.

    Fields:
      forward: (cell, loop, z (T, B, G*H), dtype of `Kept.others` or None) -> Kept.
      backward: (cell, loop, residuals (each (T, B, H)), dhs (T, B, H), dlast (each (B, H) float32; enters after
        step length - 1, nowhere for length 0)) -> Cotangents.
    """

    forward: Callable[..., Kept]
    backward: Callable[..., Cotangents]


def unsupported(request: Request) -> str | None:
    """Reason why no kernel of this kind can serve the request, or None."""
    cell = request.cell
    if not isinstance(cell, PointwiseCell):
        return f"{type(cell).__name__} is not a PointwiseCell, so no kernel can be made of its pointwise update"
    if not isinstance(cell.recurrence, Dense | Heads):
        name = type(cell.recurrence).__name__
        return f"{name} recurrences have no matrix to keep on the chip; it has kernels for Dense and Heads"
    refused = only_reverse_and_without(
        request,
        ("recurrent_mask", "zoneout", "return_states", "checkpoint_every", "recompute"),
        "its kernel runs all steps at once, with lengths and resets only, and keeps the carries",
    )
    return refused or kernel_body.why_not_as_declared(cell, "mix", "output", "split")


def head_size(cell: PointwiseCell) -> int:
    """d: how many units a recurrent product mixes."""
    heads = cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1
    return cell.hidden_size // heads


def run(request: Request, params: CellParams, operands: Operands, kernels: Kernels) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    assert isinstance(cell, PointwiseCell)
    hidden, rows = cell.hidden_size, math.prod(request.batch_shape)

    def flat(a: Array) -> Array:
        return a.reshape(rows, hidden)

    xs = operands.xs.reshape(request.steps, rows, -1)
    z = cell.project(params, xs)
    added, rest_bias = kernel_body.of(cell, (1, 1)).recurrent_biases(params)
    z = z if added is None else z + added.reshape(-1)
    moving = _Moving(
        z, params.recurrent_kernel, jnp.stack(rest_bias) if rest_bias else None, tuple(params.units),
        tuple(map(flat, operands.carry)),
        None if operands.resets is None else tuple(map(flat, operands.target)),
    )  # fmt: skip
    lengths = None if operands.lengths is None else jnp.clip(operands.lengths.reshape(rows), 0, request.steps)
    resets = None if operands.resets is None else operands.resets.reshape(request.steps, rows)
    stored = request.residual_dtype or request.dtype
    last, hs = _recurrence(cell, kernels, stored)(moving, _Given(lengths, resets))
    carry = type(operands.carry)(*(a.reshape(*request.batch_shape, hidden) for a in last))
    return Result(carry, hs.reshape(request.steps, *request.batch_shape, hidden), None, None)


class _Moving(NamedTuple):
    """What the recurrence is differentiated with respect to."""

    z: Array
    kernel: Array
    rest_bias: Array | None
    units: tuple[Array, ...]
    start: tuple[Array, ...]
    target: tuple[Array, ...] | None


class _Given(NamedTuple):
    """What it depends on besides."""

    lengths: Array | None
    resets: Array | None


def _recurrence(cell: PointwiseCell, kernels: Kernels, stored: str) -> Callable:
    """(moving, given) -> (last carry, hs) with its derivative."""
    part = kernel_body.of(cell, (1, 1))
    count, hidden = len(cell.gates), cell.hidden_size
    made: dict[str, Any] = {}  # what `forward` finds when it is traced, for `backward`

    def run_forward(moving: _Moving, given: _Given, keep: str | None) -> Any:
        kept = _over_batch(lambda loop, z: kernels.forward(cell, loop, z, keep))(_loop(cell, moving, given), moving.z)
        last = tuple(a.astype(b.dtype) for a, b in zip(kept.last, moving.start, strict=True))
        return (last, kept.hs), kept.others

    @jax.custom_vjp
    def whole(moving: _Moving, given: _Given) -> Any:
        return run_forward(moving, given, None)[0]

    def forward(moving: _Moving, given: _Given) -> Any:
        made["precision"] = _compat.matmul_precision()
        results, others = run_forward(moving, given, stored)
        return results, (moving, given, results[1], others)

    def backward(held: Any, cotangents: Any) -> Any:
        # The precision that the caller set for the model holds for its gradient too.
        with jax.default_matmul_precision(made["precision"]):
            return transpose(*held, *cotangents), None

    def transpose(moving: _Moving, given: _Given, hs: Array, others: Any, dlast: Any, dhs: Array) -> _Moving:
        dlast = tuple(a.astype(jnp.float32) for a in dlast)
        before = _before(part.hidden, moving, given, hs, others)
        h = before[part.hidden].astype(moving.kernel.dtype)
        r = _gates(mix(cell, moving.kernel, h), count)
        z = [zg.astype(jnp.float32) for zg in _gates(moving.z, count)]
        sums = tuple(zg + rg if a else zg for zg, rg, a in zip(z, r, part.additive, strict=True))
        loop = _loop(cell, moving, given)
        bias = () if loop.rest_bias is None else loop.rest_bias
        rest = tuple(r[g] + b for g, b in zip(part.rest, bias, strict=True))
        residuals = tuple(a.astype(stored) for a in part.residuals(moving.units, sums, rest, before))
        found = _over_batch(lambda *a: kernels.backward(cell, *a))(loop, residuals, dhs, dlast)

        dr = found.z
        if found.rest is not None:
            apart = iter(_gates(found.rest, len(part.rest)))
            pairs = zip(_gates(found.z, count), part.additive, strict=True)
            dr = jnp.concatenate([piece if a else next(apart) for piece, a in pairs], -1)
        dstart = found.start
        if given.lengths is not None:
            never = (given.lengths == 0)[:, None]
            dstart = tuple(a + jnp.where(never, b, 0) for a, b in zip(dstart, dlast, strict=True))
        moved = _Moving(
            z=found.z,
            kernel=_mix_gradient(cell, moving.kernel, h, dr.astype(h.dtype)),
            rest_bias=None if found.rest is None else _sum(found.rest).reshape(len(part.rest), hidden),
            units=tuple(jnp.sum(a, 0) for a in found.units),
            start=dstart,
            target=found.target,
        )
        return jax.tree.map(lambda a, b: a.astype(b.dtype), moved, moving)

    whole.defvjp(forward, backward)
    return whole


def _sum(stack: Array) -> Array:
    return jnp.sum(stack.astype(jnp.float32), (0, 1))


def _loop(cell: PointwiseCell, moving: _Moving, given: _Given) -> Loop:
    size = head_size(cell)
    kernel = moving.kernel.reshape(-1, size, len(cell.gates), size).astype(moving.z.dtype)
    bias, units = jax.tree.map(lambda a: a.astype(jnp.float32), (moving.rest_bias, moving.units))
    return Loop(kernel, bias, units, moving.start, moving.target, *given)


def _gates(slab: Array, count: int) -> list[Array]:
    return jnp.split(slab, count, -1)


def _before(hidden: int, moving: _Moving, given: _Given, hs: Array, others: tuple[Array, ...]) -> tuple[Array, ...]:
    """The carry that each step began with, after resets."""
    stacks = list(others)
    stacks.insert(hidden, hs)
    before = []
    for n, stack in enumerate(stacks):
        a = jnp.concatenate([moving.start[n].astype(stack.dtype)[None], stack[:-1]])
        if given.resets is not None:
            assert moving.target is not None
            a = jnp.where(given.resets[..., None], moving.target[n].astype(a.dtype), a)
        before.append(a)
    return tuple(before)


def mix(cell: PointwiseCell, kernel: Array, h: Array) -> Array:
    """r for all steps, (T, B, H) to (T, B, G*H) in float32."""
    size, count = head_size(cell), len(cell.gates)
    heads = h.reshape(*h.shape[:-1], -1, size)
    blocks = kernel.reshape(-1, size, count, size)
    r = jnp.einsum("tbnd,ndge->tbgne", heads, blocks, preferred_element_type=jnp.float32)
    return r.reshape(*h.shape[:-1], -1)


def _mix_gradient(cell: PointwiseCell, kernel: Array, h: Array, dr: Array) -> Array:
    """dU, summed in float32."""
    size, count = head_size(cell), len(cell.gates)
    heads = h.reshape(*h.shape[:-1], -1, size)
    slab = dr.reshape(*h.shape[:-1], count, -1, size)
    return jnp.einsum("tbnd,tbgne->ndge", heads, slab, preferred_element_type=jnp.float32).reshape(kernel.shape)


# ----------------------------------------------------------------------------------------- vmap

# Where the batch lies in each field; everything else of a loop is shared by the sequences.
_BATCH = {"start": 0, "target": 0, "lengths": 0, "resets": 1}


def _over_batch(kernel: Callable) -> Callable:
    """(loop, *stacks) -> named tuple, with vmap taken into the batch.

    Stacks are (T, B, ...), and (B, H) where they have no time; so are the results.
    """

    @custom_vmap
    def call(loop: Loop, *stacks: Any) -> Any:
        # Not every kernel says itself that inside shard_map its results differ over the devices.
        axes = _compat.varying_axes(loop.start[0])
        return jax.tree.map(lambda a: _compat.vary_over(a, axes), kernel(loop, *stacks))

    def rule(size: int, batched: Any, loop: Loop, *stacks: Any) -> Any:
        loop_batched, *stacks_batched = batched
        shared = (loop_batched.kernel, loop_batched.rest_bias, loop_batched.units)
        if any(jax.tree.leaves(shared)):
            raise NotImplementedError(
                "vmap over the parameters of a recurrence that runs in one kernel: the kernel keeps one set of them "
                "on the chip. Map over sequences only, or use backend='scan'."
            )

        fields = {
            name: jax.tree.map(
                functools.partial(into_batch, size, axis), getattr(loop, name), getattr(loop_batched, name)
            )
            for name, axis in _BATCH.items()
        }
        stacks = jax.tree.map(lambda a, b: into_batch(size, a.ndim - b - 2, a, b), tuple(stacks), tuple(stacks_batched))
        out = call(loop._replace(**fields), *stacks)

        out = jax.tree.map(lambda a: out_of_batch(size, a.ndim - 2, a), out)
        return out, jax.tree.map(lambda _: True, out)

    call.def_vmap(rule)
    return call
