"""The body of a whole-sequence kernel: a cell's pointwise update and its vjp, as flat lists of operations.

Both are traced outside the kernel, at the shape of one of its tiles, with nested calls and custom rules inlined, and
evaluated inside it.  Operations that a kernel language lacks are expressed by others (`LOWERINGS`); where that is not
possible, `Body.why_not` gives the reason.  The vjp transposes the linearised step of `pointwise.linearize`: it is
arithmetic on values that are computed outside the kernel, for all steps at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore import _compat
from rnncore._types import Array
from rnncore.cells import pointwise
from rnncore.cells.base import CellParams, GatedCell, named
from rnncore.kernels.op_lowerings import LOWERINGS

Tiles = tuple[Array, ...]


class Body:
    """What a kernel evaluates for one cell, on tiles of one shape and dtype.

    Tiles stand in tuples: `units` per parameter of `cell.units`, `zs` and `rs` per gate, `carry` per field
    of the carry, `rest` per gate that does not see z and r as their sum alone.

    Args:
      cell: the cell.
      shape: of a tile.
      dtype: of a tile; float64 only where JAX has it.
      states: whether the gates are results too, behind the new carry.

    Attributes:
      additive: for each gate whether it sees z + r alone.
      rest: the indices of the gates that do not.
      hidden: the index of h in the carry.
      width: how many residuals there are.
      emitted: how many gates the update returns; 0 unless `states`.
    """

    def __init__(self, cell: GatedCell, shape: tuple[int, ...], dtype: str = "float32", states: bool = False):
        self.cell, self.shape, self.dtype = cell, shape, dtype
        self.states = states
        count = len(cell.gates)
        self.tile = jax.ShapeDtypeStruct(shape, dtype)
        self._units = named("Units", tuple(cell.units))(*(self.tile for _ in cell.units))
        self._gates = cell.Gates(*(self.tile for _ in cell.gates))
        self._carry = cell.Carry(*(self.tile for _ in cell.Carry._fields))
        self.hidden = cell.Carry._fields.index("h")
        with _alone(dtype):
            self.additive = pointwise.additive_gates(cell, self._units, self._gates, self._gates, self._carry)
        self.rest = tuple(g for g in range(count) if not self.additive[g])
        self._sizes = (len(cell.units), count, len(self.rest), len(self._carry))
        self.emitted = len(jax.tree.leaves(self.gates)) if states else 0

    # ------------------------------------------------------------------------- inside the kernel

    def forward(self, units: Tiles, zs: Tiles, rs: Tiles, carry: Tiles) -> Tiles:
        """The new carry."""
        return evaluate(self._forward, (*units, *zs, *rs, *carry))

    def backward(self, units: Tiles, residuals: Tiles, dcarry: Tiles) -> tuple[Tiles, Tiles, Tiles, Tiles]:
        """The cotangents of the units, of z, of r of the gates in `rest`, and of the old carry."""
        flat = evaluate(self._backward, (*units, *residuals, *dcarry))
        dunits, dzs, drest, dold = _parted(flat, self._sizes)
        return dunits, dzs, drest, dold

    def why_not(self, known: Collection[str]) -> str | None:
        """Reason why a kernel language with these operations cannot say the body, or None."""
        for what, closed in (("update", self._forward), ("derivative", self._backward)):
            lacking = {e.primitive.name for e in closed.jaxpr.eqns} - set(known) - set(LOWERINGS)
            lacking |= {why for why in map(_unusual, closed.jaxpr.eqns) if why}
            if lacking:
                names = ", ".join(f"`{name}`" for name in sorted(lacking))
                return f"the {what} of {type(self.cell).__name__} applies {names}, which its kernel language lacks"
        return None

    # ------------------------------------------------------------------------------ outside of it

    def residuals(self, units: Tiles, zs: Tiles, rest: Tiles, carry: Tiles) -> Tiles:
        """What `backward` needs of a step besides its units, for any number of steps at once.

        zs of a gate that sees z + r alone are these sums; `rest` is r of the others.
        """
        shape = jnp.broadcast_shapes(*(a.shape for a in (*zs, *carry)))
        args = [jnp.broadcast_to(a, shape).astype(self.dtype) for a in (*units, *zs, *rest, *carry)]
        return self._kept(self._linearized(shape), args)[1]

    @functools.cached_property
    def width(self) -> int:
        return sum(not self._is_unit(n) for n in self._split.needed)

    def recurrent_biases(self, params: CellParams) -> tuple[Array | None, list[Array]]:
        """r's biases: of the gates that see z + r alone as (G, H) to add to z, or None; (H,) for each of `rest`."""
        gates, biases = self.cell.gates, params.recurrent_bias
        rows = {} if biases is None else dict(zip(self.cell.recurrent_bias, biases, strict=True))
        none = jnp.zeros((self.cell.hidden_size,), params.recurrent_kernel.dtype)
        ours = [none if g in self.rest else rows.get(name, none) for g, name in enumerate(gates)]
        added = any(name in rows and g not in self.rest for g, name in enumerate(gates))
        return jnp.stack(ours) if added else None, [rows.get(gates[g], none) for g in self.rest]

    # ------------------------------------------------------------------------------------ tracing

    def _is_unit(self, index: int | None) -> bool:
        return index is not None and index < self._sizes[0]

    def _with_sums(self, *flat: Array) -> Tiles:
        """`pointwise` on sums z + r where these are all that it sees."""
        units, zs, rest, carry = _parted(flat, self._sizes)
        apart = iter(rest)
        rs = [jnp.zeros_like(z) if a else next(apart) for z, a in zip(zs, self.additive, strict=True)]
        return self._update(units, zs, rs, carry)

    def _update(self, units: Any, zs: Any, rs: Any, carry: Any) -> Tiles:
        cell = self.cell
        new, gates = cell.combine(
            type(self._units)(*units), cell.Gates(*zs), cell.Gates(*rs), cell.Carry(*carry)
        )  # fmt: skip
        results = (*new, *jax.tree.leaves(gates)) if self.states else new
        return tuple(jnp.broadcast_to(a, carry[0].shape).astype(self.dtype) for a in results)

    @functools.cached_property
    def gates(self) -> Any:
        """What the cell calls its gates, as shapes."""
        with _alone(self.dtype):
            return jax.eval_shape(self.cell.combine, self._units, self._gates, self._gates, self._carry)[1]

    def _kept(self, split: pointwise.Linearized, args: Any) -> tuple[Tiles, Tiles]:
        """(new carry, residuals)"""
        new, saved = split.forward(*args)
        rest = iter(saved)
        values = [next(rest) if n is None else args[n] for n in split.needed]
        return new, tuple(v for v, n in zip(values, split.needed, strict=True) if not self._is_unit(n))

    @functools.cached_property
    def _forward(self) -> Any:
        units, count, _, fields = self._sizes

        def forward(*flat: Array) -> Tiles:
            return self._update(*_parted(flat, (units, count, count, fields)))

        return inlined(forward, *[self.tile] * (units + 2 * count + fields))

    @functools.cached_property
    def with_sums(self) -> Any:
        """The update as a jaxpr of (units, zs, rest, carry), zs z + r of the gates that see it alone: the new carry."""
        return inlined(self._with_sums, *[self.tile] * sum(self._sizes))

    @functools.cached_property
    def keeping(self) -> Any:
        """The same with the residuals behind the new carry."""
        split = self._split
        return inlined(lambda *flat: sum(self._kept(split, flat), ()), *[self.tile] * sum(self._sizes))

    @property
    def transposed(self) -> Any:
        """`backward` as a jaxpr of (units, residuals, dcarry): its four parts one after the other."""
        return self._backward

    def _linearized(self, shape: tuple[int, ...]) -> pointwise.Linearized:
        tiles = [jax.ShapeDtypeStruct(shape, self.dtype)] * sum(self._sizes)
        with _alone(self.dtype):
            closed, _ = pointwise.opened(self._with_sums, *tiles)
            opened = _compat.jaxpr_as_fun(closed)
            keep = pointwise.save_transcendentals
            return pointwise.linearize(lambda *a: tuple(opened(*a)), keep, *tiles, runner=_plainly)

    @functools.cached_property
    def _split(self) -> pointwise.Linearized:
        return self._linearized(self.shape)

    @functools.cached_property
    def _backward(self) -> Any:
        split = self._split

        def backward(*flat: Array) -> Tiles:
            units, residuals, dcarry = _parted(flat, (self._sizes[0], self.width, self._sizes[3] + self.emitted))
            kept = iter(residuals)
            values = [units[n] if self._is_unit(n) else next(kept) for n in split.needed]  # type: ignore[index]
            linear = [self.tile] * sum(self._sizes)
            parts = jax.linear_transpose(lambda *t: split.tangent(values, t), *linear)(tuple(dcarry))
            return tuple(jnp.broadcast_to(a, self.shape) for a in parts)

        count = self._sizes[0] + self.width + self._sizes[3] + self.emitted
        return inlined(backward, *[self.tile] * count)


@functools.lru_cache(maxsize=256)
def of(cell: GatedCell, shape: tuple[int, ...], dtype: str = "float32", states: bool = False) -> Body:
    """The body of a cell, traced once."""
    return Body(cell, shape, dtype, states)


@contextlib.contextmanager
def _alone(dtype: Any) -> Iterator[None]:
    """A context in which a tile is one device's and, but for float64, numbers are of 32 bits."""
    with _compat.without_mesh(), contextlib.nullcontext() if dtype == "float64" else _compat.in_32_bits():
        yield


def inlined(fun: Callable, *shapes: Any) -> Any:
    """The jaxpr of a function in which no call is left: jits, checkpoints and custom rules are opened."""
    with _alone(shapes[0].dtype if shapes else None):
        closed = jax.make_jaxpr(fun)(*shapes)
        return jax.make_jaxpr(pointwise.opened_calls(closed, pointwise.CALLS))(*shapes)


def evaluate(closed: Any, args: tuple, lowerings: dict[str, Callable] | None = None) -> Tiles:
    """A flat jaxpr on values, traced outside of any mesh, with some of its operations by others: those of kernels."""
    lowerings = LOWERINGS if lowerings is None else lowerings
    axes = frozenset().union(*map(_compat.varying_axes, args))

    def number(value: Any) -> Any:
        # A kernel may not catch arrays, and a cell that has caught a scalar is elementwise; inside shard_map
        # numbers have to differ over the devices as the values do.
        value = np.asarray(value)[()]
        return _compat.vary_over(jnp.asarray(value), axes) if axes else value

    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, map(number, closed.consts), strict=True))
    env |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return number(v.val) if isinstance(v, _compat.Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        apply = lowerings.get(eqn.primitive.name)
        if apply is not None:
            out = apply(*values, **{name: eqn.params[name] for name in ("y",) if name in eqn.params})
        else:
            out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        outs = out if eqn.primitive.multiple_results and apply is None else [out]
        env.update(zip(eqn.outvars, outs, strict=True))
    return tuple(read(v) for v in closed.jaxpr.outvars)


def _unusual(eqn: Any) -> str | None:
    """A use of an operation that kernels do not know, though they know the operation."""
    name = eqn.primitive.name
    if name == "select_n" and len(eqn.invars) > 3:
        return "select_n of more than two"
    return f"{name} of booleans" if name in ("max", "min") and eqn.invars[0].aval.dtype == jnp.bool_ else None


def _plainly(closed: Any) -> Callable:
    return lambda *args: evaluate(closed, args, {})


def _parted(flat: Any, sizes: tuple[int, ...]) -> list[tuple]:
    rest = iter(flat)
    return [tuple(next(rest) for _ in range(size)) for size in sizes]
