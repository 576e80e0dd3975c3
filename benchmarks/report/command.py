"""Writes every table and plot of the documents from the results of the benchmarks: no number is typed by hand.

  python -m benchmarks.report                            all, from benchmarks/results/
  python -m benchmarks.report --check                    exit 1 where a document is not what the results give
  python -m benchmarks.report --results mine.jsonl       prints the tables of these files, with plots beside the first
  python -m benchmarks.report --results new.jsonl --documents    writes them into the project's documents

A table stands between the lines <!-- table: NAME --> and <!-- end of table -->, a plot too.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import compact, earlier, front_door, gpu, others, plots, whole
from benchmarks.report.results import Results, read

ROOT = Path(__file__).resolve().parent.parent.parent
END = "<!-- end of table -->"
BEGIN = re.compile(r"^<!-- table: (\S+) -->$", re.MULTILINE)

Table = Callable[[Results], str | None]


def of_object(name: str, table: Callable[[dict[str, Any]], str]) -> Table:
    """The table of a benchmark whose result is one JSON object."""
    return lambda results: table(results.objects[name]) if name in results.objects else None


def cpu(table: Callable[..., str | None], measurement: str) -> tuple[Table, str]:
    """A table of the CPU, and what measures it."""
    return functools.partial(table, measurement=measurement), "python -m benchmarks.run --tag cpu"


# By document: the tables that it has to have, by marker, and the command that measures what they show.
TABLES: dict[str, dict[str, tuple[Table, str]]] = {
    "README.md": {
        "front-door": (of_object("front door", front_door.table), "python -m benchmarks.front_door --out FILE"),
    },
    "docs/performance.md": {
        "cpu-gradient": cpu(compact.cpu, "gradient"),
        "cpu-forward": cpu(compact.cpu, "forward"),
        "memory": (others.memory, "python -m benchmarks.memory"),
        "analysis": (of_object("analysis", earlier.analysis), "python -m benchmarks.analysis --out FILE"),
    },
    "docs/migration.md": {
        "migration": (of_object("migration", earlier.migration), "python -m benchmarks.migration --out FILE")
    },
    "benchmarks/README.md": {
        "cpu-gradient": cpu(whole.cpu, "gradient"),
        "cpu-forward": cpu(whole.cpu, "forward"),
        "cpu-training_step": cpu(whole.cpu, "training_step"),
        "gpu": (gpu.gpu, "python -m benchmarks.run --tag gpu --quick"),
        "memory": (others.memory, "python -m benchmarks.memory"),
        "compile": (others.compiling, "python -m benchmarks.compile"),
        "retention": (others.retention, "python -m benchmarks.retention"),
    },
}  # fmt: skip
# The same of the plots.
PICTURES: dict[str, dict[str, str]] = {
    "README.md": {"plot-front-door": "python -m benchmarks.front_door --out FILE"},
    "benchmarks/README.md": {
        "plot-speed": "python -m benchmarks.run --tag cpu", "plot-retention": "python -m benchmarks.retention",
    }
}  # fmt: skip


def put(text: str, marker: str, table: str) -> str:
    """The text with the table in place of what stands between its markers.

    Raises:
      ValueError: the markers are not there.
    """
    begin = f"<!-- table: {marker} -->"
    before, found, rest = text.partition(begin)
    old, closed, after = rest.partition(END)
    if not found or not closed or "<!-- table:" in old:
        raise ValueError(f"expected the lines {begin} and {END} where the table is to stand")
    return f"{before}{begin}\n{table}\n{END}{after}"


def written(document: str, text: str, results: Results, partly: bool) -> str:
    """A document with all of its tables and plots.

    Args:
      partly: tables that the results have nothing for stay as they are; else they say how to measure it.

    Raises:
      ValueError: a marker is missing, or is there and names no table.
    """
    tables: dict[str, tuple[Table, str]] = dict(TABLES[document])
    for name, command in PICTURES.get(document, {}).items():
        tables[name] = (functools.partial(picture, document, name), command)
    unknown = [name for name in BEGIN.findall(text) if name not in tables]
    if unknown:
        raise ValueError(f"<!-- table: {unknown[0]} --> names no table; expected one of {', '.join(tables)}")
    for name, (table, command) in tables.items():
        found = table(results)
        if found is None and partly:
            put(text, name, "")  # the marker has to be there all the same
            continue
        text = put(text, name, f"Not yet measured. `{command}` measures it." if found is None else found)
    return text


def picture(document: str, name: str, results: Results) -> str | None:
    """The line that shows a plot in a document; None where there is nothing to plot."""
    data, _, path, words = plots.PLOTS[name]
    return f"![{words}]({os.path.relpath(path, Path(document).parent)})" if data(results) is not None else None


def shown(results: Results, beside: Path) -> int:
    """Prints the tables of these results and writes their plots beside a file; touches nothing of the project's."""
    found = 0
    for document, tables in TABLES.items():
        for name, (table, _) in tables.items():
            text = table(results)
            if text is not None:
                found += 1
                print(f"{name}, as {document} has it:\n\n{text}\n")
    for name, (data_of, _, path, _) in plots.PLOTS.items():
        data = data_of(results)
        if data is not None:
            target = beside.with_name(f"{beside.stem}_{Path(path).name}")
            target.write_bytes(plots.png(name, data))
            print(f"wrote {target}")
    if not found:
        print("these results belong to no table", file=sys.stderr)
    return 0 if found else 1


def main(argv: list[str] | None = None) -> int:
    """Writes the documents and the plots, or says which are not what the results give."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=summary, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE",
                        help="these instead of all *.jsonl and *.json of benchmarks/results/")  # fmt: skip
    parser.add_argument("--documents", action="store_true", help="with --results: write the project's documents")
    args = parser.parse_args(argv)
    folder = ROOT / "benchmarks" / "results"
    try:
        results = read(args.results or sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")]))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.results and not args.documents and not args.check:
        return shown(results, args.results[0])
    stale, texts = [], {}
    for document in TABLES:
        try:
            text = (ROOT / document).read_text()
            new = written(document, text, results, partly=args.results is not None)
        except (OSError, ValueError) as error:
            parser.error(f"{document}: {error}")
        if new != text:
            stale.append(document)
            texts[ROOT / document] = new
    drawn = {}
    for name, (data_of, _, path, _) in plots.PLOTS.items():
        data = data_of(results)
        if data is not None and not plots.shows(ROOT / path, data):
            stale.append(path)
            drawn[ROOT / path] = (name, data)
    if args.check:
        for path in stale:
            print(f"{path}: not what the results give; run `python -m benchmarks.report`", file=sys.stderr)
        return 1 if stale else 0
    # All was read and found in order: only now is anything written.
    for target, text in texts.items():
        target.write_text(text)
    for target, (name, data) in drawn.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(plots.png(name, data))
    print("\n".join(f"wrote {path}" for path in stale) or "all as the results give it")
    return 0
