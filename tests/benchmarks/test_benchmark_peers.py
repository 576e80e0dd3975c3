"""Peers that need a GPU, as far as a CPU can check them: choices, and stand-ins for their kernels."""

from __future__ import annotations

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
from benchmarks import workloads
from benchmarks.peers import Case, flashrnn_peer, rnncore_peer, torch_peer
from benchmarks.peers.problem import OwnLSTM, make_cell, make_problem, reference
from rnncore import gpu
from rnncore._command import timing
from rnncore.kernels import kernel_body, mosaic_gpu, pallas_tpu
from rnncore.sequence.backends import BACKENDS

LSTM = workloads.WORKLOADS["tiny-lstm"]
MOSAIC, OWN, TPU = "rnncore mosaic_gpu", "rnncore mosaic_gpu, own cell", "rnncore pallas_tpu"
PEER = rnncore_peer.RnncorePeer()


HEADS = workloads.Workload("heads", "a test", "lstm", 2, 6, 5, 4, heads=2)


def errors(contender: str, case: Case, peer=PEER) -> dict[str, float]:
    """The errors against float64."""
    problem = make_problem(case.workload, case.dtype, case.input_product)
    right = reference(case.workload, problem, case.input_product)
    return {
        m: timing.relative_error(peer.build(contender, case, problem, m).result(), right[m])
        for m in workloads.MEASUREMENTS
    }


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


@pytest.mark.parametrize("workload", [LSTM, HEADS], ids=lambda w: w.name)
def test_flashrnn_gets_the_right_recurrent_kernel(workload):
    """(gate, head, output, input) gives the same pre-activations as rnncore's own product."""
    cell, params = make_cell(workload), make_problem(workload, "float32", True).params
    heads, size = workload.heads, workload.hidden // workload.heads
    kernel = flashrnn_peer.to_flash(params, heads)
    h = np.random.default_rng(1).standard_normal((3, heads, size)).astype(np.float32)
    want = cell.recurrent_matmul(params, jnp.asarray(h.reshape(3, -1)))
    np.testing.assert_allclose(np.einsum("ghdp,bhp->bghd", kernel, h).reshape(3, -1), want, atol=1e-6)
    arrays = {"R": kernel, "b": params.bias.reshape(4, heads, size), "W": params.input_kernel}
    jax.tree.map(np.testing.assert_array_equal, flashrnn_peer.from_flash(arrays, heads, workload.hidden), params)


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
    pytest.importorskip("torch")
    module = types.ModuleType("flashrnn.flashrnn")
    monkeypatch.setattr(module, "flashrnn", plain_flashrnn, raising=False)
    monkeypatch.setitem(sys.modules, "flashrnn", types.ModuleType("flashrnn"))
    monkeypatch.setitem(sys.modules, "flashrnn.flashrnn", module)
    peer = flashrnn_peer.FlashRNNPeer()
    found = errors("FlashRNN triton_fused", Case(HEADS, input_product=product), peer)
    assert max(found.values()) < 2e-6 and min(found.values()) > 0


def test_flashrnn_says_what_it_cannot_do():
    wide = Case(workloads.WORKLOADS["W1-768x1"], "bfloat16", "default", False, "gpu")
    assert "up to 128 units" in flashrnn_peer.FlashRNNPeer().why_not("FlashRNN triton_fused", wide)


def test_the_algorithm_of_cudnn_is_named():
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(get_device_properties=lambda number: properties),
        backends=types.SimpleNamespace(cudnn=types.SimpleNamespace(version=lambda: 91900)),
    )
    case = Case(workloads.WORKLOADS["W4-lstm768"], "float16", "default", True, "gpu")
    assert torch_peer.cudnn_algorithm(torch, case, "forward") == "cuDNN 91900: PERSIST_STATIC"
    small = Case(workloads.WORKLOADS["W5-H128"], "float32", "tf32", True, "gpu")
    told = torch_peer.cudnn_algorithm(torch, small, "gradient")
    assert told == "cuDNN 91900: forward PERSIST_STATIC_SMALL_H, backward PERSIST_STATIC_SMALL_H"


def test_what_a_backend_cannot_do_has_its_own_reason(as_if_there):
    named = workloads.WORKLOADS
    for name, dtype, product, contender, why in (
        ("W1-768x1", "float32", True, MOSAIC, "bfloat16 or float16"),
        ("W5-H40", "bfloat16", True, MOSAIC, "heads of 64 units, and these have 40"),
        ("W1-768x1", "bfloat16", True, MOSAIC, "heads of 64 units, and these have 768"),
        ("W4-lstm768", "float16", True, TPU, "float32 or bfloat16"),
        ("W1-768x1", "float32", True, "rnncore cudnn", "cudnn"),  # JAX runs on a CPU here
    ):
        told = PEER.why_not(contender, Case(named[name], dtype, "default", product, "gpu"))
        assert why in told and "backend=" in told
    given = Case(LSTM, input_product=False, platform="gpu")
    assert "not their products" in PEER.why_not("rnncore cudnn", given)
    assert PEER.why_not(MOSAIC, Case(named["W1-64x12"], "bfloat16", "default", False, "gpu")) is None


def test_the_loop_as_a_graph_is_an_option_of_the_compiler(monkeypatch):
    seen = []
    original = timing.compile_step
    monkeypatch.setattr(timing, "compile_step", lambda *a: seen.append(a[2]) or original(*a[:2]))
    monkeypatch.setattr(gpu, "loop_as_graph_options", lambda: {"graph": "WHILE"})
    problem = make_problem(LSTM, "float32", True)
    for contender in (rnncore_peer.SCAN, rnncore_peer.GRAPH):
        PEER.build(contender, Case(LSTM, platform="gpu"), problem, "forward")
    assert seen == [None, {"graph": "WHILE"}]


@pytest.fixture
def as_if_there(monkeypatch):
    """Plain kernels in place of those of a GPU and of a TPU, and no question after the device."""
    cases.forget()
    monkeypatch.setattr(mosaic_gpu, "missing_gpu", lambda platform: None)
    monkeypatch.setattr(pallas_tpu, "missing_platform", lambda platform: None)
    monkeypatch.setattr(BACKENDS["mosaic_gpu"], "kernels", plain_kernels.PLAIN.kernels)
    yield
    cases.forget()


NARROW = workloads.Workload("narrow", "a test", "lstm", 2, 6, 5, 128, heads=2, own_cell=True)
SMALL_GRU = workloads.Workload("gru", "a test", "gru", 3, 6, 5, 64)


@pytest.mark.parametrize(
    ("workload", "product", "contender"), [(NARROW, True, OWN), (NARROW, False, OWN), (SMALL_GRU, True, MOSAIC)],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_the_kernels_run_on_the_common_weights(workload, product, contender, as_if_there):
    case = Case(workload, "bfloat16", "default", product, "gpu")
    assert contender in PEER.contenders(workload.cell) and PEER.asked(contender, workload)
    assert PEER.absent(contender, "gpu") is None and PEER.why_not(contender, case) is None
    found = errors(contender, case)
    assert 1e-4 < min(found.values()) and max(found.values()) < 2e-2  # of bfloat16


def test_the_own_cell_is_the_same_work_for_a_kernel_and_runs_at_one_shape():
    """As many operations of every kind as the built-in LSTM, forward and backward."""
    assert [w.name for w in workloads.WORKLOADS.values() if PEER.asked(OWN, w)] == ["W1-64x12"]
    own, built_in = (kernel_body.of(cell, (64, 8)) for cell in (OwnLSTM(64), rnncore.LSTM(64)))
    for a, b in ((own._forward, built_in._forward), (own._backward, built_in._backward)):
        assert Counter(e.primitive.name for e in a.eqns) == Counter(e.primitive.name for e in b.eqns)
