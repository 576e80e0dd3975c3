"""Retention curves against independent derivatives, bounds and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import LSTMS, STEPS, close, linear, run_of

import rnncore
from rnncore import analysis


def carry_at(run, t, example=0):
    return jax.tree.map(lambda a: a[example, t], run.carries)


def onwards(run, carry, first, example=0):
    """All carries from step `first` to the last, the given one first."""

    def step(carry, z):
        new, _ = run.cell.update(run.params, carry, z)
        return new, new

    _, rest = jax.lax.scan(step, carry, run.zs[example, first:])
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), carry, rest)


def tied(run, t, c, example=0):
    """The carry after step t with h following c: h = o(c) phi(c), the inputs of the output gate held fixed."""
    cell, params, before = run.cell, run.params, run.carries.h[example, t - 1]
    o = cell.gates.index("o")
    a = run.xs[example, t - 1] @ params.input_kernel[:, o] + params.bias[o]
    a = a + cell.recurrence.gate_matrices(params.recurrent_kernel)[o] @ before
    if cell.peepholes:
        a = a + params.units.o * c
    return rnncore.LSTMCarry(c, jax.nn.sigmoid(a) * cell.activation_fn(c))


# ----------------------------------------------------------------------------- what is measured


@pytest.mark.sample(1)
@pytest.mark.parametrize("anchor", ["end", "start"])
@pytest.mark.parametrize("cell", [LSTMS["both"], rnncore.ResetBeforeGRU(4)], ids=["lstm", "reset_before_gru"])
def test_state_path_is_the_product_of_the_step_jacobians(cell, anchor):
    run = run_of(cell)
    dense = np.asarray(analysis.jacobian_product(analysis.step_jacobians(run), anchor).to_dense())
    n = dense.shape[-1]
    curve = analysis.retention_curve(run, kind="operator", anchor=anchor)
    assert curve.log_retention.shape == (2, STEPS + 1)
    close(np.exp(curve.log_retention), np.linalg.norm(dense, 2, (-2, -1)))
    curve = analysis.retention_curve(run, kind="rms", anchor=anchor)
    close(np.exp(curve.log_retention), np.linalg.norm(dense, axis=(-2, -1)) / np.sqrt(n))
    assert (curve.n, curve.kind, curve.path, curve.anchor, curve.dtype) == (n, "rms", "state", anchor, "float64")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LSTMS)
def test_cell_path_is_the_total_derivative(name):
    run = run_of(LSTMS[name])
    close(tied(run, 2, run.carries.c[0, 2]).h, run.carries.h[0, 2])  # the reference is the cell itself

    @functools.partial(jax.jit, static_argnums=0)
    def totals(first):
        """d c_t / d c_first for t = first .. T."""
        return jax.jacrev(lambda c: onwards(run, tied(run, first, c), first).c)(run.carries.c[0, first])

    from_first, from_late = np.asarray(totals(1)), np.asarray(totals(STEPS - 2))
    for anchor, lags, want in (
        ("start", tuple(range(STEPS)), from_first),
        ("end", (0, 2, STEPS - 1), np.stack([np.eye(4), from_late[-1], from_first[-1]])),
    ):
        got = analysis.retention_curve(run, kind="operator", path="cell", anchor=anchor, lags=lags)
        close(np.exp(got.log_retention[0]), np.linalg.norm(want, 2, (-2, -1)))
        got = analysis.retention_curve(run, kind="rms", path="cell", anchor=anchor, lags=lags)
        close(np.exp(got.log_retention[0]), np.linalg.norm(want, axis=(-2, -1)) / 2)
        assert got.n == 4


def test_the_product_of_one_step_totals_is_not_the_cell_path():
    """c_k also reaches c_{k+2} through o_{k+1}; the difference is exactly K_{k+2} G_{k+1} Delta_k."""
    run, k = run_of(LSTMS["plain"]), 2
    jacobians = np.asarray(analysis.step_jacobians(run))[0]
    delta = {t: np.diag(jax.jacrev(lambda c, t=t: tied(run, t, c).h)(run.carries.c[0, t])) for t in (k, k + 1)}

    def total(t):
        return jacobians[t - 1, :4, :4] + jacobians[t - 1, :4, 4:] * delta[t - 1]

    product = jacobians[k + 1] @ jacobians[k]
    exact = product[:4, :4] + product[:4, 4:] * delta[k]
    measured = analysis.retention_curve(run_of(LSTMS["plain"], (2,), k + 2), path="cell", lags=(2,))
    close(np.exp(measured.log_retention[0, 0]), np.linalg.norm(exact) / 2)

    o = run.gates.o[0, k]
    g = (np.tanh(run.carries.c[0, k + 1]) * o * (1 - o))[:, None] * np.asarray(
        run.cell.recurrence.gate_matrices(run.params.recurrent_kernel)[3]
    )
    residual = exact - total(k + 2) @ total(k + 1)
    close(residual, jacobians[k + 1, :4, 4:] @ g * delta[k])
    assert np.linalg.norm(residual) > 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("anchor", ["end", "start"])
def test_direct_path_is_the_product_of_the_forget_gates(anchor):
    run = run_of(LSTMS["plain"])
    f = np.asarray(run.gates.f)
    f = f[:, ::-1] if anchor == "end" else f
    want = np.cumprod(np.concatenate([np.ones_like(f[:, :1]), f], 1), 1)
    close(np.exp(analysis.direct_retention(run, anchor)), want)
    curve = analysis.retention_curve(run, path="direct", anchor=anchor)
    close(np.exp(curve.log_retention), np.sqrt((want**2).mean(-1)))
    curve = analysis.retention_curve(run, path="direct", kind="operator", anchor=anchor, lags=(2, 5))
    close(np.exp(curve.log_retention), want.max(-1)[:, [2, 5]])
    assert curve.n == 4


def test_direct_path_is_the_derivative_with_h_held_fixed():
    run = run_of(LSTMS["plain"])

    def last(c):
        for t in range(2, STEPS):
            carry = rnncore.LSTMCarry(c, run.carries.h[0, t])
            c = run.cell.update(run.params, carry, run.zs[0, t])[0].c
        return c

    want = jax.jit(jax.jacrev(last))(run.carries.c[0, 2])
    close(np.diag(np.exp(analysis.direct_retention(run)[0, STEPS - 2])), want)


WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=4))


def loss(carry):
    """One loss term of the last carry."""
    return jnp.sum(jnp.sin(jnp.stack(carry)) * WEIGHTS)


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [LSTMS["both"], rnncore.GRU(4)], ids=["lstm", "gru"])
def test_adjoint_curve_is_the_gradient_of_the_loss_in_earlier_states(cell):
    run = run_of(cell)

    def of_moved(moves):
        """The loss when every state is moved; moves has T + 1 entries."""

        def step(carry, now):
            z, move = now
            carry, _ = cell.update(run.params, carry, z)
            return jax.tree.map(jnp.add, carry, move), None

        start = jax.tree.map(lambda a, b: a + b[0], carry_at(run, 0), moves)
        last, _ = jax.lax.scan(step, start, (run.zs[0], jax.tree.map(lambda a: a[1:], moves)))
        return loss(last)

    gradients = jax.jit(jax.grad(of_moved))(jax.tree.map(lambda a: jnp.zeros_like(a[0]), run.carries))
    sizes = np.linalg.norm(np.concatenate(gradients, -1), axis=-1)[::-1]
    curve = analysis.retention_curve(run, kind="adjoint", adjoint=jax.vmap(jax.grad(loss))(run.last))
    close(np.exp(curve.log_retention[0]), sizes / sizes[0])


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["plain", "peepholes", "coupled-heads"])
def test_adjoint_curve_of_the_cell_path_moves_h_with_c(name):
    run = run_of(LSTMS[name])

    def in_c(t):
        def of_cell(c):
            return loss(jax.tree.map(lambda a: a[-1], onwards(run, tied(run, t, c), t)))

        return np.asarray(jax.jit(jax.grad(of_cell))(run.carries.c[0, t]))

    now, earlier = in_c(STEPS), in_c(2)
    v, lags = jax.vmap(jax.grad(loss))(run.last), (STEPS - 2,)
    curve = analysis.retention_curve(run, kind="adjoint", path="cell", adjoint=v, lags=lags)
    close(np.exp(curve.log_retention[0, 0]), np.linalg.norm(earlier) / np.linalg.norm(now))
    # On the direct path the same gradient is scaled by the forget gates alone.
    scale = np.exp(analysis.direct_retention(run)[0, STEPS - 2])
    curve = analysis.retention_curve(run, kind="adjoint", path="direct", adjoint=v, lags=lags)
    close(np.exp(curve.log_retention[0, 0]), np.linalg.norm(scale * now) / np.linalg.norm(now))


def test_adjoint_curve_forms_no_jacobian():
    """At H = 37 no array of the program has the 74 x 74 entries of a Jacobian, which rms does have."""
    run = run_of(rnncore.LSTM(37), (), 3)

    def largest(**options):
        jaxpr = jax.make_jaxpr(lambda run: analysis.retention_curve(run, **options).log_retention)(run)
        return "74,74" in str(jaxpr)

    for path in ("state", "cell", "direct"):
        assert not largest(kind="adjoint", path=path, adjoint=run.last)
    assert largest(kind="rms")


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"path": "cell"}, {"kind": "bound", "path": "cell"}, {"anchor": "start"}])
def test_chosen_lags_are_those_of_the_whole_curve(options):
    run = run_of(LSTMS["peepholes"])
    whole = analysis.retention_curve(run, **options)
    some = analysis.retention_curve(run, lags=np.array([1, 3]), **options)
    close(some.log_retention, whole.log_retention[:, [1, 3]], 1e-13)
    assert some.lags.tolist() == [1, 3]
    first = analysis.retention_curve(run, lags=2, **options)
    assert first.lags.tolist() == [0, 1, 2]
    close(first.log_retention, whole.log_retention[:, :3], 1e-13)


@pytest.mark.slow
def test_runs_inside_jit_and_any_batch():
    run = run_of(LSTMS["plain"])
    curve = jax.jit(lambda run: analysis.retention_curve(run, path="cell"))(run)
    close(curve.log_retention, analysis.retention_curve(run, path="cell").log_retention, 1e-13)
    alone = analysis.trajectory(run.cell, run.params, run.xs[1], carry_at(run, 0, 1))
    close(analysis.retention_curve(alone, path="cell").log_retention, curve.log_retention[1], 1e-13)
    several = jax.tree.map(lambda a: a[None, :, None], (run.xs, carry_at(run, 0, slice(None))))
    several = analysis.trajectory(run.cell, run.params, *several)
    close(analysis.retention_curve(several, path="cell").log_retention, curve.log_retention[None, :, None], 1e-13)


# -------------------------------------------------------------------------------------- bounds


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["end", "start"])
def test_bounds_bound_and_multiply_the_norms_of_the_steps(anchor):
    run = run_of(LSTMS["peepholes"])
    steps = np.linalg.norm(np.asarray(analysis.step_jacobians(run)), 2, (-2, -1))
    steps = steps[:, ::-1] if anchor == "end" else steps
    curve = analysis.retention_curve(run, kind="bound", anchor=anchor)
    close(np.exp(curve.log_retention), np.cumprod(np.concatenate([np.ones((2, 1)), steps], 1), 1))
    for path in ("state", "cell", "direct"):
        bound = analysis.retention_curve(run, kind="bound", path=path, anchor=anchor)
        exact = analysis.retention_curve(run, kind="operator", path=path, anchor=anchor)
        assert np.all(bound.log_retention >= exact.log_retention - 1e-12)
        # Neither vacuous nor the curve itself.
        assert np.all(bound.log_retention[:, -1] > exact.log_retention[:, -1] + 1e-3)
        assert np.all(bound.log_retention[:, -1] < exact.log_retention[:, -1] + 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "slope"),
    [
        (rnncore.Elman(4), 1.0),
        (rnncore.Elman(4, activation_fn=jax.nn.sigmoid, residual=True), 0.25),
        (rnncore.IndRNN(4), 1.0),
    ],
    ids=["tanh", "sigmoid-residual", "indrnn"],
)
def test_a_priori_bound_of_elman_networks(cell, slope):
    run = run_of(cell)
    matrix = np.asarray(cell.recurrence.gate_matrices(run.params.recurrent_kernel)[0]) + cell.residual * np.eye(4)
    factor = slope * np.linalg.norm(matrix, 2)
    close(analysis.gradient_bound(cell, run.params), factor)
    close(analysis.gradient_bound(cell, run.params, slope=3.0), 3 * factor / slope)
    curve = analysis.retention_curve(run, kind="a_priori_bound")
    close(curve.log_retention, np.broadcast_to(np.arange(STEPS + 1) * np.log(factor), (2, STEPS + 1)))
    bound = analysis.retention_curve(run, kind="bound").log_retention
    assert np.all(curve.log_retention >= bound - 1e-12)
    assert np.all(bound >= analysis.retention_curve(run, kind="operator").log_retention - 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "slope"), [(jnp.tanh, 1.0), (jax.nn.sigmoid, 0.25)])
def test_a_priori_bound_is_reached_at_the_origin(activation, slope):
    """Orthogonal U: tanh has its largest slope at pre-activation 0, and the sigmoid with h_0 = 0 in step 1."""
    cell = rnncore.Elman(5, activation_fn=activation)
    run = analysis.trajectory(cell, cell.init(jax.random.key(1), 2, jnp.float64), jnp.zeros((8, 2)))
    reached = 8 if activation is jnp.tanh else 1
    curve = analysis.retention_curve(run, kind="operator", anchor="start", lags=reached)
    close(curve.log_retention, np.arange(reached + 1) * np.log(slope))
    bound = analysis.retention_curve(run, kind="a_priori_bound", anchor="start", lags=reached)
    close(bound.log_retention, curve.log_retention)


# -------------------------------------------------------------------------------------- errors


ADJOINT = rnncore.LSTMCarry(jnp.ones((2, 4)), jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mean"}, r"`retention_curve\(kind='mean'\)`: expected one of 'operator', 'rms'"),
        ({"path": "gates"}, r"`retention_curve\(path='gates'\)`: expected one of 'state', 'cell', 'direct'"),
        ({"anchor": "middle"}, r"`retention_curve\(anchor='middle'\)`: expected one of 'end', 'start'"),
        ({"lags": 9}, r"lags up to 9\)`: a trajectory of T = 6 steps has lags 0 to 6; run at least 9 steps"),
        ({"lags": 6, "path": "cell"}, r"has lags 0 to 5, the first carry has no output gate; run at least 7 steps"),
        ({"lags": (3, 1)}, r"`retention_curve\(lags=\(3, 1\)\)`: expected increasing integers"),
        ({"lags": (1.5,)}, "expected increasing integers"),
        ({"lags": -1}, "expected increasing integers of at least 0"),
        ({"lags": ()}, "expected increasing integers"),
        ({"kind": "adjoint"}, r"`retention_curve\(kind='adjoint'\)` needs adjoint=, the gradient of the loss"),
        ({"adjoint": ADJOINT}, r"`retention_curve\(kind='rms'\)` takes no adjoint"),
        ({"kind": "adjoint", "adjoint": ADJOINT, "anchor": "start"}, "an adjoint belongs to the end; use anchor='end'"),
        ({"kind": "adjoint", "adjoint": ADJOINT.h}, r"expected LSTMCarry\('c', 'h'\), as `jax.grad` of a loss"),
        ({"kind": "adjoint", "adjoint": ADJOINT._replace(c=jnp.ones(4))}, r"<float64 \(4,\)>.*\(2, 4\)"),
        ({"kind": "adjoint", "adjoint": ADJOINT._replace(c=jnp.ones((2, 4), int))}, "expected floating point"),
        ({"kind": "adjoint", "adjoint": ADJOINT._replace(c=jnp.full((2, 4), jnp.nan))}, ".c of shape .* holds 8 NaN"),
        ({"kind": "adjoint", "adjoint": jax.tree.map(jnp.zeros_like, ADJOINT)}, "the gradient at lag 0 is zero"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.retention_curve(run_of(LSTMS["plain"]), **options)


class Accumulator(rnncore.PointwiseCell):
    """A user's cell with a c of its own."""

    gates = ("f",)
    Carry = rnncore.LSTMCarry

    def pointwise(self, p, z, r, carry):
        f = jax.nn.sigmoid(z.f + r.f)
        return rnncore.LSTMCarry(f * carry.c + z.f, jnp.tanh(carry.c)), self.Gates(f)


@pytest.mark.parametrize("path", ["cell", "direct"])
def test_a_cell_without_the_path(path):
    with pytest.raises(ValueError, match=rf"path='{path}'\)`: GRU carries h and has no cell state c; use path='state'"):
        analysis.retention_curve(run_of(rnncore.GRU(4)), path=path)
    with pytest.raises(NotImplementedError, match="known for rnncore.LSTM, not for Accumulator; use path='state'"):
        analysis.retention_curve(run_of(Accumulator(4)), path=path)
    with pytest.raises(NotImplementedError, match="a bound from the weights alone is known for Elman"):
        analysis.retention_curve(run_of(LSTMS["plain"]), path=path, kind="a_priori_bound")


def test_direct_retention_has_the_same_errors():
    with pytest.raises(ValueError, match=r"`direct_retention\(...\)`: GRU carries h and has no cell state"):
        analysis.direct_retention(run_of(rnncore.GRU(4)))
    with pytest.raises(ValueError, match=r"`direct_retention\(anchor='last'\)`: expected 'end' or 'start'"):
        analysis.direct_retention(run_of(LSTMS["plain"]), "last")


def test_bounds_that_are_not_known():
    run = run_of(LSTMS["plain"])
    with pytest.raises(NotImplementedError, match=r"`gradient_bound\(LSTM\)`: .*retention_curve\(kind='bound'\)"):
        analysis.retention_curve(run, kind="a_priori_bound")
    cell = rnncore.Elman(4, activation_fn=jax.nn.softplus)
    params = cell.init(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="activation_fn=softplus: unknown largest slope; pass it as"):
        analysis.gradient_bound(cell, params)
    assert float(analysis.gradient_bound(cell, params, slope=1.0)) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"`gradient_bound\(slope=-1\)`: expected max .* at least 0"):
        analysis.gradient_bound(cell, params, slope=-1)
    with pytest.raises(ValueError, match=r".recurrent_kernel of shape \(4, 1, 4\) holds 1 NaN"):
        broken = params._replace(recurrent_kernel=params.recurrent_kernel.at[0, 0, 0].set(jnp.nan))
        analysis.gradient_bound(cell, broken, slope=1.0)


@pytest.mark.slow
def test_overflow_of_a_single_step_is_said():
    with pytest.raises(ValueError, match="a single step Jacobian leaves the range of float32; use float64"):
        analysis.retention_curve(linear(np.full((4, 4), 3e38), 3, jnp.float32))
