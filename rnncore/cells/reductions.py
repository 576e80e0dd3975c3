"""Cells whose update reduces over the units of a head, by one declared operation: their mean.

All else of such an update is elementwise, so a compiled loop can take it in stages: each is elementwise, and between
two of them means are taken over the units.  The operation is linear and is its own transpose, so a derivative is of the
same form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rnncore import _products
from rnncore._types import Array
from rnncore.cells.base import Cell, CellParams, GatedCell, named

MEAN = "mean_over_units"
"""The name of the operation in a jaxpr."""


def _mean(a: Array, heads: int) -> Array:
    grouped = a.reshape(*a.shape[:-1], heads, a.shape[-1] // heads)
    return jnp.broadcast_to(jnp.mean(grouped, -1, keepdims=True), grouped.shape).reshape(a.shape)


def _batch(args: Any, dims: Any, heads: int) -> Any:
    return _mean_p.bind(jnp.moveaxis(args[0], dims[0], 0), heads=heads), 0


_mean_p = Primitive(MEAN)
_mean_p.def_impl(_mean)
_mean_p.def_abstract_eval(lambda a, heads: a)
mlir.register_lowering(_mean_p, mlir.lower_fun(_mean, multiple_results=False))
ad.deflinear2(_mean_p, lambda ct, _, heads: [_mean_p.bind(ct, heads=heads)])
batching.primitive_batchers[_mean_p] = _batch


@dataclasses.dataclass(frozen=True)
class ReducingCell(GatedCell):
    """A gated cell whose update takes means over the units of a head, and is elementwise otherwise.

    z_t = receive(p, x_t W, b),   r_t = matmul(U, h_{t-1}),   s_t, gates_t = combine(p, z_t, r_t, s_{t-1})

    A subclass writes `combine`, and `receive` where the inputs are more than x W + b, with `self.mean_over_units` as
    the only operation that is not elementwise.  It then runs in the compiled loop on a CPU as well as on the scan.

    Args:
      hidden_size, recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> class Balanced(rnncore.ReducingCell):
      ...     gates = ("h",)
      ...     def combine(self, p, z, r, carry):
      ...         h = jnp.tanh(z.h + r.h - self.mean_over_units(r.h))
      ...         return self.Carry(h), self.Gates(h)
      >>> cell = Balanced(8, recurrence=rnncore.Heads(2))
      >>> carry, ys = rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> ys.shape
      (2, 5, 8)
    """

    def mean_over_units(self, a: Array) -> Array:
        """The mean of (*batch, H) over the units of each head, at every unit of it: (*batch, H)."""
        return _mean_p.bind(a, heads=getattr(self.recurrence, "num_heads", 1))

    def receive(self, p: Any, z: Any, bias: Any) -> Any:
        """What `combine` sees of the inputs: z + bias where a cell does not define it.

        Args:
          p: as in `combine`, or (H,) for all sequences.
          z: the products x W, by gate, (*batch, H).
          bias: the biases by gate, (H,) or as z; None for none.
        """
        del p
        return z if bias is None else self.Gates(*(a + b for a, b in zip(z, bias, strict=True)))

    def project(self, params: CellParams, xs: Array) -> Array:
        """z = receive(x W) as a slab: (..., D) to (..., G*H)."""
        kernel = params.input_kernel
        zs = self.split(_products.times(xs, kernel.reshape(kernel.shape[0], -1)))
        bias = None if params.bias is None else self.Gates(*params.bias)
        return jnp.concatenate(list(self.receive(params.units, zs, bias)), -1)

    @property
    def projected_size(self) -> int | None:
        """G*H."""
        return len(self.gates) * self.hidden_size


def declared(cell: Cell) -> Cell:
    """The cell that a `Whole` is of; itself where it is none."""
    return cell.cell if isinstance(cell, Whole) else cell


@dataclasses.dataclass(frozen=True)
class Whole(GatedCell):
    """A reducing cell with `receive` as a part of its update, and its biases as per-unit parameters behind its own."""

    cell: ReducingCell = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, cell: ReducingCell) -> Whole:
        """That of a cell."""
        return cls(cell.hidden_size, recurrence=cell.recurrence, cell=cell)

    @property
    def gates(self) -> tuple[str, ...]:
        return self.cell.gates

    @property
    def recurrent_bias(self) -> tuple[str, ...]:
        return self.cell.recurrent_bias

    @property
    def units(self) -> tuple[str, ...]:
        return (*self.cell.units, *(f"bias_{g}" for g in self.gates))

    @property
    def Carry(self) -> Any:
        return self.cell.Carry

    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        own = named("Units", tuple(self.cell.units))(*p[: len(self.cell.units)])
        return self.cell.combine(own, self.cell.receive(own, z, self.Gates(*p[len(own) :])), r, carry)

    def params(self, params: CellParams) -> CellParams:
        """Its parameters, linear in those of the cell."""
        bias = params.bias
        rows = jnp.zeros((len(self.gates), self.hidden_size), params.input_kernel.dtype) if bias is None else bias
        units = named("Units", tuple(self.units))(*params.units, *rows)
        return params._replace(bias=None, units=units)
