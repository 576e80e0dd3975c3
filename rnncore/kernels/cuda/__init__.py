"""Backend "cuda": a whole run in one kernel for any NVIDIA GPU, generated from a pointwise cell, compiled at run time.

The update, the residuals of its derivative and its transpose are written as CUDA C++ (`emit.py`), compiled with this
library's loops (`forward.cuh`, `backward.cuh`) by NVRTC, once, and cached on disk.  The recurrent matrix stays in
registers and shared memory for all steps (`plan.py`).  A head runs in one block where that is fastest; otherwise its
blocks exchange h after every step, in a cluster through shared memory, in a grid through the L2 cache, where a bit
pattern that no number has marks words that are not written yet.  Carries and sums are float32; h is rounded to the
dtype before each product and in the outputs.  In reverse mode dU, dW, dx and the gradients of biases are products over
all steps, after the loop: there are no atomic sums, and results are deterministic.

Platform: NVIDIA GPUs of compute capability 7.5 or higher (bfloat16: 8.0), with JAX's CUDA packages, which include
NVRTC, and a C++ compiler for the call that launches the kernels.  Cells: any PointwiseCell whose operations are
in `emit.OPERATIONS`, with a dense recurrence or heads.  Dtypes: bfloat16 or float16 (with the GPU's approximate tanh,
whose error is below 2^-10.9) or float32, the same for parameters, inputs and carries; float32 products follow
`jax.default_matmul_precision`: TF32 by default, as elsewhere in JAX, and three TF32 products for "high" and above.
Lengths, resets, recurrent masks, zoneout, states, any number of batch axes: yes; chunks: no.  vmap over sequences
extends the batch; vmap over parameters, and the two directions of a layer, add heads, unless a step of so many heads is
predicted to be slower than separate calls, which then run one after the other.  All blocks of a grid have to run at
once: where they cannot, the plan or the launch reports an error, and nothing hangs; a batch that is too large is split.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from rnncore._types import PyTree
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.kernels import cache, compiler, host
from rnncore.kernels.cuda import emit, kernels, launch, nvrtc, plan, recurrence
from rnncore.recurrence import plain
from rnncore.recurrence.backend import GATHERED, LoopBackend, without
from rnncore.recurrence.layers import run_layers
from rnncore.recurrence.run import Differentiable, Problem, Request, Result, dense

MEASURED = 90
"""Compute capability, times ten, of the GPU on which it was timed beside the other backends."""
SIZES = range(64, 1025, 16)
"""Units of a head that it is chosen for: below, cuDNN's persistent algorithm is faster."""
SEQUENCES = 64


class Cuda(LoopBackend):
    """See the package."""

    name = "cuda"
    opaque = True

    def unsupported(self, request: Request) -> str | None:
        cell: Any = request.cell
        refused = host.why_no_kernel(cell) or without(
            request, ("checkpoint_every", "recompute"), "its kernel runs all steps at once and keeps what it needs"
        )
        if refused is not None:
            return refused
        if 0 in (*request.batch_shape, request.steps):
            return f"it takes no empty run, and this one is of {request.steps} steps and batch {request.batch_shape}"
        residual = request.residual_dtype or request.dtype
        if request.dtype not in emit.TYPES or request.dtypes != {request.dtype} or residual not in emit.TYPES:
            got = ", ".join(sorted(request.dtypes | {residual}))
            return f"it takes bfloat16, float16 or float32, one of them; parameters, inputs and carry are {got}"
        why = self.missing(request)
        if why is not None:
            return why
        found = self._plan(request, "forward", 1)  # one sequence fits wherever many run in parts
        return found if isinstance(found, str) else emit.why_not(cell)

    def why_not_by_default(self, request: Request) -> str | None:
        """The sizes timed on an H200: 5 to 10 times as fast as the scan there, forward and in training."""
        device = launch.device()
        assert device is not None and isinstance(request.cell, PointwiseCell)
        if request.devices > 1:
            return GATHERED
        if device.capability != MEASURED:
            here, there = device.capability / 10, MEASURED / 10
            return f"only where it is named: it was timed on compute capability {there}, and this GPU has {here}"
        size, rows = host.head_size(request.cell), math.prod(request.batch_shape)
        if size not in SIZES or rows > SEQUENCES:
            return (
                f"only where it is named: it was timed with heads of {SIZES[0]} to {SIZES[-1]} units in multiples of "
                f"{SIZES.step} and up to {SEQUENCES} sequences, and this run has {size} and {rows}"
            )
        return None

    def prepare(self, request: Request) -> str | None:
        """Reason why nothing can be compiled here, such as a missing C++ compiler or NVRTC, or None."""
        device = launch.device()
        assert device is not None
        try:
            launch.target()
            nvrtc.try_out(device.capability)
        except (compiler.CompilerError, nvrtc.NvrtcError, cache.UntrustedError, OSError) as error:
            return str(error)
        return None

    def runs_layers(self, request: Request, layers: int, directions: int) -> bool:
        """Whether both directions of a layer run as heads of one launch: where its step is predicted to be faster."""
        if directions == 1:
            return False
        rows = math.prod(request.batch_shape)
        pairs = [[self._plan(request, way, rows, n) for n in (directions, 1)] for way in ("forward", "backward")]
        return all(
            isinstance(wide, plan.Plan) and isinstance(one, plan.Plan) and wide.step <= directions * one.step
            for wide, one in pairs
        )

    def run(self, problem: Problem) -> Result:
        if isinstance(problem.differentiable.params, CellParams):
            return super().run(problem)
        return run_layers(super().run, problem, side_by_side=True)

    def missing(self, request: Request) -> str | None:
        """Reason why its kernels cannot run on this platform, or None."""
        if request.platform != "gpu":
            return f"it needs an NVIDIA GPU, and JAX runs on {request.platform} here"
        if launch.device() is None:
            return "it needs an NVIDIA GPU, and there is no CUDA driver"
        if nvrtc.library() is None:
            return nvrtc.MISSING
        if compiler.find() is None:
            return compiler.MISSING
        return None

    def settings(self, request: Request) -> kernels.Settings:
        """What the kernels of a request are made for."""
        device = launch.device()
        assert device is not None
        product = plan.products(request.dtype, request.precision, device.capability)
        return kernels.Settings(device, product, functools.partial(launch.launch, device=device))

    def describe(self, request: Request) -> str | None:
        rows = math.prod(request.batch_shape)
        return "; ".join(f"{way}: {self._plan(request, way, rows)}" for way in ("forward", "backward"))

    def _plan(self, request: Request, direction: str, rows: int, cells: int = 1) -> plan.Plan | str:
        cell: Any = request.cell
        heads = cells * host.head_count(cell)
        return self.settings(request).layout(cell, direction, request.dtype, request.dtype, heads, rows)

    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        arrays = recurrence.Arrays(problem)
        found = arrays.forward(self.settings(problem.request), problem.differentiable, keep)
        return arrays.result(found), found.residuals

    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        arrays, settings = recurrence.Arrays(problem), self.settings(problem.request)
        hs = arrays.flat(result.outputs)
        return arrays.backward(settings, problem.differentiable, hs, residuals, dense(cotangents, result))

    def tangent(self, problem: Problem, result: Result, residuals: PyTree, tangents: Differentiable) -> Result:
        if problem.request.return_states or problem.request.dtype != "float32":
            return super().tangent(problem, result, residuals, tangents)
        return plain.tangent(problem, result, recurrence.Arrays(problem).residuals(residuals), tangents)
