"""What the command lines share: options, and SIGTERM as Ctrl-C.  Imports no JAX."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
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
