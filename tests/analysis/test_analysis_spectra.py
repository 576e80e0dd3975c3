"""Eigenvalues of single steps and singular values of long products, against NumPy, closed forms and inverses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis, initializers


def close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


def linear(matrix, steps, dtype=jnp.float64):
    """A trajectory of h_t = W h_{t-1}: every step Jacobian is W."""
    matrix = jnp.asarray(matrix, dtype)
    cell = rnncore.Elman(len(matrix), activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=matrix.T[:, None, :])
    return analysis.trajectory(cell, params, jnp.zeros((steps, 1), dtype))


@functools.cache
def lstm_run(lengths=None):
    """Two sequences of 60 steps of a random LSTM."""
    rng, cell = np.random.default_rng(0), rnncore.LSTM(3)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), 3))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.8, a.shape)), shapes)
    xs = jnp.asarray(rng.normal(size=(2, 60, 3)))
    return analysis.trajectory(cell, params, xs, seq_lengths=None if lengths is None else jnp.array(lengths))


def at_origin(cell, biases=None, matrices=None):
    """One step from zeros; biases by gate name, recurrent matrices U_g (row = output) by gate name."""
    params = cell.init(jax.random.key(0), 1, jnp.float64)
    for gate, value in (biases or {}).items():
        params = params._replace(bias=params.bias.at[cell.gates.index(gate)].set(value))
    for gate, matrix in (matrices or {}).items():
        kernel = params.recurrent_kernel.at[:, cell.gates.index(gate)].set(jnp.asarray(matrix).T)
        params = params._replace(recurrent_kernel=kernel)
    return analysis.trajectory(cell, params, jnp.zeros((1, 1)))


def radius(run):
    return float(jnp.abs(analysis.jacobian_eigenvalues(run, 1)).max())


# ------------------------------------------------------------------------------------ eigenvalues


def test_eigenvalues_are_those_of_the_step_jacobian():
    run = lstm_run()
    got = analysis.jacobian_eigenvalues(run, 7)
    assert got.shape == (2, 6) and got.dtype == jnp.complex128
    assert np.all(np.diff(np.abs(got)) <= 1e-12)
    want = np.linalg.eigvals(analysis.step_jacobians(run)[:, 6])
    for ours, theirs in zip(np.asarray(got), want, strict=True):
        close(np.sort_complex(ours.round(10)), np.sort_complex(theirs.round(10)), 1e-9)
    assert analysis.jacobian_eigenvalues(linear(np.eye(2), 1, jnp.float32), 1).dtype == jnp.complex64


@pytest.mark.parametrize(("bias", "want"), [(0.0, 0.75), (1.0, 0.981059), (math.log(3.0), 1.0), (3.0, 1.202574)])
def test_lstm_radius_at_the_origin_with_an_orthogonal_matrix(bias, want):
    """max |f + i o lambda(U_g)|, reached where lambda = 1."""
    run = at_origin(rnncore.LSTM(4), {"f": bias}, {"g": np.eye(4)[[0, 2, 3, 1]]})
    assert radius(run) == pytest.approx(want, abs=1e-6)
    assert math.log(radius(run)) == pytest.approx({0.75: -0.28768, 1.0: 0.0}.get(want, math.log(want)), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"radius": 0.9}, {"radius": 1.1, "i": 0.3, "o": 0.8}])
def test_critical_forget_bias_gives_the_radius(options):
    gates = {"i": 0.5, "o": 0.5} | {name: options[name] for name in ("i", "o") if name in options}
    biases = {name: math.log(gate / (1 - gate)) for name, gate in gates.items()}
    bias = initializers.critical_forget_bias(**options)
    run = at_origin(rnncore.LSTM(4), {"f": bias, **biases}, {"g": np.eye(4)})
    assert radius(run) == pytest.approx(options.get("radius", 1.0), abs=1e-12)


def test_critical_forget_bias_is_ln_3():
    assert initializers.critical_forget_bias() == pytest.approx(math.log(3.0), rel=1e-15)
    assert initializers.critical_forget_bias(radius=0.75) == 0.0
    with pytest.raises(ValueError, match=r"needs a forget gate of 1, .* expected a radius between 0.25 and 1.25"):
        initializers.critical_forget_bias(1.25)
    with pytest.raises(ValueError, match="needs a forget gate of -0.05"):
        initializers.critical_forget_bias(0.2)
    with pytest.raises(ValueError, match=r"`critical_forget_bias\(i=1.5, o=0.5\)`: expected gates from 0 to 1"):
        initializers.critical_forget_bias(i=1.5)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("bias", "gain"), [(0.0, 2.0), (1.0, 1.0758), (2.0, 0.4768)])
def test_lstm_with_a_gaussian_matrix_is_critical_at_its_gain(bias, gain):
    """g = 4 (1 - f): the disk f + g / 4 touches 1, for H to infinity."""
    size = 150
    matrix = np.random.default_rng(1).normal(0, gain / math.sqrt(size), (size, size))
    run = at_origin(rnncore.LSTM(size), {"f": bias}, {"g": matrix})
    f = 1 / (1 + math.exp(-bias))
    assert f + gain / 4 == pytest.approx(1.0, abs=1e-4)
    values = np.asarray(analysis.jacobian_eigenvalues(run, 1))[:size]
    want = f + np.linalg.eigvals(matrix) / 4
    close(np.sort(np.abs(values)), np.sort(np.abs(want)), 1e-8)
    assert radius(run) == pytest.approx(1.0, abs=0.1 * gain / 4)


def test_gru_at_the_origin_is_critical_at_gain_two_whatever_its_update_gate():
    for bias in (-1.0, 0.0, 2.0):
        z = 1 / (1 + math.exp(-bias))
        run = at_origin(rnncore.GRU(3), {"z": bias}, {"n": np.diag([2.0, 0.4, -1.0])})
        values = np.asarray(analysis.jacobian_eigenvalues(run, 1))
        close(values, np.sort(z + (1 - z) * 0.5 * np.array([2.0, 0.4, -1.0]))[::-1])
        assert radius(run) == pytest.approx(1.0, abs=1e-12)


def test_tanh_network_at_the_origin():
    size, rng = 200, np.random.default_rng(0)
    for matrix, want in (
        (rng.normal(0, 1 / math.sqrt(size), (size, size)), 1.0),
        (rng.uniform(-1 / math.sqrt(size), 1 / math.sqrt(size), (size, size)), 1 / math.sqrt(3)),  # torch.nn.RNN
    ):
        assert radius(at_origin(rnncore.Elman(size), matrices={"h": matrix})) == pytest.approx(want, rel=0.07)


# -------------------------------------------------------------------------------- singular values


def dense(run, lag, anchor):
    return np.asarray(analysis.jacobian_product(analysis.step_jacobians(run), anchor).to_dense())[:, lag]


@pytest.mark.sample(1)
@pytest.mark.parametrize("anchor", ["end", "start"])
def test_short_products_have_the_singular_values_of_numpy(anchor):
    run = lstm_run()
    for lag in (0, 1, 3):
        want = np.linalg.svd(dense(run, lag, anchor), compute_uv=False)
        got = analysis.singular_spectrum(run, lag, anchor)
        assert got.shape == (2, 6)
        close(np.exp(got), want, 1e-13)
        close(got, np.log(want), 1e-8)  # NumPy loses the small ones, not we


def test_long_products_keep_all_singular_values():
    """The largest is the norm of the product, the smallest that of the inverse; the sum is that of determinants."""
    run = lstm_run()
    jacobians = np.asarray(analysis.step_jacobians(run))
    got = np.asarray(analysis.singular_spectrum(run, 60))
    assert np.all(got[:, 0] - got[:, -1] > 100)  # e^-100 beside 1: no SVD of a product in float64 sees it
    close(got[:, 0], analysis.jacobian_product(jacobians).log_operator_norm()[:, -1])
    inverse = analysis.jacobian_product(np.linalg.inv(jacobians)[:, ::-1]).log_operator_norm()[:, -1]
    close(got[:, -1], -inverse, 1e-8)
    close(got.sum(-1), np.linalg.slogdet(jacobians)[1].sum(-1))


@pytest.mark.slow
def test_clusters_and_transients():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    close(analysis.singular_spectrum(linear(orthogonal, 50), 50), np.zeros(5))
    shear = np.array([[0.9, 1.0], [0.0, 0.9]])
    want = np.log(np.linalg.svd(np.linalg.matrix_power(shear, 100), compute_uv=False))
    close(analysis.singular_spectrum(linear(shear, 100), 100), want, 1e-9)
    # Two directions of one size among others, and the frame that starts in none of them.
    matrix = orthogonal @ np.diag([1.0, 0.5, 0.5, 0.25, 1e-3]) @ orthogonal.T
    want = np.log([1.0, 0.5, 0.5, 0.25, 1e-3]) * 50
    close(analysis.singular_spectrum(linear(matrix, 50), 50), want, 1e-9)


@pytest.mark.slow
def test_float32_over_ten_thousand_steps():
    matrix = np.diag([0.9, 0.5, 0.5, 0.01])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    got = analysis.singular_spectrum(linear(turn @ matrix @ turn.T, 10_000, jnp.float32), 10_000)
    assert got.dtype == jnp.float32
    close(got / 10_000, np.log([0.9, 0.5, 0.5, 0.01]), 1e-5)


def test_lost_directions_are_minus_infinity():
    run = lstm_run()
    params = run.params._replace(recurrent_kernel=jnp.zeros_like(run.params.recurrent_kernel))
    run = analysis.trajectory(run.cell, params, run.xs)
    for lag in (3, 60):
        logs = np.asarray(analysis.singular_spectrum(run, lag))
        assert np.all(np.isfinite(logs[:, :3])) and np.all(logs[:, 3:] == -np.inf)
    want = np.linalg.svd(dense(run, 3, "end"), compute_uv=False)
    close(np.exp(analysis.singular_spectrum(run, 3)), want)
    nilpotent = linear([[0.0, 5.0], [0.0, 0.0]], 4)
    close(np.exp(analysis.singular_spectrum(nilpotent, 1)), [5.0, 0.0])
    assert np.all(analysis.singular_spectrum(nilpotent, 2) == -np.inf)


@pytest.mark.slow
def test_a_product_does_not_know_when_it_starts():
    run = lstm_run()
    cut = analysis.trajectory(run.cell, run.params, run.xs[:, :20])
    close(analysis.singular_spectrum(cut, 20), analysis.singular_spectrum(run, 20, "start"))


@pytest.mark.slow
def test_each_sequence_has_its_own_end_and_resets_cut():
    run = lstm_run((60, 35))
    got = analysis.singular_spectrum(run, 20)
    close(got[1], analysis.singular_spectrum(run.take(1), 20))
    resets = jnp.zeros((2, 60), bool).at[1, 50].set(True)
    broken = analysis.trajectory(run.cell, run.params, lstm_run().xs, resets=resets)
    logs = np.asarray(analysis.singular_spectrum(broken, 20))
    assert np.all(np.isfinite(logs[0])) and np.all(logs[1] == -np.inf)
    with pytest.raises(ValueError, match=r"`singular_spectrum\(lag=40\)`: expected an integer of 0 to 35"):
        analysis.singular_spectrum(run, 40)


def test_singular_values_over_the_lag_come_to_the_lyapunov_exponents():
    run = lstm_run()
    rates = analysis.singular_spectrum(run, 60) / 60
    exponents = analysis.lyapunov_exponents(run).exponents
    assert 1e-3 < np.abs(rates - exponents).max() < 0.3  # two notions at a finite time
    close(rates.sum(-1), exponents.sum(-1))


def test_errors():
    run = lstm_run()
    for t in (0, 61, 1.5):
        with pytest.raises(ValueError, match=r"expected a step from 1 to T = 60"):
            analysis.jacobian_eigenvalues(run, t)
    for lag in (-1, 61, 2.0):
        with pytest.raises(ValueError, match="expected an integer of 0 to 60, the steps .* run more steps"):
            analysis.singular_spectrum(run, lag)
    with pytest.raises(ValueError, match="expected 'end' or 'start'"):
        analysis.singular_spectrum(run, 3, "middle")
