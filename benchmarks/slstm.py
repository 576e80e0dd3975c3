"""sLSTM on a CPU, outputs alone: rnncore's loop beside the same cell by torch.compile.

PyTorch runs the step that torch.compile makes of the cell in a loop over time; and, where a sequence is short enough to
be compiled in seconds, the whole sequence as one graph.  Every side is a process of its own, because threads that wait
for work take time from the others; the processes take turns, on one core and on all.  The product of inputs and
weights is inside the clock, and every output is compared with a float64 run.

  python -m benchmarks.slstm            into benchmarks/results/slstm/; needs PyTorch
  python -m benchmarks.report           the table of docs/cells.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options
from benchmarks.report import pages
from rnncore._command import timing

CASES = tuple((b, t, h) for b, h in ((1, 256), (16, 256), (64, 128), (16, 512)) for t in (16, 64))
"""(B, T, H), as many inputs as units, four heads."""
HEADS = 4
WHOLE = 16  # longest sequence that is compiled as one graph
LARGEST_ERROR = 1e-4
SIDES = ("rnncore", "step", "whole")


def drawn(batch: int, steps: int, hidden: int) -> tuple[np.ndarray, ...]:
    """xs (T, B, H), W (H, 4, H), U (N, H / N, 4, H / N), b (4, H), float32."""
    rng = np.random.default_rng(0)
    size = hidden // HEADS
    arrays = (
        rng.normal(size=(steps, batch, hidden)),
        rng.normal(size=(hidden, 4, hidden)) / hidden**0.5,
        rng.normal(size=(HEADS, size, 4, size)) / size**0.5,
        rng.normal(size=(4, hidden)),
    )
    return tuple(a.astype(np.float32) for a in arrays)


def ours(arrays: tuple[np.ndarray, ...]) -> Callable[[], Any]:
    """The outputs (T, B, H) by rnncore's default backend."""
    import jax
    import jax.numpy as jnp

    import rnncore

    xs, w, u, b = map(jnp.asarray, arrays)
    cell = rnncore.SLSTM(w.shape[-1], recurrence=rnncore.Heads(HEADS))
    params = rnncore.CellParams(w, u, b, None, ())
    run = jax.jit(lambda p, xs: rnncore.unroll(cell, p, xs, time_major=True)[1])
    return lambda: np.asarray(run(params, xs))


def theirs(arrays: tuple[np.ndarray, ...], whole: bool) -> Callable[[], Any]:
    """The same by PyTorch: the compiled step in a loop, or the loop compiled."""
    import torch

    torch._dynamo.reset()  # one case does not count towards another's limit of compilations
    xs, w, u, b = map(torch.tensor, arrays)
    batch, hidden = xs.shape[1], w.shape[-1]
    kernel, bias = u.reshape(HEADS, hidden // HEADS, -1), b.reshape(-1)

    def step(z: Any, h: Any, c: Any, n: Any, m: Any) -> Any:
        r = torch.bmm(h.view(batch, HEADS, -1).transpose(0, 1), kernel)  # (N, B, 4 H / N)
        r = r.view(HEADS, batch, 4, -1).permute(1, 2, 0, 3).reshape(batch, 4 * hidden)
        i, f, candidate, o = (z + r + bias).chunk(4, -1)
        old, first = torch.nn.functional.logsigmoid(f) + m, n == 0
        top = torch.where(first, i, torch.maximum(i, old))
        add, keep = torch.exp(i - top), torch.where(first, 1.0, torch.exp(old - top))
        c, n = keep * c + add * torch.tanh(candidate), keep * n + add
        return torch.sigmoid(o) * c / n, c, n, top

    compiled = step if whole else torch.compile(step)

    def run(xs: Any) -> Any:
        zs = xs @ w.view(w.shape[0], -1)
        h = c = n = m = torch.zeros(batch, hidden)
        ys = []
        for z in zs:
            h, c, n, m = compiled(z, h, c, n, m)
            ys.append(h)
        return torch.stack(ys)

    final = torch.compile(run) if whole else run

    def call() -> Any:
        with torch.inference_mode():
            return final(xs).numpy()

    return call


def side(name: str, cores: int, seconds: float) -> None:
    """On so many cores: a line of JSON for every case, the median time of a call, the error, the time to be ready."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])  # before either library counts them
    if name != "rnncore":
        import torch

        torch.set_num_threads(timing.cores())
    for batch, steps, hidden in CASES:
        if name.startswith("whole") and steps > WHOLE:
            continue
        arrays, begin = drawn(batch, steps, hidden), time.perf_counter()
        call = ours(arrays) if name == "rnncore" else theirs(arrays, name.startswith("whole"))
        ys = call()
        ready = time.perf_counter() - begin
        spent: list[float] = []
        until = time.perf_counter() + seconds
        while len(spent) < 5 or time.perf_counter() < until:
            begin = time.perf_counter()
            call()
            spent.append(time.perf_counter() - begin)
        row = {"case": [batch, steps, hidden], "ms": 1e3 * float(np.median(spent)), "ready": ready}
        print(json.dumps(row | {"error": error_of(arrays, ys)}), flush=True)


def error_of(arrays: tuple[np.ndarray, ...], ys: np.ndarray) -> float:
    """Against the equations in float64 and NumPy, relative to the largest output."""
    xs, w, u, b = (a.astype(float) for a in arrays)
    hidden = w.shape[-1]
    c = n = m = h = np.zeros((xs.shape[1], hidden))
    worst = largest = 0.0
    for x, y in zip(xs, ys, strict=True):
        r = np.einsum("bnd,ndge->bgne", h.reshape(len(h), HEADS, -1), u).reshape(len(h), 4, hidden)
        i, f, candidate, o = np.moveaxis(np.tensordot(x, w, 1) + r + b, 1, 0)
        old = -np.logaddexp(0, -f) + m
        top = np.where(n == 0, i, np.maximum(i, old))
        add, keep = np.exp(i - top), np.where(n == 0, 1.0, np.exp(old - top))
        c, n, m = keep * c + add * np.tanh(candidate), keep * n + add, top
        h = c / n / (1 + np.exp(-o))
        worst, largest = max(worst, float(np.abs(h - y).max())), max(largest, float(np.abs(h).max()))
    return worst / largest


def main() -> None:
    made = options.parser("slstm", __doc__, rounds=3, seconds=0.3, out="JSON file")
    made.add_argument("--cores", type=options.count, nargs="+", default=[1, timing.cores()], help="run on so many")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.side:
        return side(args.side, args.cores[0], args.seconds)
    by_cores: dict[str, list[dict[str, Any]]] = {}
    for cores in dict.fromkeys(args.cores):
        rounds = by_cores[str(cores)] = [{} for _ in range(args.rounds)]
        for number, turn in enumerate(rounds):
            for name in SIDES:
                asked = ["--side", name, "--cores", str(cores), "--seconds", str(args.seconds)]
                command = [sys.executable, "-m", "benchmarks.slstm", *asked]
                root = Path(__file__).parents[1]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
                rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                turn[name] = {", ".join(map(str, row["case"])): row for row in rows}
                print(cores, number, name, {k: round(row["ms"], 2) for k, row in turn[name].items()}, flush=True)
    turns = [turn for rounds in by_cores.values() for turn in rounds]
    worst = max(row["error"] for turn in turns for rows in turn.values() for row in rows.values())
    if worst > LARGEST_ERROR:
        raise SystemExit(f"a wrong answer, off by {worst:.1e} of the largest output; nothing was written")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch")}
    results = versions | {"largest_error": worst, "by_cores": by_cores}
    timing.write(args.out or options.RESULTS / "slstm" / "cpu.json", results)
    print(pages.slstm(results), f"largest relative error {worst:.1e}", sep="\n")


if __name__ == "__main__":
    main()
