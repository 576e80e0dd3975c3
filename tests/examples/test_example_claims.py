"""The examples that check a claim: their networks are those they name, their verdicts follow from closed forms."""

from __future__ import annotations

import math

import example_runs
import jax
import numpy as np
import pytest

import rnncore
import rnncore.analysis
from rnncore import initializers

TINY = ("--hidden", "6", "--inputs", "2", "--lags", "12", "--seeds", "2", "--burn-in", "2")
CORPUS = "the quick brown fox jumps over the lazy dog. " * 120


@pytest.fixture(scope="module")
def claims():
    return example_runs.load("_claims")


def stop_after(count: int):
    """A measurement that is interrupted after so many calls."""

    def wrap(measure):
        calls = []

        def measured(*args):
            calls.append(args)
            if len(calls) > count:
                raise KeyboardInterrupt
            return measure(*args)

        return measured

    return wrap


# ---------------------------------------------------------------------------------- the networks


def test_pytorch_default_has_its_edges_and_two_biases(claims):
    cell, params = claims.torch("LSTM")(64, 8, jax.random.key(0))
    edge = 64**-0.5
    for kernel in (params.input_kernel, params.recurrent_kernel):
        assert kernel.dtype == np.float64 and 0.98 * edge < np.abs(kernel).max() <= edge
        np.testing.assert_allclose(np.var(kernel), edge**2 / 3, rtol=0.1)
    # The sum of two uniform numbers: twice the variance of one, and beyond its edge.
    np.testing.assert_allclose(np.var(params.bias), 2 * edge**2 / 3, rtol=0.25)
    assert edge < np.abs(params.bias).max() <= 2 * edge
    both = claims.torch("LSTM", 2.0)(64, 8, jax.random.key(0))[1]
    assert (both.bias[cell.gates.index("f")] == 2).all()
    np.testing.assert_array_equal(both.bias[2:], params.bias[2:])
    np.testing.assert_array_equal(both.recurrent_kernel, params.recurrent_kernel)


def test_keras_draws_one_orthogonal_matrix_over_all_gates(claims):
    cell, params = claims.keras("LSTM")(8, 3, jax.random.key(0))
    whole = np.asarray(params.recurrent_kernel).reshape(8, 32)
    np.testing.assert_allclose(whole @ whole.T, np.eye(8), atol=1e-12)
    assert np.abs(params.recurrent_kernel[:, 0] @ params.recurrent_kernel[:, 0].T - np.eye(8)).max() > 0.1
    assert (params.bias[cell.gates.index("f")] == 1).all() and params.bias.sum() == 8
    assert np.abs(params.input_kernel).max() <= math.sqrt(6 / (3 + 32))
    assert (claims.keras("RNN")(8, 3, jax.random.key(0))[1].bias == 0).all()


def test_orthogonal_is_so_gate_by_gate(claims):
    _, params = claims.orthogonal("LSTM", initializers.forget_bias(3.0))(8, 3, jax.random.key(0))
    for gate in range(4):
        block = np.asarray(params.recurrent_kernel[:, gate])
        np.testing.assert_allclose(block @ block.T, np.eye(8), atol=1e-12)
    np.testing.assert_array_equal(params.bias, np.repeat([[0.0], [3.0], [0.0], [0.0]], 8, 1))


def test_quartiles_hold_what_is_exactly_nothing(claims):
    assert claims.quartiles([4.0, 1.0, 2.0, 3.0]) == [1.75, 2.5, 3.25]
    assert claims.quartiles([-math.inf, -math.inf, 0.0]) == [-math.inf, -math.inf, 0.0]
    assert claims.exponent(-2.04) == "10^-2.0" and claims.exponent(-math.inf) == "0"


# ----------------------------------------------------------------------------------- explosion


def test_explosion_has_the_radius_that_is_derived_and_crosses_at_ln_3(tmp_path):
    example = example_runs.load("claim_explosion")
    options = ("--hidden", "16", "--inputs", "2", "--lags", "60", "--seeds", "1", "--points", "7", "--scales", "0")
    run = example_runs.run(example, tmp_path / "d", *options)
    assert run.code == 0 and run.results["critical_bias"] == pytest.approx(math.log(3))
    radius, found = run.results["radius"], run.results["runs"]["0"]
    # The largest |f + lambda / 4| is f + 1/4 where one lambda is 1, and the 16 of this draw come near to that.
    assert np.all(np.array(radius["computed"]) <= np.array(radius["derived"]) + 1e-9)
    np.testing.assert_allclose(radius["computed"], radius["derived"], rtol=0.015)
    # b_f = -1 .. 5; the operator norm of a product grows as the radius does, up to a transient.
    np.testing.assert_allclose(found["operator_slope"], np.log(radius["computed"]), atol=0.01)
    np.testing.assert_allclose(found["direct_slope"], np.log(np.array(radius["derived"]) - 0.25), atol=1e-6)
    assert [slope > 0 for slope in found["rms_slope"]] == [False] * 3 + [True] * 4
    assert max(found["largest_gate"]) < 1 and "verdict: FALSE" in run.printed
    assert example.crossing([0.0, 1.0, 2.0], [-1.0, -0.5, 0.5]) == 1.5
    assert example.crossing([0.0, 1.0], [0.5, 1.0]) is None


# ---------------------------------------------------------------------------------- four terms


def test_finite_differences_side_with_the_exact_product(tmp_path):
    example = example_runs.load("claim_four_terms")
    run = example_runs.run(example, tmp_path / "c", *"--hidden 5 --lags 12 --steps 20 --batch 8".split())
    assert run.code == 0 and list(run.results["runs"]) == list(example.STAGES)
    for found in run.results["runs"].values():
        one, two, ten = (found["differences"][lag] for lag in ("1", "2", "10"))
        assert max(errors["state"] for errors in (one, two, ten)) < 1e-8
        assert one["one_step_total"] < 1e-8 < 1e-3 < two["one_step_total"] < ten["one_step_total"]
        assert one["direct"] > 0.05
        assert found["one_step_total_error"][0] < 1e-12
        assert 1e-3 < found["residual"]["low"] <= found["residual"]["median"] <= found["residual"]["high"] < 1
    first, second = run.results["runs"].values()
    assert first["state"] != second["state"]
    assert "verdict: the product of state Jacobians alone" in run.printed


def test_terms_of_ones_own_choice_are_those_of_the_run():
    example = example_runs.load("claim_four_terms")
    for terms in ((0.1, 0.7, 0.1, 0.1), (0.05, 0.6, -0.1, 0.2)):
        np.testing.assert_allclose(10 ** example.chosen(*terms, 50), sum(terms) ** np.arange(51), rtol=1e-9)
        cell, params, carry = example.with_terms(*terms)
        run = rnncore.analysis.trajectory(cell, params, jax.numpy.zeros((3, 1)), carry)
        found = rnncore.analysis.lstm_paths(run).terms()
        named = [found[name] for name in ("via_forget", "forget_direct", "via_input", "via_candidate")]
        np.testing.assert_allclose(np.ravel(named).reshape(4, -1), np.broadcast_to(np.array(terms)[:, None], (4, 2)))


def test_the_adding_problem_has_one_mark_in_each_half():
    example = example_runs.load("claim_four_terms")
    batch = example.draw_batch(np.random.default_rng(0), 500, 11)
    marks = batch.xs[..., 1]
    assert (marks[:, :5].sum(1) == 1).all() and (marks[:, 5:].sum(1) == 1).all()
    np.testing.assert_allclose(batch.targets, batch.xs.prod(-1).sum(1))
    assert batch.targets.var() == pytest.approx(1 / 6, rel=0.15)


# ------------------------------------------------------------------------------ initialisation


def test_initialisation_measures_all_and_says_where_a_claim_holds(tmp_path):
    example = example_runs.load("claim_initialisation")
    run = example_runs.run(example, tmp_path / "a", *TINY, "--scales", "0", "1")
    runs = run.results["runs"]
    assert run.code == 0 and list(runs) == list(example.networks(12)) and len(runs) == 13
    # Without input and biases every Jacobian is the orthogonal matrix itself.
    still = runs["RNN, orthogonal, LeCun inputs"]["scales"]["0"]
    np.testing.assert_allclose([*still["rms"], *still["operator"], *still["slope"]], 0, atol=1e-6)
    for bias in range(4):
        found = runs[f"LSTM, orthogonal, b_f = {bias}"]["scales"]["0"]
        gate = 1 / (1 + math.exp(-bias))
        np.testing.assert_allclose(found["direct"], 12 * math.log10(gate), rtol=1e-6)
        assert found["operator"][1] == pytest.approx(12 * math.log10(gate + 0.25), abs=0.9)
    assert all("direct" not in scale for e in runs.values() if e["network"] == "RNN" for scale in e["scales"].values())
    every = [three for entry in runs.values() for found in entry["scales"].values() for three in found.values()]
    assert all(low <= middle <= high for low, middle, high in every)
    example_runs.check_partial(example, run.results | {"runs": dict(list(runs.items())[:2])}, tmp_path)


def test_initialisation_verdict_counts_what_lies_within_half_a_decade():
    example = example_runs.load("claim_initialisation")

    def entry(rms, direct):
        return {"network": "LSTM", "scales": {"1": {"rms": [rms] * 3, "operator": [9.0] * 3, "direct": [direct] * 3}}}

    runs = {"a": entry(-2.4, -9.0), "b": entry(-2.6, -2.0), "c": entry(7.0, 0.0)}
    results = {"settings": {"lags": 100}, "runs": runs}
    text = example.verdict(results, "LSTM")
    assert "at 1 of 3 settings" in text and "from 10^-2.6 (b, inputs of std 1) to 10^7.0 (c" in text
    assert text.count("holds:") == 2 and "holds: b, inputs of std 1: direct 10^-2.0" in text
    assert "not measured" in example.verdict(results, "RNN")


# -------------------------------------------------------------------------------------- advice


def test_advice_is_audited(tmp_path):
    example = example_runs.load("claim_advice")
    run = example_runs.run(example, tmp_path / "e", *TINY)
    runs = run.results["runs"]
    assert run.code == 0 and len(runs) == len(example.audit())
    clipped = [record for name, record in runs.items() if name.startswith("clip")]
    for record in clipped:
        np.testing.assert_allclose(record["change"], 0, atol=1e-6)
        assert min(record["norm_before"]) > 10
        np.testing.assert_allclose(record["norm_after"], example.CLIP, rtol=1e-5)
    forget = [record["change"][1] for name, record in runs.items() if name.startswith("forget")]
    assert 0 < forget[0] < forget[1]
    for record in runs.values():
        if record["advice"] == "output bias -6":
            gaps = [record[f"cell_{when}"][1] - record[f"direct_{when}"][1] for when in ("before", "after")]
            assert abs(gaps[1]) < 0.25 < gaps[0]
    assert runs["output bias -6: orthogonal, b_f = 3, no input"]["change"][1] < -0.3
    assert "sets 0 of 4" in run.printed and "keeps less" in run.printed


def test_advice_knows_what_is_no_effect():
    example = example_runs.load("claim_advice")
    told = [example.effect({"change": [0.0, change, 0.0]}) for change in (0.04, -0.04, 2.0, -1.0)]
    assert told == ["no effect", "no effect", "keeps more: +2.0 decades", "keeps less: -1.0 decades"]


# ------------------------------------------------------------------------------ language model


def test_language_model_trains_measures_and_judges(tmp_path, monkeypatch):
    example = example_runs.load("claim_language_model")
    monkeypatch.setattr(example, "NETWORKS", {"LSTM, both forget biases 1": ("lstm", 2.0)})
    (tmp_path / "text").write_text(CORPUS)
    options = "--hidden 4 --embed 3 --length 10 --batch 8 --positions 3 --steps 63".split()
    run = example_runs.run(example, tmp_path / "b", *options, "--text", str(tmp_path / "text"))
    (entry,) = run.results["runs"].values()
    assert run.code == 0 and run.results["text"]["steps_of_a_pass"] == 60
    assert list(entry["stages"]) == list(example.STAGES)
    first, *_, last = entry["stages"].values()
    assert last["loss_nats"] < first["loss_nats"] and last["curve"]["lags"] == list(range(1, 129))
    assert set(first["fits"]) == {f"{a} {w[0]}-{w[1]}" for a in example.AVERAGES for w in example.WINDOWS}
    assert first["curve"]["path"] == "cell" and "holds in" in run.printed


def test_language_model_starts_as_pytorch_does():
    example = example_runs.load("claim_language_model")
    model = example.base.LanguageModel("lstm", 9, 4, 16)
    start = example.base.initialise(model, 0)
    cell = example.as_torch(start, 16, 2.0, 0)["rnn"]["cell"]
    kernels = np.concatenate([np.ravel(gate["kernel"]) for gate in cell.values()])
    assert 0.9 * 0.25 < np.abs(kernels).max() <= 0.25
    assert (cell["hf"]["bias"] == 2).all() and 0.25 < np.abs(cell["hi"]["bias"]).max() <= 0.5


def test_language_model_verdict_asks_for_the_exponential_and_its_rate():
    example = example_runs.load("claim_language_model")

    def fit(model, rate):
        return {"model": model, "exponential": {"rate": rate}}

    fits = {"mean_log 5-40": fit("exponential", 0.012), "mean_log 40-100": fit("power", 0.01),
            "log_mean 5-40": fit("exponential", 0.013), "log_mean 40-100": {"error": "nothing left"}}  # fmt: skip
    text = example.verdict("x", {"kind": "lstm", "stages": {"after training": {"fits": fits}}})
    assert "holds in 1 of 3 fits (rates from +0.0100 to +0.0130 per step)" in text
    assert "after training, lags 5-40, mean of ln R: 0.0120" in text


# -------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(("name", "count"), [("claim_explosion", 3), ("claim_initialisation", 3), ("claim_advice", 3)])
def test_interrupted_they_keep_what_was_measured(name, count, tmp_path, monkeypatch):
    example = example_runs.load(name)
    # Nothing is computed here: what is tested is that half a result can be written, told and drawn.
    found = {"rms": -1.0, "operator": -0.5, "direct": -2.0, "slope": -0.1, "largest_gate": 0.5, "rms_slope": -0.1,
             "operator_slope": -0.1, "direct_slope": -0.2, "rms_log10": -1.0, "operator_log10": -1.0,
             "direct_log10": -2.0, "state_before": -3.0, "state_after": -1.0}  # fmt: skip
    measure = stop_after(count)(lambda *_: found)
    if name == "claim_advice":
        monkeypatch.setattr(example, "audit", lambda: [example.Advice(f"a{n}", "b", measure) for n in range(4)])
    else:
        monkeypatch.setattr(example, "measure", measure)
        monkeypatch.setattr(example, "radius", lambda args, bias: 1.0, raising=False)
    run = example_runs.run(example, tmp_path / "cut", *TINY)
    assert run.code == 130 and run.results["interrupted"] is True and "interrupted" in run.printed
    assert len(run.results["runs"]) == 1


def test_four_terms_interrupted_in_training_keep_the_initialisation(tmp_path, monkeypatch):
    example = example_runs.load("claim_four_terms")

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(example._run, "train", stopped)
    run = example_runs.run(example, tmp_path / "cut", *"--hidden 5 --lags 12 --batch 8".split())
    assert run.code == 130 and list(run.results["runs"]) == ["at initialisation"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("claim_explosion", ("--points", "--scales", "--seeds", "--burn-in")),
        ("claim_initialisation", ("--scales", "--seeds", "--inputs", "--lags")),
        ("claim_advice", ("--seeds", "--hidden", "--burn-in")),
        ("claim_four_terms", ("--steps", "--lags", "--forget-bias")),
        ("claim_language_model", ("--steps", "--length", "--clip", "--positions", "--text")),
    ],
)
def test_help_names_the_options(name, options, capsys):
    example = example_runs.load(name)
    with pytest.raises(SystemExit) as stop:
        example.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and [o for o in (*options, "--out") if o not in text] == []
    assert text.count("(default:") >= len(options) and "(default: None)" not in text


def test_wrong_options_are_refused(tmp_path, capsys):
    for name, options, message in (
        ("claim_explosion", ("--scales", "-1"), "-1 is not a standard deviation"),
        ("claim_initialisation", ("--lags", "5"), "5 is too small, expected at least 10"),
        ("claim_advice", ("--seeds", "0"), "0 is too small, expected at least 1"),
        ("claim_language_model", ("--text", "no such file"), "cannot read no such file"),
    ):
        assert message in example_runs.refused(example_runs.load(name), capsys, tmp_path, *options)
