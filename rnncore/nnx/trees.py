"""The state trees of flax.nnx's cells, and how they become the parameters of a functional cell.

An nnx cell keeps `nnx.Linear`s: one for each gate and side (LSTMCell), or one for each side with the
gates next to each other in its columns.  A functional cell has one array for all gates of a side.
The table below is the only place with the names.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.cells import GRU, LSTM, MGU, CellParams, Elman, IndRNN, PointwiseCell
from rnncore.layers.entries import entry_shapes, from_gates
from rnncore.nnx import gated, lstm, own_cells, simple


class Tree(NamedTuple):
    """The state tree of one kind of cell.

    Fields:
      inputs: names of the input side's Linears, gates in the order of the functional cell.
      recurrent: names of the recurrent side's; none for a diagonal kernel, the (H,) Param `u`.
      gates: how many gates.
      biased: the side whose Linears have a bias.
      kind: class of the functional cell.
    """

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    gates: int
    biased: tuple[str, ...]
    kind: type[PointwiseCell] | None


_INPUT, _RECURRENT = ("dense_i",), ("dense_h",)
LSTM_TREE = Tree(("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"), 4, ("hi", "hf", "hg", "ho"), LSTM)
OPTIMIZED_LSTM_TREE = Tree(_INPUT, _RECURRENT, 4, _RECURRENT, LSTM)
GRU_TREE = Tree(_INPUT, _RECURRENT, 3, _INPUT, GRU)
MGU_TREE = Tree(_INPUT, _RECURRENT, 2, _INPUT, MGU)
SIMPLE_TREE = Tree(_INPUT, _RECURRENT, 1, _INPUT, Elman)
INDRNN_TREE = Tree(_INPUT, (), 1, _INPUT, IndRNN)
OWN_TREE = Tree((), (), 0, (), None)
"""Of the cells that Flax has not, whose parameters are the functional ones."""

KNOWN: dict[type, Tree] = {
    lstm.LSTMCell: LSTM_TREE,
    lstm.OptimizedLSTMCell: OPTIMIZED_LSTM_TREE,
    gated.GRUCell: GRU_TREE,
    gated.MGUCell: MGU_TREE,
    simple.SimpleCell: SIMPLE_TREE,
    simple.IndRNNCell: INDRNN_TREE,
    nnx.LSTMCell: LSTM_TREE,
    nnx.OptimizedLSTMCell: OPTIMIZED_LSTM_TREE,
    nnx.GRUCell: GRU_TREE,
    nnx.SimpleCell: SIMPLE_TREE,
    **dict.fromkeys(own_cells.CELLS, OWN_TREE),
}
"""The exact classes whose equations are known; a subclass may compute something else."""


def why_unknown(cell: Any) -> str | None:
    """Why a cell does not equal its functional cell, or None."""
    slow = slow_path(cell)
    return None if slow is None else slow.reason


def slow_path(cell: Any) -> modules.SlowPath | None:
    """Why a cell does not equal its functional cell, and a remedy, or None."""
    tree = KNOWN.get(type(cell))
    if tree is None:
        return modules.unknown_cell(cell, KNOWN, "nnx")
    if why := _changed(cell, tree):
        return modules.SlowPath(why)
    source = cell.core if tree is OWN_TREE else cell
    return modules.unfit_functions(source, functools.partial(_core, cell), cell.hidden_features, nnx.Module)


def _core(cell: Any) -> Any:
    """The functional cell."""
    kind = KNOWN[type(cell)].kind
    return cell.core if kind is None else modules.core_of(kind, cell, cell.hidden_features)


def _changed(cell: Any, tree: Tree) -> str | None:
    """Which part of a known cell differs from what its constructor makes, or None."""
    for name in tree.inputs + tree.recurrent:
        part = getattr(cell, name)
        if type(part) is not nnx.Linear:
            return f"its {name} is a {type(part).__name__} and not exactly an nnx.Linear"
        usual = {
            "dtype": cell.dtype, "promote_dtype": dtypes.promote_dtype, "dot_general": lax.dot_general,
            "precision": None, "preferred_element_type": None,
        }  # fmt: skip
        for field, value in usual.items():
            if getattr(part, field) != value:
                return f"its {name} has {field}={getattr(part, field)!r}"
        if (part.bias is None) == (name in tree.biased):
            return f"its {name} has {'no' if part.bias is None else 'a'} bias"
    if tree is INDRNN_TREE and cell.promote_dtype is not dtypes.promote_dtype:
        return f"it has promote_dtype={cell.promote_dtype!r}"
    size = cell.hidden_features
    expected: list[tuple[str, Any, tuple[int, ...]]] = []
    if isinstance(cell, own_cells.OwnCell):
        like = entry_shapes(cell.core, cell.in_features)
        expected = [(name, param, like[name].shape) for name, param in cell.entries().items()]
    for names, rows in ((tree.inputs, cell.in_features), (tree.recurrent, size)):
        columns = tree.gates * size // max(len(names), 1)
        for name in names:
            part = getattr(cell, name)
            expected += [(f"{name}.kernel", part.kernel, (rows, columns)), (f"{name}.bias", part.bias, (columns,))]
    expected += [(name, getattr(cell, name, None), (size,)) for name in ("u", "b_hn")]
    for name, param, shape in expected:
        if param is not None and jnp.shape(param[...]) != shape:
            return f"its {name} has shape {jnp.shape(param[...])}, expected {shape}"
    return None


def assemble(cell: Any, inputs: Any = None, h: Any = None) -> tuple[Any, Any]:
    """The functional cell and its parameters, in the dtypes in which Flax computes.

    Args:
      cell: a cell of `KNOWN` for which `why_unknown` is None.
      inputs, h: what the cell will see: where `cell.dtype` is None their dtypes take part in the
        promotion, as in `nnx.Linear`.  None: the parameters' own.
    """
    if isinstance(cell, own_cells.OwnCell):
        return cell.core, cell.functional_params(inputs)
    tree, b_hn = KNOWN[type(cell)], getattr(cell, "b_hn", None)
    sides = [[_arrays(getattr(cell, name)) for name in names] for names in (tree.inputs, tree.recurrent or ("u",))]
    input_dtype, recurrent_dtype = (
        dtypes.canonicalize_dtype(seen, *jax.tree.leaves(side), dtype=cell.dtype)
        for seen, side in zip((inputs, h), sides, strict=True)
    )
    params = from_gates(sides[0], sides[1], tree.gates, (input_dtype, recurrent_dtype))
    if b_hn is not None:
        params = params._replace(recurrent_bias=b_hn[...].astype(recurrent_dtype)[None])
    return _core(cell), params


def _arrays(part: Any) -> dict[str, Array]:
    if isinstance(part, nnx.Param):
        return {"kernel": part[...]}
    return {leaf: getattr(part, leaf)[...] for leaf in ("kernel", "bias") if getattr(part, leaf) is not None}


def disassemble(cell: Any, params: CellParams) -> None:
    """The inverse of `assemble`: writes functional parameters into the cell's."""
    if isinstance(cell, own_cells.OwnCell):
        return cell.take(params)
    tree, call = KNOWN[type(cell)], f"`from_functional({type(cell).__name__}, params)`"
    _, now = assemble(cell)
    b_hn = getattr(cell, "b_hn", None)
    if params.recurrent_bias is not None and b_hn is None:
        raise NotImplementedError(f"{call}: the parameters have a b_hn, and the cell has none.")
    for name, old in now._asdict().items():
        got = getattr(params, name)
        if name != "units" and got is not None and got.shape != old.shape:
            raise ValueError(f"{call}: {name} has shape {got.shape}, expected {old.shape}.")

    def write(param: Any, value: Array) -> None:
        param[...] = value.astype(param[...].dtype)

    def side(names: tuple[str, ...], leaf: str, value: Array | None) -> None:
        own = [getattr(getattr(cell, name), leaf) for name in names]
        columns = [p[...].shape[-1] for p in own]
        wide = jnp.zeros(sum(columns)) if value is None else value.reshape(*value.shape[:-2], -1)
        for p, part in zip(own, jnp.split(wide, len(own), -1), strict=True):
            write(p, part)

    side(tree.inputs, "kernel", params.input_kernel)
    side(tree.biased, "bias", params.bias)
    if tree.recurrent:
        side(tree.recurrent, "kernel", params.recurrent_kernel)
    else:
        write(cell.u, params.recurrent_kernel[0])
    if b_hn is not None:
        write(b_hn, jnp.zeros_like(b_hn[...]) if params.recurrent_bias is None else params.recurrent_bias[0])
