"""Random problems for the backends that have loops of their own, held to the scan until the time is up.

    python tests/random_problems.py cpp --seconds 300
    python tests/random_problems.py mosaic_gpu      # interpreted where there is no Hopper GPU, with JAX 0.11 or newer
    python tests/random_problems.py pallas_tpu      # interpreted

The tests have chosen problems; this draws cells, sizes, batch axes, dtypes, lengths, resets, directions and masks.
A problem that fails is printed with its number, which `--first` draws again.  Exit status 1 if one did.
"""

from __future__ import annotations

import sys
from pathlib import Path

import conftest  # noqa: F401  XLA's options are set before JAX is imported

sys.path.append(str(Path(__file__).parent / "kernels"))

# isort: split
import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import test_cpp
import test_mosaic_gpu
import test_pallas_tpu
from tqdm import tqdm

import rnncore
from rnncore.kernels import pallas_tpu
from rnncore.kernels.pallas_tpu import kernels as pallas_tpu_kernels
from rnncore.kernels.pallas_tpu import plan as pallas_tpu_plan

Rng = np.random.Generator
PRODUCTS = rnncore.Dense | rnncore.Heads
IDS = [c.id for c in cases.CASES if "scan" in c.backends and isinstance(getattr(c.cell, "recurrence", None), PRODUCTS)]


def problem(
    rng: Rng, size: int, heads: int, steps: int, features: int, rows: int, dtype: Any
) -> tuple[cases.Case, cases.Problem, dict]:
    """Some cell with `heads` heads of `size` units, or one as wide, up to two batch axes of `rows` and its options."""
    case = cases.BY_ID[IDS[rng.integers(len(IDS))]]
    dense = heads == 1 or rng.random() < 0.3
    kernel = rnncore.Dense() if dense else rnncore.Heads(heads)
    case = dataclasses.replace(case, cell=dataclasses.replace(case.cell, hidden_size=size * heads, recurrence=kernel))
    batch = tuple(int(n) for n in rng.integers(1, rows, rng.integers(3)))
    drawn = cases.draw(
        case, batch, steps, features, dtype=jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype,
        lengths=steps > 0 and rng.random() < 0.5, resets=steps > 0 and rng.random() < 0.5,
        seed=int(rng.integers(2**31)),
    )  # fmt: skip
    # Gates see sums of about 1, whatever the number of units.
    shrunk = jax.tree.map(lambda a: a / max(2.0, math.sqrt(size * heads if dense else size)), drawn.params)
    moving = jax.tree.map(lambda a: a.astype(dtype), (shrunk, *drawn[1:3]))
    backwards = rng.random() < 0.3
    options = {"reverse": backwards, "keep_order": backwards and rng.random() < 0.5}
    return case, cases.Problem(*moving, *drawn[3:]), options


def cpp(rng: Rng) -> tuple[Any, Callable[[], None]]:
    steps, double = int(rng.choice([0, 1, 2, 3, 7, 20, 65, 130])), rng.random() < 0.6
    size, heads = int(rng.integers(1, 40)), int(rng.integers(1, 4))
    dtype = jnp.float64 if double else jnp.float32
    case, drawn, options = problem(rng, size, heads, steps, int(rng.integers(1, 60)), 20, dtype)
    if rng.random() < 0.3:
        options["recurrent_mask"] = jnp.asarray(rng.integers(0, 2, (*drawn.xs.shape[:-2], size * heads)) * 2, dtype)
    # Over 130 steps sums grow to hundreds of terms.
    tolerance = 10 * (cases.FLOAT64 if double else test_cpp.FLOAT32)
    return (case, drawn, options), lambda: test_cpp.compare(case, drawn, tolerance, **options)


def mosaic_gpu(rng: Rng) -> tuple[Any, Callable[[], None]]:
    dtype = [jnp.bfloat16, jnp.float16][rng.integers(2)]
    case, drawn, options = problem(rng, 64, int(rng.integers(1, 4)), int(rng.integers(1, 7)), 16, 9, dtype)

    def check() -> None:
        found, eps = test_mosaic_gpu.errors(case, drawn, **options), float(jnp.finfo(dtype).eps)
        if max(found) <= eps:
            return
        # A cell that magnifies its roundings: then about the scan's own errors in this dtype.
        own = test_mosaic_gpu.errors(case, drawn, "scan", **options)
        assert all(a <= max(eps, 1.3 * b) for a, b in zip(found, own, strict=True)), (found, own)

    return (case, drawn, options), check


def tpu(rng: Rng) -> tuple[Any, Callable[[], None]]:
    # Short blocks, so that there are several, with padding.
    pallas_tpu_plan.MAX_STEPS, pallas_tpu_plan.MAX_ROWS = int(rng.integers(1, 5)), 8 * int(rng.integers(1, 3))
    size, heads, steps = int(rng.integers(1, 50)), int(rng.integers(1, 4)), int(rng.integers(1, 10))
    case, drawn, options = problem(rng, size, heads, steps, int(rng.integers(1, 20)), 13, jnp.float32)
    return (case, drawn, options), lambda: test_pallas_tpu.compare(case, drawn, 2 * test_pallas_tpu.FLOAT32, **options)


def shown(case: cases.Case, drawn: cases.Problem, options: dict) -> str:
    masks = [name for name in ("lengths", "resets") if getattr(drawn, name) is not None]
    given = [name for name, value in options.items() if value is not False]
    return f"{case.id} {case.cell!r}, xs {drawn.xs.dtype}{list(drawn.xs.shape)}, {', '.join(masks + given) or 'plain'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("cpp", "mosaic_gpu", "pallas_tpu"))
    parser.add_argument("--seconds", type=float, default=300, help="how long (default: 300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (default: 0)")
    args = parser.parse_args()
    draw = {"cpp": cpp, "mosaic_gpu": mosaic_gpu, "pallas_tpu": tpu}[args.backend]
    if args.backend == "mosaic_gpu" and not test_mosaic_gpu.ON_HOPPER:
        test_mosaic_gpu.GPU.missing_gpu = lambda platform: None
        test_mosaic_gpu.kernels.kernels = functools.partial(test_mosaic_gpu.kernels.kernels, interpret=True)
    if args.backend == "pallas_tpu":
        pallas_tpu.missing_platform = lambda platform: None
        pallas_tpu_kernels.kernels = functools.partial(pallas_tpu_kernels.kernels, True)
    number, failed, end = args.first, 0, time.monotonic() + args.seconds
    with tqdm(desc=args.backend, unit=" problems") as bar:
        try:
            while time.monotonic() < end:
                what, check = draw(np.random.default_rng(number))
                try:
                    check()
                except Exception as error:  # whatever it is, the others are worth trying
                    failed += 1
                    bar.write(f"problem {number}: {shown(*what)}\n  {type(error).__name__}: {str(error)[:400]}")
                number += 1
                bar.update()
                cases.forget()
                if number % 20 == 0:
                    jax.clear_caches()
        except KeyboardInterrupt:
            bar.write("stopped")
    print(f"{args.backend}: {number - args.first} problems from number {args.first}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
