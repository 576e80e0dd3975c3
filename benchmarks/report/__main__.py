"""Writes every table and the chart of the documents from the results of the benchmarks: no number is typed by hand.

  python -m benchmarks.report                            all, from benchmarks/results/
  python -m benchmarks.report --check                    exit 1 where a document is not what the results give
  python -m benchmarks.report --results mine.jsonl       prints the tables of these files

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->, the chart too.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.report import compact, contenders, earlier, front_door, others, pages
from benchmarks.report.results import Results, read

ROOT = Path(__file__).resolve().parent.parent.parent
END = "<!-- end of table -->"
BEGIN = re.compile(r"^<!-- table: (.+) -->$", re.MULTILINE)
CHART = "docs/front_door.png"

Table = Callable[[Results], str | None]


def of_object(name: str, table: Callable[[dict[str, Any]], str]) -> Table:
    """The table of a benchmark whose result is one JSON object."""
    return lambda results: table(results.objects[name]) if name in results.objects else None


def chart(results: Results) -> str | None:
    """The line that shows the chart."""
    words = "Speed of a training step of Flax, PyTorch and rnncore, by shape, in terms of Flax's"
    return f"![{words}]({CHART})" if front_door.steps(results) is not None else None


CPU, FRONT_DOOR = "run --tag cpu", "front_door --out FILE"
# By document: the tables that it has to have, by marker, and the command that measures what they show.
TABLES: dict[str, dict[str, tuple[Table, str]]] = {
    "README.md": {
        "plot-front-door": (chart, FRONT_DOOR),
        "front-door": (of_object("front door", front_door.table), FRONT_DOOR),
    },
    "docs/performance.md": {
        "cpu-gradient": (functools.partial(compact.cpu, measurement="gradient"), CPU),
        "cpu-forward": (functools.partial(compact.cpu, measurement="forward"), CPU),
        "memory": (others.memory, "memory"),
        "analysis": (of_object("analysis", earlier.analysis), "analysis --out FILE"),
    },
    "docs/migration.md": {"migration": (of_object("migration", earlier.migration), "migration --out FILE")},
    "docs/online.md": {
        "cosines": (of_object("online/cpu", pages.cosines), "online"),
        "times": (of_object("online/cpu", pages.online_times), "online"),
    },
    "docs/parallel.md": {
        "forecasts": (of_object("parallel/cpu", pages.forecasts), "parallel"),
        "times, cpu": (of_object("parallel/cpu", pages.parallel_times), "parallel"),
        "times, gpu": (of_object("parallel/gpu", pages.parallel_times), "parallel --only times"),
    },
    "docs/reinforcement.md": {
        "updates": (of_object("reinforcement/cpu", pages.updates), "reinforcement"),
        "steps": (of_object("reinforcement/cpu", pages.single_steps), "reinforcement"),
    },
    "docs/cells.md": {"slstm": (of_object("slstm/cpu", pages.slstm), "slstm")},
    "benchmarks/README.md": {
        "cpu": (functools.partial(contenders.table, tag="cpu"), CPU),
        "gpu": (functools.partial(contenders.table, tag="gpu"), "gpu_check"),
        "compile": (others.compiling, "compile"),
        "retention": (of_object("retention", earlier.retention), "retention --out FILE"),
    },
}  # fmt: skip


def put(text: str, marker: str, table: str) -> str:
    """The text with the table in place of what stands between its markers.

    Raises:
      ValueError: the markers are missing.
    """
    begin = f"<!-- table: {marker} -->"
    before, found, rest = text.partition(begin)
    old, closed, after = rest.partition(END)
    if not found or not closed or "<!-- table:" in old:
        raise ValueError(f"expected the lines {begin} and {END} where the table is to stand")
    return f"{before}{begin}\n{table}\n{END}{after}"


def written(document: str, text: str, results: Results) -> str:
    """A document with all of its tables; one without results says how to measure it.

    Raises:
      ValueError: a marker is missing, or names no table.
    """
    tables = TABLES[document]
    unknown = [name for name in BEGIN.findall(text) if name not in tables]
    if unknown:
        raise ValueError(f"<!-- table: {unknown[0]} --> names no table; expected one of {', '.join(tables)}")
    for name, (table, command) in tables.items():
        text = put(text, name, table(results) or f"Not yet measured. `python -m benchmarks.{command}` measures it.")
    return text


def shown(results: Results) -> int:
    """Prints the tables of these results."""
    found = {name: table(results) for tables in TABLES.values() for name, (table, _) in tables.items()}
    told = [f"{name}:\n\n{text}\n" for name, text in found.items() if text is not None and "plot" not in name]
    print("\n".join(told) or "these results belong to no table")
    return 0 if told else 1


def main(argv: list[str] | None = None) -> int:
    """Writes the documents and the chart, or says which are not what the results give."""
    parser = options.parser("report", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="print the tables of these files")
    args = parser.parse_args(argv)
    folder = ROOT / "benchmarks" / "results"
    try:
        results = read(args.results or sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]))
        for file in () if args.results else folder.glob("*/*.json"):
            results.objects[f"{file.parent.name}/{file.stem}"] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.results:
        return shown(results)
    new: dict[str, bytes] = {}
    for document in TABLES:
        try:
            text = (ROOT / document).read_text()
            made = written(document, text, results)
        except (OSError, ValueError) as error:
            parser.error(f"{document}: {error}")
        if made != text:
            new[document] = made.encode()
    data = front_door.steps(results)
    if data is not None and not front_door.shows(ROOT / CHART, data):
        new[CHART] = b"" if args.check else front_door.png(data)
    for path, content in new.items():
        if args.check:
            print(f"{path}: not what the results give; run `python -m benchmarks.report`", file=sys.stderr)
        else:
            (ROOT / path).write_bytes(content)
            print(f"wrote {os.path.relpath(ROOT / path)}")
    return int(bool(new) and args.check)


if __name__ == "__main__":
    sys.exit(main())
