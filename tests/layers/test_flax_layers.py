"""The layers LSTM, GRU and Elman of rnncore.linen and rnncore.nnx: one another's like, and a stack's."""

from __future__ import annotations

import functools
from typing import Any

import flax
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close

import rnncore
from rnncore import linen, nnx, unroll_stack

B, T, D, H = 3, 6, 3, 4
f32, f64 = jnp.float32, jnp.float64
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
RESETS = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.4)
LENGTHS = jnp.array([2, 0, T])
KINDS = ("LSTM", "GRU", "Elman")
EVERYTHING: dict[str, Any] = dict(
    num_layers=2, bidirectional=True, merge="sum", dropout=0.2, recurrent_dropout=0.2, zoneout=0.1, heads=2,
    learned_carry=True, param_dtype=f64,
)  # fmt: skip


def pair(kind: str, **options: Any) -> tuple[Any, Any, Any]:
    """A linen layer, an nnx layer with other random parameters, and those parameters as linen has them."""
    modern = getattr(nnx, kind)(D, H, **options, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(modern, nnx.Param))
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(2)
    state = tree.unflatten([jnp.asarray(rng.normal(0, 0.6, a.shape), a.dtype) for a in leaves])
    nnx.update(modern, state)
    return getattr(linen, kind)(H, **options), modern, {"params": state}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_are_the_stack_with_everything_on(kind: str):
    more = {"forget_bias": 1.0} if kind != "Elman" else {}
    more |= {"zoneout_cell": 0.3} if kind == "LSTM" else {}
    classic, modern, variables = pair(kind, **EVERYTHING, **more)
    options = dict(resets=RESETS, seq_lengths=LENGTHS, return_states=True, return_carry=True)
    stack, params = classic.functional(variables["params"])
    assert stack == modern.stack and stack.is_random and stack.cell.recurrence == rnncore.Heads(2)
    assert stack.zoneout == ((0.3, 0.1) if kind == "LSTM" else (0.1,))

    @jax.jit
    def run(variables: Any, xs: Any) -> Any:
        by_hand = unroll_stack(stack, params, xs, resets=RESETS, seq_lengths=LENGTHS, return_states=True)
        return classic.apply(variables, xs, deterministic=True, **options), by_hand

    got, want = run(variables, XS)
    assert_close(got, want, 0.0)
    assert_close(jax.jit(modern, static_argnames=("deterministic", "return_states", "return_carry"))(
        XS, deterministic=True, **options), want, 1e-12)  # fmt: skip
    key = jax.random.key(3)
    drawn = modern(XS, rngs=key, **options)
    assert_close(drawn, unroll_stack(
        stack, params, XS, key=key, resets=RESETS, seq_lengths=LENGTHS, return_states=True), 0.0)  # fmt: skip
    assert not np.allclose(drawn[1], want[1])


@pytest.mark.parametrize("kind", KINDS)
def test_initial_parameters_have_one_tree_in_both(kind: str):
    classic, modern, _ = pair(kind, **EVERYTHING)
    variables = jax.eval_shape(lambda: classic.init(jax.random.key(0), XS, deterministic=True))
    state = nnx.to_pure_dict(nnx.state(modern, nnx.Param))
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (variables["params"], state)]
    assert shapes[0] == shapes[1]
    assert variables["params"]["forward_1"]["input_kernel"].shape[0] == H


@pytest.mark.parametrize(("kind", "gate"), [("LSTM", 1), ("GRU", 1)])
def test_initial_values_are_orthogonal_for_each_gate_and_carry_the_forget_bias(kind: str, gate: int):
    params = getattr(linen, kind)(H, forget_bias=1.5).init(jax.random.key(0), XS)["params"]["forward_0"]
    modern = getattr(nnx, kind)(D, H, forget_bias=1.5, rngs=nnx.Rngs(0))
    for own in (params, modern.functional()[0].to_tree(modern.functional()[1])["forward_0"]):
        for block in np.moveaxis(np.asarray(own["recurrent_kernel"]), 1, 0):
            np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)
        want = np.zeros_like(own["bias"])
        want[gate] = 1.5
        np.testing.assert_array_equal(own["bias"], want)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_stream_in_pieces_is_the_stream(flavour: str):
    """Each piece under jit, the first one from the layers' own learned carry."""
    classic, modern, variables = pair("LSTM", num_layers=2, learned_carry=True, zoneout=0.1, param_dtype=f64)
    if flavour == "linen":
        start = classic.apply(variables, (B,), method="initialize_carry")
    else:
        start = modern.initialize_carry((B,))

    @jax.jit
    def run(xs: Any, resets: Any, carry: Any = None) -> Any:
        options = dict(resets=resets, initial_carry=carry, return_carry=True, deterministic=True)
        return classic.apply(variables, xs, **options) if flavour == "linen" else modern(xs, **options)

    whole, carry, pieces = run(XS, RESETS), start, []
    for part in (slice(0, 3), slice(3, T)):
        carry, ys = run(XS[:, part], RESETS[:, part], carry)
        pieces.append(ys)
    assert np.abs(start[1][0].c).min() > 0 and np.asarray(RESETS[:, 3:]).any()
    assert_close((carry, jnp.concatenate(pieces, 1)), whole, 1e-12)


def test_gradients_of_both_are_those_of_the_stack():
    classic, modern, variables = pair("GRU", num_layers=2, bidirectional=True, learned_carry=True, param_dtype=f64)
    stack, params = classic.functional(variables["params"])
    graph, state = nnx.split(modern, nnx.Param)

    def total(ys: Any) -> Any:
        return jnp.sum(jnp.sin(ys))

    @jax.jit
    def gradients(variables: Any, state: Any, params: Any, xs: Any) -> Any:
        of_linen = jax.grad(lambda v: total(classic.apply(v, xs, resets=RESETS)))(variables)["params"]
        of_nnx = jax.grad(lambda s: total(nnx.merge(graph, s)(xs, resets=RESETS)))(state)
        of_stack = jax.grad(lambda p: total(unroll_stack(stack, p, xs, resets=RESETS)[1]))(params)
        return of_linen, nnx.to_pure_dict(of_nnx), stack.to_tree(of_stack)

    of_linen, of_nnx, of_stack = gradients(variables, state, params, XS)
    assert_close(of_linen, of_stack, 1e-12)
    assert_close(of_nnx, of_stack, 1e-12)
    assert np.abs(of_stack["backward_1"]["initial_h"]).max() > 0


# --------------------------------------------------------------------------- in a training loop


def test_randomness_of_nnx_moves_on_in_training_and_stands_still_in_evaluation():
    layer = nnx.LSTM(D, H, num_layers=2, dropout=0.5, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda layer, xs: layer(xs))
    xs = XS.astype(f32)
    assert not np.allclose(run(layer, xs), run(layer, xs))
    layer.eval()
    np.testing.assert_array_equal(run(layer, xs), run(layer, xs))
    layer.train()
    assert not np.allclose(run(layer, xs), run(layer, xs))


def test_an_nnx_layer_without_rates_holds_parameters_only():
    layer = nnx.GRU(D, H, num_layers=2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer, nnx.Param)
    xs = XS.astype(f32)
    want = jax.jit(layer)(xs)
    np.testing.assert_allclose(jax.jit(lambda p: nnx.merge(graph, p)(xs))(params), want, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(layer)(xs), want, atol=1e-6)
    np.testing.assert_allclose(jax.checkpoint(lambda xs: layer(xs))(xs), want, atol=1e-6)


def test_linen_asks_for_deterministic_and_for_the_dropout_stream():
    layer = linen.LSTM(H, recurrent_dropout=0.5)
    variables = layer.init(jax.random.key(0), XS.astype(f32), deterministic=True)
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, XS)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        layer.apply(variables, XS, deterministic=False)
    draws = [layer.apply(variables, XS, deterministic=False, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2])
    assert linen.LSTM(H).apply(variables, XS).shape == (B, T, H)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_an_optax_step_lowers_the_loss(flavour: str):
    xs, target = XS.astype(f32), jnp.cumsum(XS, 1)[..., :1].astype(f32)
    optimizer = optax.adam(0.05)
    if flavour == "linen":
        layer = linen.LSTM(H, num_layers=2, zoneout=0.05)
        params = layer.init(jax.random.key(0), xs, deterministic=True)

        def run(params: Any, key: Any) -> Any:
            return layer.apply(params, xs, deterministic=False, rngs={"dropout": key})
    else:
        graph, params = nnx.split(nnx.LSTM(D, H, num_layers=2, rngs=nnx.Rngs(0)))

        def run(params: Any, key: Any) -> Any:
            return nnx.merge(graph, params)(xs)

    def loss(params: Any, key: Any) -> Any:
        return jnp.mean((run(params, key)[..., :1] - target) ** 2)

    @jax.jit
    def train(params: Any) -> Any:
        def step(state: Any, key: Any) -> Any:
            params, inner = state
            value, gradient = jax.value_and_grad(loss)(params, key)
            updates, inner = optimizer.update(gradient, inner, params)
            return (optax.apply_updates(params, updates), inner), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 30))[1]

    losses = train(params)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("wrap", ["remat", "jit", "vmap"])
def test_linen_transformations_of_a_layer(wrap: str):
    plain, _, variables = pair("GRU", num_layers=2, param_dtype=f64)
    want = jax.jit(plain.apply)(variables, XS)
    if wrap == "vmap":
        many = linen.vmap(linen.GRU, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        layer = many(H, num_layers=2, param_dtype=f64)
        stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
        got = layer.apply(stacked, XS)
        assert got.shape == (2, *want.shape)
        got = got[0]
    else:
        layer = getattr(linen, wrap)(linen.GRU)(H, num_layers=2, param_dtype=f64)
        got = layer.apply(variables, XS)
    assert_close(got, want, 1e-12)


# ---------------------------------------------------------------------------------------- dtypes

HALF = (None, f32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize(("kind", "flavour"), [("LSTM", "linen"), ("Elman", "nnx")])
def test_dtypes_of_every_combination(kind: str, flavour: str):
    """Outputs: `output_dtype`, else the products'; carries: `carry_dtype`, else the parameters'."""
    xs = XS.astype(f32)
    for dtype in HALF:
        for param_dtype in HALF[1:]:
            for carry_dtype in HALF:
                for output_dtype in HALF if carry_dtype is None else (None, jnp.float16):
                    options = dict(
                        dtype=dtype, param_dtype=param_dtype, carry_dtype=carry_dtype, output_dtype=output_dtype,
                        return_carry=True,
                    )  # fmt: skip

                    def run(options: Any = options) -> Any:
                        if flavour == "nnx":
                            return getattr(nnx, kind)(D, H, **options, rngs=nnx.Rngs(0))(xs)
                        return getattr(linen, kind)(H, **options).init_with_output(jax.random.key(0), xs)[0]

                    carry, ys = jax.eval_shape(run)
                    assert ys.dtype == (output_dtype or dtype or jnp.promote_types(f32, param_dtype)), options
                    assert {a.dtype for a in jax.tree.leaves(carry)} == {jnp.dtype(carry_dtype or param_dtype)}, options


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_near_float32(dtype: Any):
    classic, _, variables = pair("LSTM", num_layers=2)
    half = linen.LSTM(H, num_layers=2, dtype=dtype)
    want, got = classic.apply(variables, XS.astype(f32)), half.apply(variables, XS.astype(f32))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(f32), want, atol=8 * float(jnp.finfo(dtype).eps))


class Own(nnx.LSTM):
    """A user's layers, with names that are options of ours."""

    def __init__(self, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(*args, rngs=rngs, **kwargs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def merge(self) -> str:
        return "own"


@functools.wraps(nnx.LSTM.__init__)
def with_another_option(self: Any, *args: Any, layer_dropout: float = 0.0, **kwargs: Any) -> None:
    nnx.LSTM.__init__(self, *args, **kwargs)


def test_layers_of_nnx_keep_their_options_in_the_stack_alone():
    """What a module has as attributes is its state, and a name that subclasses cannot have."""
    activation = jax.tree_util.Partial(jnp.clip, min=jnp.float32(-1), max=jnp.float32(1))
    layers = Own(3, 4, activation_fn=activation, rngs=nnx.Rngs(0))
    assert layers.merge() == "own" and isinstance(layers.dropout, nnx.Dropout)
    learned = nnx.LSTM(3, 4, activation_fn=flax.nnx.PReLU(), rngs=nnx.Rngs(0))
    assert nnx.state(learned, nnx.Param).keys() == {"forward_0"}
    with pytest.raises(ValueError, match="dropout"):
        learned.set_attributes(dropout=0.5)
    other = type("Other", (nnx.LSTM,), {"__init__": with_another_option})
    assert other(3, 4, layer_dropout=0.1, rngs=nnx.Rngs(0)).stack.cell.hidden_size == 4
