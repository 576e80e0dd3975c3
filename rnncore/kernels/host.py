"""What backends that run all steps in one kernel share: everything but the kernels.

z_t is projected for all steps at once, outside.  The forward kernel keeps the carries and nothing else, so that
the loop is as short as can be.  Reverse mode forms the recurrent products of all steps again, in one product, and
from them what the derivative needs of every step (`Body.residuals`); its kernel is the loop that is left,

  dr_t, dz_t, ds_{t-1} = transposed linearised step (ds_t),   dh_{t-1} += U^T dr_t

and dU = sum_t h_{t-1}^T dr_t is one product again: no weight gradient in the loop, no atomic sums.

vmap over sequences becomes more of a batch; over parameters it runs one call after the other.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import Cell, CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.kernels import kernel_body
from rnncore.recurrence import mesh, primitives
from rnncore.recurrence.backend import LoopBackend, without
from rnncore.recurrence.batching import over_batch
from rnncore.recurrence.run import Constants, Differentiable, Request, Result, dense


class Loop(NamedTuple):
    """What the loops of both kernels read besides their stacks.

    Fields:
      kernel: (N, H/N, G, H/N), N = 1 for a dense one.
      rest_bias: (n, H) float32, added to r of the gates in `Body.rest`; None where there are none.
      units: per-unit parameters, each (H,) float32.
      start, reset_carry: (B, H) per field of the carry: the carry before the first step, and the one that
        resets return to, None without resets.
      lengths: (B,) int32 from 0 to T, or None.
      resets: (T, B) booleans, or None.
    """

    kernel: Array
    rest_bias: Array | None
    units: tuple[Array, ...]
    start: tuple[Array, ...]
    reset_carry: tuple[Array, ...] | None
    lengths: Array | None
    resets: Array | None


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

    def run(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result:
        return mesh.by_device(functools.partial(primitives.run, self), request, differentiable, constants)

    def forward(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result:
        return self._run(_Arrays(request, differentiable, constants), None)[0]

    def forward_with_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants
    ) -> tuple[Result, PyTree]:
        return self._run(_Arrays(request, differentiable, constants), request.residual_dtype or request.dtype)

    def _run(self, arrays: _Arrays, keep: str | None) -> tuple[Result, PyTree]:
        forward, cell, request = self.kernels().forward, arrays.cell, arrays.request
        differentiable = arrays.differentiable
        found = _call(lambda loop, z: forward(cell, loop, z, keep), arrays.loop, arrays.z)
        last = jax.tree.map(
            lambda a, b: a.reshape(b.shape).astype(b.dtype), cell.Carry(*found.last), differentiable.initial_carry
        )
        hs = found.hs.reshape(request.steps, *request.batch_shape, cell.hidden_size)
        batched = jax.tree.map(lambda a: a.reshape(request.steps, *request.batch_shape, -1), (arrays.z, found.others))
        return Result(last, hs, None, None), batched

    def backward(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: PyTree,
        cotangents: Result, wanted: Differentiable,
    ) -> Differentiable:  # fmt: skip
        cotangents = dense(cotangents, result)
        rows = math.prod(request.batch_shape)
        z, others = jax.tree.map(lambda a: a.reshape(request.steps, rows, a.shape[-1]), residuals)
        arrays = _Arrays(request, differentiable, constants, z)
        cell, part, loop = arrays.cell, arrays.part, arrays.loop
        count, stored = len(cell.gates), request.residual_dtype or request.dtype
        dhs = arrays.flat(cotangents.outputs, 1)
        dlast = tuple(arrays.flat(a, 0).astype(jnp.float32) for a in cotangents.carry)
        stacks = (*others[: part.hidden], arrays.flat(result.outputs, 1), *others[part.hidden :])
        before = tuple(previous(loop, n, a) for n, a in enumerate(stacks))
        kernel = differentiable.params.recurrent_kernel
        h = before[part.hidden].astype(kernel.dtype)
        r = _gates(recurrent_matmul(cell, kernel, h), count)
        zs = [zg.astype(jnp.float32) for zg in _gates(z, count)]
        sums = tuple(zg + rg if a else zg for zg, rg, a in zip(zs, r, part.additive, strict=True))
        bias = () if loop.rest_bias is None else loop.rest_bias
        rest = tuple(r[g] + b for g, b in zip(part.rest, bias, strict=True))
        needed = tuple(a.astype(stored) for a in part.residuals(loop.units, sums, rest, before))
        found = _call(lambda *a: self.kernels().backward(cell, *a), loop, needed, dhs, dlast)

        dr, drest, dunits, dstart = summed(part, found, loop.lengths, dlast)
        through: Any = jax.vjp(arrays.prepared, differentiable.params, differentiable.xs)[1]
        shared = jax.tree.map(lambda a, b: a.astype(b.dtype), (drest, dunits), tuple(arrays.shared))
        dparams, dxs = through((found.z.astype(z.dtype), *shared))
        dkernel = kernel_cotangent(loop.kernel, h, dr.astype(h.dtype)).reshape(kernel.shape).astype(kernel.dtype)
        dparams = dparams._replace(recurrent_kernel=dkernel)

        def carry(found: Any, like: Any) -> Any:
            if like is None:
                return None
            return jax.tree.map(lambda a, b: a.reshape(b.shape).astype(b.dtype), type(like)(*found), like)

        _, _, start, reset_carry = differentiable
        return Differentiable(dparams, dxs, carry(dstart, start), carry(found.reset_carry, reset_carry))


class _Arrays:
    """The arrays of a run as the kernels have them, with one batch axis."""

    def __init__(self, request: Request, differentiable: Differentiable, constants: Constants, z: Array | None = None):
        assert isinstance(request.cell, PointwiseCell)
        self.request, self.cell, self.differentiable = request, request.cell, differentiable
        self.part = kernel_body.of(self.cell, (1, 1))
        self.rows = math.prod(request.batch_shape)
        projected, *self.shared = self.prepared(differentiable.params, differentiable.xs)
        self.z = projected if z is None else z
        size, count = head_size(self.cell), len(self.cell.gates)
        bias, units = jax.tree.map(lambda a: a.astype(jnp.float32), tuple(self.shared))
        lengths, resets = constants.lengths, constants.resets
        _, _, start, reset_carry = differentiable
        self.loop = Loop(
            differentiable.params.recurrent_kernel.reshape(-1, size, count, size).astype(self.z.dtype), bias, units,
            tuple(self.flat(a, 0) for a in start),
            None if resets is None else tuple(self.flat(a, 0) for a in reset_carry),
            None if lengths is None else lengths.reshape(self.rows),
            None if resets is None else resets.reshape(request.steps, self.rows),
        )  # fmt: skip

    def flat(self, a: Array, axis: int) -> Array:
        """(..., *batch, H) with one batch axis."""
        return a.reshape(*a.shape[:axis], self.rows, a.shape[-1])

    def prepared(self, params: CellParams, xs: Array) -> tuple[Array, Array | None, tuple[Array, ...]]:
        """What a loop reads of parameters and inputs but the kernel: z, the rest's biases, per-unit parameters."""
        z = self.cell.project(params, xs.reshape(self.request.steps, self.rows, -1))
        added, rest_bias = self.part.recurrent_biases(params)
        z = z if added is None else z + added.reshape(-1)
        return z, jnp.stack(rest_bias) if rest_bias else None, tuple(params.units)


def why_no_kernel(cell: Cell) -> str | None:
    """Reason why a kernel that keeps the recurrent matrix on the chip cannot be made of a cell, or None."""
    if not isinstance(cell, PointwiseCell):
        return f"{type(cell).__name__} is not a PointwiseCell, so no kernel can be made of its pointwise update"
    if type(cell.recurrence) not in (Dense, Heads):
        name = type(cell.recurrence).__name__
        return f"{name} recurrences have no matrix to keep on the chip; it has kernels for Dense and Heads"
    return pointwise.why_not_as_declared(cell, "recurrent_matmul", "output", "split")


def head_count(cell: PointwiseCell) -> int:
    """N: 1 of a dense recurrence."""
    return cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1


def head_size(cell: PointwiseCell) -> int:
    """d: how many units a recurrent product mixes."""
    return cell.hidden_size // head_count(cell)


def _gates(slab: Array, count: int) -> list[Array]:
    return jnp.split(slab, count, -1)


def previous(loop: Any, field: int, stack: Array) -> Array:
    """A field of the carry, (T, B, H) after every step, as each step began with it: after resets."""
    before = jnp.concatenate([loop.start[field].astype(stack.dtype)[None], stack[:-1]])
    if loop.resets is None:
        return before
    return jnp.where(loop.resets[..., None], loop.reset_carry[field].astype(stack.dtype), before)


def summed(
    part: kernel_body.Body, found: Cotangents, lengths: Array | None, dlast: tuple[Array, ...]
) -> tuple[Array, Array | None, tuple[Array, ...], tuple[Array, ...]]:
    """The cotangents of r (T, B, G*H), of biases and per-unit parameters, and of the carry before step 0."""
    dr, drest, dstart = found.z, None, found.start
    if found.rest is not None:
        apart = iter(_gates(found.rest, len(part.rest)))
        pairs = zip(_gates(found.z, len(part.additive)), part.additive, strict=True)
        dr = jnp.concatenate([dz if additive else next(apart) for dz, additive in pairs], -1)
        drest = jnp.sum(found.rest.astype(jnp.float32), (0, 1)).reshape(len(part.rest), -1)
    if lengths is not None:
        never = (lengths == 0)[:, None]
        dstart = tuple(a + jnp.where(never, b, 0) for a, b in zip(dstart, dlast, strict=True))
    return dr, drest, tuple(jnp.sum(a, 0) for a in found.units), dstart


def kernel_cotangent(kernel: Array, h: Array, dr: Array) -> Array:
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


# Where the batch lies in each field of a loop; None: the sequences share it.
_BATCH: dict[str, int | None] = dict(zip(Loop._fields, (None, None, None, 0, 0, 0, 1), strict=True))


def _call(kernel: Callable, loop: Loop, *stacks: Any) -> Any:
    """A kernel of (loop, *stacks) under any number of maps; stacks are (T, B, ...), or (B, H), and so are results."""
    leaves, tree = jax.tree.flatten((loop, stacks))
    known: list[int | None] = [axis for name, axis in _BATCH.items() for _ in jax.tree.leaves(getattr(loop, name))]
    known += [a.ndim - 2 for a in jax.tree.leaves(stacks)]
    return over_batch(lambda groups, *flat: kernel(*_joined(tree, flat)), known, lambda a: a.ndim - 2)(*leaves)


def _joined(tree: Any, flat: Any) -> tuple[Any, ...]:
    loop, stacks = jax.tree.unflatten(tree, flat)
    return loop, *stacks
