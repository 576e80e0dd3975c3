"""Weights to and from the state dictionaries of torch.nn.LSTM, GRU and RNN; PyTorch itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rnncore._types import Array
from rnncore.cells import GRU, LSTM, LSTMP, Elman, LSTMPParams
from rnncore.layers import foreign_weights as foreign
from rnncore.layers.stack import Stack, StackParams

_CELLS: dict[type, Callable[[Any], bool]] = dict.fromkeys((LSTM, LSTMP, GRU, Elman), lambda _: True)
_EXPECTED = (
    "LSTMP, or LSTM, GRU or Elman over Dense() without peepholes, coupled or residual, merge='concat' and no learned "
    "carry"
)


def from_torch(stack: Stack, state: Mapping[str, Any]) -> StackParams:
    """Parameters of a stack from the state dictionary of torch.nn.LSTM, torch.nn.GRU or torch.nn.RNN.

    W = weight_ih^T,  U = weight_hh^T,  b = bias_ih + bias_hh;  for a GRU's n: b_n = bias_ih,  b_hn = bias_hh;
    for an LSTMP: V = weight_hr^T

    Args:
      stack: the description: LSTM, GRU or Elman over a dense kernel, or LSTMP, with the layers and directions of
        the PyTorch module, merge="concat" and zeros as its initial carry.
      state: `module.state_dict()`, of tensors or arrays: weight_ih_l0 (G*H, D), weight_hh_l0 (G*H, H),
        bias_ih_l0, bias_hh_l0 (G*H,), with _reverse for the other direction; with proj_size=P weight_hh_l0 (G*H, P)
        and weight_hr_l0 (P, H).

    Returns:
      `StackParams`, in the dtype of the weights; `stack.to_tree` makes of them the parameters of the
      linen layer, of the nnx layer, and `.layers[0][0]` are those of the first cell.

    Raises:
      ValueError: entries that are missing, left over or of the wrong shape.
      NotImplementedError: a stack that PyTorch has no equivalent of.

    Example:
      >>> import jax, numpy as np, rnncore
      >>> state = {"weight_ih_l0": np.ones((16, 3)), "weight_hh_l0": np.ones((16, 4)),
      ...          "bias_ih_l0": np.ones(16), "bias_hh_l0": np.ones(16)}
      >>> params = rnncore.from_torch(rnncore.Stack(rnncore.LSTM(4)), state)
      >>> params.layers[0][0].input_kernel.shape, float(params.layers[0][0].bias[0, 0])
      ((3, 4, 4), 2.0)

    Source: the layout that torch.nn.LSTM documents.  Its outputs are (T, B, H) unless batch_first.
    """
    foreign.check("from_torch", stack, _CELLS, "PyTorch", _EXPECTED, merges=("concat",))
    if not isinstance(state, Mapping):
        raise ValueError(
            f"`from_torch(stack, state=<{type(state).__name__}>)`: expected a state dictionary, such as "
            "`module.state_dict()`."
        )
    left = {name: value.detach().cpu().numpy() if hasattr(value, "detach") else value for name, value in state.items()}
    cell: Any = stack.cell
    gates, wide = cell.gates, len(cell.gates) * cell.hidden_size

    def take(name: str, *shape: int | None) -> Array:
        if name not in left:
            raise ValueError(f"`from_torch(state=<{sorted(state)}>)`: has no {name!r}, which the stack needs.")
        return foreign.taken("from_torch(state)", repr(name), left.pop(name), shape).T

    def one(level: int, way: int) -> Any:
        end = f"_l{level}" + "_reverse" * way
        sizes = {"ih": stack.output_size if level else None, "hh": cell.output_size}
        kernel, recurrent = (
            foreign.apart(take(f"weight_{n}{end}", wide, size), gates, gates) for n, size in sizes.items()
        )
        bias = recurrent_bias = None
        if f"bias_ih{end}" in left:
            of_inputs, of_h = (foreign.apart(take(f"bias_{n}{end}", wide), gates, gates) for n in sizes)
            bias = of_inputs + of_h
            if isinstance(cell, GRU):
                bias, recurrent_bias = bias.at[2].set(of_inputs[2]), of_h[2:]
        if isinstance(cell, LSTMP):
            return LSTMPParams(kernel, recurrent, bias, take(f"weight_hr{end}", cell.output_size, cell.hidden_size))
        return foreign.own_params(cell, (kernel, recurrent), bias, recurrent_bias)

    params = foreign.of_stack(stack, one)
    if left:
        raise ValueError(
            f"`from_torch(state)`: {sorted(left)} are left over; expected {stack.num_layers} layers of "
            f"{stack.directions} directions of {type(stack.cell).__name__}; a projection weight_hr is that of LSTMP."
        )
    return params


def to_torch(stack: Stack, params: StackParams) -> dict[str, np.ndarray]:
    """The state dictionary of the torch.nn module that computes what a stack does.

    weight_ih = W^T,  weight_hh = U^T,  bias_ih = b,  bias_hh = 0;  for a GRU's n: bias_hh = b_hn

    Args:
      stack: the description, see `from_torch`.
      params: its parameters.

    Returns:
      NumPy arrays by PyTorch's names: `module.load_state_dict({k: torch.tensor(v) for k, v in ...})`.

    Raises:
      ValueError: a bias in one place and none in another, which PyTorch cannot represent.
      NotImplementedError: a stack that PyTorch has no equivalent of, or a learned initial carry.

    Example:
      >>> import jax, rnncore
      >>> stack = rnncore.Stack(rnncore.GRU(4), num_layers=2)
      >>> state = rnncore.to_torch(stack, stack.init(jax.random.key(0), 3))
      >>> len(state), state["weight_ih_l1"].shape
      (8, (12, 4))

    Source: as `from_torch`, whose inverse it is.
    """
    foreign.check("to_torch", stack, _CELLS, "PyTorch", _EXPECTED, merges=("concat",))
    state: dict[str, np.ndarray] = {}
    with_bias = {own.bias is not None for layer in params.layers for own in layer}
    if len(with_bias) > 1:
        raise ValueError("`to_torch(stack, params)`: expected a bias in every layer and direction, or in none.")
    for level, layer in enumerate(params.layers):
        for way, own in enumerate(layer):
            end = f"_l{level}" + "_reverse" * way
            for name, kernel in (("ih", own.input_kernel), ("hh", own.recurrent_kernel)):
                state[f"weight_{name}{end}"] = np.asarray(kernel).reshape(kernel.shape[0], -1).T.copy()
            if isinstance(own, LSTMPParams):
                state[f"weight_hr{end}"] = np.asarray(own.projection).T.copy()
            for name, bias in zip(("ih", "hh"), foreign.both_biases("to_torch", own), strict=True):
                if bias is not None:
                    state[f"bias_{name}{end}"] = bias.reshape(-1)
    return state
