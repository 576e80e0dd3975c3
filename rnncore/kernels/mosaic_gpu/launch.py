"""How both kernels are launched: the shared memory of a block, and the grid of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnncore import _compat, _pallas
from rnncore.kernels.mosaic_gpu.plan import Plan
from rnncore.kernels.mosaic_gpu.tiles import GROUP, THREADS


class Scratch(NamedTuple):
    """A block's shared memory."""

    kernel: Any
    h: Any
    inputs: Any
    stage: Any
    reset_r: Any
    loaded: Any
    input_barriers: Any
    met: Any


def allocate(
    plan: Plan, dtype: Any, stages: int, inputs: int, staged: int, h: tuple[int, ...], *, reset_r: bool = False
) -> Scratch:  # fmt: skip
    """What a block allocates.

    Args:
      stages, inputs: steps whose inputs are there at once, and tiles of one.
      staged: tiles for outputs.
      h: how many arrays of (sequences, d) the product reads.
      reset_r: whether there is a tile per gate for what resets return to.
    """
    tile = (plan.lines, plan.units)
    return Scratch(
        kernel=_pallas.shared((plan.groups, plan.gates * plan.units, plan.size), dtype),
        h=_pallas.shared((*h, plan.lines, plan.size), dtype),
        inputs=_pallas.shared((plan.groups, stages, inputs, *tile), dtype),
        stage=_pallas.shared((plan.groups, staged, *tile), dtype),
        reset_r=_pallas.shared((plan.groups, plan.gates, *tile), dtype) if reset_r else None,
        loaded=plgpu.Barrier(num_barriers=plan.groups),
        input_barriers=plgpu.Barrier(num_arrivals=inputs, num_barriers=plan.groups * stages),
        met=plgpu.Barrier(num_arrivals=plan.groups),
    )


def call(plan: Plan, body: Any, arrays: Any, out: Any, scratch: Any, interpret: bool) -> Any:
    """Runs a kernel `body(arrays, results, scratch)` of named tuples of refs on the plan's blocks."""
    given, given_tree = _flattened(arrays)
    types, out_tree = _flattened(out)
    parts, scratch_tree = _flattened(scratch)

    def flat(*refs: Any) -> None:
        a, b = len(given), len(given) + len(types)
        body(given_tree.unflatten(refs[:a]), out_tree.unflatten(refs[a:b]), scratch_tree.unflatten(refs[b:]))

    # approximate: tanh in one instruction, with an error below that of the 16 bits that h is rounded to.
    kernel = _pallas.gpu_kernel(
        flat, types, parts, interpret, True, grid=(plan.heads * plan.tiles,), grid_names=(GROUP,),
        num_threads=plan.groups, thread_name=THREADS,
    )  # fmt: skip
    with _compat.in_32_bits():
        return out_tree.unflatten(kernel(*given))


def _flattened(tree: Any) -> tuple[list, Any]:
    return jax.tree.flatten(tree)
