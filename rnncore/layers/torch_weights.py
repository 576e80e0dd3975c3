"""Weights to and from the state dictionaries of torch.nn.LSTM, GRU and RNN; PyTorch itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.cells import GRU, LSTM, LSTMP, CellParams, Elman, LSTMPParams
from rnncore.cells.base import named
from rnncore.cells.recurrent_kernels import Dense
from rnncore.layers.stack import Stack, StackParams, check_stack


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
    _check(stack, "from_torch")
    if not isinstance(state, Mapping):
        raise ValueError(
            f"`from_torch(stack, state=<{type(state).__name__}>)`: expected a state dictionary, such as "
            "`module.state_dict()`."
        )
    left = {name: _array(value) for name, value in state.items()}
    gates, hidden = len(stack.cell.gates), stack.cell.hidden_size  # type: ignore[attr-defined]

    def take(name: str, columns: int | None) -> Array:
        if name not in left:
            raise ValueError(f"`from_torch(state=<{sorted(state)}>)`: has no {name!r}, which the stack needs.")
        value = left.pop(name)
        rows = stack.cell.output_size if name.startswith("weight_hr") else gates * hidden
        expected = (rows,) if columns is None else (rows, columns)
        if value.shape != expected:
            raise ValueError(f"`from_torch(state)`: {name!r} has shape {value.shape}, expected {expected}.")
        if name.startswith("weight_hr"):
            return value.T
        value = value.reshape(gates, hidden, *value.shape[1:])
        return value if columns is None else jnp.transpose(value, (2, 0, 1))

    def one(level: int, way: int) -> CellParams | LSTMPParams:
        end = f"_l{level}" + "_reverse" * way
        width = stack.output_size if level else left[f"weight_ih{end}"].shape[-1] if f"weight_ih{end}" in left else 0
        kernels = take(f"weight_ih{end}", width), take(f"weight_hh{end}", stack.cell.output_size)
        bias = recurrent_bias = None
        if f"bias_ih{end}" in left:
            of_inputs, of_h = take(f"bias_ih{end}", None), take(f"bias_hh{end}", None)
            bias = of_inputs + of_h
            if isinstance(stack.cell, GRU):
                bias, recurrent_bias = bias.at[2].set(of_inputs[2]), of_h[2:]
        if isinstance(stack.cell, LSTMP):
            return LSTMPParams(*kernels, bias, take(f"weight_hr{end}", hidden))
        return CellParams(*kernels, bias, recurrent_bias, named("Units", ())())

    layers = tuple(tuple(one(level, way) for way in range(stack.directions)) for level in range(stack.num_layers))
    if left:
        raise ValueError(
            f"`from_torch(state)`: {sorted(left)} are left over; expected {stack.num_layers} layers of "
            f"{stack.directions} directions of {type(stack.cell).__name__}; a projection weight_hr is that of LSTMP."
        )
    return StackParams(layers, None)


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
    _check(stack, "to_torch")
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
            recurrent_bias = getattr(own, "recurrent_bias", None)
            if own.bias is None:
                if recurrent_bias is not None:
                    raise ValueError("`to_torch(stack, params)`: b_hn without the other biases.")
                continue
            of_h = np.zeros_like(np.asarray(own.bias))
            if recurrent_bias is not None:
                of_h[2:] = recurrent_bias
            state[f"bias_ih{end}"], state[f"bias_hh{end}"] = np.asarray(own.bias).reshape(-1), of_h.reshape(-1)
    return state


def _array(value: Any) -> Array:
    return jnp.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _check(stack: Stack, name: str) -> None:
    check_stack(name, stack)
    cell = stack.cell
    plain = type(cell) in (LSTM, GRU, Elman) and isinstance(cell.recurrence, Dense)  # type: ignore[attr-defined]
    plain = plain or type(cell) is LSTMP
    options = [o for o in ("peepholes", "coupled", "residual") if getattr(cell, o, False)]
    if not plain or options or stack.learned_carry or (stack.bidirectional and stack.merge != "concat"):
        raise NotImplementedError(
            f"`{name}({stack})`: expected LSTMP, or LSTM, GRU or Elman over Dense() without peepholes, coupled or "
            "residual, merge='concat' and no learned carry; PyTorch has no other."
        )
