"""Backend "mosaic_gpu": a whole run in one kernel, generated from any pointwise cell with Pallas's Mosaic GPU.

U of a head stays in the shared memory of one thread block (`plan.py`).  Carries are float32 in registers; h is rounded
to the dtype before each product and in the outputs; functions are the GPU's approximate instructions (the error of tanh
is below 2^-10.9).  The inputs of a step are loaded a few steps ahead.  Reverse mode keeps the carries of every step,
computes what the cell's vjp needs for all steps at once, and runs the transposed loop in a second kernel (`host.py`).

Platform: NVIDIA Hopper (compute capability 9.0; the matrix instructions are wgmma).  Cells: any PointwiseCell whose
operations exist in the kernel language, with heads of 64 units, or a dense recurrence of 64.  Dtypes: bfloat16 or
float16, the same for parameters, inputs and carry.  Lengths, resets and any number of batch axes: yes; masks, zoneout,
states, chunks: no.  Differentiation: reverse mode of first order; vmap over sequences, not over parameters; shard_map
over the batch.  Results are deterministic: there are no atomic sums.

It has run on an H200 with JAX 0.11.2: correct, and reproducible bit for bit.  Without a GPU it is tested in JAX's
interpreter, with race detection, lowered for CUDA and compiled by ptxas.  On that GPU it is 1.75 times as fast as
`cuda` forward and 1.24 times in training, for heads of 64 units (docs/kernels.md).  For all other heads `cuda` was
faster than its layouts, which were removed.
"""

from __future__ import annotations

import math
from pathlib import Path

from rnncore import _compat
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body
from rnncore.kernels.mosaic_gpu.plan import UNITS, Plan, plan_of
from rnncore.recurrence.run import Request

DTYPES = ("bfloat16", "float16")
KNOWN = frozenset(
    "abs add and bitcast_convert_type broadcast_in_dim clamp convert_element_type cos div eq exp2 ge gt le log "
    "lt max min mul ne neg or round rsqrt select_n sign sin sub tanh xor".split()
)
"""Elementwise operations that Mosaic GPU lowers in every supported JAX; `op_lowerings.py` says some more by these."""
LIBDEVICE = "nvvm/libdevice/libdevice.10.bc"
"""In the folder of the CUDA toolkit: functions that the kernels are linked with."""


class MosaicGPU(host.KernelBackend):
    """See the package."""

    name = "mosaic_gpu"
    must_be_named = (
        "only where it is named: 'cuda' is faster but for heads of 64 units, and this one stands on an interface of "
        "JAX that may change"
    )

    def unsupported(self, request: Request) -> str | None:
        why = super().unsupported(request) or missing_gpu(request.platform)
        if why is not None:
            return why
        cell = request.cell
        assert isinstance(cell, PointwiseCell)
        if request.dtype not in DTYPES or request.dtypes != {request.dtype}:
            return (
                f"the matrix unit takes {' or '.join(DTYPES)}, of parameters, inputs and carry alike; "
                f"these are {', '.join(sorted(request.dtypes))}"
            )
        if request.residual_dtype not in (None, request.dtype):
            return f"residual_dtype={request.residual_dtype!r}: its kernels keep what they keep in {request.dtype}"
        plan = plan_for(request)
        if isinstance(plan, str):
            return plan
        return kernel_body.of(cell, (UNITS, plan.batch)).why_not(KNOWN)

    def kernels(self) -> host.Kernels:
        from rnncore.kernels.mosaic_gpu import kernels

        return kernels.kernels()


def missing_gpu(platform: str) -> str | None:
    """Reason why the kernels cannot run on this platform, or None."""
    if platform != "gpu":
        return f"it needs an NVIDIA Hopper GPU, and JAX runs on {platform} here"
    import jax

    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if str(capability) != "9.0":
        return f"its matrix instructions are Hopper's, compute capability 9.0, and this GPU has {capability}"
    return missing_toolkit(_compat.cuda_folder())


def missing_toolkit(folder: str | None, usual: Path = Path("/usr/local/cuda")) -> str | None:
    """Reason why the kernels cannot be compiled with what JAX takes for the folder of the CUDA toolkit, or None."""
    if folder != "None" or (usual / LIBDEVICE).exists():
        return None
    # JAX 0.11.2 makes this string of a missing folder, beside the CUDA 13 packages that PyTorch brings.
    return (
        f"JAX takes the word 'None' for the folder of the CUDA toolkit, so that {LIBDEVICE} is not found; set the "
        "environment variable CUDA_ROOT to the toolkit's folder before JAX is imported"
    )


def plan_for(request: Request) -> Plan | str:
    """The layout, or the reason why there is none: by the shapes alone."""
    cell = request.cell
    assert isinstance(cell, PointwiseCell)
    return plan_of(cell, math.prod(request.batch_shape), request.lengths or request.resets, request.resets)
