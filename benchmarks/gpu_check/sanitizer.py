"""NVIDIA's compute-sanitizer over one small run of each backend: stray accesses, races in shared memory, barriers.

All side by side, because only right or wrong is asked for; each within a time limit, because instrumented kernels can
take a thousand times as long.  Needs a machine whose driver lets tools look on.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import NamedTuple

from benchmarks.gpu_check.processes import Runner

TOOLS = ("memcheck", "racecheck", "synccheck")
LIMIT = 100.0


class Case(NamedTuple):
    """A run.

    Fields:
      backend, number: of `checks.CHECKS`.
      kernels: a part of the names of the kernels that are instrumented, or None for all.
    """

    backend: str
    number: int
    kernels: str | None


CASES = (
    Case("mosaic_gpu", 0, "mosaic_gpu"),
    Case("cuda", 0, "rnn_"), Case("cuda", 13, "rnn_"), Case("cudnn", 0, None),
)  # fmt: skip


def drive(runner: Runner, backends: list[str]) -> None:
    """Runs every tool over every case of these backends."""
    tool = shutil.which("compute-sanitizer", path=runner.path())
    if tool is None:
        runner.write("sanitizer", needs="no compute-sanitizer on the path or in the toolkit's folder")
        return
    every = [(runner, tool, kind, case) for kind in TOOLS for case in CASES if case.backend in backends]
    runner.side_by_side(_run, every)


def _run(runner: Runner, tool: str, kind: str, case: Case) -> None:
    log = runner.work / f"{kind}_{case.backend}_{case.number}.txt"
    only = [] if case.kernels is None else ["--kernel-regex", f"kns={case.kernels}"]
    given = json.dumps({"backend": case.backend, "number": case.number})
    own = [sys.executable, "-m", "benchmarks.gpu_check", "--part", "one", "--given", given]
    command = [tool, "--tool", kind, *only, "--log-file", str(log), *own]
    ended_well = runner.run(f"{kind} {case.backend} {case.number}", command=command, limit=LIMIT, stall=LIMIT)
    said = log.read_text(errors="replace") if log.exists() else ""
    runner.write("sanitizer", tool=kind, backend=case.backend, number=case.number, ended=ended_well, **verdict(said))


def verdict(said: str) -> dict[str, object]:
    """errors, None where the tool has not come to its end, and the first that it names."""
    lines = [line.lstrip("= ").strip() for line in said.splitlines()]
    totals = [re.search(r"SUMMARY: (\d+) (?:error|hazard)", line) for line in lines]
    found = [int(total[1]) for total in totals if total]
    named = [
        line for line in lines if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK"))
    ]
    return {"errors": found[-1] if found else None, "first": named[:3]}
