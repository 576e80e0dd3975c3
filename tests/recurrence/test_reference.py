"""Outputs, final carries and all gradients against the NumPy references."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case

HELD = [
    row
    for row in cases.rows(every_backend=True)
    if row.values[1] != "autodiff" or (row.values[0].reference and row.values[0].id in cases.EVERY_CELL)
]
"""All rows of the loops; of plain autodiff one for each cell that has a reference."""


@pytest.mark.sample(2)
@pytest.mark.parametrize(("case", "backend"), HELD)
def test_with_lengths_and_resets(case: Case, backend: str):
    problem = cases.draw(case, lengths=True, resets=True)
    cases.assert_expected(case, problem, *cases.pull(cases.runner(case, backend), problem))


DRAWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no_batch": ({"batch": (), "lengths": True, "resets": True}, {}),
    "two_batch_axes": ({"batch": (2, 3), "lengths": True, "resets": True}, {}),
    "square_batch": ({"batch": (5, 5), "lengths": True}, {}),
    "only_resets": ({"resets": True}, {}),
    "one_step": ({"steps": 1, "lengths": True, "resets": True}, {}),
    "reverse": ({"lengths": True, "resets": True}, {"reverse": True}),
    "reverse_keep_order": ({"lengths": True, "resets": True}, {"reverse": True, "keep_order": True}),
    "reverse_keep_order_no_lengths": ({}, {"reverse": True, "keep_order": True}),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("case", "backend"), cases.rows(ids=("lstm_both-dense", "reset_before_gru")))
def test_batch_axes_and_options(case: Case, backend: str, draw: str):
    drawn, options = DRAWS[draw]
    problem = cases.draw(case, **drawn)
    got = cases.pull(cases.runner(case, backend, **options), problem)
    cases.assert_expected(case, problem, *got, **options)


STATES = ("elman-heads", "lstm-diagonal", "lstm_both-dense", "gru-dense", "mgu-heads", "reset_before_gru")


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", [cases.BY_ID[i] for i in STATES], ids=STATES)
def test_carries_and_gates(case: Case):
    problem = cases.draw(case, lengths=True, resets=True)
    run = cases.runner(case, case.backends[0], return_states=True)
    _, _, states = jax.jit(run)(*problem)
    want = reference.forward(
        case.reference, cases.as_reference(problem.params), np.asarray(problem.xs), tuple(problem.carry),
        lengths=np.asarray(problem.lengths), resets=np.asarray(problem.resets),
    )  # fmt: skip
    assert states.gates._fields == case.reference.gates
    cases.assert_close(states, (want.carries, want.gates), cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("case", "backend"), cases.rows(ids=("elman_silu", "lstm_both-dense", "gru-heads", "reset_before_gru"))
)
def test_low_precision(case: Case, backend: str, dtype: Any):
    problem = cases.draw(case, lengths=True, resets=True, dtype=dtype)
    results, gradients, d_results = cases.pull(cases.runner(case, backend), problem)
    assert {a.dtype for a in jax.tree.leaves((results, gradients))} == {jnp.dtype(dtype)}
    # Rounding adds up over the T (D + H) products of a run; the worst error seen is 0.4 of this.
    *_, steps, features = problem.xs.shape
    tolerance = float(jnp.finfo(dtype).eps) * (steps * (features + case.cell.hidden_size)) ** 0.5
    cases.assert_expected(case, problem, results, gradients, d_results, tolerance)
