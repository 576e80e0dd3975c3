"""Gradients over time against jax.grad, finite differences and written-out formulas."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from analysis_cases import close, run_of

import rnncore
from rnncore import analysis
from rnncore.analysis.gradients._backward import backward

EXACT = 1e-12
NAMES = ("lstm_both-dense", "gru_no_recurrent_bias", "user_fast_slow-heads", "reset_before_gru")


def weights(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape))


def loss(carry, outputs):
    """Depends on every output of every sequence, not linearly, and on all of the last carry."""
    last = sum(jnp.sum(jnp.sin(a) * weights(*a.shape)) for a in carry)
    return last + jnp.sum(jnp.cos(outputs) * weights(*outputs.shape))


def last_output(carry, outputs):
    """One loss term."""
    return jnp.sum(carry.h * weights(*carry.h.shape))


def plain(cell, problem, moves):
    """The loss of a run written out step by step, every state moved by its entry of `moves`."""
    zs = cell.project(problem.params, problem.xs)
    state = last = jax.tree.map(lambda a, m: a + m[:, 0], problem.carry, moves)
    outputs = []
    for t in range(problem.xs.shape[1]):
        state = jax.tree.map(lambda s, a, t=t: jnp.where(problem.resets[:, t, None], a, s), state, problem.carry)
        state, _ = cell.update(problem.params, state, zs[:, t])
        state = jax.tree.map(lambda s, m, t=t: s + m[:, t + 1], state, moves)
        outputs.append(cell.output(state))
        last = jax.tree.map(lambda s, a, t=t: jnp.where((problem.lengths == t + 1)[:, None], s, a), state, last)
    return loss(last, jnp.stack(outputs, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_gradients_with_resets_and_lengths(name):
    case = cases.BY_ID[name]
    cell, problem = case.cell, cases.draw(case, (4,), 5, lengths=True, resets=True)
    options = {"seq_lengths": problem.lengths, "resets": problem.resets, "reset_carry": problem.carry}

    def whole(params, xs, carry):
        return loss(*rnncore.unroll(cell, params, xs, initial_carry=carry, **options))

    value, (d_params, d_xs, d_carry) = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(*problem[:3])
    # What resets return to is a constant whether it is named or not.
    del options["reset_carry"]
    got = analysis.gradients_over_time(loss, cell, *problem[:3], **options)
    close(got.value, value, EXACT)
    close(got.inputs, d_xs, EXACT)
    steps = jax.tree.leaves(got.parameters)
    assert all(a.shape[0] == 5 for a in steps)
    for step, want in zip(steps, jax.tree.leaves(d_params), strict=True):
        close(step.sum(0), want, EXACT)
        assert float(jnp.abs(step).max()) > 0.01
    close(jax.tree.leaves(got.states)[0][:, 0], jax.tree.leaves(d_carry)[0], EXACT)

    moves = jax.tree.map(jnp.zeros_like, got.states)
    for state, want in zip(got.states, jax.jit(jax.grad(lambda m: plain(cell, problem, m)))(moves), strict=True):
        close(state, want, EXACT)

    norms = dataclasses.replace(got, norms=True).parameters
    for size, step in zip(jax.tree.leaves(norms), steps, strict=True):
        close(size, np.linalg.norm(step.reshape(5, -1), axis=-1), EXACT)

    if not isinstance(cell, rnncore.PointwiseCell):
        with pytest.raises(NotImplementedError, match="ResetBeforeGRU is not a PointwiseCell.*`.states`.*any cell has"):
            _ = got.gates
        return
    # Biases enter z and r as they are, at every step.
    close(np.stack([a.sum((0, 1)) for a in got.gates]), d_params.bias, EXACT)
    for row, gate in enumerate(cell.recurrent_bias if d_params.recurrent_bias is not None else ()):
        close(getattr(got.recurrent, gate).sum((0, 1)), d_params.recurrent_bias[row], EXACT)


def test_state_gradients_are_differences_of_the_numpy_reference():
    case = cases.BY_ID["gru-dense"]
    problem = cases.draw(case, (), 4)
    states = analysis.gradients_over_time(last_output, case.cell, *problem[:3]).states
    params, xs = cases.as_reference(problem.params), np.asarray(problem.xs)
    _, outputs = rnncore.unroll(case.cell, *problem[:2], initial_carry=problem.carry)
    hs = np.concatenate([problem.carry.h[None], outputs])
    moves = 1e-5 * np.concatenate([np.eye(4), -np.eye(4)])
    for t in range(4):
        rest = np.broadcast_to(xs[t:], (8, *xs[t:].shape))
        last = reference.forward(case.reference, params, rest, (hs[t] + moves,)).last[0] @ np.asarray(weights(4))
        close(states.h[t], (last[:4] - last[4:]) / 2e-5, 1e-9)
    close(states.h[4], weights(4), EXACT)


# ----------------------------------------------------------------------------------- formulas


def lstm_run():
    run = run_of(rnncore.LSTM(4))
    first = jax.tree.map(lambda a: a[:, 0], run.carries)
    return run, analysis.gradients_over_time(loss, run.cell, run.params, run.xs, first)


def test_gate_gradients_of_an_lstm_are_the_written_out_ones():
    run, got = lstm_run()
    i, f, g, o = map(np.asarray, run.gates)
    before, c = np.asarray(run.carries.c)[:, :-1], np.asarray(run.carries.c)[:, 1:]
    dh = np.asarray(got.states.h)[:, 1:]
    dc = np.asarray(got.states.c)[:, 1:] + o * (1 - np.tanh(c) ** 2) * dh
    want = (dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g**2), dh * np.tanh(c) * o * (1 - o))
    for gate, number in zip(got.gates, want, strict=True):
        close(gate, number, EXACT)
    jax.tree.map(lambda a, b: close(a, b, 1e-15), got.gates, got.recurrent)


def test_the_forget_gate_alone_carries_the_total_gradient_of_the_cell_state():
    """dL/dc_t = o_t (1 - tanh^2 c_t) dL/dh_t + f_{t+1} dL/dc_{t+1}, exact where dL/dh_t is total."""
    run, got = lstm_run()
    slope = np.asarray(run.gates.o) * (1 - np.tanh(np.asarray(run.carries.c)[:, 1:]) ** 2)
    total = np.asarray(got.states.c)[:, 1:] + slope * np.asarray(got.states.h)[:, 1:]
    want = slope * np.asarray(got.states.h)[:, 1:]
    want[:, :-1] += np.asarray(run.gates.f)[:, 1:] * total[:, 1:]
    want[:, -1] += got.states.c[:, -1]
    close(total, want, EXACT)


def test_gate_gradients_of_a_gru():
    run = run_of(rnncore.GRU(4))
    first = jax.tree.map(lambda a: a[:, 0], run.carries)
    got = analysis.gradients_over_time(loss, run.cell, run.params, run.xs, first)
    r, z, n = map(np.asarray, run.gates)
    dh, before = np.asarray(got.states.h)[:, 1:], np.asarray(run.carries.h)[:, :-1]
    dn = dh * (1 - z) * (1 - n**2)
    close(got.gates.n, dn, EXACT)
    close(got.recurrent.n, dn * r, EXACT)
    close(got.gates.z, dh * (before - n) * z * (1 - z), EXACT)


# ------------------------------------------------------------------------------- how it is done


def loops(program):
    """Number of loops in a jaxpr, or in whatever holds some, those inside other equations included."""
    if isinstance(program, tuple | list):
        return sum(map(loops, program))
    jaxpr = getattr(program, "jaxpr", program)
    return sum(
        (eqn.primitive.name in ("scan", "while")) + loops(list(eqn.params.values()))
        for eqn in getattr(jaxpr, "eqns", ())
    )


def test_one_run_and_one_backward_pass():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, (2,), 4)

    def everything(norms):
        def call(params, xs, carry):
            found = analysis.gradients_over_time(loss, case.cell, params, xs, carry, norms=norms)
            return found.states, found.inputs, found.gates, found.parameters

        return jax.make_jaxpr(call)(*problem[:3])

    assert loops(everything(norms=False)) == 2
    assert loops(everything(norms=True)) == 3  # one more, step by step over what is known by then


@pytest.mark.slow
def test_inside_jit_in_float32_and_sequence_by_sequence():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, (3,), 4)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), problem[:3])

    def everything(params, xs, carry):
        def only(carry, outputs):
            return jnp.sum(jnp.sin(outputs[1])) + jnp.sum(carry.c[1])

        return analysis.gradients_over_time(only, case.cell, params, xs, carry)

    got = jax.jit(everything)(*single)
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    # Gradients of one sequence stay in it, and are those of that sequence on its own.
    for array in jax.tree.leaves((got.states, got.inputs, got.gates)):
        assert np.all(array[::2] == 0) and np.any(array[1] != 0)
    alone = jax.tree.map(lambda a: a[1], problem[1:3])
    want = analysis.gradients_over_time(
        lambda carry, outputs: jnp.sum(jnp.sin(outputs)) + jnp.sum(carry.c), case.cell, problem.params, *alone
    )
    for name in ("states", "inputs", "gates"):
        jax.tree.map(lambda a, b: close(a[1], b, 2e-5), getattr(got, name), getattr(want, name))
    jax.tree.map(lambda a, b: close(a, b, 2e-5), got.parameters, want.parameters)


@pytest.mark.slow
def test_padding_may_hold_nan_and_zero_states_are_the_default():
    cell = rnncore.GRU(3)
    params = cell.init(jax.random.key(0), 2, jnp.float64)
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2))).at[1, 2:].set(jnp.nan)
    got = analysis.gradients_over_time(last_output, cell, params, xs, seq_lengths=jnp.array([4, 2]))
    short = analysis.gradients_over_time(
        lambda carry, outputs: jnp.sum(carry.h * weights(2, 3)[1]), cell, params, xs[1, :2],
        rnncore.HiddenCarry(jnp.zeros(3)),
    )  # fmt: skip
    close(got.states.h[1, :3], short.states.h, EXACT)
    close(got.inputs[1, :2], short.inputs, EXACT)
    assert np.all(got.states.h[1, 3:] == 0) and np.all(got.inputs[1, 2:] == 0)
    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(got))


# -------------------------------------------------------------------------------------- errors


CELL = rnncore.LSTM(3)
PARAMS, XS = CELL.init(jax.random.key(0), 2, jnp.float64), jnp.ones((2, 4, 2))


def test_bad_input():
    function = analysis.gradients_over_time
    with pytest.raises(ValueError, match=r"xs=<int32 .*expected floating point; embed or convert"):
        function(last_output, CELL, PARAMS, XS.astype(jnp.int32))
    broken = PARAMS._replace(bias=PARAMS.bias.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"`gradients_over_time\(params=...\)`: .bias of shape \(4, 3\) holds 1 NaN"):
        function(last_output, CELL, broken, XS)


@pytest.mark.parametrize(
    ("xs", "options", "message"),
    [
        (XS[:, :0], {}, r"no steps; expected T of at least 1"),
        (XS.at[0, 0].set(jnp.inf), {"seq_lengths": jnp.array([1, 4])}, r"`f\(xs=...\)`: .* holds 2 NaN or infinite"),
        (XS, {"initial_carry": rnncore.HiddenCarry(jnp.ones((2, 3)))}, "expected LSTMCarry"),
        (XS, {"resets": jnp.ones((2, 4))}, r"resets=<float64 \(2, 4\)>.*expected bool \(2, 4\)"),
        (XS, {"loss": lambda outputs: 0.0}, r"loss=<<lambda>\(outputs\)>\)`: expected a function \(carry, outputs\)"),
        (XS, {"loss": rnncore.LSTM(3)}, r"`f\(loss=<LSTM>\)`: expected a function \(carry, outputs\) to one number"),
        (XS, {"loss": lambda carry, outputs: carry.h.sum(-1)}, r"`f\(loss=...\)`: it returned <float64 \(2,\)>"),
        (XS, {"loss": lambda carry, outputs: 1}, r"it returned <int.* \(\)>, expected one floating-point number"),
        (XS, {"loss": lambda carry, outputs: jnp.inf * carry.h.sum()}, "the gradient leaves the floating-point range"),
    ],
)  # fmt: skip
def test_bad_runs(xs, options, message):
    given = {"loss": last_output, "initial_carry": None, "seq_lengths": None, "resets": None} | options
    loss = given.pop("loss")
    with pytest.raises(ValueError, match=message):
        backward("f", loss, CELL, PARAMS, xs, reset_carry=None, **given)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [rnncore.LSTM(4, peepholes=True), rnncore.GRU(4)], ids=["lstm", "gru"])
def test_the_table_of_gates_has_the_sums_of_jax_grad(cell):
    run = run_of(cell)
    first = jax.tree.map(lambda a: a[:, 0], run.carries)
    lengths, resets = jnp.array([6, 4]), jnp.zeros((2, 6), bool).at[0, 3].set(True)
    options = {"seq_lengths": lengths, "resets": resets}
    table = analysis.gate_table(loss, cell, run.params, run.xs, first, **options)
    whole = jax.grad(lambda p: loss(*rnncore.unroll(cell, p, run.xs, initial_carry=first, **options)))(run.params)
    for number, gate in enumerate(cell.gates):
        close(table.sums["W"][gate], whole.input_kernel[:, number].T, EXACT)
        close(table.sums["U"][gate], whole.recurrent_kernel[:, number].T, EXACT)
        close(table.sums["b"][gate], whole.bias[number], EXACT)
        assert max(table.difference(name, gate) for name in "WUb") < EXACT
    moved = table._replace(grads={**table.grads, "b": {g: 2 * a for g, a in table.grads["b"].items()}})
    assert moved.difference("b", cell.gates[0]) == pytest.approx(0.5)
    lines = str(table).splitlines()
    assert len(lines) == 1 + 3 * len(cell.gates) and "relative difference" in lines[0]
    assert f"dL/dU_{cell.gates[0]}" in lines[2] and f"{np.linalg.norm(table.sums['U'][cell.gates[0]]):.6g}" in lines[2]
    with pytest.raises(NotImplementedError, match="dense recurrent kernel"):
        analysis.gate_table(loss, rnncore.IndRNN(4), rnncore.IndRNN(4).init(jax.random.key(0), 3), run.xs)
