"""Numbers that summarise a Lyapunov spectrum: the dimension of the attractor, the entropy rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.dynamics.lyapunov_result import LyapunovResult


def kaplan_yorke_dimension(exponents: LyapunovResult | Array) -> Array:
    """The Kaplan-Yorke dimension, at which a volume neither grows nor shrinks: conjectured to be that of the attractor.

    D = j + (lambda_1 + ... + lambda_j) / |lambda_{j+1}|,   j the largest with lambda_1 + ... + lambda_j >= 0

    Args:
      exponents: a `LyapunovResult`, or (*batch, k) numbers, the whole spectrum in any order.

    Returns:
      (*batch).  0 if all exponents are negative, n if their sum is not.  A lambda_{j+1} of -inf adds nothing.

    Raises:
      ValueError: NaN; a result of k < n exponents whose sum is not negative, which does not determine D.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import analysis
      >>> round(float(analysis.kaplan_yorke_dimension(jnp.array([0.9, 0.0, -14.5]))), 4)
      2.0621

    Source: Kaplan and Yorke (1979).
    """
    values, n = _values("kaplan_yorke_dimension", exponents)
    values = -jnp.sort(-values, -1)
    k = values.shape[-1]
    sums = jnp.cumsum(values, -1)
    j = jnp.sum(jnp.cumsum(sums < 0, -1) == 0, -1)
    if k < n and not isinstance(j, jax.core.Tracer) and np.any(np.asarray(j) == k):
        raise ValueError(
            f"`kaplan_yorke_dimension` of {k} of n = {n} exponents: their sum is not negative, so the dimension is "
            f"above {k}; compute more of them."
        )
    before = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums], -1)
    total = jnp.take_along_axis(before, j[..., None], -1)[..., 0]
    after = jnp.take_along_axis(values, jnp.minimum(j, k - 1)[..., None], -1)[..., 0]
    part = jnp.where(j < k, total / jnp.where(j < k, jnp.abs(after), 1.0), 0.0)
    return j + part


def ks_entropy(exponents: LyapunovResult | Array) -> Array:
    """The sum of the positive exponents, an upper bound on the Kolmogorov-Sinai entropy in nats per step.

    h = sum over lambda_i > 0 of lambda_i

    Args:
      exponents: a `LyapunovResult` or (*batch, k) numbers.  If k < n, the last should be negative, or positive
        ones may be missing.

    Returns:
      (*batch).

    Raises:
      ValueError: NaN; a result of k < n exponents that are all positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import analysis
      >>> float(analysis.ks_entropy(jnp.array([0.5, 0.25, -jnp.inf])))
      0.75

    Source: Ruelle (1978) for the bound, Pesin (1977) for when it is an equality.
    """
    values, n = _values("ks_entropy", exponents)
    positive = jnp.all(values > 0, -1)
    if values.shape[-1] < n and not isinstance(positive, jax.core.Tracer) and np.any(np.asarray(positive)):
        raise ValueError(
            f"`ks_entropy` of {values.shape[-1]} of n = {n} exponents: all are positive, so others may be too; "
            "compute more of them."
        )
    return jnp.sum(jnp.maximum(values, 0.0), -1)


def _values(call: str, exponents: Any) -> tuple[Array, int]:
    """(the exponents (*batch, k), n)."""
    if isinstance(exponents, LyapunovResult):
        return exponents.exponents, exponents.n
    values = jnp.asarray(exponents)
    if values.ndim < 1 or not values.shape[-1] or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"`{call}(<{values.dtype} {values.shape}>)`: expected floating point (*batch, k).")
    if not isinstance(values, jax.core.Tracer) and np.any(np.isnan(np.asarray(values))):
        raise ValueError(f"`{call}(<{values.dtype} {values.shape}>)`: NaN; expected numbers or -inf.")
    return values, values.shape[-1]
