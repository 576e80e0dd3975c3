"""The parameter trees of Flax's cells, and how they become the parameters of a functional cell.

A Flax cell keeps one dictionary {kernel[, bias]} for each gate and side: W_i x as `ii`, U_i h
as `hi`, and so on.  A functional cell has one array for all gates.  The table below is the only
place with the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from rnncore._types import Array
from rnncore.cells import GRU, LSTM, MGU, CellParams, Elman, PointwiseCell
from rnncore.cells.base import named

Weights = Mapping[str, Mapping[str, Array]]
"""{name: {"kernel": (., H)[, "bias": (H,)]}} by the names of a `Tree`."""


class Tree(NamedTuple):
    """The parameter tree of one kind of cell.

    Fields:
      inputs: names of the input side, one for each gate in the order of the functional cell.
      recurrent: names of the recurrent side, likewise.
      biased: Flax cell -> the names that have a bias.
      make: (Flax cell, H) -> functional cell.
      created: all names in the order in which Flax creates them; () for gate by gate, input side first.
    """

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    biased: Callable[[Any], frozenset[str]]
    make: Callable[[Any, int], PointwiseCell]
    created: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, as created."""
        return self.created or tuple(name for pair in zip(self.inputs, self.recurrent, strict=True) for name in pair)


LSTM_TREE = Tree(
    inputs=("ii", "if", "ig", "io"),
    recurrent=("hi", "hf", "hg", "ho"),
    biased=lambda m: frozenset(("hi", "hf", "hg", "ho")),
    make=lambda m, size: LSTM(size, gate_fn=m.gate_fn, activation_fn=m.activation_fn),
)
GRU_TREE = Tree(
    inputs=("ir", "iz", "in"),
    recurrent=("hr", "hz", "hn"),
    biased=lambda m: frozenset(("ir", "iz", "in", "hn")),
    make=lambda m, size: GRU(size, gate_fn=m.gate_fn, activation_fn=m.activation_fn),
)
MGU_TREE = Tree(
    inputs=("if", "in"),
    recurrent=("hf", "hn"),
    biased=lambda m: frozenset(("if", "in", "hn") if m.reset_gate else ("if", "in")),
    make=lambda m, size: MGU(size, gate_fn=m.gate_fn, activation_fn=m.activation_fn, reset_gate=m.reset_gate),
    created=("if", "hf", "hn", "in"),
)
SIMPLE_TREE = Tree(
    inputs=("i",),
    recurrent=("h",),
    biased=lambda m: frozenset(("i",)),
    make=lambda m, size: Elman(size, activation_fn=m.activation_fn, residual=m.residual),
)


def is_complete(tree: Tree, module: Any, weights: Mapping[str, Any]) -> bool:
    """Whether every kernel and bias of the Flax cell's tree is there."""
    biased = tree.biased(module)
    return all(
        "kernel" in weights.get(name, ()) and (name not in biased or "bias" in weights[name]) for name in tree.names
    )


def assemble(
    tree: Tree, module: Any, weights: Weights, inputs: Any = None, h: Any = None
) -> tuple[PointwiseCell, CellParams]:
    """The functional cell and its parameters, in the dtypes in which Flax computes.

    Args:
      tree: the tree of the cell.
      module: the Flax cell, for its `dtype` and its functions.
      weights: its unboxed parameters, complete.
      inputs, h: what the cell will see: where `module.dtype` is None their dtypes take part in the
        promotion, as in `flax.linen.Dense`.  None: the parameters' own.
    """
    sides = [[jax.tree.leaves(dict(weights[n])) for n in names] for names in (tree.inputs, tree.recurrent)]
    input_dtype, recurrent_dtype = (
        canonicalize_dtype(seen, *jax.tree.leaves(side), dtype=module.dtype)
        for seen, side in zip((inputs, h), sides, strict=True)
    )

    def stack(names: tuple[str, ...], leaf: str, axis: int, dtype: Any) -> Array:
        return jnp.stack([weights[name][leaf] for name in names], axis).astype(dtype)

    # Each gate has one bias; where it has a second, that one stays with U h (the GRU's b_hn).
    biased = tree.biased(module)
    first = tuple(i if i in biased else r for i, r in zip(tree.inputs, tree.recurrent, strict=True))
    second = tuple(n for n in tree.recurrent if n in biased and n not in first)
    kernel = stack(tree.recurrent, "kernel", 1, recurrent_dtype)
    params = CellParams(
        input_kernel=stack(tree.inputs, "kernel", 1, input_dtype),
        recurrent_kernel=kernel,
        bias=stack(first, "bias", 0, input_dtype if first == tree.inputs else recurrent_dtype),
        recurrent_bias=stack(second, "bias", 0, recurrent_dtype) if second else None,
        units=named("Units", ())(),
    )
    return tree.make(module, kernel.shape[0]), params


def disassemble(tree: Tree, module: Any, params: CellParams) -> dict[str, dict[str, Array]]:
    """The inverse of `assemble`: the Flax cell's parameters from functional ones."""
    call = f"`from_functional({type(module).__name__}, params)`"
    count, hidden = len(tree.inputs), params.input_kernel.shape[-1]
    if params.input_kernel.shape[1] != count or params.recurrent_kernel.shape != (hidden, count, hidden):
        raise ValueError(
            f"{call}: kernels {params.input_kernel.shape} and {params.recurrent_kernel.shape}, expected "
            f"(D, {count}, H) and dense (H, {count}, H), the {count} gates of the cell."
        )
    biased = tree.biased(module)
    first = [i if i in biased else r for i, r in zip(tree.inputs, tree.recurrent, strict=True)]
    second = [n for n in tree.recurrent if n in biased and n not in first]
    if params.recurrent_bias is not None and len(params.recurrent_bias) != len(second):
        raise NotImplementedError(f"{call}: the parameters have a b_hn, and the cell has none.")
    made = {n: {"kernel": params.input_kernel[:, g]} for g, n in enumerate(tree.inputs)}
    made |= {n: {"kernel": params.recurrent_kernel[:, g]} for g, n in enumerate(tree.recurrent)}
    zeros = jnp.zeros((count, hidden), params.input_kernel.dtype)
    for names, rows in ((first, params.bias), (second, params.recurrent_bias)):
        for n, row in zip(names, zeros[: len(names)] if rows is None else rows, strict=True):
            made[n]["bias"] = row
    return made
