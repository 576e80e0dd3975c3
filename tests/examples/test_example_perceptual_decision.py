"""The perceptual decision example: the task, the observer beside the network, Dale's law, and a small run."""

from __future__ import annotations

import example_runs
import jax
import numpy as np
import pytest

OPTIONS = "--hidden 15 --steps 25 --batch 32 --test-trials 12 --learning-rate 0.01".split()


@pytest.fixture(scope="module")
def example():
    return example_runs.load("perceptual_decision")


def test_the_observer_who_adds_up_all_evidence(example):
    """What `trials` draws, summed, gives the curve and the threshold that are drawn as the best possible."""
    coherence = np.repeat(example.signed(), 2000)
    drawn = example.trials(np.random.default_rng(0), coherence)
    assert drawn.xs.shape == (len(coherence), example.STEPS, 3) and drawn.xs.dtype == np.float32
    begin, end = example.FIXATION, example.FIXATION + example.STIMULUS
    assert not drawn.xs[:, :begin, :2].any() and not drawn.xs[:, end:, :2].any()
    np.testing.assert_array_equal(drawn.xs[0, :, 2], np.arange(example.STEPS) < example.STEPS - example.CHOICE)
    np.testing.assert_array_equal(drawn.right[coherence != 0], coherence[coherence != 0] > 0)
    assert 0.4 < drawn.right[coherence == 0].mean() < 0.6
    right = (drawn.xs[..., 1] - drawn.xs[..., 0]).sum(1) > 0
    shares = right.reshape(-1, 2000).mean(-1)
    np.testing.assert_allclose(shares, example.ideal(example.signed()), atol=0.04)
    least = example.EVIDENCE_NOISE / (example.STIMULUS / 2) ** 0.5
    assert example.threshold(shares) == pytest.approx(least, rel=0.05)
    assert example.ideal(least) == pytest.approx(0.84, abs=0.005)
    assert example.threshold(np.ones(len(shares))) == 1


def test_the_weights_obey_dales_law_and_balance(example):
    cell = example.cortex(200)
    params = cell.init(jax.random.key(0), 3)
    u = np.asarray(cell.recurrence.gate_matrices(params.recurrent_kernel)[0]).T
    assert (u[:160] >= 0).all() and (u[160:] <= 0).all() and not np.diag(u).any() and (u != 0).sum() == 200 * 199
    assert abs(u.sum()) < 0.05 * np.abs(u).sum()
    assert 0.9 < np.abs(np.linalg.eigvals(u - u.mean(1, keepdims=True))).max() < 1.3
    assert (np.asarray(example.positive_inputs(params).input_kernel) >= 0).all()


def test_it_learns_and_is_taken_apart(example, tmp_path):
    run = example_runs.run(example, tmp_path / "small", *OPTIONS)
    record = run.results["runs"]["cortex"]
    assert run.code == 0 and record["watched"] == [0, 5, 10, 15, 20, 25] and len(record["loss"]) == 25
    assert np.mean(record["loss"][-5:]) < record["loss"][0]
    assert np.shape(record["right"]) == (6, len(example.signed())) and np.shape(record["counts"]) == (6, 40)
    kept = np.array(record["kept"])
    assert kept.shape == (6, example.STEPS + 1) and (kept[:, 0] == 1).all() and (kept > 0).all()
    assert f"of the gradient of the choice {kept[-1][65]:.2g} reaches the onset" in run.printed
    assert set(run.results["fixed_points"]) == {"in the delay", "while evidence of no coherence comes in"}
    # Interrupted before its end: the first measurement alone, no fixed points.
    one = {name: record[name][:1] for name in record}
    example_runs.check_partial(example, run.results | {"runs": {"cortex": one}, "fixed_points": {}}, tmp_path)


@pytest.mark.slow
def test_what_the_evidence_counts_is_the_derivative(example):
    """Against differences of the network's own run, with the same noise."""
    cell = example.cortex(15)
    weights = example.Weights(cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (12, 2)))
    batch = example.trials(np.random.default_rng(0), np.zeros(64))  # the sizes of the run above: nothing to compile
    counts, kept = example.weight_of_evidence(cell, weights, batch, 0.1)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
        run = jax.jit(lambda xs: example.choices(wide, example.rates(cell, wide, xs, batch.seed, 0.1)[:, -1]).mean())
        step, xs = 1e-6, batch.xs.astype(float)
        for t in (0, 17, 39):
            moved = np.zeros_like(xs)
            moved[:, example.FIXATION + t, :2] = (-step / 2, step / 2)
            difference = float(run(xs + moved) - run(xs - moved)) / (2 * step)
            assert counts[t] == pytest.approx(difference, rel=1e-4, abs=1e-9)
    assert kept[0] == 1 and max(np.abs(counts)) > 0


def test_command_line(example, tmp_path, capsys):
    example_runs.check_help(example, capsys, "--hidden", "--noise", "--cost", "--test-trials")
    assert "4 is too small" in example_runs.refused(example, capsys, tmp_path, "--hidden", "4")
