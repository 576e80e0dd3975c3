"""Weights to and from the recurrent cells of Equinox; Equinox itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rnncore.cells import GRU, LSTM
from rnncore.layers import foreign_weights as foreign
from rnncore.layers.stack import Stack, StackParams

_CELLS: dict[type, Callable[[Any], bool]] = {LSTM: foreign.usual, GRU: foreign.usual}
_EXPECTED = "LSTM or GRU over Dense(), with the usual functions, without peepholes or coupled, and no learned carry"


def from_equinox(stack: Stack, cells: Sequence[Any]) -> StackParams:
    """Parameters of a stack from eqx.nn.LSTMCell or eqx.nn.GRUCell.

    W = weight_ih^T,  U = weight_hh^T,  b = bias,  b_hn = bias_n

    Args:
      stack: the description: LSTM or GRU over a dense kernel.
      cells: the Equinox cells, one for each layer and direction, forward before backward; or any objects with their
        attributes weight_ih (G*H, D), weight_hh (G*H, H), bias (G*H,) or None, and bias_n (H,) of a GRU.

    Returns:
      `StackParams`, in the dtype of the weights.

    Raises:
      ValueError: a wrong number of cells, or wrong shapes.
      NotImplementedError: a stack that Equinox has no equivalent of.

    Example:
      >>> import types, numpy as np, rnncore
      >>> cell = types.SimpleNamespace(weight_ih=np.ones((16, 3)), weight_hh=np.ones((16, 4)), bias=np.ones(16))
      >>> rnncore.from_equinox(rnncore.Stack(rnncore.LSTM(4)), [cell]).layers[0][0].bias.shape
      (4, 4)

    Source: equinox/nn/_rnn.py: gates i, f, g, o and r, z, n.
    """
    call = "from_equinox"
    foreign.check(call, stack, _CELLS, "Equinox", _EXPECTED)
    own: Any = stack.cell
    gates, hidden, count = own.gates, own.hidden_size, stack.num_layers * stack.directions
    if len(cells) != count:
        raise ValueError(f"`{call}(cells=<{len(cells)} cells>)`: expected {count}, one for each layer and direction.")

    def one(level: int, way: int) -> Any:
        theirs, width = cells[level * stack.directions + way], len(gates) * hidden
        features = stack.output_size if level else None
        kernels = (
            foreign.apart(foreign.taken(call, name, getattr(theirs, name), (width, columns)).T, gates, gates)
            for name, columns in (("weight_ih", features), ("weight_hh", hidden))
        )
        bias = recurrent_bias = None
        if theirs.bias is not None:
            bias = foreign.apart(foreign.taken(call, "bias", theirs.bias, (width,)), gates, gates)
            if isinstance(own, GRU):
                recurrent_bias = foreign.taken(call, "bias_n", theirs.bias_n, (hidden,))[None]
        return foreign.own_params(own, tuple(kernels), bias, recurrent_bias)  # type: ignore[arg-type]

    return foreign.of_stack(stack, one)


def to_equinox(stack: Stack, params: StackParams) -> list[dict[str, np.ndarray | None]]:
    """The attributes of Equinox cells that compute what a stack does.

    Args:
      stack: the description, see `from_equinox`.
      params: its parameters.

    Returns:
      For each layer and direction {"weight_ih": ..., "weight_hh": ..., "bias": ..., and of a GRU "bias_n": ...}, for
      `eqx.tree_at(lambda c: [getattr(c, n) for n in made], cell, list(made.values()), is_leaf=lambda x: x is None)`.

    Raises:
      ValueError: a b_hn without the other biases.
      NotImplementedError: a stack that Equinox has no equivalent of.

    Example:
      >>> import jax, rnncore
      >>> stack = rnncore.Stack(rnncore.GRU(4))
      >>> sorted(rnncore.to_equinox(stack, stack.init(jax.random.key(0), 3))[0])
      ['bias', 'bias_n', 'weight_hh', 'weight_ih']

    Source: as `from_equinox`, whose inverse it is.
    """
    foreign.check("to_equinox", stack, _CELLS, "Equinox", _EXPECTED)
    gates = stack.cell.gates  # type: ignore[attr-defined]

    def one(own: Any) -> dict[str, np.ndarray | None]:
        bias, of_h = foreign.both_biases("to_equinox", own)
        made: dict[str, np.ndarray | None] = {
            "weight_ih": foreign.joined(own.input_kernel, gates, gates).T.copy(),
            "weight_hh": foreign.joined(own.recurrent_kernel, gates, gates).T.copy(),
            "bias": None if bias is None else foreign.joined(bias, gates, gates),
        }
        if isinstance(stack.cell, GRU):
            made["bias_n"] = None if of_h is None else of_h[2]
        return made

    return [one(own) for layer in params.layers for own in layer]
