"""Lyapunov exponents against closed forms, published spectra, and each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis

EXACT = 1e-12
LN_CAT = math.log((3 + math.sqrt(5)) / 2)


def close(got, want, tolerance=EXACT):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


def linear(matrix, steps, dtype=jnp.float64, batch=()):
    """A trajectory of h_t = W h_{t-1}: every step Jacobian is W."""
    matrix = jnp.asarray(matrix, dtype)
    cell = rnncore.Elman(len(matrix), activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=matrix.T[:, None, :])
    return analysis.trajectory(cell, params, jnp.zeros((*batch, steps, 1), dtype))


def of_matrix(matrix, steps, k=None, dtype=jnp.float64, **options):
    """The exponents of s_t = W s_{t-1}."""
    matrix = jnp.asarray(matrix, dtype)
    start = jnp.zeros(len(matrix), dtype)
    return analysis.lyapunov_exponents_of_map(lambda s, _: matrix @ s, start, steps=steps, k=k, **options)


def random_params(cell, scale=0.8, seed=0, features=3):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), features))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, scale, a.shape)), shapes)


@functools.cache
def lstm_run(steps=1000, hidden=3, batch=(2,)):
    """A random LSTM with random inputs."""
    cell = rnncore.LSTM(hidden)
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(*batch, steps, 3)))
    return analysis.trajectory(cell, random_params(cell), xs)


def random_network(gain, size, steps, seed=0, dtype=jnp.float64):
    """h_t = tanh(W h_{t-1}), W_ij ~ N(0, gain^2 / size), without inputs."""
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(0, gain / math.sqrt(size), (size, size)), dtype)
    cell = rnncore.Elman(size)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=kernel[:, None])
    start = rnncore.HiddenCarry(jnp.asarray(np.tanh(rng.normal(size=size)), dtype))
    return analysis.trajectory(cell, params, jnp.zeros((steps, 1), dtype), start)


# ---------------------------------------------------------------------------------- closed forms


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_scalar_linear(dtype):
    result = analysis.lyapunov_exponents(linear([[0.9]], 50, dtype))
    close(result.exponents, [math.log(0.9)], 4 * float(jnp.finfo(dtype).eps))
    assert result.exponents.dtype == dtype and result.dtype == jnp.dtype(dtype).name
    assert float(result.exponents[0]) == pytest.approx(-0.105361, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_orthogonal_steps_have_exponents_zero(direction):
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    result = of_matrix(orthogonal, 50, direction=direction)
    close(result.exponents, np.zeros(5))
    close(result.history, np.zeros((50, 5)))
    close(result.sum_rule_residual, 0.0)


def test_a_constant_matrix_has_the_logarithms_of_its_eigenvalues():
    """Complex pairs come twice; the error is that of the transient over T."""
    rng, turn = np.random.default_rng(2), np.array([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]])
    basis = rng.normal(size=(4, 4))
    blocks = np.zeros((4, 4))
    blocks[0, 0], blocks[1:3, 1:3], blocks[3, 3] = 1.1, 0.8 * turn, -0.3
    result = of_matrix(basis @ blocks @ np.linalg.inv(basis), 4000, burn_in=200)
    close(result.exponents, np.log([1.1, 0.8, 0.8, 0.3]), 1e-3)
    assert abs(float(result.exponents[1] + result.exponents[2]) - 2 * math.log(0.8)) < 1e-10


def test_shear():
    """Both exponents are ln 0.9, though the norm grows at first: the estimate comes down like ln T / T."""
    result = of_matrix([[0.9, 1.0], [0.0, 0.9]], 4000, burn_in=400)
    close(result.exponents, [-0.105361, -0.105361], 1.5e-3)
    close(result.exponents.sum(), 2 * math.log(0.9))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_ten_thousand_steps_do_not_drift(dtype):
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    result = of_matrix(0.5 * orthogonal, 10_000, 2, dtype)
    close(result.exponents, np.full(2, -math.log(2)), 4 * float(jnp.finfo(dtype).eps))
    error = max(4 * float(jnp.finfo(dtype).eps), 1e-12)
    close(result.history[[0, 99, -1]], np.full((3, 2), -math.log(2)), error)


# -------------------------------------------------------------------------------- rank deficiency


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("angle", [0.0, 0.3])
def test_a_nilpotent_matrix_loses_everything(dtype, angle):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    result = of_matrix(turn @ [[0.0, 5.0], [0.0, 0.0]] @ turn.T, 4, dtype=dtype)
    assert np.all(result.exponents == -np.inf) and np.all(result.standard_error == 0)
    assert result.local[0, 0] > -np.inf  # the first step does not lose all
    assert result.sum_rule_residual == 0
    assert not any(np.isnan(a).any() for a in (result.local, result.history))


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_an_lstm_without_recurrent_weights_has_the_rank_of_its_cells(dtype):
    run = lstm_run(60, 3, ())
    params = run.params._replace(recurrent_kernel=jnp.zeros_like(run.params.recurrent_kernel))
    params, xs = jax.tree.map(lambda a: a.astype(dtype), (params, run.xs))
    run = analysis.trajectory(run.cell, params, xs)
    want = np.sort(np.log(np.asarray(run.gates.f, np.float64)).mean(0))[::-1]
    result = analysis.lyapunov_exponents(run, direction="forward" if dtype == jnp.float64 else "backward")
    assert np.all(result.exponents[3:] == -np.inf) and result.sum_rule_residual == 0
    close(result.exponents[:3].sum(), want.sum(), 0.1)  # the transient of (I; Delta), over T
    leading = analysis.lyapunov_exponents(run, 4).exponents
    close(leading[:3].sum(), want.sum(), 0.1)
    assert leading[3] == -np.inf


def test_dead_relu_units_lose_their_direction():
    cell = rnncore.Elman(4, activation_fn=jax.nn.relu)
    params = random_params(cell, 0.2)
    params = params._replace(bias=jnp.array([[5.0, 5.0, 5.0, -50.0]]))  # the last unit never fires
    xs = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (60, 3)))
    result = analysis.lyapunov_exponents(analysis.trajectory(cell, params, xs))
    assert np.all(np.isfinite(result.exponents[:3])) and result.exponents[3] == -np.inf
    assert result.sum_rule_residual == 0 and not np.isnan(result.history).any()


def test_without_a_rank_tolerance_rounding_is_what_is_left():
    rank_one = np.outer([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert of_matrix(rank_one, 20).exponents[1] == -np.inf
    left = of_matrix(rank_one, 20, rank_tolerance=0.0).exponents
    close(left[0], math.log(6.0), 0.1)
    assert left[1] < -25


# -------------------------------------------------------------------------------- published values


@pytest.mark.slow
def test_random_network_of_clark():
    """N = 4096 has lambda_1 = 0.30958, D = 0.28717 N, h = 0.025106 N; finite size lowers all three."""
    result = analysis.lyapunov_exponents(random_network(3.0, 100, 1600), burn_in=100)
    assert 0.26 <= result.exponents[0] <= 0.31
    assert 0.25 <= analysis.kaplan_yorke_dimension(result) / 100 <= 0.2872
    assert 0.0200 <= analysis.ks_entropy(result) / 100 <= 0.0251
    assert abs(result.sum_rule_residual) < 1e-4
    assert 0.004 < result.standard_error[0] < 0.015


def test_deep_exponents_are_not_those_of_a_numerical_floor():
    """Rows of diag(phi') U of 1e-15 beside 1: QR as it comes leaves rounding there and breaks the sum rule."""
    run = random_network(5.0, 30, 300)
    h = np.asarray(run.carries.h[1:])
    slopes = (1 - h) * (1 + h)
    assert 0 < slopes.min() < 1e-14
    result = analysis.lyapunov_exponents(run)
    assert result.exponents[-1] < -15 and abs(result.sum_rule_residual) < 1e-10
    determinant = np.linalg.slogdet(run.params.recurrent_kernel[:, 0])[1]
    close(result.exponents.sum(), np.log(slopes).sum(-1).mean() + determinant, 1e-4)
    frame, total = np.eye(30), 0.0
    jacobians = np.asarray(analysis.step_jacobians(run))
    for jacobian in jacobians:
        frame, r = np.linalg.qr(jacobian @ frame)
        total += np.log(np.abs(np.diag(r))).sum() / 300
    assert abs(total - np.linalg.slogdet(jacobians)[1].mean()) > 1e-7


def test_sum_rule_of_an_lstm():
    """The sum of all 2 H exponents is <sum ln f> + <sum ln |tanh c o (1 - o)|> + ln |det U_o|."""
    run = lstm_run()
    result = analysis.lyapunov_exponents(run)
    f, o, c = run.gates.f, run.gates.o, run.carries.c[..., 1:, :]
    u_o = np.asarray(run.cell.recurrence.gate_matrices(run.params.recurrent_kernel)[3])
    want = jnp.log(f).sum(-1).mean(-1) + jnp.log(jnp.abs(jnp.tanh(c) * o * (1 - o))).sum(-1).mean(-1)
    close(result.exponents.sum(-1), want + np.linalg.slogdet(u_o)[1], 1e-10)
    close(result.sum_rule_residual, np.zeros(2), 1e-10)


# --------------------------------------------------------------------------------- maps


def logistic(x, _):
    return 4 * x * (1 - x)


def henon(s, _):
    return jnp.array([1 - 1.4 * s[0] ** 2 + s[1], 0.3 * s[0]])


def cat(s, _):
    return jnp.mod(jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s, 1.0)


def test_logistic_map():
    starts = jnp.array([[0.3], [0.4]])
    result = analysis.lyapunov_exponents_of_map(logistic, starts, steps=20_000)
    close(result.exponents, np.full((2, 1), math.log(2)), 1e-3)
    one = analysis.lyapunov_exponents_of_map(logistic, starts[1], steps=20_000)
    close(one.exponents, result.exponents[1])


def test_henon_map():
    """lambda_1 = 0.4192 and D = 1.258 are the usual numbers; their sum is exactly ln 0.3."""
    result = analysis.lyapunov_exponents_of_map(henon, jnp.array([0.1, 0.1]), steps=6000, burn_in=100)
    close(result.exponents.sum(), math.log(0.3))
    assert float(result.exponents[0]) == pytest.approx(0.4192, abs=3 * float(result.standard_error[0]))
    assert 0.001 < result.standard_error[0] < 0.01
    assert float(analysis.kaplan_yorke_dimension(result)) == pytest.approx(1.258, abs=0.01)


@pytest.mark.sample(1)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cat_map(direction):
    result = analysis.lyapunov_exponents_of_map(cat, jnp.array([0.1, 0.3]), steps=200, burn_in=20, direction=direction)
    close(result.exponents, [LN_CAT, -LN_CAT])
    close(analysis.kaplan_yorke_dimension(result), 2.0)
    close(analysis.ks_entropy(result), LN_CAT)


def test_a_driven_map_is_the_cell():
    run = lstm_run(60, 3, ())
    cell = run.cell

    def step(state, x):
        carry, _ = cell.update(run.params, rnncore.LSTMCarry(*jnp.split(state, 2)), cell.project(run.params, x))
        return jnp.concatenate(list(carry))

    got = analysis.lyapunov_exponents_of_map(step, jnp.zeros(6), run.xs, k=4, burn_in=10)
    want = analysis.lyapunov_exponents(run, 4, burn_in=10)
    close(got.exponents, want.exponents, 1e-10)
    close(got.local, want.local, 1e-9)


# --------------------------------------------------------------------------------- properties


def test_leading_exponents_are_the_first_of_all_and_of_one_sequence():
    run = lstm_run()
    full, some = analysis.lyapunov_exponents(run), analysis.lyapunov_exponents(run, 3, burn_in=16)
    close(some.local, full.local[:, 16:, :3], 1e-9)
    assert some.sum_rule_residual is None and full.exponents.shape == (2, 6)
    assert np.all(np.diff(full.exponents) < 0)
    one = analysis.lyapunov_exponents(run.take(1), 3, burn_in=16)
    close(one.exponents, some.exponents[1], 1e-10)
    assert one.exponents.shape == (3,) and one.local.shape == (984, 3)


def test_backward_exponents_are_the_forward_ones():
    run = lstm_run()
    forward = analysis.lyapunov_exponents(run)
    backward = analysis.lyapunov_exponents(run, direction="backward")
    difference = np.abs(forward.exponents - backward.exponents)
    assert 1e-7 < difference.max() < 0.01  # two estimates, not one
    close(backward.sum_rule_residual, np.zeros(2), 1e-10)
    leading = analysis.lyapunov_exponents(run, 3, direction="backward")
    close(leading.exponents, backward.exponents[:, :3], 1e-10)


def test_fewer_decompositions_change_nothing_but_rounding():
    run = lstm_run()
    every = analysis.lyapunov_exponents(run, 3, burn_in=16)
    seventh = analysis.lyapunov_exponents(run, 3, burn_in=16, qr_every=7)
    close(seventh.exponents, every.exponents, 1e-8)
    assert seventh.times[:2] == (7, 14) and seventh.times[-1] == 984 and len(seventh.times) == 141
    close(seventh.history[:, 4], every.history[:, 34], 1e-8)
    close(seventh.history[:, -1], seventh.exponents)
    # 120 steps of 1e-5 leave the range of float32 between two decompositions.
    small = of_matrix(1e-5 * np.diag([1.0, 0.9]), 360, dtype=jnp.float32, qr_every=120)
    close(small.exponents[0], math.log(1e-5), 1e-3)


@pytest.mark.slow
def test_exponents_do_not_depend_on_the_basis():
    """s' = S s: the same exponents up to a transient over T."""
    run = lstm_run(1000, 3, ())
    basis = jnp.asarray(np.random.default_rng(3).normal(size=(6, 6)))
    inverse = jnp.linalg.inv(basis)
    cell = run.cell

    def step(state, x):
        carry = rnncore.LSTMCarry(*jnp.split(inverse @ state, 2))
        carry, _ = cell.update(run.params, carry, cell.project(run.params, x))
        return basis @ jnp.concatenate(list(carry))

    got = analysis.lyapunov_exponents_of_map(step, jnp.zeros(6), run.xs, burn_in=50)
    want = analysis.lyapunov_exponents(run, burn_in=50)
    close(got.exponents, want.exponents, 5e-3)
    close(got.exponents.sum(), want.exponents.sum(), 1e-9)


def test_leaving_out_the_first_steps_is_starting_later():
    run = lstm_run(1000, 3, ())
    late = analysis.trajectory(run.cell, run.params, run.xs[100:], jax.tree.map(lambda a: a[100], run.carries))
    got, want = analysis.lyapunov_exponents(late, burn_in=100), analysis.lyapunov_exponents(run, burn_in=200)
    # Two frames have become one within 100 steps: not only the means, every step is equal.
    close(got.local[:, 0], want.local[:, 0], 1e-8)
    close(got.exponents, want.exponents, 1e-6)


def test_finite_time_exponents_are_means_of_windows():
    run = lstm_run()
    whole = analysis.lyapunov_exponents(run, 3, burn_in=16)
    windows = analysis.finite_time_lyapunov(run, 123, 3, burn_in=16)
    assert windows.shape == (2, 8, 3)
    close(windows.mean(1), whole.exponents)
    close(windows[:, 3], whole.local[:, 369:492].mean(1))
    assert analysis.finite_time_lyapunov(run, 100, 3, burn_in=16).shape == (2, 9, 3)


def test_runs_inside_jit_and_as_a_pytree():
    run = lstm_run(60, 3, ())
    want = analysis.lyapunov_exponents(run, 4, burn_in=10)
    got = jax.jit(lambda run: analysis.lyapunov_exponents(run, 4, burn_in=10))(run)
    close(got.exponents, want.exponents, 1e-10)
    assert jax.tree.map(lambda a: a + 1, want).times == want.times


def jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from jaxprs(inner)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_leading_exponents_never_form_a_jacobian(direction):
    run = lstm_run(60, 7, ())  # n = 14

    def shapes(k):
        jaxpr = jax.make_jaxpr(lambda run: analysis.lyapunov_exponents(run, k, direction=direction).exponents)(run)
        return [v.aval.shape for inner in jaxprs(jaxpr.jaxpr) for eqn in inner.eqns for v in eqn.outvars]

    def formed(k):
        return any(shape.count(14) >= 2 for shape in shapes(k))

    assert formed(None) and not formed(3)
    # Over time only states, inputs and logarithms are kept: nothing is as large as T frames.
    assert max(math.prod(shape) for shape in shapes(3)) <= 60 * 4 * 7


# ------------------------------------------------------------------------------- dimension, entropy


def test_dimension_and_entropy():
    inf = math.inf
    for exponents, dimension, entropy in (
        ([0.9, 0.0, -14.5], 2 + 0.9 / 14.5, 0.9),
        ([-14.5, 0.9, 0.0], 2 + 0.9 / 14.5, 0.9),  # in any order
        ([-0.1, -0.2], 0.0, 0.0),
        ([0.0, -1.0], 1.0, 0.0),
        ([0.3, 0.1], 2.0, 0.4),
        ([0.5, -inf, -inf], 1.0, 0.5),
        ([-inf, -inf], 0.0, 0.0),
    ):
        close(analysis.kaplan_yorke_dimension(jnp.array(exponents)), dimension)
        close(analysis.ks_entropy(jnp.array(exponents)), entropy)
    batch = jnp.array([[0.5, -1.0], [-0.5, -1.0]])
    close(analysis.kaplan_yorke_dimension(batch), [1.5, 0.0])
    close(jax.jit(analysis.ks_entropy)(batch), [0.5, 0.0])


def test_too_few_exponents_for_the_dimension():
    growing = of_matrix(np.diag([1.5, 1.2, 0.1]), 100, 2)
    with pytest.raises(ValueError, match=r"2 of n = 3 exponents: their sum is not negative, .* above 2; compute more"):
        analysis.kaplan_yorke_dimension(growing)
    with pytest.raises(ValueError, match=r"`ks_entropy` of 2 of n = 3 exponents: all are positive"):
        analysis.ks_entropy(growing)
    for call in (analysis.kaplan_yorke_dimension, analysis.ks_entropy):
        with pytest.raises(ValueError, match="NaN; expected numbers or -inf"):
            call(jnp.array([0.1, jnp.nan]))
        with pytest.raises(ValueError, match=r"expected floating point \(\*batch, k\)"):
            call(jnp.array([1, 2]))


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 7}, r"`lyapunov_exponents\(k=7\)`: the state has n = 6 entries; expected 1 to 6, or None"),
        ({"k": 0}, "expected 1 to 6"),
        ({"k": 1.5}, r"\(k=1.5\)`: expected an integer"),
        ({"burn_in": 60}, r"\(burn_in=60\)`: of T = 60 steps at least one must count; run a longer sequence"),
        ({"burn_in": -1}, "at least one must count"),
        ({"qr_every": 0}, r"\(qr_every=0\)`: expected at least 1 step"),
        ({"direction": "sideways"}, "expected 'forward' or 'backward'"),
        ({"rank_tolerance": -1.0}, "expected at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.lyapunov_exponents(lstm_run(60, 3, ()), **options)


def test_bad_windows_and_runs():
    run = lstm_run(60, 3, ())
    with pytest.raises(ValueError, match=r"window=60, burn_in=10\)`: a run of T = 60 steps leaves 50; expected"):
        analysis.finite_time_lyapunov(run, 60, burn_in=10)
    ragged = analysis.trajectory(run.cell, run.params, run.xs[None], seq_lengths=jnp.array([40]))
    for call in (analysis.lyapunov_exponents, lambda run: analysis.finite_time_lyapunov(run, 5)):
        with pytest.raises(NotImplementedError, match=r"with seq_lengths: .*`traj.take\(i\)`"):
            call(ragged)
    with pytest.raises(ValueError, match=r"the Jacobian of a step leaves the range of float64"):
        analysis.lyapunov_exponents_of_map(lambda s, _: jnp.sqrt(s), jnp.zeros(1), steps=3)


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        (jnp.array([1, 2]), {"steps": 3}, r"state=<int64 \(2,\)>\)`: expected floating point \(\*batch, n\)"),
        (jnp.array([0.1, jnp.nan]), {"steps": 3}, "holds 1 NaN .* find out where"),
        (jnp.array([0.1, 0.1]), {}, "expected either inputs, whose first axis is T, or steps=T"),
        (jnp.array([0.1, 0.1]), {"steps": 3, "inputs": jnp.zeros(3)}, "or steps=T"),
        (jnp.array([0.1, 0.1, 0.1]), {"steps": 3}, r"returned float64 \(2,\) for a state float64 \(3,\)"),
        (jnp.array([9.0, 9.0]), {"steps": 60}, "a state or the Jacobian of a step leaves the range"),
    ],
)
def test_bad_maps(state, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.lyapunov_exponents_of_map(henon, state, **options)
