"""Online learning: exact rules against backpropagation through time, approximations against the papers' equations."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from online_cases import by_bptt, cotangents_of, numeric_jacobians, through_time

import rnncore
from rnncore import online
from rnncore.online.local import all_additive

EXACT = [pytest.param(cases.BY_ID[id], id=id) for id in cases.EVERY_CELL if id != "reset_before_gru"]
STEPS = 6


@pytest.mark.sample(1)
@pytest.mark.parametrize("case", EXACT)
def test_real_time_recurrent_learning_is_backpropagation_through_time(case: cases.Case):
    """With lengths and resets; the influence of a reset's carry is none, as the carries are constants here."""
    problem = cases.draw(case, (4,), STEPS, lengths=True, resets=True)
    d_carry, d_outputs = cotangents_of(problem, case.cell.hidden_size)
    rule = online.RTRL(case.cell)
    run = jax.jit(lambda problem, *d: through_time(rule, problem, *d))
    _, carry, got = run(problem, d_carry, d_outputs)
    (want_carry, _), want = by_bptt(case, problem, d_carry, d_outputs)
    cases.assert_close((carry, got), (want_carry, want), cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_any_batch_axes(batch: tuple[int, ...]):
    case = cases.BY_ID["lstm_both-heads"]
    problem = cases.draw(case, batch, STEPS)
    d_carry, d_outputs = cotangents_of(problem, case.cell.hidden_size)
    ys, _, got = jax.jit(lambda problem, *d: through_time(online.RTRL(case.cell), problem, *d))(
        problem, d_carry, d_outputs
    )
    (_, want_ys), want = by_bptt(case, problem, d_carry, d_outputs)
    cases.assert_close((ys, got), (want_ys, want), cases.FLOAT64)


def test_vmap_of_a_rule_is_its_batch():
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, (3,), STEPS)
    d_carry, d_outputs = cotangents_of(problem, case.cell.hidden_size)
    rule = online.RTRL(case.cell)
    whole = jax.jit(lambda *args: through_time(rule, *args)[2])(problem, d_carry, d_outputs)

    def one(xs: Any, carry: Any, d_carry: Any, d_outputs: Any) -> Any:
        return through_time(rule, problem._replace(xs=xs, carry=carry), d_carry, d_outputs)[2]

    each = jax.jit(jax.vmap(one))(problem.xs, problem.carry, d_carry, d_outputs)
    cases.assert_close(jax.tree.map(lambda a: a.sum(0), each), whole, cases.FLOAT64)


def test_the_memory_does_not_grow():
    """The state of the scan is the influence and the carry: the same for 10 steps and for 1000."""
    rule = online.RTRL(rnncore.LSTM(4, recurrence=rnncore.Diagonal()))
    params = rule.cell.init(jax.random.key(0), 3)
    memory = rule.init(params, rule.cell.initial_carry())
    numbers = sum(a.size for a in jax.tree.leaves(memory.influence))
    # For each field of the carry as many as there are parameters.
    assert numbers == 2 * sum(a.size for a in jax.tree.leaves(params))

    def temporaries(steps: int) -> int:
        def last(params: Any, xs: Any) -> Any:
            body = lambda m, x: (rule.step(params, m, x)[0], None)  # noqa: E731
            return rule.gradient(params, jax.lax.scan(body, memory, xs)[0], jnp.ones(4))

        return jax.jit(last).lower(params, jnp.ones((steps, 3))).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1000) <= temporaries(10) + 1024


# ------------------------------------------------------------------- approximations, from the equations


def followed(cell: Any, problem: cases.Problem, d_outputs: Any, constant_r: bool, keep: Any) -> Any:
    """sum_t (dL/dh_t) P_t for one sequence, P_t = keep(J P_{t-1} + I), all of P_t written out."""
    params, xs, carry = problem[:3]
    hidden, fields = cell.hidden_size, len(carry)
    influence = jax.tree.map(lambda p: np.zeros((fields * hidden, *p.shape)), params)
    total = jax.tree.map(lambda p: np.zeros(p.shape), params)
    for x, dy in zip(xs, d_outputs, strict=True):
        carry, jacobian, immediate = numeric_jacobians(cell, params, carry, x, constant_r)
        influence = jax.tree.map(lambda i, p, j=jacobian: i + np.tensordot(j, p, 1), immediate, influence)
        influence = keep(influence)
        row = type(carry)._fields.index("h") * hidden
        total = jax.tree.map(
            lambda t, p, row=row, dy=dy: t + np.tensordot(dy, p[row : row + hidden], 1), total, influence
        )
    return total


SOME = ("lstm-dense", "lstm_both-heads", "gru-dense", "mgu-diagonal", "user_fast_slow-heads", "elman_residual-dense")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("rule", [online.SnAp1, online.EProp])
def test_rules_of_own_units_are_those_of_the_papers(name: str, rule: Any):
    """SnAp-1: only entries of P that one step makes are kept; e-prop: through r nothing is followed.

    In both a parameter's influence stays on its own unit by itself then, which the written-out P does not assume.
    """
    case = cases.BY_ID[name]
    problem = cases.draw(case, (), STEPS)
    _, d_outputs = cotangents_of(problem, case.cell.hidden_size)
    zero = jax.tree.map(jnp.zeros_like, problem.carry)
    got = jax.jit(lambda *args: through_time(rule(case.cell), *args)[2])(problem, zero, d_outputs)
    # e-prop leaves nothing out of P, SnAp-1 nothing out of J.
    masks = by_unit(case.cell, problem) if rule is online.SnAp1 else jax.tree.map(lambda _: 1, problem.params)

    def keep(influence: Any) -> Any:
        return jax.tree.map(lambda p, m: p * m, influence, masks)

    cases.assert_close(got, followed(case.cell, problem, d_outputs, rule is online.EProp, keep), cases.FLOAT64)


def by_unit(cell: Any, problem: cases.Problem) -> Any:
    """Where one step from a generic state can put an entry of P: units i that parameter k acts on at once."""
    rng = np.random.default_rng(5)

    def drawn(a: Any) -> Any:
        return jnp.asarray(rng.normal(0, 1, a.shape))

    found = jax.tree.map(lambda p: np.zeros((len(problem.carry) * cell.hidden_size, *p.shape), bool), problem.params)
    for _ in range(4):
        params, carry, x = jax.tree.map(drawn, (problem.params, problem.carry, problem.xs[0]))
        found = jax.tree.map(lambda f, i: f | (np.asarray(i) != 0), found, numeric_jacobians(cell, params, carry, x)[2])
    # A state of a unit that a parameter reaches at all belongs to the pattern with all of its fields.
    fields, hidden = len(problem.carry), cell.hidden_size

    def whole(f: Any) -> Any:
        of_unit = f.reshape(fields, hidden, *f.shape[1:]).any(0)
        return np.concatenate([of_unit] * fields)

    return jax.tree.map(whole, found)


def test_rflo_is_the_rule_of_the_paper():
    """p_ij = (1 - alpha) p_ij + alpha phi'(u_i) h_j and dw_ij = (B e)_i p_ij, written out in NumPy."""
    cell = rnncore.Leaky(3, dt=1.0, tau=4.0)
    case = cases.Case("leaky", cell, None)
    problem = cases.draw(case, (), STEPS, features=2)
    rng = np.random.default_rng(1)
    readout, back, targets = rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), rng.normal(size=(STEPS, 2))
    rule = online.RFLO(cell)
    memory, got = rule.init(problem.params, problem.carry), np.zeros((3, 3))
    W, U, b = (np.asarray(a) for a in (*(k[:, 0] for k in problem.params[:2]), problem.params.bias[0]))
    h, p, want = np.asarray(problem.carry.h), np.zeros((3, 3)), np.zeros((3, 3))
    for x, target in zip(np.asarray(problem.xs), targets, strict=True):
        memory, y = rule.step(problem.params, memory, jnp.asarray(x))

        def loss(y: Any, target: Any = target) -> Any:
            return jnp.sum((online.feedback(y, jnp.asarray(readout), jnp.asarray(back)) - target) ** 2) / 2

        got = got + np.asarray(rule.gradient(problem.params, memory, jax.grad(loss)(y)).recurrent_kernel)[:, 0]
        u = x @ W + h @ U + b
        p = 0.75 * p + 0.25 * np.outer(h, 1 - np.tanh(u) ** 2)
        h = 0.75 * h + 0.25 * np.tanh(u)
        want += p * (back @ (h @ readout - target))
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.sample(1)
@pytest.mark.parametrize("rule", [online.UORO, online.KFRTRL])
@pytest.mark.parametrize("name", ["lstm-dense", "lstm-heads", "elman-diagonal"])
def test_random_rules_are_unbiased(name: str, rule: Any):
    """The mean over draws lies within five standard errors of the exact gradient, for every parameter."""
    case = cases.BY_ID[name]
    problem = cases.draw(case, (), 4, features=2)
    d_carry, d_outputs = cotangents_of(problem, case.cell.hidden_size)
    made = rule(case.cell)
    run = jax.jit(jax.vmap(lambda key: through_time(made, problem, d_carry, d_outputs, key)[2]))
    draws = run(jax.random.split(jax.random.key(3), 4000))
    _, exact = by_bptt(case, problem, d_carry, d_outputs)
    for got, want in zip(jax.tree.leaves(draws), jax.tree.leaves(exact), strict=True):
        got = np.asarray(got)
        error = np.abs(got.mean(0) - np.asarray(want)) / (got.std(0) / np.sqrt(len(got)) + 1e-12)
        assert error.max() < 5, error.max()


def test_uoro_is_the_recursion_of_the_paper():
    """s~ = rho_0 J s~ + rho_1 nu, theta~ = theta~ / rho_0 + nu I / rho_1, with whole Jacobians in NumPy."""
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, (), 3)
    rule, carry = online.UORO(case.cell), problem.carry
    memory = rule.init(problem.params, carry)
    state = np.zeros(case.cell.hidden_size)
    theta = jax.tree.map(lambda p: np.zeros(p.shape), problem.params)
    size = lambda tree: np.sqrt(sum(np.sum(np.asarray(a) ** 2) for a in jax.tree.leaves(tree)))  # noqa: E731
    for key, x in zip(jax.random.split(jax.random.key(0), 3), problem.xs, strict=True):
        signs = np.asarray(jax.random.rademacher(jax.random.split(key, 1)[0], carry.h.shape, carry.h.dtype))
        carry, jacobian, immediate = numeric_jacobians(case.cell, problem.params, carry, x)
        moved = jacobian @ state
        added = jax.tree.map(lambda i, signs=signs: np.tensordot(signs, i, 1), immediate)
        rho_0 = np.sqrt(size(theta) / (size(moved) + 1e-7)) + 1e-7
        rho_1 = np.sqrt(size(added) / (size(signs) + 1e-7)) + 1e-7
        state = rho_0 * moved + rho_1 * signs
        theta = jax.tree.map(lambda t, a, p=rho_0, q=rho_1: t / p + a / q, theta, added)
        memory, _ = rule.step(problem.params, memory, x, key=key)
    cases.assert_close(memory.influence, (type(carry)(state), theta), 1e-10)


def test_kronecker_factors_are_those_of_the_paper():
    """u = c_1 p_1 u + c_2 p_2 v, A = c_1 / p_1 J A + c_2 / p_2 D, in NumPy for a network of one gate."""
    case = cases.BY_ID["elman-dense"]
    problem = cases.draw(case, (), 3)
    rule, carry, hidden = online.KFRTRL(case.cell), problem.carry, case.cell.hidden_size
    memory = rule.init(problem.params, carry)
    u, matrix = np.zeros(3 + 1 + hidden), np.zeros((hidden, hidden))
    for key, x in zip(jax.random.split(jax.random.key(0), 3), problem.xs, strict=True):
        c = np.asarray(jax.random.rademacher(key, (2, 1), jnp.float64))[:, 0]
        v = np.concatenate([x, [1.0], carry.h])
        carry, jacobian, immediate = numeric_jacobians(case.cell, problem.params, carry, x)
        by_gate = np.asarray(immediate.bias)[:, 0]
        moved = np.asarray(jacobian) @ matrix
        p_1 = np.sqrt((np.linalg.norm(moved) + 1e-7) / (np.linalg.norm(u) + 1e-7))
        p_2 = np.sqrt((np.linalg.norm(by_gate) + 1e-7) / (np.linalg.norm(v) + 1e-7))
        u, matrix = c[0] * p_1 * u + c[1] * p_2 * v, c[0] / p_1 * moved + c[1] / p_2 * by_gate
        memory, _ = rule.step(problem.params, memory, x, key=key)
    vector, (factor,) = memory.influence
    np.testing.assert_allclose(vector[0], u, rtol=1e-10)
    np.testing.assert_allclose(factor[0, :, 0], matrix, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------- updates


def test_an_update_without_learning_rate_adds_up_to_backpropagation():
    """The gradients that the optimiser sees, summed, are those of the whole sequence, readout included."""
    cell = rnncore.LSTM(4, recurrence=rnncore.Heads(2))
    case = cases.Case("lstm", cell, None)
    problem = cases.draw(case, (2,), STEPS)
    rng = np.random.default_rng(0)
    params = {"cell": problem.params, "readout": jnp.asarray(rng.normal(size=(4, 2)))}
    targets = jnp.asarray(rng.normal(size=(2, STEPS, 2)))

    def loss_fn(readout: Any, y: Any, target: Any) -> Any:
        return jnp.sum((y @ readout - target) ** 2)

    def whole(params: Any) -> Any:
        ys = rnncore.unroll(cell, params["cell"], problem.xs, initial_carry=problem.carry)[1]
        return loss_fn(params["readout"], ys, targets)

    summing = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params: (
            jax.tree.map(jnp.zeros_like, updates), jax.tree.map(jnp.add, state, updates),
        ),
    )  # fmt: skip
    rule = online.RTRL(cell)
    state = online.OnlineState(params, summing.init(params), rule.init(problem.params, problem.carry))
    now = online.OnlineInput(jnp.moveaxis(problem.xs, 1, 0), jnp.moveaxis(targets, 1, 0))
    state, losses = jax.lax.scan(online.online_update(rule, loss_fn, summing), state, now)
    value, gradient = jax.value_and_grad(whole)(params)
    np.testing.assert_allclose(losses.sum(), value, rtol=1e-12)
    cases.assert_close(state.optimizer, gradient, cases.FLOAT64)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("rule", "learns"), [(online.RTRL, True), (online.EProp, False)])
def test_only_the_exact_rule_learns_what_goes_from_unit_to_unit(rule: Any, learns: bool):
    """The sign of the input three steps ago, in a vanilla network that has to pass it on."""
    cell, optimizer = rnncore.Elman(16), optax.adam(1e-2)
    made = rule(cell)

    def loss_fn(readout: Any, y: Any, target: Any) -> Any:
        return jnp.mean((y @ readout - target) ** 2)

    signs = jax.random.rademacher(jax.random.key(0), (1003, 16, 1), jnp.float32)
    params = {"cell": cell.init(jax.random.key(1), 1), "readout": jnp.zeros((16, 1))}
    state = online.OnlineState(params, optimizer.init(params), made.init(params["cell"], cell.initial_carry((16,))))
    now = online.OnlineInput(signs[3:], signs[:-3])
    _, losses = jax.jit(lambda s, n: jax.lax.scan(online.online_update(made, loss_fn, optimizer), s, n))(state, now)
    assert losses[:5].mean() > 0.9
    assert (losses[-100:].mean() < 0.05) == learns


# ------------------------------------------------------------------------------------------ errors


def test_which_cells_see_sums_only():
    assert all_additive(rnncore.LSTM(4, peepholes=True)) and all_additive(rnncore.Elman(4))
    assert not all_additive(rnncore.GRU(4)) and not all_additive(cases.FastSlow(4))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: online.RTRL(rnncore.ResetBeforeGRU(4)), ValueError, "expected a PointwiseCell"),
        (lambda: online.KFRTRL(rnncore.GRU(4)), NotImplementedError, "as a sum"),
        (lambda: online.KFRTRL(rnncore.LSTM(4, peepholes=True)), NotImplementedError, "per-unit"),
        (lambda: online.RFLO(rnncore.LSTM(4)), NotImplementedError, "use EProp"),
        (lambda: online.feedback(jnp.ones(2), jnp.ones((2, 1)), jnp.ones((2, 2))), ValueError, "one shape"),
        (lambda: rnncore.Leaky(4, dt=2.0, tau=1.0), ValueError, "0 < dt <= tau"),
        (lambda: rnncore.Leaky(4, tau=(1.0, 2.0)), ValueError, "one for each unit"),
    ],
)
def test_what_is_refused(call: Any, error: Any, words: str):
    with pytest.raises(error, match=words):
        call()


def test_a_step_checks_what_it_is_given():
    cell = rnncore.GRU(4)
    rule, params = online.RTRL(cell), cell.init(jax.random.key(0), 3)
    memory = rule.init(params, cell.initial_carry((2,)))
    with pytest.raises(ValueError, match=r"expected \(2, 3\)"):
        rule.step(params, memory, jnp.ones((3,)))
    with pytest.raises(ValueError, match=r"reset=.*expected bool \(2,\)"):
        rule.step(params, memory, jnp.ones((2, 3)), reset=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"cotangent=.*expected \(2, 4\)"):
        rule.gradient(params, memory, jnp.ones(4))
    with pytest.raises(ValueError, match="expected a key"):
        online.UORO(cell).step(params, online.UORO(cell).init(params, cell.initial_carry((2,))), jnp.ones((2, 3)))
