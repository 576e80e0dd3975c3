"""Parts in processes of their own, watched and killed when they stall, and the records that they append.

A process that waits for a hung kernel hears no signal but SIGKILL.  Each has a session of its own, so that its
children end with it.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER, WORK, BEGIN = "GPU_CHECK_FOLDER", "GPU_CHECK_WORK", "GPU_CHECK_BEGIN"
RECORDS, TIMES, LOGS = "checks.jsonl", "times.jsonl", "log_*.txt"
RESERVE = 6.0
"""Seconds kept for the table."""


class Runner:
    """Starts, watches and ends the parts of a run.

    Args:
      out: the folder of the records.
      work: a folder for what the parts leave for each other.
      seconds: for everything.
      environment: of the parts, beside this process's own.
      options: arguments for every part.
    """

    def __init__(self, out: Path, work: Path, seconds: float, environment: Mapping[str, str], options: list[str]):
        self.out, self.work, self._seconds, self._begin = out, work, seconds, time.time()
        os.environ[BEGIN] = str(self._begin)
        own = {FOLDER: str(out), WORK: str(work), BEGIN: str(self._begin), "PYTHONUNBUFFERED": "1"}
        self._environment = {**os.environ, **environment, **own}
        self._options = options
        self._logs: dict[subprocess.Popen, Path] = {}  # of all that were started

    def path(self) -> str | None:
        """Where the parts look for programs."""
        return self._environment.get("PATH")

    def left(self) -> float:
        """Seconds for parts."""
        return self._seconds - RESERVE - self.passed()

    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.time() - self._begin

    def write(self, part: str, **fields: Any) -> None:
        """A record of the driver's own, shown too."""
        record = append(self.out, {"part": part, **fields})
        print(json.dumps(record)[:240] + "\n", end="", flush=True)  # in one piece: parts run side by side

    def start(
        self, part: str, given: Mapping[str, Any] | None = None, command: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen:  # fmt: skip
        """A part with its arguments, in the background; `command` in place of a part of this package's own."""
        told = json.dumps(given or {})
        own = [sys.executable, "-m", "benchmarks.gpu_check", *self._options, "--part", part, "--given", told]
        path = self.out / LOGS.replace("*", f"{time.monotonic_ns()}_{part.replace(' ', '_')}")
        with path.open("wb") as log:
            process = subprocess.Popen(
                command or own, env={**self._environment, **(environment or {})}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._logs[process] = path
        return process

    def wait(self, process: subprocess.Popen, limit: float, stall: float) -> str | None:
        """None, or why it was killed or failed; a stall is `stall` seconds without a word of it."""
        begin, log = time.time(), self._logs[process]
        while process.poll() is None:
            now = time.time()
            why = f"more than its {limit:.0f} s" if now - begin > limit else None
            why = why or (f"nothing new for {stall:g} s" if now - log.stat().st_mtime > stall else None)
            why = why or ("the time given is up" if self.left() <= 0 else None)
            if why is not None:
                self.kill(process)
                return f"killed after {now - begin:.0f} s: {why}"
            time.sleep(0.1)
        return None if process.returncode == 0 else f"exit status {process.returncode}"

    def run(self, part: str, *, limit: float = 600, stall: float = 60, **start: Any) -> bool:
        """A part from its start to its end; whether it ended well."""
        limit = min(limit, self.left())
        if limit < 5:
            self.write("ran", of=part, failed="not started: no time left")
            return False
        begin = time.monotonic()
        why = self.wait(self.start(part, **start), limit, stall)
        seconds = round(time.monotonic() - begin, 1)
        self.write("ran", of=part, given=start.get("given"), seconds=seconds, failed=why)
        return why is None

    def found(self, part: str) -> list[dict[str, Any]]:
        """The records of a part so far."""
        return [r for r in read(self.out / RECORDS) if r.get("part") == part]

    def kill(self, process: subprocess.Popen) -> None:
        """Ends a process, with its children, which share its session."""
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_all(self) -> None:
        """Ends all that still run; nothing more is started."""
        self._seconds = 0
        for process in list(self._logs):
            self.kill(process)

    def side_by_side(self, run: Callable[..., Any], every: Sequence[tuple[Any, ...]]) -> None:
        """Calls run(*arguments) for all of them at once, each in a thread; an interruption ends their parts."""
        with concurrent.futures.ThreadPoolExecutor(max(1, len(every))) as pool:
            try:
                list(pool.map(lambda arguments: run(*arguments), every))
            except BaseException:
                self.kill_all()
                raise


def die_with_parent() -> None:
    """Has the kernel end this process with its driver, however that one ends (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def step_aside() -> None:
    """Leaves half of the cores to those that are timed: launching kernels from the host bears no neighbours."""
    os.nice(19)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[len(cores) // 2 :])


def folder() -> Path:
    """Of the run that this process is a part of."""
    return Path(os.environ[FOLDER])


def work() -> Path:
    """What the parts leave for each other."""
    return Path(os.environ[WORK])


def tell(part: str, **fields: Any) -> None:
    """Appends a record of a part."""
    append(folder(), {"part": part, **fields})
    print(part, fields.get("name", ""), flush=True)  # a word to the driver that this part goes on


def append(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A line, with the seconds since the beginning of the run, in one write, because several processes append."""
    record = {"at": round(time.time() - float(os.environ[BEGIN]), 1), **record}
    with (folder / RECORDS).open("ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())
    return record


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a line that a kill has cut."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
