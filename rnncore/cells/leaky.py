"""The leaky network of continuous time, in steps of Euler's method."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Activation, Array
from rnncore.cells.base import CellParams, PointwiseCell


@dataclasses.dataclass(frozen=True)
class Leaky(PointwiseCell):
    """Leaky network: units that decay towards their input, each with its own time constant.

      tau dh/dt = -h + phi(W x + U h + b)
      h_t = (1 - alpha) h_{t-1} + alpha phi(W x_t + U h_{t-1} + b),   alpha = dt / tau

    `with_noise` feeds noise as additional columns of x.

    Args:
      hidden_size: H.
      dt: length of a step, in the unit of tau.
      tau: time constant, at least dt; or a tuple of H, one for each unit.
      learn_tau: the logarithms of tau are per-unit parameters, `units.log_tau`, and tau is their initial value.  This
        also holds where tau is a tuple; to keep those fixed, mask their updates.
      activation_fn: phi, any elementwise function; tanh by default.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Raises:
      ValueError: a dt that is not above 0, a tau below dt or for another number of units.

    Example:
      >>> import jax, rnncore
      >>> cell = rnncore.Leaky(4, dt=1.0, tau=(10.0, 20.0, 50.0, 100.0))
      >>> cell.init(jax.random.key(0), 3).units.log_tau.shape
      (4,)

    Source: Beer (1995) and, in this form, Song, Yang and Wang (2016), doi:10.1371/journal.pcbi.1004792.  Neither
    PyTorch nor Flax has it.
    """

    dt: float = dataclasses.field(default=1.0, kw_only=True)
    tau: float | tuple[float, ...] = dataclasses.field(default=10.0, kw_only=True)
    learn_tau: bool = dataclasses.field(default=False, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        got = f"`Leaky(hidden_size={self.hidden_size}, dt={self.dt}, tau={self.tau})`"
        several = isinstance(self.tau, tuple)
        if several and len(self.tau) != self.hidden_size:  # type: ignore[arg-type]
            raise ValueError(f"{got}: expected one tau, or one for each unit.")
        if not 0 < self.dt <= min(self.tau if isinstance(self.tau, tuple) else (self.tau,)):
            raise ValueError(f"{got}: expected 0 < dt <= tau; Euler's method overshoots with a longer step.")

    gates = ("h",)

    @property
    def units(self) -> tuple[str, ...]:
        return ("log_tau",) if self.learn_tau or isinstance(self.tau, tuple) else ()

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> CellParams:
        """Draws parameters in `dtype`; the time constants start at `tau`."""
        params = super().init(key, input_size, dtype)
        if not self.units:
            return params
        log_tau = jnp.broadcast_to(jnp.log(jnp.asarray(self.tau, dtype)), (self.hidden_size,))
        return params._replace(units=type(params.units)(log_tau))

    def with_noise(self, key: Array, params: CellParams, xs: Array, sigma: Any) -> tuple[CellParams, Array]:
        """Parameters and inputs of a run with noise: H more inputs, one drawn for each unit and step.

        tau dh/dt = -h + phi(W x + U h + b + sigma sqrt(2 tau) xi);   in a step sigma sqrt(2 tau / dt) N(0, 1)

        Args:
          key: decides the noise; the same key draws the same again.
          params: the cell's own, to which the noise adds constant rows of W: gradients reach those that there were.
          xs: (*batch, T, D), or (*batch, D) for one step.
          sigma: a number, or (H,); the standard deviation of a unit that does nothing but leak, as far as dt is small
            beside tau.

        Returns:
          (parameters for D + H features, inputs (..., D + H)), for `unroll` or `project`.

        Example:
          >>> import jax, jax.numpy as jnp, rnncore
          >>> cell = rnncore.Leaky(4, tau=10.0)
          >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
          >>> carry, ys = rnncore.unroll(cell, *cell.with_noise(jax.random.key(1), params, xs, 0.1))
          >>> ys.shape, cell.with_noise(jax.random.key(1), params, xs[:, 0], 0.1)[1].shape
          ((2, 5, 4), (2, 7))

        Source: Yang et al. (2019), doi:10.1038/s41593-018-0310-2, whose noise, too, is inside of phi.
        """
        tau: Any = jnp.exp(params.units.log_tau) if self.units else self.tau  # type: ignore[attr-defined]
        scale = jnp.broadcast_to(sigma * jnp.sqrt(2 * tau / self.dt), (self.hidden_size,))
        kernel = params.input_kernel
        rows = jnp.diag(scale.astype(kernel.dtype))[:, None]
        drawn = jax.random.normal(key, (*jnp.shape(xs)[:-1], self.hidden_size), jnp.result_type(xs))
        return params._replace(input_kernel=jnp.concatenate([kernel, rows])), jnp.concatenate([xs, drawn], -1)

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        alpha = self.dt * jnp.exp(-p.log_tau) if self.units else self.dt / self.tau  # type: ignore[operator]
        driven = self.activation_fn(z.h + r.h)
        return self.Carry(carry.h + alpha * (driven - carry.h)), self.Gates(driven)
