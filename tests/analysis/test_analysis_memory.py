"""The curse of memory: what a long memory does to the sensitivity of the state, in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "power", "sensitivity"), [(0.9, 5.263, 263.887), (0.99, 50.25, 251262.6)])
def test_curse_of_memory(rate: float, power: float, sensitivity: float):
    """h = sum_k l^k x_{t-k} over white inputs: E h^2 = 1/(1-l^2), E (dh/dl)^2 = (1+l^2)/(1-l^2)^3."""
    assert power == pytest.approx(1 / (1 - rate**2), rel=1e-3)
    assert sensitivity == pytest.approx((1 + rate**2) / (1 - rate**2) ** 3, rel=1e-3)
    cell = rnncore.Elman(1, activation_fn=lambda a: a, recurrence=rnncore.Diagonal())
    steps, batch = int(25 / (1 - rate)), 4000
    xs = jax.random.normal(jax.random.key(2), (batch, steps, 1), jnp.float64)

    def last(rate: jax.Array) -> jax.Array:
        params = rnncore.CellParams(jnp.ones((1, 1, 1)), rate.reshape(1, 1), None, None, ())
        return rnncore.unroll(cell, params, xs)[0].h[:, 0]

    # Forward mode: one tangent through the whole run.
    h, slope = jax.jit(lambda r: jax.jvp(last, (r,), (jnp.ones_like(r),)))(jnp.asarray(rate))
    for values, want in ((h, power), (slope, sensitivity)):
        squares = np.asarray(values) ** 2
        assert abs(squares.mean() - want) < 4 * squares.std() / np.sqrt(batch)
