"""Fixed points whose places are known, and the choice of a truncation."""

import functools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import close

import rnncore
from rnncore import analysis


def scalar(gain, phi=jnp.tanh):
    cell = rnncore.Elman(1, activation_fn=phi)
    return cell, cell.init(jax.random.key(0), 1, jnp.float64)._replace(recurrent_kernel=jnp.full((1, 1, 1), gain))


def test_the_three_points_of_a_bistable_unit():
    cell, params = scalar(2.0)
    found = analysis.fixed_points(cell, params, jnp.zeros(1), jnp.linspace(-1, 1, 9)[:, None])
    edge = 0.9575040240772687  # tanh(2 h) = h
    close(found.states.ravel(), [-edge, edge, 0], 1e-11)
    assert found.stable.tolist() == [True, True, False] and found.unstable_directions.tolist() == [0, 0, 1]
    close(found.eigenvalues.ravel().real, [2 * (1 - edge**2)] * 2 + [2.0], 1e-11)
    close(found.time_constants.ravel()[0], -1 / math.log(2 * (1 - edge**2)), 1e-10)
    assert found.residuals.max() < 1e-12 and found.lost == 0 and found.counts.sum() == 9
    assert repr(found).startswith("FixedPoints(3: 2 stable, 1 not; largest residual ")


@pytest.mark.slow
def test_a_rotation_has_a_period_and_a_slow_point_is_reached():
    angle, radius = 2 * math.pi / 7, 0.8
    turn = radius * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    cell = rnncore.Elman(2, activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 2, jnp.float64)._replace(
        recurrent_kernel=jnp.asarray(turn.T[:, None]), input_kernel=jnp.eye(2)[:, None]
    )
    found = analysis.fixed_points(cell, params, jnp.array([1.0, 2.0]), rnncore.HiddenCarry(jnp.ones((3, 2))))
    close(found.states[0], np.linalg.solve(np.eye(2) - turn, [1.0, 2.0]), 1e-12)
    close(found.periods, [[7.0, 7.0]], 1e-9)
    close(found.time_constants, [[-1 / math.log(radius)] * 2], 1e-9)
    assert len(found) == 1 and found.counts.tolist() == [3]
    # tanh(h) = h at 0 alone, with eigenvalue 1: A is singular there.
    slow = analysis.fixed_points(*scalar(1.0), jnp.zeros(1), jnp.array([[0.9], [-0.4]]))
    assert slow.residuals.max() < 1e-12 and np.abs(slow.states).max() < 2e-4


@pytest.mark.slow
def test_every_start_of_a_random_lstm_ends_at_a_point_of_the_map():
    cell = rnncore.LSTM(12)
    params = jax.tree.map(lambda a: 3 * a, cell.init(jax.random.key(0), 2, jnp.float64))
    x = jnp.array([0.3, -0.2])
    starts = cell.initial_carry((40,), jnp.float64)
    rng = np.random.default_rng(0)
    starts = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), starts)
    found = analysis.fixed_points(cell, params, x, starts)
    assert len(found) >= 1 and found.residuals.max() < 1e-12
    assert found.counts.sum() + found.lost == 40
    for state in found.states:  # by the run itself
        carry = rnncore.LSTMCarry(*jnp.split(jnp.asarray(state), 2))
        after, _ = rnncore.unroll(cell, params, jnp.broadcast_to(x, (1, 2)), initial_carry=carry)
        close(jnp.concatenate(after), state, 1e-11)
    distances = np.linalg.norm(found.states[:, None] - found.states, axis=-1) + np.eye(len(found))
    assert distances.min() > 1e-6


def test_bad_starts():
    cell, params = scalar(2.0)
    with pytest.raises(ValueError, match=r"expected an input \(D,\) and states \(K, 1\)"):
        analysis.fixed_points(cell, params, jnp.zeros(1), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="starts=.*holds 3 NaN"):
        analysis.fixed_points(cell, params, jnp.zeros(1), jnp.full((3, 1), jnp.nan))


# ------------------------------------------------------------------------------------------------- truncation


def curve_of(logs):
    logs = jnp.asarray(logs)
    return analysis.RetentionCurve(jnp.arange(logs.shape[-1]), logs, "adjoint", "state", "end", "", 1, "float64")


def test_a_geometric_decay_is_cut_where_it_should_be():
    found = analysis.choose_truncation(curve_of(np.arange(40) * math.log(0.9)), bias=0.05)
    close(found.predicted, 0.9 ** np.arange(1, 40), 1e-10)
    assert found.steps == math.ceil(math.log(0.05) / math.log(0.9)) and found.decay == pytest.approx(0.9)
    assert list(range(100))[found] == found.steps
    from rnncore.training import segments

    assert segments(jnp.zeros((1, 2 * found.steps, 1)), found).shape[2] == found.steps


@pytest.mark.slow
def test_gradients_over_time_say_the_bias_of_their_own_truncation():
    cell, steps = rnncore.LSTM(3), 12
    params = cell.init(jax.random.key(0), 2, jnp.float64)
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, steps, 2)))

    def loss(carry, outputs):
        return jnp.sum(jnp.sin(carry.h))

    @functools.partial(jax.jit, static_argnums=1)
    def cut(xs, k):
        def of(params):
            carry, _ = rnncore.unroll(cell, jax.lax.stop_gradient(params), xs[:, : steps - k])
            return loss(*rnncore.unroll(cell, params, xs[:, steps - k :], initial_carry=carry))

        return jax.flatten_util.ravel_pytree(jax.grad(of)(params))[0]

    found = [analysis.gradients_over_time(loss, cell, params, xs) for xs in batches]
    whole = np.stack([cut(xs, steps) for xs in batches])
    for k in (1, 5):
        missing = np.stack([cut(xs, k) for xs in batches]) - whole
        want = np.exp(np.mean(np.log(np.linalg.norm(missing, axis=-1) / np.linalg.norm(whole, axis=-1))))
        close(analysis.choose_truncation(found, 0.99).predicted[k - 1], want, 1e-10)
        want = np.linalg.norm(missing[0]) / np.linalg.norm(whole[0])
        close(analysis.choose_truncation(found[0], 0.99).predicted[k - 1], want, 1e-10)
    both, single = (analysis.choose_truncation(one, 0.99) for one in (found, found[0]))
    assert len(both.predicted) == steps // 2 and single.error is None
    # The standard error of the mean of two logarithms: half their difference.
    close(both.error, np.abs(np.log(both.predicted / single.predicted)), 1e-10)
    norms = analysis.gradients_over_time(loss, cell, params, batches[0], norms=True)
    with pytest.raises(ValueError, match=r"gradients_over_time\(..., norms=False\)"):
        analysis.choose_truncation(norms)
    with pytest.raises(ValueError, match="the gradient of the parameters is 0"):
        analysis.choose_truncation(
            analysis.gradients_over_time(lambda c, o: 0 * jnp.sum(c.h), cell, params, batches[0])
        )


def test_what_no_truncation_follows_from():
    with pytest.raises(ValueError, match="the gradient grows by 1.05 per step"):
        analysis.choose_truncation(curve_of(np.arange(40) * math.log(1.05)))
    with pytest.raises(ValueError, match="the predicted bias is still 0.8.* after 19 steps"):
        analysis.choose_truncation(curve_of(np.arange(20) * math.log(0.99)))
    with pytest.raises(ValueError, match="at least 10 of them"):
        analysis.choose_truncation(curve_of(np.zeros(3)))
    with pytest.raises(ValueError, match="more than 0 and less than 1"):
        analysis.choose_truncation(curve_of(np.zeros(30)), bias=1.0)
    logs = np.where(np.arange(30) < 3, 0.0, -np.inf)  # cut off after three steps, exactly
    assert analysis.choose_truncation(curve_of(logs), bias=0.01).steps == 3
