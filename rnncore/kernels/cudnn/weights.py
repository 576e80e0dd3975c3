"""A cell as cuDNN knows it, and its parameters in cuDNN's flat buffer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import Array
from rnncore.cells.base import Cell, CellParams
from rnncore.cells.elman import Elman
from rnncore.cells.gru import GRU
from rnncore.cells.lstm import LSTM
from rnncore.cells.recurrent_kernels import Dense
from rnncore.kernels.cudnn import algorithm

SIGMOIDS = (jax.nn.sigmoid, lax.logistic)
TANHS = (jnp.tanh, lax.tanh, jax.nn.tanh)
RELUS = (jax.nn.relu,)


def mode(cell: Cell) -> int:
    """cuDNN's number of a cell that `why_not` has no objection to."""
    if isinstance(cell, Elman):
        return algorithm.RELU if cell.activation_fn in RELUS else algorithm.TANH
    return algorithm.GRU if isinstance(cell, GRU) else algorithm.LSTM


def why_not(cell: Cell) -> str | None:
    """Reason why cuDNN does not have this cell, or None."""
    if not (type(cell) is LSTM or type(cell) is GRU or type(cell) is Elman):  # a subclass may compute anything
        return f"cuDNN has rnncore.LSTM, GRU and Elman, and {type(cell).__name__} is none of them"
    plain = [("recurrence", type(cell.recurrence) is Dense)]
    if isinstance(cell, Elman):
        plain += [("residual", not cell.residual), ("activation_fn", cell.activation_fn in TANHS + RELUS)]
    else:
        plain += [("gate_fn", cell.gate_fn in SIGMOIDS), ("activation_fn", cell.activation_fn in TANHS)]
    if isinstance(cell, LSTM):
        plain += [("peepholes", not cell.peepholes), ("coupled", not cell.coupled)]
    for option, is_plain in plain:
        if not is_plain:
            value = getattr(cell, option)
            value = getattr(value, "__name__", repr(value))
            return f"its cells are dense, with the standard gates and functions, and this one has {option}={value}"
    return None


def pack(layers: Sequence[Sequence[CellParams]]) -> Array:
    """The parameters of layers and directions in one buffer.

    W and U of every layer and direction, a row for each unit of each gate; then the biases of x W and of h U of
    each.  rnncore has one bias but for a GRU's n, so that most of the second ones are zeros.
    """
    every = [own for row in layers for own in row]
    matrices = [k for own in every for k in (own.input_kernel, own.recurrent_kernel)]
    rows = [jnp.transpose(k, (1, 2, 0)).reshape(-1) for k in matrices]  # (D, G, H) to (G * H, D)
    for own in every:
        none = jnp.zeros_like(own.recurrent_kernel[0])
        second = none if own.recurrent_bias is None else none.at[-1].set(own.recurrent_bias[0])
        rows += [(none if own.bias is None else own.bias).reshape(-1), second.reshape(-1)]
    return jnp.concatenate(rows)


def unpack(buffer: Array, layers: Sequence[Sequence[CellParams]]) -> Sequence[Sequence[CellParams]]:
    """Gradients of a buffer as those of the parameters that `pack` made it of."""
    return jax.vjp(pack, layers)[1](buffer)[0]
