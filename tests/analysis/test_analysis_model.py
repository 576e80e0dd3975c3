"""Whole models: the gradient at every step of every layer, against perturbations in loops over Flax's own cells."""

from typing import Any

import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import close
from flax import nnx as fnnx

import rnncore
from rnncore import analysis, linen, nnx
from rnncore.analysis.run.model import record, recorder_of

D, H, T, B = 3, 4, 5, 2
F64 = {"param_dtype": jnp.float64}
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
EXACT = 1e-12


def loss(outputs: Any) -> jax.Array:
    return jnp.sum(jnp.sin(outputs)) / 3 + jnp.sum(outputs[:, -1] ** 2)


def loop(step: Any, carry: Any, xs: jax.Array, moves: jax.Array, reverse: bool = False) -> jax.Array:
    """Outputs of a cell, step by step, with moves (B, T, n) added to the carry after every step of the processing."""
    leaves, tree = jax.tree.flatten(carry)
    outputs = []
    for t in range(xs.shape[1]):
        carry, y = step(carry, xs[:, xs.shape[1] - 1 - t if reverse else t])
        parts = jnp.split(moves[:, t], np.cumsum([a.shape[-1] for a in leaves])[:-1], -1)
        carry = jax.tree.unflatten(tree, [a + b for a, b in zip(jax.tree.leaves(carry), parts, strict=True)])
        outputs.append(y + parts[-1])  # h of the carry, which is the output, moves too
    return jnp.stack(outputs[::-1] if reverse else outputs, 1)


def linen_step(cell: fnn.Module, params: Any) -> Any:
    return lambda carry, x: cell.apply({"params": params}, carry, x)


def zeros(n: int) -> Any:
    return jnp.zeros((B, H)) if n == 1 else (jnp.zeros((B, H)),) * 2


# ------------------------------------------------------------------------------------------------ eight models


class Compact(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        xs = fnn.Dense(D, **F64)(xs)
        xs = linen.RNN(linen.OptimizedLSTMCell(H, **F64), name="first")(xs)
        return fnn.RNN(fnn.GRUCell(H, **F64))(fnn.LayerNorm(**F64)(xs))


def compact(variables, xs, moves):
    p = variables["params"]
    xs = fnn.Dense(D, **F64).apply({"params": p["Dense_0"]}, xs)
    lstm = linen_step(fnn.OptimizedLSTMCell(H, **F64), p["OptimizedLSTMCell_0"])
    xs = loop(lstm, zeros(2), xs, moves["first"])
    xs = fnn.LayerNorm(**F64).apply({"params": p["LayerNorm_0"]}, xs)
    return loop(linen_step(fnn.GRUCell(H, **F64), p["GRUCell_0"]), zeros(1), xs, moves["RNN_0"])


class Setup(fnn.Module):
    def setup(self):
        self.cell = fnn.LSTMCell(H, **F64)
        self.reader = fnn.RNN(self.cell, reverse=True, keep_order=True)
        self.head = fnn.Dense(2, **F64)

    def __call__(self, xs):
        return self.head(self.reader(xs))


def setup(variables, xs, moves):
    p = variables["params"]
    ys = loop(linen_step(fnn.LSTMCell(H, **F64), p["cell"]), zeros(2), xs, moves["reader"], reverse=True)
    return fnn.Dense(2, **F64).apply({"params": p["head"]}, ys)


class Shared(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        layer = linen.RNN(linen.SimpleCell(H, **F64), name="again")
        return layer(layer(fnn.Dense(H, **F64)(xs)))


def shared(variables, xs, moves):
    p = variables["params"]
    xs = fnn.Dense(H, **F64).apply({"params": p["Dense_0"]}, xs)
    step = linen_step(fnn.SimpleCell(H, **F64), p["SimpleCell_0"])
    return loop(step, zeros(1), loop(step, zeros(1), xs, moves["again"]), moves["again (call 2)"])


class Remat(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        xs = fnn.remat(fnn.RNN)(fnn.LSTMCell(H, **F64))(xs)
        return fnn.RNN(fnn.remat(fnn.GRUCell)(H, **F64))(xs)


def remat(variables, xs, moves):
    p = variables["params"]
    names = sorted(p)
    lstm, gru = (next(p[n] for n in names if kind in n) for kind in ("LSTM", "GRU"))
    xs = loop(linen_step(fnn.LSTMCell(H, **F64), lstm), zeros(2), xs, moves["CheckpointRNN_0"])
    return loop(linen_step(fnn.GRUCell(H, **F64), gru), zeros(1), xs, moves["RNN_0"])


class Both(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        return linen.Bidirectional(linen.RNN(linen.GRUCell(H, **F64)), fnn.RNN(fnn.MGUCell(H, **F64)), name="both")(xs)


def both(variables, xs, moves):
    p = variables["params"]
    ahead = loop(linen_step(fnn.GRUCell(H, **F64), p["GRUCell_0"]), zeros(1), xs, moves["both/forward"])
    back = loop(linen_step(fnn.MGUCell(H, **F64), p["MGUCell_0"]), zeros(1), xs, moves["both/backward"], reverse=True)
    return jnp.concatenate([ahead, back], -1)


class Stacked(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        return linen.LSTM(H, num_layers=2, bidirectional=True, merge="sum", name="stack", **F64)(xs)


def core_step(cell: rnncore.Cell, params: Any) -> Any:
    return lambda carry, x: cell.step(params, carry, cell.project(params, x))


def stacked(variables, xs, moves):
    stack, params = linen.LSTM(H, num_layers=2, bidirectional=True, merge="sum", **F64).functional(
        variables["params"]["stack"]
    )
    for level, weights in enumerate(params.layers):
        start = stack.cell.initial_carry((B,), jnp.float64)
        xs = sum(
            loop(core_step(stack.cell, own), start, xs, moves[f"stack/{way}_{level}"], reverse=way == "backward")
            for way, own in zip(("forward", "backward"), weights, strict=True)
        )
    return xs


class NormCell(fnn.RNNCellBase):
    """A cell of nobody's: layer norm within the recurrence."""

    features: int

    @fnn.compact
    def __call__(self, carry, x):
        h = fnn.Dense(self.features, **F64)(jnp.concatenate([carry, x], -1))
        h = jnp.tanh(fnn.LayerNorm(**F64)(h))
        return h, h

    @fnn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1


class Foreign(fnn.Module):
    @fnn.compact
    def __call__(self, xs):
        xs = linen.RNN(NormCell(H))(xs)
        return fnn.RNN(NormCell(H), name="strange")(xs)


def foreign(variables, xs, moves):
    p = variables["params"]
    xs = loop(linen_step(NormCell(H), p["NormCell_0"]), zeros(1), xs, moves["RNN_0"])
    return loop(linen_step(NormCell(H), p["NormCell_1"]), zeros(1), xs, moves["strange"])


class OfNNX(fnnx.Module):
    def __init__(self):
        rngs = fnnx.Rngs(0)
        self.first = fnnx.RNN(fnnx.LSTMCell(D, H, rngs=rngs, **F64))
        self.layers = nnx.GRU(H, H, num_layers=2, rngs=rngs, **F64)
        self.shared = nnx.RNN(nnx.SimpleCell(H, H, dtype=jnp.float64, rngs=rngs, **F64))

    def __call__(self, xs):
        xs = fnnx.remat(lambda layer, xs: layer(xs))(self.first, xs)
        return self.shared(self.shared(self.layers(xs)))


def of_nnx(model, xs, moves):
    xs = loop(model.first.cell, zeros(2), xs, moves["first"])
    stack, params = model.layers.functional()
    for level, (own,) in enumerate(params.layers):
        start = stack.cell.initial_carry((B,), jnp.float64)
        xs = loop(core_step(stack.cell, own), start, xs, moves[f"layers/forward_{level}"])
    step = model.shared.cell
    return loop(step, zeros(1), loop(step, zeros(1), xs, moves["shared"]), moves["shared (call 2)"])


MODELS = {
    "compact": (Compact, compact), "setup": (Setup, setup), "shared": (Shared, shared), "remat": (Remat, remat),
    "bidirectional": (Both, both), "stacked": (Stacked, stacked), "foreign": (Foreign, foreign), "nnx": (OfNNX, of_nnx),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_perturbations_in_the_model(name):
    make, by_hand = MODELS[name]
    model = make()
    arguments: tuple = (XS,) if name == "nnx" else (model.init(jax.random.key(0), XS), XS)
    recorder, _ = recorder_of("test", model, arguments, None, None)
    found = record("test", recorder, loss)
    assert found.left_out == {}
    moves = {
        layer: jnp.zeros((B, T, sum(a.shape[-1] for a in jax.tree.leaves(one.run.carries))))
        for layer, one in found.layers.items()
    }
    owner = arguments[0] if name != "nnx" else model

    def whole(moves, xs):
        return loss(by_hand(owner, xs, moves))

    value, (want, at_inputs) = jax.value_and_grad(whole, (0, 1))(moves, XS)
    close(found.value, value, EXACT)
    plain = model(XS) if name == "nnx" else model.apply(arguments[0], XS)
    close(found.value, loss(plain), EXACT)
    assert set(found.layers) == set(want)
    for layer, one in found.layers.items():
        got = jnp.concatenate(jax.tree.leaves(one.states), -1)
        assert got.shape == (B, T + 1, want[layer].shape[-1])
        close(got[:, 1:], want[layer], EXACT)
        assert float(jnp.abs(want[layer]).max()) > 1e-3
    if name in ("setup", "nnx", "foreign"):  # the first layer reads the inputs of the model themselves
        first = next(iter(found.layers.values()))
        close(jnp.flip(first.inputs, 1) if first.reverse else first.inputs, at_inputs, EXACT)


def test_the_trajectories_are_those_of_the_layers():
    model = Both()
    variables = model.init(jax.random.key(0), XS)
    found = analysis.recurrent_layers(model, variables, XS)
    ahead, back = found["both/forward"], found["both/backward"]
    outputs = model.apply(variables, XS)
    close(ahead.run.carries.h[:, 1:], outputs[..., :H], EXACT)
    close(jnp.flip(back.run.carries.h[:, 1:], 1), outputs[..., H:], EXACT)
    assert back.reverse and not ahead.reverse and back.states is None
    assert repr(back).endswith("float64), backwards)")


def test_lengths_resets_carries_and_the_layout_of_time():
    lengths, resets = jnp.array([3, 5]), jnp.zeros((T, B), bool).at[2, 1].set(True)
    layer = linen.RNN(linen.LSTMCell(H, **F64), time_major=True, return_carry=True, reverse=True)
    xs = jnp.moveaxis(XS, 1, 0)
    variables = layer.init(jax.random.key(0), xs)
    start = (jnp.full((B, H), 0.3), jnp.full((B, H), -0.2))
    seen = []

    def call(bound, batch):
        seen.append(bound(batch, seq_lengths=lengths, resets=resets, initial_carry=start))
        return seen[-1][1]

    (one,) = analysis.recurrent_layers(layer, variables, xs, call=call).values()
    carry, outputs = layer.apply(variables, xs, seq_lengths=lengths, resets=resets, initial_carry=start)
    close(jnp.moveaxis(seen[-1][1], 0, 1)[1], jnp.moveaxis(outputs, 0, 1)[1], EXACT)
    jax.tree.map(lambda a, b: close(a, b, EXACT), seen[-1][0], carry)
    close(one.run.last.h, carry[1], EXACT)
    assert one.run.lengths.tolist() == [3, 5]


@pytest.mark.slow
def test_trajectory_and_functional_take_modules():
    layer = linen.Bidirectional(linen.RNN(linen.GRUCell(H, **F64)), linen.RNN(linen.GRUCell(H, **F64)))
    variables = layer.init(jax.random.key(0), XS)
    both = analysis.trajectory(layer, variables, XS)
    assert set(both) == {"Bidirectional/forward", "Bidirectional/backward"}
    single = linen.RNN(linen.GRUCell(H, **F64))
    own = single.init(jax.random.key(0), XS)
    cell, params = linen.functional(single, own["params"])
    want = analysis.trajectory(cell, params, XS)
    close(analysis.trajectory(single, own, XS).carries.h, want.carries.h, EXACT)
    stack = rnncore.Stack(rnncore.LSTM(H), num_layers=2)
    weights = stack.init(jax.random.key(0), D, jnp.float64)
    found = analysis.trajectory(stack, weights, XS)
    _, ys = rnncore.unroll_stack(stack, weights, XS)
    close(found["forward_1"].carries.h[:, 1:], ys, EXACT)
    rngs = fnnx.Rngs(0)
    close(analysis.trajectory(rnn := nnx.RNN(nnx.GRUCell(D, H, rngs=rngs, **F64)), XS).carries.h[:, 1:], rnn(XS), EXACT)
    assert nnx.functional(rnn)[0] == rnncore.GRU(H)
    assert nnx.functional(nnx.LSTM(D, H, rngs=rngs))[0] == nnx.LSTM(D, H, rngs=rngs).stack
    assert linen.functional(layer, variables["params"])[0][0] == rnncore.GRU(H)
    assert linen.functional(linen.LSTM(H), linen.LSTM(H).init(jax.random.key(0), XS)["params"])[0].num_layers == 1


@pytest.mark.slow
def test_half_precision_is_analysed_in_float32_and_says_so():
    cell = rnncore.LSTM(H)
    params = cell.init(jax.random.key(0), D, jnp.bfloat16)
    run = analysis.trajectory(cell, params, XS.astype(jnp.bfloat16))
    assert run.carries.h.dtype == jnp.float32 and run.narrow == "bfloat16" and "given in bfloat16" in repr(run)
    layer = linen.RNN(linen.LSTMCell(H, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    xs = XS.astype(jnp.bfloat16)
    variables = layer.init(jax.random.key(0), xs)
    recorder, _ = recorder_of("test", layer, (variables, xs), None, None)
    found = record("test", recorder, lambda ys: loss(ys.astype(jnp.float32)))
    (one,) = found.layers.values()
    assert one.dtype == "bfloat16" and one.states.h.dtype == jnp.float32 and one.run.carries.h.dtype == jnp.float32


# ------------------------------------------------------------------------------------------ the foreign cell


def test_a_foreign_cell_of_one_sequence_at_a_time_with_gates():
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(D + 2 * H, H)))

    def step(w, carry, x):
        u = jax.nn.sigmoid(jnp.concatenate([x, carry["a"], carry["b"]]) @ w)
        new = {"a": u * carry["a"] + (1 - u) * x.sum(), "b": jnp.tanh(u + carry["a"])}
        return new, new["a"] + new["b"]

    cell = rnncore.foreign_cell(
        step, weights, {"a": jnp.zeros(H), "b": jnp.zeros(H)}, names=("c", "h"), batched=False,
        gates=lambda w, carry, x: {"u": jax.nn.sigmoid(jnp.concatenate([x, carry["a"], carry["b"]]) @ w)},
    )  # fmt: skip
    run = analysis.trajectory(cell, weights, XS)
    assert run.fields == ("c", "h") and set(analysis.gate_statistics(run)) == {"u"}
    jacobians = analysis.step_jacobians(run)
    flat = jnp.concatenate([run.carries.c, run.carries.h], -1)

    def plain(s, x):
        new, _ = step(weights, {"a": s[:H], "b": s[H:]}, x)
        return jnp.concatenate([new["a"], new["b"]])

    close(jacobians[1, 2], jax.jacobian(plain)(flat[1, 2], XS[1, 2]), 1e-12)
    with pytest.raises(ValueError, match=r"names=\('a',\)\)`: the carry has 2 arrays"):
        rnncore.foreign_cell(step, weights, {"a": jnp.zeros(H), "b": jnp.zeros(H)}, names=("a",))


# ----------------------------------------------------------------------------------------------------- errors


class NeedsLengths(fnn.Module):
    @fnn.compact
    def __call__(self, xs, lengths):
        return linen.RNN(linen.GRUCell(H))(xs, seq_lengths=lengths)


def test_what_cannot_be_found_is_said():
    dense = fnn.Dense(2)
    with pytest.raises(ValueError, match="the model runs no recurrent layer that can be analysed;"):
        analysis.recurrent_layers(dense, dense.init(jax.random.key(0), XS), XS)
    layer = linen.LSTM(H, dropout=0.5, num_layers=2)
    variables = layer.init(jax.random.key(0), XS, deterministic=True)
    with pytest.raises(ValueError, match=r"LSTM: its dropout is drawn; call the model with deterministic=True"):
        analysis.recurrent_layers(
            layer, variables, XS, call=lambda m, b: m(b, deterministic=False), rngs={"dropout": jax.random.key(1)}
        )
    with pytest.raises(ValueError, match=r"expected \(model, variables, batch\).*got 1 argument"):
        analysis.recurrent_layers(layer, XS)
    with pytest.raises(ValueError, match="expected a flax.linen or flax.nnx model"):
        analysis.recurrent_layers(3, XS)
    with pytest.raises(ValueError, match="pass call=lambda model, batch"):
        analysis.recurrent_layers(layer, variables, {"x": XS})
    wanted = (
        r"`batch=<tuple>`: \w+ is called as model\(batch\[0\]\), but missing a required .*'lengths'; pass call=lambda"
    )
    with pytest.raises(ValueError, match=wanted):
        analysis.recurrent_layers(NeedsLengths(), {"params": {}}, (XS, 1))
    with pytest.raises(ValueError, match=r"variables=<dict of cell>, ...\)`: expected the variables as `model.init"):
        analysis.recurrent_layers(layer, {"cell": {}}, XS)
    with pytest.raises(ValueError, match=r"variables=<\w+>, ...\)`: expected the variables"):
        analysis.recurrent_layers(layer, XS, variables)
