"""Lines through a retention curve: exponential or power law, and the choice between them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

MODELS = ("exponential", "power")
PARAMETERS = 3
"""Of either model: rate, offset and the variance of the residuals."""


class LineFit(NamedTuple):
    """A least-squares line through ln R.

    exponential: ln R = offset - rate k,   power: ln R = offset - rate ln(k + 1)

    Fields:
      model: "exponential" or "power".
      rate: lambda, per step, or the exponent p; negative for a gradient that grows.
      rate_error: standard error of the rate, assuming independent residuals.  Those of one curve are correlated, so
        it is too small; publish the spread over seeds or texts instead.
      offset: a; exp(a) is the value of the line at lag 0.
      offset_error: standard error of the offset.
      r_squared: the fraction of the variance of ln R explained by the line; 1 for a constant curve.
      aic: N ln(RSS / N) + 6 for N lags; the model with the lower one is better.
      window: first and last lag of the fit.
      points: N, the number of lags in it.

    Example:
      >>> from rnncore.analysis.retention.fits import fit_line
      >>> line = fit_line("exponential", [1, 2, 3, 4], [-0.5, -1.0, -1.5, -2.0], (1, 4))
      >>> round(line.rate, 6), line.log_retention([10]).round(6).tolist()
      (0.5, [-5.0])
    """

    model: str
    rate: float
    rate_error: float
    offset: float
    offset_error: float
    r_squared: float
    aic: float
    window: tuple[int, int]
    points: int

    def log_retention(self, lags: Any) -> np.ndarray:
        """ln R by the line at the lags, (L,)."""
        return self.offset - self.rate * _abscissa(self.model, lags)


class CurveFit(NamedTuple):
    """The result of `RetentionCurve.fit`.

    Fields:
      model: the requested model, or with "auto" the one with the lower AIC (the exponential if they are equal).
      exponential, power: both lines.
      half_life: of the chosen model: ln 2 / rate for the exponential, inf if it does not decay; for the power law,
        which has none, the lag at which the curve itself first falls to 1/2, inf if it never does.
    """

    model: str
    exponential: LineFit
    power: LineFit
    half_life: float

    @property
    def chosen(self) -> LineFit:
        """The line of the model."""
        return self.exponential if self.model == "exponential" else self.power

    def to_dict(self) -> dict[str, Any]:
        """All fields for JSON; None for an infinite half-life."""
        lines = {line.model: {**line._asdict(), "window": list(line.window)} for line in (self.exponential, self.power)}
        half_life = self.half_life if math.isfinite(self.half_life) else None
        return {"model": self.model, "half_life": half_life, **lines}


def choose(model: str, exponential: LineFit, power: LineFit) -> str:
    """The requested model, or with "auto" the better one."""
    if model != "auto":
        return model
    return "power" if power.aic < exponential.aic else "exponential"


def fit_line(model: str, lags: Any, logs: Any, window: tuple[int, int], eps: float = 2.0**-52) -> LineFit:
    """A least-squares fit of one model to at least 3 lags.

    Args:
      model: "exponential" or "power".
      lags, logs: (N,), ln R by lag.
      window: recorded in the result.
      eps: relative rounding of the logs: smaller residuals do not count in the AIC.
    """
    x, y = _abscissa(model, lags), np.asarray(logs, np.float64)
    slope, offset, missed, total = least_squares(x, y)
    count = len(x)
    spread = np.sum((x - x.mean()) ** 2)
    variance = missed / (count - 2)
    floor = count * (eps * max(1.0, float(np.abs(y).max()))) ** 2
    return LineFit(
        model=model,
        rate=float(-slope),
        rate_error=float(np.sqrt(variance / spread)),
        offset=float(offset - slope * x.mean()),
        offset_error=float(np.sqrt(variance * (1 / count + x.mean() ** 2 / spread))),
        r_squared=float(1 - missed / total) if total else 1.0,
        aic=float(count * np.log(max(missed, floor) / count) + 2 * PARAMETERS),
        window=window,
        points=count,
    )


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """(slope, value at the mean of x, residual sum of squares, total sum of squares)."""
    slope, offset = np.polyfit(x - x.mean(), y, 1)
    missed = np.sum((y - offset - slope * (x - x.mean())) ** 2)
    return slope, offset, missed, np.sum((y - y.mean()) ** 2)


def inside(call: str, lags: Any, logs: Any, window: Any, least: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The part of a curve inside a window, and the window: by default all but the first fifth of the lags.

    Raises:
      ValueError: not a window; fewer lags in it than the line needs; a retention of 0.
    """
    lags, logs = np.asarray(lags), np.asarray(logs, np.float64)
    if window is None:
        window = (int(lags[0] + math.ceil(0.2 * (lags[-1] - lags[0]))), int(lags[-1]))
    call = f"{call}(window={window})"
    if np.shape(window) != (2,):
        raise ValueError(f"`{call}`: expected the first and the last lag of the fit.")
    chosen = (lags >= window[0]) & (lags <= window[1])
    if chosen.sum() < least:
        raise ValueError(
            f"`{call}`: {chosen.sum()} of the lags {lags[0]} to {lags[-1]} lie in it and a line needs {least}; "
            "ask for more lags or a wider window."
        )
    wrong = chosen & ~np.isfinite(logs)
    if np.any(wrong):
        why = "retention of some sequence is exactly 0, so no line fits its logarithm"
        if not logs[wrong][0] < 0:
            why = "mean is over a sequence that is not as long"
        raise ValueError(f"`{call}`: at lag {lags[wrong][0]} the {why}; pass a window that ends before it.")
    return lags[chosen].astype(np.float64), logs[chosen], (int(window[0]), int(window[1]))


def _abscissa(model: str, lags: Any) -> np.ndarray:
    x = np.asarray(lags, np.float64)
    return x if model == "exponential" else np.log1p(x)
