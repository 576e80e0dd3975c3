"""The places where Pallas's names for GPU kernels move between the supported versions of JAX (0.10 to 0.12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

_SINCE_0_11 = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def transposed(ref: Any) -> Any:
    """A two-dimensional ref with its axes exchanged."""
    return ref.transpose((1, 0)) if _SINCE_0_11 else plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any) -> Any:
    """What a ref in shared memory holds, in a register layout."""
    index = () if _SINCE_0_11 else ((),)
    return plgpu.load(ref, *index, layout=layout)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the tiling that the matrix unit and the copy engine read, by the widest swizzle that fits."""
    width = next((n for n in (128, 64, 32) if shape[-1] * jnp.dtype(dtype).itemsize % n == 0), None)
    if width is None:  # rows of 16 bytes: nothing to swizzle
        return plgpu.SMEM(shape, dtype)
    tile = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(width)))


def gpu_kernel(body: Callable, out: Any, scratch: Any, interpret: bool, approximate: bool, **options: Any) -> Callable:
    """A Mosaic GPU kernel; with `interpret` it runs on a CPU, which JAX 0.11 and newer can.

    Without it JAX 0.10 lowers threads apart and newer ones whole warpgroups: here all lower warpgroups.
    """
    if interpret:
        simulated: Any = plgpu
        options["interpret"] = simulated.InterpretGPUParams(inline_mgpu="ignore", detect_races=True)
    params = plgpu.CompilerParams(
        approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )  # fmt: skip
    return plgpu.kernel(body, out_type=out, scratch_types=scratch, compiler_params=params, **options)


def can_interpret_gpu() -> bool:
    """Whether this JAX can run a Mosaic GPU kernel on a CPU."""
    return hasattr(plgpu, "InterpretGPUParams")
