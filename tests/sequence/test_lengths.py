"""Sequence lengths: empty sequences, several batch axes, values out of range, and what padding may not reach."""

from __future__ import annotations

import functools
from typing import Any

import cases
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Problem

import rnncore

STEPS = 5
TOLERANCE = 1e-12
CELLS = ("elman-dense", "lstm_peepholes-diagonal", "gru-heads", "reset_before_gru", "user_fast_slow-dense")
OPTIONS = (
    {"reverse": True},
    {"reverse": True, "keep_order": True, "checkpoint_every": 2},
    {"recompute": "gates", "checkpoint_every": 3},
    {"recompute": "chunk", "checkpoint_every": 2, "reverse": True, "keep_order": True},
)
every_cell_and_mode = pytest.mark.parametrize(("case", "backend"), cases.rows(ids=CELLS))


def small(name: str = "lstm-dense") -> tuple[rnncore.Cell, Problem]:
    """A cell and a problem for it with a batch of two."""
    case = cases.BY_ID[name]
    return case.cell, cases.draw(case, (2,), STEPS)


def inside(lengths: Any, steps: int) -> np.ndarray:
    """(*batch, steps): whether a step lies inside the length."""
    return np.arange(steps) < np.asarray(lengths)[..., None]


# --------------------------------------------------------------------------------- empty sequences


@pytest.mark.sample(2)
@every_cell_and_mode
def test_length_0_returns_the_initial_carry(case: Case, backend: str):
    problem = cases.draw(case, (3,), STEPS)._replace(lengths=jnp.array([0, STEPS, 0]))
    run = cases.runner(case, backend)
    cotangent, d_outputs = cases.cotangents(jax.eval_shape(run, *problem))
    # With no cotangent on the outputs the gradient of the carry is the identity, that of the inputs zero.
    (carry, _), (_, d_xs, d_carry) = cases.puller(run)(problem, (cotangent, jnp.zeros_like(d_outputs)))
    for got, start in zip(carry, problem.carry, strict=True):
        np.testing.assert_array_equal(got[::2], start[::2])
        assert not np.any(np.asarray(got[1]) == np.asarray(start[1]))
    np.testing.assert_array_equal(d_xs[::2], 0)
    for got, want in zip(d_carry, cotangent, strict=True):
        np.testing.assert_array_equal(got[::2], want[::2])


@pytest.mark.parametrize("options", [{}, {"reverse": True, "keep_order": True}, {"time_major": True}], ids=str)
@pytest.mark.parametrize("lengths", [False, True], ids=["all", "lengths"])
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("lstm-dense", "reset_before_gru")))
def test_no_steps_at_all(case: Case, backend: str, lengths: bool, options: dict[str, Any]):
    problem = cases.draw(case, (2,), 0, resets=True)
    problem = problem._replace(lengths=jnp.zeros(2, int) if lengths else None)
    if "time_major" in options:
        problem = problem._replace(xs=jnp.swapaxes(problem.xs, 0, 1), resets=jnp.swapaxes(problem.resets, 0, 1))
    (carry, outputs), gradients, (d_carry, _) = cases.pull(cases.runner(case, backend, **options), problem)
    assert outputs.shape == ((0, 2, 4) if "time_major" in options else (2, 0, 4))
    cases.assert_close(carry, problem.carry, 0.0)
    zeros = jax.tree.map(jnp.zeros_like, problem.params)
    cases.assert_close(gradients, (zeros, problem.xs, d_carry), 0.0)


@pytest.mark.parametrize("name", ["lstm-dense", "gru-dense", "reset_before_gru"])
@pytest.mark.parametrize("include_initial", [False, True])
def test_no_steps_at_all_with_states(name: str, include_initial: bool):
    cell, problem = small(name)
    carry, _, states = rnncore.unroll(
        cell, problem.params, problem.xs[:, :0], initial_carry=problem.carry,
        return_states=True, include_initial=include_initial,
    )  # fmt: skip
    assert all(a.shape == (2, int(include_initial), 4) for a in states.carries)
    assert all(a.shape == (2, 0, 4) for a in states.gates) and states.gates._fields == cell.gates
    if include_initial:
        cases.assert_close(jax.tree.map(lambda a: a[:, 0], states.carries), carry, 0.0)


@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("lstm-dense", "gru-dense")))
def test_no_examples_at_all(case: Case, backend: str):
    problem = cases.draw(case, (2,), STEPS, lengths=True)
    problem = Problem(problem.params, *jax.tree.map(lambda a: a[:0], problem[1:]))
    (carry, outputs), (d_params, _, _), _ = cases.pull(cases.runner(case, backend), problem)
    assert outputs.shape == (0, STEPS, 4) and carry.h.shape == (0, 4)
    cases.assert_close(d_params, jax.tree.map(jnp.zeros_like, problem.params), 0.0)


# ------------------------------------------------------------------------------- several batch axes


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(3, 3), (5, 5), (2, 1, 3)], ids=str)  # 5 = T: no axis is told by its size
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("gru-dense",)))
def test_batch_axes_are_as_one(case: Case, backend: str, batch: tuple[int, ...]):
    problem = cases.draw(case, batch, STEPS, lengths=True, resets=True)
    results, gradients, d_results = cases.pull(cases.runner(case, backend), problem)

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(batch) :]), tree)

    one = Problem(problem.params, *flat(problem[1:]))
    want, want_gradients = cases.puller(cases.runner(case, backend))(one, flat(d_results))
    cases.assert_close((flat(results), gradients[0], flat(gradients[1:])), (want, *want_gradients), TOLERANCE)
    moved = problem._replace(xs=jnp.moveaxis(problem.xs, -2, 0), resets=jnp.moveaxis(problem.resets, -1, 0))
    carry, outputs = cases.runner(case, backend, time_major=True)(*moved)
    cases.assert_close((carry, jnp.moveaxis(outputs, 0, -2)), results, TOLERANCE)


def test_no_batch_axis():
    cell, problem = small()
    start = jax.tree.map(lambda a: a[0], problem.carry)
    carry, outputs = rnncore.unroll(cell, problem.params, problem.xs[0], initial_carry=start, seq_lengths=3)
    np.testing.assert_array_equal(carry.h, outputs[2])
    empty, _ = rnncore.unroll(cell, problem.params, problem.xs[0], initial_carry=start, seq_lengths=np.int32(0))
    cases.assert_close(empty, start, 0.0)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([-1, 2], r"`unroll\(seq_lengths=<int64 \(2,\)>\)`: values from -1 to 2; expected 0 to T = 5"),
        ([1, 6], r"`unroll\(seq_lengths=<int64 \(2,\)>\)`: values from 1 to 6; expected 0 to T = 5"),
        ([1, 2, 3], r"`unroll\(seq_lengths=<int64 \(3,\)>\)`: expected the batch shape \(2,\)"),
        ([[1, 2]], r"`unroll\(seq_lengths=<int64 \(1, 2\)>\)`: expected the batch shape \(2,\)"),
        (3, r"`unroll\(seq_lengths=<int64 \(\)>\)`: expected the batch shape \(2,\); broadcast"),
        ([1.0, 2.0], r"`unroll\(seq_lengths=<float64 \(2,\)>\)`: expected integers"),
        ([True, False], r"`unroll\(seq_lengths=<bool \(2,\)>\)`: expected integers"),
    ],
)
@pytest.mark.parametrize("backend", [None, "scan", "autodiff"])
def test_lengths_that_make_no_sense(lengths: Any, message: str, backend: str | None):
    cell, problem = small()
    with pytest.raises(ValueError, match=message):
        rnncore.unroll(cell, problem.params, problem.xs, seq_lengths=lengths, backend=backend)
    with pytest.raises(ValueError, match=message):
        rnncore.explain_backend(cell, problem.params, problem.xs, seq_lengths=lengths, backend=backend)


@pytest.mark.parametrize(
    ("lengths", "message"), [(jnp.ones(2), "expected integers"), (jnp.ones(3, int), r"expected the batch shape \(2,\)")]
)
def test_shape_and_dtype_are_seen_inside_jit_too(lengths: Any, message: str):
    cell, problem = small()
    run = jax.jit(lambda n: rnncore.unroll(cell, problem.params, problem.xs, seq_lengths=n))
    with pytest.raises(ValueError, match=message):
        run(lengths)


@pytest.mark.parametrize(
    "lengths", [[1, 3], (1, 3), np.array([1, 3]), jnp.array([1, 3])], ids=lambda n: type(n).__name__
)
def test_lengths_known_inside_jit(lengths: Any):
    cell, problem = small()

    def run(xs: Any) -> Any:
        return rnncore.unroll(cell, problem.params, xs, seq_lengths=lengths)

    cases.assert_close(jax.jit(run)(problem.xs), run(problem.xs), TOLERANCE)


def test_lengths_known_inside_jit_are_checked_there():
    cell, problem = small()
    for lengths in (np.array([1, 6]), [1, 6]):
        with pytest.raises(ValueError, match="values from 1 to 6; expected 0 to T = 5"):
            jax.jit(lambda xs, n=lengths: rnncore.unroll(cell, problem.params, xs, seq_lengths=n))(problem.xs)


@pytest.mark.sample(5)
@pytest.mark.parametrize("backend", ["scan", "autodiff"])
@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}, {"checkpoint_every": 2}], ids=str
)
def test_out_of_range_inside_jit(options: dict[str, Any], backend: str):
    cell, problem = small()

    @jax.jit
    def run(lengths: Any) -> Any:
        return rnncore.unroll(
            cell,
            problem.params,
            problem.xs,
            initial_carry=problem.carry,
            seq_lengths=lengths,
            backend=backend,
            **options,
        )

    carry, outputs = run(jnp.array([-2, STEPS + 2]))
    # A negative length acts as 0, one above T as T.
    expected = run(jnp.array([0, STEPS]))
    cases.assert_close((carry, outputs), expected, 0.0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
@pytest.mark.parametrize("backend", ["scan", "autodiff"])
def test_every_integer_dtype_counts_the_same(dtype: str, backend: str):
    cell, problem = rnncore.Elman(2), cases.draw(Case("", rnncore.Elman(2), None), (3,), 300, 1)
    values = np.array([0, 1, 100])  # 0 - 1 in eight bits without a sign is 255, a step that exists here
    run = functools.partial(
        rnncore.unroll, cell, problem.params, problem.xs, initial_carry=problem.carry, backend=backend
    )
    carry, outputs = run(seq_lengths=values.astype(dtype))
    want = jnp.stack([problem.carry.h[0], outputs[1, 0], outputs[2, 99]])
    np.testing.assert_array_equal(carry.h, want)
    cases.assert_close(run(seq_lengths=values.astype(dtype), reverse=True), run(seq_lengths=values, reverse=True), 0.0)


# -------------------------------------------------------------------------------------- the padding


def dirty(problem: Problem) -> Problem:
    """NaN, inf and -inf in the place of the padding."""
    values = jnp.resize(jnp.array([np.nan, np.inf, -np.inf, np.nan]), problem.xs.shape)
    return problem._replace(xs=jnp.where(inside(problem.lengths, STEPS)[..., None], problem.xs, values))


def check_padding(case: Case, backend: str, **options: Any) -> None:
    """Non-finite padding gives what zeros give, in results and gradients, for lengths 0, T, 1 and T - 1."""
    problem = cases.draw(case, (2, 2), STEPS, lengths=True, resets=True)
    here = inside(problem.lengths, STEPS)[..., None]
    clean = problem._replace(xs=jnp.where(here, problem.xs, 0))
    run = cases.runner(case, backend, **options)
    d_carry, d_outputs = cases.cotangents(jax.eval_shape(run, *problem))
    pull = cases.puller(run)
    results, gradients = pull(clean, (d_carry, jnp.where(here, d_outputs, 0)))
    got, got_gradients = pull(dirty(problem), (d_carry, jnp.where(here, d_outputs, 0)))
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves((got, got_gradients)))
    cases.assert_close(got, results, 0.0)
    cases.assert_close(got_gradients, gradients, TOLERANCE)
    np.testing.assert_array_equal(np.where(here, 0, got_gradients[1]), 0)


@pytest.mark.sample(2)
@every_cell_and_mode
def test_nan_in_the_padding_reaches_nothing(case: Case, backend: str):
    check_padding(case, backend)


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("user_fast_slow-dense",)))
def test_nan_in_the_padding_reaches_nothing_with(case: Case, backend: str, options: dict[str, Any]):
    check_padding(case, backend, **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", ["scan", "autodiff"], ids=str)
def test_nan_in_the_padding_reaches_no_second_derivative(backend: str):
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, (4,), STEPS, lengths=True)
    here = inside(problem.lengths, STEPS)[..., None]

    def loss(params: Any, xs: Any, carry: Any, lengths: Any) -> Any:
        last, outputs = cases.runner(case, backend)(params, xs, carry, lengths)
        return jnp.sum(jnp.where(here, outputs, 0) ** 2) + sum(jnp.sum(a**3) for a in last)

    @jax.jit
    def hessian_product(moving: Any, direction: Any, lengths: Any) -> Any:
        return jax.jvp(lambda *m: jax.grad(loss, (0, 1, 2))(*m, lengths), moving, direction)

    direction = cases.cotangents(problem[:3])
    clean = problem._replace(xs=jnp.where(here, problem.xs, 0))
    want = hessian_product(clean[:3], direction, problem.lengths)
    got = hessian_product(dirty(problem)[:3], direction, problem.lengths)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(got))
    cases.assert_close(got, want, TOLERANCE)


def test_finite_padding_stays_as_it_is_and_only_nan_counts_as_0():
    cell, problem = small()
    run = functools.partial(rnncore.unroll, cell, problem.params, seq_lengths=jnp.array([2, STEPS]))
    mixed = problem.xs.at[0, 3, 1].set(np.nan)
    np.testing.assert_array_equal(run(mixed)[1], run(problem.xs.at[0, 3, 1].set(0))[1])
    _, whole = rnncore.unroll(cell, problem.params, problem.xs)
    np.testing.assert_array_equal(run(problem.xs)[1], whole)


@pytest.mark.parametrize("backend", ["scan", "autodiff"])
def test_nan_inside_the_length_is_not_repaired(backend: str):
    cell, problem = small()
    carry, outputs = rnncore.unroll(
        cell, problem.params, problem.xs.at[0, 1, 0].set(np.nan), seq_lengths=jnp.array([3, 3]), backend=backend
    )
    assert np.isnan(carry.h[0]).all() and np.isnan(outputs[0, 1:]).all()
    assert np.isfinite(outputs[0, 0]).all() and np.isfinite(outputs[1]).all()


# ----------------------------------------------------------------------------------- as Flax has it


def flax_lstm(params: rnncore.CellParams) -> Any:
    """CellParams as the tree of flax.linen.OptimizedLSTMCell."""
    tree = {}
    for g, gate in enumerate("ifgo"):
        tree[f"i{gate}"] = {"kernel": params.input_kernel[:, g]}
        tree[f"h{gate}"] = {"kernel": params.recurrent_kernel[:, g], "bias": params.bias[g]}
    return tree


def flax_gru(params: rnncore.CellParams) -> Any:
    """CellParams as the tree of flax.linen.GRUCell."""
    tree = {}
    for g, gate in enumerate("rzn"):
        tree[f"i{gate}"] = {"kernel": params.input_kernel[:, g], "bias": params.bias[g]}
        tree[f"h{gate}"] = {"kernel": params.recurrent_kernel[:, g]}
    tree["hn"]["bias"] = params.recurrent_bias[0]
    return tree


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}, {"time_major": True}], ids=str
)
@pytest.mark.parametrize(
    ("name", "flax_cell", "tree"),
    [("lstm-dense", flax.linen.OptimizedLSTMCell(4), flax_lstm), ("gru-dense", flax.linen.GRUCell(4), flax_gru)],
    ids=["lstm", "gru"],
)
def test_outputs_past_the_length_and_carries_are_those_of_flax(name: str, flax_cell: Any, tree: Any, options: Any):
    case = cases.BY_ID[name]
    problem = cases.draw(case, (4,), STEPS)._replace(lengths=jnp.array([1, STEPS, 3, STEPS - 1]))
    if options.get("time_major"):
        problem = problem._replace(xs=jnp.swapaxes(problem.xs, 0, 1))
    carry, outputs = cases.runner(case, "scan", **options)(*problem)
    layer = flax.linen.RNN(flax_cell, return_carry=True, **options)
    start = tuple(problem.carry) if len(problem.carry) > 1 else problem.carry.h
    want_carry, want = layer.apply(
        {"params": {"cell": tree(problem.params)}}, problem.xs, initial_carry=start, seq_lengths=problem.lengths
    )
    cases.assert_close((carry, outputs), (want_carry, want), TOLERANCE)
