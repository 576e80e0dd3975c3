"""The peers that need a GPU, as far as a CPU can check them: layouts, choices, and stand-ins for their kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections import Counter

import cases
import jax
import jax.numpy as jnp
import numpy as np
import plain_kernels
import pytest

import rnncore
from benchmarks import trial, workloads
from benchmarks.peers import CONTENDERS, Case, flashrnn_peer, jax_cudnn, rnncore_peer, torch_peer
from benchmarks.peers.own_cell import OwnLSTM
from benchmarks.peers.problem import make_cell, make_problem
from benchmarks.peers.reference import reference
from benchmarks.report import gpu
from rnncore._command import timing
from rnncore.kernels import kernel_body, mosaic_gpu, pallas_tpu
from rnncore.sequence.backends import BACKENDS

LSTM, LAYERS = workloads.WORKLOADS["tiny-lstm"], workloads.WORKLOADS["tiny-layers"]
HEADS = workloads.Workload("heads", "a test", "lstm", 2, 6, 5, 4, heads=2, recurrence="heads")


def errors(peer, contender: str, case: Case, measurements: tuple[str, ...]) -> dict[str, float]:
    """The errors against float64."""
    problem = make_problem(case.workload, case.dtype, case.input_product)
    right = reference(case.workload, problem, case.input_product, "same")
    found = {}
    for measurement in measurements:
        built = peer.build(contender, case, problem, measurement)
        found[measurement] = timing.relative_error(built.result(), right[measurement])
    return found


def test_jax_experimental_rnn_gets_the_right_weights(monkeypatch):
    """With JAX's own reference implementation in place of its kernel, and JAX's own reader of the flat buffer."""
    from jax.experimental import rnn

    def stand_in(x, h, c, weights, lengths, features, hidden, layers, dropout, bidirectional, precision):
        assert precision == jax.lax.Precision.HIGHEST
        split = rnn.unpack_lstm_weights(weights, features, hidden, layers, bidirectional)
        return rnn.lstm_ref(x, h, c, *split, lengths, features, hidden, layers, dropout, bidirectional)

    monkeypatch.setattr(rnn, "lstm", stand_in)
    found = errors(jax_cudnn.JaxCudnnPeer(), "jax.experimental.rnn", Case(LAYERS), ("forward", "gradient"))
    assert max(found.values()) < 2e-6 and min(found.values()) > 0


def test_jax_experimental_rnn_says_what_it_cannot_do():
    peer = jax_cudnn.JaxCudnnPeer()
    assert peer.contenders("gru") == () and peer.unavailable("gpu") is None and "runs on cpu" in peer.unavailable("cpu")
    assert "takes float32" in peer.why_not("", Case(LSTM, "bfloat16"))
    assert "not their products" in peer.why_not("", Case(LSTM, input_product=False))


@pytest.mark.parametrize("workload", [LSTM, HEADS], ids=lambda w: w.name)
def test_flashrnn_gets_the_right_recurrent_kernel(workload):
    """(gate, head, output, input) gives the same pre-activations as rnncore's own product."""
    cell, params = make_cell(workload), make_problem(workload, "float32", True).params[0]
    kernel = flashrnn_peer.to_flash(params, workload.heads)
    size = workload.hidden // workload.heads
    assert kernel.shape == (4, workload.heads, size, size)
    h = np.random.default_rng(1).standard_normal((3, workload.heads, size)).astype(np.float32)
    want = cell.recurrent_matmul(params, jnp.asarray(h.reshape(3, -1)))
    np.testing.assert_allclose(np.einsum("ghdp,bhp->bghd", kernel, h).reshape(3, -1), want, atol=1e-6)
    arrays = {"R": kernel, "b": params.bias.reshape(4, workload.heads, size)}
    back = flashrnn_peer.from_flash(arrays, params.input_kernel, workload.heads, size)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def plain_flashrnn(Wx, R, b, states, function, backend, dtype):
    """What FlashRNN documents, in plain PyTorch: outputs (states, B, T, heads, d), the first state being h."""
    import torch

    assert (states, function, backend, dtype) == (None, "lstm", "triton_fused", "float32")
    h = c = torch.zeros(Wx.shape[0], *Wx.shape[3:])
    path = []
    for t in range(Wx.shape[1]):
        i, f, z, o = (Wx[:, t] + torch.einsum("ghdp,bhp->bghd", R, h) + b).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        path.append(torch.stack([h, c]))
    return torch.stack(path, 2), None


@pytest.mark.parametrize("product", [True, False])
def test_flashrnn_runs_as_documented(product, monkeypatch):
    peer = flashrnn_peer.FlashRNNPeer()
    if importlib.util.find_spec("torch") is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
        assert peer.unavailable("gpu") == "torch is not installed"
        return
    module = types.ModuleType("flashrnn.flashrnn")
    monkeypatch.setattr(module, "flashrnn", plain_flashrnn, raising=False)
    monkeypatch.setitem(sys.modules, "flashrnn", types.ModuleType("flashrnn"))
    monkeypatch.setitem(sys.modules, "flashrnn.flashrnn", module)
    measurements = workloads.MEASUREMENTS if product else ("gradient",)
    found = errors(peer, "FlashRNN triton_fused", Case(HEADS, input_product=product), measurements)
    assert max(found.values()) < 2e-6 and min(found.values()) > 0


def test_flashrnn_says_what_it_cannot_do():
    peer = flashrnn_peer.FlashRNNPeer()
    wide = Case(workloads.WORKLOADS["W1-768x1"], "bfloat16", "default", False, "gpu")
    assert "up to 128 units" in peer.why_not("FlashRNN triton_fused", wide)
    assert peer.why_not("FlashRNN cuda_fused", wide) is None
    assert "one layer" in peer.why_not("FlashRNN cuda", Case(LAYERS))


H200 = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
A10 = types.SimpleNamespace(major=8, minor=6, multi_processor_count=72)


@pytest.mark.parametrize(
    ("name", "dtype", "device", "forward", "backward"),
    [
        ("W4-lstm768", "float16", H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        ("W4-lstm768", "bfloat16", H200, "STANDARD", "STANDARD"),
        ("W4-lstm768", "float32", H200, "STANDARD", "STANDARD"),
        ("W4-lstm768", "float16", A10, "STANDARD", "STANDARD"),
        ("W4-gru768", "float16", H200, "STANDARD", "STANDARD"),
        ("W5-H40", "float32", H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        ("W5-H128", "float32", H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        ("W5-H192", "float16", H200, "PERSIST_STATIC_SMALL_H", "STANDARD"),
        ("W5-H64-L4", "float32", H200, "PERSIST_STATIC_SMALL_H", "PERSIST_STATIC_SMALL_H"),
        ("W2-768x1-B2", "float16", H200, "STANDARD", "STANDARD"),
        ("W2-768x1-B128", "float16", H200, "PERSIST_STATIC", "PERSIST_STATIC"),
        ("W2-768x1-B256", "float16", H200, "STANDARD", "STANDARD"),
    ],
)
def test_the_algorithm_that_pytorch_asks_cudnn_for(name, dtype, device, forward, backward):
    picked = [torch_peer.pick_algorithm(workloads.WORKLOADS[name], dtype, device, way) for way in (True, False)]
    assert picked == [forward, backward]


def test_torch_is_told_its_precision():
    """The old names of PyTorch up to 2.8, and the new ones."""
    Space = types.SimpleNamespace
    old = Space(cuda=Space(matmul=Space()), cudnn=Space())
    new = Space(cuda=Space(matmul=Space()), cudnn=Space(rnn=Space()))
    for precision, tf32 in (("float32", (False, False)), ("tf32", (True, True)), ("default", (False, True))):
        torch_peer.pin_precision(Space(backends=old), precision)
        torch_peer.pin_precision(Space(backends=new), precision)
        assert (old.cuda.matmul.allow_tf32, old.cudnn.allow_tf32) == tf32
        names = new.cuda.matmul.fp32_precision, new.cudnn.rnn.fp32_precision
        assert names == tuple("tf32" if is_on else "ieee" for is_on in tf32)


def test_rnncore_on_a_gpu_says_what_is_not_there(monkeypatch):
    peer = rnncore_peer.RnncorePeer()
    assert peer.absent("rnncore scan", "gpu") is None
    assert "needs an NVIDIA GPU" in peer.absent("rnncore cudnn", "cpu")
    given = Case(LSTM, input_product=False, platform="gpu")
    assert "not their products" in peer.why_not("rnncore cudnn", given)
    # JAX runs on a CPU here, so the backend itself says why not, in its own words.
    assert "cudnn" in peer.why_not("rnncore cudnn", Case(LSTM, platform="gpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "rnncore.gpu" in peer.absent("rnncore scan, CUDA graph", "gpu")


def test_the_loop_as_a_graph_is_an_option_of_the_compiler(monkeypatch):
    seen = []
    original = timing.compile_step
    monkeypatch.setattr(timing, "compile_step", lambda *a: seen.append(a[2]) or original(*a[:2]))
    module = types.ModuleType("rnncore.gpu")
    monkeypatch.setattr(module, "loop_as_graph_options", lambda: {"graph": "WHILE"}, raising=False)
    monkeypatch.setitem(sys.modules, "rnncore.gpu", module)
    peer, problem = rnncore_peer.RnncorePeer(), make_problem(LSTM, "float32", True)
    for contender in ("rnncore scan", "rnncore scan, CUDA graph"):
        peer.build(contender, Case(LSTM, platform="gpu"), problem, "forward")
    assert seen == [None, {"graph": "WHILE"}]


MOSAIC, OWN, TPU = rnncore_peer.MOSAIC, rnncore_peer.OWN, rnncore_peer.TPU
NARROW = workloads.Workload("narrow", "a test", "lstm", 2, 6, 5, 32, heads=2, recurrence="heads", own_cell=True)
SMALL_GRU = workloads.Workload("gru", "a test", "gru", 3, 6, 5, 16)


@pytest.fixture
def as_if_there(monkeypatch):
    """Plain kernels in place of those of a GPU and of a TPU, and no question after the device."""
    cases.forget()
    monkeypatch.setattr(mosaic_gpu, "missing_gpu", lambda platform: None)
    monkeypatch.setattr(pallas_tpu, "missing_platform", lambda platform: None)
    monkeypatch.setattr(BACKENDS["mosaic_gpu"], "kernels", plain_kernels.PLAIN.kernels)
    yield
    cases.forget()


@pytest.mark.parametrize(
    ("workload", "product", "contender"),
    [(NARROW, True, MOSAIC), (NARROW, False, MOSAIC), (NARROW, True, OWN), (NARROW, False, OWN),
     (SMALL_GRU, True, MOSAIC), (SMALL_GRU, False, MOSAIC)],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_the_kernels_run_on_the_common_weights(workload, product, contender, as_if_there):
    peer = rnncore_peer.RnncorePeer()
    case = Case(workload, "bfloat16", "default", product, "gpu")
    assert contender in peer.contenders(workload.cell) and peer.asked(contender, workload)
    assert peer.absent(contender, "gpu") is None and peer.why_not(contender, case) is None
    found = errors(peer, contender, case, workloads.BOTH)
    assert 1e-4 < min(found.values()) and max(found.values()) < 2e-2  # of bfloat16
    problem = make_problem(workload, "bfloat16", product)
    told = peer.build(contender, case, problem, "forward").algorithm
    size = workload.hidden // workload.heads
    assert told == f"mosaic_gpu, one block of {size} units to a head; backend=None takes scan"


def test_the_own_cell_is_the_lstm_and_is_asked_once(as_if_there):
    peer = rnncore_peer.RnncorePeer()
    case = Case(NARROW, "bfloat16", "default", True, "gpu")
    problem = make_problem(NARROW, "bfloat16", True)
    one, other = (peer.build(name, case, problem, "forward").result() for name in (MOSAIC, OWN))
    np.testing.assert_allclose(one, other, atol=1e-2)
    assert [w.name for w in workloads.WORKLOADS.values() if peer.asked(OWN, w)] == ["W1-64x12"]
    assert OWN not in peer.contenders("gru") and {MOSAIC, OWN, TPU} < set(CONTENDERS)


def test_what_the_kernels_cannot_do_has_the_reason_of_the_backend(as_if_there):
    peer = rnncore_peer.RnncorePeer()
    named = workloads.WORKLOADS
    for name, dtype, product, contender, why in (
        ("W1-768x1", "float32", True, MOSAIC, "bfloat16 or float16"),
        ("W5-H40", "bfloat16", True, MOSAIC, "16 units at a time"),
        ("W8-lstm-H256-T256", "bfloat16", True, MOSAIC, "Diagonal recurrences have no matrix"),
        ("W1-768x1", "bfloat16", True, MOSAIC, "does not fit"),
        ("W4-lstm768", "float16", True, TPU, "float32 or bfloat16"),
    ):
        case = Case(named[name], dtype, "default", product, "gpu")
        assert why in peer.why_not(contender, case) and "backend=" in peer.why_not(contender, case)
    for name in ("W1-64x12", "W1-32x24", "W1-128x6", "W1-768x1", "W11-gru64x12", "W11-gru768x1"):
        for contender in (TPU,) if "768x1" in name else (MOSAIC, TPU):
            assert peer.why_not(contender, Case(named[name], "bfloat16", "default", False, "gpu")) is None, name


def test_mosaics_kernels_are_tried_once_and_proved_ones_never(monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "fault", lambda contender, case: tried.append(case.workload.name) or "it hangs")
    peer = rnncore_peer.RnncorePeer()
    cases = [Case(workloads.WORKLOADS[f"W1-{name}"], "bfloat16") for name in ("64x12", "128x6")]
    assert [peer.fault(MOSAIC, case) for case in cases * 2] == ["it hangs"] * 4 and tried == ["W1-64x12"]
    assert peer.fault("rnncore scan", cases[0]) is None and peer.fault(TPU, cases[0]) is None
    monkeypatch.setattr(rnncore_peer, "CHECKED", True)
    assert rnncore_peer.RnncorePeer().fault(MOSAIC, cases[0]) is None


def test_a_trial_says_what_went_wrong(monkeypatch):
    case, worked = Case(LSTM), trial.WORKS.encode()

    def ending(status=0, out=worked, err=b"", late=False):
        def run(command, **options):
            assert command[1:4] == ["-m", "benchmarks.trial", "x"] and options["timeout"] == 3
            if late:
                raise subprocess.TimeoutExpired(command, 3, out)
            return subprocess.CompletedProcess(command, status, out, err)

        monkeypatch.setattr(subprocess, "run", run)
        return trial.fault("x", case, 3)

    assert ending() is None
    assert ending(1, err=b"trace\nXlaError: illegal address\n").endswith("exit status 1: XlaError: illegal address")
    assert ending(-9).endswith("exit status -9: no message")
    assert ending(late=True).endswith("not at its end after 3 s")
    # No second process gets the device, so nothing is known.
    assert ending(1, out=b"", err=b"busy") is None and ending(late=True, out=None) is None


def test_a_trial_runs_a_gradient(capsys, monkeypatch):
    built = []
    original = rnncore_peer.RnncorePeer.build
    monkeypatch.setattr(rnncore_peer.RnncorePeer, "build", lambda *a: built.append((a[1], a[4])) or original(*a))
    trial.main(["rnncore scan", "tiny-lstm", "float32", "float32", "0"])
    assert built == [("rnncore scan", "gradient")] and trial.WORKS in capsys.readouterr().out


def test_a_floor_is_shown_for_all_steps():
    cells = gpu.least(workloads.WORKLOADS["W1-64x12"].floor, 1000)
    assert len(cells) == len(gpu.HEAD) and cells[:4] == ["*floor, an estimate*", "bfloat16", "-", "not included"]
    assert cells[12:14] == ["0.4 to 0.6", "-"] and cells[-1].startswith("H200, 0.4 to 0.6 us a step; an estimate")


def test_the_own_cell_is_the_same_work_for_a_kernel():
    """As many operations of every kind as the built-in LSTM, forward and backward."""
    own, built_in = (kernel_body.of(cell, (64, 8)) for cell in (OwnLSTM(64), rnncore.LSTM(64)))
    for a, b in ((own._forward, built_in._forward), (own._backward, built_in._backward)):
        assert Counter(e.primitive.name for e in a.eqns) == Counter(e.primitive.name for e in b.eqns)
