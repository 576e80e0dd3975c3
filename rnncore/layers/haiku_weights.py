"""Weights to and from the recurrent cores of Haiku; Haiku itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rnncore._types import Array
from rnncore.cells import LSTM, Elman, ResetBeforeGRU
from rnncore.layers import foreign_weights as foreign
from rnncore.layers.stack import Stack, StackParams

_LSTM, _GRU = ("i", "g", "f", "o"), ("z", "r", "n")
_NAMES = {LSTM: "lstm", ResetBeforeGRU: "gru", Elman: "vanilla_rnn"}
_CELLS: dict[type, Callable[[Any], bool]] = {
    LSTM: foreign.usual,
    ResetBeforeGRU: foreign.usual,
    Elman: lambda cell: cell.activation_fn is jax.nn.relu,
}
_EXPECTED = (
    "LSTM, Elman(activation_fn=jax.nn.relu) or ResetBeforeGRU (hk.GRU resets before the product, which GRU does not) "
    "over Dense(), with the usual functions, without peepholes, coupled or residual, and no learned carry"
)


def from_haiku(
    stack: Stack, params: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None = None
) -> StackParams:
    """Parameters of a stack from those of hk.LSTM, hk.GRU or hk.VanillaRNN.

    LSTM: [W; U] = linear/w, b = linear/b, with 1 more for b_f, which Haiku adds when it runs
    GRU: W = w_i, U = w_h, with the sign of z's part flipped, because Haiku's z is 1 - z here

    Args:
      stack: the description: LSTM, ResetBeforeGRU or Elman with relu over a dense kernel.
      params: parameters of a Haiku model, {"lstm/linear": {"w": (D + H, 4*H), "b": (4*H,)}, ...}.
      names: the cores' module names, one for each layer and direction, forward before backward; by default those that
        Haiku gives, lstm, lstm_1, ...

    Returns:
      `StackParams`, in the dtype of the weights.

    Raises:
      ValueError: missing modules, a wrong number of names, or wrong shapes.
      NotImplementedError: a stack that Haiku has no equivalent of, GRU among them.

    Example:
      >>> import numpy as np, rnncore
      >>> state = {"lstm/linear": {"w": np.ones((7, 16)), "b": np.zeros(16)}}
      >>> rnncore.from_haiku(rnncore.Stack(rnncore.LSTM(4)), state).layers[0][0].bias[1].tolist()
      [1.0, 1.0, 1.0, 1.0]

    Source: the modules of haiku/_src/recurrent.py: gates i, g, f, o and z, r, a.
    """
    call = "from_haiku"
    foreign.check(call, stack, _CELLS, "Haiku", _EXPECTED)
    cell: Any = stack.cell
    hidden, names = cell.hidden_size, _names(call, stack, names)

    def entry(module: str, leaf: str, shape: tuple[int | None, ...]) -> Array:
        if module not in params or leaf not in params[module]:
            raise ValueError(f"`{call}(params=<{sorted(params)}>)`: has no [{module!r}][{leaf!r}].")
        return foreign.taken(call, f"[{module!r}][{leaf!r}]", params[module][leaf], shape)

    def one(level: int, way: int) -> Any:
        name, features = names[level * stack.directions + way], stack.output_size if level else None
        if isinstance(cell, LSTM):
            rows = None if features is None else features + hidden
            both = foreign.apart(entry(f"{name}/linear", "w", (rows, 4 * hidden)), _LSTM, cell.gates)
            bias = foreign.apart(entry(f"{name}/linear", "b", (4 * hidden,)), _LSTM, cell.gates)
            bias = bias.at[cell.gates.index("f")].add(1)
            return foreign.own_params(cell, (both[:-hidden], both[-hidden:]), bias, None)
        if isinstance(cell, ResetBeforeGRU):
            shapes = {"w_i": (features, 3 * hidden), "w_h": (hidden, 3 * hidden), "b": (3 * hidden,)}
            arrays = (foreign.apart(entry(name, leaf, s), _GRU, cell.gates) for leaf, s in shapes.items())
            kernel, recurrent, bias = (_turned(a) for a in arrays)
            return foreign.own_params(cell, (kernel, recurrent), bias, None)
        kernel = entry(f"{name}/linear", "w", (features, hidden))
        recurrent = entry(f"{name}/linear_1", "w", (hidden, hidden))
        bias = entry(f"{name}/linear", "b", (hidden,))
        if "b" in params[f"{name}/linear_1"]:
            bias = bias + entry(f"{name}/linear_1", "b", (hidden,))
        return foreign.own_params(cell, (kernel[:, None], recurrent[:, None]), bias[None], None)

    return foreign.of_stack(stack, one)


def to_haiku(stack: Stack, params: StackParams, names: Sequence[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of Haiku cores that compute what a stack does.

    Args:
      stack: the description, see `from_haiku`.
      params: its parameters.
      names: the cores' module names, likewise.

    Returns:
      {module: {name: array}}; of an hk.VanillaRNN the second bias is zero.

    Raises:
      ValueError: a wrong number of names.
      NotImplementedError: a stack that Haiku has no equivalent of.

    Example:
      >>> import jax, rnncore
      >>> stack = rnncore.Stack(rnncore.LSTM(4), num_layers=2)
      >>> sorted(rnncore.to_haiku(stack, stack.init(jax.random.key(0), 3)))
      ['lstm/linear', 'lstm_1/linear']

    Source: as `from_haiku`, whose inverse it is.
    """
    call = "to_haiku"
    foreign.check(call, stack, _CELLS, "Haiku", _EXPECTED)
    cell: Any = stack.cell
    made: dict[str, dict[str, np.ndarray]] = {}
    every = (own for layer in params.layers for own in layer)
    for name, own in zip(_names(call, stack, names), every, strict=True):
        kernel, recurrent = np.asarray(own.input_kernel), np.asarray(own.recurrent_kernel)
        bias = np.zeros(kernel.shape[1:], kernel.dtype) if own.bias is None else np.array(own.bias)
        if isinstance(cell, LSTM):
            bias[cell.gates.index("f")] -= 1
            both = foreign.joined(np.concatenate([kernel, recurrent]), cell.gates, _LSTM)
            made[f"{name}/linear"] = {"w": both, "b": foreign.joined(bias, cell.gates, _LSTM)}
        elif isinstance(cell, ResetBeforeGRU):
            arrays = {"w_i": kernel, "w_h": recurrent, "b": bias}
            made[name] = {k: foreign.joined(_turned(a), cell.gates, _GRU) for k, a in arrays.items()}
        else:
            made[f"{name}/linear"] = {"w": kernel[:, 0], "b": bias[0]}
            made[f"{name}/linear_1"] = {"w": recurrent[:, 0], "b": np.zeros_like(bias[0])}
    return made


def _turned(array: Any) -> Any:
    """(..., 3, H), gates r, z, n, with the sign of z's part flipped: sigmoid(-a) = 1 - sigmoid(a)."""
    return array * np.array([1, -1, 1], array.dtype)[:, None]


def _names(call: str, stack: Stack, names: Sequence[str] | None) -> list[str]:
    count, own = stack.num_layers * stack.directions, _NAMES[type(stack.cell)]
    if names is None:
        return [own if n == 0 else f"{own}_{n}" for n in range(count)]
    if len(names) != count:
        raise ValueError(f"`{call}(names={list(names)})`: expected {count} names, one for each layer and direction.")
    return list(names)
