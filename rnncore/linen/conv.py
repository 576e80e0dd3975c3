"""The convolutional LSTM cell, with working strides and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rnncore._types import Array, Initializer

NAMED = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")
"""The padding names of `nn.Conv`."""


class ConvLSTMCell(nn.RNNCellBase):
    """Convolutional LSTM with the parameters of `flax.linen.ConvLSTMCell`.

    i, g, f, o = W_i * x + b_i + W_h * h + b_h      (* convolves; each gate has `features` channels)
    c' = sigmoid(f + 1) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(c'),   carry (c, h), output h'

    `strides` and `padding` belong to the convolution of x, and the carry has the spatial axes that come
    out of it.  The convolution of h goes over the carry's own grid: stride 1, and the same padding where
    that keeps the size, else "SAME".

    Args:
      features: F, channels of the carry and the output.
      kernel_size: size of both kernels, one number for each spatial axis.
      strides: of the convolution of x; one number for each spatial axis, one for all, or None for 1.
      padding: of the convolution of x: "SAME", "VALID" or another name that `nn.Conv` knows, a number, or a
        number or (low, high) pair for each spatial axis.
      use_bias: whether both convolutions have a bias.
      dtype: dtype of the convolutions; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of c and h.

    Raises:
      ValueError: at construction, for sizes, strides or padding that fit no convolution.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.ConvLSTMCell(features=4, kernel_size=(3, 3), strides=(2, 2), padding="VALID"))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 9, 8, 3)))[0].shape
      (2, 5, 4, 3, 4)

    Source: Shi, Chen, Wang, Yeung, Wong and Woo (2015), arXiv:1506.04214, without their peepholes.
    Equal to flax.linen.ConvLSTMCell where the size stays; Flax strides and pads h as it does x and makes
    a carry of the input's size, so with other strides or "VALID" it fails, or where a single position is
    left spreads that over the whole carry.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Any = None
    padding: Any = "SAME"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = nn.initializers.zeros_init()

    def __post_init__(self) -> None:
        _check_sizes(self.kernel_size, self.strides)
        _check_padding(self.padding, len(self.kernel_size))
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """One step.

        Args:
          carry: (c, h), arrays (*batch, *space', F) as `initialize_carry` makes them.
          inputs: (*batch, *space, channels).

        Returns:
          ((c', h'), h').

        Raises:
          ValueError: a carry that does not have the space that comes out of the convolution of the inputs.
        """
        c, h = carry
        axes = self.num_feature_axes
        space = self._space(jnp.shape(inputs)[-axes:-1])
        if any(jnp.shape(a)[-axes:] != (*space, self.features) for a in (c, h)):
            raise ValueError(
                f"`ConvLSTMCell(...)(carry=<{jnp.shape(c)}, {jnp.shape(h)}>, inputs=<{jnp.shape(inputs)}>)`: expected "
                f"(c, h) whose last axes are {(*space, self.features)}, as `cell.initialize_carry` makes them."
            )
        gates = self._conv("ih", self.strides, self.padding)(inputs) + self._conv("hh", None, self._own_padding())(h)
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> tuple[Array, Array]:
        """(c, h) before the first step, on the grid that comes out of the convolution of the inputs.

        Args:
          rng: key for `carry_init`, split in two: c, then h.
          input_shape: (*batch, *space, channels), the shape of one step's input.
        """
        axes = self.num_feature_axes
        shape = (*input_shape[:-axes], *self._space(input_shape[-axes:-1]), self.features)
        c_key, h_key = jax.random.split(rng)
        return self.carry_init(c_key, shape, self.param_dtype), self.carry_init(h_key, shape, self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """Number of trailing axes of an input that are not batch axes: spatial axes and channels."""
        return len(self.kernel_size) + 1

    @nn.nowrap
    def _conv(self, name: str, strides: Any, padding: Any) -> nn.Conv:
        return nn.Conv(
            4 * self.features, tuple(self.kernel_size), strides, padding, use_bias=self.use_bias, dtype=self.dtype,
            param_dtype=self.param_dtype, name=name,
        )  # fmt: skip

    @nn.nowrap
    def _own_padding(self) -> Any:
        return self.padding if self._padded() == tuple(k - 1 for k in self.kernel_size) else "SAME"

    @nn.nowrap
    def _padded(self) -> tuple[int, ...]:
        """By how much the padding lengthens each spatial axis; a name other than "VALID" keeps the size."""
        padding = self.padding
        if isinstance(padding, str):
            return tuple(0 if padding == "VALID" else k - 1 for k in self.kernel_size)
        each = (padding,) * len(self.kernel_size) if isinstance(padding, int) else padding
        return tuple(2 * p if isinstance(p, int) else sum(p) for p in each)

    @nn.nowrap
    def _space(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial axes that come out of the convolution of inputs with these."""
        strides = self.strides or 1
        strides = (strides,) * len(space) if isinstance(strides, int) else strides
        sizes = zip(space, self._padded(), self.kernel_size, strides, strict=True)
        out = tuple((n + p - k) // s + 1 for n, p, k, s in sizes)
        if any(n < 1 for n in out):
            raise ValueError(
                f"`ConvLSTMCell(kernel_size={self.kernel_size}, padding={self.padding!r})`: nothing is left of inputs "
                f"with the spatial axes {space}; use a smaller kernel or more padding."
            )
        return out


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and n > 0


def _check_sizes(kernel_size: Any, strides: Any) -> None:
    if not isinstance(kernel_size, Sequence) or not kernel_size or not all(map(_is_size, kernel_size)):
        raise ValueError(
            f"`ConvLSTMCell(kernel_size={kernel_size!r})`: expected a positive number for each spatial axis, such as "
            "(3, 3) for images."
        )
    if strides is None or _is_size(strides):
        return
    if not isinstance(strides, Sequence) or len(strides) != len(kernel_size) or not all(map(_is_size, strides)):
        raise ValueError(
            f"`ConvLSTMCell(kernel_size={kernel_size}, strides={strides!r})`: expected {len(kernel_size)} positive "
            "numbers, one for each spatial axis, or one number for all."
        )


def _check_padding(padding: Any, rank: int) -> None:
    if isinstance(padding, str):
        if padding not in NAMED or (padding == "CAUSAL" and rank != 1):
            raise ValueError(
                f"`ConvLSTMCell(padding={padding!r})`: expected one of {', '.join(NAMED)}, the last for one spatial "
                f"axis only; kernel_size has {rank}."
            )
        return
    each = (padding,) * rank if isinstance(padding, int) else padding
    if not isinstance(each, Sequence) or len(each) != rank or not all(map(_is_pad, each)):
        raise ValueError(
            f"`ConvLSTMCell(padding={padding!r})`: expected a name, a number, or {rank} of numbers and (low, high) "
            "pairs, one for each spatial axis of kernel_size."
        )


def _is_pad(pad: Any) -> bool:
    return isinstance(pad, int) or (isinstance(pad, tuple) and len(pad) == 2 and all(isinstance(p, int) for p in pad))
