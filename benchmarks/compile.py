"""Seconds to trace, lower and compile a gradient step of one LSTM layer, by its number of steps.

  python -m benchmarks.compile
  python -m benchmarks.compile --steps 128 1024 --repeats 3 --out some.jsonl

A step is <outputs, cotangent> and its gradients in terms of all parameters and of the inputs, in float32.  Lengths
and contenders take turns, after one compilation of each that is not counted, and JAX forgets what it knows before
every one.  How many steps make a chunk is what rnncore chooses for the length; "checkpoint_every=16" has
chunks at every length.  The C++ compiler that "cpp" calls once for a cell is not in its seconds.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp

import rnncore
from benchmarks import memory, options, records
from rnncore._command import timing

CONTENDERS = (memory.FLAX, "scan", memory.CHUNKS, memory.CPP)


def seconds_to_compile(contender: str, batch: int, steps: int, features: int, hidden: int) -> float:
    """Of a step that nothing is left of in any cache."""
    layer, cell = memory.lstm(contender, hidden), rnncore.LSTM(hidden)

    def loss(params: Any, xs: Any, cotangent: Any) -> Any:
        return jnp.vdot(layer.apply(params, xs), cotangent)

    jax.clear_caches()
    # Where x64 is on, libraries that make zeros would make float64 ones.
    with jax.enable_x64(False):
        params = jax.eval_shape(lambda: layer.own(cell.init(jax.random.key(0), features)))
        xs, cotangent = (jax.ShapeDtypeStruct((batch, steps, n), jnp.float32) for n in (features, hidden))
        _, figures = timing.compile_step(jax.jit(jax.value_and_grad(loss, (0, 1))), (params, xs, cotangent))
    return figures["compile_seconds"]


def measure(args: argparse.Namespace, write: records.Writer) -> None:
    """Writes one record for each contender and length, also of the compilations before an interruption."""
    batch, features, hidden = args.shape
    contenders = memory.available(CONTENDERS)
    found: dict[tuple[str, int], list[float]] = {(c, steps): [] for c in contenders for steps in args.steps}
    try:
        records.say("one of each that is not counted")
        for contender in contenders:
            seconds_to_compile(contender, batch, args.steps[0], features, hidden)
        for n in range(args.repeats):
            for steps in args.steps:
                records.say(f"repeat {n + 1} of {args.repeats}, T = {steps}")
                for contender in contenders:
                    seconds = seconds_to_compile(contender, batch, steps, features, hidden)
                    found[contender, steps].append(seconds)
    finally:
        for (contender, steps), times in found.items():
            if times:
                write("compile", contender=contender, T=steps, shape_BDH=list(args.shape), compile_seconds=times)
                print(f"{contender}, T = {steps}: {statistics.median(times):.2f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = records.parser("compile", __doc__)
    add, count = parser.add_argument, options.count
    add("--steps", type=count, nargs="+", default=[128, 1024, 8192], metavar="T", help="default: 128 1024 8192")
    add("--shape", type=count, nargs=3, default=[32, 128, 256], metavar=("B", "D", "H"), help="default: 32 128 256")
    add("--repeats", type=count, default=5, help="compilations of each that are counted (default: 5)")
    args = parser.parse_args(argv)
    args.steps = sorted(set(args.steps))
    # Programs that an earlier process left on a disk are no compilations.
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        path = args.out or records.default_path("compile", args.record)
        return records.session("compile", path, argv, args.repeats, None, functools.partial(measure, args))
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


if __name__ == "__main__":
    sys.exit(main())
