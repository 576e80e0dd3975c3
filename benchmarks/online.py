"""How far the gradients of online learning are from the exact one, and what they cost.

python -m benchmarks.online            into benchmarks/results/online/
python -m benchmarks.report            the tables of docs/online.md
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore
from benchmarks import options
from rnncore import online
from rnncore._command import timing

HIDDEN, BATCH, STEPS, DRAWS = 32, 16, 40, 20


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


def times(cell: Any, rounds: int, seconds: float) -> dict[str, Any]:
    """One stream, float32, D = 16, T = 400: RTRL with its gradient at every step, beside BPTT by the scan."""
    params, steps, rule = cell.init(jax.random.key(0), 16), 400, online.RTRL(cell)
    xs = jax.random.normal(jax.random.key(1), (steps, 16), jnp.float32)
    dys = jax.random.normal(jax.random.key(2), (steps, cell.hidden_size), jnp.float32)

    @jax.jit
    def whole(params: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(dys * rnncore.unroll(cell, p, xs, backend="scan")[1]))(params)

    @jax.jit
    def forward(params: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            memory, _ = rule.step(params, state[0], now[0])
            return (memory, jax.tree.map(jnp.add, state[1], rule.gradient(params, memory, now[1]))), None

        start = rule.init(params, rule.cell.initial_carry()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, start, (xs, dys))[0][1]

    calls = {"bptt": functools.partial(whole, params), "rtrl": functools.partial(forward, params)}
    results = {name: call() for name, call in calls.items()}
    turns = timing.take_turns(calls, rounds, seconds)
    bptt, rtrl = (np.array(turns[name]["ms"]) for name in ("bptt", "rtrl"))
    row = {
        "cell": f"{type(cell).__name__}, diagonal", "bptt_ms": float(np.median(bptt)),
        "rtrl_ms": float(np.median(rtrl)), "ratio": float(np.median(rtrl / bptt)),
        "ratio_of_fastest": float(min(rtrl) / min(bptt)), "cosine": cosine(results["rtrl"], results["bptt"]),
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> None:
    made = options.parser("online", __doc__, rounds=21, seconds=0.01, out="JSON file")
    made.add_argument("--updates", type=options.count, default=300, help="steps of training before the second cosine")
    made.add_argument("--cells", nargs="+", choices=CELLS, help="cosines of these alone; all else stays as it was")
    args = made.parse_args()
    path = args.out or options.RESULTS / "online" / "cpu.json"
    before = json.loads(path.read_text()) if args.cells else {}
    diagonal = rnncore.Diagonal()
    cells = rnncore.LSTM(64, recurrence=diagonal), rnncore.GRU(64, recurrence=diagonal), rnncore.IndRNN(64)
    spent = before["times"] if args.cells else [times(cell, args.rounds, args.seconds) for cell in cells]
    jax.config.update("jax_enable_x64", True)
    kept = [row for row in before.get("cosines", ()) if row["cell"] not in (args.cells or CELLS)]
    results = {
        "jax": jax.__version__, "device": jax.devices()[0].device_kind, "hidden": HIDDEN, "batch": BATCH,
        "steps": STEPS, "draws": DRAWS, "updates": args.updates, "times": spent,
        "cosines": sorted(
            kept + cosines(args.updates, args.cells or tuple(CELLS)), key=lambda row: list(CELLS).index(row["cell"])
        ),
    }  # fmt: skip
    timing.write(path, results)


if __name__ == "__main__":
    main()
