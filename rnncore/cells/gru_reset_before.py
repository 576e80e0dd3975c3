"""Gated recurrent unit with the reset before the product: two products a step, so not pointwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _products, initializers
from rnncore._types import Activation, Array, Initializer, exportable
from rnncore.cells.base import Cell, HiddenCarry, check_init, named


@exportable
class ResetBeforeGRUParams(NamedTuple):
    """input_kernel (D, 3, H), recurrent_kernel (H, 3, H), bias (3, H); gates r, z, n."""

    input_kernel: Array
    recurrent_kernel: Array
    bias: Array


@dataclasses.dataclass(frozen=True)
class ResetBeforeGRU(Cell):
    """Gated recurrent unit, reset before the product: the form of the first paper.

    r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)
    z_t = sigmoid(W_z x_t + U_z h_{t-1} + b_z)
    n_t = tanh(W_n x_t + U_n (r_t h_{t-1}) + b_n)
    h_t = (1 - z_t) n_t + z_t h_{t-1}

    The product with U_n needs r_t, which needs h_{t-1}: two dependent products a step.  The cell
    runs through plain autodiff of a scan, and `rnncore.explain_backend` says so.

    Args:
      hidden_size: H.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init, recurrent_init, bias_init: initialisers; orthogonal gate by gate by default.

    Example:
      >>> import jax, rnncore
      >>> rnncore.ResetBeforeGRU(4).init(jax.random.key(0), 3).bias.shape
      (3, 4)

    Source: Cho et al. (2014), arXiv:1406.1078v1.  Haiku has this form with z and 1 - z swapped;
    PyTorch and Flax have `GRU`.
    """

    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)
    kernel_init: Initializer = dataclasses.field(default=initializers.lecun_normal, kw_only=True)
    recurrent_init: Initializer = dataclasses.field(default=initializers.per_gate(), kw_only=True)
    bias_init: Initializer = dataclasses.field(default=initializers.zeros, kw_only=True)

    gates = ("r", "z", "n")

    @property
    def projected_size(self) -> int | None:
        """3*H."""
        return 3 * self.hidden_size

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> ResetBeforeGRUParams:
        """Draws parameters in `dtype` for inputs of `input_size` features."""
        hidden = self.hidden_size
        check_init(self, key, input_size, dtype)
        input_key, recurrent_key, bias_key = jax.random.split(key, 3)
        return ResetBeforeGRUParams(
            self.kernel_init(input_key, (input_size, 3 * hidden), dtype).reshape(input_size, 3, hidden),
            self.recurrent_init(recurrent_key, (hidden, 3, hidden), dtype),
            self.bias_init(bias_key, (3, hidden), dtype),
        )

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> HiddenCarry:
        """Zeros (*batch_shape, H)."""
        return HiddenCarry(jnp.zeros((*batch_shape, self.hidden_size), dtype))

    def project(self, params: ResetBeforeGRUParams, xs: Array) -> Array:
        """z = x W + b as a slab: (..., D) to (..., 3*H)."""
        kernel = params.input_kernel
        zs = _products.times(xs, kernel.reshape(kernel.shape[0], -1))
        return zs + jnp.broadcast_to(params.bias.reshape(-1), zs.shape)

    def update(self, params: ResetBeforeGRUParams, carry: HiddenCarry, z: Array) -> tuple[HiddenCarry, Any]:
        """One step: (carry, z slab) to (new carry, gates)."""
        size, kernel = self.hidden_size, params.recurrent_kernel
        h = carry.h.astype(kernel.dtype)
        r_and_z = h @ kernel[:, :2].reshape(size, 2 * size) + z[..., : 2 * size]
        reset, keep = self.gate_fn(r_and_z[..., :size]), self.gate_fn(r_and_z[..., size:])
        n = self.activation_fn(z[..., 2 * size :] + (reset * h) @ kernel[:, 2])
        return HiddenCarry((1 - keep) * n + keep * carry.h), named("Gates", self.gates)(reset, keep, n)
