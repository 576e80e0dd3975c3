"""FlashRNN (NX-AI/flashrnn): Triton and CUDA kernels for PyTorch on NVIDIA GPUs.

Its layers take x W; where the product belongs to the call, PyTorch forms it before.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

import rnncore
from benchmarks.peers import torch_peer
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

BACKENDS = ("triton_fused", "cuda_fused")


class FlashRNNPeer(Peer):
    """`flashrnn.flashrnn.flashrnn(Wx, R, b, function="lstm", backend=...)`."""

    library = package = module = "flashrnn"

    def absent(self, contender: str, platform: str) -> str | None:
        if platform != "gpu":
            return f"it needs an NVIDIA GPU, and JAX runs on {platform} here"
        return super().absent(contender, platform) or torch_peer.TorchPeer().absent("torch", platform)

    def contenders(self, cell: str) -> tuple[str, ...]:
        # Its GRU and Elman network have other gates and biases; its own benchmark is of the LSTM.
        return tuple(f"FlashRNN {backend}" for backend in BACKENDS) if cell == "lstm" else ()

    def why_not(self, contender: str, case: Case) -> str | None:
        if contender.endswith("triton_fused") and case.workload.hidden // case.workload.heads > 128:
            return "FlashRNN's Triton kernel keeps R in registers: heads of up to 128 units"
        return None

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import torch

        found = importlib.import_module("flashrnn.flashrnn").flashrnn
        kernel = found if callable(found) else found.flashrnn  # the function, or the module that has it
        workload, backend = case.workload, contender.removeprefix("FlashRNN ")
        batch, steps, features, hidden = workload.shape
        heads, size = workload.heads, hidden // workload.heads
        torch_peer.pin_precision(torch, case.precision)
        tensor = torch_peer.to_tensor(torch, case.dtype, "cuda" if case.platform == "gpu" else "cpu")
        params = problem.params
        arrays = {"R": to_flash(params, heads), "b": np.asarray(params.bias).reshape(4, heads, size)}
        if case.input_product:
            arrays["W"] = np.asarray(params.input_kernel).reshape(features, -1)
        named = {name: tensor(a).requires_grad_() for name, a in arrays.items()}

        def run(xs: Any) -> Any:
            products = xs @ named["W"] if case.input_product else xs
            states = kernel(
                Wx=products.reshape(batch, steps, 4, heads, size), R=named["R"], b=named["b"], states=None,
                function="lstm", backend=backend, dtype=case.dtype,
            )[0]  # fmt: skip
            return states[0].reshape(batch, steps, hidden)

        def back(grads: dict[str, np.ndarray]) -> rnncore.CellParams:
            given: Any = grads["W"].reshape(features, 4, hidden) if case.input_product else None
            return from_flash(grads, given, heads, size)

        xs, cotangent = tensor(problem.xs), tensor(problem.cotangent)
        return torch_peer.program(torch, run, named, back, xs, cotangent, measurement, contender)


def to_flash(params: rnncore.CellParams, heads: int) -> np.ndarray:
    """The recurrent kernel as (gate, head, output unit, input unit); a dense one is one head."""
    size = params.recurrent_kernel.shape[-1]
    kernel = np.asarray(params.recurrent_kernel).reshape(heads, size, 4, size)
    return np.ascontiguousarray(kernel.transpose(2, 0, 3, 1))


def from_flash(arrays: dict[str, np.ndarray], kernel: Any, heads: int, size: int) -> rnncore.CellParams:
    """Gradients by FlashRNN's names in rnncore's layout."""
    recurrent: Any = arrays["R"].transpose(1, 3, 0, 2)
    bias: Any = arrays["b"].reshape(4, heads * size)
    return rnncore.CellParams(kernel, recurrent if heads > 1 else recurrent[0], bias, None, ())
