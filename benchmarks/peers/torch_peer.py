"""PyTorch: nn.LSTM, nn.GRU and nn.RNN, on the CPU or, through cuDNN, on a GPU.

Batch first, as all others are.  A forward pass runs under `inference_mode` and in `eval`.  On a CPU it runs
on all cores, as it does unasked, and on one thread, which small sequences do better with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import rnncore
from benchmarks.peers.base import LEARNING_RATE, MOMENTUM, Built, Case, Peer
from benchmarks.peers.problem import Problem, make_cell
from benchmarks.workloads import Workload
from rnncore._command import timing

ONE_THREAD = "torch, one thread"


class TorchPeer(Peer):
    """`torch.nn.LSTM` and its siblings, all layers in one module."""

    library = package = module = "torch"

    def unavailable(self, platform: str) -> str | None:
        if (why := super().unavailable(platform)) is not None:
            return why
        import torch

        if platform == "gpu" and not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        return f"torch is not run on {platform}" if platform not in ("cpu", "gpu") else None

    def contenders(self, cell: str) -> tuple[str, ...]:
        return "torch", ONE_THREAD

    def absent(self, contender: str, platform: str) -> str | None:
        if (why := self.unavailable(platform)) is None and contender == ONE_THREAD and platform != "cpu":
            return "on a GPU there are no threads to choose"
        return why

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        import torch

        pin_precision(torch, case.precision)
        device = "cuda" if case.platform == "gpu" else "cpu"
        workload = case.workload
        make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[workload.cell]
        module = make(
            workload.features, workload.hidden, workload.layers, batch_first=True, device=device,
            dtype=getattr(torch, case.dtype),
        )  # fmt: skip
        cell = make_cell(workload)
        stack = rnncore.Stack(cell, num_layers=workload.layers)
        # With rnncore's weights; the second bias is zero, but for a GRU's b_hn.
        state = rnncore.to_torch(stack, rnncore.StackParams(tuple((p,) for p in problem.params), None))
        module.load_state_dict({name: to_tensor(torch, a, case.dtype) for name, a in state.items()})
        module.flatten_parameters()

        def to_core(arrays: dict[str, np.ndarray]) -> Any:
            return tuple(_layer(arrays, n, workload) for n in range(workload.layers))

        if device == "cuda":
            algorithm, threads = cudnn_algorithm(torch, case, measurement), None
        else:
            threads = 1 if contender == ONE_THREAD else timing.cores()
            algorithm = f"CPU threads: {threads}"
        run = lambda xs: module(xs)[0]  # noqa: E731
        return build(torch, module, run, to_core, problem, measurement, case, device, algorithm, threads)


def pin_precision(torch: Any, precision: str) -> None:
    """TF32 on or off for products of float32 numbers; "default" is what PyTorch does unasked."""
    names = {"float32": ("ieee", "ieee"), "tf32": ("tf32", "tf32"), "default": ("ieee", "tf32")}[precision]
    if hasattr(torch.backends.cudnn, "rnn"):
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = names
    else:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (name == "tf32" for name in names)


def to_tensor(torch: Any, array: Any, dtype: str, device: str = "cpu") -> Any:
    """Of any float array; NumPy's bfloat16 is unknown to PyTorch, so it goes through float32."""
    return torch.tensor(np.asarray(array).astype(np.float32), dtype=getattr(torch, dtype), device=device)


def build(
    torch: Any, module: Any, run: Callable[[Any], Any], to_core: Callable[[dict[str, np.ndarray]], Any],
    problem: Problem, measurement: str, case: Case, device: str, algorithm: str | None,
    threads: int | None = None,
) -> Built:  # fmt: skip
    """A measurement of a module; FlashRNN shares it.

    Args:
      run: inputs (B, T, .) -> outputs (B, T, H).
      to_core: {name of the parameter: array} -> what `reference.py` has for every layer.
      threads: of a CPU.
    """
    xs, cotangent = (to_tensor(torch, a, case.dtype, device) for a in (problem.xs, problem.cotangent))
    names = [name for name, _ in module.named_parameters()]
    inputs = [xs.requires_grad_(measurement == "gradient"), *module.parameters()]

    def forward() -> Any:
        with torch.inference_mode():
            return run(xs)

    def gradient() -> Any:
        loss = torch.sum(run(xs) * cotangent)
        return loss, torch.autograd.grad(loss, inputs)

    def training_step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.mean(torch.square(run(xs) - cotangent))
        loss.backward()
        optimizer.step()
        return loss

    module.train(measurement != "forward")
    optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, betas=(MOMENTUM, 0.999))
    measured = {"forward": forward, "gradient": gradient, "training_step": training_step}[measurement]

    def call() -> Any:
        # Of the process, and another contender may have set it since; where nothing changes it takes no time.
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return measured()

    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else lambda _: None

    def numpy(tensor: Any) -> np.ndarray:
        return tensor.detach().to("cpu", torch.float64).numpy()

    def result() -> Any:
        """To be called first: a training step is compared by the gradients in its first moments."""
        out = call()
        if measurement == "forward":
            return numpy(out)
        if measurement == "gradient":
            dxs, *grads = map(numpy, out[1])
            return to_core(dict(zip(names, grads, strict=True))), dxs
        moments = [numpy(optimizer.state[p]["exp_avg"]) / (1 - MOMENTUM) for p in module.parameters()]
        return to_core(dict(zip(names, moments, strict=True))), None

    def peak(run_once: Callable[[], Any]) -> int | None:
        if device != "cuda":
            run_once()
            return None
        torch.cuda.reset_peak_memory_stats()
        wait(run_once())
        return torch.cuda.max_memory_allocated()

    figures = dict.fromkeys(("compile_seconds", "temporary_bytes", "argument_bytes", "output_bytes"))
    return Built(call, wait, result, peak, figures, algorithm)


def _layer(arrays: dict[str, np.ndarray], layer: int, workload: Workload) -> rnncore.CellParams:
    """Gradients of a layer; those of both biases are equal, but for a GRU's n."""
    kernels = [arrays[f"weight_{side}_l{layer}"] for side in ("ih", "hh")]
    first, second = (arrays[f"bias_{side}_l{layer}"].reshape(-1, workload.hidden) for side in ("ih", "hh"))
    wide: list[Any] = [k.T.reshape(k.shape[1], -1, workload.hidden) for k in kernels]
    own: Any = second[2:] if workload.cell == "gru" else None
    return rnncore.CellParams(wide[0], wide[1], first, own, ())  # type: ignore[arg-type]


def cudnn_algorithm(torch: Any, case: Case, measurement: str) -> str:
    """Which of cuDNN's algorithms PyTorch asks for, by its own rules (ATen/native/cudnn/RNN.cpp, get_algo)."""
    device = torch.cuda.get_device_properties(0)
    found = [pick_algorithm(case.workload, case.dtype, device, forward) for forward in (True, False)]
    name = found[0] if measurement == "forward" else f"forward {found[0]}, backward {found[1]}"
    return f"cuDNN {torch.backends.cudnn.version()}: {name}"


def pick_algorithm(workload: Workload, dtype: str, device: Any, forward: bool) -> str:
    """The rule itself.

    Args:
      device: has `major`, `minor` (compute capability) and `multi_processor_count`.
      forward: whether it is the forward pass.
    """
    batch, _, features, hidden = workload.shape
    # Hidden sizes up to which the algorithm for small ones is taken, forward and backward.
    limits = (384, 256) if workload.cell == "elman" else (192, 128)
    if device.major >= 6 and hidden <= limits[0 if forward else 1]:
        return "PERSIST_STATIC_SMALL_H"
    fits = workload.layers == 1 and hidden <= 1024 and hidden % 128 == 0 and features % 128 == 0
    suits = device.major >= 8 and device.multi_processor_count >= 98 and device.minor != 6
    suits = suits and batch % 8 == 0 and batch <= 128 and workload.cell != "gru"
    if workload.cell == "elman":
        suits = suits and (batch < 96 or hidden < 896)
    return "PERSIST_STATIC" if dtype == "float16" and fits and suits else "STANDARD"
