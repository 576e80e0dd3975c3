"""The JSON lines that a benchmark leaves, and an end that keeps what was done."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import options
from benchmarks.peers import PEERS
from rnncore._command import timing


class Writer:
    """Appends JSON lines to a file, each written out at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.run = uuid.uuid4().hex[:12]
        # A run that was killed may have left half a line.
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a")
        self._file.write("\n" if cut else "")

    def __call__(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes a record of a kind and returns it."""
        record = {"record": kind, "run": self.run, **fields}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        return record

    def close(self) -> None:
        self._file.close()


def parser(command: str, doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """With --out and --record."""
    where = "<command or tag>_<device>_jax<version>.jsonl where you are"
    made = options.parser(command, doc, rounds, out=f"JSON lines are appended to this file (default: {where})")
    made.add_argument("--record", action="store_true", help="append to the project's own results, benchmarks/results/")
    return made


def asked(argv: Sequence[str] | None) -> list[str]:
    """The options of a run without --out and its path, which describe a machine and not the run."""
    given = iter(sys.argv[1:] if argv is None else argv)
    return [a for a in given if not (a == "--out" and [next(given, None)]) and not a.startswith("--out=")]


def default_path(tag: str, record: bool) -> Path:
    """<tag>_<device>_jax<major.minor>.jsonl, where the command was called or among the project's own results."""
    kind = jax.devices()[0].device_kind
    # A CPU calls itself "cpu"; the processor's name is in brackets in the name of the machine.
    name = timing.machine()["device"].partition("(")[2].rstrip(")") if kind.lower() == "cpu" else kind
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", "", name.lower()))
    slug = "-".join(word for word in words[:6] if word not in ("cpu", "processor")) or "cpu"
    folder = options.RESULTS if record else Path.cwd()
    return folder / f"{tag}_{slug}_jax{'.'.join(jax.__version__.split('.')[:2])}.jsonl"


def machine() -> dict[str, Any]:
    """What ran; dtype and the like stand in every record."""
    told = {k: v for k, v in timing.machine().items() if k not in ("dtype", "input_product")}
    versions: dict[str, str | None] = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax")}
    return told | {"platform": jax.default_backend(), "versions": versions | {p.module: p.version() for p in PEERS}}


def now() -> str:
    """Date and time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def say(text: str) -> None:
    """Tells of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def shown(record: dict[str, Any]) -> str:
    """The numbers and words of a record in a line; `benchmarks.report --results` makes tables of them."""
    plain = {name: value for name, value in record.items() if not isinstance(value, list | tuple | dict)}
    return ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in plain.items())


def session(
    tag: str, path: Path, argv: Sequence[str] | None, rounds: int, seconds: float | None,
    measure: Callable[[Writer], None], *, quick: bool = False,
) -> int:  # fmt: skip
    """The record of the run, those that `measure` writes, and the end; exit status 0, or 130 where interrupted.

    The tables mention that a run is `quick`, a short one.
    """
    writer, reason, where = Writer(path), None, machine()
    writer(
        "run", argv=asked(argv), started=now(), machine=where, commit=where["commit"], tag=tag, quick=quick,
        rounds=rounds, seconds=seconds,
    )  # fmt: skip
    try:
        with options.terminable():
            measure(writer)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "Ctrl-C"
    writer("end", finished=now(), interrupted=reason is not None, reason=reason)
    writer.close()
    say(f"{'interrupted; what was done is' if reason else 'all'} in {os.path.relpath(path)}")
    return 130 if reason else 0
