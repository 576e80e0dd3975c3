"""The filter example: its Kalman filter is exact, resets part the episodes, and the files say so."""

from __future__ import annotations

import example_runs
import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def example():
    return example_runs.load("filter_with_resets")


def posterior(example, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[s_t | z_1 ... z_t] and the trace of its covariance, from the joint normal distribution of one episode."""
    steps = len(z)
    powers = [np.linalg.matrix_power(example.A, n) for n in range(steps)]
    # All states as a linear map of the first state and the pushes, which are independent.
    source = np.zeros((2 * steps, 2 * steps))
    for t in range(steps):
        for n in range(t + 1):
            source[2 * t : 2 * t + 2, 2 * n : 2 * n + 2] = powers[t - n]
    spread = np.zeros_like(source)
    for n in range(steps):
        spread[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = example.Q if n else example.P
    cov = source @ spread @ source.T
    means, traces = [], []
    for t in range(steps):
        seen, state = np.arange(0, 2 * t + 1, 2), slice(2 * t, 2 * t + 2)
        gain = np.linalg.solve(cov[np.ix_(seen, seen)] + example.R * np.eye(t + 1), cov[seen, state]).T
        means.append(gain @ z[: t + 1])
        traces.append(np.trace(cov[state, state] - gain @ cov[seen, state]))
    return np.array(means), np.array(traces)


def test_the_kalman_filter_is_the_conditional_mean(example):
    rows = example.simulate(np.random.default_rng(0), 2, 100)
    estimates, expected = example.kalman(rows.z, rows.starts)
    for row in range(2):
        begins = [*np.flatnonzero(rows.starts[row]), 100]
        assert len(begins) > 2
        for begin, end in zip(begins, begins[1:], strict=False):
            means, traces = posterior(example, rows.z[row, begin:end, 0].astype(float))
            np.testing.assert_allclose(estimates[row, begin:end], means, atol=1e-12)
            np.testing.assert_allclose(expected[row, begin:end], traces, atol=1e-12)


def test_episodes_are_as_described(example):
    rows = example.simulate(np.random.default_rng(1), 300)
    assert rows.z.dtype == rows.states.dtype == np.float32 and rows.starts[:, 0].all()
    lengths = np.concatenate([np.diff(np.flatnonzero(row)) for row in rows.starts])
    assert lengths.min() == example.SHORTEST and lengths.max() == example.LONGEST
    noise = rows.z[..., 0] - rows.states[..., 0]
    assert noise.var() == pytest.approx(example.R, rel=0.03)
    first = rows.states[rows.starts]
    np.testing.assert_allclose(np.cov(first.T), example.P, atol=0.4)
    pushes = (rows.states[:, 1:] - rows.states[:, :-1] @ example.A.T)[~rows.starts[:, 1:]]
    np.testing.assert_allclose(np.cov(pushes.T), example.Q, atol=1e-3)


def test_errors_are_sorted_by_the_step_of_the_episode(example):
    starts = np.array([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], bool)
    ages = example.since_start(starts)
    np.testing.assert_array_equal(ages, [[1, 2, 3, 1, 2], [1, 1, 2, 3, 4]])
    errors = np.array([[8.0, 1, 2, 4, 3], [2, 2, 5, 4, 7]])
    assert example.by_age(errors, ages)[:5] == [4.0, 3.0, 3.0, 7.0, 0.0]


def test_with_resets_every_episode_is_filtered_alone(example):
    model = example.Filter(3)
    z = np.random.default_rng(0).normal(size=(2, 12, 1)).astype(np.float32)
    starts = np.tile(np.arange(12) % 4 == 0, (2, 1))
    params = jax.jit(model.init)(jax.random.key(0), z, starts)
    packed = jax.jit(model.apply)(params, z, starts)
    alone = jax.jit(lambda p, z: model.apply(p, z, None))(params, z.reshape(6, 4, 1))
    np.testing.assert_allclose(packed, alone.reshape(2, 12, 2), atol=1e-6)
    through = jax.jit(lambda p, z: model.apply(p, z, None))(params, z)
    assert np.abs(packed - through)[:, 4:].max() > 1e-2


def test_kalman_is_best_and_resets_help(example, tmp_path):
    options = "--hidden 10 --steps 80 --batch 16 --test-rows 60 --learning-rate 0.03".split()
    run = example_runs.run(example, tmp_path / "small", *options)
    runs, kalman = run.results["runs"], run.results["kalman"]
    assert run.code == 0 and list(runs) == ["with resets", "without resets"]
    with_resets, without = (record["error"][-1] for record in runs.values())
    assert kalman["error"] < with_resets < without < runs["with resets"]["error"][0]
    assert kalman["error"] == pytest.approx(kalman["expected"], rel=0.1)
    # On the first step of an episode there is no other evidence than what was before it, which is none.
    first = [record["by_age"][-1][0] for record in runs.values()]
    assert kalman["by_age"][0] < 1.1 * first[0] and first[0] < first[1]
    assert f"Kalman filter: {kalman['error']:.3f}, the least possible" in run.printed
    assert f"GRU with resets: {with_resets:.3f}, {with_resets / kalman['error']:.2f} times" in run.printed
    example_runs.check_partial(example, run.results | {"runs": {"with resets": runs["with resets"]}}, tmp_path)


def test_command_line(example, tmp_path, capsys):
    example_runs.check_help(example, capsys, "--hidden", "--test-rows")
    assert "0 is too small" in example_runs.refused(example, capsys, tmp_path, "--test-rows", "0")
