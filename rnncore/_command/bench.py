"""Times a recurrent layer on this machine: Flax, PyTorch if installed, and every backend of rnncore, in turns.

  python -m rnncore bench
  python -m rnncore bench --shapes 32,128,128,256 8,256,64,64 --cell gru --json bench.json --plot bench.png

A time is that of one compiled call; a gradient is of all parameters and the inputs.  All start from the same
parameters, and a contender whose result differs from Flax's is left out.  Ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore._command import timing

SHAPES = ((32, 128, 128, 256), (8, 256, 64, 64), (1, 512, 64, 64))
"""(B, T, D, H): a usual batch, a small one, a single sequence."""
CELLS = {"lstm": "OptimizedLSTMCell", "gru": "GRUCell", "elman": "SimpleCell"}
TOLERANCE = {"float32": 2e-3, "bfloat16": 6e-2, "float16": 2e-2}
"""Largest relative difference from Flax's result; TF32 products on a GPU are within it."""
FLAX = "flax.linen"

Shape = tuple[int, int, int, int]


def shape(text: str) -> Shape:
    """(B, T, D, H) of "32,128,128,256"."""
    sizes = tuple(int(size) for size in text.split(",") if size.strip().isdigit())
    if len(sizes) != 4 or text.count(",") != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected four sizes B,T,D,H, as 32,128,128,256")
    return sizes


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, default=SHAPES, metavar="B,T,D,H", help="batch, steps, features, units")
    add("--cell", choices=tuple(CELLS), default="lstm", help="default: lstm")
    add("--dtype", choices=tuple(TOLERANCE), default="float32", help="of parameters and inputs (default: float32)")
    add("--forward", action="store_true", help="the forward run alone (default: forward and backward)")
    add("--rounds", type=int, default=7, help="of all in turn (default: 7)")
    add("--seconds", type=float, default=0.1, help="of one turn, roughly (default: 0.1)")
    add("--json", type=Path, metavar="FILE", help="write every time of every round")
    add("--plot", type=Path, metavar="FILE", help="write a bar chart; needs matplotlib")


def main(args: argparse.Namespace) -> int:
    """Measures and prints a table for each shape; Ctrl-C keeps what was done."""
    if args.rounds < 1 or not args.seconds > 0:
        given = f"--rounds {args.rounds} --seconds {args.seconds}"
        raise ValueError(f"`bench {given}`: expected at least 1 round of more than 0 s.")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('`bench --plot`: matplotlib is not installed; pip install "rnncore[plots]".')
    where = timing.machine() | {"dtype": args.dtype}
    found: dict[str, Any] = {"machine": where, "cell": args.cell, "forward": args.forward, "shapes": []}
    what = "forward" if args.forward else "forward and backward"
    print(f"{where['device']}; JAX {jax.__version__}, rnncore {rnncore.__version__}; {args.cell}, {args.dtype}, {what}")
    try:
        for one in args.shapes:
            found["shapes"].append(measure(one, args))
            print(table(found["shapes"][-1]), flush=True)
    finally:
        timing.write(args.json, found)
        if args.plot and found["shapes"]:
            plot(found, args.plot)
    return 0


def measure(sizes: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """{"shape", "contenders": {name: {"ms": [...], "median_ms", "speed_against_flax"}}, "left_out": {name: why}}."""
    batch, steps, features, hidden = sizes
    xs = jax.random.normal(jax.random.key(1), (batch, steps, features), args.dtype)
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    theirs: Any = getattr(flax.linen, CELLS[args.cell])
    ours: Any = getattr(rnncore.linen, CELLS[args.cell])
    kinds = {"dtype": jnp.dtype(args.dtype), "param_dtype": jnp.dtype(args.dtype)}
    layers: dict[str, Any] = {FLAX: flax.linen.RNN(theirs(hidden, **kinds))}
    variables = jax.jit(layers[FLAX].init)(jax.random.key(0), xs)
    cell, params = rnncore.linen.functional(ours(hidden, **kinds), variables["params"]["cell"])
    choice = rnncore.explain_backend(cell, params, xs)
    for name in (choice.name, *choice.rejected):
        layers[f"rnncore {name}"] = rnncore.linen.RNN(ours(hidden, **kinds), backend=name)
    for name, layer in layers.items():
        run = jax.jit(functools.partial(_outputs if args.forward else _gradient, layer))
        try:
            compiled, _ = timing.compile_step(run, (variables, xs))
        except NotImplementedError as refused:
            left_out[name] = str(refused).splitlines()[0]
            continue
        calls[name] = functools.partial(compiled, variables, xs)
        results[name] = jax.block_until_ready(calls[name]())
        wanted = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(results[FLAX])]
        error = timing.relative_error(jax.tree.leaves(results[name]), wanted)
        if not error < TOLERANCE[args.dtype]:
            del calls[name]
            left_out[name] = f"its result differs from Flax's by {error:.1e}"
    waits: dict[str, Any] = {}
    if jax.default_backend() == "cpu" and args.dtype == "float32" and importlib.util.find_spec("torch"):
        calls["torch"], waits["torch"] = _torch(sizes, args.cell, args.forward), lambda out: out
        calls["torch"]()
    turns = timing.take_turns(calls, args.rounds, args.seconds, waits=waits)
    flax_ms = turns[FLAX]["ms"]
    contenders = {name: {"ms": turn["ms"], **timing.summary(turn["ms"], flax_ms)} for name, turn in turns.items()}
    return {"shape": sizes, "chosen": f"rnncore {choice.name}", "contenders": contenders, "left_out": left_out}


def _outputs(layer: Any, variables: Any, xs: Any) -> Any:
    return layer.apply(variables, xs)


def _gradient(layer: Any, variables: Any, xs: Any) -> Any:
    def loss(variables: Any, xs: Any) -> Any:
        return jnp.sum(jnp.sin(layer.apply(variables, xs).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1))(variables, xs)


def _torch(sizes: Shape, cell: str, forward: bool) -> Callable[[], Any]:
    """The layer in PyTorch, with values of its own."""
    torch: Any = importlib.import_module("torch")  # optional, and no dependency

    batch, steps, features, hidden = sizes
    made = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[cell]
    layer, xs = made(features, hidden, batch_first=True), torch.randn(batch, steps, features, requires_grad=not forward)

    def run() -> Any:
        with torch.no_grad() if forward else contextlib.nullcontext():
            ys = layer(xs)[0]
            if not forward:
                layer.zero_grad()
                xs.grad = None
                torch.sin(ys).sum().backward()
            return ys

    return run


def table(found: dict[str, Any]) -> str:
    """The table of a shape, the fastest first."""
    rows = sorted(found["contenders"].items(), key=lambda row: row[1]["median_ms"])
    lines = [f"\n(B, T, D, H) = {found['shape']}", f"{'':24}{'ms':>10}{'least':>10}{'of Flax':>10}"]
    for name, row in rows:
        mark = "  the default" if name == found["chosen"] else ""
        lines.append(f"{name:24}{row['median_ms']:10.3g}{row['min_ms']:10.3g}{row['speed_against_flax']:9.2f}x{mark}")
    return "\n".join([*lines, *(f"{name}: left out: {why}" for name, why in found["left_out"].items())])


def plot(found: dict[str, Any], to: Path) -> None:
    """A bar for each contender and shape: how many times as fast as Flax."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for one in found["shapes"] for name in one["contenders"]))
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.3 * len(names) * len(found["shapes"])), layout="constrained")
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        at = [k + n * width for k, one in enumerate(found["shapes"]) if name in one["contenders"]]
        speeds = [one["contenders"][name]["speed_against_flax"] for one in found["shapes"] if name in one["contenders"]]
        axes.barh(at, speeds, width, label=name)
    middles = [k + 0.4 - width / 2 for k in range(len(found["shapes"]))]
    axes.set_yticks(middles, [str(one["shape"]) for one in found["shapes"]])
    axes.invert_yaxis()
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_title(f"{found['cell']}, {found['machine']['dtype']}: {found['machine']['device']}")
    axes.set_xlabel("times as fast as flax.linen")
    axes.legend()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=150)
    plt.close(figure)
