"""The interface of a cell, and what is derived from its pointwise update."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _arguments, _compat, _products, initializers
from rnncore._types import Array, Initializer, PyTree, exportable
from rnncore.cells.recurrent_kernels import Dense, Recurrence


def not_in_carry(carry: Any, name: str) -> str:
    """The message for an attribute that a carry does not have."""
    said = f"'{type(carry).__name__}' object has no attribute '{name}'"
    if hasattr(jax.Array, name):
        said += ": it is a carry, not an array. A run returns the carry first: carry, ys = unroll(...)"
    return said


@exportable
class HiddenCarry(NamedTuple):
    """Carry of a cell whose only state is its output h (..., H); or one value for that field, such as a rate."""

    h: Any

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(not_in_carry(self, name))


@exportable
class CellParams(NamedTuple):
    """Parameters of a pointwise cell.

    Fields:
      input_kernel: (D, G, H).
      recurrent_kernel: as the recurrence says; dense (H, G, H).
      bias: (G, H), added to z; None for none.
      recurrent_bias: one (H,) row for each gate in `cell.recurrent_bias`, added to r; None for none.
      units: per-unit parameters, a named tuple of (H,) arrays by `cell.units` (peepholes, say).
    """

    input_kernel: Array
    recurrent_kernel: Array
    bias: Array | None
    recurrent_bias: Array | None
    units: tuple[Array, ...]


@functools.cache
def named(kind: str, names: tuple[str, ...]) -> type:
    """The one named-tuple class for these names, so that pytrees created separately compare equal.

    It is created on demand, also when unpickling.
    """
    make: Any = collections.namedtuple  # the fields are known at run time only
    made = make(kind, names)
    made.__reduce__ = lambda self: (_named_of, (kind, names, *self))
    return exportable(made, f"{kind}({', '.join(names)})")


def _named_of(kind: str, names: tuple[str, ...], *values: Any) -> Any:
    return named(kind, names)(*values)


@dataclasses.dataclass(frozen=True)
class Cell(abc.ABC):
    """A recurrent cell: a frozen, hashable description that holds no parameters.

    s_t, gates_t = update(params, s_{t-1}, z_t),   z_t = project(params, x_t),   y_t = output(s_t)

    A cell of this general kind runs through plain autodiff of a scan.  Write it as a `PointwiseCell`
    where possible: it then gets the fast backward pass, the kernels and the analysis.
    """

    hidden_size: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        _arguments.refuse_positional(cls, args, "hidden_size")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _arguments.check_size(type(self).__name__, "hidden_size", self.hidden_size)

    @abc.abstractmethod
    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> PyTree:
        """Draws the parameters for inputs of `input_size` features."""

    @abc.abstractmethod
    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> Any:
        """The carry before the first step: a named tuple of (*batch_shape, ...) arrays."""

    @abc.abstractmethod
    def project(self, params: PyTree, xs: Array) -> PyTree:
        """z = x W + b for any number of leading axes: the part of the step that needs no carry."""

    @abc.abstractmethod
    def update(self, params: PyTree, carry: Any, z: PyTree) -> tuple[Any, PyTree]:
        """One step: (carry, z) to (new carry, gates)."""

    @property
    def output_size(self) -> int:
        """Features of the output y; H unless the cell projects it."""
        return self.hidden_size

    @property
    def projected_size(self) -> int | None:
        """Features of a projected input that is one array, None where it is something else."""
        return None

    def output(self, carry: Any) -> Array:
        """The output y (..., H) that belongs to a carry."""
        return carry.h

    def step(self, params: PyTree, carry: Any, z: PyTree) -> tuple[Any, Array]:
        """One step in the order of `jax.lax.scan`: (params, carry, z) to (carry, y).

        z is a projected input, `cell.project(params, x)`, not x: of x itself a step makes an error, but where x has as
        many features as z, which cannot be seen.
        """
        size = self.projected_size
        if size is not None and jnp.shape(z)[-1:] != (size,):
            raise ValueError(
                f"`{type(self).__name__}.step(params, carry, z=<{jnp.shape(z)}>)`: expected (*batch, {size}), a "
                "projected input: `cell.step(params, carry, cell.project(params, x))`."
            )
        carry, _ = self.update(params, carry, z)
        return carry, self.output(carry)


@functools.lru_cache(maxsize=256)
def parameter_shapes(cell: Cell, input_size: int) -> PyTree:
    """The shapes of the parameters that `cell.init` makes."""
    return jax.eval_shape(lambda: cell.init(jax.random.key(0), input_size))


def check_init(what: Any, key: Any, input_size: Any, dtype: Any) -> None:
    """ValueError where parameters cannot be drawn from these arguments of `init`."""
    call = f"{type(what).__name__}(...).init"
    _arguments.check_key(call, key)
    _arguments.check_size(call, "input_size", input_size)
    _arguments.check_dtypes(call, {"dtype": dtype})
    size = getattr(what, "cell", what).hidden_size
    if size < 1 or input_size < 1:
        raise ValueError(
            f"`{type(what).__name__}(hidden_size={size}).init(key, input_size={input_size})`: expected at least one "
            "unit and one feature."
        )


@dataclasses.dataclass(frozen=True)
class GatedCell(Cell):
    """A cell with one recurrent product a step: its parameters, and the step around it.

    z_t = project(x_t),   r_t = matmul(U, h_{t-1}),   s_t, gates_t = combine(p, z_t, r_t, s_{t-1})

    `combine` may reduce over the units of a sequence, as layer normalization does; the scan derives its derivatives
    from it.  Where it is elementwise the cell is a `PointwiseCell`, which all loops run.

    Args:
      hidden_size, recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.
    """

    recurrence: Recurrence = dataclasses.field(default_factory=Dense, kw_only=True)
    kernel_init: Initializer = dataclasses.field(default=initializers.lecun_normal, kw_only=True)
    recurrent_init: Initializer | None = dataclasses.field(default=None, kw_only=True)
    bias_init: Initializer = dataclasses.field(default=initializers.zeros, kw_only=True)

    Carry: ClassVar[Any] = HiddenCarry
    forgets: ClassVar[str | None] = None
    """The gate to whose initial bias a field `forget_bias` is added: the one that keeps the old state."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _arguments.refuse_renamed(cls, {"mix": "recurrent_matmul"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.recurrence, Recurrence):
            raise ValueError(
                f"`{type(self).__name__}(recurrence={self.recurrence!r})`: expected the structure of a recurrent "
                "kernel, such as rnncore.Dense(), Heads(4) or Diagonal()."
            )

    @property
    @abc.abstractmethod
    def gates(self) -> tuple[str, ...]:
        """Names of the gates in the order of every kernel, bias and slab."""

    @property
    def recurrent_bias(self) -> tuple[str, ...]:
        """Gates whose r has its own bias because r is not simply added to z."""
        return ()

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the per-unit parameters."""
        return ()

    @property
    def Gates(self) -> Any:
        """Named tuple by gate name."""
        return named("Gates", tuple(self.gates))

    @abc.abstractmethod
    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, PyTree]:
        """The update, with arguments and results as those of `PointwiseCell.pointwise`."""

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> CellParams:
        """Draws parameters in `dtype` for inputs of `input_size` features."""
        check_init(self, key, input_size, dtype)
        count, hidden = len(self.gates), self.hidden_size
        input_key, recurrent_key, bias_key = jax.random.split(key, 3)
        recurrent_init = self.recurrent_init or self.recurrence.default_init
        bias = self.bias_init(bias_key, (count, hidden), dtype)
        forget_bias = getattr(self, "forget_bias", 0) if self.forgets else 0
        if forget_bias and bias is not None:
            bias = bias.at[self.gates.index(self.forgets)].add(forget_bias)
        return CellParams(
            input_kernel=self.kernel_init(input_key, (input_size, count * hidden), dtype).reshape(
                input_size, count, hidden
            ),
            recurrent_kernel=recurrent_init(recurrent_key, self.recurrence.shape(count, hidden), dtype),
            bias=bias,
            recurrent_bias=jnp.zeros((len(self.recurrent_bias), hidden), dtype) if self.recurrent_bias else None,
            units=named("Units", tuple(self.units))(*(jnp.zeros((hidden,), dtype) for _ in self.units)),
        )

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> Any:
        """Zeros (*batch_shape, H) for every field of the carry."""
        _arguments.check_batch_shape(f"{type(self).__name__}(...).initial_carry", batch_shape)
        return self.Carry(*(jnp.zeros((*batch_shape, self.hidden_size), dtype) for _ in self.Carry._fields))

    def project(self, params: CellParams, xs: Array) -> Array:
        """z = x W + b as a slab: (..., D) to (..., G*H)."""
        kernel = params.input_kernel
        zs = _products.times(xs, kernel.reshape(kernel.shape[0], -1))
        if params.bias is None:
            return zs
        # At least float32: the same sum, but its transpose accumulates over T and the batch.
        wide = jnp.promote_types(zs.dtype, jnp.float32)
        bias = jnp.broadcast_to(params.bias.reshape(-1).astype(wide), zs.shape)
        return (zs.astype(wide) + bias).astype(jnp.promote_types(zs.dtype, params.bias.dtype))

    def recurrent_matmul(self, params: CellParams, h: Array) -> Array:
        """r = matmul(U, h) + its bias as a slab: (..., H) to (..., G*H); linear in the parameters."""
        kernel = params.recurrent_kernel
        r = self.recurrence.matmul(kernel, h.astype(kernel.dtype))
        if params.recurrent_bias is None:
            return r
        rows = dict(zip(self.recurrent_bias, params.recurrent_bias, strict=True))
        none = jnp.zeros_like(params.recurrent_bias[0])
        return r + jnp.broadcast_to(jnp.concatenate([rows.get(gate, none) for gate in self.gates]), r.shape)

    @property
    def projected_size(self) -> int | None:
        """G*H; None where the cell projects or splits in its own way."""
        usual = type(self).project is GatedCell.project and type(self).split is GatedCell.split
        return len(self.gates) * self.hidden_size if usual else None

    def split(self, slab: Array) -> Any:
        """A slab (..., G*H) as a named tuple of G arrays (..., H)."""
        # lax.split, not slices: it transposes to one concatenation, slices to a sum of padded arrays.
        return self.Gates(*jax.lax.split(slab, [self.hidden_size] * len(self.gates), slab.ndim - 1))

    def update(self, params: CellParams, carry: Any, z: Array, mask: Array | None = None) -> tuple[Any, PyTree]:
        """One step: (carry, z slab) to (new carry, gates); `mask` multiplies h where it enters the product."""
        p = jax.tree.map(lambda u: jnp.broadcast_to(u, carry.h.shape), params.units)
        h = carry.h if mask is None else carry.h * mask.astype(carry.h.dtype)
        own = type(self).split is not GatedCell.split
        split = self.split if own else lambda slab: self.Gates(*_compat.parts(slab, len(self.gates)))
        return self.combine(p, split(z), split(self.recurrent_matmul(params, h)), carry)


@dataclasses.dataclass(frozen=True)
class PointwiseCell(GatedCell):
    """A cell that mixes units only through r = matmul(U, h); the rest is elementwise.

    z_t = x_t W + b,   r_t = matmul(U, h_{t-1}),   s_t, gates_t = pointwise(p, z_t, r_t, s_{t-1})

    A subclass names its `gates` and writes `pointwise`.  The scan, its derivatives, the kernels and
    the analysis are derived from that function, so it may use elementwise operations only: no
    axes, indexing, reductions or products over units; `rnncore.unroll` rejects anything else.

    Args:
      hidden_size: H.
      recurrence: structure of the recurrent kernel: Dense(), Heads(N), Diagonal(), LowRank(r), a `Sparse`, `Dale` or
        `Unconnected`.
      kernel_init: initialiser of the (D, G, H) input kernel, called with shape (D, G*H).
      recurrent_init: initialiser of the recurrent kernel; None takes the recurrence's own.
      bias_init: initialiser of the (G, H) bias.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> class Leaky(rnncore.PointwiseCell):
      ...     gates = ("u", "n")
      ...     def pointwise(self, p, z, r, carry):
      ...         u = jax.nn.sigmoid(z.u + r.u)
      ...         n = jnp.tanh(z.n + r.n)
      ...         return carry._replace(h=u * carry.h + (1 - u) * n), self.Gates(u, n)
      >>> cell = Leaky(hidden_size=8)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> carry, ys = rnncore.unroll(cell, params, jnp.ones((2, 5, 3)))
      >>> ys.shape
      (2, 5, 8)
    """

    @abc.abstractmethod
    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, PyTree]:
        """The update of every unit on its own.

        Args:
          p: named tuple of per-unit parameters, broadcast to (*batch, H).
          z: named tuple of G arrays (*batch, H), the projected inputs.
          r: named tuple of G arrays (*batch, H), the mixed h_{t-1}.
          carry: the previous carry, arrays (*batch, H).

        Returns:
          (new carry, gates), where gates is a pytree of whatever the cell calls its gates.
        """

    def combine(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, PyTree]:
        """`pointwise`."""
        return self.pointwise(p, z, r, carry)
