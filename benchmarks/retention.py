"""How much of a gradient an untrained cell keeps over 1, 10 and 100 steps, by initialisation.

For every cell and initialisation a float32 network over normal inputs, several seeds of parameters and
inputs, and of each the exact retention

  state   ||d s_T / d s_(T-k)||_F / sqrt n, the whole carry: (c, h) of an LSTM
  cell    the same of d c_T / d c_(T-k), LSTM only

for every k up to the last of --lags, as the mean over the sequences of the batch of its logarithm.  The decay rate
is minus the slope of ln retention per step over the last four fifths of the lags.  Figures are medians over
seeds, with quartiles.  The steps before the last lag are run-in from a zero state.

  python -m benchmarks.retention
  python -m benchmarks.retention --cells LSTM --seeds 20 --out more.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import glorot_uniform
from tqdm import tqdm

import rnncore
from benchmarks.records import asked, folder, machine, now
from rnncore import analysis, initializers

CELLS: dict[str, Any] = {"Elman": rnncore.Elman, "LSTM": rnncore.LSTM, "GRU": rnncore.GRU, "MGU": rnncore.MGU}
PATHS = {"LSTM": ("state", "cell")}  # the others' carry is their output
KEEP = {"LSTM": "f", "GRU": "z", "MGU": "f"}  # the gate that keeps the old state
CRITICAL = initializers.critical_forget_bias()
CURVE = (*range(1, 11), *range(15, 1_000_000, 5))  # lags that a record keeps of its curve, for the plot

Init = Callable[[Any, jax.Array, int, int], rnncore.CellParams]  # (cell, key, features, last lag)


def drawn(**fields: Any) -> Init:
    """What the cell itself draws, as flax.linen's does, with some fields of the cell replaced."""
    return lambda cell, key, features, _: dataclasses.replace(cell, **fields).init(key, features, jnp.float32)


def biased(initialiser: Callable[..., Any], needs_last: bool = False) -> Init:
    """An initialiser of gate biases that is told the cell's gates, and the last lag where it asks for it."""

    def init(cell: Any, key: jax.Array, features: int, last: int) -> rnncore.CellParams:
        gates: dict[str, Any] = {"gates": cell.gates, "forget": KEEP[type(cell).__name__]}
        bias = initialiser(*([last] if needs_last else []), **gates, input="i" if "i" in cell.gates else None)
        return drawn(bias_init=bias)(cell, key, features, last)

    return init


def torch(cell: Any, key: jax.Array, features: int, _: int) -> rnncore.CellParams:
    """All of torch.nn.RNN, LSTM or GRU from U(-1/sqrt H, 1/sqrt H); rnncore holds the sum of two biases."""
    one, two, three, four = jax.random.split(key, 4)
    edge = cell.hidden_size**-0.5

    def draw(key: jax.Array, like: Any) -> jax.Array:
        return jax.random.uniform(key, like.shape, jnp.float32, -edge, edge)

    params = cell.init(key, features, jnp.float32)
    inner = draw(four, params.bias)
    # A gate whose recurrent bias stands inside a product keeps both; n of the GRU.
    apart = jnp.array([gate in cell.recurrent_bias for gate in cell.gates])[:, None]
    rows = None if params.recurrent_bias is None else inner[jnp.flatnonzero(apart[:, 0], size=len(cell.recurrent_bias))]
    return params._replace(
        input_kernel=draw(one, params.input_kernel), recurrent_kernel=draw(two, params.recurrent_kernel),
        bias=draw(three, params.bias) + jnp.where(apart, 0, inner), recurrent_bias=rows,
    )  # fmt: skip


GATED = ("LSTM", "GRU", "MGU")
# By name: the cells that it is for, and what draws it.  PyTorch has no MGU; MGU's own default is forget bias 1.
INITIALISATIONS: dict[str, tuple[tuple[str, ...], Init]] = {
    "Flax": (tuple(CELLS), drawn()),
    "PyTorch": (("Elman", "LSTM", "GRU"), torch),
    "Glorot recurrent kernel": (tuple(CELLS), drawn(recurrent_init=initializers.per_gate(glorot_uniform()))),
    "forget bias 1": (("LSTM", "GRU"), drawn(forget_bias=1.0)),
    "critical forget bias": (("LSTM",), drawn(forget_bias=CRITICAL)),
    "chrono": (GATED, biased(initializers.chrono, needs_last=True)),
    "uniform gate": (GATED, biased(initializers.uniform_gate)),
}


@functools.partial(jax.jit, static_argnames=("cell", "last", "paths"))
def curves(cell: Any, params: Any, xs: Any, last: int, paths: tuple[str, ...]) -> dict[str, Any]:
    """{path: (seeds, last) of ln retention at lags 1 to last}, of parameters and inputs with a leading axis of seeds.

    One program for a cell: every initialisation of it has the same shapes.
    """

    def one(params: Any, xs: Any) -> dict[str, Any]:
        run = analysis.trajectory(cell, params, xs)
        lags = range(1, last + 1)
        return {path: analysis.retention_curve(run, kind="rms", path=path, lags=lags).mean_log() for path in paths}

    return jax.vmap(one)(params, xs)


def measure(name: str, initialisation: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each path of a cell at an initialisation."""
    cell, last = CELLS[name](args.hidden), args.lags[-1]
    init = INITIALISATIONS[initialisation][1]
    pairs = [jax.random.split(jax.random.key(args.first_seed + n)) for n in range(args.seeds)]
    params = jax.tree.map(lambda *a: jnp.stack(a), *[init(cell, key, args.features, last) for key, _ in pairs])
    shape = (args.batch, args.steps, args.features)
    xs = args.scale * jnp.stack([jax.random.normal(key, shape, jnp.float32) for _, key in pairs])
    found = curves(cell, params, xs, last, PATHS.get(name, ("state",)))
    size = {"B": args.batch, "T": args.steps, "D": args.features, "H": args.hidden, "seeds": args.seeds}
    words = {"Flax": "Flax defaults", "PyTorch": "PyTorch defaults", "chrono": f"chrono({last})",
             "critical forget bias": f"critical forget bias {CRITICAL:.4f}"}  # fmt: skip
    what = {"record": "retention", "cell": name, "initialisation": words.get(initialisation, initialisation)}
    return [{**what, "path": path, "kind": "rms", **size, "input_scale": args.scale,
             **figures(np.asarray(found[path]), args.lags)} for path in PATHS.get(name, ("state",))]  # fmt: skip


def figures(logs: np.ndarray, lags: Sequence[int]) -> dict[str, Any]:
    """What a record says of (seeds, last) of ln retention at lags 1 to last; None for a retention of exactly 0."""
    if not np.all(logs < math.inf):
        raise ArithmeticError("NaN or +inf among the retentions: no figure follows from them")
    rates = [decay_rate(row) for row in logs]
    known = [rate for rate in rates if rate is not None]
    power = {k: quartiles(logs[:, k - 1] / math.log(10)) for k in range(1, logs.shape[1] + 1)}
    kept = sorted({k for k in CURVE if k <= logs.shape[1]} | set(lags))
    return {
        "retention_log10": {str(k): power[k][1] for k in lags},
        "retention_log10_quartiles": {str(k): [power[k][0], power[k][2]] for k in lags},
        # A seed without a rate leaves no median of all of them.
        "decay_rate": quartiles(known)[1] if len(known) == len(rates) else None,
        "decay_rate_quartiles": quartiles(known)[::2] if len(known) == len(rates) else None,
        "curve": {"lags": kept, "log10_quartiles": [power[k] for k in kept]},
    }


def decay_rate(logs: np.ndarray) -> float | None:
    """Of one seed's curve, natural logarithm per step; None where the retention reaches exactly 0."""
    if not np.all(np.isfinite(logs)):
        return None
    lags = jnp.arange(1, len(logs) + 1)
    return analysis.RetentionCurve(lags, jnp.asarray(logs), "rms", "state", "end", "", 1, "float32").decay_rate().rate


def quartiles(values: Any) -> list[float | None]:
    """[lower quartile, median, upper quartile] to five digits; None for -inf, from which no number is interpolated."""
    array = np.asarray(values, np.float64)
    method: Any = "linear" if np.all(np.isfinite(array)) else "nearest"
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in np.percentile(array, (25, 50, 75), method=method)]


def line(record: dict[str, Any]) -> str:
    """A record in a line for the terminal."""
    powers = []
    for k, value in record["retention_log10"].items():
        low, high = (told(v) for v in record["retention_log10_quartiles"][k])
        powers.append(f"{told(value):>6} {f'({low}, {high})':<16}")
    rate = record["decay_rate"]
    return (
        f"{record['cell']:>5} {record['initialisation']:<28} {record['path']:>5} {' '.join(powers)} "
        f"{'-' if rate is None else format(rate, '+.4f')}"
    )


def told(value: float | None) -> str:
    """A log10 to one digit; no -0.0."""
    return "-inf" if value is None else f"{round(value, 1) + 0.0:.1f}"


def head(lags: Sequence[int]) -> str:
    """The line above those of the records."""
    powers = " ".join(f"{f'k={k}':>6} {'(quartiles)':<16}" for k in lags)
    return f"log10 of the retention over k steps\n{'cell':>5} {'initialisation':<28} {'path':>5} {powers} decay rate"


def opening(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """The record of the run."""
    started, ran_on = now(), machine()
    return {
        "record": "run", "run": f"retention {started}", "argv": asked(argv), "started": started, "machine": ran_on,
        "commit": ran_on["commit"], "tag": "retention", "quick": args.quick, "rounds": 1, "seconds": None,
    }  # fmt: skip


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """The results so far, whole; a NaN among them is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def options(argv: list[str]) -> argparse.Namespace:
    """The options, checked."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), help="default: all")
    add("--initialisations", nargs="+", default=list(INITIALISATIONS), choices=list(INITIALISATIONS),
        help="by name, those with blanks in quotes; default: all that the cell has")  # fmt: skip
    add("--hidden", type=int, default=128, help="H (default: 128)")
    add("--features", type=int, default=32, help="D (default: 32)")
    add("--batch", type=int, default=8, help="B (default: 8)")
    add("--steps", type=int, default=120, help="T, more than the last lag (default: 120)")
    add("--lags", type=int, nargs="+", default=[1, 10, 100], help="k, increasing (default: 1 10 100)")
    add("--scale", type=float, default=1.0, help="standard deviation of the inputs (default: 1)")
    add("--seeds", type=int, default=5, help="draws of parameters and inputs (default: 5)")
    add("--first-seed", type=int, default=0, help="of these (default: 0)")
    add("--quick", action="store_true", help="H 8, D 3, B 2, T 12, lags 1 3 10, two seeds: to see that it runs")
    add("--out", type=Path, help="JSON lines, written anew (default: retention_<platform>.jsonl where you are)")
    add("--record", action="store_true", help="write the project's own results, benchmarks/results/")
    args = parser.parse_args(argv)
    if args.quick:
        args.hidden, args.features, args.batch, args.steps, args.lags, args.seeds = 8, 3, 2, 12, [1, 3, 10], 2
    if args.out is None:
        if args.quick and args.record:
            parser.error("--quick --record: figures of a tiny network do not belong among the results")
        args.out = folder(args.record) / f"retention_{jax.default_backend()}.jsonl"
    for name, least in (("hidden", 2), ("features", 1), ("batch", 1), ("seeds", 1), ("first_seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if not 0 <= args.scale < math.inf:
        parser.error(f"--scale {args.scale}: expected a standard deviation")
    if args.lags != sorted(set(args.lags)) or args.lags[0] < 1 or args.lags[-1] < 5:
        parser.error(f"--lags {args.lags}: expected increasing numbers from 1 on, the last at least 5 for a decay rate")
    if args.steps <= args.lags[-1]:
        parser.error(f"--steps {args.steps}: the lags go to {args.lags[-1]}, expected more steps than that")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = options(argv)
    start = opening(args, argv)
    records, begin, interrupted = [start], time.monotonic(), False
    todo = [(cell, name) for cell in args.cells for name in args.initialisations if cell in INITIALISATIONS[name][0]]
    with tqdm(total=len(todo), unit="network", dynamic_ncols=True) as bar:
        bar.write(head(args.lags), file=sys.stdout)
        try:
            for cell, name in todo:
                bar.set_description(f"{cell}, {name}")
                for record in measure(cell, name, args):
                    records.append(record | {"run": start["run"]})
                    bar.write(line(record), file=sys.stdout)
                write(args.out, records)
                bar.update()
        except KeyboardInterrupt:
            interrupted = True
    start["seconds"] = round(time.monotonic() - begin, 1)
    why = "interrupted from the keyboard" if interrupted else None
    end = {"record": "end", "run": start["run"], "finished": now(), "interrupted": interrupted, "reason": why}
    write(args.out, [*records, end])
    print(f"{'interrupted; what is above is' if interrupted else 'all'} in {args.out}", file=sys.stderr)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
