"""Benchmarks whose result is one JSON object: options, a loop over cases with progress, and what Ctrl-C keeps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from benchmarks import records
from rnncore._command import timing

Case = TypeVar("Case")


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """With --rounds, --seconds, --quick and --out, and the help from a docstring."""
    summary, _, details = (doc or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--rounds", type=int, default=11, help="rounds of all in turn (default: 11)")
    made.add_argument("--seconds", type=float, default=0.2, help="time of one turn, roughly (default: 0.2)")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    made.add_argument("--out", type=Path, help="JSON file; written after every case")
    return made


def parsed(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    args = made.parse_args(argv)
    records.check_rounds(made, args)
    return args


def run(
    benchmark: str, args: argparse.Namespace, cases: Sequence[Case],
    measure: Callable[[Case], list[dict[str, Any]]], line: Callable[[list[dict[str, Any]]], str],
) -> int:  # fmt: skip
    """Measures every case, shows a line for each, and writes the object; exit status 0, or 130 where interrupted."""
    result: dict[str, Any] = {
        "benchmark": benchmark, "machine": timing.machine(), "started": records.now(), "rounds": args.rounds,
        "quick": args.quick, "records": [], "interrupted": False,
    }  # fmt: skip
    with tqdm(total=len(cases), unit="case", dynamic_ncols=True) as bar:
        try:
            for case in cases:
                bar.set_description(str(case)[:60])
                found = measure(case)
                result["records"] += found
                bar.write(line(found), file=sys.stdout)
                bar.update()
                timing.write(args.out, result)
        except KeyboardInterrupt:
            result["interrupted"] = True
    timing.write(args.out, result)
    _summarise(result["records"])
    if result["interrupted"]:
        print("interrupted; the cases above are complete", file=sys.stderr)
    return 130 if result["interrupted"] else 0


def _summarise(found: list[dict[str, Any]]) -> None:
    """Prints the mean speed of each part against each peer."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for record in found:
        for name in ("flax", "torch") if record.get("side") == "rnncore" else ():
            if f"speed_against_{name}" in record:
                speeds.setdefault((record.get("part", "rnncore"), name), []).append(record[f"speed_against_{name}"])
    for (part, name), own in speeds.items():
        mean = timing.geometric_mean(own)
        print(f"{part}: geometric mean {mean:.2f}, least {min(own):.2f} times the speed of {name}")
