"""FlashRNN (NX-AI/flashrnn): Triton and CUDA kernels for PyTorch; NVIDIA GPUs.

Its layers take x W; where the product is to be inside the call, a plain PyTorch product comes before.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

import rnncore
from benchmarks.peers import torch_peer
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

BACKENDS = ("triton_fused", "cuda_fused", "cuda")


class FlashRNNPeer(Peer):
    """`flashrnn.flashrnn.flashrnn(Wx, R, b, function="lstm", backend=...)`."""

    library = package = module = "flashrnn"

    def unavailable(self, platform: str) -> str | None:
        if (why := super().unavailable(platform)) is not None:
            return why
        if platform != "gpu":
            return f"needs an NVIDIA GPU; JAX runs on {platform} here"
        return torch_peer.TorchPeer().unavailable(platform)

    def contenders(self, cell: str) -> tuple[str, ...]:
        # Its GRU and Elman network arrange gates and biases otherwise; only its LSTM is in its own benchmark.
        return tuple(f"FlashRNN {backend}" for backend in BACKENDS) if cell == "lstm" else ()

    def why_not(self, contender: str, case: Case) -> str | None:
        workload = case.workload
        if workload.recurrence == "diagonal" or workload.layers > 1:
            return "FlashRNN has one layer with a dense or a headwise kernel"
        if contender.endswith("triton_fused") and workload.hidden // workload.heads > 128:
            return "FlashRNN's Triton kernel keeps R in registers: heads of up to 128 units"
        return None

    def slow_to_build(self, contender: str) -> bool:
        return "cuda" in contender

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import torch

        found = importlib.import_module("flashrnn.flashrnn").flashrnn
        kernel_call = found if callable(found) else found.flashrnn  # the function, or the module that has it
        workload, backend = case.workload, contender.removeprefix("FlashRNN ")
        batch, steps, features, hidden = workload.shape
        heads, size = workload.heads, hidden // workload.heads
        torch_peer.pin_precision(torch, case.precision)
        device = "cuda" if case.platform == "gpu" else "cpu"
        params = problem.params[0]
        tensors = {"R": to_flash(params, heads), "b": np.asarray(params.bias).reshape(4, heads, size)}
        if case.input_product:
            tensors["W"] = np.asarray(params.input_kernel).reshape(features, -1)
        module = torch.nn.ParameterDict(
            {name: torch_peer.to_tensor(torch, a, case.dtype, device) for name, a in tensors.items()}
        )

        def run(xs: Any) -> Any:
            products = xs @ module["W"] if case.input_product else xs
            states = kernel_call(
                Wx=products.reshape(batch, steps, 4, heads, size), R=module["R"], b=module["b"], states=None,
                function="lstm", backend=backend, dtype=case.dtype,
            )[0]  # fmt: skip
            return states[0].reshape(batch, steps, hidden)

        def to_core(arrays: dict[str, np.ndarray]) -> Any:
            kernel: Any = arrays["W"].reshape(features, 4, hidden) if case.input_product else None
            return (from_flash(arrays, kernel, heads, size),)

        return torch_peer.build(torch, module, run, to_core, problem, measurement, case, device, f"FlashRNN {backend}")


def to_flash(params: rnncore.CellParams, heads: int) -> np.ndarray:
    """The recurrent kernel as (gate, head, output unit, input unit); dense is one head."""
    kernel = np.asarray(params.recurrent_kernel)
    kernel = kernel if kernel.ndim == 4 else kernel[None]
    return np.ascontiguousarray(kernel.transpose(2, 0, 3, 1))


def from_flash(arrays: dict[str, np.ndarray], kernel: Any, heads: int, size: int) -> rnncore.CellParams:
    """Gradients by FlashRNN's names, as rnncore arranges them."""
    recurrent: Any = arrays["R"].transpose(1, 3, 0, 2)
    recurrent = recurrent if heads > 1 else recurrent[0]
    bias: Any = arrays["b"].reshape(4, heads * size)
    return rnncore.CellParams(kernel, recurrent, bias, None, ())
