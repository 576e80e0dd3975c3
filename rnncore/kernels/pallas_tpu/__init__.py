"""Backend "pallas_tpu": a whole run in two TPU kernels, forward and backward, generated from any pointwise cell.

Platform: TPU.  Cells: any `rnncore.PointwiseCell` with a dense or head-wise recurrence whose operations are in `KNOWN`.
Dtypes: float32 or bfloat16, the same for parameters, inputs and carry; the update, the running carry and its cotangent
are float32 in both.  Lengths, resets and any number of batch axes: yes; masks, zoneout, states, chunks: no.
Differentiation: reverse mode of first order, and vmap over sequences.  Products of float32 follow
`jax.default_matmul_precision`: one pass in bfloat16 by default, as everywhere on a TPU, and float32 for anything above.
Sharded data: inside shard_map; elsewhere JAX refuses to partition a kernel.

Cost: the recurrent kernel is read into VMEM once for each tile of the batch and stays there, where a scan may read it
at every step; a step is one product and one pass over a tile.  So the recurrent kernel must fit in VMEM beside the
blocks of `plan.py`: in the default limit of 16 MiB an LSTM with a dense recurrence runs up to H = 896 in float32 and
1152 in bfloat16.  Units are padded to 128 lanes and rows to 8 (16 in bfloat16), so small cells leave the chip idle.
Heads narrower than that share a block of the recurrent kernel, as blocks of its diagonal.  Time is cut into blocks of
nearly equal length; the few padded steps are stored but not run.

Not yet run on a TPU: the tests check the kernels' results, interpreted, and that they lower for a TPU; libtpu compiles
them ahead of time for v4 and v5e (benchmarks/NOTES.md).
"""

from __future__ import annotations

import math

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body
from rnncore.kernels.pallas_tpu import plan as plans
from rnncore.recurrence.run import Request

DTYPES = ("float32", "bfloat16")

KNOWN = frozenset(
    "abs add and atan2 bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type cos div eq erf erf_inv "
    "exp exp2 floor ge gt integer_pow is_finite le log lt max min mul ne neg not or pow rem round rsqrt select_n sign "
    "sin sub tanh xor".split()
)
"""The elementwise operations that JAX translates for TPU kernels, in each supported version."""


class PallasTPU(host.KernelBackend):
    """See the package."""

    name = "pallas_tpu"
    must_be_named = "only where it is named: it has not run on a TPU yet"

    def unsupported(self, request: Request) -> str | None:
        reason = super().unsupported(request) or missing_platform(request.platform)
        if reason is not None:
            return reason
        if request.dtypes not in [{name} for name in DTYPES]:
            got = ", ".join(sorted(request.dtypes))
            return f"it takes float32 or bfloat16, one of them; parameters, inputs and carry are {got}"
        stored = request.residual_dtype or request.dtype
        if stored not in DTYPES:
            return f"residual_dtype={stored!r}: its kernels store float32 and bfloat16 only"
        cell = request.cell
        assert isinstance(cell, PointwiseCell)
        return _does_not_fit(request, stored) or kernel_body.of(cell, (8, 128)).why_not(KNOWN)

    def kernels(self) -> host.Kernels:
        from rnncore.kernels.pallas_tpu import kernels

        return kernels.kernels()


def missing_platform(platform: str) -> str | None:
    """Reason why its kernels cannot run on this platform, or None."""
    return None if platform == "tpu" else f"it needs a TPU, and JAX runs on {platform} here"


def _does_not_fit(request: Request, stored: str) -> str | None:
    assert isinstance(request.cell, PointwiseCell)
    rows, steps = math.prod(request.batch_shape), max(request.steps, 1)
    for plan in (
        plans.forward(request.cell, steps, rows, request.dtype, stored),
        plans.backward(request.cell, steps, rows, request.dtype, stored),
    ):
        if plan.bytes > plans.VMEM_LIMIT:
            need, limit = plan.bytes / 2**20, plans.VMEM_LIMIT / 2**20
            return (
                f"its recurrent kernel and the smallest blocks need {need:.1f} MiB of VMEM, and it may take {limit:g} "
                "(pallas_tpu_plan.VMEM_LIMIT)"
            )
    return None
