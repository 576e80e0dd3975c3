"""What the command lines share: options, and SIGTERM as Ctrl-C.  Imports no JAX."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def parser(
    command: str, doc: str | None, rounds: int | None = None, seconds: float = 0.2, out: str | None = None
) -> argparse.ArgumentParser:
    """The help from a docstring; --rounds and --seconds with these defaults, --out with this help."""
    summary, _, details = (doc or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    if rounds is not None:
        made.add_argument("--rounds", type=count, default=rounds, help=f"of all in turn (default: {rounds})")
        made.add_argument("--seconds", type=duration, default=seconds, help=f"of one turn (default: {seconds:g})")
    if out is not None:
        made.add_argument("--out", type=Path, help=out)
    return made


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return int(text)


def duration(text: str) -> float:
    """More than 0 s."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 s")
    return float(text)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
