"""How far the gradients of online learning are from the exact one, and what they cost.

python -m benchmarks.online            # writes benchmarks/results/online/cpu.json and the tables of docs/online.md
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore
from rnncore import online

ROOT = Path(__file__).parents[1]
HIDDEN, BATCH, STEPS, DRAWS = 32, 16, 40, 20


# ------------------------------------------------------------------------------------------- tasks


def recall(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sign of the input five steps ago."""
    signs = jax.random.rademacher(key, (BATCH, STEPS + 5, 1), jnp.float64)
    return signs[:, 5:], signs[:, :-5]


def adding(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The running sum of the marked ones among random numbers, one in ten of them."""
    values, marks = jax.random.split(key)
    x = jax.random.uniform(values, (BATCH, STEPS), jnp.float64)
    mark = jax.random.bernoulli(marks, 0.1, (BATCH, STEPS)).astype(x.dtype)
    return jnp.stack([x, mark], -1), jnp.cumsum(x * mark, 1)[..., None]


def waves(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next value of a sum of three sines whose phases are drawn."""
    phases = jax.random.uniform(key, (BATCH, 1, 3), jnp.float64, 0, 2 * np.pi)
    times = jnp.arange(STEPS + 1.0)[:, None] * jnp.array([0.2, 0.53, 1.1])
    value = jnp.sin(times + phases).mean(-1, keepdims=True)
    return value[:, :-1], value[:, 1:]


TASKS: dict[str, Callable] = {"recall": recall, "adding": adding, "waves": waves}
CELLS: dict[str, rnncore.PointwiseCell] = {
    "LSTM": rnncore.LSTM(HIDDEN, forget_bias=1.0), "GRU": rnncore.GRU(HIDDEN), "Elman": rnncore.Elman(HIDDEN),
    "Leaky": rnncore.Leaky(HIDDEN, tau=5.0), "LSTM, diagonal": rnncore.LSTM(HIDDEN, recurrence=rnncore.Diagonal()),
    "GRU, sparse": rnncore.GRU(HIDDEN, recurrence=rnncore.Sparse.random(HIDDEN, 0.1)),
}  # fmt: skip
RULES: dict[str, Any] = {
    "RTRL": online.RTRL, "SnAp-1": online.SnAp1, "SnAp-2": functools.partial(online.SnAp, order=2),
    "SnAp-3": functools.partial(online.SnAp, order=3), "e-prop": online.EProp, "RFLO": online.RFLO,
    "KF-RTRL": online.KFRTRL, "UORO": online.UORO,
}  # fmt: skip


# ------------------------------------------------------------------------------------------ cosines


def loss(cell: Any, params: Any, xs: Any, targets: Any) -> Any:
    ys = rnncore.unroll(cell, params["cell"], xs, backend="scan")[1]
    return jnp.mean((ys @ params["readout"] - targets) ** 2)


def forward_gradient(rule: online.Rule, params: Any, xs: Any, targets: Any, key: Any, back: Any) -> Any:
    """The gradient by the cell's parameters of the loss above, forward in time."""

    def loss_fn(y: Any, target: Any) -> Any:
        read = y @ params["readout"] if back is None else online.feedback(y, params["readout"], back)
        return jnp.sum((read - target) ** 2) / targets.size

    def step(state: Any, now: Any) -> Any:
        memory, total = state
        x, target, key = now
        memory, y = rule.step(params["cell"], memory, x, key=key)
        gradient = rule.gradient(params["cell"], memory, jax.grad(loss_fn)(y, target))
        return (memory, jax.tree.map(jnp.add, total, gradient)), None

    first = rule.init(params["cell"], rule.cell.initial_carry((BATCH,), jnp.float64))
    now = (jnp.moveaxis(xs, 1, 0), jnp.moveaxis(targets, 1, 0), jax.random.split(key, STEPS))
    return jax.lax.scan(step, (first, jax.tree.map(jnp.zeros_like, params["cell"])), now)[0][1]


def cosine(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def trained(cell: Any, params: Any, task: Callable, updates: int) -> Any:
    """The parameters after so many steps of Adam on exact gradients."""
    optimizer = optax.adam(5e-3)

    def update(state: Any, key: Any) -> Any:
        params, inner = state
        value, gradient = jax.value_and_grad(lambda p: loss(cell, p, *task(key)))(params)
        change, inner = optimizer.update(gradient, inner, params)
        return (optax.apply_updates(params, change), inner), value

    keys = jax.random.split(jax.random.key(7), updates)
    return jax.jit(lambda s: jax.lax.scan(update, s, keys)[0][0])((params, optimizer.init(params)))


def cosines(updates: int, cells: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for task_name, task in TASKS.items():
        xs, targets = task(jax.random.key(100))
        for cell_name in cells:
            cell = CELLS[cell_name]
            keys = jax.random.split(jax.random.key(0), 3)
            params = {
                "cell": cell.init(keys[0], xs.shape[-1], jnp.float64),
                "readout": jax.random.normal(keys[1], (HIDDEN, 1), jnp.float64) / HIDDEN**0.5,
            }
            back = jax.random.normal(keys[2], (HIDDEN, 1), jnp.float64) / HIDDEN**0.5
            for when, at in (("untrained", params), ("trained", trained(cell, params, task, updates))):
                exact = jax.jit(jax.grad(lambda p, cell=cell, xs=xs, t=targets: loss(cell, p, xs, t)))(at)["cell"]
                for rule_name, make in RULES.items():
                    try:
                        rule = make(cell)
                    except NotImplementedError:
                        continue
                    if rule_name == "RFLO" and cell_name == "Elman":
                        continue
                    if isinstance(rule, online.SnAp) and rule.connections is None:  # over a dense kernel that is RTRL
                        continue
                    run = jax.jit(
                        lambda key, rule=rule, at=at, xs=xs, t=targets, b=back if rule_name == "RFLO" else None:
                        forward_gradient(rule, at, xs, t, key, b)
                    )  # fmt: skip
                    draws = DRAWS if rule.needs_key else 1
                    got = [cosine(run(key), exact) for key in jax.random.split(jax.random.key(5), draws)]
                    rows.append(
                        {"task": task_name, "cell": cell_name, "when": when, "rule": rule_name,
                         "cosine": float(np.median(got)), "low": min(got), "high": max(got)}
                    )  # fmt: skip
                    print(*rows[-1].values(), flush=True)
    return rows


# -------------------------------------------------------------------------------------------- times


def times(rounds: int) -> list[dict[str, Any]]:
    """One stream, float32, D = 16, H = 64, T = 400: RTRL with its gradient at every step, beside BPTT by the scan."""
    rows, features, hidden, steps = [], 16, 64, 400
    diagonal = rnncore.Diagonal()
    cells = (
        rnncore.LSTM(hidden, recurrence=diagonal),
        rnncore.GRU(hidden, recurrence=diagonal),
        rnncore.IndRNN(hidden),
    )
    for cell in cells:
        params = cell.init(jax.random.key(0), features)
        xs = jax.random.normal(jax.random.key(1), (steps, features), jnp.float32)
        dys = jax.random.normal(jax.random.key(2), (steps, hidden), jnp.float32)
        rule = online.RTRL(cell)

        def whole(params: Any, cell: Any = cell, xs: Any = xs, dys: Any = dys) -> Any:
            return jax.grad(lambda p: jnp.sum(dys * rnncore.unroll(cell, p, xs, backend="scan")[1]))(params)

        def forward(params: Any, rule: Any = rule, xs: Any = xs, dys: Any = dys) -> Any:
            def step(state: Any, now: Any) -> Any:
                memory, _ = rule.step(params, state[0], now[0])
                return (memory, jax.tree.map(jnp.add, state[1], rule.gradient(params, memory, now[1]))), None

            start = rule.init(params, rule.cell.initial_carry()), jax.tree.map(jnp.zeros_like, params)
            return jax.lax.scan(step, start, (xs, dys))[0][1]

        programs = {"bptt": jax.jit(whole), "rtrl": jax.jit(forward)}
        results = {name: jax.block_until_ready(run(params)) for name, run in programs.items()}
        spent: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(rounds):
            for name, run in programs.items():
                begin = time.perf_counter()
                jax.block_until_ready(run(params))
                spent[name].append((time.perf_counter() - begin) * 1e3)
        ratios = np.array(spent["rtrl"]) / np.array(spent["bptt"])
        rows.append(
            {"cell": f"{type(cell).__name__}, diagonal", "bptt_ms": float(np.median(spent["bptt"])),
             "rtrl_ms": float(np.median(spent["rtrl"])), "ratio": float(np.median(ratios)),
             "ratio_of_fastest": min(spent["rtrl"]) / min(spent["bptt"]),
             "cosine": cosine(results["rtrl"], results["bptt"])}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------- tables


def table_of_cosines(rows: list[dict[str, Any]]) -> str:
    lines = ["| cell | rule | " + " | ".join(TASKS) + " |", "|---|---|" + "---|" * len(TASKS)]
    by = {(r["cell"], r["rule"], r["task"], r["when"]): r["cosine"] for r in rows}
    for cell in CELLS:
        for rule in RULES:
            if (cell, rule, "recall", "trained") in by:
                both = [[by[cell, rule, task, when] for when in ("untrained", "trained")] for task in TASKS]
                lines.append(f"| {cell} | {rule} | " + " | ".join(f"{a:.2f}, {b:.2f}" for a, b in both) + " |")
    return "\n".join(lines)


def table_of_times(rows: list[dict[str, Any]]) -> str:
    lines = ["| cell | BPTT, ms | RTRL, ms | RTRL in terms of BPTT |", "|---|---|---|---|"]
    lines += [f"| {r['cell']} | {r['bptt_ms']:.2f} | {r['rtrl_ms']:.2f} | {r['ratio']:.1f} |" for r in rows]
    return "\n".join(lines)


def write_tables(results: dict[str, Any], path: Path) -> None:
    text = path.read_text()
    for name, table in (("cosines", table_of_cosines(results["cosines"])), ("times", table_of_times(results["times"]))):
        start, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
        head, _, rest = text.partition(start)
        text = f"{head}{start}{table}\n{end}{rest.partition(end)[2]}"
        assert rest, name
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=300, help="steps of training before the second cosine")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds of the timing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/online/cpu.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/online.md")
    parser.add_argument(
        "--tables", action="store_true", help="write the tables of what was measured before, and no more"
    )
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="cosines of these alone; all else stays as it was")
    options = parser.parse_args()
    before = json.loads(options.out.read_text()) if options.tables or options.cells else {}
    if options.tables:
        return write_tables(before, options.docs)
    spent = before["times"] if options.cells else times(options.rounds)
    jax.config.update("jax_enable_x64", True)
    kept = [row for row in before.get("cosines", ()) if row["cell"] not in (options.cells or CELLS)]
    results = {
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "hidden": HIDDEN, "batch": BATCH,
        "steps": STEPS, "draws": DRAWS, "updates": options.updates, "times": spent,
        "cosines": kept + cosines(options.updates, options.cells or tuple(CELLS)),
    }  # fmt: skip
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(results, options.docs)


if __name__ == "__main__":
    main()
