"""What a user is told: what was called with what, what is expected and what to do; no insides of JAX or Python."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as flax_linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, linen, nnx

KEY, XS = jax.random.key(0), jnp.ones((2, 7, 4), jnp.float32)
CELL = rnncore.LSTM(5)
PARAMS = CELL.init(KEY, 4)
STACK = rnncore.Stack(CELL)


class Tensor:
    """Looks like an array, as a tensor of PyTorch does."""

    dtype, shape, ndim = "torch.float32", (2, 7, 4), 3


def rngs() -> flax_nnx.Rngs:
    return flax_nnx.Rngs(0)


def nnx_cell() -> Any:
    return nnx.LSTMCell(4, 5, rngs=rngs())


def init(layer: Any) -> Any:
    return layer.init(KEY, XS)


WRONG_VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "class in linen.RNN": (
        lambda: linen.RNN(linen.LSTMCell),
        "`RNN(cell=<LSTMCell>)`: expected a cell, such as LSTMCell(256), an instance and not the class.",
    ),
    "class in nnx.RNN": (
        lambda: nnx.RNN(nnx.LSTMCell),
        "`RNN(cell=<LSTMCell>)`: expected a cell, such as LSTMCell(3, 256, rngs=rngs), an instance and not the class.",
    ),
    "string in linen.RNN": (lambda: linen.RNN("lstm"), "`RNN(cell=<str>)`: expected a cell"),
    "functional cell in nnx.RNN": (lambda: nnx.RNN(CELL), "`rnncore.unroll` takes this one"),
    "rngs, layers": (
        lambda: nnx.LSTM(4, 5, rngs=0),
        "`LSTM(rngs=0)`: expected streams of random numbers, such as rngs=nnx.Rngs(0)",
    ),
    "rngs, cell": (lambda: nnx.GRUCell(4, 5, rngs=0), "`GRUCell(rngs=0)`: expected streams"),
    "rngs, RNN": (lambda: nnx.RNN(nnx_cell(), rngs=0), "`RNN(rngs=<int>)`: expected nnx.Rngs"),
    "output_dtype, linen": (
        lambda: init(linen.RNN(linen.LSTMCell(5), output_dtype="fp16")),
        "`RNN(output_dtype='fp16')`: expected a floating dtype, such as jnp.bfloat16 or 'float16'",
    ),
    "output_dtype, nnx": (
        lambda: nnx.RNN(nnx_cell(), output_dtype="fp16"),
        "`RNN(output_dtype='fp16')`: expected a floating dtype",
    ),
    "output_dtype, layers": (lambda: init(linen.LSTM(5, output_dtype="fp16")), "`LSTM(output_dtype='fp16')`"),
    "dtype, nnx layers": (lambda: nnx.LSTM(4, 5, dtype=jnp.int32, rngs=rngs()), "`LSTM(dtype=<class"),
    "output_dtype, stack": (
        lambda: rnncore.unroll_stack(STACK, STACK.init(KEY, 4), XS, output_dtype="fp16"),
        "`unroll_stack(output_dtype='fp16')`",
    ),
    "dtype of init": (lambda: CELL.init(KEY, 4, "fp16"), "`LSTM(...).init(dtype='fp16')`"),
    "recurrence": (
        lambda: rnncore.LSTM(8, recurrence=4),
        "`LSTM(recurrence=4)`: expected the structure of a recurrent kernel, such as rnncore.Dense(), Heads(4)",
    ),
    "inputs for their size": (
        lambda: CELL.init(KEY, XS),
        "`LSTM(...).init(input_size=<float32 (2, 7, 4)>)`: expected an int",
    ),
    "a seed for a key": (
        lambda: CELL.init(0, 4),
        "`LSTM(...).init(key=0)`: expected a random key, such as jax.random.key(0)",
    ),
    "a seed for a key, stack": (lambda: STACK.init(0, 4), "`Stack(...).init(key=0)`: expected a random key"),
    "hidden_size": (lambda: rnncore.LSTM(8.0), "`LSTM(hidden_size=8.0)`: expected an int"),
    "hidden_size, linen": (lambda: linen.GRUCell(8.0), "`GRUCell(features=8.0)`: expected an int"),
    "hidden_size, nnx": (lambda: nnx.GRUCell(4, 8.0, rngs=rngs()), "`GRUCell(hidden_features=8.0)`: expected an int"),
    "no units": (
        lambda: rnncore.ResetBeforeGRU(-1).init(KEY, 4),
        "`ResetBeforeGRU(hidden_size=-1).init(key, input_size=4)`: expected at least one",
    ),
    "cells in linen.Bidirectional": (
        lambda: init(linen.Bidirectional(linen.LSTMCell(5), linen.LSTMCell(5))),
        "`Bidirectional(forward_rnn=<LSTMCell>)`: expected an RNN module",
    ),
    "cells in nnx.Bidirectional": (
        lambda: nnx.Bidirectional(nnx.RNN(nnx_cell()), nnx_cell(), rngs=rngs()),
        "`Bidirectional(backward_rnn=<LSTMCell>)`: expected an RNN module, such as RNN(cell)",
    ),
    "a switch under jit": (
        lambda: jax.jit(lambda flag: rnncore.unroll(CELL, PARAMS, XS, reverse=flag))(True),
        "`unroll(reverse=<traced bool>)`: expected True or False, known when the call is traced",
    ),
    "a switch of a module under jit": (
        lambda: jax.jit(lambda flag: nnx.RNN(nnx_cell())(XS, time_major=flag))(True),
        "`RNN(...)(inputs, time_major=<traced bool>)`: expected True or False",
    ),
    "a cell of nnx in linen": (
        lambda: linen.RNN(nnx_cell()),
        "`RNN(cell=<LSTMCell>)`: a cell of nnx, expected one of linen, such as linen.LSTMCell(256).",
    ),
    "a cell of linen in nnx": (
        lambda: nnx.RNN(linen.LSTMCell(5)),
        "`RNN(cell=<LSTMCell>)`: a cell of linen, expected one of nnx, such as nnx.LSTMCell(3, 256, rngs=rngs).",
    ),
    "string for a cell": (
        lambda: rnncore.unroll("lstm", PARAMS, XS),
        "`unroll(cell=<str>)`: expected an rnncore cell, such as rnncore.LSTM(256).",
    ),
    "class for a cell": (
        lambda: rnncore.unroll(rnncore.LSTM, PARAMS, XS),
        "`unroll(cell=<LSTM>)`: expected an rnncore cell, such as rnncore.LSTM(256), an instance and not the class.",
    ),
    "string in Stack": (lambda: rnncore.Stack("lstm"), "`Stack(cell='lstm')`: expected an rnncore cell"),
    "cell for a stack": (
        lambda: rnncore.unroll_stack(CELL, PARAMS, XS),
        "`unroll_stack(stack=<LSTM>)`: expected an rnncore.Stack; `unroll` takes a cell.",
    ),
    "Flax's cell": (
        lambda: rnncore.explain_backend(flax_linen.LSTMCell(5), PARAMS, XS),
        "a Flax module; expected an rnncore cell. rnncore.linen.functional",
    ),
    "Flax's RNN": (
        lambda: rnncore.unroll(linen.RNN(linen.LSTMCell(5)), PARAMS, XS),
        "`unroll(cell=<RNN>)`: a Flax module",
    ),
    "a trajectory for its Jacobians": (
        lambda: analysis.jacobian_product(analysis.trajectory(CELL, PARAMS, XS)),
        "`jacobian_product(<Trajectory>)`: expected Jacobians (*batch, T, n, n), as `step_jacobians(traj)` returns "
        "them.",
    ),
    "nnx cell": (lambda: rnncore.unroll(nnx_cell(), PARAMS, XS), "rnncore.nnx.functional(cell)"),
    "nnx layer for a cell": (
        lambda: rnncore.unroll(nnx.RNN(nnx_cell()), XS),
        "`unroll(cell=<RNN>)`: a Flax module; expected an rnncore cell.",
    ),
    "key for rngs": (
        lambda: nnx.LSTMCell(4, 5, rngs=KEY),
        "`LSTMCell(rngs=<key<fry> ()>)`: expected streams of random numbers, such as rngs=nnx.Rngs(0).",
    ),
    "tensor of another library": (
        lambda: nnx.RNN(nnx_cell())(Tensor()),
        "Tensor>)`: expected an array of JAX or NumPy; convert it by numpy.asarray.",
    ),
    "tensor of another library, unroll": (lambda: rnncore.unroll(CELL, PARAMS, Tensor()), "`unroll(xs=<"),
    "tensor of another library, layers": (lambda: nnx.LSTM(4, 5, rngs=rngs())(Tensor()), "`unroll_stack(xs=<"),
    "inputs of a single step": (
        lambda: nnx.LSTM(4, 5, rngs=rngs())(XS[0, 0]),
        "`unroll_stack(xs=<float32 (4,)>)`: expected (*batch, T, D), at least two axes.",
    ),
    "carry of an LSTM for a GRU, linen": (
        lambda: linen.RNN(linen.GRUCell(5)).init(KEY, XS, initial_carry=(XS[:, 0], XS[:, 0])),
        "`cell(carry=<tuple of 2>, ...)`: expected one array, h, as `cell.initialize_carry` makes it.",
    ),
    "carry of a GRU for an LSTM, nnx": (
        lambda: nnx.RNN(nnx_cell())(XS, initial_carry=jnp.zeros((2, 5))),
        "`cell(carry=<ArrayImpl>, ...)`: expected the tuple (c, h)",
    ),
    "resets as numbers": (
        lambda: nnx.LSTM(4, 5, rngs=rngs())(XS, resets=jnp.zeros((2, 7), jnp.float32)),
        "`unroll(resets=<float32 (2, 7)>)`: expected bool (2, 7), the axes of xs but for features.",
    ),
    "resets of the wrong shape": (
        lambda: nnx.RNN(nnx_cell())(XS, resets=jnp.zeros((7, 2), bool)),
        "`unroll(resets=<bool (7, 2)>)`: expected bool (2, 7)",
    ),
    "lengths beyond T": (
        lambda: nnx.RNN(nnx_cell())(XS, seq_lengths=jnp.array([9, 3])),
        "values from 3 to 9; expected 0 to T = 7.",
    ),
    "dtype of a cell, nnx": (lambda: nnx.LSTMCell(4, 5, dtype="fp16", rngs=rngs()), "`LSTMCell(dtype='fp16')`"),
    "dtype of a cell, linen": (lambda: linen.GRUCell(5, param_dtype="fp16"), "`GRUCell(param_dtype='fp16')`"),
    "name of a function": (
        lambda: rnncore.Elman(5, activation_fn="tanh"),
        "`Elman(activation_fn='tanh')`: expected a function, such as jnp.tanh.",
    ),
    "name of an initialiser": (
        lambda: nnx.LSTMCell(4, 5, recurrent_kernel_init="orthogonal", rngs=rngs()),
        "expected a function, such as jax.nn.initializers.orthogonal().",
    ),
    "name of a merge": (
        lambda: init(linen.Bidirectional(linen.RNN(linen.GRUCell(5)), linen.RNN(linen.GRUCell(5)), merge_fn="sum")),
        "`Bidirectional(merge_fn='sum')`: expected a function of the outputs of both directions.",
    ),
    "size of a batch for its shape": (
        lambda: CELL.initial_carry(2),
        "`LSTM(...).initial_carry(batch_shape=2)`: expected the batch axes, such as (8,) or ().",
    ),
    "cell in from_torch": (
        lambda: rnncore.from_torch(CELL, {}),
        "`from_torch(stack=<LSTM>)`: expected an rnncore.Stack",
    ),
    "cell in from_keras": (
        lambda: rnncore.from_keras(CELL, []),
        "`from_keras(stack=<LSTM>)`: expected an rnncore.Stack",
    ),
    "module in from_torch": (
        lambda: rnncore.from_torch(STACK, Tensor()),
        "`from_torch(stack, state=<Tensor>)`: expected a state dictionary, such as `module.state_dict()`.",
    ),
    "steps of segments": (
        lambda: rnncore.training.segments(XS, 3.5),
        "`segments(tree, steps=3.5)`: expected an int, the steps of a segment.",
    ),
    "optimiser as a function": (
        lambda: rnncore.training.truncated_bptt(lambda *_: 0.0, optax.adam),
        "`truncated_bptt(loss_fn, optimizer=<adam>)`: expected an optimiser of optax, such as optax.adam(1e-3).",
    ),
}

WRONG_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "batch_first": (
        lambda: rnncore.unroll(CELL, PARAMS, XS, batch_first=True),
        "`unroll(batch_first=True)`: inputs are (batch, T, D)",
    ),
    "batch_first, explain": (
        lambda: rnncore.explain_backend(CELL, PARAMS, XS, batch_first=True),
        "`explain_backend(batch_first=True)`: inputs are",
    ),
    "batch_first, stack": (
        lambda: rnncore.unroll_stack(STACK, PARAMS, XS, batch_first=True),
        "`unroll_stack(batch_first=True)`: inputs are",
    ),
    "batch_first, linen": (
        lambda: linen.LSTM(5, batch_first=True),
        "`LSTM(batch_first=True)`: inputs are (batch, T, D), or (T, batch, D) with time_major=True",
    ),
    "batch_first, nnx": (lambda: nnx.RNN(nnx_cell(), batch_first=True), "`RNN(batch_first=True)`: inputs are"),
    "lengths": (
        lambda: rnncore.unroll(CELL, PARAMS, XS, lengths=None),
        "`unroll(lengths=None)`: it is called seq_lengths here.",
    ),
    "hidden_size, linen": (lambda: linen.LSTM(hidden_size=5), "`LSTM(hidden_size=5)`: it is called features here."),
    "hidden_size, linen cell": (
        lambda: linen.GRUCell(hidden_size=5),
        "`GRUCell(hidden_size=5)`: it is called features here.",
    ),
    "hidden_size, nnx": (
        lambda: nnx.LSTM(4, hidden_size=5, rngs=rngs()),
        "`LSTM(hidden_size=5)`: it is called hidden_features here.",
    ),
    "input_size, nnx cell": (
        lambda: nnx.LSTMCell(input_size=4, hidden_features=5, rngs=rngs()),
        "`LSTMCell(input_size=4)`: it is called in_features here.",
    ),
    "input_size": (
        lambda: rnncore.LSTM(hidden_size=5, input_size=4),
        "`LSTM(input_size=4)`: the number of features is that of the inputs",
    ),
    "units": (lambda: rnncore.GRU(units=5), "`GRU(units=5)`: it is called hidden_size here."),
    "features": (lambda: rnncore.GRU(features=5), "`GRU(features=5)`: it is called hidden_size here."),
    "num_layers": (
        lambda: rnncore.LSTM(5, num_layers=2),
        "`LSTM(num_layers=2)`: it is one layer; rnncore.Stack(cell, num_layers=...)",
    ),
    "bidirectional": (lambda: rnncore.LSTM(5, bidirectional=True), "rnncore.Stack(cell, bidirectional=True)"),
    "return_sequences": (
        lambda: linen.RNN(linen.LSTMCell(5), return_sequences=True),
        "`RNN(return_sequences=True)`: the outputs of every step are returned; leave it out",
    ),
    "return_state": (
        lambda: nnx.LSTM(4, 5, return_state=True, rngs=rngs()),
        "`LSTM(return_state=True)`: it is called return_carry here.",
    ),
    "nonlinearity": (lambda: rnncore.Elman(5, nonlinearity="relu"), "it is called activation_fn here"),
    "parameters forgotten": (
        lambda: rnncore.unroll(CELL, XS),
        "`unroll(cell, <float32 (2, 7, 4)>)`: expected unroll(cell, params, xs); make the "
        "parameters by `cell.init(key, D)`.",
    ),
    "parameters forgotten, explain": (
        lambda: rnncore.explain_backend(CELL, XS),
        "`explain_backend(cell, <float32 (2, 7, 4)>)`: expected",
    ),
    "parameters forgotten, stack": (
        lambda: rnncore.unroll_stack(STACK, XS),
        "make the parameters by `stack.init(key, D)`",
    ),
    "parameters after inputs": (
        lambda: rnncore.unroll(CELL, XS, PARAMS),
        "`unroll(cell, <float32 (2, 7, 4)>, <CellParams>)`: expected the parameters before the inputs.",
    ),
    "rngs left out": (
        lambda: nnx.LSTMCell(4, 5),
        "`LSTMCell(...)` without `rngs=`: expected streams of random numbers, such as rngs=nnx.Rngs(0).",
    ),
    "rngs by place": (lambda: nnx.LSTM(4, 5, rngs()), "`LSTM(...)` without `rngs=`"),
    "PyTorch's sizes": (
        lambda: rnncore.LSTM(4, 5),
        "`LSTM(4, 5)`: expected LSTM(hidden_size); the number of features is that of the inputs",
    ),
    "PyTorch's sizes, linen": (lambda: linen.LSTM(4, 5), "`LSTM(4, 5)`: expected LSTM(features);"),
    "PyTorch's state": (
        lambda: nnx.RNN(nnx_cell())(XS, (XS, XS)),
        "`RNN(...)(<ArrayImpl>, <tuple>)`: expected the inputs alone; all else has a name, such as initial_carry=.",
    ),
    "PyTorch's state by name": (
        lambda: nnx.LSTM(4, 5, rngs=rngs())(XS, hx=None),
        "`LSTM(...)(inputs, hx=None)`: it is called initial_carry here.",
    ),
    "Keras's mask": (
        lambda: nnx.RNN(nnx_cell())(XS, mask=jnp.ones((2, 7), bool)),
        "`RNN(...)(inputs, mask=<bool (2, 7)>)`: it is called seq_lengths here.",
    ),
    "Keras's state": (
        lambda: linen.LSTM(5).init(KEY, XS, initial_state=None),
        "`LSTM(...)(inputs, initial_state=None)`: it is called initial_carry here.",
    ),
    "training": (
        lambda: nnx.LSTM(4, 5, rngs=rngs())(XS, training=True),
        "`LSTM(...)(inputs, training=True)`: `deterministic`, its opposite, is an option of layers with dropout",
    ),
    "a misspelt field, linen": (
        lambda: linen.RNN(linen.LSTMCell(5), time_mayor=True),
        "`RNN(time_mayor=True)`: there is no such option; the nearest name is time_major.",
    ),
    "a misspelt field, nnx": (
        lambda: nnx.RNN(nnx_cell(), return_cary=True),
        "`RNN(return_cary=True)`: there is no such option; the nearest name is return_carry.",
    ),
    "a misspelt field": (
        lambda: rnncore.LSTM(5, forget_bais=1.0),
        "`LSTM(forget_bais=1.0)`: there is no such option; the nearest name is forget_bias.",
    ),
    "a misspelt option of a call": (
        lambda: nnx.RNN(nnx_cell())(XS, seq_length=3),
        "`RNN(...)(inputs, seq_length=3)`: there is no such option; the nearest name is seq_lengths.",
    ),
}


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values(name: str) -> None:
    call, words = WRONG_VALUES[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_words_of_other_libraries(name: str) -> None:
    call, words = WRONG_CALLS[name]
    with pytest.raises(TypeError, match=re.escape(words)):
        call()


def test_what_a_decorator_supplies_is_not_asked_for() -> None:
    class Model(flax_nnx.Module):
        def __init__(self) -> None:
            self.rnn = nnx.RNN(nnx_cell())

        def run(self, xs: Any, train: bool) -> Any:
            return self.rnn(xs)

        @functools.wraps(run)
        def __call__(self, xs: Any) -> Any:
            return self.run(xs, train=False)

    def scaled(outputs: Any, batch: Any, scale: float) -> Any:
        return scale * jnp.sum(outputs[:, -1] ** 2)

    loss = functools.wraps(scaled)(lambda outputs, batch: scaled(outputs, batch, 2.0))
    assert analysis.report(Model(), XS, loss).layers


def test_a_module_that_bridges_both_flavours_is_taken() -> None:
    class Bridge(flax_nnx.bridge.ToLinen):
        num_feature_axes = 1

        @flax_linen.nowrap
        def initialize_carry(self, rng: Any, shape: tuple[int, ...]) -> Any:
            return jnp.zeros((*shape[:-1], 5))

    rnn = linen.RNN(Bridge(flax_nnx.GRUCell, args=(4, 5)))
    assert rnn.init_with_output(KEY, XS)[0].shape == (2, 7, 5)


def test_options_that_nobody_has() -> None:
    nearest = "`unroll(chekpoint_every=2)`: there is no such option; the nearest name is checkpoint_every."
    with pytest.raises(TypeError, match=re.escape(nearest)):
        rnncore.unroll(CELL, PARAMS, XS, chekpoint_every=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=re.escape("`unroll(nonsense=1)`: there is no such option.")):
        rnncore.unroll(CELL, PARAMS, XS, nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        linen.LSTM(5, nonsense=1)


@pytest.mark.parametrize(
    ("module", "name", "near"),
    [(rnncore, "unrol", "unroll"), (linen, "OptimisedLSTMCell", "OptimizedLSTMCell"), (nnx, "LSTMcell", "LSTMCell")],
)
def test_misspelt_names(module: Any, name: str, near: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*; the nearest name is {near}$"):
        getattr(module, name)


def test_carry_taken_for_outputs() -> None:
    ys, (h, _) = rnncore.unroll(CELL, PARAMS, XS)
    with pytest.raises(AttributeError, match=r"'LSTMCarry' object has no attribute 'shape'.*carry, ys = unroll"):
        _ = ys.shape
    carry = rnncore.GRU(5).initial_carry((2,))
    with pytest.raises(AttributeError, match="carry first"):
        _ = carry.mean
    assert not hasattr(carry, "nonsense")


@pytest.mark.sample(1)
@pytest.mark.parametrize("cell", [rnncore.LSTM(16), rnncore.ResetBeforeGRU(16)])
@pytest.mark.parametrize("backend", ["scan", "autodiff"])
def test_recompute_without_checkpoint_every_saves_memory(cell: rnncore.Cell, backend: str) -> None:
    if backend == "scan" and not isinstance(cell, rnncore.PointwiseCell):
        backend = "autodiff"
    params = cell.init(KEY, 4)
    shape = jax.ShapeDtypeStruct((8, 400, 4), jnp.float32)

    def memory(recompute: str) -> int:
        def loss(p: Any, xs: Any) -> Any:
            return jnp.sum(rnncore.unroll(cell, p, xs, backend=backend, recompute=recompute)[1])

        return jax.jit(jax.grad(loss)).lower(params, shape).compile().memory_analysis().temp_size_in_bytes

    assert memory("chunk") < 0.6 * memory("nothing")
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40, 4)), jnp.float32)
    assert_close(
        rnncore.unroll(cell, params, xs, backend=backend, recompute="chunk"),
        rnncore.unroll(cell, params, xs, backend=backend),
        1e-6,
    )
