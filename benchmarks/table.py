"""Writes the README's table from the results of `lstm_against_flax`: no number is typed by hand.

    python -m benchmarks.table benchmarks/results/lstm_against_flax_cpu_jax0.10.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- table: benchmarks -->", "<!-- end of table -->"


def table(result: dict) -> str:
    """The Markdown table of one run."""
    machine = result["machine"]
    rows = ["| (B, T, D, H) | flax.linen ms | `any` ms | times as fast | `reverse` ms | times as fast |"]
    rows.append("|---|---|---|---|---|---|")
    shapes: dict[tuple, dict] = {}
    for record in result["records"]:
        shapes.setdefault(tuple(record["shape_BTDH"]), {})[record["contender"]] = record
    for shape, by in shapes.items():
        cells = [str(shape), f"{by['flax']['median_ms']:.1f}"]
        for mode in ("any", "reverse"):
            cells += [f"{by[mode]['median_ms']:.1f}", f"{by[mode]['speed_against_flax']:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    means = [
        math.exp(statistics.fmean(math.log(by[mode]["speed_against_flax"]) for by in shapes.values()))
        for mode in ("any", "reverse")
    ]
    rows.append(f"| geometric mean | | | {means[0]:.2f} | | {means[1]:.2f} |")
    rows.append("")
    rows.append(
        f"Medians of one interleaved run on {machine['cores']} cores of {machine['device'].split('(')[1].rstrip(')')}, "
        f"JAX {machine['jax']}, Flax {machine['flax']}; `any` and `reverse` are rnncore's modes of differentiation. "
        "The machine is shared: read differences below 5 % as nothing."
    )
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Replaces the table in the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON file that benchmarks.lstm_against_flax wrote")
    args = parser.parse_args(argv)
    text = README.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(text[:start] + "\n" + table(json.loads(args.result.read_text())) + "\n" + text[end:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
