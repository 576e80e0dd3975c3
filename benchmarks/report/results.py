"""Reads the results of the benchmarks and picks the runs that count."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

# Results that are one JSON object, by the name of their benchmark.
OBJECTS = ("migration", "analysis", "front door", "retention")


@dataclasses.dataclass
class Run:
    """One run of a benchmark.

    Fields:
      path: the file that it stands in.
      head: its record "run".
      records: all others in order, but the last one.
      end: its record "end"; None where the run was cut off.
    """

    path: Path
    head: Record
    records: list[Record] = dataclasses.field(default_factory=list)
    end: Record | None = None

    @property
    def complete(self) -> bool:
        """Whether it came to its end."""
        return self.end is not None and not self.end["interrupted"]

    @property
    def machine(self) -> Record:
        return self.head["machine"]

    @property
    def key(self) -> tuple[str, str, str]:
        """(tag, device, JAX major.minor): of the runs with one key the newest complete one counts."""
        return self.head["tag"], self.machine["device"], ".".join(self.machine["jax"].split(".")[:2])

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """The records of a kind whose fields have these values."""
        return [r for r in self.records if r["record"] == kind and all(r[k] == v for k, v in fields.items())]


@dataclasses.dataclass
class Results:
    """All that was read: the runs, and the single JSON objects by the name of their benchmark."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    objects: dict[str, Record] = dataclasses.field(default_factory=dict)

    def chosen(self, kind: str, tag: str | None = None, **fields: Any) -> list[Run]:
        """The run that counts of each device and JAX version, newest first, among those that have such records.

        A complete run goes before one that was cut short, a whole one before a quick one, one of more workloads before
        one that was asked for a few of them, then the newest.
        """
        best: dict[tuple, Run] = {}
        for run in self.runs:
            if tag not in (None, run.head["tag"]) or not run.of(kind, **fields):
                continue
            if run.key not in best or _rank(run) > _rank(best[run.key]):
                best[run.key] = run
        return sorted(best.values(), key=_rank, reverse=True)


def _rank(run: Run) -> tuple[bool, bool, int, str]:
    workloads = {r["workload"] for r in run.of("time")}
    return run.complete, not run.head["quick"], len(workloads), run.head["started"]


def read(paths: Sequence[Path]) -> Results:
    """The results in these files, *.jsonl of runs and *.json of single objects.

    Raises:
      ValueError: what is no JSON or no result that the tables know, with file and line.
      OSError: a file cannot be read.
    """
    results = Results()
    for path in paths:
        if path.suffix == ".jsonl":
            results.runs += read_runs(path)
            continue
        found = json.loads(path.read_text())
        name = found.get("benchmark")
        if name not in OBJECTS:
            raise ValueError(f"{path}: a result of the benchmark {name!r}; expected one of {', '.join(OBJECTS)}")
        results.objects.setdefault(name, found)  # of several, the first by name
    return results


def read_runs(path: Path) -> list[Run]:
    """The runs in a file of JSON lines; a last line of a run that a kill cut off is left out, and said on stderr."""
    runs: dict[str, Run] = {}
    last: Run | None = None
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not any(lines[number:]) or '"record": "run"' in lines[number]:
                print(f"{where}: cut off, left out", file=sys.stderr)
                continue
            raise ValueError(f"{where}: no JSON: {error.msg}") from error
        if record["record"] == "run":
            if record["run"] in runs:
                raise ValueError(f"{where}: a second run {record['run']!r}; every run has an id of its own")
            last = runs[record["run"]] = Run(path, record)
            continue
        owner = runs.get(record["run"]) if "run" in record else last
        if owner is None:
            raise ValueError(f"{where}: belongs to no run above it, so it is not known what machine measured it")
        if record["record"] == "end":
            owner.end = record
        else:
            owner.records.append(record)
    return list(runs.values())


def groups(records: Iterable[Record], *fields: str) -> dict[tuple, list[Record]]:
    """Records by the values of some fields, in the order of their first."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[f] for f in fields), []).append(record)
    return found
