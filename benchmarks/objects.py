"""Benchmarks whose result is one JSON object: options, a loop over cases, and what Ctrl-C keeps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from benchmarks import options, records
from rnncore._command import timing

Case = TypeVar("Case")


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """With --rounds, --seconds, --quick and --out."""
    made = options.parser(command, doc, rounds=11, out="JSON file; written after every case")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    return made


def run(
    benchmark: str, args: argparse.Namespace, cases: Sequence[Case], measure: Callable[[Case], list[dict[str, Any]]]
) -> int:
    """Measures every case, shows its records, and writes the object; exit status 0, or 130 where interrupted."""
    result: dict[str, Any] = {
        "benchmark": benchmark, "machine": timing.machine(), "started": records.now(), "rounds": args.rounds,
        "quick": args.quick, "records": [], "interrupted": False,
    }  # fmt: skip
    try:
        for number, case in enumerate(cases, 1):
            records.say(f"{number} of {len(cases)}: {case}")
            found = measure(case)
            result["records"] += found
            print(*map(records.shown, found), sep="\n", flush=True)
            timing.write(args.out, result)
    except KeyboardInterrupt:
        result["interrupted"] = True
    timing.write(args.out, result)
    speeds: dict[tuple[str, str], list[float]] = {}
    for record in result["records"]:
        for name in ("flax", "torch") if record.get("side") == "rnncore" else ():
            if f"speed_against_{name}" in record:
                speeds.setdefault((record.get("part", "rnncore"), name), []).append(record[f"speed_against_{name}"])
    for (part, name), own in speeds.items():
        mean = timing.geometric_mean(own)
        print(f"{part}: geometric mean {mean:.2f}, least {min(own):.2f} times the speed of {name}")
    if result["interrupted"]:
        records.say("interrupted; the cases above are complete")
    return 130 if result["interrupted"] else 0
