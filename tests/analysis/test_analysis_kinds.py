"""Kinds of retention beside the plain ones: smallest singular values, iterated norms, empty gradients, conditions."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import analysis
from rnncore.analysis import RetentionCurve
from rnncore.analysis.retention._lanczos import top_right_vectors


def close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


def random_run(cell, dtype=jnp.float64, batch=(2,), steps=6, scale=0.6):
    rng = np.random.default_rng(0)

    def normal(leaf):
        return jnp.asarray(rng.normal(0, scale, leaf.shape), dtype)

    params = jax.tree.map(normal, cell.init(jax.random.key(0), 3, dtype))
    return analysis.trajectory(cell, params, jnp.asarray(rng.normal(size=(*batch, steps, 3)), dtype))


def linear(matrix, steps, dtype=jnp.float64):
    """A trajectory of h_t = W h_{t-1}: every step Jacobian is W."""
    matrix = jnp.asarray(matrix, dtype)
    cell = rnncore.Elman(len(matrix), activation_fn=jax.nn.identity)
    params = cell.init(jax.random.key(0), 1, dtype)._replace(recurrent_kernel=matrix.T[:, None, :])
    return analysis.trajectory(cell, params, jnp.zeros((steps, 1), dtype))


# --------------------------------------------------------------------- the smallest singular value


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("anchor", ["end", "start"])
def test_sigma_min_is_that_of_the_product(anchor):
    run = random_run(rnncore.LSTM(3))
    dense = np.asarray(analysis.jacobian_product(analysis.step_jacobians(run), anchor).to_dense())
    want = np.linalg.svd(dense, compute_uv=False)[..., -1]
    curve = analysis.retention_curve(run, kind="sigma_min", anchor=anchor)
    # What NumPy finds is known to the rounding of the largest one only.
    np.testing.assert_allclose(np.exp(curve.log_retention), want, rtol=1e-9, atol=1e-14)
    assert np.all(want[:, 2] > 1e-6) and curve.norm == "smallest singular value"
    if anchor == "end":
        some = analysis.retention_curve(run, kind="sigma_min", lags=(1, 4))
        close(some.log_retention, curve.log_retention[:, [1, 4]])


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_sigma_min_keeps_its_digits_where_the_product_has_lost_them(dtype):
    """Singular values 2 and 1/4 in turned directions: after 50 steps 27 decades apart, and 270 after 300."""
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    run = linear(turn @ np.diag([2.0, 0.25]) @ turn.T, 300, dtype)
    logs = analysis.retention_curve(run, kind="sigma_min", lags=(0, 50, 300)).log_retention
    np.testing.assert_allclose(logs, -np.array([0, 50, 300]) * math.log(4), rtol=3e-6)


def test_sigma_min_of_units_that_forget_at_very_different_rates():
    logs = analysis.retention_curve(linear(np.diag([1.0, 1e-20]), 3), kind="sigma_min").log_retention
    close(logs, np.arange(4) * math.log(1e-20))


@pytest.mark.sample(1)
@pytest.mark.parametrize("anchor", ["end", "start"])
def test_sigma_min_of_a_singular_step_is_minus_infinity(anchor):
    for run in (
        linear([[0.0, 5.0], [0.0, 0.0]], 4),
        linear([[1.0, 2.0], [0.5, 1.0]], 4, jnp.float32),
        random_run(rnncore.LSTM(3), scale=0.0),  # U = 0: half of the columns are zero
        at_the_origin(random_run(rnncore.LSTM(3))),
    ):
        logs = np.asarray(analysis.retention_curve(run, kind="sigma_min", anchor=anchor).log_retention)
        assert np.all(logs[..., 0] == 0) and np.all(logs[..., 1:] == -np.inf)


def at_the_origin(run):
    """Where c stays 0 the rows of h are those of c times o, up to rounding: singular, and no pivot is exactly 0."""
    params = run.params._replace(bias=run.params.bias.at[run.cell.gates.index("g")].set(0.0))
    run = analysis.trajectory(run.cell, params, 0 * run.xs)
    assert not np.any(run.carries.c) and np.all(run.gates.o % 0.125)
    return run


def test_sigma_min_of_the_direct_path_and_not_of_the_cell_path():
    run = random_run(rnncore.LSTM(3))
    want = np.asarray(analysis.direct_retention(run)).min(-1)
    close(analysis.retention_curve(run, kind="sigma_min", path="direct").log_retention, want)
    with pytest.raises(NotImplementedError, match="is lost in the rounding of its largest; use path='state'"):
        analysis.retention_curve(run, kind="sigma_min", path="cell")


# -------------------------------------------------------------------------- norms by iteration


@pytest.mark.sample(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 3e-6)])
def test_norms_by_iteration_are_those_of_numpy(dtype, tolerance):
    """Larger than the basis, and all that is hard: close, equal, tiny, huge, of rank one, zero."""
    rng, n = np.random.default_rng(0), 40
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    values = np.linspace(0.1, 1, n)
    near = np.concatenate([values[:-2], [1 - 1e-4, 1]])
    # Squares of 1e-25 and 1e25 leave the range of float32.
    matrices = [left @ np.diag(s) @ right for s in (values, near, np.ones(n), 1e-25 * values, 1e25 * near)]
    matrices += [rng.normal(size=(n, n)), np.outer(left[0], right[1]), np.zeros((n, n))]
    a = jnp.asarray(np.stack(matrices), dtype)

    def gram(v):
        from rnncore.analysis.jacobians.products import renormalise

        none = jnp.zeros(len(v), jnp.int32)
        w, there = renormalise(jnp.einsum("nij,nj->ni", a, v, precision="highest")[:, None], none)
        w, back = renormalise(jnp.einsum("nij,ni->nj", a, w[:, 0], precision="highest")[:, None], there)
        return w[:, 0], back

    found, residual = jax.jit(lambda: top_right_vectors(gram, len(a), n, dtype))()
    assert found.dtype == dtype and np.all(residual < 2e-4)
    got = np.linalg.norm(np.einsum("nij,nj->ni", np.asarray(a, np.float64), np.asarray(found, np.float64)), axis=-1)
    np.testing.assert_allclose(got, np.linalg.norm(np.stack(matrices), 2, (-2, -1)), rtol=tolerance, atol=1e-30)
    close(np.linalg.norm(found, axis=-1), np.ones(len(a)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_the_bound_is_the_product_of_the_exact_norms(dtype, tolerance):
    """More steps than go together in one group, of a state that is larger than the basis."""
    run = random_run(rnncore.LSTM(16), dtype, (3,), 100)
    steps = np.linalg.norm(np.asarray(analysis.step_jacobians(run), np.float64), 2, (-2, -1))
    anchor, order = ("end", slice(None, None, -1)) if dtype == jnp.float64 else ("start", slice(None))
    want = np.cumsum(np.log(steps[:, order]), -1)
    curve = analysis.retention_curve(run, kind="bound", anchor=anchor)
    np.testing.assert_allclose(curve.log_retention[:, 1:], want, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_bound_forms_no_jacobian_and_has_a_derivative():
    run = random_run(rnncore.LSTM(37), batch=(), steps=3)
    text = str(jax.make_jaxpr(lambda run: analysis.retention_curve(run, kind="bound").log_retention)(run))
    assert "74,74" not in text and "24,74" in text
    cell, params, xs = rnncore.GRU(3), random_run(rnncore.GRU(3)).params, jnp.ones((4, 3))

    def last(shift, kind):
        moved = params._replace(recurrent_kernel=params.recurrent_kernel + shift)
        run = analysis.trajectory(cell, moved, xs)
        if kind == "bound":
            return analysis.retention_curve(run, kind="bound", lags=(4,)).log_retention[0]
        steps = jnp.linalg.svd(analysis.step_jacobians(run), compute_uv=False)[:, 0]
        return jnp.sum(jnp.log(steps))

    got, want = (jax.jit(jax.value_and_grad(lambda s, k=k: last(s, k)))(0.0) for k in ("bound", "svd"))
    close(got, want, 1e-9)


@pytest.mark.slow
def test_matrix_free_norms_are_those_of_the_product():
    run, anchor = random_run(rnncore.LSTM(16), batch=(2, 1), steps=8), "start"
    operator = analysis.retention_curve(run, kind="operator", anchor=anchor, lags=(5,)).log_retention[..., 0]
    got = analysis.operator_norm(run, 5, anchor=anchor)
    close(got.log_norm, operator)
    assert got.log_norm.shape == (2, 1) and np.all(got.error < 1e-8)
    close(got.log10, np.asarray(got.log_norm) / math.log(10))
    rms = analysis.retention_curve(run, kind="rms", anchor=anchor, lags=(5,)).log_retention[..., 0]
    estimate = analysis.frobenius_norm(run, 5, anchor=anchor, probes=400, key=jax.random.key(3))
    missed = np.abs(estimate.log_norm - math.log(32) / 2 - rms)
    assert np.all(missed < 4 * estimate.error) and np.all(estimate.error <= 1.2 / math.sqrt(800))
    assert np.all(estimate.error > 0.001)


def test_standard_errors_of_probes_are_their_spread():
    """Over 200 keys the estimates scatter by what each of them says."""
    run = random_run(rnncore.GRU(5), batch=(), steps=3)
    estimate = jax.jit(jax.vmap(lambda key: analysis.frobenius_norm(run, 3, probes=20, key=key)))
    logs, errors = estimate(jax.random.split(jax.random.key(0), 200))
    assert float(errors.mean()) == pytest.approx(float(logs.std(ddof=1)), rel=0.2)


@pytest.mark.slow
def test_matrix_free_norms_of_ten_thousand_steps_in_float32():
    run = linear([[0.0, 0.5], [-0.5, 0.0]], 10_000, jnp.float32)
    want = -10_000 * math.log(2)
    assert float(analysis.operator_norm(run, 10_000).log_norm) == pytest.approx(want, rel=1e-6)
    estimate = analysis.frobenius_norm(run, 10_000)
    assert float(estimate.log_norm) == pytest.approx(want + math.log(2) / 2, rel=1e-6)
    assert float(estimate.error) == pytest.approx(0, abs=1e-6)  # a multiple of an isometry has no spread
    nilpotent = linear([[0.0, 5.0], [0.0, 0.0]], 4)
    assert float(analysis.operator_norm(nilpotent, 1).log_norm) == pytest.approx(math.log(5))
    for norm in (analysis.operator_norm, analysis.frobenius_norm):
        estimate = norm(nilpotent, 2)
        assert estimate.log_norm == -np.inf and estimate.error == 0
        assert float(norm(nilpotent, 0).log_norm) == pytest.approx(
            0 if norm is analysis.operator_norm else math.log(2) / 2
        )


def test_bad_arguments_of_matrix_free_norms():
    run = linear(np.eye(2), 4)
    for call, message in (
        (lambda: analysis.operator_norm(run, 5), r"`operator_norm\(lag=5\)`: expected an integer of 0 to 4, the steps"),
        (lambda: analysis.frobenius_norm(run, -1), r"`frobenius_norm\(lag=-1\)`: expected an integer of 0 to 4"),
        (lambda: analysis.frobenius_norm(run, 2, anchor="top"), "expected 'end' or 'start'"),
        (lambda: analysis.frobenius_norm(run, 2, probes=1), r"probes=1\)`: expected at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------- closed forms, in either precision


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.float32, 2e-5)])
def test_closed_forms_of_linear_networks(dtype, tolerance):
    kinds = ("operator", "rms", "sigma_min", "bound")
    rotation = np.array([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    run = linear(rotation, 100, dtype)
    for kind in kinds:
        close(analysis.retention_curve(run, kind=kind).log_retention, np.zeros(101), tolerance)
    scalar = linear(0.9 * np.eye(2), 100, dtype)
    for kind in kinds:
        curve = analysis.retention_curve(scalar, kind=kind)
        assert curve.fit().chosen.rate == pytest.approx(0.105361, abs=1e-6)
        assert curve.half_life().crossing == pytest.approx(6.5788, abs=2e-4)
        assert math.exp(curve.log_retention[100]) == pytest.approx(2.656e-5, rel=1e-3)
    shear, lags = linear([[0.9, 1.0], [0.0, 0.9]], 100, dtype), np.array([1, 5, 10, 20, 50, 100])
    logs = {kind: analysis.retention_curve(shear, kind=kind).log_retention[lags] for kind in kinds}
    norms = [1.5296, 3.3836, 3.9053, 2.7072, 0.2864, 0.0030]
    np.testing.assert_allclose(np.exp(logs["operator"]), norms, atol=6e-5)
    assert float(logs["bound"][-1]) == pytest.approx(math.log(2.9e18), rel=1e-3)
    # The determinant is the product of both singular values.
    close(logs["operator"] + logs["sigma_min"], 2 * lags * math.log(0.9), 20 * tolerance)


# ------------------------------------------------------------------------- gradients of nothing


@pytest.mark.sample(1)
@pytest.mark.parametrize("path", ["state", "cell", "direct"])
def test_a_sequence_without_a_gradient_is_named_and_left_out(path):
    run = random_run(rnncore.LSTM(3), batch=(3,))
    v = jax.tree.map(jnp.ones_like, run.last)
    none = jax.tree.map(lambda a: a.at[1].set(0.0), v)
    # Lag 0 shows which sequence it is, and is not among the lags everywhere.
    options = {"path": path, "lags": None if path == "direct" else (2, 4)}
    whole, curve = (analysis.retention_curve(run, kind="adjoint", adjoint=a, **options) for a in (v, none))
    assert curve.without_gradient.tolist() == [False, True, False] and not np.any(whole.without_gradient)
    assert np.all(curve.log_retention[1] == -np.inf)
    others = np.asarray(whole.log_retention)[[0, 2]]
    close(curve.log_retention[jnp.array([0, 2])], others)
    close(curve.mean_log(), others.mean(0))
    close(curve.log_mean(), np.log(np.exp(others).mean(0)))
    close(whole.mean_log(), np.asarray(whole.log_retention).mean(0))
    summary = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert summary["without_gradient"] == [1] and summary["sequences"] == 3
    assert curve.decay_rate((2, 4)).rate == whole_rate(others, np.asarray(curve.lags))


def whole_rate(logs, lags):
    """The rate of the mean of some sequences from lag 2 to 4."""
    inside = (lags >= 2) & (lags <= 4)
    return pytest.approx(-np.polyfit(lags[inside], logs.mean(0)[inside], 1)[0])


@pytest.mark.slow
def test_no_gradient_at_all():
    run = random_run(rnncore.GRU(3))
    nothing = jax.tree.map(jnp.zeros_like, run.last)
    with pytest.raises(ValueError, match="the gradient at lag 0 is zero in every sequence; take the gradient"):
        analysis.retention_curve(run, kind="adjoint", adjoint=nothing)
    curve = jax.jit(lambda run, v: analysis.retention_curve(run, kind="adjoint", adjoint=v))(run, nothing)
    assert np.all(curve.log_retention == -np.inf) and np.all(curve.mean_log() == -np.inf)
    assert np.all(curve.without_gradient) and np.all(curve.log_mean() == -np.inf)
    assert analysis.retention_curve(run).without_gradient is None


def test_typical_and_dominant_retention():
    """One sequence in a hundred that explodes rules the log of the mean and hardly moves the mean of the logs."""
    lags = jnp.arange(51)
    logs = jnp.concatenate([jnp.broadcast_to(-0.1 * lags, (99, 51)), (0.2 * lags)[None]])
    curve = RetentionCurve(lags, logs, "rms", "state", "end", "", 1, "float64")
    assert curve.fit(window=(40, 50)).chosen.rate == pytest.approx(0.097)
    assert curve.fit(window=(40, 50), average="log_mean").exponential.rate == pytest.approx(-0.2, rel=1e-3)


# ------------------------------------------------------------------------- conditions by weights


def elman(matrix, activation, **options):
    cell = rnncore.Elman(len(matrix), activation_fn=activation, **options)
    params = cell.init(jax.random.key(0), 2, jnp.float64)
    return cell, params._replace(recurrent_kernel=jnp.asarray(matrix).T[:, None, :])


def test_vanishing_condition_of_pascanu():
    rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    shear = np.array([[0.9, 1.0], [0.0, 0.9]])
    for matrix, activation, threshold, vanishes, explodes in (
        (0.99 * rotation, jnp.tanh, 1.0, True, False),
        (1.01 * rotation, jnp.tanh, 1.0, False, True),
        (3.99 * rotation, jax.nn.sigmoid, 4.0, True, False),
        (4.01 * rotation, jax.nn.sigmoid, 4.0, False, True),
        (shear, jnp.tanh, 1.0, False, True),  # the radius is below 1 and says nothing here
        (shear, jax.nn.identity, 1.0, True, False),
        (1.2 * shear, jax.nn.identity, 1.0, False, True),
    ):
        cell, params = elman(matrix, activation)
        said = analysis.vanishing_condition(cell, params)
        assert said.threshold == threshold == 1 / said.slope
        assert (said.vanishing_guaranteed, said.explosion_possible) == (vanishes, explodes)
        assert said.largest_singular_value == pytest.approx(np.linalg.norm(matrix, 2))
        assert said.spectral_radius == pytest.approx(np.abs(np.linalg.eigvals(matrix)).max())
        bound = float(analysis.gradient_bound(cell, params))
        assert bound == pytest.approx(said.slope * said.largest_singular_value)
    assert all(type(x) in (float, bool) for x in said)


def test_what_the_condition_promises_happens():
    """Guaranteed to vanish: it does, on any inputs.  Possible to explode: here it does."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    xs = jnp.asarray(rng.normal(0, 0.01, (60, 2)))
    for scale, vanishes in ((0.9, True), (1.1, False)):
        cell, params = elman(scale * rotation, jnp.tanh)
        said = analysis.vanishing_condition(cell, params)
        assert said.vanishing_guaranteed is vanishes and said.explosion_possible is not vanishes
        logs = analysis.retention_curve(
            analysis.trajectory(cell, params, xs), kind="operator", lags=(20,), anchor="start"
        )
        if vanishes:
            assert float(logs.log_retention[0]) <= 20 * math.log(0.9)
        else:
            assert float(logs.log_retention[0]) > 0


@pytest.mark.slow
def test_vanishing_condition_of_other_cells_and_options():
    matrix = np.array([[-0.5, 0.0], [0.0, -0.8]])
    residual = analysis.vanishing_condition(*elman(matrix, jnp.tanh, residual=True))
    assert residual.largest_singular_value == pytest.approx(0.5) and residual.vanishing_guaranteed
    cell = rnncore.IndRNN(3)
    params = cell.init(jax.random.key(0), 2)._replace(recurrent_kernel=jnp.array([[0.5, -1.5, 1.0]]))
    diagonal = analysis.vanishing_condition(cell, params)
    assert diagonal.spectral_radius == diagonal.largest_singular_value == 1.5 and diagonal.explosion_possible
    cell, params = elman(matrix, jax.nn.softplus)
    assert analysis.vanishing_condition(cell, params, slope=1.0).vanishing_guaranteed
    assert analysis.vanishing_condition(cell, params, slope=0.0).threshold == math.inf
    with pytest.raises(ValueError, match=r"`vanishing_condition` of a cell with activation_fn=softplus: .*slope="):
        analysis.vanishing_condition(cell, params)
    with pytest.raises(ValueError, match=r"`vanishing_condition\(slope=inf\)`: expected max"):
        analysis.vanishing_condition(cell, params, slope=math.inf)
    with pytest.raises(ValueError, match="holds 4 NaN or infinite numbers; find out where"):
        broken = params._replace(recurrent_kernel=params.recurrent_kernel * jnp.nan)
        analysis.vanishing_condition(cell, broken, slope=1.0)
    with pytest.raises(ValueError, match="expected arrays with values; call it outside jit"):
        jax.eval_shape(lambda params: analysis.vanishing_condition(cell, params, slope=1.0).slope, params)
    gated = rnncore.GRU(2)
    with pytest.raises(NotImplementedError, match=r"`vanishing_condition\(GRU\)`: expected rnncore.Elman"):
        analysis.vanishing_condition(gated, gated.init(jax.random.key(0), 2))
