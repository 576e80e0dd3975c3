"""Backend "cudnn": its packing, its refusals, and the whole path with JAX's reference in the place of the library."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, cotangents
from jax.experimental import rnn

import rnncore
from rnncore import LSTM, Heads, LSTMCarry, Stack, _compat
from rnncore.layers import compose
from rnncore.recurrence.run import Request
from rnncore.sequence import call as sequence
from rnncore.sequence.backends import BACKENDS

CUDNN = BACKENDS["cudnn"]
B, T, D, H = 4, 6, 3, 5
LENGTHS = np.array([0, T, 1, 4])
CELL = LSTM(H)
# float32 with sums of at most T * B terms of about 1, once forward and once back.
FLOAT32 = 5e-6


@jax.custom_vjp
def unsure(x: Any, inside: Any) -> Any:
    """x, whose gradient is NaN in the padding."""
    return x


unsure.defvjp(lambda x, inside: (x, inside), lambda inside, dx: (jnp.where(inside, dx, jnp.nan), None))


def library(x: Any, h: Any, c: Any, weights: Any, lengths: Any, *options: Any) -> Any:
    """What `cudnn._lstm` computes, from JAX's reference; NaN where the library makes no promise."""
    *sizes, bidirectional, _ = options
    weights = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
    inside = np.arange(x.shape[1])[None, :, None] < lengths[:, None, None]
    y, last_h, last_c = rnn.lstm_ref(unsure(x, inside), h, c, *weights, lengths, *sizes, 0.0, bidirectional)
    return jnp.where(inside, y, jnp.nan), last_h, last_c


def forget_traces() -> None:
    """What a test traced with another function in the library's place must not be run again."""
    for run in (sequence._run, compose._run_layers):
        run.clear_cache()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """The library is there; the options that it is called with."""
    made: list = []

    def counted(x: Any, h: Any, c: Any, weights: Any, lengths: Any, *options: Any) -> Any:
        made.append(options)
        return library(x, h, c, weights, lengths, *options)

    monkeypatch.setattr(CUDNN, "missing_library", lambda platform: None)
    monkeypatch.setattr(CUDNN, "_lstm", counted)
    forget_traces()
    with jax.default_matmul_precision("highest"):
        yield made


def some(shapes: Any, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), dtype), shapes)


def problem(batch: tuple[int, ...] = (B,), cell: Any = CELL, bias: bool = True) -> tuple[Any, Any, Any]:
    """(params, xs, carry) in float32."""
    shapes = jax.eval_shape(lambda: (cell.init(jax.random.key(0), D), jnp.zeros((*batch, T, D)),
                                     cell.initial_carry(batch)))  # fmt: skip
    params, xs, carry = some(shapes)
    return params if bias else params._replace(bias=None), xs, carry


def stack_problem(stack: Stack) -> tuple[Any, Any, Any]:
    shapes = jax.eval_shape(lambda: (stack.init(jax.random.key(0), D), jnp.zeros((B, T, D)), stack.initial_carry((B,))))
    return some(shapes)


def inside_only(ys: Any, lengths: Any, time_axis: int = -2) -> Any:
    """Outputs with zeros past the length, as the library has them."""
    if lengths is None:
        return ys
    ys = jnp.moveaxis(ys, time_axis, -2)
    ys = jnp.where(jnp.arange(ys.shape[-2])[:, None] < jnp.asarray(lengths)[..., None, None], ys, 0)
    return jnp.moveaxis(ys, -2, time_axis)


def compare(run: Any, arguments: Any, lengths: Any, tolerance: float = FLOAT32, time_axis: int = -2) -> None:
    """Results and all gradients of run(backend, *arguments), which returns (carry, outputs), against the scan."""

    def value(backend: str, *arguments: Any) -> Any:
        carry, ys = run(backend, *arguments)
        return carry, (ys if backend == "cudnn" else inside_only(ys, lengths, time_axis))

    @jax.jit
    def both(arguments: Any, moved: Any) -> Any:
        (want, want_back), (got, back) = (
            jax.vjp(functools.partial(value, backend), *arguments) for backend in ("scan", "cudnn")
        )
        return (got, back(moved)), (want, want_back(moved))

    assert_close(*both(arguments, cotangents(jax.eval_shape(functools.partial(value, "scan"), *arguments))), tolerance)


# -------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_packed_weights_are_unpacked_by_jax(num_layers: int, directions: int):
    stack = Stack(CELL, num_layers=num_layers, bidirectional=directions == 2)
    layers = stack_problem(stack)[0].layers
    packed = CUDNN.pack(layers)
    sizes = (D, H, num_layers, directions == 2)
    assert packed.shape == (rnn.get_num_params_in_lstm(*sizes),)
    unpacked = rnn.unpack_lstm_weights(packed, *sizes)
    for n, own in enumerate(own for row in layers for own in row):
        w_ih, w_hh, b_ih, b_hh = (part[n] for part in unpacked)
        for gate in range(4):
            rows = slice(gate * H, (gate + 1) * H)
            np.testing.assert_array_equal(w_ih[rows], own.input_kernel[:, gate].T)
            np.testing.assert_array_equal(w_hh[rows], own.recurrent_kernel[:, gate].T)
            np.testing.assert_array_equal(b_ih[rows] + b_hh[rows], own.bias[gate])


@pytest.mark.parametrize(("bidirectional", "lengths"), [(False, None), (True, LENGTHS)])
def test_in_float64_the_layers_are_those_of_the_scan(calls: list, bidirectional: bool, lengths: Any):
    stack = Stack(CELL, num_layers=2, bidirectional=bidirectional)
    params, xs, carry = jax.tree.map(lambda a: a.astype(jnp.float64), stack_problem(stack))

    def run(backend: str, layers: Any, xs: Any, carry: Any) -> Any:
        if backend == "scan":
            return rnncore.unroll_stack(stack, params._replace(layers=layers), xs, initial_carry=carry,
                                        seq_lengths=lengths)  # fmt: skip
        given = None if lengths is None else jnp.asarray(lengths, jnp.int32)
        ends, ys = CUDNN.run_layers(layers, carry, jnp.moveaxis(xs, 1, 0), given, "highest")
        return ends, jnp.moveaxis(ys, 0, 1)

    compare(run, (params.layers, xs, carry), lengths, tolerance=1e-12)
    assert calls == [(D, H, 2, bidirectional, False)]


def test_the_library_is_never_asked_for_a_sequence_of_no_steps(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(CUDNN, "_lstm", lambda *given: asked.append(given[4]) or library(*given))
    params, xs, carry = problem()
    CUDNN.run_layers(((params,),), ((carry,),), jnp.moveaxis(xs, 1, 0), jnp.asarray(LENGTHS, jnp.int32), None)
    assert asked[0].tolist() == [1, T, 1, 4] and asked[0].dtype == jnp.int32


# -------------------------------------------------------------------------------------- unroll

SINGLE: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "plain": ((B,), None, {}),
    "lengths": ((B,), LENGTHS, {}),
    "lengths_no_bias": ((B,), LENGTHS, {"bias": False}),
    "no_batch": ((), np.array(4), {}),
    "two_batch_axes": ((2, 2), LENGTHS.reshape(2, 2), {}),
    "reverse": ((B,), LENGTHS, {"reverse": True}),
    "reverse_keep_order": ((B,), LENGTHS, {"reverse": True, "keep_order": True}),
    "time_major": ((B,), LENGTHS, {"time_major": True}),
}


def single(name: str) -> tuple[Any, Any, Any, int]:
    """(run, arguments, lengths, time axis) of one layer."""
    batch, lengths, options = SINGLE[name]
    options = dict(options)
    params, xs, carry = problem(batch, bias=options.pop("bias", True))
    time_axis = 0 if options.get("time_major") else -2
    arguments = (params, jnp.moveaxis(xs, -2, time_axis), carry)

    def run(backend: str, params: Any, xs: Any, carry: Any) -> Any:
        return rnncore.unroll(
            CELL, params, xs, initial_carry=carry, seq_lengths=lengths, backend=backend,
            **options,
        )  # fmt: skip

    return run, arguments, lengths, time_axis


@pytest.mark.parametrize("name", SINGLE)
def test_unroll_is_the_scan(calls: list, name: str):
    run, arguments, lengths, time_axis = single(name)
    compare(run, arguments, lengths, time_axis=time_axis)
    assert len(calls) == 1 and calls[0] == (D, H, 1, False, False)


def test_padding_with_nan_reaches_nothing(calls: list):
    run, (params, xs, carry), _, _ = single("lengths")
    xs = jnp.where(np.arange(T)[:, None] < LENGTHS[:, None, None], xs, jnp.nan)
    results, back = jax.vjp(lambda *a: run("cudnn", *a), params, xs, carry)
    (last, ys), gradients = results, back(cotangents(results))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((last, ys, gradients)))
    for n, length in enumerate(LENGTHS):
        assert not ys[n, length:].any() and not gradients[1][n, length:].any() and ys[n, :length].all()
    np.testing.assert_array_equal(last.c[0], carry.c[0])


def test_no_steps_at_all_need_no_library(calls: list):
    params, xs, carry = problem()
    last, ys = rnncore.unroll(CELL, params, xs[:, :0], initial_carry=carry, backend="cudnn")
    assert ys.shape == (B, 0, H) and not calls
    np.testing.assert_array_equal(last.h, carry.h)


@pytest.mark.parametrize(
    ("policy", "allow_tf32"),
    [(None, True), ("tensorfloat32", True), ("default", True), ("highest", False), ("float32", False),
     ("F32_F32_F32", False), ("TF32_TF32_F32", True)],
)  # fmt: skip
def test_the_precision_is_the_one_that_products_have(calls: list, policy: Any, allow_tf32: bool):
    run, arguments, *_ = single("plain")
    with jax.default_matmul_precision(policy):
        jax.eval_shape(lambda *a: run("cudnn", *a), *arguments)
    assert [options[-1] for options in calls] == [allow_tf32]


def test_the_librarys_own_rule_agrees_on_tf32():
    """`_lstm` pins the precision by these two values; what JAX makes of them is its own rule."""
    assert rnn._lstm_cudnn_allow_tf32(jax.lax.Precision.HIGH) is True
    assert rnn._lstm_cudnn_allow_tf32(jax.lax.Precision.HIGHEST) is False


# -------------------------------------------------------------------------------------- refusals


class Other(LSTM):
    """A cell of its own: nobody knows what it computes."""


def request(**changes: Any) -> Request:
    """One that cuDNN takes, with changes."""
    plain = Request(
        cell=CELL, steps=T, batch_shape=(B,), input_size=D, dtype="float32", dtypes=frozenset({"float32"}),
        precision=None, platform="gpu", devices=1, lengths=True, resets=False, mask=False, stay=False, states=False,
        checkpoint_every=None, recompute="nothing",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gru": ({"cell": rnncore.GRU(H)}, "GRU is not rnncore.LSTM"),
    "subclass": ({"cell": Other(H)}, "Other is not rnncore.LSTM"),
    "peepholes": ({"cell": LSTM(H, peepholes=True)}, "this one has peepholes=True"),
    "coupled": ({"cell": LSTM(H, coupled=True)}, "this one has coupled=True"),
    "gate_fn": ({"cell": LSTM(H, gate_fn=jax.nn.hard_sigmoid)}, "this one has gate_fn=hard_sigmoid"),
    "activation_fn": ({"cell": LSTM(H, activation_fn=jax.nn.relu)}, "this one has activation_fn=relu"),
    "heads": ({"cell": LSTM(H, recurrence=Heads(1))}, "this one has recurrence=Heads(num_heads=1)"),
    "float64": ({"dtypes": frozenset({"float32", "float64"})}, "float32 only; parameters, inputs and carry are float3"),
    "bfloat16": ({"dtypes": frozenset({"bfloat16"})}, "are bfloat16"),
    "precision": ({"precision": "BF16_BF16_F32_X9"}, "jax.default_matmul_precision is 'BF16_BF16_F32_X9'"),
    "resets": ({"resets": True}, "resets: its call runs all steps"),
    "mask": ({"mask": True}, "recurrent_mask: its"),
    "zoneout": ({"stay": True}, "zoneout: its"),
    "states": ({"states": True}, "return_states=True: its"),
    "checkpoint_every": ({"checkpoint_every": 8}, "checkpoint_every: its"),
    "recompute": ({"recompute": "gates"}, "recompute='gates': its"),
    "residual_dtype": ({"residual_dtype": "bfloat16"}, "residual_dtype='bfloat16': its"),
    "empty batch": ({"batch_shape": (2, 0)}, "no empty batch, and this one is (2, 0)"),
    "cpu": ({"platform": "cpu"}, "it needs an NVIDIA GPU, and JAX runs on cpu here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_has_a_reason(monkeypatch: pytest.MonkeyPatch, name: str):
    changes, message = REFUSED[name]
    if name != "cpu":
        monkeypatch.setattr(CUDNN, "missing_library", lambda platform: None)
        assert CUDNN.unsupported(request()) is None
    assert message in CUDNN.unsupported(request(**changes))


def test_every_field_of_a_request_is_thought_of():
    """A new kind of request must not run here by oversight: it is named in one of these."""
    looked_at = {key for changes, _ in REFUSED.values() for key in changes}
    of_no_matter = {"steps", "input_size", "dtype", "devices", "lengths", "time_axis"}
    assert {field.name for field in dataclasses.fields(Request)} == looked_at | of_no_matter


def test_it_is_never_chosen_unless_named(calls: list):
    params, xs, _ = problem()
    choice = rnncore.explain_backend(CELL, params, xs)
    reason = "has not been measured"
    assert choice.name == "scan" and reason in choice.rejected["cudnn"]
    assert f"not 'cudnn': {choice.rejected['cudnn']}" in str(choice)
    rnncore.unroll(CELL, params, xs)
    assert not calls


def test_named_it_is_the_choice(calls: list):
    params, xs, _ = problem()
    choice = rnncore.explain_backend(CELL, params, xs, backend="cudnn")
    others = {name: choice.rejected[name] for name in ("scan", "autodiff")}
    assert choice.name == "cudnn" and others == dict.fromkeys(others, "another one was named")


def test_the_carrys_dtype_counts(calls: list):
    params, xs, carry = problem()
    carry = jax.tree.map(lambda a: a.astype(jnp.bfloat16), carry)
    with pytest.raises(NotImplementedError, match="parameters, inputs and carry are bfloat16, float32"):
        rnncore.unroll(CELL, params, xs, initial_carry=carry, backend="cudnn")


def test_shard_map_that_follows_what_differs_is_refused(calls: list):
    params, xs, _ = problem()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec("data")

    def run(xs: Any) -> Any:
        return rnncore.unroll(CELL, params, xs, backend="cudnn")[1]

    with pytest.raises(NotImplementedError, match="check_vma=False"):
        jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part)(xs)
    parted = jax.shard_map(run, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)(xs)
    assert_close(parted, rnncore.unroll(CELL, params, xs)[1], FLOAT32)


# -------------------------------------------------------------------------------------- stacks

STACKS: dict[str, tuple[Stack, Any]] = {
    "two layers": (Stack(CELL, num_layers=2), None),
    "two layers, lengths": (Stack(CELL, num_layers=2), LENGTHS),
    "both directions": (Stack(CELL, bidirectional=True), LENGTHS),
    "two layers of both": (Stack(CELL, num_layers=2, bidirectional=True), LENGTHS),
    "dropout without a key": (Stack(CELL, num_layers=2, dropout=0.5), None),
    "learned carry": (Stack(CELL, num_layers=2, bidirectional=True, learned_carry=True), LENGTHS),
}


def stacked(name: str) -> tuple[Any, Any, Any]:
    stack, lengths = STACKS[name]
    params, xs, carry = stack_problem(stack)

    def run(backend: str, params: Any, xs: Any, carry: Any) -> Any:
        return rnncore.unroll_stack(
            stack, params, xs, initial_carry=None if stack.learned_carry else carry, seq_lengths=lengths,
            backend=backend,
        )  # fmt: skip

    return run, (params, xs, carry), lengths


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_one_call(calls: list, name: str):
    run, arguments, lengths = stacked(name)
    compare(run, arguments, lengths)
    stack = STACKS[name][0]
    assert calls == [(D, H, stack.num_layers, stack.bidirectional, False)]


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"bidirectional": True, "merge": "sum"}], ids=["dropout", "merge"]
)
def test_what_the_library_puts_together_in_another_way_is_a_call_for_each(calls: list, options: dict[str, Any]):
    stack = Stack(CELL, num_layers=2, **options)
    key = jax.random.key(5) if stack.dropout else None

    def run(backend: str, params: Any, xs: Any, carry: Any) -> Any:
        return rnncore.unroll_stack(
            stack, params, xs, initial_carry=carry, key=key, backend=backend
        )

    compare(run, stack_problem(stack), None)
    # Both directions of a layer have the same shapes: jit traces them once.
    assert {(D, H, 1, False, False), (H, H, 1, False, False)} == set(calls)


def test_a_stack_time_major_with_an_output_dtype(calls: list):
    stack = Stack(CELL, num_layers=2, bidirectional=True)
    params, xs, carry = stack_problem(stack)
    options: dict[str, Any] = {"initial_carry": carry, "seq_lengths": LENGTHS, }
    ends, ys = rnncore.unroll_stack(stack, params, xs, backend="cudnn", **options)
    turned_ends, turned = rnncore.unroll_stack(
        stack, params, jnp.moveaxis(xs, 1, 0), time_major=True, output_dtype=jnp.bfloat16, backend="cudnn", **options
    )
    assert turned.dtype == jnp.bfloat16
    assert_close((turned_ends, turned), (ends, jnp.moveaxis(ys, 0, 1).astype(jnp.bfloat16)), 0.0)


@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (Stack(CELL, num_layers=2), {"return_states": True}, "return_states=True: its"),
        (Stack(CELL, num_layers=2), {"resets": np.zeros((B, T), bool)}, "resets: its"),
        (Stack(CELL, num_layers=2), {"dtype": jnp.bfloat16}, "are bfloat16"),
        (Stack(CELL, num_layers=2), {"carry_dtype": jnp.float64}, "are float32, float64"),
        (Stack(CELL, zoneout=LSTMCarry(0.1, None)), {}, "zoneout: its"),
        (Stack(CELL, recurrent_dropout=0.1), {"key": jax.random.key(0)}, "recurrent_mask: its"),
        (Stack(rnncore.GRU(H), num_layers=2), {}, "GRU is not rnncore.LSTM"),
    ],
    ids=["states", "resets", "bfloat16", "float64", "zoneout", "recurrent_dropout", "gru"],
)
def test_a_stack_is_refused_for_the_same_reasons(calls: list, stack: Stack, options: dict[str, Any], message: str):
    params = stack.init(jax.random.key(0), D)
    with pytest.raises(NotImplementedError, match="backend='cudnn'.*" + message.replace("(", r"\(")):
        rnncore.unroll_stack(stack, params, jnp.ones((B, T, D), jnp.float32), backend="cudnn", **options)


def test_a_stack_is_checked_as_unroll_checks(calls: list):
    stack = Stack(CELL, num_layers=2)
    params, xs, _ = stack_problem(stack)
    first, second = params.layers
    wrong = params._replace(layers=(first, (second[0]._replace(bias=jnp.zeros(3, jnp.float32)),)))
    for given, lengths, message in ((wrong, None, r"params.bias has shape \(3,\)"), (params, [7] * B, "expected 0 to")):
        with pytest.raises(ValueError, match=message):
            rnncore.unroll_stack(stack, given, xs, seq_lengths=lengths, backend="cudnn")


# -------------------------------------------------------------------------------------- the library

SIZES = "compute_rnn_workspace_reserve_space_sizes"


def equations(jaxpr: Any) -> Any:
    """Every equation at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_call_as_jax_traces_it(monkeypatch: pytest.MonkeyPatch):
    """The real function, of which only the sizes of its buffers need the library: forward and backward, once each."""
    monkeypatch.setattr(rnn.gpu_rnn, SIZES, lambda *sizes: (16, 32), raising=False)
    monkeypatch.setattr(CUDNN, "missing_library", lambda platform: None)
    forget_traces()
    run, arguments, _ = stacked("two layers of both")

    def gradients(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            results, back = jax.vjp(functools.partial(run, "cudnn"), *arguments)
        return back(results)  # traced where nobody asks for a precision any more

    found = {}
    for eqn in equations(jax.make_jaxpr(gradients)(*arguments).jaxpr):
        if eqn.primitive.name.startswith("rnn_"):
            assert eqn.primitive.name not in found
            found[eqn.primitive.name] = eqn
    sizes = {"input_size": D, "hidden_size": H, "num_layers": 2, "bidirectional": True, "dropout": 0.0}
    assert set(found) == {"rnn_fwd", "rnn_bwd"}
    for eqn in found.values():
        assert eqn.params == sizes | {"cudnn_allow_tf32": False}
        assert {v.aval.dtype.name for v in eqn.invars} == {"float32", "int32"}
    shapes = [(B, T, D), (4, B, H), (4, B, H), (rnn.get_num_params_in_lstm(D, H, 2, True),), (B,)]
    assert [v.aval.shape for v in found["rnn_fwd"].invars] == shapes


def test_which_machines_have_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_compat, "platform_version", lambda: "cuda 13000")
    monkeypatch.setattr(rnn.gpu_rnn, SIZES, lambda *sizes: (16, 32), raising=False)
    assert CUDNN.missing_library("gpu") is None
    assert "JAX runs on tpu here" in CUDNN.missing_library("tpu")
    monkeypatch.setattr(_compat, "platform_version", lambda: "rocm 70200")
    assert "on AMD's" in CUDNN.missing_library("gpu")
    monkeypatch.undo()
    monkeypatch.setattr(_compat, "platform_version", lambda: "cuda 13000")
    monkeypatch.delattr(rnn.gpu_rnn, SIZES, raising=False)
    assert "install jax's CUDA plugin" in CUDNN.missing_library("gpu")


@pytest.mark.parametrize("name", [*SINGLE, *STACKS])
def test_the_library_itself(name: str):
    """With a GPU the real call against the scan; without one, that it is refused and says what to do."""
    time_axis = -2
    if name in SINGLE:
        run, arguments, lengths, time_axis = single(name)
    else:
        run, arguments, lengths = stacked(name)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU.*Use backend=None"):
            run("cudnn", *arguments)
        return
    forget_traces()
    with jax.default_matmul_precision("highest"):
        # JAX's own test of this call allows 1e-5.
        compare(run, arguments, lengths, tolerance=1e-5, time_axis=time_axis)
        text = jax.jit(lambda *a: run("cudnn", *a)).lower(*arguments).as_text()
    assert text.count("cudnn_rnn_ffi") == 1
