"""Bad input: each test reads the message, which names the call, what was got and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import initializers

KEY = jax.random.key(0)
XS = jnp.ones((2, 5, 3))
LSTM = rnncore.LSTM(4)


def params_of(cell: Any) -> Any:
    return cell.init(KEY, 3, jnp.float64)


def refused(message: str, cell: Any = LSTM, params: Any = None, xs: Any = XS, error: Any = ValueError, **options: Any):
    """Both `unroll` and `explain_backend` refuse the call with a message that holds `message`; returns it."""
    params = params_of(cell if isinstance(cell, rnncore.Cell) else LSTM) if params is None else params
    with pytest.raises(error) as explained:
        rnncore.explain_backend(cell, params, xs, **options)
    with pytest.raises(error) as raised:
        rnncore.unroll(cell, params, xs, **options)
    assert message in str(raised.value)
    assert str(explained.value) == str(raised.value)
    return str(raised.value)


# ------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("dtype", [int, jnp.uint8, bool, complex])
def test_inputs_that_are_not_floating_point(dtype: Any):
    xs = jnp.ones((2, 5, 3), dtype)
    message = refused(f"`unroll(xs=<{xs.dtype} (2, 5, 3)>)`: expected floating point", xs=xs)
    assert "convert it first" in message


def test_inputs_with_one_axis():
    refused("`unroll(xs=<float64 (3,)>)`: expected (*batch, T, D), at least two axes", xs=jnp.ones(3))


@pytest.mark.parametrize("cell", [LSTM, rnncore.GRU(4), rnncore.IndRNN(4), rnncore.ResetBeforeGRU(4)])
def test_inputs_with_other_features_than_the_parameters(cell: Any):
    message = refused("the inputs have D = 7 features, the parameters expect D = 3", cell, xs=jnp.ones((2, 5, 7)))
    assert message.startswith(f"`unroll({type(cell).__name__}, params, xs=<float64 (2, 5, 7)>)`")


# -------------------------------------------------------------------------------- cells and parameters


@pytest.mark.parametrize("cell", [4, "LSTM", None, lambda carry, x: carry])
def test_something_that_is_no_cell(cell: Any):
    refused(f"`unroll(cell=<{type(cell).__name__}>)`: expected an rnncore cell, such as rnncore.LSTM(256)", cell)


def test_the_class_in_place_of_a_cell():
    refused("expected an rnncore cell, such as rnncore.LSTM(256)", rnncore.LSTM)


GRU, ELMAN, RESET_BEFORE = rnncore.GRU(4), rnncore.Elman(4), rnncore.ResetBeforeGRU(4)
HEADS, DIAGONAL = rnncore.LSTM(4, recurrence=rnncore.Heads(2)), rnncore.LSTM(4, recurrence=rnncore.Diagonal())
PEEPHOLES = rnncore.LSTM(4, peepholes=True)


@pytest.mark.parametrize(
    ("cell", "params"),
    [
        pytest.param(LSTM, params_of(GRU), id="lstm-of-gru"),
        pytest.param(LSTM, params_of(ELMAN), id="lstm-of-elman"),
        pytest.param(GRU, params_of(LSTM), id="gru-of-lstm"),
        pytest.param(ELMAN, params_of(LSTM), id="elman-of-lstm"),
        pytest.param(rnncore.LSTM(8), params_of(LSTM), id="8-of-4"),
        pytest.param(rnncore.LSTM(2), params_of(LSTM), id="2-of-4"),
        pytest.param(HEADS, params_of(LSTM), id="heads-of-dense"),
        pytest.param(DIAGONAL, params_of(LSTM), id="diagonal-of-dense"),
        pytest.param(LSTM, params_of(DIAGONAL), id="dense-of-diagonal"),
        pytest.param(PEEPHOLES, params_of(LSTM), id="peepholes-of-none"),
        pytest.param(LSTM, params_of(PEEPHOLES), id="none-of-peepholes"),
        pytest.param(LSTM, params_of(RESET_BEFORE), id="lstm-of-reset_before"),
        pytest.param(RESET_BEFORE, params_of(LSTM), id="reset_before-of-lstm"),
        pytest.param(LSTM, {"params": {}}, id="lstm-of-dict"),
    ],
)
def test_parameters_of_another_cell(cell: Any, params: Any):
    message = refused("expect", cell, params)
    assert message.startswith(f"`unroll({type(cell).__name__}, params")
    # The number of features is right in all of these: the message must not blame it.
    assert "features, the parameters expect" not in message


@pytest.mark.parametrize(("hidden_size", "input_size"), [(0, 3), (-1, 3), (4, 0), (4, -2)])
def test_sizes_below_one(hidden_size: int, input_size: int):
    with pytest.raises(
        ValueError, match=rf"hidden_size={hidden_size}\).init\(key, input_size={input_size}\)`: expected"
    ):
        rnncore.GRU(hidden_size).init(KEY, input_size)


# -------------------------------------------------------------------------------------- the carry


@pytest.mark.parametrize(
    "carry",
    [
        (jnp.zeros((2, 4)), jnp.zeros((2, 4))),
        rnncore.HiddenCarry(jnp.zeros((2, 4))),
        jnp.zeros((2, 4)),
        {"c": jnp.zeros((2, 4)), "h": jnp.zeros((2, 4))},
        "zeros",
    ],
    ids=lambda carry: type(carry).__name__,
)
def test_a_carry_of_the_wrong_structure(carry: Any):
    message = refused(
        f"`unroll(initial_carry=<{type(carry).__name__}>)`: expected LSTMCarry('c', 'h')", initial_carry=carry
    )
    assert "`cell.initial_carry(batch_shape)`" in message


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (4,), (2, 1, 4)])
def test_a_carry_of_the_wrong_shape(shape: tuple[int, ...]):
    carry = rnncore.LSTMCarry(jnp.zeros((2, 4)), jnp.zeros(shape))
    refused(f"`unroll(initial_carry=<float64 {shape}>)`: expected floating point (2, 4)", initial_carry=carry)


@pytest.mark.parametrize("dtype", [int, bool])
def test_a_carry_of_the_wrong_dtype(dtype: Any):
    name = jnp.zeros((), dtype).dtype
    refused(
        f"`unroll(initial_carry=<{name} (2, 4)>)`: expected floating", initial_carry=LSTM.initial_carry((2,), dtype)
    )


# -------------------------------------------------------------------------------------- resets


@pytest.mark.parametrize(
    "resets",
    [
        jnp.zeros((2, 5), int),
        jnp.zeros((2, 5)),
        jnp.zeros((5, 2), bool),
        jnp.zeros(5, bool),
        jnp.zeros((2, 5, 1), bool),
    ],
    ids=lambda r: f"{r.dtype}{r.shape}",
)
def test_resets_that_do_not_fit(resets: Any):
    refused(f"`unroll(resets=<{resets.dtype} {resets.shape}>)`: expected bool (2, 5)", resets=resets)


# -------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "fast"},
            "`unroll(backend='fast')`: unknown; expected one of mosaic_gpu, cuda, pallas_tpu, cudnn, "
            "associative_scan, cpp, scan, autodiff, or None",
        ),
        ({"recompute": "all"}, "`unroll(recompute='all')`: expected one of 'nothing', 'gates', 'chunk'"),
        ({"recompute": None}, "`unroll(recompute=None)`: expected one of 'nothing', 'gates', 'chunk'"),
        ({"checkpoint_every": 0}, "`unroll(checkpoint_every=0)`: expected at least 1 step, or None"),
        ({"checkpoint_every": -3}, "`unroll(checkpoint_every=-3)`: expected at least 1 step, or None"),
        ({"checkpoint_every": 2.5}, "`unroll(checkpoint_every=2.5)`: expected"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str):
    refused(message, **options)


def test_the_initial_carry_has_no_place_in_this_order():
    refused(
        "the initial carry has no place of its own in that order; use keep_order=False",
        return_states=True, include_initial=True, keep_order=True, reverse=True, seq_lengths=jnp.array([1, 2]),
    )  # fmt: skip


def test_scan_cannot_run_a_cell_that_is_not_pointwise():
    message = refused(
        "`unroll(backend='scan')`: ResetBeforeGRU is not a PointwiseCell, so its derivative rules cannot be derived",
        rnncore.ResetBeforeGRU(4), error=NotImplementedError, backend="scan",
    )  # fmt: skip
    assert "backend=None" in message


# ---------------------------------------------------------------------------- cells that mix units

Update = Callable[[Any, Any, Any, Any], Any]
CAPTURED = jnp.arange(4.0)


def cell_of(update: Update, **declared: Any) -> rnncore.PointwiseCell:
    """A user's cell with this `pointwise`."""

    class Mine(rnncore.PointwiseCell):
        gates = ("a", "n")

        def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> Any:
            return update(p, z, r, carry)

    for name, value in declared.items():
        setattr(Mine, name, value)
    return Mine(4)


def new(h: Any) -> Any:
    return rnncore.HiddenCarry(h), ()


def reduction(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a - jnp.mean(z.a, -1, keepdims=True))


def norm_in_jit(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jax.jit(lambda a: a / jnp.sum(a, -1, keepdims=True))(z.a))


def indexing(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a + r.a[..., :1])


def roll(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jnp.roll(carry.h, 1, -1))


def sort(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jnp.sort(z.a, -1))


def cumulative(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jnp.cumsum(z.a, -1))


def matmul(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jax.lax.dot_general(z.a, z.n, (((1,), (1,)), ((), ()))))


def softmax(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jax.nn.softmax(z.a))


def transpose(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a.T.T)


def positions(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a * jnp.arange(4.0))


def branch(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jax.lax.cond(True, jnp.tanh, jnp.sin, z.a))


@pytest.mark.parametrize(
    ("update", "operation"),
    [
        (reduction, "reduce_sum"),
        (norm_in_jit, "reduce_sum"),
        (indexing, "slice"),
        (roll, "slice"),
        (sort, "sort"),
        (cumulative, "cumsum"),
        (softmax, "reduce_max"),
        (transpose, "transpose"),
        (positions, "iota"),
        (branch, "cond"),
    ],
)
@pytest.mark.parametrize("backend", [None, "scan", "autodiff"])
def test_a_cell_that_is_not_elementwise(update: Update, operation: str, backend: str | None):
    message = refused(
        f"`Mine.pointwise` is not elementwise: it applies `{operation}`", cell_of(update), backend=backend
    )
    assert "subclass `rnncore.Cell`, which runs through plain autodiff" in message
    # The line, wherever the operation stands in JAX's own code: this file, and the function's own line below its `def`.
    line = update.__code__.co_firstlineno + 1
    assert f"test_errors.py:{line}" in message


def test_a_product_over_units_is_refused():
    # Its result has another shape, which is seen before the operations are.
    refused("`Mine.pointwise`: returned an array of shape (3, 3) for inputs of shape (3, 4)", cell_of(matmul))


def test_a_product_with_a_captured_kernel_is_refused():
    kernel = jnp.ones((4, 4))
    cell = cell_of(lambda p, z, r, carry: new(z.a @ kernel))
    refused("`Mine.pointwise` is not elementwise: it uses a captured array of shape (4, 4)", cell)


@pytest.mark.parametrize(
    "captured", [CAPTURED, np.arange(4.0), jnp.ones((3, 4)), jnp.ones(1)], ids=["jax", "numpy", "whole", "one"]
)
def test_a_captured_array_is_refused(captured: Any):
    message = refused(
        f"`Mine.pointwise` is not elementwise: it uses a captured array of shape {captured.shape}",
        cell_of(lambda p, z, r, carry: new(z.a * captured)),
    )
    assert "declare it in `units`" in message


@pytest.mark.parametrize("number", [2.0, np.float64(2.0), jnp.float64(2.0)], ids=["float", "numpy", "jax"])
def test_a_captured_number_is_not(number: Any):
    cell = cell_of(lambda p, z, r, carry: new(jnp.tanh(z.a * number + r.n)))
    assert rnncore.unroll(cell, params_of(cell), XS)[1].shape == (2, 5, 4)


def wide(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(jnp.float64(0))


def gate_without_units(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return rnncore.HiddenCarry(z.a), {"gate": jnp.zeros(())}


def plain_tuple(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return (z.a,), ()


def two_states(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return rnncore.LSTMCarry(z.a, z.n), ()


def carry_only(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return rnncore.HiddenCarry(z.a)


def nothing(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return None


def python_if(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a if z.a > 0 else z.n)


def unknown_gate(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.forget)


def unknown_unit(p: Any, z: Any, r: Any, carry: Any) -> Any:
    return new(z.a * p.gain)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (wide, "`Mine.pointwise`: returned an array of shape () for inputs of shape (3, 4)"),
        (gate_without_units, "`Mine.pointwise`: returned an array of shape () for inputs of shape (3, 4)"),
        (plain_tuple, "expected the structure of HiddenCarry"),
        (two_states, "`Mine.pointwise`: returned a carry LSTMCarry("),
        (carry_only, "It must return (new carry, gates)"),
        (nothing, "It must return (new carry, gates)"),
        (python_if, "`Mine.pointwise` could not be traced on arrays of shape (3, 4)"),
        (unknown_gate, "'forget'"),
        (unknown_unit, "'gain'"),
    ],
)
def test_a_cell_that_returns_something_else(update: Update, message: str):
    assert "`Mine.pointwise`" in refused(message, cell_of(update))


def test_a_cell_without_gates():
    class NoGates(rnncore.PointwiseCell):
        def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> Any:
            return carry, ()

    with pytest.raises(TypeError, match="NoGates.*gates"):
        NoGates(4)  # type: ignore[abstract]


class NoH(NamedTuple):
    """A carry without h."""

    state: Any


def test_a_carry_without_h():
    message = refused("NoH", cell_of(lambda p, z, r, carry: (carry, ()), Carry=NoH))
    assert "`Mine" in message and "`h`" in message


def test_a_recurrent_bias_of_a_gate_that_is_not_there():
    cell = cell_of(lambda p, z, r, carry: new(z.a + r.n), recurrent_bias=("q",))
    assert "`Mine" in refused("'q'", cell)


# -------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("name", ["forget_bias", "chrono", "uniform_gate"])
def test_an_initializer_of_another_cell(name: str):
    make = {"forget_bias": initializers.forget_bias, "chrono": lambda: initializers.chrono(10)}.get(
        name, initializers.uniform_gate
    )
    with pytest.raises(
        ValueError, match=rf"`{name}\(gates=\('i', 'f', 'g', 'o'\)\)\(key, shape=\(3, 4\)\)`: expected \(4, H\)"
    ):
        rnncore.GRU(4, bias_init=make()).init(KEY, 3)
