"""What the smaller benchmarks have around them: options, a file of records, and an end that Ctrl-C cannot take away."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import records
from benchmarks.run import terminable


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """With --out, and the help from a docstring."""
    summary, _, details = (doc or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    where = f"{command}_<platform>_jax<version>.jsonl where you are"
    made.add_argument("--out", type=Path, help=f"JSON lines are appended to this file (default: {where})")
    made.add_argument("--record", action="store_true", help="append to the project's own results, benchmarks/results/")
    return made


def path(tag: str, record: bool) -> Path:
    """<tag>_<platform>_jax<major.minor>.jsonl"""
    version = ".".join(jax.__version__.split(".")[:2])
    return records.folder(record) / f"{tag}_{jax.default_backend()}_jax{version}.jsonl"


def run(
    tag: str, args: argparse.Namespace, argv: list[str] | None, rounds: int, seconds: float | None,
    measure: Callable[[argparse.Namespace, records.Writer], None],
) -> int:  # fmt: skip
    """The record of the run, those that `measure` writes, and the end; exit status 0, or 130 where interrupted."""
    writer, interrupted, reason = records.Writer(args.out or path(tag, args.record)), False, None
    with terminable():
        try:
            machine = records.machine()
            writer(
                "run", argv=records.asked(argv), started=records.now(), machine=machine,
                commit=machine["commit"], tag=tag, quick=False, rounds=rounds, seconds=seconds,
            )  # fmt: skip
            measure(args, writer)
        except KeyboardInterrupt as stop:
            interrupted, reason = True, str(stop) or "Ctrl-C"
        writer("end", finished=records.now(), interrupted=interrupted, reason=reason)
    writer.close()
    print(f"{'interrupted; what was done is' if interrupted else 'all'} in {os.path.relpath(writer.path)}",
          file=sys.stderr)  # fmt: skip
    return 130 if interrupted else 0
