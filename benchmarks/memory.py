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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import policies, records
from benchmarks.peers import Case, jax_programs
from benchmarks.peers.problem import make_problem
from benchmarks.peers.reference import reference
from benchmarks.workloads import Workload
from rnncore._command import timing

POLICIES = (policies.FLAX, *(name for name in policies.OPTIONS if name != policies.CHUNKS))
LARGEST_CHECK = 20_000  # steps of all sequences, B T, that the float64 reference is run for


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
    names = policies.available(POLICIES)
    progress = records.Progress(len(names) * (1 + args.rounds))
    try:
        for name in names:
            progress.case(f"compiling {name}")
            layer = policies.lstm(name, hidden)
            params = layer.own(problem.params)
            built = jax_programs.build(layer.apply, params, layer.core, case, problem, "gradient")
            error = None if truth is None else timing.relative_error(built.result(), truth)
            jax.block_until_ready(built.call())
            calls[name] = built.call
            found[name] = {"policy": name, "shape_BTDH": list(args.shape), "relative_error": error, **built.figures}
            progress.tick()
        progress.case(f"{args.rounds} rounds")
        timing.take_turns(calls, args.rounds, args.seconds, progress.tick, turns=turns)
    finally:
        progress.close()
        done = timing.complete_rounds(turns) if len(turns) == len(names) else {}
        for record in in_terms_of_flax(found, done):
            write("memory", **record)
            print(line(record), flush=True)


def in_terms_of_flax(found: dict[str, dict[str, Any]], turns: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole records of the policies that took turns."""
    whole = []
    for name, turn in turns.items():
        flax, own = found[policies.FLAX]["temporary_bytes"], found[name]["temporary_bytes"]
        ratios = (ours / theirs for ours, theirs in zip(turn["ms"], turns[policies.FLAX]["ms"], strict=True))
        whole.append(
            found[name] | turn | timing.spread(turn["ms"])
            | {"times_flax_time": statistics.median(ratios), "times_flax_memory": own / flax if own and flax else None}
        )  # fmt: skip
    return whole


def line(record: dict[str, Any]) -> str:
    """A record in a line for the terminal."""
    memory, size, error = record["times_flax_memory"], record["temporary_bytes"], record["relative_error"]
    return (
        f"{record['policy']:34} {record['median_ms']:9.4g} ms, {record['times_flax_time']:5.2f} of flax.linen's; "
        f"{'-' if size is None else f'{size / 2**20:9.4g}'} MiB, {'-' if memory is None else f'{memory:5.2f}'} of it"
        + ("" if error is None else f"; error {error:.1e}")
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = records.parser("memory", __doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=[64, 1024, 256, 256], metavar=("B", "T", "D", "H"),
                        help="batch, steps, features, units (default: 64 1024 256 256)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="of all policies in turn (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn, at least one call (default: 0.2)")
    args = parser.parse_args(argv)
    if min(args.shape) < 1:
        parser.error(f"--shape {' '.join(map(str, args.shape))}: expected sizes of at least 1")
    records.check_rounds(parser, args)
    path = args.out or records.default_path("memory", args.record)
    measure_policies = functools.partial(measure, args)
    return records.session("memory", path, argv, args.rounds, args.seconds, measure_policies)


if __name__ == "__main__":
    sys.exit(main())
