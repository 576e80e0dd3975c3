"""From a trained Flax cell to the functional cell and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rnncore import flax_modules as modules
from rnncore.linen import cells, own_cells, trees

_NAMESAKES: tuple[type[cells.Cell], ...] = (
    cells.LSTMCell,
    cells.OptimizedLSTMCell,
    cells.GRUCell,
    cells.MGUCell,
    cells.SimpleCell,
)
TREES: dict[type, trees.Tree | trees.Entries] = {kind: kind.tree for kind in (*_NAMESAKES, *own_cells.CELLS)}
TREES |= {getattr(nn, kind.__name__): kind.tree for kind in _NAMESAKES}
"""The tree of every class whose equations are known, Flax's too; a subclass may compute something else."""


def is_rematerialized(cell: nn.Module) -> bool:
    """Whether the cell's class was made by nn.remat."""
    kind = type(cell)
    return kind.__module__ == "flax.linen.transforms" and kind.__name__ == f"Checkpoint{kind.__mro__[1].__name__}"


def class_of(cell: nn.Module) -> type:
    """The cell's class inside nn.remat, which does not change the equations."""
    return type(cell).__mro__[1] if is_rematerialized(cell) else type(cell)


def unfit_functions(cell: Any, carry: Any) -> modules.SlowPath | None:
    """Which functions of a known cell no loop can apply, or None."""
    tree, size = TREES[class_of(cell)], jnp.shape(jax.tree.leaves(carry)[-1])[-1]
    return modules.unfit_functions(cell, lambda: tree.make(cell, size), size, nn.Module)


def functional(cell: nn.Module, params: Mapping[str, Any]) -> Any:
    """The functional cell that a Flax cell is, and the functional parameters that its own are.

    (rnncore.LSTM | GRU | MGU | Elman)(H), CellParams((D, G, H), (H, G, H), (G, H), ...)

    With this pair a trained Flax model works wherever a functional cell does: `rnncore.unroll` with
    its states, gates, resets and checkpoints, and every function of the analysis.  The result is
    differentiable in `params`.

    Args:
      cell: a cell of `rnncore.linen` or of flax.linen: LSTMCell, OptimizedLSTMCell, GRUCell, MGUCell or
        SimpleCell; or another cell of `rnncore.linen`, whose parameters are the functional ones.  It need not be bound:
        only its functions and `dtype` are read.  Or an `RNN` around one, a `Bidirectional` of two, or an `LSTM`, `GRU`
        or `Elman` layer.
      params: the parameters of that cell, {'ii': {'kernel': (D, H)}, 'hi': {'kernel': (H, H),
        'bias': (H,)}, ...}, boxed or not.  In the variables of a standalone `RNN(cell)` they lie at
        ['params']['cell'], in those of a compact parent at ['params']['LSTMCell_0'] or so.

    Returns:
      (functional cell, `CellParams`); for each direction such a pair of a Bidirectional; (`rnncore.Stack`,
      `StackParams`) of a layer.  The gates stand in the functional cell's order: i, f, g, o of
      an LSTM; r, z, n of a GRU; f, n of an MGU.  The arrays have `cell.dtype`, or where that is None the dtype that
      Flax promotes the parameters to; with a `cell.dtype` give inputs of that dtype, to which Flax
      casts them.  The carry of the functional LSTM is the named tuple (c, h), that of the others the
      named tuple (h,).

    Raises:
      ValueError: parameters that are not those of such a cell.
      NotImplementedError: another cell, also a subclass or a transformed one, whose equations cannot
        be known.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import linen as nn
      >>> layer, xs = nn.RNN(nn.LSTMCell(4)), jnp.ones((2, 5, 3))
      >>> variables = layer.init(jax.random.key(0), xs)
      >>> cell, params = nn.functional(layer.cell, variables["params"]["cell"])
      >>> _, ys, states = rnncore.unroll(cell, params, xs, return_states=True)
      >>> bool(jnp.allclose(ys, layer.apply(variables, xs), atol=1e-6)), states.gates.f.shape
      (True, (2, 5, 4))

    Source: trees and dtype promotion as in flax.linen.  flax.nnx keeps other trees.
    """
    name = type(cell).__name__
    # Modules that hold cells are recognised by their parts: this file cannot import them.
    if isinstance(getattr(cell, "cell", None), nn.Module):
        return functional(cell.cell, _entry(name, params, "cell"))
    if isinstance(getattr(cell, "forward_rnn", None), nn.Module):
        ways = ("forward_rnn", "backward_rnn")
        return tuple(functional(getattr(cell, way), _entry(name, params, way)) for way in ways)
    if hasattr(cell, "functional") and hasattr(cell, "num_layers"):
        return cell.functional(params)
    advice = "; a subclass or a transformed class may compute something else. If it does not, pass the plain cell with "
    tree = _tree_of(f"functional({name}, params)", cell, f"{advice}the same fields.")
    weights = nn.meta.unbox(params)
    if not isinstance(weights, Mapping) or not tree.is_complete(cell, weights):
        got = sorted(weights) if isinstance(weights, Mapping) else type(weights).__name__
        raise ValueError(
            f"`functional({name}, params=<{got}>)`: expected the parameters of the cell itself, with the names "
            f"{tree.expected(cell)}; pick the cell's own entry out of the variables."
        )
    tree.check_shapes(name, cell, weights)
    return tree.assemble(cell, weights)


def _entry(name: str, params: Any, child: str) -> Any:
    if not isinstance(params, Mapping) or child not in params:
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"`functional({name}, params=<{got}>)`: expected the entry {child!r}, as the layer on its own has it; in a "
            "compact parent the cell's parameters lie elsewhere: pass the cell and its own entry, or let "
            "`rnncore.analysis.recurrent_layers` find them."
        )
    return params[child]


def from_functional(cell: nn.Module, params: Any) -> dict[str, Any]:
    """The parameters of a Flax cell that computes what a functional cell does: the inverse of `functional`.

    With `functional` of either Flax flavour it takes a trained cell from one to the other.

    Args:
      cell: a cell of `rnncore.linen` or of flax.linen, as in `functional`.
      params: the functional parameters; a bias that is None becomes zeros.

    Returns:
      {'ii': {'kernel': (D, H)}, 'hi': {'kernel': (H, H), 'bias': (H,)}, ...}, unboxed; of a cell that Flax has not
      {'input_kernel': (D, G, H), ...}.

    Raises:
      ValueError: parameters of another number of gates, or of a kernel that is not dense.
      NotImplementedError: another cell; a b_hn where the cell has no such bias.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen, nnx
      >>> old = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
      >>> weights = linen.from_functional(linen.LSTMCell(4), nnx.functional(old)[1])
      >>> _, y = linen.LSTMCell(4).apply({"params": weights}, (jnp.zeros(4), jnp.ones(4)), jnp.ones(3))
      >>> bool(jnp.allclose(y, old((jnp.zeros(4), jnp.ones(4)), jnp.ones(3))[1], atol=1e-6))
      True

    Source: trees as in flax.linen.
    """
    return _tree_of(f"from_functional({type(cell).__name__}, params)", cell, ".").disassemble(cell, params)


def _tree_of(call: str, cell: nn.Module, end: str) -> Any:
    tree = TREES.get(type(cell))
    if tree is None:
        raise NotImplementedError(
            f"`{call}`: expected exactly an LSTMCell, OptimizedLSTMCell, GRUCell, MGUCell or SimpleCell of "
            f"rnncore.linen or flax.linen, or another cell of rnncore.linen{end}"
        )
    return tree
