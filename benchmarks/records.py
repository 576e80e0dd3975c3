"""The records that a benchmark leaves, its progress on the terminal, and an end that keeps what was done."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers import PEERS
from rnncore._command import timing

RESULTS = Path(__file__).resolve().parent / "results"


class Writer:
    """Appends JSON lines to a file, each written out at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.run = path, uuid.uuid4().hex[:12]
        # A run that was killed may have left half a line.
        cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a")
        if cut:
            self._file.write("\n")

    def __call__(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Writes a record of a kind and returns it."""
        record = {"record": kind, "run": self.run, **fields}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        return record

    def close(self) -> None:
        self._file.close()


class Progress:
    """A bar on stderr, or a line for each case where stderr is no terminal."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="turn", dynamic_ncols=True)

    def case(self, title: str) -> None:
        """A case begins."""
        if self._bar is not None:
            self._bar.set_description(title)
        else:
            print(title, file=sys.stderr, flush=True)

    def tick(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """With --out and --record, and the help from a docstring."""
    summary, _, details = (doc or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    where = "<command or tag>_<device>_jax<version>.jsonl where you are"
    made.add_argument("--out", type=Path, help=f"JSON lines are appended to this file (default: {where})")
    made.add_argument("--record", action="store_true", help="append to the project's own results, benchmarks/results/")
    return made


def check_rounds(made: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses --rounds and --seconds that measure nothing."""
    if args.rounds < 1 or not args.seconds > 0:
        made.error(f"--rounds {args.rounds} --seconds {args.seconds}: expected at least 1 round of more than 0 s")


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
    folder = RESULTS if record else Path.cwd()
    return folder / f"{tag}_{slug}_jax{'.'.join(jax.__version__.split('.')[:2])}.jsonl"


def machine() -> dict[str, Any]:
    """What ran; dtype and the like stand in every record."""
    told = {k: v for k, v in timing.machine().items() if k not in ("dtype", "input_product")}
    versions: dict[str, str | None] = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax")}
    return told | {"platform": jax.default_backend(), "versions": versions | {p.module: p.version() for p in PEERS}}


def now() -> str:
    """Date and time, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def session(
    tag: str, path: Path, argv: Sequence[str] | None, rounds: int, seconds: float | None,
    measure: Callable[[Writer], str | None], *, quick: bool = False,
) -> int:  # fmt: skip
    """The record of the run, those that `measure` writes, and the end; exit status 0, or 130 where interrupted.

    Args:
      measure: returns a reason if it left something out.
      quick: whether it is a short run, which the tables mention.
    """
    writer, interrupted, reason = Writer(path), False, None
    with terminable():
        try:
            where = machine()
            writer(
                "run", argv=asked(argv), started=now(), machine=where, commit=where["commit"], tag=tag, quick=quick,
                rounds=rounds, seconds=seconds,
            )  # fmt: skip
            reason = measure(writer)
        except KeyboardInterrupt as stop:
            interrupted, reason = True, str(stop) or "Ctrl-C"
        writer("end", finished=now(), interrupted=interrupted, reason=reason)
    writer.close()
    print(f"{'interrupted; what was done is' if interrupted else 'all'} in {os.path.relpath(path)}", file=sys.stderr)
    return 130 if interrupted else 0


@contextlib.contextmanager
def terminable(grace: float = 10.0) -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt; a process that has not handled it, or Ctrl-C, after `grace` s is ended.

    Python handles a signal between two of its own operations, and a process that waits for a hung kernel never reaches
    one: a second thread sees the signal too.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set a handler.
        return
    done = threading.Event()
    listen, tell = socket.socketpair()
    tell.setblocking(False)
    before, before_wakeup = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(tell.fileno())

    def watch() -> None:
        while (heard := listen.recv(1)) and heard[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        if heard and not done.wait(grace):
            print(f"still running {grace:g} s after a signal: killed; the records are complete", file=sys.stderr)
            os._exit(130)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before_wakeup)
        signal.signal(signal.SIGTERM, before)
        tell.close()  # ends the watcher
        watcher.join()
        listen.close()
