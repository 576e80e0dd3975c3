"""Retention curves: the measurement at every lag, its rate of decay and its half-life."""

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
      rate: natural logarithm per step; negative for a gradient that grows.
      r_squared: the fraction of the variance of ln retention explained by the line; 1 for a constant curve.
      window: first and last lag of the fit.
    """

    rate: float
    r_squared: float
    window: tuple[int, int]


class HalfLife(NamedTuple):
    """Steps until half of the gradient is gone, by two definitions.

    Fields:
      exponential: ln 2 / rate of the fit; inf if it does not decay.
      crossing: the lag at which the curve itself first falls to 1/2, interpolated; inf if it never does.
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
    """How much of a gradient is left at every lag; a pytree that records what was measured.

    Fields:
      lags: (L,) integers, increasing.
      log_retention: (*batch, L), natural logarithm; -inf where nothing is left.  +inf, inside jit only, at lags
        above the length of a sequence.
      kind, path, anchor: as passed to `retention_curve`.
      norm: what the kind means, in words.
      n: the number of entries of the measured state.
      dtype: of the computation.
      without_gradient: booleans (*batch) of an adjoint curve: sequences whose gradient is exactly 0 already at lag 0.
        Their log_retention is -inf at every lag, and means leave them out.  None for other kinds.
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
        """Mean over the batch of ln retention, (L,): that of a typical sequence."""
        examples, kept = self._examples(), self._kept()
        if kept is None:
            return jnp.mean(examples, 0)
        total = jnp.sum(jnp.where(kept, examples, 0), 0) / jnp.maximum(jnp.sum(kept, dtype=examples.dtype), 1)
        return jnp.where(jnp.any(kept), total, -jnp.inf)

    def log_mean(self) -> Array:
        """ln of the mean retention over the batch, (L,): dominated by the few largest."""
        examples, kept = self._examples(), self._kept()
        if kept is None:
            return jax.nn.logsumexp(examples, 0) - math.log(examples.shape[0])
        count = jnp.maximum(jnp.sum(kept), 1).astype(examples.dtype)
        return jax.nn.logsumexp(jnp.where(kept, examples, -jnp.inf), 0) - jnp.log(count)

    def fit(
        self, model: str = "auto", window: tuple[int, int] | None = None, *, average: str = "mean_log"
    ) -> fits.CurveFit:
        """Fits an exponential and a power law, by least squares in the logarithm.

        exponential: ln R = a - lambda k,   power: ln R = a - p ln(k + 1)

        Units or gates with a single time scale give the first, a spread of time scales gives the second, which has
        no single rate.  Both have the same number of parameters.

        Args:
          model: "exponential", "power", or "auto" for the one with the lower AIC; both lines are always returned.
          window: first and last lag of the fit; None leaves out the first fifth of the lags, the transient of
            products of non-normal Jacobians.
          average: over the batch, "mean_log" or "log_mean".

        Returns:
          `CurveFit`.

        Raises:
          ValueError: unknown options; a window with fewer than three lags, or with a retention of exactly 0.

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
          window: first and last lag of the fit, as in `fit`.

        Returns:
          `DecayRate`.

        Raises:
          ValueError: a window with fewer than two lags, or with a retention of exactly 0.

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
        """Steps until half of the gradient is gone, by the fit and by the mean curve itself.

        Args:
          window: of the fit, as in `decay_rate`.

        Returns:
          `HalfLife`.

        Raises:
          ValueError: as `decay_rate` does.
        """
        return HalfLife(_half_life(self.decay_rate(window).rate), self.crossing(self.mean_log()))

    def to_dict(self, window: tuple[int, int] | None = None) -> dict[str, Any]:
        """A summary for JSON, averaged over sequences, in which no number is NaN or infinite.

        Args:
          window: of the fit, as in `decay_rate`.

        Returns:
          A dict of the static fields, the number of `sequences`, `without_gradient` (indices into the batch, its axes
          merged), `lags`, `mean_log10` and `log10_of_mean` (None where nothing is left), `decay_rate` and `half_life`
          (None if no exponential fits or half is never reached).
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
        """The sequences that means include, (B, 1); None for all."""
        return None if self.without_gradient is None else ~self.without_gradient.reshape(-1, 1)

    def crossing(self, mean: Any) -> float:
        """First lag at which ln retention (L,) falls to ln 1/2, interpolated from 0 at lag 0; inf if none."""
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
