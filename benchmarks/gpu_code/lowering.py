"""A cell lowered for CUDA on a CPU, and the modules of its kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import rnncore
from benchmarks.gpu_check.problems import Check, make_cell
from rnncore.kernels import mosaic_gpu

CHECKS = (
    Check("lstm", 64, 12, 16, False, "bfloat16"), Check("lstm", 64, 12, 16, True, "bfloat16"),
    Check("gru", 64, 12, 16, False, "float16"),
)  # fmt: skip
KERNELS = {
    f"{c.cell.upper()} {c.size}x{c.heads}, B = {c.batch}, {c.dtype}{', lengths and resets' * c.masked}": c
    for c in CHECKS
}
"""By name."""
TARGET = "mosaic_gpu"


def modules(check: Check, steps: int = 64) -> list[bytes]:
    """The modules of the forward and the backward kernel of a gradient of everything."""
    cell = make_cell(check)
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), 16, check.dtype))
    xs = jax.ShapeDtypeStruct((check.batch, steps, 16), check.dtype)
    given = {}
    if check.masked:
        given["seq_lengths"] = jax.ShapeDtypeStruct((check.batch,), jnp.int32)
        given["resets"] = jax.ShapeDtypeStruct((check.batch, steps), jnp.bool_)

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
