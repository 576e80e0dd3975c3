"""A cell lowered for CUDA on a CPU, and the modules of its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import rnncore
from rnncore.kernels import mosaic_gpu


class Kernel(NamedTuple):
    """A run whose kernels are compiled.

    Fields:
      cell, size, heads: of the cell, and units of a head.
      batch: sequences.
      masked: with lengths and resets.
      dtype: of everything.
    """

    cell: str
    size: int
    heads: int
    batch: int = 16
    masked: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        masked = ", lengths and resets" if self.masked else ""
        return f"{self.cell} {self.size}x{self.heads}, B = {self.batch}, {self.dtype}{masked}"


KERNELS = (
    Kernel("LSTM", 64, 12), Kernel("LSTM", 64, 12, masked=True), Kernel("GRU", 64, 12, dtype="float16"),
)  # fmt: skip
TARGET = "mosaic_gpu"


def cell_of(kernel: Kernel) -> rnncore.PointwiseCell:
    """The cell of a run."""
    recurrence = rnncore.Heads(kernel.heads) if kernel.heads > 1 else rnncore.Dense()
    cell: rnncore.PointwiseCell = getattr(rnncore, kernel.cell)(kernel.size * kernel.heads, recurrence=recurrence)
    return cell


def modules(kernel: Kernel, steps: int = 64) -> list[bytes]:
    """The modules of the forward and the backward kernel of a gradient of everything."""
    cell = cell_of(kernel)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 16, kernel.dtype))
    xs = jax.ShapeDtypeStruct((kernel.batch, steps, 16), kernel.dtype)
    given = {}
    if kernel.masked:
        given["seq_lengths"] = jax.ShapeDtypeStruct((kernel.batch,), jnp.int32)
        given["resets"] = jax.ShapeDtypeStruct((kernel.batch, steps), jnp.bool_)

    def loss(params: Any, xs: Any, given: Any) -> Any:
        ys = rnncore.unroll(cell, params, xs, **given, backend="mosaic_gpu")[1]
        return jnp.sum(ys.astype(jnp.float32))

    there = mosaic_gpu.missing_gpu
    mosaic_gpu.missing_gpu = lambda platform: None
    try:
        lowered = jax.jit(jax.grad(loss, (0, 1))).trace(params, xs, given).lower(lowering_platforms=("cuda",))
    finally:
        mosaic_gpu.missing_gpu = there
    found: list[bytes] = []
    _walk(lowered.compiler_ir().operation, found)
    return found


def _walk(operation: Any, found: list[bytes]) -> None:
    """The modules that custom calls carry, in order."""
    from jax._src.lib.mlir import ir  # no public route exists

    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                attributes = inner.operation.attributes
                is_call = inner.operation.name == "stablehlo.custom_call"
                if is_call and TARGET in str(attributes["call_target_name"]):
                    name = "mhlo.backend_config" if "mhlo.backend_config" in attributes else "backend_config"
                    found.append(ir.StringAttr(attributes[name]["module"]).value_bytes)
                _walk(inner.operation, found)
