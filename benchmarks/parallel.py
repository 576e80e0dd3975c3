"""Parallel in time: whether the forecast of the iterations holds, and T = 100,000 against the run step by step.

python -m benchmarks.parallel                   # both, into benchmarks/results/parallel/ and docs/parallel.md
python -m benchmarks.parallel --only times      # on a GPU, into gpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore import parallel
from rnncore._command import timing

ROOT = Path(__file__).parents[1]
FEATURES, HIDDEN, LIMIT = 4, 16, 100
GAINS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
CELLS: dict[str, rnncore.PointwiseCell] = {
    "Elman": rnncore.Elman(HIDDEN), "LSTM": rnncore.LSTM(HIDDEN), "GRU": rnncore.GRU(HIDDEN),
    "MGU": rnncore.MGU(HIDDEN), "Leaky": rnncore.Leaky(HIDDEN, tau=5.0),
    "LSTM, diagonal": rnncore.LSTM(HIDDEN, recurrence=rnncore.Diagonal()),
    "GRU, diagonal": rnncore.GRU(HIDDEN, recurrence=rnncore.Diagonal()),
    "Elman, diagonal": rnncore.Elman(HIDDEN, recurrence=rnncore.Diagonal()),
}  # fmt: skip


def drawn(cell: Any, gain: float, seed: int, steps: int) -> tuple[Any, Any]:
    """(parameters, inputs): U from N(0, gain^2 / fan-in), inputs from N(0, 1)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = cell.init(keys[0], FEATURES)
    shape = params.recurrent_kernel.shape
    scale = gain / (shape[0] ** 0.5 if len(shape) == 3 else 1)
    params = params._replace(recurrent_kernel=scale * jax.random.normal(keys[1], shape))
    return params, jax.random.normal(keys[2], (steps, FEATURES))


def forecasts(seeds: range, steps: int) -> list[dict[str, Any]]:
    """For every cell, gain and seed what was forecast and what it took."""
    rows = []
    for name, cell in CELLS.items():
        for gain in GAINS:
            for seed in seeds:
                params, xs = drawn(cell, gain, seed, steps)
                said = parallel.forecast(cell, params, xs, max_iterations=LIMIT)
                run = parallel.unroll(cell, params, xs, max_iterations=LIMIT, check=False)
                rows.append(
                    {"cell": name, "gain": gain, "seed": seed, "said": said.iterations, "refused": not said.converges,
                     "growth": said.growth, "exponent": max(said.exponent, -1e3), "took": int(run.iterations),
                     "converged": bool(run.converged)}
                )  # fmt: skip
        print(name, verdict([r for r in rows if r["cell"] == name]), flush=True)
    return rows


def verdict(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many of each kind; a run that did not converge took more than it was allowed."""
    there = [r for r in rows if r["converged"]]
    return {
        "cases": len(rows),
        "converged": len(there),
        "within a factor of two": sum(r["took"] / 2 <= r["said"] <= 2 * r["took"] for r in there)
        + sum(r["said"] >= LIMIT / 2 for r in rows if not r["converged"]),
        "refused, and converged after all": sum(r["refused"] for r in there),
        "not refused, and did not converge": sum(not r["refused"] for r in rows if not r["converged"]),
        "exponent below 0, and did not converge": sum(r["exponent"] < 0 for r in rows if not r["converged"]),
    }


def times(steps: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One sequence, forward and gradient of all parameters, beside the scan and what `unroll` chooses by itself."""
    rows = []
    cells: dict[str, Any] = {
        "LSTM, diagonal, H = 64": rnncore.LSTM(64, recurrence=rnncore.Diagonal()),
        "GRU, diagonal, H = 64": rnncore.GRU(64, recurrence=rnncore.Diagonal()),
        "MinGRU, H = 64": rnncore.MinGRU(64), "GRU, H = 8": rnncore.GRU(8), "Elman, H = 8": rnncore.Elman(8),
    }  # fmt: skip
    for name, cell in cells.items():
        params, xs = cell.init(jax.random.key(0), FEATURES), jax.random.normal(jax.random.key(1), (steps, FEATURES))
        kernel = params.recurrent_kernel
        params = params._replace(recurrent_kernel=0.5 * kernel if kernel.ndim == 3 else 0.3 * jnp.sign(kernel - 0.5))
        dys = jax.random.normal(jax.random.key(2), (steps, cell.hidden_size))
        chosen = rnncore.explain_backend(cell, params, xs).name
        runs: dict[str, Any] = {
            "newton": lambda p, cell=cell, xs=xs: parallel.unroll(cell, p, xs).outputs,
            "scan": lambda p, cell=cell, xs=xs: rnncore.unroll(cell, p, xs, backend="scan")[1],
            "default": lambda p, cell=cell, xs=xs: rnncore.unroll(cell, p, xs)[1],
        }
        said = parallel.forecast(cell, params, xs)
        made = parallel.unroll(cell, params, xs)
        row = {"cell": name, "steps": steps, "said": said.iterations, "took": int(made.iterations), "default": chosen,
               "error": timing.relative_error(made.outputs, runs["scan"](params))}  # fmt: skip
        for what in ("forward", "gradient"):
            programs = {
                key: jax.jit(run if what == "forward" else jax.grad(lambda p, run=run, d=dys: jnp.sum(d * run(p))))
                for key, run in runs.items()
            }
            calls: dict[str, Any] = {
                key: (lambda program=program, p=params: program(p)) for key, program in programs.items()
            }
            for call in calls.values():
                jax.block_until_ready(call())
            turns = timing.take_turns(calls, rounds, seconds)
            for key, turn in turns.items():
                row[f"{what}_{key}_ms"] = float(np.median(turn["ms"]))
        rows.append(row)
        print(row, flush=True)
    return rows


def table_of_forecasts(rows: list[dict[str, Any]]) -> str:
    """By cell, and all together."""
    names = list(verdict(rows))
    lines = ["| cell | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for cell in (*CELLS, None):
        counts = verdict([r for r in rows if cell in (None, r["cell"])])
        lines.append(f"| {cell or 'all'} | " + " | ".join(map(str, counts.values())) + " |")
    return "\n".join(lines)


def table_of_times(rows: list[dict[str, Any]]) -> str:
    head = "| cell | forecast | iterations | Newton, ms | scan, ms | default, ms | "
    lines = [head + "Newton, gradient | scan, gradient | default, gradient |", "|---|" + "---|" * 8]
    for r in rows:
        names = [f"{what}_{key}_ms" for what in ("forward", "gradient") for key in ("newton", "scan", "default")]
        ms = (f"{r[name]:.1f}" for name in names)
        lines.append(f"| {r['cell']} | {r['said']:.0f} | {r['took']} | {' | '.join(ms)} |")
    return "\n".join(lines)


def write_table(name: str, table: str, path: Path) -> None:
    start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
    head, found, rest = path.read_text().partition(start)
    assert found, name
    path.write_text(f"{head}{start}{table}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("forecasts", "times"), help="one of the two")
    parser.add_argument("--steps", type=int, default=100_000, help="T of the timing")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of the timing")
    parser.add_argument("--seconds", type=float, default=0.2, help="of one turn")
    parser.add_argument("--seeds", type=int, default=4, help="of the forecasts, for every cell and gain")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/parallel")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/parallel.md")
    options = parser.parse_args()
    path = options.out / f"{jax.default_backend()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if options.only != "times":
        results["forecasts"] = about | {"steps": 1024, "rows": forecasts(range(options.seeds), 1024)}
        write_table("forecasts", table_of_forecasts(results["forecasts"]["rows"]), options.docs)
    if options.only != "forecasts":
        results["times"] = about | {"rows": times(options.steps, options.rounds, options.seconds)}
        write_table(f"times, {jax.default_backend()}", table_of_times(results["times"]["rows"]), options.docs)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
