"""The parameter trees of Flax's cells, and how they become the parameters of a functional cell.

A Flax cell keeps one dictionary {kernel[, bias]} for each gate and side: W_i x as `ii`, U_i h
as `hi`, and so on.  A functional cell has one array for all gates.  The table below is the only
place with the names.  The cells that Flax does not have keep the functional cell's own arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.cells import GRU, LSTM, MGU, Cell, CellParams, Elman, PointwiseCell
from rnncore.layers.entries import entry_shapes, fitting_entries, from_entries, from_gates

Weights = Mapping[str, Mapping[str, Array]]
"""{name: {"kernel": (., H)[, "bias": (H,)]}} by the names of a `Tree`."""


class Tree(NamedTuple):
    """The parameter tree of one kind of cell.

    Fields:
      inputs: names of the input side, one for each gate in the order of the functional cell.
      recurrent: names of the recurrent side, likewise.
      biased: Flax cell -> the names that have a bias.
      kind: class of the functional cell.
      created: all names in the order in which Flax creates them; () for gate by gate, input side first.
    """

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    biased: Callable[[Any], frozenset[str]]
    kind: type[PointwiseCell]
    created: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, as created."""
        return self.created or tuple(name for pair in zip(self.inputs, self.recurrent, strict=True) for name in pair)

    def make(self, module: Any, size: int) -> PointwiseCell:
        """The functional cell."""
        return modules.core_of(self.kind, module, size)

    def expected(self, module: Any) -> list[str]:
        """The names of all entries, sorted."""
        del module
        return sorted(self.inputs + self.recurrent)

    def is_complete(self, module: Any, weights: Mapping[str, Any]) -> bool:
        """Whether every kernel and bias of the Flax cell's tree is there."""
        biased = self.biased(module)
        return all(
            "kernel" in weights.get(name, ()) and (name not in biased or "bias" in weights[name]) for name in self.names
        )

    def check_shapes(self, name: str, module: Any, weights: Weights) -> None:
        """ValueError for kernels and biases that do not fit each other."""
        del module
        hidden = jnp.shape(weights[self.recurrent[0]]["kernel"])[-1]
        size = jnp.shape(weights[self.inputs[0]]["kernel"])[0]
        for names, rows in ((self.inputs, size), (self.recurrent, hidden)):
            for gate in names:
                for leaf, expected in (("kernel", (rows, hidden)), ("bias", (hidden,))):
                    got = jnp.shape(weights[gate][leaf]) if leaf in weights[gate] else expected
                    if got != expected:
                        raise ValueError(
                            f"`functional({name}, params)`: params['{gate}']['{leaf}'] has shape {got}, expected "
                            f"{expected} to fit the other gates."
                        )

    def assemble(
        self, module: Any, weights: Weights, inputs: Any = None, h: Any = None
    ) -> tuple[PointwiseCell, CellParams]:
        """The functional cell and its parameters, in the dtypes in which Flax computes.

        Args:
          module: the Flax cell, for its `dtype` and its functions.
          weights: its unboxed parameters, complete.
          inputs, h: what the cell will see: where `module.dtype` is None their dtypes take part in the
            promotion, as in `flax.linen.Dense`.  None: the parameters' own.
        """
        biased = self.biased(module)
        sides = [
            [{leaf: weights[n][leaf] for leaf in ("kernel", "bias")[: 1 + (n in biased)]} for n in names]
            for names in (self.inputs, self.recurrent)
        ]
        dtypes = [
            canonicalize_dtype(seen, *jax.tree.leaves(side), dtype=module.dtype)
            for seen, side in zip((inputs, h), sides, strict=True)
        ]
        params = from_gates(sides[0], sides[1], len(self.inputs), dtypes)
        return self.make(module, params.input_kernel.shape[-1]), params

    def disassemble(self, module: Any, params: CellParams) -> dict[str, dict[str, Array]]:
        """The inverse of `assemble`: the Flax cell's parameters from functional ones."""
        call = f"`from_functional({type(module).__name__}, params)`"
        count, hidden = len(self.inputs), params.input_kernel.shape[-1]
        if params.input_kernel.shape[1] != count or params.recurrent_kernel.shape != (hidden, count, hidden):
            raise ValueError(
                f"{call}: kernels {params.input_kernel.shape} and {params.recurrent_kernel.shape}, expected "
                f"(D, {count}, H) and dense (H, {count}, H), the {count} gates of the cell."
            )
        biased = self.biased(module)
        first = [i if i in biased else r for i, r in zip(self.inputs, self.recurrent, strict=True)]
        second = [n for n in self.recurrent if n in biased and n not in first]
        if params.recurrent_bias is not None and len(params.recurrent_bias) != len(second):
            raise NotImplementedError(f"{call}: the parameters have a b_hn, of which the cell has no like.")
        made = {n: {"kernel": params.input_kernel[:, g]} for g, n in enumerate(self.inputs)}
        made |= {n: {"kernel": params.recurrent_kernel[:, g]} for g, n in enumerate(self.recurrent)}
        zeros = jnp.zeros((count, hidden), params.input_kernel.dtype)
        for names, rows in ((first, params.bias), (second, params.recurrent_bias)):
            for n, row in zip(names, zeros[: len(names)] if rows is None else rows, strict=True):
                made[n]["bias"] = row
        return made


class Entries:
    """The tree of a cell that Flax has not: the arrays of its functional parameters under their names."""

    def make(self, module: Any, size: int) -> Cell:
        """The functional cell."""
        del size
        return module.core

    def expected(self, module: Any) -> list[str]:
        """The names of all entries, sorted."""
        return sorted(entry_shapes(module.core, 1))

    def is_complete(self, module: Any, weights: Mapping[str, Any]) -> bool:
        """Whether every array is there."""
        return set(self.expected(module)) <= set(weights)

    def check_shapes(self, name: str, module: Any, weights: Mapping[str, Array]) -> None:
        """ValueError for arrays of other shapes than the cell's."""
        size = jnp.shape(weights["input_kernel"])[0]
        for entry, array in entry_shapes(module.core, size).items():
            if jnp.shape(weights[entry]) != array.shape:
                raise ValueError(
                    f"`functional({name}, params)`: params['{entry}'] has shape {jnp.shape(weights[entry])}, expected "
                    f"{array.shape}."
                )

    def assemble(
        self, module: Any, weights: Mapping[str, Array], inputs: Any = None, h: Any = None
    ) -> tuple[Cell, Any]:
        """As `Tree.assemble`; all parameters have one dtype."""
        del h
        params = from_entries(module.core, weights)
        dtype = canonicalize_dtype(inputs, *jax.tree.leaves(params), dtype=module.dtype)
        return module.core, jax.tree.map(lambda a: a.astype(dtype), params)

    def disassemble(self, module: Any, params: Any) -> dict[str, Array]:
        """The inverse of `assemble`."""
        call = f"from_functional({type(module).__name__}, params)"
        return fitting_entries(call, module.core, params, params.input_kernel.shape[0])


LSTM_TREE = Tree(
    inputs=("ii", "if", "ig", "io"),
    recurrent=("hi", "hf", "hg", "ho"),
    biased=lambda m: frozenset(("hi", "hf", "hg", "ho")),
    kind=LSTM,
)
GRU_TREE = Tree(
    inputs=("ir", "iz", "in"),
    recurrent=("hr", "hz", "hn"),
    biased=lambda m: frozenset(("ir", "iz", "in", "hn")),
    kind=GRU,
)
MGU_TREE = Tree(
    inputs=("if", "in"),
    recurrent=("hf", "hn"),
    biased=lambda m: frozenset(("if", "in", "hn") if m.reset_gate else ("if", "in")),
    kind=MGU,
    created=("if", "hf", "hn", "in"),
)
SIMPLE_TREE = Tree(inputs=("i",), recurrent=("h",), biased=lambda m: frozenset(("i",)), kind=Elman)
