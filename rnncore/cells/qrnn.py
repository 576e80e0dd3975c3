"""Quasi-recurrent network: gates by a convolution over time, and a pooling that is elementwise linear in its past."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Activation, Array
from rnncore.cells.base import HiddenCarry, PointwiseCell
from rnncore.cells.lstm import LSTMCarry
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.cells.structured_kernels import Unconnected

Pooling = Literal["f", "fo", "ifo"]


@dataclasses.dataclass(frozen=True)
class QRNN(PointwiseCell):
    """Quasi-recurrent network: gates that see the last few inputs, and no h.

    z_t = tanh(W_z [x_{t-k+1}, ..., x_t] + b_z),   f_t, o_t, i_t = sigmoid(W [x_{t-k+1}, ..., x_t] + b)
    "f":    h_t = f_t h_{t-1} + (1 - f_t) z_t
    "fo":   c_t = f_t c_{t-1} + (1 - f_t) z_t,   h_t = o_t c_t
    "ifo":  c_t = f_t c_{t-1} + i_t z_t,         h_t = o_t c_t

    The cell reads windows of k inputs as one input of k D features, which `windows` makes of a sequence: its input
    kernel (k D, G, H) is that of the convolution.

    Args:
      hidden_size: H.
      pooling: "f", "fo" or "ifo".
      activation_fn: in place of tanh.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`; `Unconnected` by default.

    Raises:
      ValueError: another pooling.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell, xs = rnncore.QRNN(4), jnp.ones((2, 5, 3))
      >>> params = cell.init(jax.random.key(0), 2 * 3)
      >>> carry, ys = rnncore.unroll(cell, params, rnncore.windows(xs, 2))
      >>> ys.shape, carry._fields
      ((2, 5, 4), ('c', 'h'))

    Source: Bradbury et al. (2016), arXiv:1611.01576.  Neither PyTorch nor Flax has it.
    """

    pooling: Pooling = dataclasses.field(default="fo", kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)
    recurrence: Recurrence = dataclasses.field(default_factory=Unconnected, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in get_args(Pooling):
            choices = ", ".join(map(repr, get_args(Pooling)))
            raise ValueError(f"`QRNN(pooling={self.pooling!r})`: expected one of {choices}.")

    @property
    def gates(self) -> tuple[str, ...]:
        return ("z", *self.pooling)

    @property
    def Carry(self) -> Any:
        """h, and c where it is another."""
        return HiddenCarry if self.pooling == "f" else LSTMCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        a = self.Gates(*(zg + rg for zg, rg in zip(z, r, strict=True)))
        gates = self.Gates(self.activation_fn(a.z), *map(jax.nn.sigmoid, a[1:]))
        if self.pooling == "f":
            return HiddenCarry(gates.f * carry.h + (1 - gates.f) * gates.z), gates
        enters = gates.i if self.pooling == "ifo" else 1 - gates.f
        c = gates.f * carry.c + enters * gates.z
        return LSTMCarry(c, gates.o * c), gates


def windows(
    xs: Array, width: int, *, previous: Array | None = None, resets: Array | None = None, seq_lengths: Any = None,
    reverse: bool = False, time_major: bool = False,
) -> Array:  # fmt: skip
    """The last few inputs of every step side by side, so that a cell's projection is a convolution over time.

    w_t = [x_{t-k+1}, ..., x_{t-1}, x_t],   x_t = 0 before the sequence

    Args:
      xs: (*batch, T, D), or (T, *batch, D) with `time_major`.
      width: k, the number of inputs in a window.
      previous: the k - 1 inputs that were processed before, with the axes of xs; zeros by default.
      resets: booleans as in `unroll`, where an episode begins: windows do not reach back over it.
      seq_lengths: integers (*batch); with `reverse` windows do not reach into the padding.
      reverse: windows [x_{t+k-1}, ..., x_t], for a run with `reverse=True`.
      time_major: the time axis is the first one.

    Returns:
      (*batch, T, k D), or with time first; the oldest input in front.

    Raises:
      ValueError: a width below 1, other shapes.

    Example:
      >>> import jax.numpy as jnp, rnncore
      >>> rnncore.windows(jnp.array([[1.0], [2.0], [3.0]]), 2).tolist()
      [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]

    Source: the masked convolution of Bradbury et al. (2016), arXiv:1611.01576.
    """
    got = f"`windows(xs=<{jnp.shape(xs)}>, width={width!r})`"
    if isinstance(width, bool) or not isinstance(width, int) or width < 1 or jnp.ndim(xs) < 2:
        raise ValueError(f"{got}: expected (*batch, T, D) and at least 1 input to a window.")
    axis = 0 if time_major else jnp.ndim(xs) - 2
    seen = jnp.moveaxis(jnp.asarray(xs), axis, 0)
    steps, batch = seen.shape[0], seen.shape[1:-1]
    past = jnp.zeros((width - 1, *seen.shape[1:]), seen.dtype)
    if previous is not None:
        expected = (*past.shape[1 : axis + 1], width - 1, *past.shape[axis + 1 :])
        if jnp.shape(previous) != expected:
            raise ValueError(f"{got}: previous has shape {jnp.shape(previous)}, expected {expected}.")
        past = jnp.moveaxis(jnp.asarray(previous, seen.dtype), axis, 0)
    if resets is not None:
        if jnp.shape(resets) != jnp.shape(xs)[:-1] or jnp.result_type(resets) != jnp.bool_:
            kind = f"{jnp.result_type(resets)} {jnp.shape(resets)}"
            raise ValueError(f"{got}: resets are {kind}, expected bool {jnp.shape(xs)[:-1]}.")
        resets = jnp.moveaxis(jnp.asarray(resets), axis, 0)
    lengths = None if seq_lengths is None else _lengths.check_lengths(seq_lengths, batch, steps)
    if reverse:
        seen, resets = _lengths.reverse_time((seen, resets), lengths)
    seen = jnp.concatenate([past, seen])
    parts = []
    for back in reversed(range(width)):
        part = seen[width - 1 - back : width - 1 - back + steps]
        if resets is not None and back:
            # Of an input `back` steps ago nothing is seen if an episode has begun since.
            begun = jnp.concatenate([jnp.zeros((width - 1, *batch), bool), resets])
            since = [begun[width - 1 - n : width - 1 - n + steps] for n in range(back)]
            part = jnp.where(jnp.stack(since).any(0)[..., None], 0, part)
        parts.append(part)
    made = jnp.concatenate(parts, -1)
    if reverse:
        made = _lengths.reverse_time(made, lengths)
    return jnp.moveaxis(made, 0, axis)
