"""Runs of random and of linear cells, and what all tests of the analysis compare by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore import analysis

EXACT = 1e-11
STEPS = 6
LSTMS = {
    "plain": rnncore.LSTM(4),
    "peepholes": rnncore.LSTM(4, peepholes=True, activation_fn=jax.nn.silu),
    "coupled-heads": rnncore.LSTM(4, coupled=True, recurrence=rnncore.Heads(2)),
    "both": rnncore.LSTM(4, peepholes=True, coupled=True),
}


def close(got, want, tolerance=EXACT):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@functools.cache
def run_of(cell, batch=(2,), steps=STEPS):
    """A trajectory of random parameters, inputs and initial carry."""
    rng = np.random.default_rng(0)

    def normal(leaf, scale=0.6):
        return jnp.asarray(rng.normal(0, scale, leaf.shape))

    params = jax.tree.map(normal, cell.init(jax.random.key(0), 3, jnp.float64))
    carry = jax.tree.map(normal, cell.initial_carry(batch, jnp.float64))
    return analysis.trajectory(cell, params, jnp.asarray(rng.normal(0, 1, (*batch, steps, 3))), carry)


def linear(matrix, steps, dtype=jnp.float64):
    """A trajectory of h_t = W h_{t-1}: every step Jacobian is W."""
    matrix = jnp.asarray(matrix, dtype)
    cell = rnncore.Elman(len(matrix), activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=matrix.T[:, None, :])
    return analysis.trajectory(cell, params, jnp.zeros((steps, 1), dtype))
