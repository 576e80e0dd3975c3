"""Laws that every recurrent network obeys, as properties: outputs, carries and gradients alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cases
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Problem
from hypothesis import strategies as st

from rnncore import _lengths

BATCH, STEPS = 3, 6
TOLERANCE = 1e-12
SPLIT = 2  # One place to cut at: other shapes would only compile anew; lengths, resets and values vary.
ROWS = [(i, "scan") for i in ("lstm-dense", "user_fast_slow-heads", "indrnn")]

law = hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
rows = st.sampled_from(ROWS)
seeds = st.integers(0, 10**6)
anywhere = st.integers(0, STEPS)
lengths_of_all = st.lists(anywhere, min_size=BATCH, max_size=BATCH)

Row = tuple[str, str]
Run = Callable[..., Any]


def problem_of(row: Row, seed: int) -> Problem:
    """A random problem with resets and without lengths."""
    return cases.draw(cases.BY_ID[row[0]], (BATCH,), STEPS, resets=True, seed=seed)


@functools.cache
def runner(row: Row, **options: Any) -> Run:
    return cases.runner(cases.BY_ID[row[0]], row[1], **options)


@functools.cache
def puller(row: Row, change: Callable[[Run], Run] | None = None, **options: Any) -> Run:
    """(problem, cotangents) -> (results, gradients) of a run, or of what `change` makes of it; compiled once."""
    run = runner(row, **options)
    return cases.puller(run if change is None else change(run))


def cotangents(row: Row, problem: Problem, seed: int) -> Any:
    return cases.cotangents(jax.eval_shape(runner(row), *problem), seed)


def inside(lengths: Any) -> np.ndarray:
    """(BATCH, STEPS, 1): whether a step lies inside the length."""
    return np.arange(STEPS)[:, None] < np.asarray(lengths)[:, None, None]


def masked(results: Any, mask: Any) -> Any:
    """(carry, outputs) with 0 for the outputs outside the mask."""
    carry, outputs = results
    return carry, jnp.where(mask, outputs, 0)


# ------------------------------------------------------------------------------- time cut in two


def handed_over(run: Run) -> Run:
    """The same run in two stretches, the second from the carry of the first."""

    def two(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
        # A reset returns to the carry that a run is given, so this law has none.
        del resets
        carry, first = run(params, xs[:, :SPLIT], carry, jnp.minimum(lengths, SPLIT))
        carry, second = run(params, xs[:, SPLIT:], carry, jnp.maximum(lengths - SPLIT, 0))
        return carry, jnp.concatenate([first, second], 1)

    return two


def started_again(run: Run) -> Run:
    """Two runs from the same initial carry."""

    def two(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
        del lengths, resets
        _, first = run(params, xs[:, :SPLIT], carry)
        carry, second = run(params, xs[:, SPLIT:], carry)
        return carry, jnp.concatenate([first, second], 1)

    return two


def first_steps(run: Run) -> Run:
    """A run over the first steps only; the outputs of the others are 0."""

    def one(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
        del lengths
        carry, outputs = run(params, xs[:, :SPLIT], carry, None, resets[:, :SPLIT])
        return carry, jnp.pad(outputs, ((0, 0), (0, STEPS - SPLIT), (0, 0)))

    return one


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds, lengths=lengths_of_all)
def test_two_stretches_with_the_carry_handed_over_equal_one_run(row: Row, seed: int, lengths: list[int]):
    problem = problem_of(row, seed)._replace(lengths=jnp.array(lengths), resets=None)
    # Past the length one run goes on from the padding and the other from the carry: nothing to compare.
    d_results = masked(cotangents(row, problem, seed), inside(lengths))
    whole, whole_gradients = puller(row)(problem, d_results)
    cut, cut_gradients = puller(row, handed_over)(problem, d_results)
    cases.assert_close(masked(cut, inside(lengths)), masked(whole, inside(lengths)), TOLERANCE)
    cases.assert_close(cut_gradients, whole_gradients, TOLERANCE)


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds)
def test_a_reset_of_all_equals_two_runs_from_the_initial_carry(row: Row, seed: int):
    problem = problem_of(row, seed)
    problem = problem._replace(resets=jnp.zeros((BATCH, STEPS), bool).at[:, SPLIT].set(True))
    d_results = cotangents(row, problem, seed)
    got = puller(row)(problem, d_results)
    cases.assert_close(got, puller(row, started_again)(problem, d_results), TOLERANCE)


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds, here=anywhere)
def test_later_inputs_do_not_move_earlier_outputs(row: Row, seed: int, here: int):
    problem = problem_of(row, seed)
    other = problem_of(row, seed + 1)
    later = np.arange(STEPS)[:, None] >= here
    changed = problem._replace(
        xs=jnp.where(later, other.xs, problem.xs), resets=jnp.where(later[:, 0], other.resets, problem.resets)
    )
    d_carry, d_outputs = cotangents(row, problem, seed)
    d_results = (jax.tree.map(jnp.zeros_like, d_carry), jnp.where(later, 0, d_outputs))
    (_, before), (d_params, d_xs, d_start) = puller(row)(problem, d_results)
    (_, after), changed_gradients = puller(row)(changed, d_results)
    np.testing.assert_array_equal(after[:, :here], before[:, :here])
    np.testing.assert_array_equal(d_xs[:, here:], 0)
    cases.assert_close(changed_gradients, (d_params, d_xs, d_start), TOLERANCE)
    # And the changed inputs are not simply ignored.
    assert here == STEPS or np.any(after[:, here:] != before[:, here:])


# ---------------------------------------------------------------------------------------- batch


@functools.cache
def each_on_its_own(row: Row) -> Run:
    """Results and gradients of every example by itself, through vmap of a run without batch axes."""
    run = runner(row)

    def one(params: Any, moving: Any, d_results: Any) -> Any:
        xs, carry, lengths, resets = moving
        results, back = jax.vjp(lambda p, x, c: run(p, x, c, lengths, resets), params, xs, carry)
        return results, back(d_results)

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds, lengths=lengths_of_all)
def test_examples_do_not_see_each_other(row: Row, seed: int, lengths: list[int]):
    problem = problem_of(row, seed)._replace(lengths=jnp.array(lengths))
    d_results = cotangents(row, problem, seed)
    results, (d_params, d_xs, d_start) = puller(row)(problem, d_results)
    alone, (d_each, *d_moving) = each_on_its_own(row)(problem.params, problem[1:], d_results)
    cases.assert_close((results, d_xs, d_start), (alone, *d_moving), TOLERANCE)
    cases.assert_close(d_params, jax.tree.map(lambda a: a.sum(0), d_each), TOLERANCE)


@law
@hypothesis.given(row=rows, seed=seeds, which=st.integers(0, BATCH - 1))
def test_an_example_alone_gives_its_row(row: Row, seed: int, which: int):
    problem = problem_of(row, seed)
    results = jax.jit(runner(row))(*problem)
    one = Problem(problem.params, *jax.tree.map(lambda a: a[which], problem[1:]))
    cases.assert_close(runner(row)(*one), jax.tree.map(lambda a: a[which], results), TOLERANCE)


# -------------------------------------------------------------------------------------- padding


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds)
def test_a_length_equals_a_shorter_sequence(row: Row, seed: int):
    problem = problem_of(row, seed)
    problem = problem._replace(lengths=jnp.full(BATCH, SPLIT))
    d_results = masked(cotangents(row, problem, seed), inside(problem.lengths))
    padded, gradients = puller(row)(problem, d_results)
    short = puller(row, first_steps)(problem, d_results)
    cases.assert_close((masked(padded, inside(problem.lengths)), gradients), short, TOLERANCE)


@law
@hypothesis.given(
    row=rows, seed=seeds, lengths=lengths_of_all, padding=st.sampled_from((0.0, -3.0, np.nan, np.inf, -np.inf))
)
def test_padding_changes_nothing(row: Row, seed: int, lengths: list[int], padding: float):
    problem = problem_of(row, seed)._replace(lengths=jnp.array(lengths))
    other = problem._replace(xs=jnp.where(inside(lengths), problem.xs, padding))
    d_results = masked(cotangents(row, problem, seed), inside(lengths))
    results, gradients = puller(row)(problem, d_results)
    changed, changed_gradients = puller(row)(other, d_results)
    cases.assert_close(masked(changed, inside(lengths)), masked(results, inside(lengths)), TOLERANCE)
    cases.assert_close(changed_gradients, gradients, TOLERANCE)
    np.testing.assert_array_equal(np.where(inside(lengths), 0, gradients[1]), 0)


# ------------------------------------------------------------------------------ order and layout


def flipped(array: Any, lengths: Any) -> jax.Array:
    """(BATCH, STEPS, ...) with every row's first L steps in the opposite order, and its other steps too."""
    pieces = [np.concatenate([a[:n][::-1], a[n:][::-1]]) for a, n in zip(np.asarray(array), lengths, strict=True)]
    return jnp.asarray(np.stack(pieces))


@pytest.mark.slow
@law
@hypothesis.given(row=rows, seed=seeds, lengths=lengths_of_all, keep_order=st.booleans())
def test_reversing_twice_is_the_identity(row: Row, seed: int, lengths: list[int], keep_order: bool):
    problem = problem_of(row, seed)._replace(lengths=jnp.array(lengths))
    carry_and_outputs = cotangents(row, problem, seed)
    (carry, outputs), (d_params, d_xs, d_start) = puller(row)(problem, carry_and_outputs)

    d_carry, d_outputs = carry_and_outputs
    backwards = problem._replace(xs=flipped(problem.xs, lengths), resets=flipped(problem.resets, lengths))
    pull = puller(row, reverse=True, keep_order=keep_order)
    order = functools.partial(flipped, lengths=lengths) if keep_order else jnp.asarray
    (got_carry, got), (g_params, g_xs, g_start) = pull(backwards, (d_carry, order(d_outputs)))
    cases.assert_close((got_carry, order(got)), (carry, outputs), TOLERANCE)
    cases.assert_close((g_params, flipped(g_xs, lengths), g_start), (d_params, d_xs, d_start), TOLERANCE)


@law
@hypothesis.given(seed=seeds, lengths=lengths_of_all)
def test_the_reverse_of_the_reverse_is_the_sequence(seed: int, lengths: list[int]):
    sequence = jnp.asarray(np.random.default_rng(seed).normal(size=(STEPS, BATCH, 2)))
    once = _lengths.reverse_time(sequence, jnp.array(lengths))
    np.testing.assert_array_equal(jnp.moveaxis(once, 0, 1), flipped(jnp.moveaxis(sequence, 0, 1), lengths))
    np.testing.assert_array_equal(_lengths.reverse_time(once, jnp.array(lengths)), sequence)


def transposed(run: Run) -> Run:
    """A time-major run that takes and gives what a batch-major one does."""

    def batch_major(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
        carry, outputs = run(params, jnp.swapaxes(xs, 0, 1), carry, lengths, jnp.swapaxes(resets, 0, 1))
        return carry, jnp.swapaxes(outputs, 0, 1)

    return batch_major


@law
@hypothesis.given(row=rows, seed=seeds, lengths=lengths_of_all)
def test_time_major_is_batch_major_transposed(row: Row, seed: int, lengths: list[int]):
    problem = problem_of(row, seed)._replace(lengths=jnp.array(lengths))
    d_results = cotangents(row, problem, seed)
    pull = puller(row, transposed, time_major=True)
    cases.assert_close(pull(problem, d_results), puller(row)(problem, d_results), TOLERANCE)
