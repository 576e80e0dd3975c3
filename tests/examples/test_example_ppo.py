"""The reinforcement learning example: a rollout and its replay are one function, and memory solves the maze."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import example_runs
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

import rnncore

STEPS, BATCH = 9, 3


@pytest.fixture(scope="module")
def example():
    return example_runs.load("recurrent_ppo")


@pytest.fixture(scope="module", params=["GRU", "LSTM"])
def both(example, request):
    """(step by step, replay) of one agent: fresh (T, B) to (last carry, logits, values)."""
    agent = example.recurrent(getattr(rnncore, request.param)(5))
    params = agent.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (STEPS, BATCH, example.FEATURES))
    carry = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), agent.carry(BATCH))

    def one(carry: Any, now: Any) -> Any:
        return agent.step(params, carry, *now)

    return jax.jit(lambda fresh: jax.lax.scan(one, carry, (xs, fresh))), jax.jit(
        lambda fresh: agent.replay(params, carry, xs, fresh)
    )


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(fresh=arrays.arrays(bool, (STEPS, BATCH), elements=strategies.booleans()))
def test_rollout_and_replay_agree_for_any_pattern_of_dones(both, fresh):
    step_by_step, replay = both
    for got, want in zip(*map(jax.tree.leaves, (replay(fresh), step_by_step(fresh))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.fixture(scope="module")
def rollout(example):
    agent = example.recurrent(rnncore.GRU(4))
    params = agent.init(jax.random.key(0))
    roll = jax.jit(lambda key: example.roll(agent, params, example.start(key, 8), agent.carry(8), key, 40, 3))
    return agent, params, *roll(jax.random.key(1))


def test_the_reset_belongs_to_the_done_of_the_step_before(example, rollout):
    _, _, maze, _, seen = rollout
    np.testing.assert_array_equal(seen.fresh[1:], seen.dones[:-1])
    np.testing.assert_array_equal(maze.fresh, seen.dones[-1])
    assert seen.fresh[0].all() and 8 < seen.fresh.sum() < 160
    # The first observation of an episode is the sign, and the reward at its end knows it.
    signs = np.asarray(seen.xs[..., 0])
    assert (np.abs(signs[np.asarray(seen.fresh)]) == 1).all()
    sign = np.zeros(8)
    for t in range(40):
        sign = np.where(seen.fresh[t], signs[t], sign)
        turned = np.asarray(seen.xs[t, :, 2] > 0) & np.asarray(seen.actions[t] != example.AHEAD)
        right = np.asarray(seen.actions[t] == np.where(sign > 0, example.RIGHT, example.LEFT))
        np.testing.assert_array_equal(np.asarray(seen.rewards[t]) == example.GOAL, turned & right)


def test_advantages_stop_at_the_end_of_an_episode(example, rollout):
    *_, seen = rollout
    bootstrap = np.linspace(-1, 1, 8)
    got = example.advantages(seen, jnp.asarray(bootstrap, seen.values.dtype))
    values = np.concatenate([np.asarray(seen.values, float), bootstrap[None]])
    estimate = np.zeros(8)
    for t in reversed(range(40)):
        on = 1.0 - np.asarray(seen.dones[t])
        error = np.asarray(seen.rewards[t]) + example.DISCOUNT * values[t + 1] * on - values[t]
        estimate = error + example.DISCOUNT * example.TRACE * on * estimate
        np.testing.assert_allclose(got[t], estimate, atol=1e-5)


def test_burn_in_begins_where_the_rollout_was(example, rollout):
    """With unchanged parameters the rest of the replay is the rollout itself; the carry is a constant."""
    agent, params, _, last, seen = rollout

    @jax.jit
    def burned(params: Any) -> Any:
        total, gradient = jax.value_and_grad(lambda p: example.burned_in(agent, p, seen, 7).h.sum())(params)
        carry = example.burned_in(agent, params, seen, 7)
        return total, gradient, agent.replay(params, carry, seen.xs[7:], seen.fresh[7:])

    total, gradient, (ended, (_, values)) = burned(params)
    np.testing.assert_allclose(values, seen.values[7:], atol=1e-6)
    np.testing.assert_allclose(ended.h, last.h, atol=1e-6)
    assert total and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_memory_solves_the_maze_and_nothing_else_does(example, tmp_path):
    options = "--hidden 16 --steps 30 --corridor 3 --batch 32 --rollout 24 --burn-in 2 --learning-rate 0.005".split()
    run = example_runs.run(example, tmp_path / "small", *options)
    runs = run.results["runs"]
    assert run.code == 0 and list(runs) == ["GRU", "GRU without its past"]
    with_memory, without = (record["success"][-1] for record in runs.values())
    assert with_memory > 0.9 and without < 0.65
    assert "GRU: " in run.printed and "after 30 updates, 23,040 steps" in run.printed
    example_runs.check_partial(example, run.results | {"runs": {"GRU": runs["GRU"]}}, tmp_path)


def test_command_line(example, tmp_path, capsys):
    example_runs.check_help(example, capsys, "--hidden", "--corridor", "--rollout", "--burn-in")
    assert "leaves nothing" in example_runs.refused(example, capsys, tmp_path, "--rollout", "4", "--burn-in", "4")
    assert "cannot be divided" in example_runs.refused(example, capsys, tmp_path, "--batch", "6")


def test_the_python_block_of_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "reinforcement.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    with jax.enable_x64(False):
        exec(compile(block, "reinforcement block", "exec"), names)
    assert names["ys"].shape == (16, 4, 64) and names["y"].shape == (4, 64)
