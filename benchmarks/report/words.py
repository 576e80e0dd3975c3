"""How the tables write numbers, rows and what was measured where; ratios within rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.report.results import Record, Run
from benchmarks.workloads import WORKLOADS

NOISE = "The machine is shared: treat differences under 5 % as noise."
NONE = "-"
# What JAX itself and its libraries call themselves in a record's library; ours and those of other frameworks are not.
JAX_PEERS = ("flax", "haiku", "equinox", "jax")


def ratio(slow: Record, fast: Record) -> float:
    """How many times as fast the second is: the median over rounds of the ratio within the round.

    All contenders of a workload take turns in a round.  What was not timed in the same rounds, as their numbers
    show, is compared by its median.
    """
    a, b = slow["ms"], fast["ms"]
    if len(a) != len(b):
        return slow["median_ms"] / fast["median_ms"]
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def fastest(records: Iterable[Record]) -> Record | None:
    """The record of the least median time."""
    return min(records, key=lambda r: r["median_ms"], default=None)


def is_peer(record: Record) -> bool:
    """Not one of ours."""
    return record["library"] != "rnncore"


def is_jax_peer(record: Record) -> bool:
    """Another JAX library."""
    return record["library"].split(".")[0] in JAX_PEERS


def number(x: float | None) -> str:
    """Three digits, no exponent above a thousandth."""
    if x is None:
        return NONE
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 1 else f"{x:.3g}"


def times(x: float | None) -> str:
    """A ratio."""
    return NONE if x is None else f"{x:.2f}"


def error(x: float | None) -> str:
    """A relative error: its size is what matters."""
    return NONE if x is None else f"{x:.0e}"


def mebibytes(size: int | None) -> str:
    """Bytes in MiB."""
    return NONE if size is None else f"{size / 2**20:.0f}" if size > 2**30 else f"{size / 2**20:.3g}"


def spread(record: Record) -> str:
    """Median, least and largest time."""
    return f"{number(record['median_ms'])} [{number(record['min_ms'])}..{number(record['max_ms'])}]"


def shape(record: Record) -> str:
    """(B, T, D, H), and the heads where there are several."""
    text = f"({record['B']}, {record['T']}, {record['D']}, {record['H']})"
    return text + (f", {record['heads']} heads" if record["heads"] > 1 else "")


def title(record: Record) -> str:
    """The workload of a record: name, cell, shape, and whose it is."""
    known = WORKLOADS.get(record["workload"])
    return f"`{record['workload']}`: {record['cell']} {shape(record)}" + (f"; {known.origin}" if known else "")


def row(cells: Iterable[str]) -> str:
    """A line of a table; a bar inside a cell would end it, and becomes a slash."""
    return "|" + "|".join(f" {cell.replace('|', '/')} " if cell else " " for cell in cells) + "|"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [row(head), "|" + "---|" * len(head)]
    for cells in rows:
        if len(cells) != len(head):
            raise AssertionError(f"{len(cells)} cells {list(cells)} under {len(head)} titles {list(head)}")
        lines.append(row(cells))
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value of a field in a cell."""
    if isinstance(value, bool):
        return "included" if value else "not included"
    return NONE if value is None else str(value)


def of_all(records: Iterable[Record], field: str) -> str:
    """The one value that all records have in a field; where they differ the table has a column for it."""
    values = {r[field] for r in records}
    return shown(values.pop()) if len(values) == 1 else "by row"


def place(run: Run) -> str:
    """Device, cores, versions, commit, date."""
    machine = run.machine
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items() if v and name != "jax")
    return (
        f"{machine['device']}, {machine['cores']} cores; Python {machine['python']}, JAX {machine['jax']}"
        f"{', ' + versions if versions else ''}; commit {run.head['commit']}, {run.head['started'][:10]}"
    )


def state(run: Run) -> str:
    """What is to be known of a run that is not whole; empty for one that is."""
    told = ["A quick run: fewer workloads and rounds."] if run.head["quick"] else []
    reason = "cut off" if run.end is None else run.end["reason"]
    if reason or not run.complete:
        told.append(f"The run did not come to its end ({reason or 'interrupted'}): what is missing was not reached.")
    return " ".join(told)


def counts(lists: Iterable[Sequence[Any]]) -> str:
    """How many there are in each: a number or a range."""
    found = sorted({len(one) for one in lists})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def conditions(run: Run, records: Sequence[Record]) -> str:
    """dtype, precision, input product and rounds of some records of a run."""
    return (
        f"Medians of {counts(r['ms'] for r in records)} interleaved rounds of one run; dtype "
        f"{of_all(records, 'dtype')}; matmul precision {of_all(records, 'matmul_precision')}; "
        f"product of inputs and weights {of_all(records, 'input_product')}"
    )


def missing(run: Run, records: Sequence[Record]) -> str:
    """Which contenders are not there beside these records, a line for each reason; empty where none is missing."""
    wanted = {r["workload"] for r in records} | {None}
    measurements = {r["measurement"] for r in records} | {None}
    found: dict[str, dict[str, dict[str, None]]] = {}  # by reason and contender the places, in their order
    for record in run.of("missing"):
        if record["workload"] in wanted and record.get("measurement") in measurements:
            places = found.setdefault(record["reason"], {}).setdefault(record["contender"], {})
            if record["workload"]:
                product = " without the input product" if record.get("input_product") is False else ""
                places[f"{record['workload']} ({record['dtype']}{product})"] = None
    lines = []
    for reason, contenders in found.items():
        told = (f"`{name}`" + " at " * bool(places) + ", ".join(places) for name, places in contenders.items())
        lines.append(f"- {('; ' if any(contenders.values()) else ', ').join(told)}: {reason}")
    return "Missing:\n\n" + "\n".join(lines) if lines else ""
