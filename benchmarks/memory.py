"""Time and temporary memory of a gradient step of one LSTM layer under each memory policy, beside flax.linen's.

  python -m benchmarks.memory                                 (B, T, D, H) = (64, 1024, 256, 256), float32
  python -m benchmarks.memory --shape 8 256 64 64 --out small.jsonl

A step is <outputs, cotangent> and its gradients in terms of all parameters and of the inputs.  All policies take
turns, A B C A B C; times are in terms of Flax's within a round.  Memory is the compiler's account of the
temporaries; what "cpp" keeps for its next call, some MiB, is not in it.  Where B T is small enough, gradients are
compared with a float64 reference.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import rnncore
from benchmarks import options, records
from benchmarks.peers import Case, jax_peers
from benchmarks.peers.jax_peers import Layer, linen
from benchmarks.peers.problem import make_problem, reference
from benchmarks.workloads import Workload
from rnncore._command import timing
from rnncore.kernels import cpp

FLAX, CPP, CHUNKS = "flax.linen", "cpp", "scan, checkpoint_every=16"
# Options of `rnncore.unroll`.
OPTIONS: dict[str, dict[str, Any]] = {
    "scan": {"backend": "scan"},
    "scan, recompute='gates'": {"backend": "scan", "recompute": "gates"},
    "scan, recompute='chunk'": {"backend": "scan", "recompute": "chunk"},
    "scan, residual_dtype=bfloat16": {"backend": "scan", "residual_dtype": jnp.bfloat16},
    CHUNKS: {"backend": "scan", "checkpoint_every": 16},
    CPP: {"backend": "cpp"},
}
POLICIES = (FLAX, *(name for name in OPTIONS if name != CHUNKS))
LARGEST_CHECK = 20_000  # steps of all sequences, B T, that the float64 reference is run for


def available(names: Sequence[str]) -> tuple[str, ...]:
    """Those that can run here; of the others stderr is told why not."""
    why = cpp.missing_compiler(jax.default_backend())
    if CPP in names and why is not None:
        records.say(f"{CPP}: {why}")
    return tuple(name for name in names if name != CPP or why is None)


def lstm(name: str, hidden: int) -> Layer:
    """The layer of a name, FLAX or one of OPTIONS."""
    if name == FLAX:
        return linen("OptimizedLSTMCell", "lstm", hidden)
    cell = rnncore.LSTM(hidden)
    return Layer(lambda params, xs: rnncore.unroll(cell, params, xs, **OPTIONS[name])[1])


def measure(args: argparse.Namespace, write: records.Writer) -> None:
    """Writes one record for each policy; an interruption during the rounds leaves those that all had finished."""
    batch, steps, features, hidden = args.shape
    workload = Workload("memory", "memory policies", "lstm", batch, steps, features, hidden)
    case = Case(workload, platform=jax.default_backend())
    problem = make_problem(workload, "float32", True)
    truth = reference(workload, problem, True)["gradient"] if batch * steps <= LARGEST_CHECK else None
    problem = jax.tree.map(jnp.asarray, problem)  # so that all policies share the arrays
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    turns: dict[str, dict[str, Any]] = {}
    try:
        for name in available(POLICIES):
            records.say(f"compiling {name}")
            built = jax_peers.build(lstm(name, hidden), case, problem, "gradient")
            error = None if truth is None else timing.relative_error(built.result(), truth)
            jax.block_until_ready(built.call())
            calls[name] = built.call
            found[name] = {"policy": name, "shape_BTDH": list(args.shape), "relative_error": error, **built.figures}
        records.say(f"{args.rounds} rounds")
        timing.take_turns(calls, args.rounds, args.seconds, turns=turns)
    finally:
        for record in in_terms_of_flax(found, turns):
            write("memory", **record)
            print(records.shown(record), flush=True)


def in_terms_of_flax(found: dict[str, dict[str, Any]], turns: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole records of the policies that took turns."""
    whole = []
    for name, turn in turns.items():
        if not turn["ms"]:
            continue
        flax, own = found[FLAX]["temporary_bytes"], found[name]["temporary_bytes"]
        ratios = (ours / theirs for ours, theirs in zip(turn["ms"], turns[FLAX]["ms"], strict=True))
        whole.append(
            found[name] | turn | timing.spread(turn["ms"])
            | {"times_flax_time": statistics.median(ratios), "times_flax_memory": own / flax if own and flax else None}
        )  # fmt: skip
    return whole


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = records.parser("memory", __doc__, rounds=5)
    parser.add_argument("--shape", type=options.count, nargs=4, default=[64, 1024, 256, 256],
                        metavar=("B", "T", "D", "H"), help="default: 64 1024 256 256")  # fmt: skip
    args = parser.parse_args(argv)
    path = args.out or records.default_path("memory", args.record)
    return records.session("memory", path, argv, args.rounds, args.seconds, functools.partial(measure, args))


if __name__ == "__main__":
    sys.exit(main())
