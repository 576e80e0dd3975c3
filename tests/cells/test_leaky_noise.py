"""Noise of the leaky network: reproducible by its key, differentiable, and of a size that does not depend on dt."""

from __future__ import annotations

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore

CELL = rnncore.Leaky(3, dt=0.5, tau=(2.0, 5.0, 10.0))
XS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 2)))
PARAMS = jax.tree.map(lambda a: a + 0.1, CELL.init(jax.random.key(0), 2, jnp.float64))
SIGMA = jnp.array([0.1, 0.2, 0.3])


def test_a_run_is_the_equation_with_noise_inside_of_phi():
    """In NumPy, from the draws that the inputs hold."""
    params, xs = CELL.with_noise(jax.random.key(1), PARAMS, XS, SIGMA)
    assert xs.shape == (2, 6, 5) and (xs[..., :2] == XS).all()
    w, u = (np.asarray(a)[:, 0] for a in (PARAMS.input_kernel, PARAMS.recurrent_kernel))
    b = np.asarray(PARAMS.bias)[0]
    tau = np.exp(np.asarray(PARAMS.units.log_tau))
    h, want = np.zeros((2, 3)), []
    for t in range(6):
        noise = np.asarray(SIGMA) * np.sqrt(2 * tau / 0.5) * np.asarray(xs[:, t, 2:])
        h = h + 0.5 / tau * (np.tanh(XS[:, t] @ w + h @ u + b + noise) - h)
        want.append(h)
    cases.assert_close(rnncore.unroll(CELL, params, xs)[1], np.stack(want, 1), cases.FLOAT64)


def test_keys_decide_and_gradients_reach_the_parameters():
    def loss(params, key):
        noisy, xs = CELL.with_noise(key, params, XS, SIGMA)
        return jnp.sum(rnncore.unroll(CELL, noisy, xs, backend="autodiff")[1] ** 2)

    same, again, other = (jax.grad(loss)(PARAMS, jax.random.key(n)) for n in (1, 1, 2))
    cases.assert_close(same, again, 0.0)
    assert same.input_kernel.shape == PARAMS.input_kernel.shape
    assert all(jnp.abs(a - b).max() > 1e-6 for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(other), strict=True))
    # tau is inside of alpha and of the noise.
    small = 1e-6
    moved = PARAMS._replace(units=jax.tree.map(lambda a: a.at[1].add(small), PARAMS.units))
    slope = (loss(moved, jax.random.key(1)) - loss(PARAMS, jax.random.key(1))) / small
    assert float(same.units.log_tau[1]) == pytest.approx(float(slope), rel=1e-4)


def test_steps_in_a_scan_draw_by_their_own_keys():
    keys = jax.random.split(jax.random.key(3), 6)

    def step(carry, now):
        key, x = now
        noisy, x = CELL.with_noise(key, PARAMS, x, 0.1)
        return CELL.step(noisy, carry, CELL.project(noisy, x))

    start = CELL.initial_carry((2,), jnp.float64)
    _, ys = jax.lax.scan(step, start, (keys, jnp.moveaxis(XS, 1, 0)))
    drawn = jnp.stack([jax.random.normal(key, (2, 3), jnp.float64) for key in keys], 1)
    noisy, _ = CELL.with_noise(keys[0], PARAMS, XS, 0.1)
    want = rnncore.unroll(CELL, noisy, jnp.concatenate([XS, drawn], -1))[1]
    cases.assert_close(jnp.moveaxis(ys, 0, 1), want, cases.FLOAT64)


@pytest.mark.parametrize("dt", [0.05, 0.2])
def test_a_unit_that_only_leaks_has_this_deviation_at_any_dt(dt: float):
    """The variance of h_t = (1 - a) h_{t-1} + sigma sqrt(2 a) xi is sigma^2 / (1 - a/2), a = dt / tau."""
    cell = rnncore.Leaky(4, dt=dt, tau=1.0, activation_fn=lambda a: a)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 1, jnp.float64))
    xs = jnp.zeros((500, round(12 / dt), 1))
    _, ys = rnncore.unroll(cell, *cell.with_noise(jax.random.key(5), params, xs, 0.3))
    late = np.asarray(ys[:, -1])
    assert late.std() == pytest.approx(0.3 / np.sqrt(1 - dt / 2), rel=0.05)  # of 2000 numbers: 1.6 % is one deviation
