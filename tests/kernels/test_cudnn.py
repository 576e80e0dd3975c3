"""Backend "cudnn": calls, descriptors, sizes and packing against a libcudnn for tests that computes on the CPU.

The stand-in (cudnn_stand_in.cc) computes in double and rounds what it gives: results and gradients are those of the
scan in float64 but for the rounding of one number.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, cotangents

import rnncore
from rnncore import GRU, LSTM, Elman, Heads, Stack, _compat
from rnncore.kernels import compiler
from rnncore.kernels.cudnn import algorithm, calls, library, weights
from rnncore.recurrence.run import Constants, Differentiable, Problem, Request
from rnncore.sequence.backends import BACKENDS

CUDNN = BACKENDS["cudnn"]
B, T, D, H = 4, 6, 3, 5
LENGTHS = np.array([0, T, 1, 4])
H200 = algorithm.Device(9, 0, 132)
STAND_IN = Path(__file__).parent.with_name("cudnn_stand_in.cc").read_text()
CELLS = {
    "lstm": LSTM(H), "gru": GRU(H), "tanh": Elman(H), "relu": Elman(H, activation_fn=jax.nn.relu),
}  # fmt: skip
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def built(source: str) -> str:
    """The path of a source as a shared library."""
    return compiler.library(source, "a library for tests")[0]._name


class Recorder:
    """The stand-in with its handlers, and what was called of it."""

    def __init__(self) -> None:
        self.path = built(STAND_IN)
        self.library = library.Library(self.path, on_host=True)
        self._file = ctypes.CDLL(self.path)
        self._file.stand_in_calls.restype = ctypes.c_char_p

    def forget(self) -> None:
        self._file.stand_in_forget()

    def calls(self, *names: str) -> list[str]:
        """Recorded lines, all or those of some functions."""
        lines = self._file.stand_in_calls().decode().splitlines()
        return [line for line in lines if not names or line.split()[0] in names]

    def runs(self) -> list[str]:
        """Which of the three runs were called, in order."""
        names = {
            "cudnnRNNForward": "forward",
            "cudnnRNNBackwardData_v8": "data",
            "cudnnRNNBackwardWeights_v8": "weights",
        }
        return [names[line.split()[0]] for line in self.calls(*names)]


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def cudnn(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in in the library's place, on what seems an H200."""
    monkeypatch.setattr(calls, "library", lambda: recorder.library)
    monkeypatch.setattr(library, "find", lambda: recorder.path)
    monkeypatch.setattr(library, "missing", lambda platform: None)
    monkeypatch.setattr(library, "fault", lambda: None)
    monkeypatch.setattr(algorithm, "device", lambda: H200)
    recorder.forget()
    with jax.default_matmul_precision("highest"):
        yield recorder


def some(shapes: Any, dtype: Any = "float32", seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape), dtype), shapes)


def problem(
    cell: Any, batch: tuple[int, ...] = (B,), bias: bool = True, dtype: str = "float32"
) -> tuple[Any, Any, Any]:
    """(params, xs, carry)."""
    shapes = jax.eval_shape(lambda: (cell.init(jax.random.key(0), D), jnp.zeros((*batch, T, D)),
                                     cell.initial_carry(batch)))  # fmt: skip
    params, xs, carry = some(shapes, dtype)
    return params if bias else params._replace(bias=None), xs, carry


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def inside_only(ys: Any, lengths: Any, time_axis: int = -2) -> Any:
    """Outputs with zeros past the length, as the library has them."""
    if lengths is None:
        return ys
    ys = jnp.moveaxis(ys, time_axis, -2)
    ys = jnp.where(jnp.arange(ys.shape[-2])[:, None] < jnp.asarray(lengths)[..., None, None], ys, 0)
    return jnp.moveaxis(ys, -2, time_axis)


def compare(run: Any, arguments: Any, lengths: Any, time_axis: int = -2, dtype: str = "float32") -> None:
    """Results and all gradients of run(backend, *arguments) -> (carry, outputs), against the scan in float64."""

    def reference(*arguments: Any) -> Any:
        carry, ys = run("scan", *arguments)
        return carry, inside_only(ys, lengths, time_axis)

    @jax.jit
    def both(arguments: Any, moved: Any) -> Any:
        want, want_back = jax.vjp(reference, *in_double(arguments))
        got, back = jax.vjp(functools.partial(run, "cudnn"), *arguments)
        return (got, back(moved)), (want, want_back(in_double(moved)))

    shapes = jax.eval_shape(functools.partial(run, "cudnn"), *arguments)
    got, want = both(arguments, cotangents(shapes))
    assert {a.dtype.name for a in jax.tree.leaves(got)} == {dtype}
    # The sums of biases' gradients are rounded after cotangents, weights and inputs are: they are what they are.
    assert_close(got, want, 2 * ROUNDING[dtype])


# -------------------------------------------------------------------------------------- the rules


A10 = algorithm.Device(8, 6, 72)
STANDARD, PERSIST, SMALL = algorithm.STANDARD, 1, 3


@pytest.mark.parametrize(
    ("mode", "dtype", "device", "batch", "features", "hidden", "forward", "backward"),
    [
        (algorithm.LSTM, "float16", H200, 16, 768, 768, PERSIST, PERSIST),
        (algorithm.LSTM, "bfloat16", H200, 16, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float32", H200, 16, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float16", A10, 16, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float16", H200, 2, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float16", H200, 128, 768, 768, PERSIST, PERSIST),
        (algorithm.LSTM, "float16", H200, 256, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float16", H200, 16, 96, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float16", H200, 16, 768, 1152, STANDARD, STANDARD),
        (algorithm.GRU, "float16", H200, 16, 768, 768, STANDARD, STANDARD),
        (algorithm.LSTM, "float32", H200, 6, 104, 40, SMALL, SMALL),
        (algorithm.LSTM, "float32", H200, 16, 112, 128, SMALL, SMALL),
        (algorithm.LSTM, "float16", H200, 12, 304, 192, SMALL, STANDARD),
        (algorithm.TANH, "float16", H200, 8, 128, 384, SMALL, PERSIST),
        (algorithm.TANH, "float16", H200, 96, 128, 896, STANDARD, STANDARD),
    ],
)
def test_the_algorithm_is_the_one_that_pytorch_asks_for(
    mode, dtype, device, batch, features, hidden, forward, backward
):
    """Read off ATen/native/cudnn/RNN.cpp, get_algo."""
    shape = (100, batch, features, hidden)
    picked = [algorithm.choose(device, mode, dtype, shape, 1, 1, False, way) for way in (True, False)]
    assert picked == [forward, backward]
    assert algorithm.choose(device, mode, dtype, shape, 1, 1, True, True) == STANDARD
    assert algorithm.choose(device, algorithm.LSTM, "float16", (100, 16, 768, 768), 2, 1, False, True) == STANDARD


@pytest.mark.parametrize(
    ("device", "steps", "batch", "persists"),
    [
        (algorithm.Device(7, 0, 80), 100, 16, True), (algorithm.Device(7, 0, 80), 100, 8, True),
        (algorithm.Device(7, 0, 80), 100, 24, False), (algorithm.Device(7, 0, 80), 100, 80, False),
        (algorithm.Device(7, 0, 80), 30, 112, False), (algorithm.Device(7, 0, 80), 30, 128, False),
        (algorithm.Device(7, 0, 80), 30, 96, True), (algorithm.Device(7, 0, 80), 12, 64, False),
        (algorithm.Device(7, 5, 72), 100, 16, False), (algorithm.Device(6, 1, 28), 100, 16, False),
    ],
)  # fmt: skip
def test_older_gpus_persist_where_pytorch_says(device: algorithm.Device, steps: int, batch: int, persists: bool):
    chosen = algorithm.choose(device, algorithm.LSTM, "float16", (steps, batch, 128, 512), 1, 1, False, True)
    assert chosen == (algorithm.PERSIST_STATIC if persists else algorithm.STANDARD)


@pytest.mark.parametrize(
    ("dtype", "precision", "math"),
    [
        ("float32", None, algorithm.DEFAULT_MATH), ("float32", "tensorfloat32", algorithm.DEFAULT_MATH),
        ("float32", "highest", algorithm.FMA_MATH), ("float32", "F32_F32_F32", algorithm.FMA_MATH),
        ("float16", "highest", algorithm.TENSOR_OP_MATH), ("bfloat16", "highest", algorithm.DEFAULT_MATH),
    ],
)  # fmt: skip
def test_the_arithmetic_is_that_of_the_precision(cudnn: Recorder, dtype: str, precision: Any, math: int):
    params, xs, _ = problem(CELLS["lstm"], dtype=dtype)
    with jax.default_matmul_precision(precision):
        rnncore.unroll(CELLS["lstm"], params, xs, backend="cudnn")
    assert [f" math={math} " in line for line in cudnn.calls("cudnnRNNForward")] == [True]


# -------------------------------------------------------------------------------------- the weights


@pytest.mark.sample(11)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", CELLS)
def test_weights_lie_as_pytorch_has_them(cudnn: Recorder, name: str, num_layers: int, directions: int):
    """By `to_torch`, which tests hold to PyTorch itself; that cuDNN has them there it says in `sizes`."""
    stack = Stack(CELLS[name], num_layers=num_layers, bidirectional=directions == 2)
    params = some(jax.eval_shape(lambda: stack.init(jax.random.key(0), D)))
    state = rnncore.to_torch(stack, params)
    ends = [f"l{layer}{way}" for layer in range(num_layers) for way in ("", "_reverse")[:directions]]
    order = [f"{kind}_{side}_{end}" for kind in ("weight", "bias") for end in ends for side in ("ih", "hh")]
    packed = weights.pack(params.layers)
    np.testing.assert_array_equal(packed, np.concatenate([state[key].reshape(-1) for key in order]))
    kind = library.Kind(weights.mode(CELLS[name]), 0, 0, 0, directions, num_layers, T, B, D, H)
    assert cudnn.library.sizes(kind).weights == packed.size * 4
    back = weights.unpack(packed, params.layers)
    assert_close([row._replace(bias=0) for layer in back for row in layer],
                 [row._replace(bias=0) for layer in params.layers for row in layer], 0.0)  # fmt: skip


def test_another_order_of_the_weights_is_an_error(cudnn: Recorder, monkeypatch: pytest.MonkeyPatch):
    places = library.expected_places

    def swapped(kind: Any) -> Any:
        found, end = places(kind)
        return [*found[1::-1], *found[2:]], end

    monkeypatch.setattr(library, "expected_places", swapped)
    params, xs, _ = problem(LSTM(H + 2))
    with pytest.raises(RuntimeError, match="cuDNN 91900 has its weights in another order"):
        rnncore.unroll(LSTM(H + 2), params, xs, backend="cudnn")


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


def single(name: str, cell: Any, dtype: str = "float32") -> tuple[Any, Any, Any, int]:
    """(run, arguments, lengths, time axis) of one layer."""
    batch, lengths, options = SINGLE[name]
    options = dict(options)
    params, xs, carry = problem(cell, batch, options.pop("bias", True), dtype)
    time_axis = 0 if options.get("time_major") else -2
    arguments = (params, jnp.moveaxis(xs, -2, time_axis), carry)

    def run(backend: str, params: Any, xs: Any, carry: Any) -> Any:
        return rnncore.unroll(
            cell, params, xs, initial_carry=carry, seq_lengths=lengths, backend=backend, **options
        )  # fmt: skip

    return run, arguments, lengths, time_axis


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "cell"),
    [
        (name, cell)
        for name in SINGLE
        for cell in CELLS
        if cell in ("lstm", "gru") or name in ("plain", "lengths_no_bias")
    ],
)
def test_unroll_is_the_scan(cudnn: Recorder, name: str, cell: str):
    run, arguments, lengths, time_axis = single(name, CELLS[cell])
    compare(run, arguments, lengths, time_axis)
    assert cudnn.runs() == ["forward", "data", "weights"]


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["plain", "lengths"])
def test_in_16_bits_too(cudnn: Recorder, name: str, cell: str, dtype: str):
    run, arguments, lengths, time_axis = single(name, CELLS[cell], dtype)
    compare(run, arguments, lengths, time_axis, dtype)


def test_what_the_library_is_told(cudnn: Recorder):
    """One LSTM of a size that no other test has, so that its descriptors are made here."""
    cell = LSTM(11)
    params, xs, _ = problem(cell)
    jax.grad(lambda p: rnncore.unroll(cell, p, xs, backend="cudnn")[1].sum())(params)
    described = "mode=2 direction=0 data=0 arithmetic=0 math=3 inputs=3 hidden=11 layers=1 flags=1"
    assert [line for line in cudnn.calls() if line != "cudnnCreate"] == [
        f"cudnnSetRNNDescriptor_v8 algorithm=3 {described}",
        f"cudnnRNNForward training=1 steps={T} batch={B} algorithm=3 math=3 full=1",
        "cudnnRNNBackwardData_v8 algorithm=3",
        "cudnnRNNBackwardWeights_v8 algorithm=3",
    ]
    rnncore.unroll(cell, params, xs, backend="cudnn")
    assert cudnn.calls()[-1] == f"cudnnRNNForward training=0 steps={T} batch={B} algorithm=3 math=3 full=1"


@pytest.mark.parametrize(
    ("cell", "name", "copies"),
    [("lstm", "plain", 0), ("lstm", "lengths", 2), ("gru", "plain", 0), ("gru", "lengths", 0)],
)
def test_lengths_are_read_on_the_host_by_an_lstm_that_has_some_alone(
    cudnn: Recorder, cell: str, name: str, copies: int
):
    run, arguments, *_ = single(name, CELLS[cell])
    results, back = jax.vjp(functools.partial(run, "cudnn"), *arguments)
    back(results)
    assert len(cudnn.calls("cuMemcpyDtoHAsync_v2")) == copies
    full = cudnn.calls("cudnnRNNForward")[0].endswith("full=1")
    assert full == (copies == 0)


def test_padding_with_nan_reaches_nothing(cudnn: Recorder):
    for cell in CELLS.values():
        run, (params, xs, carry), *_ = single("lengths", cell)
        xs = jnp.where(np.arange(T)[:, None] < LENGTHS[:, None, None], xs, jnp.nan)
        results, back = jax.vjp(functools.partial(run, "cudnn"), params, xs, carry)
        (last, ys), gradients = results, back(cotangents(results))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves((last, ys, gradients)))
        for n, length in enumerate(LENGTHS):
            assert not ys[n, length:].any() and not gradients[1][n, length:].any()
        np.testing.assert_array_equal(last.h[0], carry.h[0])


def test_no_steps_at_all_need_no_library(cudnn: Recorder):
    params, xs, carry = problem(CELLS["lstm"])
    last, ys = rnncore.unroll(CELLS["lstm"], params, xs[:, :0], initial_carry=carry, backend="cudnn")
    assert ys.shape == (B, 0, H) and not cudnn.runs()
    np.testing.assert_array_equal(last.h, carry.h)


# -------------------------------------------------------------------------------------- derivatives


def test_what_forward_kept_serves_more_than_one_backward_pass(cudnn: Recorder):
    """The library writes to it: each pass must get it as forward left it."""
    run, arguments, *_ = single("plain", CELLS["gru"])
    results, back = jax.vjp(functools.partial(run, "cudnn"), *arguments)
    moved = cotangents(results)
    assert_close(back(moved), back(moved), 0.0)
    assert cudnn.runs() == ["forward", "data", "weights", "data", "weights"]

    @jax.jit
    def twice(arguments: Any) -> Any:
        _, back = jax.vjp(functools.partial(run, "cudnn"), *arguments)
        return back(moved), back(jax.tree.map(lambda a: 2 * a, moved))

    once, double = twice(arguments)
    assert_close(jax.tree.map(lambda a: 2 * a, once), double, 4 * ROUNDING["float32"])


def test_gradients_of_weights_that_nobody_wants_are_not_formed(cudnn: Recorder):
    run, (params, xs, carry), *_ = single("plain", CELLS["lstm"])
    jax.jit(jax.grad(lambda xs: run("cudnn", params, xs, carry)[1].sum()))(xs)
    assert cudnn.runs() == ["forward", "data"]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "name"), [("lstm", "lengths"), ("gru", "plain")])
def test_every_mode_of_differentiation(cudnn: Recorder, cell: str, name: str):
    run, arguments, lengths, _ = single(name, CELLS[cell])
    moved, directions = some(arguments, seed=3), some(arguments, seed=4)

    def loss(backend: str, *arguments: Any) -> Any:
        carry, ys = run(backend, *arguments)
        ys = inside_only(ys, lengths)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(a)) for a in jax.tree.leaves(carry))

    def every(backend: str, arguments: Any, moved: Any, directions: Any) -> Any:
        of = functools.partial(loss, backend)
        gradient = jax.grad(of, argnums=(0, 1, 2))
        forward = jax.jvp(of, arguments, moved)
        forward_over_reverse = jax.jvp(gradient, arguments, moved)[1]
        reverse_over_forward = jax.grad(lambda *a: jax.jvp(of, a, moved)[1], argnums=(0, 1, 2))(*arguments)
        products = jax.grad(lambda *a: sum(map(jnp.vdot, jax.tree.leaves(gradient(*a)), jax.tree.leaves(directions))))(
            *arguments
        )
        return forward, forward_over_reverse, reverse_over_forward, products

    got = jax.jit(functools.partial(every, "cudnn"))(arguments, moved, directions)
    want = jax.jit(functools.partial(every, "scan"))(*in_double((arguments, moved, directions)))
    assert_close(got, want, 3e-6)  # second orders are the scan's, in float32


def test_vmap_of_a_forward_run_makes_more_sequences_of_it(cudnn: Recorder):
    run, (params, xs, carry), *_ = single("lengths", CELLS["lstm"])
    many = some(jax.ShapeDtypeStruct((3, *xs.shape), "float32"))
    got = jax.vmap(lambda xs: run("cudnn", params, xs, carry))(many)
    want = [run("cudnn", params, one, carry) for one in many]
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want), 0.0)
    assert cudnn.calls("cudnnRNNForward")[0].startswith(f"cudnnRNNForward training=0 steps={T} batch={3 * B} ")


def test_vmap_over_sequences_is_one_call_both_ways(cudnn: Recorder):
    run, (params, xs, carry), *_ = single("lengths", CELLS["lstm"])
    many = some(jax.ShapeDtypeStruct((3, *xs.shape), "float32"))

    def loss(backend: str, params: Any, many: Any) -> Any:
        return jnp.sum(inside_only(jax.vmap(lambda xs: run(backend, params, xs, carry)[1])(many), LENGTHS) ** 2)

    got = jax.block_until_ready(jax.jit(jax.grad(functools.partial(loss, "cudnn"), argnums=(0, 1)))(params, many))
    assert cudnn.runs() == ["forward", "data", "weights"]
    assert f" batch={3 * B} " in cudnn.calls("cudnnRNNForward")[0]
    want = jax.grad(functools.partial(loss, "scan"), argnums=(0, 1))(*in_double((params, many)))
    assert_close(got, want, 1e-6)


# (what is mapped of params, xs, carry; the transformation; calls of the library)
MAPPED: dict[str, tuple[tuple, Any, list[str]]] = {
    "sequences": ((None, 0, None), lambda f: jax.vmap(jax.grad(f, 1), (None, 0, None)), ["forward", "data"]),
    "gradients of parameters": (
        (None, 0, None), lambda f: jax.vmap(jax.grad(f), (None, 0, None)), ["forward"] * 3 + ["data", "weights"] * 2
    ),
    "parameters": ((0, None, None), lambda f: jax.vmap(jax.grad(f), (0, None, None)),
                   ["forward"] * 2 + ["data", "weights"] * 2),
    "carries": ((None, None, 0), lambda f: jax.vmap(jax.grad(f, 2), (None, None, 0)), ["forward", "data"]),
    "all": ((0, 0, 0), lambda f: jax.vmap(jax.grad(f, (0, 1, 2))), ["forward"] * 2 + ["data", "weights"] * 2),
}  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_of_gradients(cudnn: Recorder, name: str):
    """What each has of its own runs one after the other; what a larger batch serves is one call."""
    mapped, transformed, expected = MAPPED[name]
    run, arguments, *_ = single("plain", CELLS["gru"])
    many = tuple(
        a if m is None else some(jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), a), seed=n)
        for n, (a, m) in enumerate(zip(arguments, mapped, strict=True))
    )

    def loss(backend: str, *arguments: Any) -> Any:
        return jnp.sum(run(backend, *arguments)[1] ** 2)

    got = jax.jit(transformed(functools.partial(loss, "cudnn")))(*many)
    assert cudnn.runs() == expected
    assert_close(got, transformed(functools.partial(loss, "scan"))(*in_double(many)), 1e-6)


def test_what_forward_kept_is_used_as_it_was_or_not_at_all(cudnn: Recorder):
    """Of some of the sequences the run is repeated; of another order nobody gets gradients."""
    cell = CELLS["lstm"]
    params, xs, carry = problem(cell)
    asked = request(lengths=False, precision="highest")
    moving = Differentiable(params, jnp.moveaxis(xs, 1, 0), carry, None)
    constants, wanted = Constants(None, None, None, None), jax.tree.map(lambda _: True, moving)
    run = Problem(asked, moving, constants)
    result, kept = CUDNN.forward(run, True)
    want = CUDNN.backward(run, result, kept, result, wanted)
    mixed = kept._replace(place=jnp.flip(kept.place, 1))  # the stand-in would see it by itself
    assert np.isnan(CUDNN.backward(run, result, mixed, result, wanted).xs).all()
    half = jax.tree.map(lambda a: a[..., :2, :], moving._replace(params=None))._replace(params=params)
    fewer = dataclasses.replace(asked, batch_shape=(2,))
    result, part = jax.tree.map(lambda a: a[..., :2, :], result), jax.tree.map(lambda a: a[:, :2], kept)
    cudnn.forget()
    got = CUDNN.backward(Problem(fewer, half, constants), result, part, result, wanted)
    assert cudnn.runs() == ["forward", "data", "weights"]
    assert_close(got.xs, want.xs[:, :2], 0.0)


def test_on_another_device_than_the_gpu_the_plain_run_takes_over(cudnn: Recorder, monkeypatch: pytest.MonkeyPatch):
    """As where JAX sees a GPU, and these arrays lie on the CPU: the library has no call for that."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    run, arguments, *_ = single("plain", GRU(H + 3))

    def loss(backend: str, *arguments: Any) -> Any:
        return jnp.sum(run(backend, *arguments)[1] ** 2)

    got = jax.jit(jax.value_and_grad(functools.partial(loss, "cudnn"), (0, 1, 2)))(*arguments)
    assert not cudnn.runs()
    monkeypatch.undo()
    assert_close(got, jax.value_and_grad(functools.partial(loss, "scan"), (0, 1, 2))(*in_double(arguments)), 1e-6)


def test_rematerialization_and_jacobians(cudnn: Recorder):
    run, (params, xs, carry), *_ = single("plain", CELLS["lstm"])
    loss = lambda backend, xs: jnp.sum(run(backend, params, xs, carry)[1] ** 2)  # noqa: E731
    want = jax.grad(functools.partial(loss, "cudnn"))(xs)
    assert_close(jax.jit(jax.grad(jax.checkpoint(functools.partial(loss, "cudnn"))))(xs), want, 0.0)
    last = lambda backend, xs: run(backend, params, xs, carry)[0].h[0]  # noqa: E731
    jacobians = {b: (jax.jacrev(functools.partial(last, b))(xs), jax.jacfwd(functools.partial(last, b))(xs))
                 for b in ("cudnn", "scan")}  # fmt: skip
    assert_close(jacobians["cudnn"], jacobians["scan"], 1e-6)


def test_inside_shard_map(cudnn: Recorder):
    params, xs, _ = problem(CELLS["lstm"])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec("data")

    def gradient(xs: Any) -> Any:
        return jax.grad(lambda xs: rnncore.unroll(CELLS["lstm"], params, xs, backend="cudnn")[1].sum())(xs)

    parted = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=part, out_specs=part))(xs)
    assert_close(parted, gradient(xs), 0.0)


# -------------------------------------------------------------------------------------- refusals


class Other(LSTM):
    """A cell of its own: nobody knows what it computes."""


def request(**changes: Any) -> Request:
    """One that cuDNN takes, with changes."""
    plain = Request(
        cell=CELLS["lstm"], steps=T, batch_shape=(B,), input_size=D, dtype="float32", dtypes=frozenset({"float32"}),
        precision=None, platform="gpu", devices=1, lengths=True, resets=False, recurrent_mask=False, zoneout=False,
        return_states=False, checkpoint_every=None, recompute="nothing",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mgu": ({"cell": rnncore.MGU(H)}, "cuDNN has rnncore.LSTM, GRU and Elman, and MGU is none of them"),
    "subclass": ({"cell": Other(H)}, "Other is none of them"),
    "indrnn": ({"cell": rnncore.IndRNN(H)}, "IndRNN is none of them"),
    "peepholes": ({"cell": LSTM(H, peepholes=True)}, "this one has peepholes=True"),
    "coupled": ({"cell": LSTM(H, coupled=True)}, "this one has coupled=True"),
    "gate_fn": ({"cell": GRU(H, gate_fn=jax.nn.hard_sigmoid)}, "this one has gate_fn=hard_sigmoid"),
    "activation_fn": ({"cell": LSTM(H, activation_fn=jax.nn.relu)}, "this one has activation_fn=relu"),
    "elu": ({"cell": Elman(H, activation_fn=jax.nn.elu)}, "this one has activation_fn=elu"),
    "residual": ({"cell": Elman(H, residual=True)}, "this one has residual=True"),
    "heads": ({"cell": LSTM(H, recurrence=Heads(1))}, "this one has recurrence=Heads(num_heads=1)"),
    "dtypes": ({"dtypes": frozenset({"float32", "float64"})}, "one of them; parameters, inputs and carry are float3"),
    "float64": ({"dtype": "float64", "dtypes": frozenset({"float64"})}, "inputs and carry are float64"),
    "precision": ({"precision": "BF16_BF16_F32_X9"}, "jax.default_matmul_precision is 'BF16_BF16_F32_X9'"),
    "resets": ({"resets": True}, "resets: its call runs all steps"),
    "mask": ({"recurrent_mask": True}, "recurrent_mask: its"),
    "zoneout": ({"zoneout": True}, "zoneout: its"),
    "states": ({"return_states": True}, "return_states=True: its"),
    "checkpoint_every": ({"checkpoint_every": 8}, "checkpoint_every: its"),
    "recompute": ({"recompute": "gates"}, "recompute='gates': its"),
    "residual_dtype": ({"residual_dtype": "bfloat16"}, "residual_dtype='bfloat16': its"),
    "empty batch": ({"batch_shape": (2, 0)}, "no empty batch, and this one is (2, 0)"),
    "cpu": ({"platform": "cpu"}, "it needs an NVIDIA GPU, and JAX runs on cpu here"),
}


@pytest.mark.parametrize("name", [n for n in REFUSED if n != "cpu"])
def test_what_it_cannot_do_has_a_reason(cudnn: Recorder, name: str):
    changes, message = REFUSED[name]
    assert CUDNN.unsupported(request()) is None
    assert message in CUDNN.unsupported(request(**changes))


def test_every_field_of_a_request_is_thought_of():
    """A new kind of request must not run here by oversight: it is named in one of these."""
    looked_at = {key for changes, _ in REFUSED.values() for key in changes}
    of_no_matter = {"steps", "input_size", "devices", "lengths", "time_axis", "linear"}
    assert {field.name for field in dataclasses.fields(Request)} == looked_at | of_no_matter


def test_bfloat16_needs_a_newer_library(cudnn: Recorder, monkeypatch: pytest.MonkeyPatch):
    in_bfloat16 = request(dtype="bfloat16", dtypes=frozenset({"bfloat16"}))
    assert CUDNN.unsupported(in_bfloat16) is None
    monkeypatch.setattr(library, "version", lambda path: 91200)
    assert "cuDNN 9.13 or newer, and this one is of version 91200" in CUDNN.unsupported(in_bfloat16)
    assert CUDNN.unsupported(request()) is None


HALF: dict[str, Any] = {"dtype": "float16", "dtypes": frozenset({"float16"})}
CHOSEN: dict[str, tuple[dict[str, Any], str | None]] = {
    "small": ({}, None),
    "small, 16 bits": ({"cell": GRU(128), **HALF}, None),
    "persistent": ({"cell": LSTM(768), "input_size": 768, "batch_shape": (16,), **HALF}, None),
    "small forward only": ({"cell": LSTM(192)}, "no persistent algorithm for this"),
    "large": ({"cell": LSTM(768)}, "no persistent algorithm for this"),
    "bfloat16": ({"dtype": "bfloat16", "dtypes": frozenset({"bfloat16"})}, "no persistent algorithm for this"),
    "lengths": ({"cell": GRU(H), "lengths": True}, "its outputs past the length are zeros"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_it_is_chosen_where_a_persistent_algorithm_runs_both_ways(cudnn: Recorder, name: str):
    changes, reason = CHOSEN[name]
    asked = request(**{"lengths": False, **changes})
    assert CUDNN.unsupported(asked) is None
    assert CUDNN.why_not_by_default(asked) is None if reason is None else reason in CUDNN.why_not_by_default(asked)


def test_it_is_chosen_before_the_scan(cudnn: Recorder):
    params, xs, _ = problem(CELLS["lstm"])
    assert rnncore.explain_backend(CELLS["lstm"], params, xs).name == "cudnn"
    rnncore.unroll(CELLS["lstm"], params, xs)
    assert cudnn.runs() == ["forward"]
    choice = rnncore.explain_backend(CELLS["lstm"], params, xs, seq_lengths=LENGTHS)
    assert choice.name != "cudnn" and "zeros" in choice.rejected["cudnn"]


def test_which_machines_have_it(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    assert library.missing("cpu") == REFUSED["cpu"][1]
    monkeypatch.setattr(_compat, "platform_version", lambda: "rocm 70200")
    assert "this is one of AMD's" in library.missing("gpu")
    monkeypatch.setattr(_compat, "platform_version", lambda: "cuda 13000")
    monkeypatch.setattr(library, "find", lambda: None)
    assert "libcudnn.so.9 is not found: it comes with JAX's packages for CUDA" in library.missing("gpu")
    monkeypatch.setattr(library, "find", lambda: recorder.path)
    assert library.missing("gpu") is None
    monkeypatch.setattr(library, "version", lambda path: 80907)
    assert "it needs cuDNN 9, and" in library.missing("gpu")
    monkeypatch.undo()
    monkeypatch.setattr(_compat, "platform_version", lambda: "cuda 13000")
    monkeypatch.setattr(library, "find", lambda: recorder.path)
    monkeypatch.setattr(compiler, "find", lambda: None)
    assert "no C++ compiler is found" in library.missing("gpu")


def test_the_version_is_the_librarys_own(recorder: Recorder):
    assert library.version(recorder.path) == recorder.library.version == 91900


def test_it_is_found_in_nvidias_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "nvidia" / "cudnn" / "lib" / library.FILE
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert library.find.__wrapped__() == str(file)


# -------------------------------------------------------------------------------------- errors


def test_a_file_that_is_no_cudnn_is_an_error_with_its_name():
    nothing = built('extern "C" int nothing() { return 0; }')
    with pytest.raises(RuntimeError, match=rf"cuDNN \({nothing}\): no function cudnnGetErrorString"):
        library.Library(nothing)
    with pytest.raises(RuntimeError, match=r"cuDNN \(/no/such.so\): .*cannot open"):
        library.Library("/no/such.so")


def test_errors_of_the_library_are_ours(cudnn: Recorder, monkeypatch: pytest.MonkeyPatch):
    cell = LSTM(9)
    params, xs, _ = problem(cell)
    monkeypatch.setattr(algorithm, "choose", lambda *given: 2)  # that of another day: PERSIST_DYNAMIC
    with pytest.raises(RuntimeError, match=r"cudnnSetRNNDescriptor_v8: CUDNN_STATUS_NOT_SUPPORTED \(3000\)"):
        rnncore.unroll(cell, params, xs, backend="cudnn")
    monkeypatch.setattr(algorithm, "choose", lambda *given: algorithm.PERSIST_STATIC)
    with pytest.raises(Exception, match="rnncore's call of cuDNN: cudnnRNNForward: CUDNN_STATUS_NOT_SUPPORTED"):
        jax.block_until_ready(rnncore.unroll(cell, params, xs, seq_lengths=LENGTHS, backend="cudnn"))
    monkeypatch.undo()


def test_the_handlers_for_a_gpu_compile_here_too():
    """All but their stream is what the other tests run."""
    handlers, _ = compiler.library(library.source(), "the calls of cuDNN")
    assert all(hasattr(handlers, f"rnn_{name}") for name in library.HANDLERS)


# -------------------------------------------------------------------------------------- stacks

STACKS: dict[str, tuple[Stack, Any]] = {
    "two layers": (Stack(CELLS["lstm"], num_layers=2), None),
    "two layers, lengths": (Stack(CELLS["lstm"], num_layers=2), LENGTHS),
    "both directions": (Stack(CELLS["tanh"], bidirectional=True), None),
    "two layers of both": (Stack(CELLS["lstm"], num_layers=2, bidirectional=True), LENGTHS),
    "three layers of both": (Stack(CELLS["gru"], num_layers=3, bidirectional=True), None),
    "dropout without a key": (Stack(CELLS["relu"], num_layers=2, dropout=0.5), None),
    "learned carry": (Stack(CELLS["lstm"], num_layers=2, bidirectional=True, learned_carry=True), LENGTHS),
}


def stack_problem(stack: Stack) -> tuple[Any, Any, Any]:
    shapes = jax.eval_shape(lambda: (stack.init(jax.random.key(0), D), jnp.zeros((B, T, D)), stack.initial_carry((B,))))
    return some(shapes)


def stacked(stack: Stack, lengths: Any, **options: Any) -> Any:
    def run(backend: str, params: Any, xs: Any, carry: Any) -> Any:
        return rnncore.unroll_stack(
            stack, params, xs, initial_carry=None if stack.learned_carry else carry, seq_lengths=lengths,
            backend=backend, **options,
        )  # fmt: skip

    return run


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_one_call(cudnn: Recorder, name: str):
    stack, lengths = STACKS[name]
    compare(stacked(stack, lengths), stack_problem(stack), lengths)
    assert cudnn.runs() == ["forward", "data", "weights"]


def test_layers_are_calls_of_their_own_where_these_are_faster(cudnn: Recorder):
    """A GRU with lengths runs over the padding, persistently; two of them in one call would not."""
    stack = Stack(CELLS["gru"], num_layers=2, bidirectional=True)
    compare(stacked(stack, LENGTHS), stack_problem(stack), LENGTHS)
    assert cudnn.runs().count("forward") == 4 and not cudnn.calls("cuMemcpyDtoHAsync_v2")
    half = {"dtype": "float16", "dtypes": frozenset({"float16"}), "batch_shape": (16,), "lengths": False}
    persistent = request(cell=LSTM(768), input_size=768, **half)
    assert not CUDNN.runs_layers(persistent, 2, 1) and CUDNN.runs_layers(persistent, 1, 1)
    assert CUDNN.runs_layers(request(cell=LSTM(700), **half), 2, 2)  # standard either way
    assert CUDNN.runs_layers(request(cell=LSTM(64), **half), 4, 2)  # the one for small sizes either way


@pytest.mark.ci
def test_a_stack_in_every_mode(cudnn: Recorder):
    """Higher orders run the scan, over layers and directions that end where the library's do."""
    stack, lengths = STACKS["two layers of both"]
    arguments = stack_problem(stack)
    run, moved = stacked(stack, lengths), some(arguments, seed=3)

    def second(backend: str, arguments: Any, moved: Any) -> Any:
        def loss(*arguments: Any) -> Any:
            carry, ys = run(backend, *arguments)
            return jnp.sum(jnp.sin(inside_only(ys, lengths))) + sum(jnp.sum(a * a) for a in jax.tree.leaves(carry))

        return jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), arguments, moved)

    got = jax.jit(functools.partial(second, "cudnn"))(arguments, moved)
    want = jax.jit(functools.partial(second, "scan"))(*in_double((arguments, moved)))
    assert_close(got, want, 3e-6)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"bidirectional": True, "merge": "sum"}], ids=["dropout", "merge"]
)
def test_what_the_library_puts_together_in_another_way_is_a_call_for_each(cudnn: Recorder, options: dict[str, Any]):
    stack = Stack(CELLS["lstm"], num_layers=2, **options)
    key = jax.random.key(5) if stack.dropout else None
    compare(stacked(stack, None, key=key), stack_problem(stack), None)
    assert cudnn.runs().count("forward") == 2 * stack.directions


def test_a_stack_time_major_with_an_output_dtype(cudnn: Recorder):
    stack = Stack(CELLS["lstm"], num_layers=2, bidirectional=True)
    params, xs, carry = stack_problem(stack)
    options: dict[str, Any] = {"initial_carry": carry, "seq_lengths": LENGTHS, "backend": "cudnn"}
    ends, ys = rnncore.unroll_stack(stack, params, xs, **options)
    turned_ends, turned = rnncore.unroll_stack(
        stack, params, jnp.moveaxis(xs, 1, 0), time_major=True, output_dtype=jnp.bfloat16, **options
    )
    assert turned.dtype == jnp.bfloat16
    assert_close((turned_ends, turned), (ends, jnp.moveaxis(ys, 0, 1).astype(jnp.bfloat16)), 0.0)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (Stack(CELLS["lstm"], num_layers=2), {"return_states": True}, "return_states=True: its"),
        (Stack(CELLS["lstm"], num_layers=2), {"resets": np.zeros((B, T), bool)}, "resets: its"),
        (Stack(CELLS["lstm"], num_layers=2), {"dtype": jnp.float64}, "are float64"),
        (Stack(CELLS["lstm"], num_layers=2), {"carry_dtype": jnp.float64}, "are float32, float64"),
        (Stack(CELLS["lstm"], zoneout=rnncore.LSTMCarry(0.1, None)), {}, "zoneout: its"),
        (Stack(CELLS["lstm"], recurrent_dropout=0.1), {"key": jax.random.key(0)}, "recurrent_mask: its"),
        (Stack(rnncore.MGU(H), num_layers=2), {}, "MGU is none of them"),
    ],
    ids=["states", "resets", "float64", "carry", "zoneout", "recurrent_dropout", "mgu"],
)  # fmt: skip
def test_a_stack_is_refused_for_the_same_reasons(cudnn: Recorder, stack: Stack, options: dict[str, Any], message: str):
    params = stack.init(jax.random.key(0), D)
    with pytest.raises(NotImplementedError, match="backend='cudnn'.*" + message.replace("(", r"\(")):
        rnncore.unroll_stack(stack, params, jnp.ones((B, T, D), jnp.float32), backend="cudnn", **options)


def test_a_stack_is_checked_as_unroll_checks(cudnn: Recorder):
    stack = Stack(CELLS["lstm"], num_layers=2)
    params, xs, _ = stack_problem(stack)
    first, second = params.layers
    wrong = params._replace(layers=(first, (second[0]._replace(bias=jnp.zeros(3, jnp.float32)),)))
    for given, lengths, message in ((wrong, None, r"params.bias has shape \(3,\)"), (params, [7] * B, "expected 0 to")):
        with pytest.raises(ValueError, match=message):
            rnncore.unroll_stack(stack, given, xs, seq_lengths=lengths, backend="cudnn")
