"""Logarithms of the singular values of a matrix whose rows differ in size without limit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import nats

SWEEPS = 40
"""More than any well-conditioned matrix needs, for which ten are many."""
NOTHING = -(2**28)
"""The exponent of a row of zeros, below any other."""


def log_singular_values(rows: Array, exponents: Array) -> Array:
    """ln of the singular values of diag(2^exponents) rows, largest first; -inf for every row of zeros.

    Rows are rotated pairwise until all are orthogonal; then their lengths are the singular values.  Each row
    is kept as a direction, a length and an exponent, and a rotation needs only the ratio of two lengths, so
    nothing underflows and small values are as accurate as large ones.

    Args:
      rows: (n, n); well-conditioned but for rows of zeros.
      exponents: (n,) integers.

    Returns:
      (n,).
    """
    n = rows.shape[0]
    if n % 2:
        rows = jnp.pad(rows, ((0, 1), (0, 1)))
        exponents = jnp.pad(exponents, (0, 1))
    rounds = jnp.asarray(_rounds(len(rows)))
    tolerance = len(rows) * float(jnp.finfo(rows.dtype).eps)

    def sweep(state: Any) -> Any:
        now, _, count = state
        now, cosines = jax.lax.scan(_turn, now, rounds)
        return now, jnp.max(cosines), count + 1

    start = _normalise(rows, jnp.ones(len(rows), rows.dtype), exponents)
    going = (start, jnp.asarray(jnp.inf, rows.dtype), 0)
    (_, lengths, exponents), _, _ = jax.lax.while_loop(lambda s: (s[1] > tolerance) & (s[2] < SWEEPS), sweep, going)
    logs = jnp.where(exponents > NOTHING, jnp.log(lengths) + nats(exponents, lengths.dtype), -jnp.inf)
    return -jnp.sort(-logs)[:n]


def _turn(now: Any, pair: Array) -> Any:
    """Makes the rows of disjoint pairs orthogonal; returns the largest cosine before."""
    rows, lengths, exponents = now
    first, second = pair
    swap = (exponents[second] > exponents[first]) | (
        (exponents[second] == exponents[first]) & (lengths[second] > lengths[first])
    )
    # Of each pair u is the longer row; ratio is at most 1 and may underflow to 0.
    longer, shorter = jnp.where(swap, second, first), jnp.where(swap, first, second)
    u, v = rows[longer], rows[shorter]
    ratio = jnp.ldexp(lengths[shorter] / lengths[longer], jnp.maximum(exponents[shorter] - exponents[longer], -10_000))
    cosine = jnp.sum(u * v, -1)
    gap = 1 - ratio**2
    bottom = gap + jnp.sqrt(gap**2 + 4 * (ratio * cosine) ** 2)
    tangent = jnp.where(bottom > 0, 2 * cosine / jnp.where(bottom > 0, bottom, 1), 0.0)  # over the ratio
    scale = jax.lax.rsqrt(1 + (ratio * tangent) ** 2)
    u, v = (scale[:, None] * (u + (ratio**2 * tangent)[:, None] * v), scale[:, None] * (v - tangent[:, None] * u))
    both = jnp.concatenate([longer, shorter])
    new = _normalise(jnp.concatenate([u, v]), lengths[both], exponents[both])
    return jax.tree.map(lambda a, b: a.at[both].set(b), now, new), jnp.max(jnp.abs(cosine))


def _normalise(rows: Array, lengths: Array, exponents: Array) -> tuple[Array, Array, Array]:
    """(unit rows, lengths in [1/2, 1), exponents) of 2^exponents * lengths * rows."""
    norms = jnp.sqrt(jnp.sum(jnp.square(rows), -1))
    empty = (norms == 0) | (exponents <= NOTHING)
    lengths, powers = jnp.frexp(jnp.where(empty, 0.5, lengths * norms))
    rows = jnp.where(empty[:, None], 0.0, rows / jnp.where(empty, 1, norms)[:, None])
    return rows, lengths, jnp.where(empty, NOTHING, exponents + powers)


def _rounds(n: int) -> np.ndarray:
    """(n - 1, 2, n / 2): a tournament of an even number of rows, everyone against everyone."""
    circle = np.arange(n)
    rounds = []
    for _ in range(n - 1):
        rounds.append([circle[: n // 2], circle[n // 2 :][::-1]])
        circle = np.concatenate([circle[:1], np.roll(circle[1:], 1)])
    return np.asarray(rounds)
