"""Parallel in time: whether the forecast of the iterations holds, and T = 100,000 against the run step by step.

python -m benchmarks.parallel                   both, into benchmarks/results/parallel/
python -m benchmarks.parallel --only times      on a GPU, into gpu.json
python -m benchmarks.report                     the tables of docs/parallel.md
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks import options
from benchmarks.report.pages import LIMIT, verdict
from rnncore import parallel
from rnncore._command import timing

FEATURES, HIDDEN = 4, 16
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
            calls = {}
            for key, run in runs.items():
                gradient = jax.grad(lambda p, run=run, d=dys: jnp.sum(d * run(p)))
                calls[key] = functools.partial(jax.jit(run if what == "forward" else gradient), params)
                jax.block_until_ready(calls[key]())
            for key, turn in timing.take_turns(calls, rounds, seconds).items():
                row[f"{what}_{key}_ms"] = float(np.median(turn["ms"]))
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    made = options.parser("parallel", __doc__, rounds=7, out="JSON file; what is not measured now stays as it was")
    made.add_argument("--only", choices=("forecasts", "times"), help="one of the two")
    made.add_argument("--steps", type=options.count, default=100_000, help="T of the timing (default: 100000)")
    made.add_argument("--seeds", type=options.count, default=4, help="of the forecasts, by cell and gain (default: 4)")
    args = made.parse_args()
    path = args.out or options.RESULTS / "parallel" / f"{jax.default_backend()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if args.only != "times":
        results["forecasts"] = about | {"steps": 1024, "rows": forecasts(range(args.seeds), 1024)}
    if args.only != "forecasts":
        results["times"] = about | {"rows": times(args.steps, args.rounds, args.seconds)}
    timing.write(path, results)


if __name__ == "__main__":
    main()
