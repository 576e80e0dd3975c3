"""Every transformation of JAX, over every case: jvp, second order, vmap, jit, checkpoint, chunks, recompilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case, Problem

import rnncore
from rnncore.sequence import call as sequence

AUTODIFF = "autodiff"
DEAR = ("elman_silu", "lstm_both-dense", "gru-heads", "user_fast_slow-dense")


def inner(a: Any, b: Any) -> float:
    """The inner product of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.asarray(x) * np.asarray(y))) for x, y in pairs)


# --------------------------------------------------------------------------------- forward mode


def central_difference(case: Case, problem: Problem, moved: Any, step: float = 1e-5) -> Any:
    """d (carry, outputs) / d step of the NumPy reference, at an error of about step^2."""

    def at(t: float) -> Any:
        params, xs, start = jax.tree.map(lambda a, d: a + t * d, problem[:3], moved)
        masks = {"lengths": np.asarray(problem.lengths), "resets": np.asarray(problem.resets)}
        params, xs, start = cases.as_reference(params), np.asarray(xs), tuple(map(np.asarray, start))
        run = reference.forward(case.reference, params, xs, start, **masks)
        return run.last, run.outputs

    return jax.tree.map(lambda a, b: (a - b) / (2 * step), at(step), at(-step))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("case", "backend"), cases.rows(cases.EVERY_CELL))
def test_jvp(case: Case, backend: str):
    problem = cases.draw(case, lengths=True, resets=True)
    moved = cases.cotangents(problem[:3], seed=2)
    run = cases.runner(case, backend)

    @jax.jit
    def push(problem: Problem, moved: Any) -> Any:
        return jax.jvp(lambda *moving: run(*moving, *problem[3:]), problem[:3], moved)

    results, d_results = push(problem, moved)
    # The transpose rule <w, J t> = <J' w, t> is exact to rounding; J' w comes from NumPy, else from autodiff.
    weights = cases.cotangents(results, seed=3)
    want_results, (params, *rest) = cases.expected(case, problem, weights)
    cases.assert_close(results, want_results, cases.FLOAT64)
    back = (params, *rest)
    assert inner(weights, d_results) == pytest.approx(
        inner(back, (cases.as_reference(moved[0]), *moved[1:])), rel=cases.FLOAT64, abs=10 * cases.FLOAT64
    )
    if case.reference is not None:
        cases.assert_close(d_results, central_difference(case, problem, moved), 1e-8)


# --------------------------------------------------------------------------------- reverse mode


@pytest.mark.sample(1)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("elman_silu", "lstm_both-dense", "user_fast_slow-dense")))
def test_vjp_of_every_carry_and_gate(case: Case, backend: str, reverse: bool):
    options = {"return_states": True, "include_initial": True, "reverse": reverse}
    problem = cases.draw(case, lengths=True, resets=True)
    results, gradients, d_results = cases.pull(cases.runner(case, backend, **options), problem)
    want = cases.autodiff_puller(case, **options)(problem, d_results)
    cases.assert_close((results, gradients), want, cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=cases.ONE_OF_EACH))
def test_no_jit_around_it(case: Case, backend: str):
    problem = cases.draw(case, lengths=True, resets=True)
    run = cases.runner(case, backend)
    results, back = jax.vjp(lambda *moving: run(*moving, *problem[3:]), *problem[:3])
    d_results = cases.cotangents(results)
    cases.assert_expected(case, problem, results, back(d_results), d_results)


def test_lengths_and_resets_that_are_constants_inside_jit():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, lengths=True, resets=True)
    run = cases.runner(case, "scan")
    traced = jax.jit(run)(*problem)
    constant = jax.jit(lambda *moving: run(*moving, problem.lengths, problem.resets))(*problem[:3])
    cases.assert_close(constant, traced, cases.FLOAT64)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("elman_silu", "lstm_both-dense", "reset_before_gru")))
def test_checkpoint(case: Case, backend: str):
    problem = cases.draw(case, lengths=True, resets=True)
    run = jax.checkpoint(cases.runner(case, backend))
    cases.assert_expected(case, problem, *cases.pull(run, problem))


@pytest.mark.parametrize("return_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("elman_silu", "lstm_both-dense", "reset_before_gru")))
def test_no_steps(case: Case, backend: str, return_states: bool):
    problem = cases.draw(case, steps=0, lengths=True, resets=True)
    run = cases.runner(case, backend, return_states=return_states)
    (carry, outputs, *states), (params, xs, start), (d_carry, *_) = cases.pull(run, problem)
    assert outputs.shape == (4, 0, cases.HIDDEN) and xs.shape == problem.xs.shape
    assert all(a.shape == (4, 0, cases.HIDDEN) for a in jax.tree.leaves(states))
    cases.assert_close((carry, start), (problem.carry, d_carry), 0)
    assert not any(np.any(a) for a in jax.tree.leaves(params))


# --------------------------------------------------------------------------------- chunks and recomputation

STEPS = 5
EVERY = {"one": 1, "two_and_a_rest": 2, "more_than_all": STEPS + 2}
RECOMPUTE = ("nothing", "gates", "chunk")
CHUNKS = [
    *[(row, every, again) for row in cases.rows(ids=("lstm_both-dense",)) for every in EVERY for again in RECOMPUTE],
    *[
        (row, "two_and_a_rest", again)
        for row in cases.rows(ids=("gru-heads", "user_fast_slow-dense", "reset_before_gru"))
        for again in RECOMPUTE
    ],
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("case", "backend", "every", "recompute"),
    [pytest.param(*row.values, every, again, id=f"{row.id}-{every}-{again}") for row, every, again in CHUNKS],
)
def test_chunks(case: Case, backend: str, every: str, recompute: str):
    problem = cases.draw(case, steps=STEPS, lengths=True, resets=True)
    run = cases.runner(case, backend, checkpoint_every=EVERY[every], recompute=recompute)
    cases.assert_expected(case, problem, *cases.pull(run, problem))


# --------------------------------------------------------------------------------- second order


def second_orders(run: Callable, problem: Problem, weights: Any, moved: Any) -> Any:
    """Forward over reverse, reverse over forward and reverse over reverse of one loss, nonlinear in the results."""

    def loss(moving: Any) -> Any:
        leaves = zip(jax.tree.leaves(run(*moving, *problem[3:])), jax.tree.leaves(weights), strict=True)
        return sum(jnp.sum(jnp.sin(a) * w) for a, w in leaves)

    def along(tree: Any) -> Any:
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(moved), strict=True))

    moving = problem[:3]
    return (
        jax.jvp(jax.grad(loss), (moving,), (moved,))[1],
        jax.grad(lambda m: jax.jvp(loss, (m,), (moved,))[1])(moving),
        jax.grad(lambda m: along(jax.grad(loss)(m)))(moving),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [cases.BY_ID[i] for i in DEAR], ids=DEAR)
def test_second_order(case: Case):
    problem = cases.draw(case, batch=(3,), steps=4, features=2, lengths=True, resets=True)
    moved = cases.cotangents(problem[:3], seed=2)
    got = {}
    for backend in case.backends:
        run = cases.runner(case, backend, return_states=True)
        weights = cases.cotangents(jax.eval_shape(run, *problem), seed=3)
        orders = jax.jit(lambda *args, run=run: second_orders(run, *args))
        got[backend] = orders(problem, weights, moved)
        # A Hessian is symmetric: all three are the same product of it with `moved`.
        forward_over_reverse, *others = got[backend]
        for other in others:
            cases.assert_close(other, forward_over_reverse, 10 * cases.FLOAT64)
    for backend in got:
        cases.assert_close(got[backend], got["autodiff"], 10 * cases.FLOAT64)


# --------------------------------------------------------------------------------- vmap


@pytest.mark.sample(1)
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("lstm_both-dense", "reset_before_gru")))
def test_vmap(case: Case, backend: str):
    """Over examples, and over parameters as an ensemble does, gradients included."""
    several = cases.draw(case, batch=(3,), lengths=True, resets=True)
    problems = [Problem(*jax.tree.map(lambda a, n=n: a[n], several[1:]), None) for n in range(3)]
    problems = [Problem(several.params, *problem[:4]) for problem in problems]
    run = cases.runner(case, backend)
    one = cases.puller(run)
    d_results = cases.cotangents(jax.eval_shape(run, *problems[0]))

    def stacked(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    over_examples = jax.vmap(one, in_axes=(Problem(None, 0, 0, 0, 0), None))(several, d_results)
    cases.assert_close(over_examples, stacked([one(problem, d_results) for problem in problems]), cases.FLOAT64)

    ensemble = [problems[0]._replace(params=cases.cotangents(several.params, seed)) for seed in range(3)]
    params = stacked([problem.params for problem in ensemble])
    axes = (Problem(0, None, None, None, None), None)
    over_params = jax.vmap(one, in_axes=axes)(problems[0]._replace(params=params), d_results)
    cases.assert_close(over_params, stacked([one(problem, d_results) for problem in ensemble]), cases.FLOAT64)


# --------------------------------------------------------------------------------- recompilation


def compiled(caplog: pytest.LogCaptureFixture, function: Callable[[], Any]) -> list[str]:
    """Names of all that JAX compiles while the function runs."""
    caplog.clear()
    with jax.log_compiles():
        jax.block_until_ready(function())
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling ")]


def test_the_counter_counts(caplog: pytest.LogCaptureFixture):
    assert compiled(caplog, lambda: jax.jit(lambda a: a + 1)(jnp.ones(3)))


@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("elman_silu", "lstm_both-dense", "reset_before_gru")))
def test_no_recompilation_on_the_second_call(case: Case, backend: str, caplog: pytest.LogCaptureFixture):
    """Other values, and a cell that is equal but not the same, compile nothing."""

    def call(case: Case, problem: Problem, run_jit: bool) -> Any:
        run = cases.runner(case, backend)
        if run_jit:
            return run(*problem)
        results, back = jax.vjp(lambda *moving: run(*moving, *problem[3:]), *problem[:3])
        return results, back(results)

    again = dataclasses.replace(case, cell=dataclasses.replace(case.cell))
    assert again.cell is not case.cell
    first, second = (cases.draw(case, lengths=True, resets=True, seed=seed) for seed in (0, 1))
    for run_jit in (True, False):
        call(case, first, run_jit)
        cached = sequence._run._cache_size()
        assert compiled(caplog, lambda run_jit=run_jit: call(again, second, run_jit)) == []
        assert sequence._run._cache_size() == cached


@pytest.mark.parametrize("id", cases.EVERY_CELL)
def test_equal_cells_are_one_key(id: str):
    """As the test above, for every cell: jit takes an equal cell for the same static argument."""
    case = cases.BY_ID[id]
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def run(cell: rnncore.Cell, problem: Problem) -> Any:
        return rnncore.unroll(cell, problem.params, problem.xs, initial_carry=problem.carry)

    shapes = jax.jit(run, static_argnums=0)
    for cell in (case.cell, dataclasses.replace(case.cell)):
        shapes.eval_shape(cell, cases.draw(case))
