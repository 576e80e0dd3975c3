"""Step Jacobians, their coefficients and their products, against autodiff, NumPy and closed forms."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import rnncore
from rnncore import analysis
from rnncore.analysis import ScaledMatrix

EXACT = 1e-12
POINTWISE = (
    "elman-dense",
    "elman_residual-heads",
    "elman_sigmoid",
    "indrnn",
    "lstm-dense",
    "lstm_peepholes-diagonal",
    "lstm_coupled-dense",
    "lstm_both-heads",
    "gru-dense",
    "mgu-heads",
    "mgu_no_reset-diagonal",
    "user_leaky",
    "user_fast_slow-dense",
)
SMOOTH_WITH_REFERENCE = ("elman_residual-heads", "lstm_both-heads", "gru-dense", "mgu-heads", "reset_before_gru")


@functools.cache
def run_of(name, batch=(2,), steps=4):
    """A trajectory of random parameters, inputs and initial carry."""
    problem = cases.draw(cases.BY_ID[name], batch, steps)
    return analysis.trajectory(cases.BY_ID[name].cell, problem.params, problem.xs, problem.carry)


def linear(matrix, steps, dtype=jnp.float64, batch=()):
    """A trajectory of h_t = W h_{t-1}: every step Jacobian is W."""
    matrix = jnp.asarray(matrix, dtype)
    size = len(matrix)
    cell = rnncore.Elman(size, activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=matrix.T[:, None, :])
    return analysis.trajectory(cell, params, jnp.zeros((*batch, steps, 1), dtype))


def close(got, want, tolerance=EXACT):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- single steps


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", POINTWISE)
def test_analytic_jacobians_are_those_of_vjp(name):
    run = run_of(name)
    # The parts are cut from the same coefficients: two cells are enough for those.
    parts = {"lstm_both-heads": ("state", "hidden", "cell"), "user_fast_slow-dense": ("state", "hidden")}
    for part in parts.get(name, ("state",)):
        want = analysis.step_jacobians(run, wrt=part)
        assert float(jnp.abs(want).max()) > 0.01
        close(analysis.step_jacobians(run, wrt=part, method="analytic"), want)
        if name in parts:
            close(analysis.step_jacobians(run, wrt=part, method="jvp"), want)


@pytest.mark.parametrize("name", SMOOTH_WITH_REFERENCE)
def test_jacobians_are_differences_of_the_numpy_reference(name):
    case, run, eps = cases.BY_ID[name], run_of(name), 1e-5
    got = np.asarray(analysis.step_jacobians(run))
    params, fields = cases.as_reference(run.params), [np.asarray(a) for a in run.carries]
    size = case.cell.hidden_size
    for example, t in ((0, 0), (1, 3)):
        state = np.concatenate([a[example, t] for a in fields])
        moved = np.concatenate([state + eps * np.eye(len(state)), state - eps * np.eye(len(state))])
        start = tuple(moved[:, size * i : size * (i + 1)] for i in range(len(fields)))
        xs = np.broadcast_to(np.asarray(run.xs)[example, t], (len(moved), 1, run.xs.shape[-1]))
        last = np.concatenate(reference.forward(case.reference, params, xs, start).last, -1)
        columns = (last[: len(state)] - last[len(state) :]) / (2 * eps)
        close(got[example, t], columns.T, 1e-9)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_chunks_and_batch_axes_change_nothing(batch):
    run = run_of("gru-dense", batch, steps=5)
    whole = analysis.step_jacobians(run)
    assert whole.shape == (*batch, 5, 4, 4)
    for method in ("vjp", "jvp", "analytic") if batch else ("vjp",):
        close(analysis.step_jacobians(run, method=method, chunk=2), whole, 1e-14)
    if batch:
        one = analysis.trajectory(run.cell, run.params, run.xs[1, 2], rnncore.HiddenCarry(run.carries.h[1, 2, 0]))
        close(analysis.step_jacobians(one), whole[1, 2], 1e-14)


def test_hidden_and_cell_are_blocks_of_the_state():
    run = run_of("lstm_both-dense")
    whole = analysis.step_jacobians(run)
    close(analysis.step_jacobians(run, wrt="cell"), whole[..., :4, :4], 1e-15)
    close(analysis.step_jacobians(run, wrt="hidden"), whole[..., 4:, 4:], 1e-15)


def lstm_blocks(run):
    """F, K, Delta and G of every step of a plain LSTM, written out from its gates."""
    i, f, g, o = map(np.asarray, run.gates)
    before, after = np.asarray(run.carries.c[..., :-1, :]), np.asarray(run.carries.c[..., 1:, :])
    u_i, u_f, u_g, u_o = np.asarray(run.cell.recurrence.gate_matrices(run.params.recurrent_kernel))
    k = (before * f * (1 - f))[..., None] * u_f + (g * i * (1 - i))[..., None] * u_i + (i * (1 - g**2))[..., None] * u_g
    return f, k, o * (1 - np.tanh(after) ** 2), (np.tanh(after) * o * (1 - o))[..., None] * u_o


def test_lstm_jacobian_has_the_written_out_blocks():
    run = run_of("lstm-dense")
    f, k, delta, g = lstm_blocks(run)
    diagonal = f[..., None] * np.eye(4)
    rows = [
        np.concatenate([diagonal, k], -1),
        np.concatenate([delta[..., None] * diagonal, delta[..., None] * k + g], -1),
    ]
    close(analysis.step_jacobians(run), np.concatenate(rows, -2))
    coefficients = analysis.step_coefficients(run)
    close(coefficients.state.c.c, f)
    close(coefficients.state.h.c, delta * f)
    close(coefficients.state.c.h, np.zeros_like(f))


def test_lstm_determinant_identity():
    run = run_of("lstm-dense", (3,))
    f, _, _, g = lstm_blocks(run)
    _, log = np.linalg.slogdet(np.asarray(analysis.step_jacobians(run)))
    close(log, np.log(f).sum(-1) + np.linalg.slogdet(g)[1], 1e-11)


def test_lstm_spectral_radius_at_the_origin():
    """max |f + i o lambda(U_g)|: with f = 3/4, at a forget bias of ln 3, an orthogonal U_g reaches 1."""
    cell = rnncore.LSTM(6)
    random = cell.init(jax.random.key(0), 2, jnp.float64)
    kernel = random.recurrent_kernel
    # An eigenvalue 1 of U_g gives the largest radius that an orthogonal one can.
    one = random._replace(recurrent_kernel=kernel.at[:, 2].set(jnp.eye(6)))
    for bias, radius in ((0.0, 0.75), (1.0, 0.981059), (math.log(3.0), 1.0), (3.0, 1.202574)):
        u_g = cell.recurrence.gate_matrices(kernel)[2]
        f = 1 / (1 + np.exp(-bias))
        for params, want in ((random, np.abs(f + np.linalg.eigvals(u_g) / 4).max()), (one, radius)):
            params = params._replace(bias=params.bias.at[1].set(bias))
            jacobian = analysis.step_jacobians(analysis.trajectory(cell, params, jnp.zeros((1, 2))))[0]
            close(np.abs(np.linalg.eigvals(jacobian)).max(), want, 1e-6)


def test_gru_jacobian_at_the_origin():
    cell = rnncore.GRU(5)
    run = analysis.trajectory(cell, cell.init(jax.random.key(0), 2, jnp.float64), jnp.zeros((1, 2)))
    u_n = cell.recurrence.gate_matrices(run.params.recurrent_kernel)[2]
    close(analysis.step_jacobians(run)[0], 0.5 * np.eye(5) + 0.25 * u_n)


def test_works_inside_jit_and_keeps_float32():
    cell = rnncore.LSTM(3)
    params, xs = cell.init(jax.random.key(0), 2), jnp.ones((2, 4, 2), jnp.float32)
    run = analysis.trajectory(cell, params, xs)
    want = analysis.step_jacobians(run)
    assert want.dtype == jnp.float32
    got = jax.jit(lambda params, xs: analysis.step_jacobians(analysis.trajectory(cell, params, xs)))(params, xs)
    close(got, want, 1e-6)
    close(jax.jit(analysis.step_jacobians)(run), want, 1e-6)


# ---------------------------------------------------------------------------------- products


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["lstm_both-dense", "elman_residual-dense", "reset_before_gru"])
def test_products_are_the_exact_derivatives_over_many_steps(name):
    run = run_of(name, (), steps=5)
    jacobians = analysis.step_jacobians(run)
    forward = analysis.jacobian_product(jacobians, anchor="start").to_dense()
    backward = analysis.jacobian_product(jacobians).to_dense()
    close(forward[0], np.eye(len(forward[0])))

    def flat(carry):
        return jnp.concatenate(list(carry), -1)

    def rest(state, first):
        carry = type(run.carries)(*jnp.split(state, len(run.fields)))
        _, _, states = rnncore.unroll(
            run.cell, run.params, run.xs[first:], initial_carry=carry, return_states=True, include_initial=True
        )
        return flat(states.carries)

    states = flat(run.carries)
    close(forward, jax.jacfwd(rest)(states[0], 0))
    for lag in (1, 2, 4):
        close(backward[lag], jax.jacfwd(rest)(states[5 - lag], 5 - lag)[-1])
    # The order matters: the reversed product is another matrix.
    assert np.abs(analysis.jacobian_product(jacobians[::-1]).to_dense()[-1] - backward[-1]).max() > 1e-3


def test_jvp_of_a_cell_that_is_not_pointwise():
    run = run_of("reset_before_gru")
    close(analysis.step_jacobians(run, method="jvp"), analysis.step_jacobians(run))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-13), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("anchor", ["end", "start"])
def test_products_in_log_depth_keep_the_order(anchor, dtype, tolerance):
    """Factors that do not commute, some of them far from 1, an odd number of them, over a batch."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(2, 7, 3, 3)) * 10.0 ** rng.integers(-9, 3, (2, 7, 1, 1))
    factors = jnp.asarray(dense, dtype)
    fast = analysis.jacobian_product(factors, anchor, associative=True)
    slow = analysis.jacobian_product(factors, anchor)
    assert fast.matrix.shape == (2, 8, 3, 3) and fast.matrix.dtype == fast.log_scale.dtype == dtype
    for product in (fast, slow):
        for example in range(2):
            chain = dense[example][::-1] if anchor == "end" else dense[example]
            want = np.eye(3)
            for lag in range(8):
                scale = np.exp(float(product.log_scale[example, lag]))
                got = np.asarray(product.matrix[example, lag], np.float64) * scale
                close(got / np.abs(want).max(), want / np.abs(want).max(), 10 * tolerance)
                if lag < 7:
                    want = want @ chain[lag] if anchor == "end" else chain[lag] @ want
    other = analysis.jacobian_product(factors[:, ::-1], anchor, associative=True)
    assert np.abs(other.matrix[:, -1] - fast.matrix[:, -1]).max() > 0.1


def test_products_in_log_depth_are_no_chain():
    """The only loop over steps would be a scan, and there is none."""
    factors = jnp.ones((64, 2, 2))
    for associative in (False, True):
        text = str(jax.make_jaxpr(lambda a, f=associative: analysis.jacobian_product(a, associative=f))(factors))
        assert ("scan[" in text) is not associative and "while[" not in text


def test_product_over_batch_axes():
    run = run_of("lstm-dense", (2, 3))
    jacobians = analysis.step_jacobians(run)
    product = analysis.jacobian_product(jacobians)
    assert product.matrix.shape == (2, 3, 5, 8, 8) and product.log_scale.shape == (2, 3, 5)
    one = jacobians[1, 2]
    close(product.to_dense()[1, 2, 4], one[3] @ one[2] @ one[1] @ one[0])


def test_norms_of_a_shear():
    """||W^k|| grows before it decays, which the bound ||W||^k never sees."""
    shear = jnp.array([[0.9, 1.0], [0.0, 0.9]])
    product = analysis.jacobian_product(jnp.broadcast_to(shear, (100, 2, 2)))
    norms = np.exp(product.log_operator_norm())[[1, 5, 10, 20, 50, 100]]
    np.testing.assert_allclose(norms, [1.5296, 3.3836, 3.9053, 2.7072, 0.2864, 0.0030], atol=5e-5)
    exact = [np.linalg.norm(np.linalg.matrix_power(np.asarray(shear), k), 2) for k in range(101)]
    close(np.exp(product.log_operator_norm()), exact)
    assert np.exp(100 * product.log_operator_norm()[1]) == pytest.approx(2.9e18, rel=0.02)


def test_norms_of_orthogonal_steps_stay():
    cell = rnncore.Elman(7, activation_fn=jax.nn.identity)
    run = analysis.trajectory(cell, cell.init(jax.random.key(3), 2, jnp.float64), jnp.ones((30, 2)))
    product = analysis.jacobian_product(analysis.step_jacobians(run))
    close(product.log10_operator_norm(), np.zeros(31))
    close(product.log_frobenius_norm(), np.full(31, 0.5 * np.log(7)))
    close(np.linalg.svd(product.to_dense(), compute_uv=False), np.ones((31, 7)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("anchor", ["start", "end"])
def test_a_product_that_is_zero_has_the_logarithm_minus_infinity(anchor):
    nilpotent = linear([[0.0, 5.0], [0.0, 0.0]], 4)
    product = analysis.jacobian_product(analysis.step_jacobians(nilpotent), anchor)
    close(np.exp(product.log_operator_norm()[:2]), [1.0, 5.0])
    assert np.all(product.log_operator_norm()[2:] == -np.inf)
    assert np.all(product.log_frobenius_norm()[2:] == -np.inf)
    assert np.all(product.to_dense()[2:] == 0)


@pytest.mark.slow
def test_ten_thousand_steps_in_float32():
    rng = np.random.default_rng(0)
    jacobians = rng.normal(0, 0.05, (10_000, 3, 3)).astype(np.float32)
    want, exact = 0.0, np.eye(3)
    for jacobian in jacobians.astype(np.float64):
        exact = jacobian @ exact
        size = np.abs(exact).max()
        exact, want = exact / size, want + np.log(size)
    for anchor, associative in (("start", False), ("end", False), ("end", True)):
        product = analysis.jacobian_product(jnp.asarray(jacobians), anchor, associative=associative)
        assert product.matrix.dtype == product.log_scale.dtype == jnp.float32
        got = float(product.log_operator_norm()[-1])
        assert want < -20_000 and got == pytest.approx(want + np.log(np.linalg.norm(exact, 2)), rel=1e-6)
    # Powers of two are exact, and so is their scale.
    halves = analysis.jacobian_product(jnp.full((10_000, 1, 1), 0.5, jnp.float32))
    np.testing.assert_allclose(halves.log10_operator_norm(), -np.arange(10_001) * math.log10(2), rtol=1e-6)


def test_scaled_matrix_norms_are_those_of_numpy():
    dense = np.random.default_rng(0).normal(size=(4, 3, 5))
    scaled = ScaledMatrix(jnp.asarray(dense), jnp.array([0.0, 1.0, -700.0, 650.0]))
    close(scaled.log_operator_norm() - scaled.log_scale, np.log(np.linalg.norm(dense, 2, (-2, -1))))
    close(scaled.log_frobenius_norm() - scaled.log_scale, np.log(np.linalg.norm(dense, axis=(-2, -1))))
    close(scaled.log10_frobenius_norm() * np.log(10), scaled.log_frobenius_norm())
    close(scaled.to_dense()[1], np.e * dense[1])
    tall = ScaledMatrix(jnp.swapaxes(scaled.matrix, -1, -2), scaled.log_scale)
    close(tall.log_operator_norm(), scaled.log_operator_norm())


# ------------------------------------------------------------------------------------ errors


def test_a_cell_that_is_not_pointwise_has_no_analytic_route():
    run = run_of("reset_before_gru")
    for call in (lambda: analysis.step_jacobians(run, method="analytic"), lambda: analysis.step_coefficients(run)):
        with pytest.raises(NotImplementedError, match=r"ResetBeforeGRU is not a PointwiseCell.*method='vjp'"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrt": "c"}, r"`step_jacobians\(wrt='c'\)`: expected 'state', 'hidden' or 'cell'"),
        ({"method": "fd"}, r"`step_jacobians\(method='fd'\)`: expected one of 'vjp', 'jvp', 'analytic'"),
        ({"chunk": 0}, r"`step_jacobians\(chunk=0\)`: expected at least 1 step"),
        ({"wrt": "cell"}, r"the carry of GRU has no 'c', only h; use wrt='state'"),
    ],
)
def test_options_of_step_jacobians(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.step_jacobians(run_of("gru-dense"), **options)


@pytest.mark.parametrize(
    ("jacobians", "options", "message"),
    [
        (np.ones((4, 3)), {}, r"expected \(\*batch, T, n, n\)"),
        (np.ones((5, 4, 3)), {}, r"expected \(\*batch, T, n, n\)"),
        (np.ones((5, 3, 3), int), {}, "expected floating point"),
        (np.full((5, 3, 3), np.nan), {}, "holds 45 NaN or infinite numbers"),
        (np.ones((5, 3, 3)), {"anchor": "middle"}, "expected 'end' or 'start'"),
        (np.ones((2, 5, 3, 3)), {"seq_lengths": [5, 6]}, "values from 5 to 6; expected 0 to T = 5"),
    ],
)
def test_bad_jacobians(jacobians, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.jacobian_product(jacobians, **options)


def test_bad_trajectories():
    cell = rnncore.LSTM(3)
    params, xs = cell.init(jax.random.key(0), 2, jnp.float64), jnp.ones((2, 4, 2))
    with pytest.raises(ValueError, match=r"`trajectory\(xs=<int.*embed or convert"):
        analysis.trajectory(cell, params, jnp.ones((2, 4, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"no steps; expected T of at least 1"):
        analysis.trajectory(cell, params, xs[:, :0])
    broken = params._replace(bias=params.bias.at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"`trajectory\(params=...\)`: .bias of shape \(4, 3\) holds 1 NaN"):
        analysis.trajectory(cell, broken, xs)
    with pytest.raises(ValueError, match=r"`trajectory\(xs=...\)`: the array of shape \(2, 4, 2\) holds 4 NaN or inf"):
        analysis.trajectory(cell, params, xs.at[0, :2].set(jnp.inf))
    assert analysis.trajectory(cell, params, xs.astype(jnp.bfloat16)).narrow == "bfloat16"  # taken, in float32
    relu = rnncore.Elman(2, activation_fn=jax.nn.relu)
    huge = jax.tree.map(lambda a: jnp.full_like(a, 1e200), relu.init(jax.random.key(0), 2, jnp.float64))
    with pytest.raises(ValueError, match="the states leave the floating-point range"):
        analysis.trajectory(relu, huge, xs)
