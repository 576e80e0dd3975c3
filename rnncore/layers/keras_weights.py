"""Weights to and from the recurrent layers of Keras 3; Keras itself is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rnncore.cells import GRU, LSTM, Elman, ResetBeforeGRU
from rnncore.layers import foreign_weights as foreign
from rnncore.layers.stack import Stack, StackParams

_ORDER: dict[type, tuple[str, ...]] = {
    LSTM: ("i", "f", "g", "o"), GRU: ("z", "r", "n"), ResetBeforeGRU: ("z", "r", "n"), Elman: ("h",),
}  # fmt: skip
_CELLS = dict.fromkeys(_ORDER, lambda _: True)
_EXPECTED = (
    "LSTM, GRU (reset_after=True), ResetBeforeGRU (reset_after=False) or Elman over Dense() without peepholes, coupled "
    "or residual, and no learned carry"
)


def from_keras(stack: Stack, weights: Sequence[Sequence[Any]]) -> StackParams:
    """Parameters of a stack from the weights of keras.layers.LSTM, GRU or SimpleRNN, one above the other.

    W = kernel,  U = recurrent_kernel,  b = bias;  for a GRU's n: b_n = bias[0],  b_hn = bias[1]

    Args:
      stack: the description: LSTM, GRU, ResetBeforeGRU or Elman over a dense kernel; `bidirectional` for
        keras.layers.Bidirectional, whose merge_mode "ave" is merge="mean".
      weights: for each layer what its `get_weights()` gives: kernel (D, G*H), recurrent_kernel (H, G*H), bias (G*H,) or
        (2, 3*H) of a GRU with reset_after; for Bidirectional those of the forward layer and then of the backward one.

    Returns:
      `StackParams`, in the dtype of the weights.

    Raises:
      ValueError: a wrong number of layers or arrays, or wrong shapes.
      NotImplementedError: a stack that Keras has no equivalent of; a GRU of the other reset_after.

    Example:
      >>> import numpy as np, rnncore
      >>> layer = [np.ones((3, 16)), np.ones((4, 16)), np.ones(16)]
      >>> params = rnncore.from_keras(rnncore.Stack(rnncore.LSTM(4)), [layer])
      >>> params.layers[0][0].input_kernel.shape
      (3, 4, 4)

    Source: the layout of keras.layers, gates i, f, c, o and z, r, h.  The activations are options of the Keras layer
    and of the cell; give the cell the layer's.
    """
    call = "from_keras"
    foreign.check(call, stack, _CELLS, "Keras", _EXPECTED)
    cell = stack.cell
    theirs, hidden = _ORDER[type(cell)], cell.hidden_size
    ours, width = cell.gates, len(theirs) * hidden  # type: ignore[attr-defined]
    counts = [len(layer) for layer in weights]
    if len(weights) != stack.num_layers or any(n not in (2 * stack.directions, 3 * stack.directions) for n in counts):
        raise ValueError(
            f"`{call}(stack, weights=<lists of {counts} arrays>)`: expected {stack.num_layers} lists, one for each "
            f"layer, of {3 * stack.directions} arrays, or {2 * stack.directions} without biases."
        )

    def one(level: int, way: int) -> Any:
        own = len(weights[level]) // stack.directions
        kernel, recurrent, *biases = weights[level][way * own : (way + 1) * own]
        features = stack.output_size if level else None
        kernel = foreign.taken(call, f"the kernel of layer {level}", kernel, (features, width))
        recurrent = foreign.taken(call, f"the recurrent kernel of layer {level}", recurrent, (hidden, width))
        bias = recurrent_bias = None
        if biases:
            after = np.ndim(biases[0]) == 2
            if isinstance(cell, GRU | ResetBeforeGRU) and after != isinstance(cell, GRU):
                raise NotImplementedError(
                    f"`{call}({type(cell).__name__})`: the layer has reset_after={after}, which is "
                    f"{'GRU' if after else 'ResetBeforeGRU'} here."
                )
            bias = foreign.taken(call, f"the bias of layer {level}", biases[0], (2, width) if after else (width,))
            bias = foreign.apart(bias, theirs, ours)
            if after:
                recurrent_bias = bias[1, 2:]
                bias = bias.sum(0).at[2].set(bias[0, 2])
        kernels = foreign.apart(kernel, theirs, ours), foreign.apart(recurrent, theirs, ours)
        return foreign.own_params(cell, kernels, bias, recurrent_bias)

    return foreign.of_stack(stack, one)


def to_keras(stack: Stack, params: StackParams) -> list[list[np.ndarray]]:
    """The weights of Keras layers that compute what a stack does.

    kernel = W,  recurrent_kernel = U,  bias = b;  for a GRU: bias = [b, 0] and for its n: [b_n, b_hn]

    Args:
      stack: the description, see `from_keras`.
      params: its parameters.

    Returns:
      For each layer the list of arrays that its `set_weights` takes.

    Raises:
      ValueError: a b_hn without the other biases.
      NotImplementedError: a stack that Keras has no equivalent of.

    Example:
      >>> import jax, rnncore
      >>> stack = rnncore.Stack(rnncore.GRU(4), bidirectional=True)
      >>> [a.shape for a in rnncore.to_keras(stack, stack.init(jax.random.key(0), 3))[0]]
      [(3, 12), (4, 12), (2, 12), (3, 12), (4, 12), (2, 12)]

    Source: as `from_keras`, whose inverse it is.
    """
    foreign.check("to_keras", stack, _CELLS, "Keras", _EXPECTED)
    cell: Any = stack.cell
    theirs, ours = _ORDER[type(cell)], cell.gates

    def one(own: Any) -> list[np.ndarray]:
        made = [foreign.joined(k, ours, theirs) for k in (own.input_kernel, own.recurrent_kernel)]
        bias, of_h = foreign.both_biases("to_keras", own)
        if bias is None:
            return made
        return [*made, foreign.joined(np.stack([bias, of_h]) if isinstance(cell, GRU) else bias, ours, theirs)]

    return [[array for own in layer for array in one(own)] for layer in params.layers]
