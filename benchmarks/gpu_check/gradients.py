"""The analysis on this GPU: the figures of the CPU with TF32 off, what TF32 and bfloat16 do to them, and the times.

The GPU's numbers are compared with the CPU's of the same process, in float32 with products in full precision.
"""

from __future__ import annotations

import concurrent.futures
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.analysis import curves
from benchmarks.gpu_check.problems import distance
from benchmarks.gpu_check.processes import tell
from rnncore import analysis
from rnncore._command import timing

ROUNDS = 3


class Measure(NamedTuple):
    """A thing to compute.

    Fields:
      name: what it is called.
      compute: a trajectory -> arrays.
      shape, tiny: (B, T, D, H) of the run, and in a dry run.
      difference: (found, the CPU's) -> a number, in `unit`.
      limit: the largest difference that is rounding, in float32.
    """

    name: str
    compute: Callable[[Any], Any]
    shape: tuple[int, int, int, int]
    tiny: tuple[int, int, int, int]
    difference: Callable[[list[np.ndarray], list[np.ndarray]], float]
    unit: str
    limit: float


def _relative(found: list[np.ndarray], want: list[np.ndarray]) -> float:
    return max(distance(a, b) for a, b in zip(found, want, strict=True))


def _largest(found: list[np.ndarray], want: list[np.ndarray]) -> float:
    return max(float(np.max(np.abs(a - b))) for a, b in zip(found, want, strict=True))


MEASURES = (
    Measure(
        "2H x 2H Jacobians", lambda run: analysis.step_jacobians(run, method="analytic"), (8, 200, 64, 128),
        (2, 5, 3, 4), _relative, "relative", 1e-5,
    ),
    Measure(
        "five curves, 100 lags", lambda run: curves(run, min(100, run.steps - 1)), (8, 1000, 32, 256), (2, 9, 3, 4),
        _largest, "in ln retention", 1e-3,
    ),
    Measure(
        "16 exponents", lambda run: analysis.lyapunov_exponents(run, min(16, run.cell.hidden_size)).exponents,
        (1, 1000, 32, 1024), (1, 20, 3, 16), _largest, "a step", 1e-3,
    ),
)  # fmt: skip
PRECISIONS = {
    "float32": ("highest", "float32"),
    "TF32": ("tensorfloat32", "float32"),
    "bfloat16": ("BF16_BF16_F32", "float32"),
}
"""By name: precision of products, and dtype of parameters and inputs, which the analysis takes in float32 or wider."""


def worker(dry: bool) -> None:
    """The part."""
    accelerator = jax.default_backend()
    ways = [("cpu", "float32")]  # first: what the others are compared with
    ways += [(accelerator, precision) for precision in PRECISIONS] if accelerator != "cpu" else []
    for measure in MEASURES:
        with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
            begun = {way: pool.submit(_compiled, measure, *way, dry) for way in ways}
        want = None
        for platform, precision in ways:
            told = {"name": measure.name, "platform": platform, "precision": precision, "unit": measure.unit}
            try:
                found, ms = _run(*begun[platform, precision].result())
            except Exception as failure:  # what an analysis cannot do in a precision is a result
                tell("gradients", **told, raised=f"{type(failure).__name__}: {str(failure)[:300]}")
                continue
            want = found if want is None else want
            difference = measure.difference(found, want)
            right = difference <= measure.limit if precision == "float32" else None
            tell("gradients", **told, ms=ms, difference=difference, limit=measure.limit, right=right)


def _compiled(measure: Measure, platform: str, precision: str, dry: bool) -> tuple[Any, Any]:
    """(the program, its arguments on the device)."""
    batch, steps, features, hidden = measure.tiny if dry else measure.shape
    cell = rnncore.LSTM(hidden, forget_bias=1.0)
    with jax.default_device(jax.devices("cpu")[0]):  # drawn there, so that all have the same numbers
        params = cell.init(jax.random.key(0), features)
        xs = jax.random.normal(jax.random.key(1), (batch, steps, features), jnp.float32)
    products, dtype = PRECISIONS[precision]
    xs = xs[0] if batch == 1 else xs
    arguments = jax.device_put(jax.tree.map(lambda a: a.astype(dtype), (params, xs)), jax.devices(platform)[0])

    def compute(params: Any, xs: Any) -> Any:
        return measure.compute(analysis.trajectory(cell, params, xs))

    with jax.default_matmul_precision(products):
        made = jax.jit(compute).lower(*arguments).compile()
    print("compiled", measure.name, platform, precision, flush=True)
    return made, arguments


def _run(program: Any, arguments: Any) -> tuple[list[np.ndarray], float]:
    """(results in float64, milliseconds of a call)."""
    found = [np.asarray(a).astype(np.float64) for a in jax.tree.leaves(program(*arguments))]
    turns = timing.take_turns({"": lambda: program(*arguments)}, ROUNDS, 1e-9)
    return found, statistics.median(turns[""]["ms"])
