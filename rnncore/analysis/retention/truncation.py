"""How far to truncate backpropagation through time, from the measured decay of the gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from rnncore.analysis.retention.curve import RetentionCurve


class Truncation(NamedTuple):
    """What `choose_truncation` found.

    Fields:
      steps: K, the smallest number of steps with a predicted relative bias of at most the one asked for.
      bias: predicted at K.
      predicted: (L,) of every K = 1 .. L that the curve has lags for.
      decay: beta, the factor per step by which the tail beyond the curve goes on.
    """

    steps: int
    bias: float
    predicted: np.ndarray
    decay: float

    def __index__(self) -> int:
        return self.steps


def choose_truncation(curve: RetentionCurve, bias: float = 0.1) -> Truncation:
    """The number of steps after which to cut backpropagation, for a relative bias of the gradient.

    bias(K) = sum_{k >= K} R_k / sum_k R_k,   R_k = E ||dl_T/ds_{T-k}||,   beyond the curve R_k = R_L beta^(k-L)

    The parameters' gradient is a sum over lags; those from K on are cut off.  Their norms add up at most, as in the
    source, so the bias is predicted from above where contributions of different lags point in different directions.

    Args:
      curve: of kind "adjoint" at lags 0, 1, 2, ...: what is left of the gradient of one loss term.
      bias: the relative bias to stay below.

    Returns:
      `Truncation`, which counts as its number of steps.

    Raises:
      ValueError: lags that are not 0, 1, 2, ...; a bias outside 0 to 1; a gradient that does not decay; a bias that no
        K within the curve reaches.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore.analysis import RetentionCurve, choose_truncation
      >>> lags = jnp.arange(51)
      >>> curve = RetentionCurve(lags, lags * jnp.log(0.9), "adjoint", "state", "end", "", 1, "float32")
      >>> found = choose_truncation(curve, bias=0.1)  # 0.9^K <= 0.1
      >>> found.steps, round(found.bias, 3)
      (22, 0.098)

    Source: Aicher, Foti and Fox (2019), arXiv:1905.07473.
    """
    call = f"choose_truncation(bias={bias!r})"
    lags = np.asarray(curve.lags)
    if len(lags) < 10 or not np.array_equal(lags, np.arange(len(lags))):
        raise ValueError(f"`{call}`: expected a curve at lags 0, 1, 2, ..., at least 10 of them.")
    if not 0 < bias < 1:
        raise ValueError(f"`{call}`: expected more than 0 and less than 1.")
    logs = np.asarray(curve.log_mean(), np.float64)
    left = np.exp(logs)
    tail = logs[len(logs) // 2 :]
    if not np.all(np.isfinite(tail)):
        beta, beyond = 0.0, 0.0
    else:
        beta = math.exp(np.polyfit(np.arange(len(tail)), tail, 1)[0])
        if beta >= 1:
            raise ValueError(
                f"`{call}`: over the second half of the curve the gradient grows by {beta:.4g} a step, so no "
                "truncation has a bound on its bias; measure over more steps."
            )
        beyond = left[-1] * beta / (1 - beta)
    # What is cut off with K steps: all lags from K on.
    cut = np.cumsum(left[::-1])[::-1] + beyond
    predicted = cut[1:] / cut[0]
    enough = np.flatnonzero(predicted <= bias)
    if not len(enough):
        raise ValueError(
            f"`{call}`: with all {len(predicted)} steps of the curve the predicted bias is {predicted[-1]:.3g}; "
            "measure over more steps, or allow more."
        )
    return Truncation(int(enough[0]) + 1, float(predicted[enough[0]]), predicted, float(beta))
