"""From a trained nnx cell to the functional cell and its parameters."""

from __future__ import annotations

from typing import Any

from flax import nnx

from rnncore.cells import CellParams
from rnncore.nnx import trees


def functional(cell: nnx.Module) -> Any:
    """The functional cell that an nnx cell is, and the functional parameters that its own are.

    (rnncore.LSTM | GRU | MGU | Elman | IndRNN)(H), CellParams((D, G, H), (H, G, H), (G, H), ...)

    With this pair a trained Flax model works wherever a functional cell does: `rnncore.unroll` with
    its states, gates, resets and checkpoints, and every function of the analysis.  The result is
    differentiable in the cell's parameters: call it inside the function that `nnx.grad` takes.

    Args:
      cell: a cell of `rnncore.nnx` or of flax.nnx, an `RNN` around one, a `Bidirectional` of two, or an `LSTM`,
        `GRU` or `Elman` layer.

    Returns:
      (functional cell, `CellParams`); for each direction such a pair of a Bidirectional; (`rnncore.Stack`,
      `StackParams`) of a layer.  The gates stand in the functional cell's order: i, f, g, o of
      an LSTM; r, z, n of a GRU; f, n of an MGU.  The arrays have `cell.dtype`, or where that is None
      the dtype that Flax promotes the parameters to; with a `cell.dtype` give inputs of that dtype, to
      which Flax casts them.  The carry of the functional LSTM is the named tuple (c, h), that of the
      others the named tuple (h,).

    Raises:
      NotImplementedError: another cell, such as a subclass, or one with a replaced part (a LoRA layer,
        say), whose equations cannot be known; a function that is not elementwise.

    Example:
      >>> import jax.numpy as jnp, rnncore
      >>> from rnncore import nnx
      >>> layer, xs = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))), jnp.ones((2, 5, 3))
      >>> cell, params = nnx.functional(layer.cell)
      >>> _, ys, states = rnncore.unroll(cell, params, xs, return_states=True)
      >>> bool(jnp.allclose(ys, layer(xs), atol=1e-6)), states.gates.f.shape
      (True, (2, 5, 4))

    Source: trees and dtype promotion as in flax.nnx.  flax.linen keeps other trees.
    """
    if isinstance(cell, nnx.RNN):
        return functional(cell.cell)
    if isinstance(cell, nnx.Bidirectional):
        ways: tuple[Any, Any] = (cell.forward_rnn, cell.backward_rnn)
        return functional(ways[0]), functional(ways[1])
    if hasattr(cell, "functional") and hasattr(cell, "stack"):
        return cell.functional()
    why = trees.why_unknown(cell)
    if why is not None:
        raise NotImplementedError(
            f"`functional({type(cell).__name__})`: {why}; it may compute something else. If it does not, copy its "
            "parameters into the plain cell: LSTMCell, OptimizedLSTMCell, GRUCell, MGUCell, SimpleCell, IndRNNCell or "
            "another cell of rnncore.nnx."
        )
    return trees.assemble(cell)


def from_functional(cell: nnx.Module, params: CellParams) -> nnx.Module:
    """Gives an nnx cell the parameters of a functional cell: the inverse of `functional`.

    With `functional` of either Flax flavour it takes a trained cell from one to the other.

    Args:
      cell: a cell of `rnncore.nnx` or of flax.nnx, whose parameters are replaced in place.
      params: the functional parameters, of the cell's sizes; a bias that is None becomes zeros.

    Returns:
      The cell.

    Raises:
      ValueError: parameters that do not fit the cell's.
      NotImplementedError: another cell; a b_hn where the cell has none, as flax.nnx.GRUCell.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen, nnx
      >>> old, start = linen.GRUCell(4), jnp.ones(4)
      >>> variables = old.init(jax.random.key(0), start, jnp.ones(3))
      >>> new = nnx.GRUCell(3, 4, rngs=nnx.Rngs(1), recurrent_bias=True)
      >>> _ = nnx.from_functional(new, linen.functional(old, variables["params"])[1])
      >>> bool(jnp.allclose(new(start, jnp.ones(3))[1], old.apply(variables, start, jnp.ones(3))[1], atol=1e-6))
      True

    Source: trees as in flax.nnx.
    """
    why = trees.why_unknown(cell)
    if why is not None:
        raise NotImplementedError(f"`from_functional({type(cell).__name__}, params)`: {why}.")
    trees.disassemble(cell, params)
    return cell
