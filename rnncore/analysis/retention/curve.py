"""Retention curves: what was measured at every lag, how fast it decays, when half is gone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.retention import fits

AVERAGES = ("mean_log", "log_mean")


class DecayRate(NamedTuple):
    """Exponential fit: retention ~ exp(-rate * lag).

    Fields:
      rate: natural logarithm per step; negative where the gradient grows.
      r_squared: part of the variance of ln retention that the line explains; 1 for a constant curve.
      window: first and last lag of the fit.
    """

    rate: float
    r_squared: float
    window: tuple[int, int]


class HalfLife(NamedTuple):
    """Steps until half of the gradient is gone, in two readings.

    Fields:
      exponential: ln 2 / rate of the fit; inf where it does not decay.
      crossing: the lag at which the curve itself first falls to 1/2, interpolated; inf if it does not.
    """

    exponential: float
    crossing: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lags", "log_retention", "without_gradient"),
    meta_fields=("kind", "path", "anchor", "norm", "n", "dtype"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class RetentionCurve:
    """How much of a gradient is left at every lag; a pytree that says what it holds.

    Fields:
      lags: (L,) integers, increasing.
      log_retention: (*batch, L), natural logarithm; -inf where nothing is left.  +inf, inside jit only, at lags
        that the length of a sequence does not have.
      kind, path, anchor: as asked of `retention_curve`.
      norm: what the kind means, in words.
      n: number of entries of the state that is measured.
      dtype: of the computation.
      without_gradient: booleans (*batch) of an adjoint curve: sequences whose gradient is exactly 0 at lag 0 already.
        They retain no share of anything; their log_retention is -inf at every lag, and the means leave
        them out.  None where no adjoint was asked for.
    """

    lags: Array
    log_retention: Array
    kind: str
    path: str
    anchor: str
    norm: str
    n: int
    dtype: str
    without_gradient: Array | None = None

    def __repr__(self) -> str:
        count = math.prod(self.log_retention.shape[:-1])
        if isinstance(self.log_retention, jax.core.Tracer):
            return f"RetentionCurve({self.kind}, path {self.path}, {count} sequences, traced)"
        last = float(self.mean_log()[-1]) / math.log(10.0)
        return (
            f"RetentionCurve({self.kind}, path {self.path}, {count} sequences, lags {self.lags[0]} to {self.lags[-1]}: "
            f"10^{last:.2f} left at the last, half gone after {self.crossing(self.mean_log()):.3g} steps)"
        )

    @property
    def log10(self) -> Array:
        """log10 of the retention, (*batch, L)."""
        return self.log_retention / math.log(10.0)

    def mean_log(self) -> Array:
        """Mean over the batch of ln retention, (L,): the typical sequence."""
        examples, kept = self._examples(), self._kept()
        if kept is None:
            return jnp.mean(examples, 0)
        total = jnp.sum(jnp.where(kept, examples, 0), 0) / jnp.maximum(jnp.sum(kept, dtype=examples.dtype), 1)
        return jnp.where(jnp.any(kept), total, -jnp.inf)

    def log_mean(self) -> Array:
        """ln of the mean over the batch of the retention, (L,): ruled by the few largest."""
        examples, kept = self._examples(), self._kept()
        if kept is None:
            return jax.nn.logsumexp(examples, 0) - math.log(examples.shape[0])
        count = jnp.maximum(jnp.sum(kept), 1).astype(examples.dtype)
        return jax.nn.logsumexp(jnp.where(kept, examples, -jnp.inf), 0) - jnp.log(count)

    def fit(
        self, model: str = "auto", window: tuple[int, int] | None = None, *, average: str = "mean_log"
    ) -> fits.CurveFit:
        """Exponential or power law, by least squares of the logarithm.

        exponential: ln R = a - lambda k,   power: ln R = a - p ln(k + 1)

        Units or gates with one timescale give the first, a spread of timescales gives the second, whose rate at a
        single lag is then a property of the lag.  Both have the same number of parameters.

        Args:
          model: "exponential", "power", or "auto" for that of the lower AIC; both lines are returned always.
          window: first and last lag of the fit; None leaves out the first fifth of the lags, where the
            products of Jacobians that are not normal have their transient.
          average: over the batch, "mean_log" or "log_mean".

        Returns:
          `CurveFit`.

        Raises:
          ValueError: unknown options; fewer than three lags in the window, or one with a retention of
            exactly 0 in it.

        Example:
          >>> import jax.numpy as jnp
          >>> from rnncore.analysis import RetentionCurve
          >>> lags = jnp.arange(101)
          >>> logs = -jnp.log(lags + 1)  # the mean of f^k over forget gates that are uniform from 0 to 1
          >>> fit = RetentionCurve(lags, logs, "rms", "direct", "end", "", 1, "float32").fit()
          >>> fit.model, round(fit.power.rate, 4)
          ('power', 1.0)
        """
        if model not in (*fits.MODELS, "auto"):
            raise ValueError(f"`fit(model={model!r})`: expected 'exponential', 'power' or 'auto'.")
        if average not in AVERAGES:
            raise ValueError(f"`fit(average={average!r})`: expected 'mean_log' or 'log_mean'.")
        mean = self.mean_log() if average == "mean_log" else self.log_mean()
        lags, logs, window = fits.inside("fit", self.lags, mean, window, 3)
        eps = float(jnp.finfo(self.log_retention.dtype).eps)
        exponential, power = (fits.fit_line(name, lags, logs, window, eps) for name in fits.MODELS)
        chosen = fits.choose(model, exponential, power)
        half_life = _half_life(exponential.rate) if chosen == "exponential" else self.crossing(mean)
        return fits.CurveFit(chosen, exponential, power, half_life)

    def decay_rate(self, window: tuple[int, int] | None = None) -> DecayRate:
        """Least squares of the mean ln retention against the lag; the rate is minus the slope.

        Args:
          window: first and last lag of the fit; None leaves out the first fifth of the lags, where the
            products of Jacobians that are not normal have their transient.

        Returns:
          `DecayRate`.

        Raises:
          ValueError: fewer than two lags in the window, or one with a retention of exactly 0 in it.

        Example:
          >>> import jax.numpy as jnp
          >>> from rnncore.analysis import RetentionCurve
          >>> lags = jnp.arange(11)
          >>> curve = RetentionCurve(lags, -0.1 * lags, "rms", "state", "end", "", 1, "float32")
          >>> round(curve.decay_rate().rate, 5), round(curve.half_life().exponential, 3)
          (0.1, 6.931)
        """
        lags, logs, window = fits.inside("decay_rate", self.lags, self.mean_log(), window, 2)
        slope, _, missed, total = fits.least_squares(lags, logs)
        return DecayRate(float(-slope), float(1 - missed / total) if total else 1.0, window)

    def half_life(self, window: tuple[int, int] | None = None) -> HalfLife:
        """Steps until half of the gradient is gone, by the fit and by the curve of mean ln retention.

        Args:
          window: of the fit, as in `decay_rate`.

        Returns:
          `HalfLife`.

        Raises:
          ValueError: as `decay_rate` does.
        """
        return HalfLife(_half_life(self.decay_rate(window).rate), self.crossing(self.mean_log()))

    def to_dict(self, window: tuple[int, int] | None = None) -> dict[str, Any]:
        """The curve without its single sequences, for JSON: no number in it is NaN or infinite.

        Args:
          window: of the fit, as in `decay_rate`.

        Returns:
          The static fields, the number of `sequences`, those `without_gradient` (places in the batch, its axes merged),
          `lags`, `mean_log10` and `log10_of_mean` (None where nothing at all is left), `decay_rate` and
          `half_life` (None where no exponential fits or none is reached).
        """
        rate, half_life = None, None
        try:
            rate, half_life = self.decay_rate(window)._asdict(), self.half_life(window)._asdict()
        except ValueError:  # a curve of two lags, or one that reaches 0, has no rate: that is its result
            half_life = {"exponential": math.inf, "crossing": self.crossing(self.mean_log())}
        return {
            "kind": self.kind,
            "path": self.path,
            "anchor": self.anchor,
            "norm": self.norm,
            "n": self.n,
            "dtype": self.dtype,
            "sequences": self._examples().shape[0],
            "without_gradient": [] if (kept := self._kept()) is None else np.flatnonzero(~np.asarray(kept)).tolist(),
            "lags": [int(lag) for lag in np.asarray(self.lags)],
            "mean_log10": _finite(np.asarray(self.mean_log(), np.float64) / math.log(10.0)),
            "log10_of_mean": _finite(np.asarray(self.log_mean(), np.float64) / math.log(10.0)),
            "decay_rate": rate and {**rate, "window": list(rate["window"])},
            "half_life": dict(zip(half_life, _finite(list(half_life.values())), strict=True)),
        }

    def _examples(self) -> Array:
        """Batch axes merged: (B, L)."""
        return self.log_retention.reshape(-1, self.log_retention.shape[-1])

    def _kept(self) -> Array | None:
        """Sequences that the means are over, (B, 1); None for all."""
        return None if self.without_gradient is None else ~self.without_gradient.reshape(-1, 1)

    def crossing(self, mean: Any) -> float:
        """First lag at which ln retention (L,) falls to ln 1/2, interpolated; inf if none.  At lag 0 all is there."""
        lags = np.concatenate([[0.0], np.asarray(self.lags, np.float64)])
        logs = np.concatenate([[0.0], np.asarray(mean, np.float64)])
        below = np.flatnonzero(logs <= -math.log(2.0))
        if not len(below):
            return math.inf
        b = int(below[0])
        if not np.isfinite(logs[b]):
            return float(lags[b])
        part = (logs[b - 1] + math.log(2.0)) / (logs[b - 1] - logs[b])
        return float(lags[b - 1] + part * (lags[b] - lags[b - 1]))


def _half_life(rate: float) -> float:
    return math.log(2.0) / rate if rate > 0 else math.inf


def _finite(numbers: Any) -> list[float | None]:
    return [float(x) if math.isfinite(x) else None for x in numbers]
