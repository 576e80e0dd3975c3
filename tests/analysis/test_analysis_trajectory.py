"""Trajectories with lengths and resets, one sequence of a batch, and trajectories of Flax models."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis
from rnncore import linen as rnn_linen
from rnncore import nnx as rnn_nnx
from rnncore.analysis import plots

CELL = rnncore.LSTM(3, peepholes=True)
T, LENGTHS = 5, np.array([5, 3, 4])
RESETS = np.zeros((3, T), bool)
RESETS[0, 2] = RESETS[2, 1] = RESETS[2, 4] = True  # the last one lies in the padding


def close(got, want, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@functools.cache
def drawn():
    """(params, xs (3, T, 2), initial carry), random."""
    rng = np.random.default_rng(0)

    def normal(leaf):
        return jnp.asarray(rng.normal(0, 0.6, leaf.shape))

    params = jax.tree.map(normal, CELL.init(jax.random.key(0), 2, jnp.float64))
    xs, carry = jnp.asarray(rng.normal(size=(3, T, 2))), jax.tree.map(normal, CELL.initial_carry((3,), jnp.float64))
    return params, xs, carry


@functools.cache
def run_of(lengths=False, resets=False):
    params, xs, carry = drawn()
    options = {"seq_lengths": LENGTHS} if lengths else {}
    return analysis.trajectory(CELL, params, xs, carry, **options, **({"resets": RESETS} if resets else {}))


def alone(example):
    """One sequence at its own length, without anything else."""
    params, xs, carry = drawn()
    return analysis.trajectory(CELL, params, xs[example, : LENGTHS[example]], jax.tree.map(lambda a: a[example], carry))


def adjoint_of(carry):
    """Some gradient at a carry, by its values alone."""
    return jax.tree.map(jnp.sin, carry)


KINDS = (
    {"kind": "rms"},
    {"kind": "operator", "path": "cell"},
    {"kind": "sigma_min"},
    {"kind": "bound"},
    {"kind": "rms", "path": "direct"},
    {"kind": "adjoint", "path": "cell"},
    {"kind": "operator", "anchor": "start"},
)


# ------------------------------------------------------------------------------------- lengths


@pytest.mark.slow
def test_past_its_length_a_sequence_stands_still():
    params, xs, carry = drawn()
    dirty = xs.at[1, 3:].set(jnp.nan)
    run = analysis.trajectory(CELL, params, dirty, carry, seq_lengths=LENGTHS)
    assert run.lengths.tolist() == LENGTHS.tolist() and run.resets is None
    for example, length in ((0, 5), (1, 3)):
        want = alone(example)
        carries = jax.tree.map(lambda a, e=example: a[e], run.carries)
        close(carries.c[: length + 1], want.carries.c)
        close(carries.c[length:], np.broadcast_to(want.last.c, (T + 1 - length, 3)))
        close(run.last.h[example], want.last.h)
        assert not np.any(run.gates.f[example, length:]) and not np.any(run.xs[example, length:])


@pytest.mark.slow
def test_jacobians_and_products_end_where_each_sequence_ends():
    run = run_of(lengths=True)
    jacobians = analysis.step_jacobians(run)
    close(analysis.step_jacobians(run, method="analytic"), jacobians)
    for associative in (False, True):
        end = analysis.jacobian_product(jacobians, seq_lengths=LENGTHS, associative=associative).to_dense()
        start = analysis.jacobian_product(jacobians, "start", associative=associative).to_dense()
        same = analysis.jacobian_product(jacobians, "start", seq_lengths=LENGTHS, associative=associative).to_dense()
        close(start, same)
        for example, length in tuple(enumerate(LENGTHS))[:2]:
            own = analysis.step_jacobians(alone(example))
            close(jacobians[example, :length], own)
            close(jacobians[example, length:], np.broadcast_to(np.eye(6), (T - length, 6, 6)))
            close(end[example, : length + 1], analysis.jacobian_product(own).to_dense())
            # Further back than its start there is nothing, and the product stays the whole one.
            close(end[example, length:], np.broadcast_to(end[example, length], (T + 1 - length, 6, 6)))
            close(start[example, -1], end[example, -1])


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(o.values()))
def test_retention_stops_at_resets_and_is_that_of_each_sequence_at_its_own_end(options):
    run, most = run_of(lengths=True, resets=True), 3 - (options.get("path") == "cell")

    def curve(run):
        given = {"adjoint": adjoint_of(run.last)} if options["kind"] == "adjoint" else {}
        return np.asarray(analysis.retention_curve(run, lags=most, **options, **given).log_retention)

    got = curve(run)
    assert got.shape == (3, most + 1)
    close(got[1], curve(alone(1)), 1e-10)
    # Sequence 0 has its reset at step 3 of 5, sequence 2 at step 2 of 4.
    for example, reached in ((0, 3), (2, 2 if "anchor" in options else 3)):
        assert np.all(np.isfinite(got[example, :reached])) and np.all(got[example, reached:] == -np.inf)


@pytest.mark.slow
def test_lags_that_the_shortest_sequence_does_not_have():
    run = run_of(lengths=True)
    assert analysis.retention_curve(run).lags.tolist() == [0, 1, 2, 3]
    assert analysis.retention_curve(run, path="cell").lags.tolist() == [0, 1, 2]
    with pytest.raises(
        ValueError, match=r"lags up to 4\)`: the shortest sequence has 3 steps, .* lags 0 to 3 exist for all; ask for"
    ):
        analysis.retention_curve(run, lags=4)
    longer = analysis.retention_curve(run.take([0, 2]), lags=4).log_retention
    close(longer[0], analysis.retention_curve(alone(0), lags=4).log_retention)
    # Inside jit the lengths cannot be seen: no number that could be a retention stands in for one.
    traced = jax.jit(lambda run: analysis.retention_curve(run).log_retention)(run)
    close(traced[:, :4], analysis.retention_curve(run).log_retention)
    missing = np.arange(T + 1) > LENGTHS[:, None]
    assert np.array_equal(np.isposinf(traced), missing) and missing.sum() == 3
    direct = analysis.direct_retention(run)
    assert np.array_equal(np.isposinf(direct), np.broadcast_to(missing[..., None], direct.shape))


@pytest.mark.slow
def test_matrix_free_norms_end_where_each_sequence_ends():
    run = run_of(lengths=True)
    product = analysis.jacobian_product(analysis.step_jacobians(run), seq_lengths=LENGTHS)
    close(analysis.operator_norm(run, 3).log_norm, product.log_operator_norm()[:, 3], 1e-9)
    estimate = analysis.frobenius_norm(run, 3)
    assert np.all(np.abs(estimate.log_norm - product.log_frobenius_norm()[:, 3]) < 4 * estimate.error)
    with pytest.raises(ValueError, match=r"`operator_norm\(lag=4\)`: expected an integer of 0 to 3, the steps of"):
        analysis.operator_norm(run, 4)


# -------------------------------------------------------------------------------------- resets


def test_nothing_passes_a_reset():
    run = run_of(resets=True)
    jacobians = analysis.step_jacobians(run)
    assert not np.any(jacobians[RESETS]) and np.all(np.abs(jacobians[~RESETS]).max((-2, -1)) > 0.01)
    for method in ("jvp", "analytic"):
        close(analysis.step_jacobians(run, method=method), jacobians)
    # Sequence 0 starts again at step 3 from its initial carry: as if it were run from there.
    params, xs, carry = drawn()
    rest = analysis.trajectory(CELL, params, xs[0, 2:], jax.tree.map(lambda a: a[0], carry))
    close(jax.tree.leaves(run.before)[0][0, 2:], rest.carries.c[:-1])
    close(jacobians[0, 3:], analysis.step_jacobians(rest)[1:])
    for associative in (False, True):
        product = analysis.jacobian_product(jacobians, associative=associative)
        logs = product.log_operator_norm()[0]
        assert np.all(np.isfinite(logs[:3])) and np.all(logs[3:] == -np.inf)


def test_the_cell_path_next_to_a_reset_is_that_of_a_fresh_run():
    """h_t follows c_t through the output gate of step t, which saw the carry that the reset put in place."""
    params, xs, carry = drawn()
    elsewhere = jax.tree.map(lambda a: a + 0.3, carry)
    run = analysis.trajectory(CELL, params, xs, carry, resets=RESETS, reset_carry=elsewhere)
    rest = analysis.trajectory(CELL, params, xs[0, 2:], jax.tree.map(lambda a: a[0], elsewhere))
    got = analysis.retention_curve(run, path="cell", lags=2).log_retention[0]
    close(got, analysis.retention_curve(rest, path="cell", lags=2).log_retention)


def test_resets_in_the_padding_play_no_role():
    run = run_of(lengths=True, resets=True)
    assert not run.resets[2, 4] and run.resets[2, 1]
    jacobians = analysis.step_jacobians(run)
    close(jacobians[2, 4], np.eye(6))
    assert not np.any(jacobians[2, 1])
    logs = analysis.retention_curve(run, kind="operator", lags=3).log_retention
    assert np.isfinite(logs[2, 2]) and logs[2, 3] == -np.inf  # steps 4 and 3 of 4, then the reset of step 2
    close(analysis.step_jacobians(run.take(2)), jacobians[2, :4])


def test_a_step_that_knows_of_neither_is_refused():
    from rnncore.analysis.run.flat import flat_step

    for options, named in (({"lengths": True}, "seq_lengths"), ({"resets": True}, "resets")):
        run = run_of(**options)
        with pytest.raises(NotImplementedError, match=rf"of a trajectory with {named}: not supported; .*traj.take"):
            flat_step(run)(jnp.zeros(6), run.zs[0, 0])


# ------------------------------------------------------------------------- picking, batch, time


def test_take_picks_sequences_and_cuts_them_where_they_end():
    run = run_of(lengths=True, resets=True)
    one = run.take(1)
    assert (one.batch_shape, one.steps, one.lengths) == ((), 3, None)
    close(analysis.retention_curve(one).log_retention, analysis.retention_curve(alone(1)).log_retention)
    some = run.take([2, 1])
    assert (some.batch_shape, some.steps, some.lengths.tolist()) == ((2,), 4, [4, 3])
    close(some.carries.c[1, :4], one.carries.c)
    assert run.take(slice(0, 1)).resets.tolist() == RESETS[:1].tolist()
    # Inside jit nothing can be cut.
    assert jax.eval_shape(lambda run: run.take(1), run).lengths.shape == ()
    plain = run_of()
    several = jax.tree.map(lambda a: a[None], (plain.xs, jax.tree.map(lambda a: a[:, 0], plain.carries)))
    several = analysis.trajectory(CELL, plain.params, *several)
    close(several.take((0, 2)).carries.h, plain.carries.h[2])
    for index, message in (
        (3, r"`Trajectory.take\(3\)`: the batch axes are \(3,\); index 3 is out of bounds"),
        ((0, 1), "too many indices"),
        ([], "no sequence of the batch axes"),
    ):
        with pytest.raises(ValueError, match=message):
            run.take(index)
    params, xs, carry = drawn()
    with pytest.raises(ValueError, match="the sequences have length 0, and a trajectory has at least one step"):
        analysis.trajectory(CELL, params, xs, carry, seq_lengths=[5, 0, 2]).take(1)


@pytest.mark.slow
def test_products_of_a_later_start_are_the_later_products():
    """Time shift: leaving out the first steps moves the start, and nothing else."""
    whole = run_of()
    params, xs, _ = drawn()
    late = analysis.trajectory(CELL, params, xs[:, 2:], jax.tree.map(lambda a: a[:, 2], whole.carries))
    curve = analysis.retention_curve(late, kind="bound").log_retention
    close(curve, analysis.retention_curve(whole, kind="bound", lags=3).log_retention)
    jacobians = analysis.step_jacobians(whole)
    close(analysis.step_jacobians(late), jacobians[:, 2:])
    first, rest = (
        analysis.jacobian_product(a, "start").to_dense()[:, -1] for a in (jacobians[:, :2], jacobians[:, 2:])
    )
    close(analysis.jacobian_product(jacobians).to_dense()[:, -1], rest @ first)


def test_sequences_of_a_batch_do_not_see_each_other():
    params, xs, carry = drawn()
    others = xs.at[1:].multiply(-2.0)
    for options in ({}, {"seq_lengths": LENGTHS, "resets": RESETS}):
        runs = [analysis.trajectory(CELL, params, a, carry, **options) for a in (xs, others)]
        got = [analysis.retention_curve(run, kind="operator").log_retention for run in runs]
        assert np.array_equal(got[0][0], got[1][0]) and not np.allclose(got[0][1, 1:], got[1][1, 1:])


# --------------------------------------------------------------------------------- Flax models


def check_flax_model(cell, params, xs, outputs):
    """The trajectory is the Flax run, and its curve the product of autodiff Jacobians of the step."""
    run = analysis.trajectory(cell, params, xs)
    close(run.carries.h[:, 1:], outputs, 1e-6)
    jacobians = analysis.step_jacobians(run, method="analytic")
    close(jacobians, analysis.step_jacobians(run), 1e-6)
    curve = analysis.retention_curve(run, kind="rms")
    n = jacobians.shape[-1]
    want = analysis.jacobian_product(jacobians).log_frobenius_norm() - np.log(n) / 2
    close(curve.log_retention, want, 1e-5)
    assert curve.n == n and np.all(np.isfinite(curve.log_retention))


def test_a_flax_linen_lstm_goes_through():
    layer, xs = flax_linen.RNN(flax_linen.LSTMCell(4)), jnp.asarray(drawn()[1], jnp.float32)
    variables = layer.init(jax.random.key(0), xs)
    cell, params = rnn_linen.functional(layer.cell, variables["params"]["cell"])
    check_flax_model(cell, params, xs, layer.apply(variables, xs))


def test_a_flax_nnx_gru_goes_through():
    layer, xs = flax_nnx.RNN(flax_nnx.GRUCell(2, 4, rngs=flax_nnx.Rngs(0))), jnp.asarray(drawn()[1], jnp.float32)
    check_flax_model(*rnn_nnx.functional(layer.cell), xs, layer(xs))


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_lengths": [5, 6, 1]}, "values from 1 to 6; expected 0 to T = 5"),
        ({"seq_lengths": [5, 4]}, r"expected the batch shape \(3,\)"),
        ({"resets": np.zeros((3, T))}, r"`unroll\(resets=<float64 \(3, 5\)>\)`: expected bool \(3, 5\)"),
        ({"resets": RESETS[:, :4]}, r"expected bool \(3, 5\)"),
    ],
)
def test_bad_lengths_and_resets(options, message):
    params, xs, carry = drawn()
    with pytest.raises(ValueError, match=message):
        analysis.trajectory(CELL, params, xs, carry, **options)


def takers() -> dict[str, functools.partial]:
    """Every public function that takes a trajectory first, with something for all else that it needs."""
    functions = {name: f for module in (analysis, plots) for name, f in vars(module).items() if inspect.isfunction(f)}
    found = {}
    for name, function in functions.items():
        first, *rest = inspect.signature(function).parameters.values()
        if "Trajectory" in str(first.annotation):
            found[name] = functools.partial(function, **{p.name: 1 for p in rest if p.default is p.empty})
    return found


def test_what_is_no_trajectory_is_refused_in_words():
    params, xs, _ = drawn()
    runs, layer = {"a": run_of(), "b": run_of()}, rnn_linen.LSTM(3)
    wrong = {
        "<CellParams>": params, "<LSTM>": layer, "<dict of 'a', 'b'>.*pass one of the layers": runs,
        r"<float64 \(3, 5, 2\)>": xs, "<RecurrentLayer>.*pass its `.run`": analysis.RecurrentLayer(
            "a", CELL, params, runs["a"], False, "float64"
        ),
    }  # fmt: skip
    assert len(takers()) >= 18
    for name, function in takers().items():
        for got, value in wrong.items():
            if name == "effective_window" and value is xs:
                continue  # gradients
            with pytest.raises(ValueError, match=rf"`{name}\((traj=)?{got}") as caught:
                function(value)
            assert "expected a `Trajectory`" in str(caught.value)


def test_results_show_their_arrays_by_shape():
    run = run_of()
    assert repr(analysis.operator_norm(run, 2)) == "NormEstimate(log_norm=float64[3], error=float64[3])"
    assert repr(analysis.gate_statistics(run)["f"]).startswith("GateStatistics(unit=GateSummary(mean=float64[3], quant")
    results = [value for value in vars(analysis).values() if hasattr(value, "_fields")]
    plain = {value.__name__ for value in results if value.__repr__.__module__ == "collections"}
    assert plain == {"VanishingCondition", "DecayRate", "HalfLife", "LineFit", "CurveFit"}  # numbers only
