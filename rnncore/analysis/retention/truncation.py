"""How far to truncate backpropagation through time, from the measured decay of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from rnncore.analysis.gradients.over_time import GradientsOverTime
from rnncore.analysis.retention.curve import RetentionCurve
from rnncore.analysis.run._shown import shown


class Truncation(NamedTuple):
    """The result of `choose_truncation`.

    Fields:
      steps: K, the smallest number of steps from which on the predicted relative bias is at most the requested one.
      bias: the predicted bias at K.
      predicted: (L,), the predicted bias at K = 1 .. L, with L the last lag of a curve, or T / 2 for gradients.
      decay: beta, the factor per step at which the tail beyond a curve continues; 0 if there is none.
      error: (L,), the standard error of ln predicted over the batches; the bias is known within a factor of about
        exp(2 error).  None for a curve or a single batch.
    """

    steps: int
    bias: float
    predicted: np.ndarray
    decay: float
    error: np.ndarray | None = None

    def __repr__(self) -> str:
        return shown(self)

    def __index__(self) -> int:
        return self.steps


def choose_truncation(
    source: RetentionCurve | GradientsOverTime | Sequence[GradientsOverTime], bias: float = 0.1
) -> Truncation:
    """The number of steps to backpropagate through for a given relative bias of the gradient.

    bias(K) = ||sum_{k >= K} g_k|| / ||sum_k g_k||,   dL/dtheta = sum_k g_k,   g_k = the part of step T - k
    from a curve:  sum_{k >= K} R_k / sum_k R_k,   R_k = E ||dl_T/ds_{T-k}||

    From gradients over time the terms add up as vectors, so this is exactly the bias for that batch, relative to the
    gradient over all of its T steps; for several batches it is the geometric mean, the bias of a typical one.  From a
    curve norms of states take the place of those of the parameters' gradient, as in the source, and beyond the last
    lag they decay by a factor beta per step, fitted to the second half: accurate to a factor of about 2 for a network
    that forgets evenly, of 5 and more for others.

    Args:
      source: `gradients_over_time` of a loss at the last step, or a list of them; or a curve of kind "adjoint" at
        lags 0, 1, 2, ...
      bias: the largest relative bias to accept.

    Returns:
      `Truncation`, which can be used as an integer, its number of steps.

    Raises:
      ValueError: gradients with `norms`, or of fewer than 10 steps; lags other than 0, 1, 2, ...; a bias outside 0 to
        1; a gradient that does not decay, or is 0; a bias that no K within the source reaches.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore.analysis import RetentionCurve, choose_truncation
      >>> lags = jnp.arange(51)
      >>> curve = RetentionCurve(lags, lags * jnp.log(0.9), "adjoint", "state", "end", "", 1, "float32")
      >>> found = choose_truncation(curve, bias=0.1)  # 0.9^K <= 0.1
      >>> found.steps, round(found.bias, 3)
      (22, 0.098)

    Source: Aicher, Foti and Fox (2019), arXiv:1905.07473, whose rule is the one for curves.
    """
    call = f"choose_truncation(bias={bias!r})"
    if not 0 < bias < 1:
        raise ValueError(f"`{call}`: expected more than 0 and less than 1.")
    if isinstance(source, RetentionCurve):
        (predicted, beta), error = _of_curve(call, source), None
    else:
        (predicted, error), beta = _of_gradients(call, source), 0.0
    enough = np.flatnonzero(np.maximum.accumulate(predicted[::-1])[::-1] <= bias)
    if not len(enough):
        raise ValueError(
            f"`{call}`: the predicted bias is still {predicted[-1]:.3g} after {len(predicted)} steps, the "
            "most that this source covers; measure over more steps, or allow a larger bias."
        )
    return Truncation(int(enough[0]) + 1, float(predicted[enough[0]]), predicted, beta, error)


def _of_curve(call: str, curve: RetentionCurve) -> tuple[np.ndarray, float]:
    """(share of the terms from lag K on for K = 1 .. L, factor of the tail)."""
    lags = np.asarray(curve.lags)
    if len(lags) < 10 or not np.array_equal(lags, np.arange(len(lags))):
        raise ValueError(f"`{call}`: expected a curve at lags 0, 1, 2, ..., at least 10 of them.")
    logs = np.asarray(curve.log_mean(), np.float64)
    left, tail = np.exp(logs), logs[len(logs) // 2 :]
    if not np.all(np.isfinite(tail)):
        beta, beyond = 0.0, 0.0
    else:
        beta = math.exp(np.polyfit(np.arange(len(tail)), tail, 1)[0])
        if beta >= 1:
            raise ValueError(
                f"`{call}`: over the second half of the curve the gradient grows by {beta:.4g} per step, so "
                "the bias of a truncation has no bound; measure over more steps."
            )
        beyond = left[-1] * beta / (1 - beta)
    cut = np.cumsum(left[::-1])[::-1] + beyond
    return cut[1:] / cut[0], float(beta)


def _of_gradients(
    call: str, source: GradientsOverTime | Sequence[GradientsOverTime]
) -> tuple[np.ndarray, np.ndarray | None]:
    """(the bias for K = 1 .. T / 2, geometric mean over batches; standard error of its logarithm).

    A few sequences with long memories dominate the mean of squares, which differs between samples by factors of 2.
    """
    batches = [source] if isinstance(source, GradientsOverTime) else list(source)
    steps = {batch.inputs.shape[-2] for batch in batches}
    if any(batch.norms for batch in batches) or len(steps) != 1 or min(steps) < 10:
        raise ValueError(
            f"`{call}`: expected a curve, or what `gradients_over_time(..., norms=False)` returns, with at least 10 "
            f"steps, the same number for every batch; got {len(batches)} of {sorted(steps)} steps."
        )
    squares = np.zeros((len(batches), min(steps)))
    for row, batch in zip(squares, batches, strict=True):
        for leaf in jax.tree.leaves(batch.parameters):
            sums = np.cumsum(np.asarray(leaf, np.float64).reshape(len(leaf), -1), 0)
            row += np.sum(sums[::-1] ** 2, -1)
    squares = squares[squares[:, 0] > 0]
    if not len(squares):
        raise ValueError(f"`{call}`: the gradient of the parameters is 0; choose a loss that depends on them.")
    biases = np.sqrt(squares[:, 1 : squares.shape[1] // 2 + 1] / squares[:, :1])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(biases)
        typical = np.exp(logs.mean(0))
        error = logs.std(0, ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else None
    # A batch with a bias of 0 must not hide the others.
    return np.where(typical > 0, typical, np.median(biases, 0)), error
