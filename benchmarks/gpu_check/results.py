"""The times of a check as one run of the benchmark, for the tables of the documents."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu_check.processes import TIMES, read


def as_one_run(out: Path, file: Path) -> int:
    """Appends the runs of a check, one for each group, to a file of results as a single one; how many times it has.

    Raises:
      ValueError: there are no times.
    """
    records = read(out / TIMES)
    heads = [r for r in records if r["record"] == "run"]
    times = sum(r["record"] == "time" for r in records)
    if not times:
        raise ValueError(f"no times in {out / TIMES}")
    head, ends = heads[0], [r for r in records if r["record"] == "end"]
    kept = [r for r in records if r["record"] not in ("run", "end", "round")]
    finished = ends[-1]["finished"] if ends else head["started"]
    # A group that was killed has no end of its own.
    whole = len(ends) == len(heads) and not any(r["interrupted"] or r["reason"] for r in ends)
    end = {"record": "end", "finished": finished, "interrupted": not whole, "reason": None if whole else "cut short"}
    lines = [head | {"argv": ["benchmarks.gpu_check"]}, *kept, end]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as target:
        target.writelines(json.dumps(line | {"run": head["run"]}) + "\n" for line in lines)
    return times
