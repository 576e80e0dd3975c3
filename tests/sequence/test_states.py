"""return_states: every carry and every gate, in the place where the input has its time axis."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Problem

import rnncore

STEPS = 4
TOLERANCE = 1e-13


@functools.partial(jax.jit, static_argnums=0)
def step_by_step(case: Case, problem: Problem) -> tuple[Any, Any]:
    """(carries of T + 1 moments, gates of T steps), time first, from `cell.update` in a loop of Python."""
    cell, params, carry = case.cell, problem.params, problem.carry
    carries, gates = [carry], []
    for t in range(problem.xs.shape[-2]):
        if problem.resets is not None:
            here = problem.resets[..., t, None]
            carry = jax.tree.map(lambda a, b, here=here: jnp.where(here, a, b), problem.carry, carry)
        carry, gate = cell.update(params, carry, cell.project(params, problem.xs[..., t, :]))
        carries.append(carry)
        gates.append(gate)
    return tuple(jax.tree.map(lambda *a: jnp.stack(a), *stack) for stack in (carries, gates))


def run(case: Case, backend: str, problem: Problem, **options: Any) -> Any:
    return cases.runner(case, backend, return_states=True, **options)(*problem)


def time_second(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), tree)


def backwards(array: Any, lengths: Any = None) -> Any:
    """(B, T, ...) with the first L steps of every row in the opposite order, and its other steps too."""
    lengths = [array.shape[1]] * array.shape[0] if lengths is None else lengths
    rows = [np.concatenate([a[:n][::-1], a[n:][::-1]]) for a, n in zip(np.asarray(array), lengths, strict=True)]
    return jnp.asarray(np.stack(rows))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("case", "backend"), cases.rows(cases.EVERY_CELL))
def test_states_are_those_of_single_steps(case: Case, backend: str):
    problem = cases.draw(case, (2,), STEPS, resets=True)
    carry, outputs, states = run(case, backend, problem, include_initial=True)
    carries, gates = step_by_step(case, problem)
    cases.assert_close(states, time_second((carries, gates)), TOLERANCE)
    cases.assert_close(carry, jax.tree.map(lambda a: a[-1], carries), TOLERANCE)
    np.testing.assert_array_equal(states.carries.h[:, 1:], outputs)
    assert type(states.carries) is type(problem.carry)


ROWS = cases.rows(ids=("lstm_peepholes-dense", "gru-heads", "reset_before_gru"))


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_asking_for_states_changes_nothing_else(case: Case, backend: str):
    problem = cases.draw(case, (3,), STEPS, lengths=True, resets=True)
    with_states = run(case, backend, problem)
    cases.assert_close(with_states[:2], cases.runner(case, backend)(*problem), TOLERANCE)
    assert isinstance(with_states[2], rnncore.States)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options", [{"checkpoint_every": 3, "recompute": "chunk"}, {"checkpoint_every": 2, "recompute": "gates"}], ids=str
)
@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_chunks_leave_states_as_they_are(case: Case, backend: str, options: dict[str, Any]):
    problem = cases.draw(case, (3,), STEPS, lengths=True, resets=True)
    cases.assert_close(run(case, backend, problem, **options), run(case, backend, problem), TOLERANCE)


@pytest.mark.sample(3)
@pytest.mark.parametrize("include_initial", [False, True])
@pytest.mark.parametrize("lengths", [None, [STEPS, 0, 2, 1]], ids=["whole", "lengths"])
@pytest.mark.parametrize("keep_order", [False, True])
def test_states_of_a_reversed_run(keep_order: bool, lengths: Any, include_initial: bool):
    case, backend = cases.BY_ID["lstm-dense"], "scan"
    problem = cases.draw(case, (4,), STEPS)._replace(lengths=None if lengths is None else jnp.array(lengths))
    if keep_order and lengths and include_initial:
        # Rows of other lengths have their first step at other places: no one place for the initial carry.
        with pytest.raises(ValueError, match="the initial carry has no place of its own"):
            run(case, backend, problem, reverse=True, keep_order=True, include_initial=True)
        return
    carry, outputs, states = run(
        case, backend, problem, reverse=True, keep_order=keep_order, include_initial=include_initial
    )
    carries, gates = time_second(step_by_step(case, problem._replace(xs=backwards(problem.xs, lengths))))
    carries_after = jax.tree.map(lambda a: a[:, 1:], carries)
    if keep_order:
        gates, carries_after = jax.tree.map(lambda a: backwards(a, lengths), (gates, carries_after))
    cases.assert_close((states.gates, outputs), (gates, carries_after.h), TOLERANCE)

    # The initial carry comes first in the order of processing: at the end where the order is that of the inputs.
    own = jax.tree.map(lambda a: a[:, None], problem.carry)
    if include_initial:
        pair = (carries_after, own) if keep_order else (own, carries_after)
        carries_after = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), *pair)
    cases.assert_close(states.carries, carries_after, TOLERANCE)
    after = [STEPS] * 4 if lengths is None else lengths
    cases.assert_close(
        carry, jax.tree.map(lambda a: jnp.stack([a[b, n] for b, n in enumerate(after)]), carries), TOLERANCE
    )


@pytest.mark.sample(3)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("include_initial", [False, True])
@pytest.mark.parametrize("time_major", [False, True])
def test_the_time_axis_stands_where_that_of_the_inputs_does(
    batch: tuple[int, ...], time_major: bool, include_initial: bool
):
    case, backend = cases.BY_ID["lstm-dense"], "scan"
    problem = cases.draw(case, batch, STEPS)
    carries, gates = step_by_step(case, problem)
    if not include_initial:
        carries = jax.tree.map(lambda a: a[1:], carries)
    if time_major:
        problem = problem._replace(xs=jnp.moveaxis(problem.xs, -2, 0))
    else:
        carries, gates = jax.tree.map(lambda a: jnp.moveaxis(a, 0, len(batch)), (carries, gates))
    _, _, states = run(case, backend, problem, time_major=time_major, include_initial=include_initial)
    cases.assert_close(states, (carries, gates), TOLERANCE)


@pytest.mark.parametrize("backend", ["scan", "autodiff"])
def test_the_carry_of_a_length_is_among_the_states(backend: str):
    case = cases.BY_ID["lstm-dense"]
    lengths = [STEPS, 0, 2, 1]
    problem = cases.draw(case, (4,), STEPS)._replace(lengths=jnp.array(lengths))
    carry, _, states = run(case, backend, problem, include_initial=True)
    for got, stack in zip(carry, states.carries, strict=True):
        np.testing.assert_array_equal(got, jnp.stack([stack[b, n] for b, n in enumerate(lengths)]))


def test_gates_by_hand():
    cell = rnncore.LSTM(3)
    case = Case("", cell, None)
    params, xs, start, *_ = cases.draw(case, (), 2)
    _, _, states = rnncore.unroll(cell, params, xs, initial_carry=start, return_states=True)
    w, u, b = (np.asarray(a) for a in params[:3])
    c, h = (np.asarray(a) for a in start)
    for t in range(2):
        i, f, g, o = (np.asarray(xs[t]) @ w[:, k] + h @ u[:, k] + b[k] for k in range(4))
        i, f, o = (1 / (1 + np.exp(-a)) for a in (i, f, o))
        g = np.tanh(g)
        c = f * c + i * g
        h = o * np.tanh(c)
        for got, want in zip(jax.tree.leaves(states), (c, h, i, f, g, o), strict=True):
            np.testing.assert_allclose(got[t], want, atol=1e-14)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_states_are_differentiated(case: Case, backend: str):
    """A loss on carries and gates has the gradients of the loop of single steps."""
    problem = cases.draw(case, (2,), STEPS, resets=True)

    def loss(states: Any) -> Any:
        return sum(jnp.sum(jnp.sin(leaf * (n + 1))) for n, leaf in enumerate(jax.tree.leaves(states)))

    def whole(params: Any, xs: Any, carry: Any) -> Any:
        return loss(run(case, backend, Problem(params, xs, carry, None, problem.resets), include_initial=True)[2])

    def single(params: Any, xs: Any, carry: Any) -> Any:
        return loss(step_by_step(case, Problem(params, xs, carry, None, problem.resets)))

    got, want = (jax.jit(jax.grad(f, (0, 1, 2)))(*problem[:3]) for f in (whole, single))
    cases.assert_close(got, want, 1e-12)


class Marked(rnncore.PointwiseCell):
    """Calls a boolean and an integer gates: they have no derivative."""

    gates = ("a",)

    def pointwise(self, p, z, r, carry):
        h = jnp.tanh(z.a + r.a)
        return carry._replace(h=h), {"on": h > 0, "h": h, "sign": jnp.sign(h).astype(jnp.int32)}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["nothing", "gates", "chunk"])
def test_gates_that_are_no_numbers_to_differentiate(recompute):
    cell = Marked(3)
    params = cell.init(jax.random.key(0), 2, jnp.float64)
    xs = jax.random.normal(jax.random.key(1), (2, 4, 2), jnp.float64)

    def loss(params, xs, backend):
        _, ys, states = rnncore.unroll(cell, params, xs, backend=backend, return_states=True, recompute=recompute)
        return jnp.sum(jnp.where(states.gates["on"], ys, 0) * states.gates["h"] * states.gates["sign"])

    for transform in (jax.grad, lambda f: jax.jacfwd(f, 1), lambda f: jax.hessian(f, 1)):
        got, want = (transform(functools.partial(loss, backend=b))(params, xs) for b in ("scan", "autodiff"))
        cases.assert_close(got, want, cases.FLOAT64)
