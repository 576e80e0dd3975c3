"""The state trees of flax.nnx's cells, and how they become the parameters of a functional cell.

An nnx cell keeps `nnx.Linear`s: one for each gate and side (LSTMCell), or one for each side with the
gates next to each other in its columns.  A functional cell has one array for all gates of a side.
The table below is the only place with the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.cells import GRU, LSTM, MGU, CellParams, Elman, IndRNN, PointwiseCell
from rnncore.cells.base import named
from rnncore.layers.entries import entry_shapes
from rnncore.nnx import gated, lstm, own_cells, simple


class Tree(NamedTuple):
    """The state tree of one kind of cell.

    Fields:
      inputs: names of the input side's Linears, gates in the order of the functional cell.
      recurrent: names of the recurrent side's; none for a diagonal kernel, the (H,) Param `u`.
      gates: how many gates.
      biased: the side whose Linears have a bias.
      functions: names of the cell's functions of units.
      make: (cell, H) -> functional cell.
    """

    inputs: tuple[str, ...]
    recurrent: tuple[str, ...]
    gates: int
    biased: tuple[str, ...]
    functions: tuple[str, ...]
    make: Callable[[Any, int], PointwiseCell]


_GATED = ("gate_fn", "activation_fn")
_INPUT, _RECURRENT = ("dense_i",), ("dense_h",)


def _lstm(cell: Any, size: int) -> PointwiseCell:
    return LSTM(size, gate_fn=cell.gate_fn, activation_fn=cell.activation_fn)


LSTM_TREE = Tree(("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"), 4, ("hi", "hf", "hg", "ho"), _GATED, _lstm)
OPTIMIZED_LSTM_TREE = Tree(_INPUT, _RECURRENT, 4, _RECURRENT, _GATED, _lstm)
GRU_TREE = Tree(
    _INPUT, _RECURRENT, 3, _INPUT, _GATED,
    lambda cell, size: GRU(size, gate_fn=cell.gate_fn, activation_fn=cell.activation_fn),
)  # fmt: skip
MGU_TREE = Tree(
    _INPUT, _RECURRENT, 2, _INPUT, _GATED,
    lambda cell, size: MGU(
        size, gate_fn=cell.gate_fn, activation_fn=cell.activation_fn, reset_gate=cell.reset_gate
    ),
)  # fmt: skip
SIMPLE_TREE = Tree(
    _INPUT, _RECURRENT, 1, _INPUT, _GATED[1:],
    lambda cell, size: Elman(size, activation_fn=cell.activation_fn, residual=cell.residual),
)  # fmt: skip
OWN_TREE = Tree((), (), 0, (), (), lambda cell, size: cell.core)
"""Of the cells that Flax has not, whose parameters are the functional ones."""
INDRNN_TREE = Tree(_INPUT, (), 1, _INPUT, _GATED[1:], lambda cell, size: IndRNN(size, activation_fn=cell.activation_fn))

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
    size, functions = cell.hidden_features, [getattr(cell, name) for name in tree.functions]
    if tree is OWN_TREE:
        functions = [getattr(cell.core, name) for name in _GATED if hasattr(cell.core, name)]
    return modules.unfit_functions(lambda: tree.make(cell, size), size, functions, nnx.Module)


def _changed(cell: Any, tree: Tree) -> str | None:
    """Which part of a known cell differs from what its constructor makes, or None."""
    if tree is OWN_TREE:
        wrong = wrong_shape(cell)
        return f"its {wrong}" if wrong else None
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
    if not tree.recurrent and cell.promote_dtype is not dtypes.promote_dtype:
        return f"it has promote_dtype={cell.promote_dtype!r}"
    wrong = wrong_shape(cell)
    return f"its {wrong}" if wrong else None


def wrong_shape(cell: Any) -> str | None:
    """Which parameter of a known cell has a shape that does not fit its sizes, or None."""
    tree, size = KNOWN[type(cell)], cell.hidden_features
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
            return f"{name} has shape {jnp.shape(param[...])}, expected {shape}"
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
    tree, size = KNOWN[type(cell)], cell.hidden_features

    def side(names: tuple[str, ...], leaf: str) -> list[Array]:
        return [getattr(getattr(cell, name), leaf)[...] for name in names]

    def joined(arrays: list[Array], dtype: Any) -> Array:
        wide = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, -1)
        return wide.reshape(*wide.shape[:-1], tree.gates, size).astype(dtype)

    input_kernels, biases = side(tree.inputs, "kernel"), side(tree.biased, "bias")
    recurrent_kernels = side(tree.recurrent, "kernel") if tree.recurrent else [cell.u[...]]
    on_inputs = tree.biased == tree.inputs
    input_dtype = dtypes.canonicalize_dtype(inputs, *input_kernels, *(biases if on_inputs else ()), dtype=cell.dtype)
    recurrent_dtype = dtypes.canonicalize_dtype(h, *recurrent_kernels, *(() if on_inputs else biases), dtype=cell.dtype)
    b_hn = getattr(cell, "b_hn", None)
    params = CellParams(
        input_kernel=joined(input_kernels, input_dtype),
        recurrent_kernel=joined(recurrent_kernels, recurrent_dtype),
        bias=joined(biases, input_dtype if on_inputs else recurrent_dtype),
        recurrent_bias=None if b_hn is None else b_hn[...].astype(recurrent_dtype)[None],
        units=named("Units", ())(),
    )
    return tree.make(cell, size), params


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
