"""Random problems for the layers of linen and nnx and for the analysis, against loops of NumPy until the time is up.

    python tests/random_layers.py --seconds 120              # a fresh seed, which is printed
    python tests/random_layers.py --seed 17 --first 230      # one problem of it again, and those behind

The reference (reference.py) knows nothing of rnncore. What fails is made as small as it goes and printed. Exit status 1
if something did.
"""

from __future__ import annotations

import conftest  # noqa: F401  64 bits, and the settings of all tests

# isort: split
import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference
from cases import assert_close
from flax import nnx as flax_nnx
from tqdm import tqdm

import rnncore
from rnncore import analysis, linen, nnx

TOLERANCE = 1e-10
Problem = dict[str, Any]
CELLS: dict[str, reference.Cell] = {
    "OptimizedLSTMCell": reference.lstm(), "LSTMCell": reference.lstm(), "GRUCell": reference.gru(),
    "MGUCell": reference.mgu(), "SimpleCell": reference.elman(),
}  # fmt: skip
LAYERS = {"LSTM": reference.lstm(), "GRU": reference.gru(), "Elman": reference.elman()}
FUNCTIONAL = {
    "LSTM": rnncore.LSTM, "GRU": rnncore.GRU, "Elman": rnncore.Elman, "MGU": rnncore.MGU,
}  # fmt: skip
OF_FUNCTIONAL = LAYERS | {"MGU": reference.mgu()}
SMALLEST = {"batch": (), "steps": 1, "features": 1, "hidden": 1, "levels": 1}


# ------------------------------------------------------------------------------------------- drawing


def draw(rng: np.random.Generator) -> Problem:
    kind = str(rng.choice(["linen", "nnx", "linen layers", "nnx layers", "analysis"]))
    names = {"analysis": OF_FUNCTIONAL, "linen": CELLS, "nnx": [n for n in CELLS if n != "LSTMCell"]}.get(kind, LAYERS)
    steps = int(rng.integers(1, 9))
    masked = kind != "analysis"
    return {
        "kind": kind,
        "name": str(rng.choice(list(names))),
        "seed": int(rng.integers(2**31)),
        "batch": tuple(int(n) for n in rng.integers(1, 4, rng.integers(3))),
        "steps": steps,
        "features": int(rng.integers(1, 6)),
        "hidden": int(rng.integers(1, 7)),
        "levels": int(rng.integers(1, 4)) if "layers" in kind else 1,
        "both_ways": bool("layers" in kind and rng.random() < 0.5),
        "lengths": bool(masked and rng.random() < 0.5),
        "resets": bool(kind in ("linen", "nnx") and rng.random() < 0.4),
        "reverse": bool(kind in ("linen", "nnx") and rng.random() < 0.4),
        "keep_order": bool(kind in ("linen", "nnx") and rng.random() < 0.5),
        "time_major": bool(masked and rng.random() < 0.3),
        "chunks": bool(masked and rng.random() < 0.3),
    }


def some_params(rng: np.random.Generator, cell: reference.Cell, features: int, hidden: int, more: bool) -> Any:
    gates = len(cell.gates)
    bias = rng.normal(0, 0.5, (len(cell.biased), hidden)) if cell.biased and more else None
    shapes = (features, gates, hidden), (hidden, gates, hidden), (gates, hidden)
    return reference.Params(*(rng.normal(0, 0.5, shape) for shape in shapes), bias, ())


def masks_of(rng: np.random.Generator, problem: Problem) -> tuple[Any, Any]:
    lengths = rng.integers(0, problem["steps"] + 1, problem["batch"]) if problem["lengths"] else None
    resets = rng.random((*problem["batch"], problem["steps"])) < 0.3 if problem["resets"] else None
    return lengths, resets


# ---------------------------------------------------------------- parameters as the modules have them


def as_linen(name: str, cell: reference.Cell, p: Any) -> Any:
    """Dense layers for each gate; which of the two holds the bias is the cell's own."""
    if name == "SimpleCell":
        kernels = p.input_kernel[:, 0], p.recurrent_kernel[:, 0]
        return {"i": {"kernel": kernels[0], "bias": p.bias[0]}, "h": {"kernel": kernels[1]}}
    tree: dict[str, Any] = {}
    for g, gate in enumerate(cell.gates):
        tree[f"i{gate}"] = {"kernel": p.input_kernel[:, g]}
        tree[f"h{gate}"] = {"kernel": p.recurrent_kernel[:, g]}
        tree["hi"[0] + gate if "LSTM" in name else f"i{gate}"]["bias"] = p.bias[g]
        if g in cell.biased:
            tree[f"h{gate}"]["bias"] = p.recurrent_bias[cell.biased.index(g)]
    return tree


def as_nnx(name: str, cell: reference.Cell, p: Any) -> Any:
    """All gates side by side."""
    tree = {side: {"kernel": k.reshape(len(k), -1)} for side, k in (("dense_i", p[0]), ("dense_h", p[1]))}
    tree["dense_h" if "LSTM" in name else "dense_i"]["bias"] = p.bias.reshape(-1)
    if p.recurrent_bias is not None:
        tree["b_hn"] = p.recurrent_bias[0]
    return tree


def as_layers(params: Any) -> Any:
    """The fields of the functional cell's parameters, by direction and level."""
    return {
        f"{way}_{level}": {field: a for field, a in p._asdict().items() if field != "units" and a is not None}
        for level, ways in enumerate(params)
        for way, p in zip(("forward", "backward"), ways, strict=False)
    }


# ------------------------------------------------------------------------------------------- checking


def check_layers(problem: Problem) -> None:
    """Outputs, carries and all gradients of a module, one cell or several layers."""
    rng, kind, name = np.random.default_rng(problem["seed"]), problem["kind"], problem["name"]
    stacked, batch, hidden = "layers" in kind, problem["batch"], problem["hidden"]
    cell = (LAYERS if stacked else CELLS)[name]
    fields = 2 if "LSTM" in name else 1
    xs = rng.normal(size=(*batch, problem["steps"], problem["features"]))
    lengths, resets = masks_of(rng, problem)
    ways = (False, True) if problem["both_ways"] else (problem["reverse"],)
    params, size = [], problem["features"]
    for _ in range(problem["levels"]):
        more = kind != "nnx" or name != "GRUCell"
        params.append([some_params(rng, cell, size, hidden, more) for _ in ways])
        size = hidden * len(ways)
    start = tuple(np.zeros((*batch, hidden)) if stacked else rng.normal(size=(*batch, hidden)) for _ in range(fields))

    # Forward and back through the levels, in NumPy.
    options = [
        {"reverse": r, "keep_order": r if stacked else problem["keep_order"], "lengths": lengths, "resets": resets}
        for r in ways
    ]
    inputs, lasts = [xs], []
    for level in params:
        runs = [reference.forward(cell, p, inputs[-1], start, **o) for p, o in zip(level, options, strict=True)]
        inputs.append(np.concatenate([r.outputs for r in runs], -1))
        lasts.append([r.last for r in runs])
    d_out = rng.normal(size=inputs[-1].shape)
    if lengths is not None:
        d_out *= (np.arange(problem["steps"]) < lengths[..., None])[..., None]
    d_lasts = jax.tree.map(lambda a: rng.normal(size=a.shape), lasts)
    d_params, d, d_start = [], d_out, start
    for n in reversed(range(len(params))):
        parts, d_in = np.split(d, len(ways), -1), 0.0
        found = []
        for p, o, part, d_last in zip(params[n], options, parts, d_lasts[n], strict=True):
            g, dx, d_start = reference.gradients(cell, p, inputs[n], start, part, d_last, **o)
            found.append(g)
            d_in = d_in + dx
        d_params.insert(0, found)
        d = d_in

    # The same by the module.
    shared: dict[str, Any] = {"return_carry": True}
    if problem["chunks"]:
        shared |= {"checkpoint_every": 2, "recompute": "chunk"}
    flavour: Any = linen if "linen" in kind else nnx
    wide = {"param_dtype": jnp.float64} | ({} if flavour is linen else {"rngs": flax_nnx.Rngs(0)})
    if kind == "nnx":
        wide["dtype"] = jnp.float64  # Flax's simple cell has float32 for a default
    shared["time_major"] = problem["time_major"]
    sizes = (hidden,) if flavour is linen else (problem["features"], hidden)
    if stacked:
        more = {"num_layers": problem["levels"], "bidirectional": problem["both_ways"]}
        layer = getattr(flavour, name)(*sizes, **more, **wide, **shared)
        tree_of = as_layers
    else:
        layer = flavour.RNN(getattr(flavour, name)(*sizes, **wide), **shared)
        convert = as_linen if flavour is linen else as_nnx
        tree_of = lambda params: {"cell": convert(name, cell, params[0][0])}  # noqa: E731
    call: dict[str, Any] = {"seq_lengths": lengths}
    if not stacked:
        call |= {"reverse": ways[0], "keep_order": problem["keep_order"]}
    turn = (lambda a: jnp.moveaxis(a, -2, 0)) if problem["time_major"] else jnp.asarray
    back = (lambda a: jnp.moveaxis(a, 0, -2)) if problem["time_major"] else jnp.asarray
    if resets is not None:
        call["resets"] = turn(resets[..., None])[..., 0]

    def loss(tree: Any, xs: Any, start: Any) -> Any:
        given = {} if stacked else {"initial_carry": start if fields == 2 else start[0]}
        if flavour is linen:
            last, ys = layer.apply({"params": tree}, turn(xs), **call, **given)
        else:
            graph, state, rest = flax_nnx.split(layer, flax_nnx.Param, ...)
            flax_nnx.replace_by_pure_dict(state, tree)
            last, ys = flax_nnx.merge(graph, state, rest)(turn(xs), **call, **given)
        ends, ys = jax.tree.leaves(last), back(ys)
        total = jnp.vdot(ys, d_out) + sum(jnp.vdot(a, b) for a, b in zip(ends, jax.tree.leaves(d_lasts), strict=True))
        return total, (ends, ys)

    step = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    tree = jax.tree.map(jnp.asarray, tree_of(params))
    gradients, (ends, ys) = step(tree, jnp.asarray(xs), jax.tree.map(jnp.asarray, start))
    inside = np.ones((*batch, problem["steps"], 1)) if lengths is None else (d_out != 0).any(-1, keepdims=True)
    want = inputs[-1] if not stacked else inputs[-1] * inside
    assert_close((ends, ys if not stacked else ys * inside), (jax.tree.leaves(lasts), want), TOLERANCE)
    assert_close(gradients[:2], (tree_of(d_params), d), TOLERANCE)
    if not stacked:
        assert_close(gradients[2], d_start, TOLERANCE)


def check_analysis(problem: Problem) -> None:
    """Jacobians of every step, and what their products keep."""
    rng, name, hidden = np.random.default_rng(problem["seed"]), problem["name"], problem["hidden"]
    cell, batch, steps = OF_FUNCTIONAL[name], problem["batch"], problem["steps"]
    params = some_params(rng, cell, problem["features"], hidden, True)
    xs = rng.normal(size=(*batch, steps, problem["features"]))
    fields = 2 if name == "LSTM" else 1
    state = tuple(rng.normal(size=(*batch, hidden)) for _ in range(fields))
    zero, nothing, found, first = np.zeros((*batch, 1, hidden)), np.zeros((*batch, hidden)), [], state
    for t in range(steps):
        x, rows = xs[..., t : t + 1, :], []
        for field in range(fields):
            for unit in range(hidden):
                pulled = [nothing.copy() for _ in range(fields)]
                pulled[field][..., unit] = 1
                _, _, before = reference.gradients(cell, params, x, state, zero, tuple(pulled))
                rows.append(np.concatenate(before, -1))
        found.append(np.stack(rows, -2))
        state = reference.forward(cell, params, x, state).last
    jacobians = np.stack(found, -3)

    made = FUNCTIONAL[name](hidden)
    ours = rnncore.CellParams(*(None if a is None else jnp.asarray(a) for a in params[:4]), ())
    carry = made.Carry(*map(jnp.asarray, first))
    run = analysis.trajectory(made, ours, jnp.asarray(xs), carry)
    assert_close(analysis.step_jacobians(run), jacobians, TOLERANCE)
    product, logs = np.broadcast_to(np.eye(fields * hidden), jacobians[..., 0, :, :].shape), []
    for t in range(1, steps + 1):
        product = product @ jacobians[..., -t, :, :]
        logs.append(np.log(np.linalg.norm(product, axis=(-2, -1)) / np.sqrt(fields * hidden)))
    curve = analysis.retention_curve(run, kind="rms", lags=range(1, steps + 1))
    assert_close(curve.log_retention, np.stack(logs, -1), 1e-8)
    largest = np.linalg.svd(product, compute_uv=False)[..., 0]
    assert_close(analysis.singular_spectrum(run, steps)[..., 0], np.log(largest), 1e-8)


def check(problem: Problem) -> None:
    (check_analysis if problem["kind"] == "analysis" else check_layers)(problem)


# -------------------------------------------------------------------------------------------- shrinking


def fault(problem: Problem) -> str | None:
    try:
        check(problem)
    except Exception as error:  # whatever it is, the others are worth trying
        return f"{type(error).__name__}: {str(error)[:400]}"
    return None


def smaller(problem: Problem) -> Problem:
    """The problem with every option off and every size least, as far as it still fails."""
    for key, value in list(problem.items()):
        least = SMALLEST.get(key, False if isinstance(value, bool) else value)
        if value != least and fault(problem | {key: least}) is not None:
            problem = problem | {key: least}
    return problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long (default: 120)")
    parser.add_argument("--seed", type=int, help="of all problems (default: a fresh one)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (default: 0)")
    args = parser.parse_args()
    seed = time.time_ns() % 1_000_000 if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    number, failed, end = args.first, 0, time.monotonic() + args.seconds
    with tqdm(unit=" problems") as bar:
        while time.monotonic() < end:
            problem = draw(np.random.default_rng([seed, number]))
            if why := fault(problem):
                failed += 1
                least = smaller(problem)
                given = ", ".join(f"{k}={v!r}" for k, v in least.items() if v is not False)
                bar.write(f"--seed {seed} --first {number}: {why}\n  least: {given}\n  {fault(least)}")
            number += 1
            bar.update()
            if number % 20 == 0:
                jax.clear_caches()
    print(f"{number - args.first} problems of seed {seed} from number {args.first}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
