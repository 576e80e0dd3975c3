"""RNN and Bidirectional of rnncore.linen, held to their flax.linen namesakes, faults of those apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore.sequence
from rnncore import linen as ours

B, T, D, H = 2, 5, 3, 4
CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")
f32, f64 = jnp.float32, jnp.float64


def normal(seed: int, shape: tuple[int, ...], dtype: Any = f64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def some_variables(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Variables of the layer with noise in all of them, biases too; costs no compilation."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: layer.init(jax.random.key(0), *args, **kwargs)))
    return tree.unflatten([0.6 * normal(i, a.shape, a.dtype) for i, a in enumerate(leaves)])


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(a: Any, b: Any, atol: float = 1e-12) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=0, atol=atol)


def projected(out: Any) -> jax.Array:
    """A random projection of all that came out."""
    return sum(jnp.vdot(normal(70 + i, a.shape, a.dtype), a) for i, a in enumerate(jax.tree.leaves(out)))  # type: ignore


def with_gradients(
    layer: Any, variables: Any, xs: jax.Array, carry: Any = None, seq_lengths: Any = None, **options: Any
) -> Any:
    """What the layer returns, and the gradients to parameters, inputs and initial carry."""

    @jax.jit
    def run(variables: Any, xs: jax.Array, carry: Any, seq_lengths: Any) -> Any:
        def loss(variables: Any, xs: jax.Array, carry: Any) -> Any:
            out = layer.apply(variables, xs, initial_carry=carry, seq_lengths=seq_lengths, **options)
            return projected(out), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, xs, carry)
        return out, gradients

    return run(variables, xs, carry, seq_lengths)


def start(name: str, batch: tuple[int, ...] = (B,), dtype: Any = f64) -> Any:
    arrays = normal(21, (*batch, H), dtype), normal(22, (*batch, H), dtype)
    return arrays if "LSTM" in name else arrays[0]


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch) -> list:
    """The functional cells that `rnncore.unroll` was called with."""
    calls: list = []
    original = rnncore.sequence.unroll

    def counted(cell: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(cell)
        return original(cell, *args, **kwargs)

    monkeypatch.setattr(rnncore.sequence, "unroll", counted)
    return calls


# ---------------------------------------------------------------------- fields and parameter trees


@pytest.mark.parametrize("name,own", [("RNN", 4), ("Bidirectional", 0)])
def test_fields_are_those_of_flax_and_our_own_come_after(name: str, own: int) -> None:
    def described(library: Any) -> list:
        fields = [f for f in dataclasses.fields(getattr(library, name)) if f.name not in ("parent", "name")]
        return [(f.name, getattr(f.default, "__name__", f.default), f.kw_only) for f in fields]

    mine, flaxen = described(ours), described(theirs)
    assert mine[: len(flaxen)] == flaxen
    assert (
        mine[len(flaxen) :]
        == [
            ("differentiation", "any", True),
            ("checkpoint_every", None, True),
            ("recompute", "nothing", True),
            ("backend", None, True),
        ][:own]
    )


def test_positional_construction() -> None:
    xs, options = normal(1, (T, B, D)), (True, True, True, True, 2)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, param_dtype=f64), *options) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs))
    mine, flaxen = (
        nn.Bidirectional(*(nn.RNN(nn.GRUCell(H, param_dtype=f64)) for _ in range(2)), jnp.add, True, True)
        for nn in (ours, theirs)
    )
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs))


def in_setup(nn: Any) -> Any:
    class Model(theirs.Module):
        def setup(self) -> None:
            self.r = nn.RNN(nn.LSTMCell(H))
            self.cell = nn.GRUCell(H)
            self.shared = [nn.RNN(self.cell), nn.RNN(self.cell, reverse=True)]
            self.head = theirs.Dense(2)

        def __call__(self, xs: Any) -> Any:
            return self.head(self.r(xs) + sum(r(xs) for r in self.shared))

    return Model()


def in_compact(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            xs = theirs.Dense(D)(xs)
            xs = nn.RNN(nn.LSTMCell(H), name="lost")(xs)
            xs = theirs.Dropout(0.5, deterministic=False)(xs)
            xs = nn.RNN(nn.OptimizedLSTMCell(H))(xs)
            xs = nn.RNN(nn.GRUCell(H, name="mine"))(xs)
            xs = nn.Bidirectional(nn.RNN(nn.LSTMCell(H)), nn.RNN(nn.SimpleCell(H)))(xs)
            noise = jax.random.normal(self.make_rng("noise"), xs.shape, xs.dtype)
            return theirs.Dense(2)(theirs.Dropout(0.5, deterministic=False)(xs) + noise)

    return Model()


def standalone(nn: Any) -> Any:
    return nn.RNN(nn.OptimizedLSTMCell(H), return_carry=True)


def bidirectional(nn: Any) -> Any:
    return nn.Bidirectional(nn.RNN(nn.GRUCell(H)), nn.RNN(nn.LSTMCell(H)), return_carry=True)


def rematerialised(nn: Any) -> Any:
    class Model(theirs.Module):
        @theirs.compact
        def __call__(self, xs: Any) -> Any:
            xs = nn.RNN(theirs.remat(nn.LSTMCell)(H))(xs)
            return theirs.remat(nn.RNN)(nn.GRUCell(H))(xs)

    return Model()


def layers(nn: Any) -> Any:
    """Three networks at once, with their own parameters."""
    return theirs.vmap(nn.RNN, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3)(
        nn.SimpleCell(H)
    )


@pytest.mark.parametrize(
    "model", [standalone, in_setup, in_compact, bidirectional, rematerialised, layers], ids=lambda f: f.__name__
)
def test_trees_and_initial_values_bit_for_bit_and_results(model: Callable) -> None:
    xs = normal(1, (B, T, D), f32)
    rngs = {"params": jax.random.key(3), "dropout": jax.random.key(4), "noise": jax.random.key(5)}
    (got_y, got), (want_y, want) = (model(nn).init_with_output(rngs, xs) for nn in (ours, theirs))
    same_bits(got, want)
    close(got_y, want_y, 2e-6)
    variables = jax.tree.map(lambda a: a + 0.3 * normal(7, a.shape, a.dtype), want)
    close(model(ours).apply(variables, xs, rngs=rngs), model(theirs).apply(variables, xs, rngs=rngs), 3e-6)


def test_partitioned_initialisers_keep_their_boxes() -> None:
    init = theirs.with_partitioning(theirs.initializers.lecun_normal(), (None, "model"))
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, kernel_init=init)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    same_bits(variables, flaxen.init(jax.random.key(0), xs))
    assert isinstance(variables["params"]["cell"]["ir"]["kernel"], theirs.Partitioned)
    close(with_gradients(mine, variables, xs), with_gradients(flaxen, variables, xs), 3e-6)


# ------------------------------------------------------------------------------ values and gradients

LENGTHS = jnp.array([1, 3, T])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "time major": dict(time_major=True),
    "reverse": dict(reverse=True),
    "reverse, keep order": dict(reverse=True, keep_order=True),
    "keep order": dict(keep_order=True),
    "lengths": dict(seq_lengths=LENGTHS),
    "lengths, reverse": dict(seq_lengths=LENGTHS, reverse=True),
    "lengths, reverse, keep order": dict(seq_lengths=LENGTHS, reverse=True, keep_order=True),
    "all": dict(seq_lengths=LENGTHS, reverse=True, keep_order=True, time_major=True),
    "full lengths": dict(seq_lengths=jnp.full(3, T)),
}


def check_call(name: str, dtype: Any, atol: float, batch: tuple[int, ...], options: Any, **fields: Any) -> None:
    fields["param_dtype"] = dtype
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, **fields), return_carry=True) for nn in (ours, theirs))
    shape = (T, *batch, D) if options.get("time_major") else (*batch, T, D)
    xs, carry = normal(1, shape, dtype), start(name, batch, dtype)
    variables = some_variables(flaxen, xs)
    close(
        with_gradients(mine, variables, xs, carry, **options),
        with_gradients(flaxen, variables, xs, carry, **options),
        atol,
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, unrolled: list) -> None:
    check_call("OptimizedLSTMCell", f64, 1e-12, (3,), OPTIONS[options])
    assert len(unrolled) == 1


@pytest.mark.parametrize(
    "name,options", [("LSTMCell", "all"), ("SimpleCell", "all"), ("GRUCell", "all"), ("GRUCell", "reverse")]
)
def test_options_of_the_other_cells(name: str, options: str, unrolled: list) -> None:
    check_call(name, f64, 1e-12, (3,), OPTIONS[options])
    assert len(unrolled) == 1


@pytest.mark.parametrize("name", CELLS)
def test_single_precision(name: str) -> None:
    check_call(name, f32, 5e-6, (3,), OPTIONS["lengths"])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_axes(batch: tuple[int, ...]) -> None:
    check_call("LSTMCell", f64, 1e-12, batch, {})
    check_call("SimpleCell", f64, 1e-12, batch, dict(time_major=True, reverse=True))


@pytest.mark.parametrize("name", CELLS)
def test_other_functions(name: str, unrolled: list) -> None:
    fields = dict(residual=True) if name == "SimpleCell" else dict(gate_fn=jax.nn.hard_sigmoid)
    check_call(name, f64, 1e-12, (2,), {}, activation_fn=jax.nn.gelu, **fields)
    assert len(unrolled) == 1


def test_fields_and_call_arguments_say_the_same() -> None:
    options = dict(time_major=True, return_carry=True, reverse=True, keep_order=True)
    xs, lengths = normal(1, (T, B, D), f32), jnp.array([2, T])
    by_field, by_call = ours.RNN(ours.GRUCell(H), **options), ours.RNN(ours.GRUCell(H))
    variables = by_field.init(jax.random.key(0), xs)
    got = by_field.apply(variables, xs, seq_lengths=lengths)
    same_bits(got, by_call.apply(variables, xs, seq_lengths=lengths, **options))
    close(got, theirs.RNN(theirs.GRUCell(H), **options).apply(variables, xs, seq_lengths=lengths), 1e-6)
    off = by_field.apply(variables, xs, **dict.fromkeys(options, False))
    close(off, by_call.apply(variables, xs), 1e-6)
    assert isinstance(off, jax.Array)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_random_initial_carry(name: str) -> None:
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, carry_init=theirs.initializers.normal(1.0))) for nn in (ours, theirs))
    variables = flaxen.init(jax.random.key(0), xs)
    for key in (None, jax.random.key(8)):
        close(mine.apply(variables, xs, init_key=key), flaxen.apply(variables, xs, init_key=key), 1e-6)
    moved = mine.apply(variables, xs, init_key=jax.random.key(8)) - mine.apply(variables, xs)
    assert jnp.abs(moved).max() > 1e-2


@pytest.mark.parametrize("name", ["OptimizedLSTMCell", "GRUCell"])
def test_bfloat16(name: str) -> None:
    """dtypes exactly as in Flax; values to the rounding of sums whose order differs."""
    xs, carry = normal(1, (B, T, D), f32), start(name, dtype=f32)
    mine, flaxen = (nn.RNN(getattr(nn, name)(H, dtype=jnp.bfloat16), return_carry=True) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    (got, got_gradients), (want, gradients) = (with_gradients(m, variables, xs, carry) for m in (mine, flaxen))
    close(got, want, 4 * 2.0**-8)
    for a, b in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
        assert a.dtype == b.dtype
        assert jnp.linalg.norm(a - b) < 0.03 * jnp.linalg.norm(b)


@pytest.mark.parametrize("cell", [ours.SimpleCell, theirs.SimpleCell, theirs.remat(ours.SimpleCell)])
def test_simple_cell_in_bfloat16_runs_where_flax_fails(cell: type) -> None:
    xs = normal(1, (B, T, D), f32)
    with pytest.raises(TypeError, match="carry"):
        theirs.RNN(theirs.SimpleCell(H, dtype=jnp.bfloat16)).init(jax.random.key(0), xs)
    layer = ours.RNN(cell(H, dtype=jnp.bfloat16), return_carry=True)
    variables = layer.init(jax.random.key(0), xs)
    h, ys = layer.apply(variables, xs)
    assert (h.dtype, ys.dtype) == (f32, jnp.bfloat16)
    exact = theirs.RNN(theirs.SimpleCell(H)).apply(variables, xs)
    np.testing.assert_allclose(ys.astype(f32), exact, rtol=0, atol=0.03)
    gradients = jax.grad(lambda v: projected(layer.apply(v, xs)).astype(f32))(variables)
    wanted = jax.grad(lambda v: projected(layer.clone(cell=ours.SimpleCell(H)).apply(v, xs)))(variables)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == f32
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def test_integer_inputs_as_in_flax() -> None:
    xs = jax.nn.one_hot(jnp.array([[0, 2, 1], [1, 1, 0]]), D, dtype=jnp.int32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)


# ------------------------------------------------------------------------- the fast way and the other


class Doubled(ours.GRUCell):
    """A user's subclass with another step."""

    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return super().__call__(carry, 2 * inputs)


class DoubledInFlax(theirs.GRUCell):
    """The same over Flax's cell."""

    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        return super().__call__(carry, 2 * inputs)


class SoftSlope(theirs.Module):
    """An activation with a parameter."""

    @theirs.compact
    def __call__(self, x: Any) -> Any:
        return jnp.tanh(x * self.param("slope", theirs.initializers.ones, (), f64))


WIDE: dict[str, Any] = dict(param_dtype=f64)
SCANNED: dict[str, tuple[Callable, Callable]] = {
    "Flax's cell": (lambda: theirs.LSTMCell(H, **WIDE), lambda: theirs.LSTMCell(H, **WIDE)),
    "remat": (lambda: theirs.remat(ours.LSTMCell)(H, **WIDE), lambda: theirs.LSTMCell(H, **WIDE)),
    "subclass": (lambda: Doubled(H, **WIDE), lambda: DoubledInFlax(H, **WIDE)),
    "not elementwise": (
        lambda: ours.GRUCell(H, gate_fn=jax.nn.softmax, **WIDE),
        lambda: theirs.GRUCell(H, gate_fn=jax.nn.softmax, **WIDE),
    ),
    "module": (
        lambda: ours.SimpleCell(H, activation_fn=SoftSlope(), **WIDE),
        lambda: theirs.SimpleCell(H, activation_fn=SoftSlope(), **WIDE),
    ),
}


@pytest.mark.parametrize("kind", SCANNED)
def test_what_is_not_exactly_ours_goes_through_nn_scan(kind: str, unrolled: list) -> None:
    mine, flaxen = (nn.RNN(make(), return_carry=True) for nn, make in zip((ours, theirs), SCANNED[kind], strict=True))
    xs, options = normal(1, (3, T, D)), OPTIONS["lengths, reverse, keep order"]
    carry = start("LSTM" if "LSTM" in type(mine.cell).__name__ else "", (3,))
    variables = some_variables(flaxen, xs, initial_carry=carry)
    assert jax.tree.structure(variables) == jax.tree.structure(some_variables(mine, xs, initial_carry=carry))
    close(*(with_gradients(layer, variables, xs, carry, **options) for layer in (mine, flaxen)))
    assert not unrolled


def test_a_function_that_has_caught_a_traced_value_goes_through_nn_scan(unrolled: list) -> None:
    xs = normal(1, (B, T, D))
    variables = some_variables(theirs.RNN(theirs.GRUCell(H, param_dtype=f64)), xs)

    def loss(slope: jax.Array, nn: Any) -> jax.Array:
        layer = nn.RNN(nn.GRUCell(H, activation_fn=lambda x: jnp.tanh(slope * x), param_dtype=f64))
        return projected(layer.apply(variables, xs))

    slope = jnp.array(0.7)
    close(jax.grad(loss)(slope, ours), jax.grad(loss)(slope, theirs))
    close(jax.jit(loss, static_argnums=1)(slope, ours), loss(slope, theirs))
    assert not unrolled


def test_a_function_that_has_caught_a_constant(unrolled: list) -> None:
    """A number keeps the fast way; an array belongs to units, which only nn.scan can tell apart."""
    xs = normal(1, (B, T, D))
    variables = some_variables(theirs.RNN(theirs.GRUCell(H, param_dtype=f64)), xs)
    for slope, fast in ((jnp.array(0.7), 1), (jnp.linspace(0.1, 1.0, H), 0)):

        def loss(variables: Any, nn: Any, slope: Any = slope) -> jax.Array:
            layer = nn.RNN(nn.GRUCell(H, activation_fn=lambda x: jnp.tanh(slope * x), param_dtype=f64))
            return projected(layer.apply(variables, xs))

        unrolled.clear()
        run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        close(run(variables, ours), run(variables, theirs))
        assert len(unrolled) == fast


def test_a_function_over_groups_of_units(unrolled: list) -> None:
    def normalised(x: jax.Array) -> jax.Array:
        groups = x.reshape(*x.shape[:-1], 2, H // 2)
        return (groups - groups.mean(-1, keepdims=True)).reshape(x.shape)

    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.SimpleCell(H, activation_fn=normalised)) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


def test_a_function_that_cannot_be_hashed_goes_through_nn_scan(unrolled: list) -> None:
    @dataclasses.dataclass
    class Scaled:
        by: float

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.by * x)

    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.GRUCell(H, activation_fn=Scaled(0.5))) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


def test_parameters_of_every_step_go_through_nn_scan(unrolled: list) -> None:
    xs = normal(1, (T, B, D), f32)
    fields = dict(variable_axes={"params": 0}, variable_broadcast=False, split_rngs={"params": True}, time_major=True)
    mine, flaxen = (nn.RNN(nn.GRUCell(H), **fields) for nn in (ours, theirs))
    variables = flaxen.init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    assert variables["params"]["cell"]["ir"]["kernel"].shape == (T, D, H)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert not unrolled


def test_scan_fields_that_do_not_touch_the_parameters_keep_the_fast_way(unrolled: list) -> None:
    xs = normal(1, (B, T, D), f32)
    fields = dict(variable_axes={"intermediates": 0}, variable_carry="batch_stats", unroll=T)
    fields |= dict(split_rngs={"params": False, "dropout": True})
    mine, flaxen = (nn.RNN(nn.GRUCell(H), **fields) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    close(mine.apply(variables, xs), flaxen.apply(variables, xs), 1e-6)
    assert len(unrolled) == 2


def test_an_interceptor_sees_the_cell(unrolled: list) -> None:
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(nn.SimpleCell(H)) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    unrolled.clear()

    def halve(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        step = type(context.module).__name__ == "SimpleCell" and context.method_name == "__call__"
        return (out[0] / 2, out[1]) if step else out

    with theirs.intercept_methods(halve):
        got, want = mine.apply(variables, xs), flaxen.apply(variables, xs)
    close(got, want, 1e-6)
    assert not unrolled
    assert jnp.abs(got - mine.apply(variables, xs)).max() > 1e-2


def test_dropout_in_a_foreign_cell() -> None:
    class Dropping(theirs.RNNCellBase):
        @theirs.compact
        def __call__(self, carry: Any, inputs: Any) -> Any:
            inputs = theirs.Dropout(0.5, deterministic=False)(inputs)
            return theirs.GRUCell(H)(carry, inputs)

        @theirs.nowrap
        def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
            return jnp.zeros((*input_shape[:-1], H), f32)

        @property
        def num_feature_axes(self) -> int:
            return 1

    xs, rngs = normal(1, (B, T, D), f32), {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    mine, flaxen = (nn.RNN(Dropping(), split_rngs={"params": False, "dropout": True}) for nn in (ours, theirs))
    variables = flaxen.init(rngs, xs)
    same_bits(mine.init(rngs, xs), variables)
    close(mine.apply(variables, xs, rngs=rngs), flaxen.apply(variables, xs, rngs=rngs), 1e-6)


@pytest.mark.parametrize("options", ["lengths", "all"])
def test_a_cell_with_more_feature_axes(options: str) -> None:
    shape = (T, 3, 4, 2) if options == "all" else (3, T, 4, 2)
    xs = normal(1, shape, f32)
    mine, flaxen = (nn.RNN(theirs.ConvLSTMCell(2, (3,)), return_carry=True) for nn in (ours, theirs))
    kwargs = dict(OPTIONS[options])
    lengths = kwargs.pop("seq_lengths")
    variables = some_variables(flaxen, xs, time_major=options == "all")
    got, want = (
        jax.jit(lambda xs, lengths, m=m: m.apply(variables, xs, seq_lengths=lengths, **kwargs)) for m in (mine, flaxen)
    )
    close(got(xs, lengths), want(xs, lengths), 1e-6)
    broken = xs.at[(-1, 0) if options == "all" else (0, -1)].set(jnp.nan)
    close(got(broken, lengths)[0], got(xs, lengths)[0], 0.0)


@pytest.mark.parametrize("name", CELLS)
def test_our_cell_in_flax_rnn(name: str) -> None:
    mine, flaxen = (theirs.RNN(getattr(nn, name)(H, param_dtype=f64), return_carry=True) for nn in (ours, theirs))
    xs = normal(1, (3, T, D))
    variables = flaxen.init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    args = some_variables(flaxen, xs), xs, start(name, (3,))
    close(with_gradients(mine, *args, seq_lengths=LENGTHS), with_gradients(flaxen, *args, seq_lengths=LENGTHS))


def test_transformations_of_the_layer() -> None:
    xs = normal(1, (3, B, T, D))
    mine, flaxen = (nn.RNN(nn.LSTMCell(H, param_dtype=f64)) for nn in (ours, theirs))
    variables = some_variables(flaxen, xs[0])

    def loss(layer: Any) -> Callable:
        return lambda v, x: projected(layer.apply(v, x))

    for transform in (
        lambda f: jax.vmap(jax.grad(f), (None, 0)),
        lambda f: jax.grad(lambda v, x: jax.vmap(jax.checkpoint(f), (None, 0))(v, x).sum()),
    ):
        close(jax.jit(transform(loss(mine)))(variables, xs), jax.jit(transform(loss(flaxen)))(variables, xs))
    tangents = jax.tree.map(lambda a: normal(5, a.shape), (variables, xs[0]))
    close(*(jax.jit(lambda p, t, m=m: jax.jvp(m.apply, p, t))((variables, xs[0]), tangents) for m in (mine, flaxen)))


# --------------------------------------------------------------------------- what Flax does not have


def test_lengths_of_zero_give_the_initial_carry(unrolled: list) -> None:
    for cell in (ours.GRUCell(H, param_dtype=f64), theirs.GRUCell(H, param_dtype=f64)):
        layer, carry = ours.RNN(cell, return_carry=True), start("GRUCell", (3,))
        xs = normal(1, (3, T, D))
        variables = layer.init(jax.random.key(0), xs)
        last, ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=jnp.array([0, 2, 0]))
        close(last, carry.at[1].set(ys[1, 1]))
    assert len(unrolled) == 2


@pytest.mark.parametrize("cell", [ours.LSTMCell, theirs.LSTMCell], ids=["ours", "Flax's"])
def test_square_batch_axes_with_lengths(cell: type) -> None:
    xs, lengths = normal(1, (3, 3, T, D)), jnp.array([[0, 1, 2], [3, 4, 5], [5, 2, 0]])
    layer, carry = ours.RNN(cell(H, param_dtype=f64), return_carry=True, reverse=True), start("LSTMCell", (3, 3))
    flat = ours.RNN(ours.LSTMCell(H, param_dtype=f64), return_carry=True, reverse=True)
    variables = layer.init(jax.random.key(0), xs)
    (c, h), ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=lengths)
    one = jax.tree.map(lambda a: a.reshape(9, H), carry)
    (c9, h9), ys9 = flat.apply(variables, xs.reshape(9, T, D), initial_carry=one, seq_lengths=lengths.reshape(9))
    close(((c, h), ys), ((c9.reshape(c.shape), h9.reshape(h.shape)), ys9.reshape(ys.shape)))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("cell", [ours.LSTMCell, theirs.LSTMCell], ids=["ours", "Flax's"])
def test_padding_that_is_not_finite_reaches_nothing(cell: type, bad: float) -> None:
    lengths, inside = jnp.array([0, 2, T]), (jnp.arange(T) < jnp.array([0, 2, T])[:, None])[..., None]
    layer, carry = ours.RNN(cell(H, param_dtype=f64), reverse=True), start("LSTMCell", (3,))
    clean = jnp.where(inside, normal(1, (3, T, D)), 0.0)
    variables = layer.init(jax.random.key(0), clean)

    def run(xs: jax.Array) -> Any:
        def loss(variables: Any, xs: jax.Array, carry: Any) -> Any:
            last, ys = layer.apply(variables, xs, initial_carry=carry, seq_lengths=lengths, return_carry=True)
            out = last, jnp.where(inside, ys, 0.0)
            return projected(out), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(variables, xs, carry)

    got = run(jnp.where(inside, clean, bad))
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(got))
    close(got, run(clean), 0.0)


def test_no_steps_at_all() -> None:
    for cell in (ours.LSTMCell(H), theirs.LSTMCell(H)):
        layer, carry = ours.RNN(cell, return_carry=True), start("LSTMCell", dtype=f32)
        variables = layer.init(jax.random.key(0), jnp.ones((B, T, D), f32))
        for lengths in (None, jnp.zeros(B, int)):
            last, ys = layer.apply(variables, jnp.ones((B, 0, D), f32), initial_carry=carry, seq_lengths=lengths)
            same_bits(last, carry)
            assert ys.shape == (B, 0, H)
    layer = ours.RNN(ours.LSTMCell(H))
    same_bits(
        layer.init(jax.random.key(0), jnp.ones((B, 0, D), f32)), layer.init(jax.random.key(0), jnp.ones((B, T, D), f32))
    )


@pytest.mark.parametrize("cell", [ours.LSTMCell, theirs.LSTMCell], ids=["ours", "Flax's"])
@pytest.mark.parametrize("time_major", [False, True])
def test_resets_start_again_from_the_initial_carry(cell: type, time_major: bool) -> None:
    xs, carry = normal(1, (B, T, D)), start("LSTMCell")
    layer = ours.RNN(cell(H, param_dtype=f64), return_carry=True)
    variables = layer.init(jax.random.key(0), xs)
    resets = jnp.zeros((B, T), bool).at[:, 2].set(True)

    def turned(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a, 0, 1) if time_major else a

    last, ys = layer.apply(variables, turned(xs), initial_carry=carry, resets=turned(resets), time_major=time_major)
    _, first = layer.apply(variables, xs[:, :2], initial_carry=carry)
    again, second = layer.apply(variables, xs[:, 2:], initial_carry=carry)
    close((last, turned(ys)), (again, jnp.concatenate([first, second], 1)))


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_states_are_the_last_element(cell: str, options: str) -> None:
    kwargs, carry = OPTIONS[options], start(cell, (3,))
    xs = normal(1, (T, 3, D) if kwargs.get("time_major") else (3, T, D))
    fast, slow = (ours.RNN(getattr(nn, cell)(H, param_dtype=f64)) for nn in (ours, theirs))
    variables = fast.init(jax.random.key(0), xs, time_major=kwargs.get("time_major"))
    kwargs = kwargs | dict(initial_carry=carry, return_states=True)
    ys, states = fast.apply(variables, xs, **kwargs)
    other_ys, others = slow.apply(variables, xs, **kwargs)
    close((ys, states.carries), (other_ys, others.carries))
    assert others.gates is None
    assert jax.tree.structure(states.carries) == jax.tree.structure(carry)
    assert {a.shape for a in states.gates} == {ys.shape}
    same_bits(states.carries[1] if cell == "LSTMCell" else states.carries, ys)
    last, ys_too, _ = fast.apply(variables, xs, return_carry=True, **kwargs)
    same_bits(ys_too, ys)
    assert jax.tree.structure(last) == jax.tree.structure(carry)


@pytest.mark.parametrize(
    "fields",
    [
        dict(differentiation="reverse"),
        dict(differentiation="reverse", checkpoint_every=2, recompute="chunk"),
        dict(recompute="gates"),
        dict(backend="autodiff"),
    ],
    ids=str,
)
def test_fields_of_unroll_reach_it_and_change_no_number(fields: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    xs, carry = normal(1, (B, T, D)), start("LSTMCell")
    plain = ours.RNN(ours.LSTMCell(H, param_dtype=f64))
    variables = some_variables(plain, xs)
    seen: dict[str, Any] = {}
    original = rnncore.sequence.unroll
    monkeypatch.setattr(rnncore.sequence, "unroll", lambda *a, **k: (seen.update(k), original(*a, **k))[1])
    close(with_gradients(plain.copy(**fields), variables, xs, carry), with_gradients(plain, variables, xs, carry))
    plain.copy(**fields).apply(variables, xs)
    assert fields.items() <= seen.items()


@pytest.mark.parametrize("fields", [dict(checkpoint_every=2), dict(recompute="gates"), dict(backend="scan")], ids=str)
def test_fields_of_unroll_are_refused_under_nn_scan(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    with pytest.raises(NotImplementedError, match=f"{name} means nothing, because LSTMCell is not exactly"):
        ours.RNN(theirs.LSTMCell(H), **fields).init(jax.random.key(0), jnp.ones((B, T, D)))
    with pytest.raises(NotImplementedError, match=r"`softmax`|not elementwise"):
        ours.RNN(ours.GRUCell(H, gate_fn=jax.nn.softmax), **fields).init(jax.random.key(0), jnp.ones((B, T, D)))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("cell", [ours.GRUCell, theirs.GRUCell], ids=["ours", "Flax's"])
@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(seq_lengths=jnp.array([1])), r"seq_lengths=<int64 \(1,\)>.*expected the batch shape \(2,\)"),
        (dict(seq_lengths=jnp.array([1, T + 1])), "values from 1 to 6; expected 0 to T = 5"),
        (dict(seq_lengths=jnp.array([-1, T])), "values from -1 to 5"),
        (dict(seq_lengths=jnp.array([1.0, 2.0])), "expected integers"),
        (dict(resets=jnp.zeros((T, B), bool)), r"resets=<bool \(5, 2\)>.*expected bool \(2, 5\)"),
        (dict(resets=jnp.zeros((B, T))), r"resets=<float64 \(2, 5\)>.*expected bool"),
    ],
    ids=str,
)
def test_bad_calls(cell: type, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.RNN(cell(H), return_carry=True).init(jax.random.key(0), jnp.ones((B, T, D)), **kwargs)


def test_bad_inputs_and_carries() -> None:
    layer, key = ours.RNN(ours.LSTMCell(H)), jax.random.key(0)
    with pytest.raises(ValueError, match="expected one array"):
        layer.init(key, (jnp.ones((B, T, D)), jnp.ones((B, T))))
    with pytest.raises(ValueError, match="expected at least 2 axes"):
        layer.init(key, jnp.ones(D))
    variables = layer.init(key, jnp.ones((B, T, D)))
    with pytest.raises(ValueError, match=r"expected the tuple \(c, h\)"):
        layer.apply(variables, jnp.ones((B, T, D)), initial_carry=jnp.zeros((B, H)))
    with pytest.raises(ValueError, match="expected floating point"):
        layer.apply(variables, jnp.ones((B, T, D)), initial_carry=(jnp.zeros((B, H + 1)), jnp.zeros((B, H + 1))))
    with pytest.raises(ValueError, match="D = 7 features, the parameters expect D = 3"):
        layer.apply(variables, jnp.ones((B, T, 7)))


# ------------------------------------------------------------------------------------ Bidirectional


def bidirectional_of(nn: Any, cell: str, **fields: Any) -> Any:
    return nn.Bidirectional(*(nn.RNN(getattr(nn, cell)(H, param_dtype=f64)) for _ in range(2)), **fields)


@pytest.mark.parametrize(
    "cell,options",
    [
        ("LSTMCell", {}),
        ("GRUCell", dict(time_major=True)),
        ("GRUCell", dict(seq_lengths=LENGTHS)),
        ("LSTMCell", dict(seq_lengths=LENGTHS, time_major=True)),
    ],
    ids=str,
)
def test_bidirectional(cell: str, options: dict[str, Any], unrolled: list) -> None:
    mine, flaxen = (bidirectional_of(nn, cell, return_carry=True) for nn in (ours, theirs))
    xs = normal(1, (T, 3, D) if options.get("time_major") else (3, T, D))
    carry = start(cell, (3,)), jax.tree.map(jnp.sin, start(cell, (3,)))
    variables = some_variables(flaxen, xs)
    close(*(with_gradients(layer, variables, xs, carry, **options) for layer in (mine, flaxen)))
    assert len(unrolled) == 2


def test_bidirectional_with_children_of_either_library_and_another_merge() -> None:
    xs = normal(1, (B, T, D), f32)

    def layer(nn: Any, forward: Any, backward: Any) -> Any:
        init = theirs.initializers.normal(1.0)
        children = forward.RNN(forward.GRUCell(H, carry_init=init)), backward.RNN(backward.GRUCell(H, carry_init=init))
        return nn.Bidirectional(*children, merge_fn=jnp.multiply)

    flaxen = layer(theirs, theirs, theirs)
    variables = flaxen.init(jax.random.key(0), xs)
    want = flaxen.apply(variables, xs, init_key=jax.random.key(6))
    for libraries in ((ours, ours, theirs), (ours, theirs, ours), (theirs, ours, ours)):
        close(layer(*libraries).apply(variables, xs, init_key=jax.random.key(6)), want, 1e-6)


def test_bidirectional_does_not_override_its_children_in_silence() -> None:
    xs = normal(1, (T, B, D), f32)
    turned, plain = (lambda: ours.RNN(ours.GRUCell(H), time_major=True)), (lambda: ours.RNN(ours.GRUCell(H)))
    for children in ((turned(), turned()), (plain(), turned())):
        with pytest.raises(ValueError, match="give Bidirectional time_major=True as well"):
            ours.Bidirectional(*children).init(jax.random.key(0), xs)
    variables = ours.Bidirectional(plain(), plain(), time_major=True).init(jax.random.key(0), xs)
    want = ours.Bidirectional(plain(), plain()).apply(variables, jnp.swapaxes(xs, 0, 1))
    for layer in (ours.Bidirectional(turned(), turned(), time_major=True), ours.Bidirectional(plain(), plain())):
        close(jnp.swapaxes(layer.apply(variables, xs, time_major=True), 0, 1), want, 1e-6)
    with pytest.raises(NotImplementedError, match="both directions are read already"):
        ours.Bidirectional(plain(), plain()).apply(variables, xs, reverse=True)
    kept = ours.Bidirectional(plain(), plain()).apply(variables, xs, time_major=True, reverse=False, keep_order=True)
    close(jnp.swapaxes(kept, 0, 1), want, 1e-6)


def test_bidirectional_warns_of_one_object_in_both_places() -> None:
    rnn, xs = ours.RNN(ours.GRUCell(H)), jnp.ones((B, T, D), f32)
    with pytest.warns(UserWarning, match="both are the same object"):
        variables = ours.Bidirectional(rnn, rnn).init(jax.random.key(0), xs)
    assert [*variables["params"]] == ["forward_rnn"]
