"""What backends that run all steps in one kernel share: everything but the kernels.

The inputs are projected to z_t outside the kernel, for all steps at once.  The forward kernel stores the carries only,
which keeps its loop short.  Reverse mode recomputes the recurrent products of all steps in one product, and from them
the residuals of every step (`Body.residuals`).  The backward kernel is the loop that remains,

  dr_t, dz_t, ds_{t-1} = transposed linearised step (ds_t),   dh_{t-1} += U^T dr_t

and dU = sum_t h_{t-1}^T dr_t is again one product: no weight gradients in the loop, no atomic sums.

vmap over sequences extends the batch; vmap over parameters runs one call after the other, or one call with more heads.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, GatedCell, PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.kernels import kernel_body
from rnncore.recurrence import mesh, primitives
from rnncore.recurrence.backend import LoopBackend, without
from rnncore.recurrence.batching import HEADS, LAST, Units, over_batch
from rnncore.recurrence.run import Differentiable, Problem, Request, Result, dense


class Loop(NamedTuple):
    """What the loops of both kernels read besides their stacks.

    All up to `reset_carry` is differentiable.

    Fields:
      kernel: (N, H/N, G, H/N), N = 1 for a dense one.
      rest_bias: (n, H) float32, added to r of the gates in `Body.rest`; None where there are none.
      units: per-unit parameters, each (H,) float32.
      start, reset_carry: (B, H) float32 per field of the carry: the carry before the first step, and the one that
        resets return to, None without resets.
      lengths: (B,) int32 from 0 to T, or None.
      resets: (T, B) booleans, or None.
      mask: (B, H), multiplies h where it enters the product, or None; as zoneout, for kernels that take it.
      zoneout: for each field of the carry None or what of it stays, (T, B, H) booleans or shares or one share; or None.
    """

    kernel: Array
    rest_bias: Array | None
    units: tuple[Array, ...]
    start: tuple[Array, ...]
    reset_carry: tuple[Array, ...] | None
    lengths: Array | None = None
    resets: Array | None = None
    mask: Array | None = None
    zoneout: tuple[Array | None, ...] | None = None


class Outputs(NamedTuple):
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
      reset_carry: (B, H) float32 per field, summed over the resets; None without resets.
      units: (B, H) float32 per unit parameter, summed over the steps.
    """

    z: Array
    rest: Array | None
    start: tuple[Array, ...]
    reset_carry: tuple[Array, ...] | None
    units: tuple[Array, ...]


class Kernels(NamedTuple):
    """The two kernels of a backend.

    Fields:
      forward: (cell, loop, z (T, B, G*H), dtype of `Outputs.others` or None) -> Outputs.
      backward: (cell, loop, residuals (each (T, B, H)), dhs (T, B, H), dlast (each (B, H) float32; enters after
        step length - 1, nowhere for length 0)) -> Cotangents.
    """

    forward: Callable[..., Outputs]
    backward: Callable[..., Cotangents]


class KernelBackend(LoopBackend):
    """A backend of two kernels, with all that stands around them."""

    maps_into_batch = True

    @abc.abstractmethod
    def kernels(self) -> Kernels:
        """The kernels; imported late, because Pallas takes a while to import."""

    def unsupported(self, request: Request) -> str | None:
        refused = why_no_kernel(request.cell) or without(
            request,
            ("recurrent_mask", "zoneout", "return_states", "checkpoint_every", "recompute"),
            "its kernel runs all steps at once, with lengths and resets only, and keeps the carries",
        )
        if refused is None and 0 in request.batch_shape:
            refused = f"it takes no empty batch, and this one is {request.batch_shape}"
        return refused

    def run(self, problem: Problem) -> Result:
        return mesh.by_device(functools.partial(primitives.run, self), problem)

    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        request, forward, arrays = problem.request, self.kernels().forward, Arrays(problem)
        z, loop = arrays.operands(problem.differentiable)
        stored = arrays.stored if keep else None
        found = mapped(lambda loop, z: forward(arrays.cell, loop, z, stored), arrays.with_constants(loop), z)
        last = [a.reshape(*request.batch_shape, -1) for a in found.last]
        hs, z, *others = (a.reshape(request.steps, *request.batch_shape, -1) for a in (found.hs, z, *found.others))
        return result(request, arrays.part, arrays.dtypes, last, hs), (z, tuple(others)) if keep else None

    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        cotangents = dense(cotangents, result)
        arrays = Arrays(problem)
        operands, back = jax.vjp(arrays.operands, problem.differentiable)
        cell, part, loop = arrays.cell, arrays.part, arrays.with_constants(operands[1])
        z, others = jax.tree.map(arrays.flat, residuals)
        count = len(cell.gates)
        stacks = (*others[: part.hidden], arrays.flat(result.outputs), *others[part.hidden :])
        before = tuple(previous(loop, n, a) for n, a in enumerate(stacks))
        h = before[part.hidden].astype(loop.kernel.dtype)
        r = jnp.split(recurrent_matmul(cell, loop.kernel, h), count, -1)
        zs = [zg.astype(jnp.float32) for zg in jnp.split(z, count, -1)]
        sums = tuple(zg + rg if a else zg for zg, rg, a in zip(zs, r, part.additive, strict=True))
        bias = () if loop.rest_bias is None else loop.rest_bias
        rest = tuple(r[g] + b for g, b in zip(part.rest, bias, strict=True))
        needed = tuple(a.astype(arrays.stored) for a in part.residuals(loop.units, sums, rest, before))
        dhs, dlast = arrays.flat(cotangents.outputs), arrays.carry(cotangents.carry)
        found = mapped(lambda *a: self.kernels().backward(cell, *a), loop, needed, dhs, dlast)
        return back(arrays.cotangents(operands, found, h, dlast))[0]


class Arrays:
    """The arrays of a run as the kernels have them, with one batch axis."""

    def __init__(self, problem: Problem):
        request = problem.request
        assert isinstance(request.cell, PointwiseCell)
        self.request, self.cell, self.constants = request, request.cell, problem.constants
        self.part = kernel_body.of(self.cell, (1, 1), "float32", request.return_states)
        self.rows = math.prod(request.batch_shape)
        self.dtypes = [a.dtype for a in problem.differentiable.initial_carry]
        self.stored = request.residual_dtype or request.dtype  # of what is kept

    def operands(self, differentiable: Differentiable) -> tuple[Array, Loop]:
        """What the kernels read of what is differentiable: z (T, B, G*H), and the loop without constants."""
        params, xs, start, reset_carry = differentiable
        count, size = len(self.cell.gates), head_size(self.cell)
        z = self.cell.project(params, xs.reshape(self.request.steps, self.rows, -1))
        added, rest = self.part.recurrent_biases(params)
        z = z if added is None else z + added.reshape(-1)
        return z, Loop(
            params.recurrent_kernel.reshape(-1, size, count, size).astype(z.dtype),
            jnp.stack(rest).astype(jnp.float32) if rest else None,
            tuple(a.astype(jnp.float32) for a in params.units), self.carry(start),
            None if self.constants.resets is None else self.carry(reset_carry),
        )  # fmt: skip

    def with_constants(self, loop: Loop) -> Loop:
        lengths, resets, mask, zoneout = self.constants
        return loop._replace(
            lengths=None if lengths is None else lengths.reshape(self.rows),
            resets=None if resets is None else resets.reshape(self.request.steps, self.rows),
            mask=None if mask is None else mask.reshape(self.rows, -1),
            zoneout=jax.tree.map(lambda a: self.flat(a) if a.ndim else a, None if zoneout is None else tuple(zoneout)),
        )

    def flat(self, a: Array) -> Array:
        """(T, *batch, H) with one batch axis."""
        return a.reshape(self.request.steps, self.rows, a.shape[-1])

    def carry(self, fields: Any) -> tuple[Array, ...]:
        """(*batch, H) each, as (B, H) in float32."""
        return tuple(a.reshape(self.rows, a.shape[-1]).astype(jnp.float32) for a in fields)

    def cotangents(self, operands: Any, found: Cotangents, h: Array, dlast: tuple[Array, ...]) -> Any:
        """The cotangents of the operands, from those that a backward kernel gave and h as it entered the product."""
        dr, drest, dstart, lengths = found.z, None, found.start, self.constants.lengths
        if found.rest is not None:
            apart = iter(jnp.split(found.rest, len(self.part.rest), -1))
            pairs = zip(jnp.split(found.z, len(self.part.additive), -1), self.part.additive, strict=True)
            dr = jnp.concatenate([dz if additive else next(apart) for dz, additive in pairs], -1)
            drest = jnp.sum(found.rest.astype(jnp.float32), (0, 1)).reshape(len(self.part.rest), -1)
        if lengths is not None:
            never = (lengths.reshape(self.rows) == 0)[:, None]
            dstart = tuple(a + jnp.where(never, b, 0) for a, b in zip(dstart, dlast, strict=True))
        dunits = tuple(jnp.sum(a, 0) for a in found.units)
        dkernel = _kernel_cotangent(operands[1].kernel, h, dr.astype(h.dtype))
        made = found.z, Loop(dkernel, drest, dunits, dstart, found.reset_carry)
        return jax.tree.map(lambda d, a: d.astype(a.dtype), made, operands)


def why_no_kernel(cell: Cell) -> str | None:
    """Reason why a kernel that keeps the recurrent matrix on the chip cannot be made of a cell, or None."""
    if not isinstance(cell, PointwiseCell):
        return f"{type(cell).__name__} is not a PointwiseCell, so no kernel can be made of its pointwise update"
    if type(cell.recurrence) not in (Dense, Heads):
        name = type(cell.recurrence).__name__
        return f"{name} recurrences have no matrix to keep on the chip; it has kernels for Dense and Heads"
    return pointwise.why_not_as_declared(cell, "recurrent_matmul", "output", "split")


def head_count(cell: GatedCell) -> int:
    """N: 1 of a dense recurrence."""
    return cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1


def head_size(cell: PointwiseCell) -> int:
    """d: how many units a recurrent product mixes."""
    return cell.hidden_size // head_count(cell)


def previous(loop: Loop, field: int, stack: Array) -> Array:
    """A field of the carry, (T, B, H) after every step, as each step began with it: after resets."""
    before = jnp.concatenate([loop.start[field].astype(stack.dtype)[None], stack[:-1]])
    if loop.resets is None:
        return before
    assert loop.reset_carry is not None
    return jnp.where(loop.resets[..., None], loop.reset_carry[field].astype(stack.dtype), before)


def result(
    request: Request, part: kernel_body.Body, dtypes: Sequence[Any], last: Sequence[Array], outputs: Array,
    others: Sequence[Array] = (), gates: Sequence[Array] = (),
) -> Result:  # fmt: skip
    """A run's result with its states, where they are asked for, in the dtypes of the carry.

    Args:
      request, part, dtypes: of the run; dtypes by field of the carry.
      last: (*batch, H) per field.
      outputs: with time along the request's axis.
      others, gates: the carry's fields but h, and the gates, (T, *batch, H) each.
    """

    def carry(arrays: Sequence[Array]) -> Any:
        return part.cell.Carry(*(a.astype(d) for a, d in zip(arrays, dtypes, strict=True)))

    outputs = outputs.astype(dtypes[part.hidden])
    if not request.return_states:
        return Result(carry(last), outputs)
    hs = jnp.moveaxis(outputs, request.time_axis, 0)
    leaves, tree = jax.tree.flatten(part.gates)
    # Gates are of the dtype of what they are made of; a cell may call a boolean or an integer one.
    types = [request.dtype if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype for a in leaves]
    named = jax.tree.unflatten(tree, [a.astype(d) for a, d in zip(gates, types, strict=True)])
    return Result(carry(last), outputs, carry([*others[: part.hidden], hs, *others[part.hidden :]]), named)


def _kernel_cotangent(kernel: Array, h: Array, dr: Array) -> Array:
    """dU (N, d, G, d), summed over steps and sequences in float32."""
    heads, size, count, _ = kernel.shape
    h, slab = h.reshape(*h.shape[:-1], heads, size), dr.reshape(*h.shape[:-1], count, heads, size)
    return jnp.einsum("tbnd,tbgne->ndge", h, slab, preferred_element_type=jnp.float32)


def recurrent_matmul(cell: PointwiseCell, kernel: Array, h: Array) -> Array:
    """r for all steps, (T, B, H) to (T, B, G*H) in float32."""
    size, count = head_size(cell), len(cell.gates)
    heads = h.reshape(*h.shape[:-1], -1, size)
    blocks = kernel.reshape(-1, size, count, size)
    r = jnp.einsum("tbnd,ndge->tbgne", heads, blocks, preferred_element_type=jnp.float32)
    return r.reshape(*h.shape[:-1], -1)


_SHARED = ("kernel", "rest_bias", "units")
"""The fields of a loop that all sequences share."""


def mapped(
    kernel: Callable[..., Any], loop: Loop, *stacks: Any, step: Callable[[Loop, int], float | None] | None = None
) -> Any:
    """`kernel(loop, *stacks)` under any number of maps; stacks are (..., B, H), and so are the results.

    Maps of sequences are more of the batch; those of parameters one call after the other, or more heads of one where
    that is predicted to be faster.

    Args:
      step: what a step of a loop over so many sequences is predicted to take, or None where that is not known; for a
        kernel that reads the number of heads off the loop.
    """
    leaves, tree = jax.tree.flatten((loop, stacks))
    names = [name for name, field in loop._asdict().items() for _ in jax.tree.leaves(field)]
    names += ["stack"] * (len(leaves) - len(names))

    def whole(groups: int, *flat: Array) -> Any:
        loop, stacks = jax.tree.unflatten(tree, flat)
        return kernel(loop, *stacks)

    def worthwhile(size: int, together: Sequence[Any], one: Sequence[Any]) -> bool:
        assert step is not None
        wide, single = (jax.tree.unflatten(tree, flat)[0] for flat in (together, one))
        rows = single.start[0].shape[0]
        at_once, alone = step(wide, rows), step(single, rows)
        return at_once is not None and alone is not None and at_once <= size * alone

    units = None
    if step is not None:
        units = Units(loop.start[0].shape[-1], list(map(_units_of, names, leaves)), worthwhile)
    return over_batch(whole, list(map(_batch_of, names, leaves)), lambda a: a.ndim - 2, units)(*leaves)


def _batch_of(field: str, a: Array) -> int | None:
    """Where the batch lies in an array of a field of a loop; None: the sequences share it."""
    if field in _SHARED or a.ndim == 0:
        return None
    return 0 if field == "lengths" else 1 if field == "resets" else a.ndim - 2


def _units_of(field: str, a: Array) -> int | None:
    """The same of heads and units, as `Units` has it."""
    if field in ("lengths", "resets") or a.ndim == 0:
        return None
    return HEADS if field == "kernel" else LAST
