"""How both kernels are launched: the shared memory of a block, and the grid of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnncore import _compat, _pallas
from rnncore.kernels.mosaic_gpu.plan import UNITS, Plan
from rnncore.kernels.mosaic_gpu.tiles import GROUP


class Scratch(NamedTuple):
    """A block's shared memory."""

    kernel: Any
    h: Any
    inputs: Any
    stage: Any
    reset_r: Any
    loaded: Any
    input_barriers: Any


def allocate(
    plan: Plan, dtype: Any, stages: int, inputs: int, staged: int, h: tuple[int, ...], *, reset_r: bool = False
) -> Scratch:  # fmt: skip
    """What a block allocates.

    Args:
      stages, inputs: steps whose inputs are there at once, and tiles of one.
      staged: tiles for outputs.
      h: how many tiles the product reads.
      reset_r: whether there is a tile per gate for what resets return to.
    """
    tile = (plan.batch, UNITS)
    return Scratch(
        kernel=_pallas.shared((plan.gates * UNITS, UNITS), dtype),
        h=_pallas.shared((*h, *tile), dtype),
        inputs=_pallas.shared((stages, inputs, *tile), dtype),
        stage=_pallas.shared((staged, *tile), dtype),
        reset_r=_pallas.shared((plan.gates, *tile), dtype) if reset_r else None,
        loaded=plgpu.Barrier(),
        input_barriers=plgpu.Barrier(num_arrivals=inputs, num_barriers=stages),
    )


def call(plan: Plan, body: Any, arrays: Any, out: Any, scratch: Any, interpret: bool) -> Any:
    """Runs a kernel `body(arrays, results, scratch)` of named tuples of refs on the plan's blocks."""
    flat_arrays, types = jax.tree.leaves(arrays), jax.tree.leaves(out)
    tree: Any = jax.tree.structure((arrays, out, scratch))

    def flat(*refs: Any) -> None:
        body(*tree.unflatten(refs))

    # approximate: tanh in one instruction, with an error below that of the 16 bits that h is rounded to.
    kernel = _pallas.gpu_kernel(
        flat, types, jax.tree.leaves(scratch), interpret, True, grid=(plan.heads * plan.tiles,), grid_names=(GROUP,)
    )  # fmt: skip
    with _compat.in_32_bits():
        return jax.tree.unflatten(jax.tree.structure(out), kernel(*flat_arrays))
