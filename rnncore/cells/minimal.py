"""Cells whose gates see only the inputs, so that the state follows elementwise linear updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.cells.structured_kernels import Unconnected


def _positive(a: Array) -> Array:
    """g: a + 1/2 above 0 and sigmoid(a) below, the positive function of the paper's states."""
    return jnp.where(a >= 0, a + 0.5, jax.nn.sigmoid(a))


@dataclasses.dataclass(frozen=True)
class MinGRU(PointwiseCell):
    """Minimal gated recurrent unit: a GRU without h in its gates.

    z_t = sigmoid(W_z x_t + b_z)
    n_t = g(W_n x_t + b_n),   g(a) = a + 1/2 above 0, sigmoid(a) below; with `positive=False` g(a) = a
    h_t = (1 - z_t) h_{t-1} + z_t n_t

    Args:
      hidden_size: H.
      positive: keep the states positive by g, as the paper's form in logarithms does.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`; `Unconnected` by default.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.MinGRU(4)
      >>> rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))[1].shape
      (2, 5, 4)

    Source: Feng et al. (2024), arXiv:2410.01201.  Its z admits the new value; the z of `GRU` keeps the old one.
    """

    positive: bool = dataclasses.field(default=True, kw_only=True)
    recurrence: Recurrence = dataclasses.field(default_factory=Unconnected, kw_only=True)

    gates = ("z", "n")

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        update, a = jax.nn.sigmoid(z.z + r.z), z.n + r.n
        n = _positive(a) if self.positive else a
        return self.Carry((1 - update) * carry.h + update * n), self.Gates(update, n)


@dataclasses.dataclass(frozen=True)
class MinLSTM(PointwiseCell):
    """Minimal long short-term memory: no h in its gates, no output gate, and gates that add up to 1.

    f_t = sigmoid(W_f x_t + b_f),   i_t = sigmoid(W_i x_t + b_i)
    n_t = g(W_n x_t + b_n),   g(a) = a + 1/2 above 0, sigmoid(a) below; with `positive=False` g(a) = a
    h_t = (f_t h_{t-1} + i_t n_t) / (f_t + i_t)

    Args:
      hidden_size: H.
      positive: keep the states positive by g, as the paper's form in logarithms does.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`; `Unconnected` by default.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.MinLSTM(4)
      >>> rnncore.unroll(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))[1].shape
      (2, 5, 4)

    Source: Feng et al. (2024), arXiv:2410.01201.
    """

    positive: bool = dataclasses.field(default=True, kw_only=True)
    recurrence: Recurrence = dataclasses.field(default_factory=Unconnected, kw_only=True)

    gates = ("f", "i", "n")

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        f, i, a = jax.nn.sigmoid(z.f + r.f), jax.nn.sigmoid(z.i + r.i), z.n + r.n
        n = _positive(a) if self.positive else a
        return self.Carry((f * carry.h + i * n) / (f + i)), self.Gates(f, i, n)


@dataclasses.dataclass(frozen=True)
class RGLRU(PointwiseCell):
    """Real-gated linear recurrent unit: each unit decays at its own rate, which a gate slows down.

    r_t = sigmoid(W_r x_t + b_r),   i_t = sigmoid(W_i x_t + b_i),   v_t = W_v x_t + b_v
    a_t = exp(-c softplus(lambda) r_t)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t v_t

    Args:
      hidden_size: H.
      scale: c.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`; `Unconnected` by default.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.RGLRU(4)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> rate = jnp.exp(-jax.nn.softplus(params.units.decay) * 8)
      >>> bool((rate > 0.89).all() and (rate < 1).all())
      True

    Source: De et al. (2024), arXiv:2402.19427, where v is the input itself, of H features: W_v is its kernel before the
    unit.  The decay starts such that a_t at r_t = 1 is uniform in [0.9, 0.999] as there.
    """

    scale: float = dataclasses.field(default=8.0, kw_only=True)
    recurrence: Recurrence = dataclasses.field(default_factory=Unconnected, kw_only=True)

    gates = ("r", "i", "v")

    units = ("decay",)

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> CellParams:
        """Draws parameters in `dtype`, the decays as the paper does."""
        key, own = jax.random.split(key)
        params = super().init(key, input_size, dtype)
        rate = jax.random.uniform(own, (self.hidden_size,), dtype, 0.9, 0.999)
        # softplus(decay) = -log(rate) / c
        return params._replace(units=type(params.units)(jnp.log(jnp.expm1(-jnp.log(rate) / self.scale))))

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        gate, i, v = jax.nn.sigmoid(z.r + r.r), jax.nn.sigmoid(z.i + r.i), z.v + r.v
        log_a = -self.scale * jax.nn.softplus(p.decay) * gate
        # 1 - a^2 by expm1: a lies near 1.
        h = jnp.exp(log_a) * carry.h + jnp.sqrt(-jnp.expm1(2 * log_a)) * i * v
        return self.Carry(h), self.Gates(gate, i, v)
