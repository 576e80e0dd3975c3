"""Stack: the description of several layers of a cell, and their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rnncore import _arguments
from rnncore._types import Array, exportable
from rnncore.cells.base import Cell, check_init
from rnncore.layers.entries import from_entries, to_entries

Merge = Literal["concat", "sum", "mean", "mul"]


@exportable
class StackParams(NamedTuple):
    """Parameters of a `Stack`.

    Fields:
      layers: for each layer, from the bottom, a tuple of the cell's parameters for each direction:
        (forward,) or (forward, backward).
      carry: in the same arrangement the initial carries, of (H,) arrays; None where they are zeros.
    """

    layers: tuple[tuple[Any, ...], ...]
    carry: tuple[tuple[Any, ...], ...] | None


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one cell, each over the outputs of the layer below: a frozen description.

    ys^l = merge(cell(xs^l) forward, cell(xs^l) backward),   xs^{l+1} = dropout(ys^l),   xs^1 = xs

    Args:
      cell: the cell of every layer and direction; each has its own parameters.
      num_layers: L.
      bidirectional: read in both directions in every layer.
      merge: how the two directions become one: "concat" (2H features), "sum", "mean", "mul".
      dropout: rate at which outputs are zeroed on their way to the next layer, at every step anew,
        the rest scaled by 1 / (1 - rate).
      recurrent_dropout: rate of variational dropout: units of h_{t-1} zeroed where they enter the
        recurrent product, the same ones at every step.
      zoneout: rates at which units keep their value at a step: the cell's carry with a rate or None
        for each field, such as LSTMCarry(0.5, 0.05).
      learned_carry: the initial carry is a parameter; else zeros.

    Raises:
      ValueError: no layers, a rate outside [0, 1), or an unknown merge.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> stack = rnncore.Stack(rnncore.LSTM(4), num_layers=2, bidirectional=True, dropout=0.1)
      >>> params = stack.init(jax.random.key(0), 3)
      >>> carry, ys = rnncore.unroll_stack(stack, params, jnp.ones((2, 5, 3)), key=jax.random.key(1))
      >>> ys.shape, carry[1][0].h.shape
      ((2, 5, 8), (2, 4))

    Source: Schuster and Paliwal (1997) for both directions; Zaremba, Sutskever and Vinyals (2014),
    arXiv:1409.2329, for dropout between layers; Gal and Ghahramani (2016), arXiv:1512.05287, for
    variational dropout; Krueger et al. (2017), arXiv:1606.01305, for zoneout.  As torch.nn.LSTM with
    num_layers, bidirectional and dropout; it has no equivalent of the rest.
    """

    cell: Cell
    num_layers: int = dataclasses.field(default=1, kw_only=True)
    bidirectional: bool = dataclasses.field(default=False, kw_only=True)
    merge: Merge = dataclasses.field(default="concat", kw_only=True)
    dropout: float = dataclasses.field(default=0.0, kw_only=True)
    recurrent_dropout: float = dataclasses.field(default=0.0, kw_only=True)
    zoneout: Any = dataclasses.field(default=None, kw_only=True)
    learned_carry: bool = dataclasses.field(default=False, kw_only=True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.cell, Cell):
            raise ValueError(
                f"`Stack(cell={self.cell!r})`: expected an rnncore cell, such as rnncore.LSTM(256), made and not its "
                "class."
            )
        _arguments.check_size("Stack", "num_layers", self.num_layers)
        if self.num_layers < 1:
            raise ValueError(f"`Stack(num_layers={self.num_layers})`: expected at least one layer.")
        if self.merge not in get_args(Merge):
            choices = ", ".join(map(repr, get_args(Merge)))
            raise ValueError(f"`Stack(merge={self.merge!r})`: expected one of {choices}.")
        rates = {"dropout": self.dropout, "recurrent_dropout": self.recurrent_dropout}
        if self.zoneout is not None:
            rates |= {f"zoneout {name}": rate or 0.0 for name, rate in self.zoneout._asdict().items()}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(f"`Stack({name}={rate})`: expected a rate from 0 to below 1.")

    @property
    def directions(self) -> int:
        """1, or 2 where it is bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of the outputs: the cell's, H unless it projects them; twice that of two directions side by side."""
        return self.cell.output_size * (2 if self.bidirectional and self.merge == "concat" else 1)

    @property
    def is_random(self) -> bool:
        """Whether training draws masks."""
        return bool(self.dropout and self.num_layers > 1 or self.recurrent_dropout or any(self.zoneout or ()))

    def to_tree(self, params: StackParams) -> dict[str, dict[str, Array]]:
        """The parameters as a checkpoint has them: {"forward_0": {"input_kernel": ..., "bias": ...}, ...}.

        "forward_1" and "backward_1" are the directions of the second layer.  What is None is left out; a
        learned carry is `initial_h` and so on.
        """
        starts = self.initial_carry() if params.carry is None else params.carry
        rows = zip(self.names, params.layers, starts, strict=True)
        flat = (entry for row in rows for entry in zip(*row, strict=True))
        return {name: self._entries(own, carry) for name, own, carry in flat}

    def from_tree(self, tree: Mapping[str, Mapping[str, Array]]) -> StackParams:
        """The parameters from what `to_tree` makes of them.

        Raises:
          ValueError: the entries are not those of this stack.
        """
        expected = [name for row in self.names for name in row]
        if sorted(tree) != sorted(expected):
            raise ValueError(f"`Stack.from_tree(tree=<{sorted(tree)}>)`: expected an entry for each of {expected}.")
        carry = jax.eval_shape(self.cell.initial_carry)

        def weights(name: str) -> Any:
            try:
                return from_entries(self.cell, tree[name])
            except KeyError as missing:
                raise ValueError(f"`Stack.from_tree(tree)`: tree[{name!r}] has no {missing}.") from None

        def start(name: str) -> Any:
            return type(carry)(*(tree[name][f"initial_{n}"] for n in carry._fields))

        layers = tuple(tuple(map(weights, row)) for row in self.names)
        return StackParams(layers, tuple(tuple(map(start, row)) for row in self.names) if self.learned_carry else None)

    def init_entries(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> dict[str, Array]:
        """Draws one entry of the tree: the parameters of one layer and direction for inputs of that size."""
        return self._entries(self.cell.init(key, input_size, dtype), self.cell.initial_carry((), dtype))

    def sizes(self, input_size: int) -> dict[str, int]:
        """Input features of each entry of the tree."""
        return {n: self.output_size if level else input_size for level, row in enumerate(self.names) for n in row}

    def _entries(self, own: Any, carry: Any) -> dict[str, Array]:
        return to_entries(own) | ({f"initial_{n}": a for n, a in carry._asdict().items()} if self.learned_carry else {})

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """For each layer the names of its entries in the tree."""
        ways = ("forward", "backward")[: self.directions]
        return tuple(tuple(f"{way}_{level}" for way in ways) for level in range(self.num_layers))

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> StackParams:
        """Draws parameters in `dtype` for inputs of `input_size` features."""
        check_init(self, key, input_size, dtype)
        keys = jax.random.split(key, (self.num_layers, self.directions))
        sizes = [input_size] + [self.output_size] * (self.num_layers - 1)
        layers = tuple(
            tuple(self.cell.init(k, size, dtype) for k in row) for row, size in zip(keys, sizes, strict=True)
        )
        return StackParams(layers, self.initial_carry((), dtype) if self.learned_carry else None)

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> tuple[tuple[Any, ...], ...]:
        """Zeros: for each layer a tuple of carries, one for each direction."""
        carry = self.cell.initial_carry(batch_shape, dtype)
        return ((carry,) * self.directions,) * self.num_layers

    def start(self, params: StackParams, batch_shape: Sequence[int], dtype: Any) -> tuple[tuple[Any, ...], ...]:
        """The stack's own initial carry, zeros or learned, for a batch."""
        zeros = self.initial_carry(batch_shape, dtype)
        if params.carry is None:
            return zeros
        return jax.tree.map(lambda a, z: jnp.broadcast_to(a, z.shape).astype(z.dtype), params.carry, zeros)


def check_stack(call: str, stack: Any) -> None:
    """ValueError unless this is a stack."""
    if not isinstance(stack, Stack):
        hint = "`unroll` takes a cell" if call == "unroll_stack" else "rnncore.Stack(cell) is one of one layer"
        raise ValueError(f"`{call}(stack=<{type(stack).__name__}>)`: expected an rnncore.Stack; {hint}.")
