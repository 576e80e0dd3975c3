"""The Elman network, and IndRNN: the same cell over a diagonal kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Activation
from rnncore.cells.base import PointwiseCell
from rnncore.cells.recurrent_kernels import Diagonal, Recurrence


@dataclasses.dataclass(frozen=True)
class Elman(PointwiseCell):
    """Simple recurrent network.

    h_t = phi(W x_t + U h_{t-1} + b), with `residual` phi(W x_t + U h_{t-1} + b + h_{t-1})

    Args:
      hidden_size: H.
      activation_fn: phi, any elementwise function; tanh by default.
      residual: adds h_{t-1} before the activation.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, rnncore
      >>> rnncore.Elman(4).init(jax.random.key(0), 3).recurrent_kernel.shape
      (4, 1, 4)

    Source: Elman (1990).  torch.nn.RNN has two biases that add up; flax.linen.SimpleCell has one.
    """

    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)
    residual: bool = dataclasses.field(default=False, kw_only=True)

    gates = ("h",)

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        a = z.h + r.h
        h = self.activation_fn(a + carry.h if self.residual else a)
        return self.Carry(h), self.Gates(h)


@dataclasses.dataclass(frozen=True)
class IndRNN(Elman):
    """Independently recurrent network: Elman with a diagonal kernel and relu.

    h_t = phi(W x_t + u * h_{t-1} + b)

    Args:
      hidden_size: H.
      activation_fn: phi; relu by default as in the paper.
      recurrence, residual, kernel_init, recurrent_init, bias_init: as in `Elman`.

    Example:
      >>> import jax, rnncore
      >>> rnncore.IndRNN(4).init(jax.random.key(0), 3).recurrent_kernel.shape
      (1, 4)

    Source: Li, Li, Cook, Zhu and Gao (2018), arXiv:1803.04831.
    """

    recurrence: Recurrence = dataclasses.field(default_factory=Diagonal, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jax.nn.relu, kw_only=True)
