"""FlashRNN (NX-AI/flashrnn): its fused Triton kernel for PyTorch; NVIDIA GPUs.

It takes x W; where the product is to be inside the call, a plain PyTorch product comes before.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

import rnncore
from benchmarks.peers import torch_peer
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

BACKEND = "triton_fused"


class FlashRNNPeer(Peer):
    """`flashrnn.flashrnn.flashrnn(Wx, R, b, function="lstm", backend=...)`."""

    library = package = module = "flashrnn"

    def absent(self, contender: str, platform: str) -> str | None:
        if (why := super().absent(contender, platform)) is not None:
            return why
        if platform != "gpu":
            return f"needs an NVIDIA GPU; JAX runs on {platform} here"
        return torch_peer.TorchPeer().absent("torch", platform)

    def contenders(self, cell: str) -> tuple[str, ...]:
        # Its other cells arrange gates and biases otherwise; only its LSTM is in its own benchmark.
        return (f"FlashRNN {BACKEND}",) if cell == "lstm" else ()

    def why_not(self, contender: str, case: Case) -> str | None:
        wide = case.workload.hidden // case.workload.heads > 128
        return "FlashRNN's Triton kernel keeps R in registers: heads of up to 128 units" if wide else None

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import torch

        found = importlib.import_module("flashrnn.flashrnn").flashrnn
        kernel = found if callable(found) else found.flashrnn  # the function, or the module that has it
        workload = case.workload
        batch, steps, features, hidden = workload.shape
        heads, size = workload.heads, hidden // workload.heads
        torch_peer.pin_precision(torch, case.precision)
        arrays = {"R": to_flash(problem.params, heads), "b": np.asarray(problem.params.bias).reshape(4, heads, size)}
        if case.input_product:
            arrays["W"] = np.asarray(problem.params.input_kernel).reshape(features, -1)
        module = torch.nn.ParameterDict({name: torch_peer.to_tensor(torch, a, case) for name, a in arrays.items()})

        def run(xs: Any) -> Any:
            products = xs @ module["W"] if case.input_product else xs
            states = kernel(
                Wx=products.reshape(batch, steps, 4, heads, size), R=module["R"], b=module["b"], states=None,
                function="lstm", backend=BACKEND, dtype=case.dtype,
            )[0]  # fmt: skip
            return states[0].reshape(batch, steps, hidden)

        back = lambda arrays: from_flash(arrays, heads, hidden)  # noqa: E731
        return torch_peer.build(torch, module, run, back, problem, measurement, case, contender)


def to_flash(params: rnncore.CellParams, heads: int) -> np.ndarray:
    """The recurrent kernel as (gate, head, output unit, input unit); a dense one is one head."""
    kernel = np.asarray(params.recurrent_kernel)
    return np.ascontiguousarray((kernel if heads > 1 else kernel[None]).transpose(2, 0, 3, 1))


def from_flash(arrays: dict[str, np.ndarray], heads: int, hidden: int) -> rnncore.CellParams:
    """Gradients by FlashRNN's names, as rnncore arranges them."""
    recurrent = arrays["R"].transpose(1, 3, 0, 2)
    product = arrays["W"].reshape(-1, 4, hidden) if "W" in arrays else None
    tree: Any = (product, recurrent if heads > 1 else recurrent[0], arrays["b"].reshape(4, hidden), None, ())
    return rnncore.CellParams(*tree)
