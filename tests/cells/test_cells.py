"""Cells: the equations by hand, the options, cells as values, and a cell that a user writes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import initializers

KEY = jax.random.key(0)


def sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def scalar_params(cell: Any, w: list[float], u: list[float], b: list[float], **more: Any) -> Any:
    """Parameters of a cell with one unit and one feature: one number for each gate."""
    params = cell.init(KEY, 1, jnp.float64)
    kernels = {"input_kernel": w, "recurrent_kernel": u, "bias": b} | more
    return params._replace(
        **{k: jnp.asarray(v, jnp.float64).reshape(getattr(params, k).shape) for k, v in kernels.items()}
    )


def one_step(cell: Any, params: Any, x: float, **carry: list[float]) -> tuple[Any, Any]:
    """(carry, gates) as floats after one step from this carry."""
    before = cell.initial_carry((), jnp.float64)._replace(**{k: jnp.asarray(v) for k, v in carry.items()})
    after, gates = cell.update(params, before, cell.project(params, jnp.asarray([x])))
    return jax.tree.map(float, (jax.tree.map(jnp.squeeze, after), jax.tree.map(jnp.squeeze, gates)))


# ---------------------------------------------------------------------------- the equations by hand

X, H, C = 0.7, -0.4, 0.9
W = [0.3, -0.5, 0.8, 0.2]
U = [-0.6, 0.4, 0.5, -0.9]
B = [0.1, 0.7, -0.2, 0.05]
A = [w * X + u * H + b for w, u, b in zip(W, U, B, strict=True)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("function", "phi"),
    [(jnp.tanh, math.tanh), (jax.nn.relu, lambda a: max(a, 0.0)), (jax.nn.sigmoid, sigmoid), (jnp.sin, math.sin)],
    ids=["tanh", "relu", "sigmoid", "sin"],
)
def test_elman(function: Any, phi: Any, residual: bool):
    cell = rnncore.Elman(1, activation_fn=function, residual=residual)
    carry, gates = one_step(cell, scalar_params(cell, W[:1], U[:1], B[:1]), X, h=[H])
    assert carry.h == pytest.approx(phi(A[0] + (H if residual else 0)), abs=1e-15)
    assert gates.h == carry.h


def test_indrnn():
    cell = rnncore.IndRNN(1)
    params = scalar_params(cell, W[2:3], U[2:3], B[1:2])
    assert params.recurrent_kernel.shape == (1, 1)
    carry, _ = one_step(cell, params, X, h=[H])
    assert carry.h == pytest.approx(max(W[2] * X + U[2] * H + B[1], 0), abs=1e-15) and carry.h > 0


@pytest.mark.parametrize("peepholes", [False, True])
def test_lstm(peepholes: bool):
    cell = rnncore.LSTM(1, peepholes=peepholes)
    params = scalar_params(cell, W, U, B)
    pi, pf, po = (0.6, -0.3, 0.4) if peepholes else (0, 0, 0)
    if peepholes:
        assert params.units._fields == ("i", "f", "o")
        params = params._replace(units=type(params.units)(*(jnp.array([p]) for p in (pi, pf, po))))
    i, f, g = sigmoid(A[0] + pi * C), sigmoid(A[1] + pf * C), math.tanh(A[2])
    c = f * C + i * g
    o = sigmoid(A[3] + po * c)
    carry, gates = one_step(cell, params, X, c=[C], h=[H])
    assert tuple(gates) == pytest.approx((i, f, g, o), abs=1e-15) and gates._fields == ("i", "f", "g", "o")
    assert tuple(carry) == pytest.approx((c, o * math.tanh(c)), abs=1e-15) and carry._fields == ("c", "h")


@pytest.mark.parametrize("peepholes", [False, True])
def test_coupled_lstm(peepholes: bool):
    cell = rnncore.LSTM(1, coupled=True, peepholes=peepholes)
    params = scalar_params(cell, W[1:], U[1:], B[1:])
    pf, po = (-0.3, 0.4) if peepholes else (0, 0)
    if peepholes:
        assert params.units._fields == ("f", "o")
        params = params._replace(units=type(params.units)(jnp.array([pf]), jnp.array([po])))
    f, g = sigmoid(A[1] + pf * C), math.tanh(A[2])
    c = f * C + (1 - f) * g
    o = sigmoid(A[3] + po * c)
    carry, gates = one_step(cell, params, X, c=[C], h=[H])
    assert tuple(gates) == pytest.approx((f, g, o), abs=1e-15) and gates._fields == ("f", "g", "o")
    assert tuple(carry) == pytest.approx((c, o * math.tanh(c)), abs=1e-15)


def test_gru_and_the_other_order_of_its_reset():
    after, before = rnncore.GRU(1), rnncore.ResetBeforeGRU(1)
    r, z = sigmoid(A[0]), sigmoid(A[1])
    b_hn = 0.25
    n = math.tanh(W[2] * X + B[2] + r * (U[2] * H + b_hn))
    params = scalar_params(after, W[:3], U[:3], B[:3], recurrent_bias=[b_hn])
    carry, gates = one_step(after, params, X, h=[H])
    assert tuple(gates) == pytest.approx((r, z, n), abs=1e-15) and gates._fields == ("r", "z", "n")
    assert carry.h == pytest.approx((1 - z) * n + z * H, abs=1e-15)

    n = math.tanh(W[2] * X + B[2] + U[2] * (r * H))
    carry, gates = one_step(before, scalar_params(before, W[:3], U[:3], B[:3]), X, h=[H])
    assert tuple(gates) == pytest.approx((r, z, n), abs=1e-15) and gates._fields == ("r", "z", "n")
    assert carry.h == pytest.approx((1 - z) * n + z * H, abs=1e-15)


@pytest.mark.parametrize("reset_gate", [True, False])
def test_mgu(reset_gate: bool):
    cell = rnncore.MGU(1, reset_gate=reset_gate)
    b_hn = 0.25
    more = {"recurrent_bias": [b_hn]} if reset_gate else {}
    params = scalar_params(cell, W[:2], U[:2], B[:2], **more)
    assert reset_gate or params.recurrent_bias is None
    f = sigmoid(A[0])
    n = math.tanh(W[1] * X + B[1] + (f * (U[1] * H + b_hn) if reset_gate else U[1] * H))
    carry, gates = one_step(cell, params, X, h=[H])
    assert tuple(gates) == pytest.approx((f, n), abs=1e-15) and gates._fields == ("f", "n")
    assert carry.h == pytest.approx((1 - f) * n + f * H, abs=1e-15)


@pytest.mark.parametrize(
    "cell", [rnncore.LSTM(1), rnncore.GRU(1), rnncore.MGU(1), rnncore.ResetBeforeGRU(1)], ids=lambda c: type(c).__name__
)
def test_gate_and_activation_functions_are_used(cell: Any):
    count = len(cell.gates)
    changed = dataclasses.replace(cell, gate_fn=jax.nn.hard_sigmoid, activation_fn=jnp.sin)
    params = scalar_params(cell, W[:count], U[:count], B[:count])
    _, gates = one_step(changed, params, X, h=[H])
    first = cell.gates[0]
    assert getattr(gates, first) == pytest.approx(min(max((A[0] + 3) / 6, 0), 1), abs=1e-15)
    _, standard = one_step(cell, params, X, h=[H])
    candidate = "g" if "g" in cell.gates else "n"
    if candidate == "g":
        assert math.asin(gates.g) == pytest.approx(math.atanh(standard.g), abs=1e-14)
    else:
        assert getattr(gates, candidate) != pytest.approx(getattr(standard, candidate), abs=1e-4)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.sample(1)
@pytest.mark.parametrize("coupled", [False, True])
def test_forget_bias_is_added_once_and_at_initialisation(coupled: bool):
    plain = rnncore.LSTM(3, coupled=coupled, bias_init=jax.nn.initializers.normal(1.0))
    biased = dataclasses.replace(plain, forget_bias=1.5)
    before, after = plain.init(KEY, 2, jnp.float64), biased.init(KEY, 2, jnp.float64)
    index = plain.gates.index("f")
    expected = np.zeros((len(plain.gates), 3))
    expected[index] = 1.5
    np.testing.assert_allclose(after.bias - before.bias, expected, atol=1e-15)
    # The step itself adds nothing: with the same parameters both cells give the same.
    xs = jnp.ones((4, 2))
    np.testing.assert_array_equal(rnncore.unroll(plain, after, xs)[1], rnncore.unroll(biased, after, xs)[1])
    np.testing.assert_array_equal(after.recurrent_kernel, before.recurrent_kernel)


def test_defaults_of_the_biases():
    assert not rnncore.LSTM(3).init(KEY, 2).bias.any()
    assert not rnncore.GRU(3).init(KEY, 2).bias.any()
    assert rnncore.MGU(3).init(KEY, 2).bias.tolist() == [[1.0] * 3, [0.0] * 3]
    assert not any(leaf.any() for leaf in rnncore.LSTM(3, peepholes=True).init(KEY, 2).units)


def test_indrnn_is_elman_over_a_diagonal_kernel():
    elman = rnncore.Elman(4, activation_fn=jax.nn.relu, recurrence=rnncore.Diagonal())
    ind = rnncore.IndRNN(4)
    params = ind.init(KEY, 3)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, elman.init(KEY, 3)))
    xs = jax.random.normal(KEY, (2, 5, 3), jnp.float32)
    np.testing.assert_array_equal(rnncore.unroll(ind, params, xs)[1], rnncore.unroll(elman, params, xs)[1])


@pytest.mark.sample(4)
@pytest.mark.parametrize("recurrence", [rnncore.Dense(), rnncore.Heads(2), rnncore.Diagonal()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.float16])
def test_shapes_and_dtypes_of_new_parameters(recurrence: Any, dtype: Any):
    cell = rnncore.LSTM(4, peepholes=True, recurrence=recurrence)
    params = cell.init(KEY, 3, dtype)
    assert params.input_kernel.shape == (3, 4, 4) and params.bias.shape == (4, 4) and params.recurrent_bias is None
    assert params.recurrent_kernel.shape == recurrence.shape(4, 4)
    assert [u.shape for u in params.units] == [(4,)] * 3
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    carry = cell.initial_carry((2, 5), dtype)
    assert all(leaf.shape == (2, 5, 4) and leaf.dtype == dtype and not leaf.any() for leaf in carry)


def test_initialisers_of_the_user_are_called_with_the_shapes_of_the_docstring():
    asked: dict[str, tuple[int, ...]] = {}

    def record(name: str, key: Any, shape: Any, dtype: Any) -> jax.Array:
        asked[name] = tuple(shape)
        return jnp.full(shape, 0.5, dtype)

    cell = rnncore.GRU(
        4, **{name: functools.partial(record, name) for name in ("kernel_init", "recurrent_init", "bias_init")}
    )
    params = cell.init(KEY, 3)
    assert asked == {"kernel_init": (3, 12), "recurrent_init": (4, 3, 4), "bias_init": (3, 4)}
    assert all((leaf == 0.5).all() for leaf in (params.input_kernel, params.recurrent_kernel, params.bias))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "cell", [rnncore.GRU(4), rnncore.LSTM(4, peepholes=True), rnncore.ResetBeforeGRU(4)], ids=lambda c: type(c).__name__
)
def test_step_is_update_and_output(cell: Any):
    params = cell.init(KEY, 3)
    carry = jax.tree.map(lambda a: a + 0.3, cell.initial_carry((2,)))
    z = cell.project(params, jnp.ones((2, 3), jnp.float32))
    new, y = cell.step(params, carry, z)
    np.testing.assert_array_equal(y, new.h)
    for got, want in zip(new, cell.update(params, carry, z)[0], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "cell",
    [rnncore.GRU(4), rnncore.LayerNormLSTM(4), rnncore.LSTMP(4, projection_size=2), rnncore.ResetBeforeGRU(4)],
    ids=lambda c: type(c).__name__,
)
def test_a_step_of_inputs_that_are_not_projected_is_an_error(cell: Any):
    size = len(cell.gates)  # each gate would get one number, for all units
    params = cell.init(KEY, size)
    with pytest.raises(ValueError, match=rf"expected \(\*batch, {4 * size}\), a projected input: `cell.step"):
        cell.step(params, cell.initial_carry((2,)), jnp.ones((2, size)))


# ---------------------------------------------------------------------------------- cells as values

SOME_CELLS = (
    rnncore.LSTM(4), rnncore.LSTM(5), rnncore.LSTM(4, peepholes=True), rnncore.LSTM(4, forget_bias=1.0),
    rnncore.LSTM(4, coupled=True), rnncore.LSTM(4, recurrence=rnncore.Heads(2)),
    rnncore.LSTM(4, recurrence=rnncore.Diagonal()), rnncore.LSTM(4, activation_fn=jnp.sin), rnncore.GRU(4),
    rnncore.Elman(4), rnncore.Elman(4, residual=True), rnncore.IndRNN(4), rnncore.MGU(4),
    rnncore.MGU(4, reset_gate=False), rnncore.ResetBeforeGRU(4),
)  # fmt: skip


def test_cells_are_equal_by_value_and_only_then():
    assert len(set(SOME_CELLS)) == len(SOME_CELLS)
    for cell in SOME_CELLS:
        again = dataclasses.replace(cell)
        assert again is not cell and again == cell and hash(again) == hash(cell)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rnncore.LSTM(4).hidden_size = 5  # type: ignore[misc]


def test_equal_cells_compile_once():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(cell: Any, params: Any, xs: Any) -> Any:
        traced.append(cell)
        return rnncore.unroll(cell, params, xs)

    xs = jnp.ones((5, 3))
    for size in (4, 4, 6):
        run(rnncore.LSTM(size), rnncore.LSTM(size).init(KEY, 3), xs)
    assert traced == [rnncore.LSTM(4), rnncore.LSTM(6)]


# ------------------------------------------------------------------------------------ a user's cell


class LevelCarry(NamedTuple):
    """A level beside the output."""

    level: Any
    h: Any


class LeakyIntegrator(rnncore.PointwiseCell):
    """All that a user writes: two states, a per-unit rate and two gates."""

    gates = ("u", "n")
    units = ("rate",)
    Carry = LevelCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        keep = jax.nn.sigmoid(z.u + r.u + p.rate)
        level = keep * carry.level + (1 - keep) * (z.n + r.n)
        return LevelCarry(level, jnp.tanh(level)), self.Gates(keep, level)


MINE = LeakyIntegrator(3)


def mine(features: int = 2, batch: tuple[int, ...] = (4,), steps: int = 5) -> tuple[Any, Any]:
    """(params with a rate other than 0, inputs)."""
    params = MINE.init(KEY, features, jnp.float64)
    params = params._replace(units=type(params.units)(jnp.array([0.3, -0.2, 0.9])))
    return params, jax.random.normal(KEY, (*batch, steps, features), jnp.float64)


def by_hand(params: Any, xs: Any) -> Any:
    """The outputs in a loop of Python and NumPy, for one sequence or a batch."""
    w, u, b = (np.asarray(a) for a in params[:3])
    level = h = np.zeros((*xs.shape[:-2], 3))
    outputs = []
    for t in range(xs.shape[-2]):
        a_u, a_n = (np.asarray(xs)[..., t, :] @ w[:, g] + h @ u[:, g] + b[g] for g in (0, 1))
        keep = 1 / (1 + np.exp(-(a_u + np.asarray(params.units.rate))))
        level = keep * level + (1 - keep) * a_n
        h = np.tanh(level)
        outputs.append(h)
    return np.stack(outputs, -2), level


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", [None, "scan", "autodiff"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_a_users_cell_runs(backend: str | None, wrap: Any):
    params, xs = mine()
    carry, outputs = wrap(functools.partial(rnncore.unroll, MINE, backend=backend))(params, xs)
    want, level = by_hand(params, xs)
    np.testing.assert_allclose(outputs, want, atol=1e-14)
    np.testing.assert_allclose(carry.level, level, atol=1e-14)
    assert isinstance(carry, LevelCarry)


def test_a_users_cell_under_vmap():
    params, xs = mine()
    each = jax.vmap(lambda x: rnncore.unroll(MINE, params, x)[1])(xs)
    np.testing.assert_allclose(each, by_hand(params, xs)[0], atol=1e-14)
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    both = jax.vmap(lambda p: rnncore.unroll(MINE, p, xs)[1])(many)
    np.testing.assert_allclose(both[1], by_hand(jax.tree.map(lambda a: 2 * a, params), xs)[0], atol=1e-14)


def test_a_users_cell_is_differentiated():
    params, xs = mine()
    leaves, tree = jax.tree.flatten(params)

    def loss(leaves: Any, xs: Any) -> Any:
        carry, outputs = rnncore.unroll(MINE, tree.unflatten(leaves), xs)
        return jnp.sum(outputs**2) + jnp.sum(jnp.sin(carry.level))

    def loss_by_hand(leaves: Any, xs: Any) -> float:
        outputs, level = by_hand(tree.unflatten(leaves), xs)
        return float(np.sum(outputs**2) + np.sum(np.sin(level)))

    gradients, d_xs = jax.jit(jax.grad(loss, (0, 1)))(leaves, xs)
    rng = np.random.default_rng(0)
    d_leaves, direction = [rng.normal(size=a.shape) for a in leaves], rng.normal(size=xs.shape)
    step = 1e-6
    ends = [
        loss_by_hand([a + s * d for a, d in zip(leaves, d_leaves, strict=True)], xs + s * direction)
        for s in (step, -step)
    ]
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradients, d_leaves, strict=True)) + float(
        jnp.vdot(d_xs, direction)
    )
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7)
    assert all(np.any(g != 0) for g in gradients)


def test_states_of_a_users_cell():
    params, xs = mine()
    _, outputs, states = rnncore.unroll(MINE, params, xs, return_states=True)
    assert isinstance(states.carries, LevelCarry) and states.gates._fields == ("u", "n")
    np.testing.assert_array_equal(states.carries.h, outputs)
    np.testing.assert_allclose(jnp.tanh(states.gates.n), outputs, atol=1e-15)


def test_explain_backend_on_a_users_cell():
    params, xs = mine()
    choice = rnncore.explain_backend(MINE, params, jax.ShapeDtypeStruct(xs.shape, xs.dtype))
    assert choice.name == "scan" and "autodiff" in choice.rejected
    assert str(choice).startswith("backend 'scan': ")


class Swapped(rnncore.Cell):
    """A user's cell of the general kind: it mixes units after the gate."""

    def init(self, key: Any, input_size: int, dtype: Any = jnp.float32) -> Any:
        return {"w": initializers.lecun_normal(key, (input_size, self.hidden_size), dtype)}

    def initial_carry(self, batch_shape: Any = (), dtype: Any = jnp.float32) -> Any:
        return rnncore.HiddenCarry(jnp.zeros((*batch_shape, self.hidden_size), dtype))

    def project(self, params: Any, xs: Any) -> Any:
        return xs @ params["w"]

    def update(self, params: Any, carry: Any, z: Any) -> tuple[Any, Any]:
        del params
        h = jnp.tanh(z + jnp.roll(carry.h, 1, -1))
        return rnncore.HiddenCarry(h), {"h": h}


def test_a_users_cell_of_the_general_kind():
    cell = Swapped(3)
    params, xs = cell.init(KEY, 2, jnp.float64), jax.random.normal(KEY, (4, 5, 2), jnp.float64)
    carry, outputs, states = rnncore.unroll(cell, params, xs, return_states=True, seq_lengths=jnp.array([5, 0, 2, 4]))
    h = np.zeros((4, 3))
    for t in range(5):
        h = np.tanh(np.asarray(xs[:, t] @ params["w"]) + np.roll(h, 1, -1))
        np.testing.assert_allclose(outputs[:, t], h, atol=1e-15)
    np.testing.assert_array_equal(carry.h[2], outputs[2, 1])
    np.testing.assert_array_equal(states.gates["h"], outputs)
    choice = rnncore.explain_backend(cell, params, xs)
    assert choice.name == "autodiff" and "Swapped is not a PointwiseCell" in choice.rejected["scan"]


def test_a_value_from_outside_that_is_differentiated_reaches_its_gradient():
    """A cell made around one: no loop of its own would see it, so plain autodiff runs, and a named loop refuses."""
    cell = rnncore.Elman(3)
    params, xs = cell.init(jax.random.key(0), 2, jnp.float64), jnp.ones((2, 4, 2), jnp.float64)

    def loss(scale: Any, backend: str | None = None) -> Any:
        around = dataclasses.replace(cell, activation_fn=lambda a: jnp.tanh(scale * a))
        return jnp.sum(rnncore.unroll(around, params, xs, backend=backend)[1])

    slope = (loss(0.5 + 1e-6) - loss(0.5 - 1e-6)) / 2e-6
    assert float(jax.grad(loss)(0.5)) == pytest.approx(float(slope), rel=1e-7)
    with pytest.raises(NotImplementedError, match="uses a value from outside.*declare it in `units`"):
        jax.grad(lambda s: loss(s, "scan"))(0.5)
