"""PyTorch: nn.LSTM, nn.GRU and nn.RNN, on the CPU or, through cuDNN, on a GPU.

Batch first, as all others are.  A forward pass runs under `inference_mode` and in `eval`.  On a CPU it runs on all
cores, which is its default, and on one thread, which is faster for small sequences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import rnncore
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem, make_cell
from rnncore._command import timing
from rnncore.kernels.cudnn import algorithm

ONE_THREAD = "torch, one thread"


class TorchPeer(Peer):
    """`torch.nn.LSTM` and its siblings."""

    library = package = module = "torch"

    def absent(self, contender: str, platform: str) -> str | None:
        if (why := super().absent(contender, platform)) is not None:
            return why
        import torch

        if platform == "gpu" and contender == ONE_THREAD:
            return "on a GPU there are no threads to choose"
        if platform == "gpu" and not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        return f"torch is not run on {platform}" if platform not in ("cpu", "gpu") else None

    def contenders(self, cell: str) -> tuple[str, ...]:
        return "torch", ONE_THREAD

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import torch

        pin_precision(torch, case.precision)
        device = "cuda" if case.platform == "gpu" else "cpu"
        workload, kind, tensor = case.workload, getattr(torch, case.dtype), to_tensor(torch, case.dtype, device)

        make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[workload.cell]
        module = make(workload.features, workload.hidden, batch_first=True, device=device, dtype=kind)
        # With rnncore's weights; the second bias is zero, but for a GRU's b_hn.
        stack = rnncore.Stack(make_cell(workload))
        state = rnncore.to_torch(stack, rnncore.StackParams(((problem.params,),), None))
        module.load_state_dict({name: tensor(a) for name, a in state.items()})
        module.flatten_parameters()
        module.train(measurement != "forward")
        xs, cotangent = tensor(problem.xs), tensor(problem.cotangent)
        if device == "cuda":
            how, threads = cudnn_algorithm(torch, case, measurement), None
        else:
            threads = 1 if contender == ONE_THREAD else timing.cores()
            how = f"CPU threads: {threads}"

        def back(grads: dict[str, np.ndarray]) -> Any:
            return to_core(grads, workload.hidden, workload.cell)

        named = dict(module.named_parameters())
        return program(torch, lambda xs: module(xs)[0], named, back, xs, cotangent, measurement, how, threads)


def program(
    torch: Any, run: Any, named: dict[str, Any], back: Any, xs: Any, cotangent: Any, measurement: str, how: str,
    threads: int | None = None,
) -> Built:  # fmt: skip
    """One measurement of `run(xs)`, with the gradients of `named`, which `back` brings into rnncore's layout."""
    inputs = (xs.requires_grad_(measurement == "gradient"), *named.values())

    def call() -> Any:
        # Threads are the process's, and another contender may have set them; a call that changes nothing is free.
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if measurement == "forward":
            with torch.inference_mode():
                return run(xs)
        return torch.autograd.grad(torch.sum(run(xs) * cotangent), inputs)

    def result() -> Any:
        out = call()
        if measurement == "forward":
            return _numpy(torch, out)
        dxs, *grads = (_numpy(torch, one) for one in out)
        return back(dict(zip(named, grads, strict=True))), dxs

    wait = (lambda _: torch.cuda.synchronize()) if xs.is_cuda else lambda _: None
    return Built(call, wait, result, {"compile_seconds": None, "temporary_bytes": None}, how)


def _numpy(torch: Any, tensor: Any) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()


def to_tensor(torch: Any, dtype: str, device: str) -> Any:
    """A function from arrays to tensors; NumPy's bfloat16 is unknown to PyTorch, so it goes through float32."""
    kind = getattr(torch, dtype)
    return lambda array: torch.tensor(np.asarray(array).astype(np.float32), dtype=kind, device=device)


def pin_precision(torch: Any, precision: str) -> None:
    """TF32 on or off for products of float32 numbers; "default" is PyTorch's own."""
    names = {"float32": ("ieee", "ieee"), "tf32": ("tf32", "tf32"), "default": ("ieee", "tf32")}[precision]
    if hasattr(torch.backends.cudnn, "rnn"):
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = names
    else:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (name == "tf32" for name in names)


def to_core(arrays: dict[str, np.ndarray], hidden: int, cell: str) -> rnncore.CellParams:
    """Gradients by PyTorch's names as rnncore's; those of both biases are equal, but for a GRU's n."""
    kernels = [arrays[f"weight_{side}_l0"].T for side in ("ih", "hh")]
    first, second = (arrays[f"bias_{side}_l0"].reshape(-1, hidden) for side in ("ih", "hh"))
    wide: list[Any] = [k.reshape(k.shape[0], -1, hidden) for k in kernels]
    own: Any = second[2:] if cell == "gru" else None
    return rnncore.CellParams(wide[0], wide[1], first, own, ())  # type: ignore[arg-type]


def cudnn_algorithm(torch: Any, case: Case, measurement: str) -> str:
    """Which of cuDNN's algorithms PyTorch asks for, by its own rules (ATen/native/cudnn/RNN.cpp, get_algo)."""
    properties, (batch, steps, features, hidden) = torch.cuda.get_device_properties(0), case.workload.shape
    gpu = algorithm.Device(properties.major, properties.minor, properties.multi_processor_count)
    mode = {"lstm": algorithm.LSTM, "gru": algorithm.GRU, "elman": algorithm.TANH}[case.workload.cell]
    names = {algorithm.STANDARD: "STANDARD", 1: "PERSIST_STATIC", 3: "PERSIST_STATIC_SMALL_H"}
    shape = (steps, batch, features, hidden)
    forward, backward = (
        names[algorithm.choose(gpu, mode, case.dtype, shape, 1, 1, False, way)] for way in (True, False)
    )
    told = forward if measurement == "forward" else f"forward {forward}, backward {backward}"
    return f"cuDNN {torch.backends.cudnn.version()}: {told}"
