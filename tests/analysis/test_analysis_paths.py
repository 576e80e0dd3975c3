"""Paths of a step's gradient: each against differences or autodiff of its own, their sums and products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import LSTMS, close, run_of
from cases import FastSlow

import rnncore
from rnncore import analysis

EXACT = 1e-12
LSTM, GRUS = LSTMS["plain"], {"after": rnncore.GRU(4), "before": rnncore.ResetBeforeGRU(4)}
USER = FastSlow(4, recurrence=rnncore.Heads(2))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def differences(fun, at, eps=1e-5):
    """The Jacobian of fun, (H,) to (H,), by central differences."""
    moves = eps * np.eye(len(at))
    return np.stack([(fun(at + move) - fun(at - move)) / (2 * eps) for move in moves], -1)


def matrices(run):
    """U_g by gate, row = output."""
    kernel = np.asarray(run.params.recurrent_kernel)
    return {gate: kernel[:, g].T for g, gate in enumerate(run.cell.gates)}


def at_step(run, t, example=0):
    """(projected inputs by gate, carry before step t + 1) as NumPy arrays."""
    zs = np.split(np.asarray(run.zs)[example, t], len(run.cell.gates))
    return dict(zip(run.cell.gates, zs, strict=True)), [np.asarray(a)[example, t] for a in run.carries]


# -------------------------------------------------------------------------------- single paths


@pytest.mark.parametrize(("t", "example"), [(1, 0), (4, 1)])
def test_lstm_paths_are_differences_of_one_gate_at_a_time(t, example):
    run = run_of(LSTM)
    u, paths = matrices(run), analysis.lstm_paths(run)
    z, (c_before, h_before) = at_step(run, t, example)
    z_before, (_, h_earlier) = at_step(run, t - 1, example)
    o_before = sigmoid(z_before["o"] + u["o"] @ h_earlier)

    def cell_state(**into):
        """c_t, with h_{t-1} given apart for each gate, and c_{t-1} for the direct path."""
        i, f, g = (z[gate] + u[gate] @ into.get(gate, h_before) for gate in "ifg")
        return sigmoid(f) * into.get("c", c_before) + sigmoid(i) * np.tanh(g)

    def tied(c):
        """h_{t-1} as it moves with c_{t-1}."""
        return o_before * np.tanh(c)

    close(tied(c_before), h_before)
    entry = (example, t - 1)  # the paths start at the second step
    for name, gate in (("via_forget", "f"), ("via_input", "i"), ("via_candidate", "g")):
        want = differences(lambda c, gate=gate: cell_state(**{gate: tied(c)}), c_before)
        assert np.abs(want).max() > 0.01
        close(getattr(paths, name)[entry], want, 1e-9)
    close(np.diag(paths.forget_direct[entry]), differences(lambda c: cell_state(c=c), c_before), 1e-9)
    whole = differences(lambda c: cell_state(c=c, i=tied(c), f=tied(c), g=tied(c)), c_before)
    close(paths.one_step_total()[entry], whole, 1e-9)
    c = cell_state()
    want = differences(lambda h: sigmoid(z["o"] + u["o"] @ h) * np.tanh(c), h_before)
    close(paths.via_output[entry], want, 1e-9)


@pytest.mark.sample(1)
@pytest.mark.parametrize("form", GRUS)
def test_gru_paths_are_differences_of_one_gate_at_a_time(form):
    run = run_of(GRUS[form])
    u, paths, t, example = matrices(run), analysis.gate_paths(run), 3, 1
    z, (before,) = at_step(run, t, example)

    def hidden(direct=before, update=before, candidate=before, reset=before):
        r, keep = sigmoid(z["r"] + u["r"] @ reset), sigmoid(z["z"] + u["z"] @ update)
        if form == "after":
            a = r * (u["n"] @ candidate + np.asarray(run.params.recurrent_bias[0]))
        else:
            a = u["n"] @ (r * candidate)
        return (1 - keep) * np.tanh(z["n"] + a) + keep * direct

    close(hidden(), run.carries.h[example, t + 1])
    close(paths.direct[example, t], differences(lambda h: hidden(direct=h), before), 1e-9)
    for name, gate in (("update", "z"), ("candidate", "n"), ("reset", "r")):
        want = differences(lambda h, name=name: hidden(**{name: h}), before)
        assert np.abs(want).max() > 0.01
        close(getattr(paths.gates, gate)[example, t], want, 1e-9)
    close(paths.total(), analysis.step_jacobians(run), EXACT)


@pytest.mark.slow
def test_gate_paths_of_a_users_cell_are_derivatives_with_the_other_gates_held():
    run = run_of(USER)
    cell, params, paths = run.cell, run.params, analysis.gate_paths(run)
    before = jax.tree.map(lambda a: a[1, 2], run.carries)

    def step(state, moving):
        """s_t, where only the gates in `moving` see that h moves; the carry itself if "direct" is among them."""
        carry = cell.Carry(*jnp.split(state, 2))
        r = [cell.split(cell.recurrent_matmul(params, h)) for h in (carry.h, before.h)]
        r = cell.Gates(*(a if gate in moving else b for gate, a, b in zip(cell.gates, *r, strict=True)))
        new, _ = cell.pointwise(params.units, cell.split(run.zs[1, 2]), r, carry if "direct" in moving else before)
        return jnp.concatenate(new)

    want = {m: jax.jacrev(step)(jnp.concatenate(before), (m,)) for m in ("direct", *cell.gates)}
    close(paths.direct[1, 2], want["direct"], EXACT)
    for gate in cell.gates:
        assert np.abs(want[gate]).max() > 0.01
        close(getattr(paths.gates, gate)[1, 2], want[gate], EXACT)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "cell",
    [LSTMS["both"], LSTMS["coupled-heads"], rnncore.GRU(4), rnncore.MGU(4, recurrence=rnncore.Diagonal()), USER],
    ids=["lstm_both", "lstm_coupled-heads", "gru", "mgu-diagonal", "user-heads"],
)
def test_gate_paths_add_up_to_the_jacobian(cell):
    run = run_of(cell)
    close(analysis.gate_paths(run).total(), analysis.step_jacobians(run), EXACT)


# --------------------------------------------------------------------------------- identities


def test_determinant_identity():
    """log|det J_t| = sum ln f_t + log|det G_t|."""
    run = run_of(LSTM, (3,))
    paths = analysis.lstm_paths(run, h0_tied=False)
    _, whole = np.linalg.slogdet(np.asarray(analysis.step_jacobians(run)))
    close(whole, np.log(paths.forget_direct).sum(-1) + np.linalg.slogdet(np.asarray(paths.via_output))[1], EXACT)


def test_a_closed_output_gate_leaves_the_forget_gate_alone():
    run = run_of(LSTM)
    params = run.params._replace(bias=run.params.bias.at[3].set(-1000.0))
    closed = analysis.trajectory(run.cell, params, run.xs, jax.tree.map(lambda a: a[:, 0], run.carries))
    paths = analysis.lstm_paths(closed)
    f = np.asarray(closed.gates.f)[:, 1:]
    np.testing.assert_array_equal(paths.one_step_total(), f[..., None] * np.eye(4))
    assert np.abs(analysis.lstm_paths(run).via_candidate).max() > 0.01


def test_the_paths_start_where_the_caller_says():
    run = run_of(LSTM)
    late, held = analysis.lstm_paths(run), analysis.lstm_paths(run, h0_tied=False)
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)))
    tied = analysis.lstm_paths(run, h0_tied=delta)
    assert (late.first, held.first, tied.first) == (2, 1, 1)
    close(held.one_step_total()[:, 1:], late.one_step_total(), 1e-15)
    # In the first step c_0 alone moves, or h_0 with it as the caller says.
    jacobian = np.asarray(analysis.step_jacobians(run))[:, 0, :4]
    close(held.one_step_total()[:, 0], jacobian[..., :4], EXACT)
    close(tied.one_step_total()[:, 0], jacobian[..., :4] + jacobian[..., 4:] * np.asarray(delta)[:, None], EXACT)


def test_without_any_gate_the_products_are_those_of_the_forget_gates():
    """Every h held fixed in the gates: what h-detach with p = 1 differentiates."""
    run = run_of(LSTM)
    direct = analysis.jacobian_product(analysis.gate_paths(run).direct).to_dense()
    forget = np.exp(analysis.direct_retention(run))
    close(direct[..., :4, :4], forget[..., None] * np.eye(4), EXACT)


# ------------------------------------------------------------------------------ over many steps


def test_cell_products_are_what_they_say():
    run = run_of(LSTM)
    products, start = analysis.cell_products(run), analysis.cell_products(run, anchor="start")
    assert products.state.matrix.shape == (2, 6, 4, 4) and products.state.log_scale.shape == (2, 6)
    totals, f = np.asarray(analysis.lstm_paths(run).one_step_total())[0], np.asarray(run.gates.f)[0]
    delta = np.asarray(analysis.lstm_paths(run).slope)[0]

    def exact(first, last):
        """d c_last / d c_first by autodiff, with h tied to c at the start."""

        def rest(c):
            carry = rnncore.LSTMCarry(c, run.carries.h[0, first] + delta[first - 1] * (c - run.carries.c[0, first]))
            for t in range(first, last):
                carry, _ = run.cell.update(run.params, carry, run.zs[0, t])
            return carry.c

        return jax.jit(jax.jacrev(rest))(run.carries.c[0, first])

    close(products.state.to_dense()[0, 3], exact(3, 6), EXACT)
    close(start.state.to_dense()[0, 3], exact(1, 4), EXACT)
    close(products.one_step_total.to_dense()[0, 3], totals[4] @ totals[3] @ totals[2], EXACT)
    close(start.one_step_total.to_dense()[0, 3], totals[2] @ totals[1] @ totals[0], EXACT)
    close(products.direct.to_dense()[0, 3], np.diag(f[5] * f[4] * f[3]), EXACT)
    close(start.direct.to_dense()[0, 3], np.diag(f[3] * f[2] * f[1]), EXACT)
    # The order of the factors counts, and so do the paths past c.
    assert np.abs(totals[4] @ totals[3] @ totals[2] - totals[2] @ totals[3] @ totals[4]).max() > 1e-3
    wrong = np.abs(np.asarray(products.one_step_total.to_dense() - products.state.to_dense())).max((-2, -1))
    assert wrong[:, :2].max() < EXACT and wrong[:, 2:].min() > 1e-3
    # With h_0 held fixed the whole run is one lag longer.
    longer = analysis.cell_products(run, h0_tied=False).state.to_dense()
    close(longer[:, :6], products.state.to_dense(), EXACT)
    whole = analysis.jacobian_product(analysis.step_jacobians(run)).to_dense()[:, 6, :4, :4]
    close(longer[:, 6], whole, EXACT)


@pytest.mark.parametrize("h0_tied", [None, False, jnp.full((2, 4), 0.7)], ids=["late", "held", "tied"])
def test_two_step_residual_separates_the_products(h0_tied):
    run = run_of(LSTM)
    residual = analysis.two_step_residual(run, h0_tied=h0_tied)
    first = 1 if h0_tied is None else 0
    assert residual.shape == (2, 5 - first, 4, 4)
    # With h_0 held fixed c_0 has no other way than through c_1.
    sizes = np.abs(residual).max((-2, -1))
    assert np.all(sizes[:, 1:] > 1e-3) and np.all((sizes[:, 0] > 1e-3) == (h0_tied is not False))
    totals = analysis.lstm_paths(run, h0_tied=h0_tied).one_step_total()
    slopes = analysis.lstm_paths(run, h0_tied=h0_tied).slope
    jacobians = analysis.step_jacobians(run)
    for n in range(residual.shape[1]):
        pair = jacobians[:, first + n + 1] @ jacobians[:, first + n]
        exact = pair[..., :4, :4] + pair[..., :4, 4:] * slopes[:, n, None, :]
        close(residual[:, n], exact - totals[:, n + 1] @ totals[:, n], EXACT)


# -------------------------------------------------------------------------- lengths and resets


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [LSTM, *GRUS.values()], ids=["lstm", "gru_after", "gru_before"])
def test_resets_cut_every_path_and_padding_stands_still(cell):
    run = run_of(cell)
    first = jax.tree.map(lambda a: a[:, 0], run.carries)
    resets = jnp.zeros((2, 6), bool).at[0, 3].set(True).at[1, 1].set(True)
    lengths = jnp.array([6, 4])
    ragged = analysis.trajectory(cell, run.params, run.xs, first, seq_lengths=lengths, resets=resets)
    jacobians = np.asarray(analysis.step_jacobians(ragged))
    assert np.all(jacobians[0, 3] == 0) and np.all(jacobians[1, 4:] == np.eye(jacobians.shape[-1]))
    close(analysis.gate_paths(ragged).total(), jacobians, EXACT)
    assert np.all(analysis.gate_paths(ragged).direct[1, 4:] == np.eye(jacobians.shape[-1]))
    with pytest.raises(NotImplementedError, match=r"ablation'\)` of a trajectory with seq_lengths.*`traj.take"):
        analysis.path_shares(ragged, by="ablation")
    if cell is not LSTM:
        return
    paths = analysis.lstm_paths(ragged)
    want = jacobians[:, 1:, :4, :4] + jacobians[:, 1:, :4, 4:] * np.asarray(paths.slope)[:, :-1, None, :]
    close(paths.one_step_total(), want, EXACT)
    assert np.all(paths.via_output[0, 2] == 0) and np.all(paths.via_output[1, 3:] == 0)
    # The residual is what separates the products here too.
    totals, residual = np.asarray(paths.one_step_total()), analysis.two_step_residual(ragged)
    pairs = jacobians[:, 2:] @ jacobians[:, 1:-1]
    exact = pairs[..., :4, :4] + pairs[..., :4, 4:] * np.asarray(paths.slope)[:, :-2, None, :]
    close(residual, exact - totals[:, 1:] @ totals[:, :-1], EXACT)
    with pytest.raises(NotImplementedError, match=r"`cell_products\(...\)` of a trajectory with seq_lengths"):
        analysis.cell_products(ragged)


# ------------------------------------------------------------------------------ batch and dtype


def test_sequences_do_not_mix_and_float32_stays():
    run = run_of(LSTM)
    first = jax.tree.map(lambda a: a[1, 0], run.carries)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (run.params, run.xs[1], first))
    alone = analysis.trajectory(LSTM, *single)

    @jax.jit
    def everything(run):
        return analysis.lstm_paths(run), analysis.gate_paths(run), analysis.path_shares(run), (
            analysis.two_step_residual(run), analysis.cell_products(run))  # fmt: skip

    got = jax.tree.leaves(everything(alone))
    want = jax.tree.leaves(jax.tree.map(lambda a: a[1], everything(run)))
    assert len(got) == len(want) > 15
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        close(a, b, 2e-5)


# -------------------------------------------------------------------------------------- errors


class Accumulator(rnncore.PointwiseCell):
    """A user's cell with a c of its own."""

    gates = ("f",)
    Carry = rnncore.LSTMCarry

    def pointwise(self, p, z, r, carry):
        f = jax.nn.sigmoid(z.f + r.f)
        return rnncore.LSTMCarry(f * carry.c + z.f, jnp.tanh(carry.c)), self.Gates(f)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (rnncore.GRU(4), ValueError, r"GRU carries h and has no cell state c; use `gate_paths\(traj\)`"),
        (Accumulator(4), NotImplementedError, "known for rnncore.LSTM, not for Accumulator; use `gate_paths"),
        (LSTMS["peepholes"], NotImplementedError, "this LSTM has peepholes, .* use `gate_paths"),
        (LSTMS["coupled-heads"], NotImplementedError, "this LSTM has a coupled gate, so no input gate.* `gate_paths"),
    ],
)
def test_cells_without_the_paths_of_an_lstm(cell, error, message):
    run = run_of(cell)
    for function in (analysis.lstm_paths, analysis.cell_products, analysis.two_step_residual):
        with pytest.raises(error, match=rf"`{function.__name__}\(...\)`: .*{message}"):
            function(run)


def test_cells_without_other_paths():
    class Subclass(rnncore.ResetBeforeGRU):
        def update(self, params, carry, z):
            return super().update(params, carry, z)

    with pytest.raises(NotImplementedError, match=r"Subclass is not a PointwiseCell.*`step_jacobians\(traj\)`"):
        analysis.gate_paths(run_of(Subclass(4)))
    with pytest.raises(NotImplementedError, match="LSTMPaths>, by='ablation'.*pass the trajectory"):
        analysis.path_shares(analysis.lstm_paths(run_of(LSTM)), by="ablation")


def test_bad_starts():
    run, short = run_of(LSTM), run_of(LSTM, (2,), 1)
    with pytest.raises(ValueError, match=r"start at t = 2, the trajectory has T = 1; run at least 2 steps, or pass"):
        analysis.lstm_paths(short)
    with pytest.raises(ValueError, match=r"`two_step_residual\(...\)`: the trajectory has T = 1; run at least 2"):
        analysis.two_step_residual(short, h0_tied=False)
    for wrong in (True, jnp.ones(4), jnp.ones((2, 4), int)):
        with pytest.raises(ValueError, match=r"expected None, False, or d h_0 / d c_0 as a floating-point array"):
            analysis.lstm_paths(run, h0_tied=wrong)
    with pytest.raises(ValueError, match="holds 8 NaN or infinite numbers; find out"):
        analysis.lstm_paths(run, h0_tied=jnp.full((2, 4), jnp.nan))
    with pytest.raises(ValueError, match=r"`cell_products\(anchor='middle'\)`: expected 'end' or 'start'"):
        analysis.cell_products(run, anchor="middle")
