"""What the converters of weights share: orders of gates, and which stacks another library supports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.cells import CellParams, ResetBeforeGRU
from rnncore.cells.base import named
from rnncore.cells.gru_reset_before import ResetBeforeGRUParams
from rnncore.cells.recurrent_kernels import Dense
from rnncore.layers.stack import Merge, Stack, StackParams, check_stack


def taken(call: str, what: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """The array, of that shape (None: any size), or ValueError."""
    value = jnp.asarray(value)
    if value.ndim != len(shape) or any(s is not None and s != got for s, got in zip(shape, value.shape, strict=True)):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"`{call}`: {what} has shape {value.shape}, expected ({expected}).")
    return value


def apart(array: Array, theirs: Sequence[str], ours: Sequence[str]) -> Array:
    """(..., G*H) with their gates side by side as (..., G, H) in the order of ours."""
    wide = array.reshape(*array.shape[:-1], len(theirs), -1)
    return wide[..., np.array([theirs.index(g) for g in ours]), :]


def joined(array: Any, ours: Sequence[str], theirs: Sequence[str]) -> np.ndarray:
    """The inverse of `apart`."""
    array = np.asarray(array)[..., [ours.index(g) for g in theirs], :]
    return array.reshape(*array.shape[:-2], -1)


def own_params(cell: Any, kernels: tuple[Array, Array], bias: Array | None, recurrent_bias: Array | None) -> Any:
    """The parameters of a pointwise cell, or of a `ResetBeforeGRU`, whose bias is no option."""
    if isinstance(cell, ResetBeforeGRU):
        size = cell.hidden_size
        return ResetBeforeGRUParams(*kernels, jnp.zeros((3, size), kernels[0].dtype) if bias is None else bias)
    return CellParams(*kernels, bias, recurrent_bias, named("Units", ())())


def of_stack(stack: Stack, one: Callable[[int, int], Any]) -> StackParams:
    """The stack's parameters from those of each layer and direction."""
    ways = range(stack.directions)
    return StackParams(tuple(tuple(one(level, way) for way in ways) for level in range(stack.num_layers)), None)


def both_biases(call: str, own: Any) -> tuple[Any, Any]:
    """b, and the second bias of PyTorch and Keras, which is zeros but for b_hn of a GRU; or (None, None)."""
    recurrent_bias = getattr(own, "recurrent_bias", None)
    if own.bias is None:
        if recurrent_bias is not None:
            raise ValueError(f"`{call}(stack, params)`: b_hn without the other biases.")
        return None, None
    bias = np.asarray(own.bias)
    of_h = np.zeros_like(bias)
    if recurrent_bias is not None:
        of_h[2:] = recurrent_bias
    return bias, of_h


def usual(cell: Any) -> bool:
    """Whether the functions of units are sigmoid and tanh."""
    return cell.gate_fn is jax.nn.sigmoid and cell.activation_fn is jnp.tanh


def check(
    call: str, stack: Stack, cells: Mapping[type, Callable[[Any], bool]], library: str, expected: str,
    merges: Collection[str] = get_args(Merge),
) -> None:  # fmt: skip
    """NotImplementedError unless the library has an equivalent of the stack."""
    check_stack(call, stack)
    cell: Any = stack.cell
    options = [o for o in ("peepholes", "coupled", "residual") if getattr(cell, o, False)]
    dense = isinstance(getattr(cell, "recurrence", Dense()), Dense)
    known = type(cell) in cells and dense and not options and not stack.learned_carry and cells[type(cell)](cell)
    if not known or (stack.bidirectional and stack.merge not in merges):
        raise NotImplementedError(f"`{call}({stack})`: expected {expected}; {library} has no other.")
