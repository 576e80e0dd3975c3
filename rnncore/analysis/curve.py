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
    data_fields=("lags", "log_retention"),
    meta_fields=("kind", "path", "anchor", "norm", "n", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class RetentionCurve:
    """How much of a gradient is left at every lag; a pytree that says what it holds.

    Fields:
      lags: (L,) integers, increasing.
      log_retention: (*batch, L), natural logarithm; -inf where nothing is left.
      kind, path, anchor: as asked of `retention_curve`.
      norm: what the kind means, in words.
      n: number of entries of the state that is measured.
      dtype: of the computation.
    """

    lags: Array
    log_retention: Array
    kind: str
    path: str
    anchor: str
    norm: str
    n: int
    dtype: str

    @property
    def log10(self) -> Array:
        """log10 of the retention, (*batch, L)."""
        return self.log_retention / math.log(10.0)

    def mean_log(self) -> Array:
        """Mean over the batch of ln retention, (L,): the typical sequence."""
        return jnp.mean(self._examples(), 0)

    def log_mean(self) -> Array:
        """ln of the mean over the batch of the retention, (L,): ruled by the few largest."""
        examples = self._examples()
        return jax.nn.logsumexp(examples, 0) - math.log(examples.shape[0])

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
        lags, logs = np.asarray(self.lags), np.asarray(self.mean_log(), np.float64)
        if window is None:
            window = (int(lags[0] + math.ceil(0.2 * (lags[-1] - lags[0]))), int(lags[-1]))
        inside = (lags >= window[0]) & (lags <= window[1])
        lags, logs = lags[inside].astype(np.float64), logs[inside]
        if len(lags) < 2:
            raise ValueError(
                f"`decay_rate(window={window})`: {len(lags)} of the lags {self._lag_range()} lie in it "
                "and a line needs 2; ask for more lags or a wider window."
            )
        if not np.all(np.isfinite(logs)):
            first = int(lags[~np.isfinite(logs)][0])
            raise ValueError(
                f"`decay_rate(window={window})`: at lag {first} the retention of some sequence is exactly 0, so no "
                "exponential fits; pass a window that ends before it."
            )
        slope, offset = np.polyfit(lags - lags.mean(), logs, 1)
        missed = np.sum((logs - offset - slope * (lags - lags.mean())) ** 2)
        total = np.sum((logs - logs.mean()) ** 2)
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
        rate = self.decay_rate(window).rate
        return HalfLife(math.log(2.0) / rate if rate > 0 else math.inf, self._crossing())

    def to_dict(self, window: tuple[int, int] | None = None) -> dict[str, Any]:
        """The curve without its single sequences, for JSON: no number in it is NaN or infinite.

        Args:
          window: of the fit, as in `decay_rate`.

        Returns:
          The static fields, the number of `sequences`, `lags`, `mean_log10` and `log10_of_mean` (None where
          nothing at all is left), `decay_rate` and `half_life` (None where no exponential fits or none is reached).
        """
        rate, half_life = None, None
        try:
            rate, half_life = self.decay_rate(window)._asdict(), self.half_life(window)._asdict()
        except ValueError:  # a curve of two lags, or one that reaches 0, has no rate: that is its result
            half_life = {"exponential": math.inf, "crossing": self._crossing()}
        return {
            "kind": self.kind,
            "path": self.path,
            "anchor": self.anchor,
            "norm": self.norm,
            "n": self.n,
            "dtype": self.dtype,
            "sequences": self._examples().shape[0],
            "lags": [int(lag) for lag in np.asarray(self.lags)],
            "mean_log10": _finite(np.asarray(self.mean_log(), np.float64) / math.log(10.0)),
            "log10_of_mean": _finite(np.asarray(self.log_mean(), np.float64) / math.log(10.0)),
            "decay_rate": rate and {**rate, "window": list(rate["window"])},
            "half_life": dict(zip(half_life, _finite(list(half_life.values())), strict=True)),
        }

    def _examples(self) -> Array:
        """Batch axes merged: (B, L)."""
        return self.log_retention.reshape(-1, self.log_retention.shape[-1])

    def _lag_range(self) -> str:
        lags = np.asarray(self.lags)
        return f"{lags[0]} to {lags[-1]}"

    def _crossing(self) -> float:
        """First lag at which the curve falls to ln 1/2; at lag 0 everything is there."""
        lags = np.concatenate([[0.0], np.asarray(self.lags, np.float64)])
        logs = np.concatenate([[0.0], np.asarray(self.mean_log(), np.float64)])
        below = np.flatnonzero(logs <= -math.log(2.0))
        if not len(below):
            return math.inf
        b = int(below[0])
        if not np.isfinite(logs[b]):
            return float(lags[b])
        part = (logs[b - 1] + math.log(2.0)) / (logs[b - 1] - logs[b])
        return float(lags[b - 1] + part * (lags[b] - lags[b - 1]))


def _finite(numbers: Any) -> list[float | None]:
    return [float(x) if math.isfinite(x) else None for x in numbers]
