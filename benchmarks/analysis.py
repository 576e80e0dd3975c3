"""What the analysis costs: Jacobians, retention curves, Lyapunov exponents, the monitor.

  python -m benchmarks.analysis --out benchmarks/results/analysis_cpu.json
  python -m benchmarks.report

Jacobians: all T of an LSTM against `vmap(jacrev)` of its step, in turns; every contender is compared
with float64.  Retention: the kinds rms and adjoint of state and cell and the direct path, 100 lags, after
compilation; and how the time to compile grows with T.  Lyapunov: the 16 leading exponents, and the memory
that they take.  Monitor: one record against 100 training steps of the network that it watches.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore
from benchmarks import objects
from rnncore import analysis
from rnncore._command import timing
from rnncore.analysis.run.flat import flatten_carry, unflatten_carry
from rnncore.analysis.run.trajectory import Trajectory


def run_of(batch: int, steps: int, features: int, hidden: int, dtype: Any = jnp.float32) -> Trajectory:
    """A trajectory of an LSTM with forget bias 1 over normal inputs; the same values in every dtype."""
    cell = rnncore.LSTM(hidden, forget_bias=1.0)
    params = cell.init(jax.random.key(0), features)
    xs = jax.random.normal(jax.random.key(1), (batch, steps, features), jnp.float32)
    return analysis.trajectory(cell, *jax.tree.map(lambda a: a.astype(dtype), (params, xs)))


def by_jacrev(run: Trajectory, field: str | None) -> Any:
    """What one writes without the library: `vmap(jacrev)` of the step, over steps and sequences."""
    before = jax.tree.map(lambda a: a[:, :-1], run.carries)

    def state(carry: Any, z: Any) -> Any:
        unflatten = unflatten_carry(carry)

        def step(s: Any) -> Any:
            new, _ = run.cell.update(run.params, unflatten(s), z)
            return flatten_carry(new, 0)

        return jax.jacrev(step)(flatten_carry(carry, 0))

    def cell(carry: Any, z: Any) -> Any:
        return jax.jacrev(lambda c: run.cell.update(run.params, carry._replace(c=c), z)[0].c)(carry.c)

    return jax.vmap(jax.vmap(cell if field else state))(before, run.zs)


CONTENDERS: dict[str, dict[str, Callable[[Trajectory], Any]]] = {
    "state Jacobians (2H x 2H)": {
        "vmap(jacrev)": lambda run: by_jacrev(run, None),
        "step_jacobians(vjp)": analysis.step_jacobians,
        "step_jacobians(analytic)": functools.partial(analysis.step_jacobians, method="analytic"),
        "step_coefficients (times U)": analysis.step_coefficients,
    },
    "cell Jacobians (H x H)": {
        "vmap(jacrev)": lambda run: by_jacrev(run, "c"),
        "step_jacobians(analytic)": functools.partial(analysis.step_jacobians, wrt="cell", method="analytic"),
    },
}


def jacobians(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """All T step Jacobians, contenders in turn."""
    shape = (2, 5, 3, 4) if quick else (8, 200, 64, 128)
    records = []
    for what, contenders in CONTENDERS.items():
        found: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], Any]] = {}
        with jax.enable_x64(True):
            truth = np.asarray(contenders["vmap(jacrev)"](run_of(*shape, jnp.float64)))
        run = run_of(*shape)
        for name, fun in contenders.items():
            compiled, cost = timing.compile_step(jax.jit(fun), (run,))
            out = compiled(run)
            error = None if "coefficients" in name else timing.relative_error(out, truth)
            calls[name] = functools.partial(compiled, run)
            found[name] = {"part": what, "contender": name, "shape_BTDH": shape, "relative_error": error, **cost}
        turns = timing.take_turns(calls, rounds, 0.05)
        base = turns["vmap(jacrev)"]["ms"]
        for name, record in found.items():
            ms = turns[name]["ms"]
            speed = statistics.median(b / m for b, m in zip(base, ms, strict=True))
            records.append(record | {"median_ms": statistics.median(ms), "ms": ms, "speed_against_jacrev": speed})
    return records


def curves(run: Trajectory, lags: int) -> list[Any]:
    """The five of the default set: ln retention by both measures of state and cell, and of the direct path."""
    adjoint = jax.tree.map(jnp.ones_like, run.last)
    wanted = (("adjoint", "state"), ("adjoint", "cell"), ("rms", "state"), ("rms", "cell"), ("rms", "direct"))
    return [
        analysis.retention_curve(
            run, kind=kind, path=path, lags=lags, adjoint=adjoint if kind == "adjoint" else None
        ).log_retention
        for kind, path in wanted
    ]  # fmt: skip


def retention(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The default set of curves, and how compile time depends on T."""
    batch, hidden, lags = (2, 4, 3) if quick else (8, 256, 100)
    steps, short, long = (6, 5, 8) if quick else (1000, 500, 4000)
    run = run_of(batch, steps, 32, hidden)
    compiled, cost = timing.compile_step(jax.jit(curves, static_argnums=1), (run, lags))
    jax.block_until_ready(compiled(run))
    turn = timing.take_turns({"curves": functools.partial(compiled, run)}, max(rounds // 3, 1), 1e-9)["curves"]
    seconds = [ms / 1e3 for ms in turn["ms"]]
    compile_seconds: dict[int, list[float]] = {short: [], long: []}
    for _ in range(1 if quick else 3):
        for length, found in compile_seconds.items():
            jax.clear_caches()
            arguments = run_of(batch, length, 32, hidden), lags
            _, other = timing.compile_step(jax.jit(curves, static_argnums=1), arguments)
            found.append(other["compile_seconds"])
    record = {
        "part": "retention", "shape_BTDH": (batch, steps, 32, hidden), "lags": lags, "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "compile_seconds_by_T": {str(t): statistics.median(s) for t, s in compile_seconds.items()},
    }  # fmt: skip
    return [cost | record]


def lyapunov(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The 16 leading exponents of an Elman network and of an LSTM."""
    del rounds
    steps, hidden, k = (20, 8, 2) if quick else (1000, 1024, 16)
    records = []
    for cell in (rnncore.Elman(hidden), rnncore.LSTM(hidden, forget_bias=1.0)):
        xs = jax.random.normal(jax.random.key(1), (steps, 32), jnp.float32)
        run = analysis.trajectory(cell, cell.init(jax.random.key(0), 32), xs)
        compiled, cost = timing.compile_step(jax.jit(lambda run: analysis.lyapunov_exponents(run, k).exponents), (run,))
        begin = time.perf_counter()
        jax.block_until_ready(compiled(run))
        records.append(
            {"part": "lyapunov", "cell": type(cell).__name__, "hidden": hidden, "steps": steps, "exponents": k,
             "seconds": time.perf_counter() - begin, "bytes_of_all_U_sized_jacobians": 4 * steps * hidden**2, **cost}
        )  # fmt: skip
    return records


def monitor(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """One record against 100 training steps of a two-layer LSTM."""
    batch, steps, hidden = (2, 6, 4) if quick else (32, 128, 256)
    stack = rnncore.Stack(rnncore.LSTM(hidden, forget_bias=1.0), num_layers=2)
    xs = jax.random.normal(jax.random.key(1), (batch, steps, hidden))
    params, optimizer = stack.init(jax.random.key(0), hidden), optax.adam(1e-3)

    @jax.jit
    def update(params: Any, moments: Any) -> Any:
        gradient = jax.grad(lambda p: jnp.mean(rnncore.unroll_stack(stack, p, xs)[1] ** 2))(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    state = jax.block_until_ready(update(params, optimizer.init(params)))
    with tempfile.TemporaryDirectory() as folder:
        watch = analysis.Monitor(Path(folder, "m.jsonl"), every=1, lags=(1, 3, steps) if quick else (1, 10, 30, 100))
        watch(0, stack, params, xs)
        numbers = itertools.count(1)
        calls = {
            "step": lambda: update(*state), "record": lambda: watch(next(numbers), stack, state[0], xs)
        }  # fmt: skip
        turns = timing.take_turns(calls, max(rounds // 2, 1), 1e-9)
    step, record = (statistics.median(turns[name]["ms"]) / 1e3 for name in ("step", "record"))
    return [
        {"part": "monitor", "shape_BTH": (batch, steps, hidden), "layers": 2, "step_seconds": step,
         "record_seconds": record, "share_of_100_steps": record / (100 * step)}
    ]  # fmt: skip


PARTS = {"jacobians": jacobians, "retention": retention, "lyapunov": lyapunov, "monitor": monitor}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = objects.parser("analysis", __doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    args = parser.parse_args(argv)
    return objects.run("analysis", args, args.parts, lambda part: PARTS[part](args.rounds, args.quick))


if __name__ == "__main__":
    sys.exit(main())
