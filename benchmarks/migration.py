"""The same Flax model before and after its import is changed: time, memory, compile time and error.

Every layer is built twice by the same lines, from flax.linen or flax.nnx and from rnncore, and gets the
same parameters.  A gradient step is the mean of the squared outputs and its gradients in terms of all
parameters and of the inputs.  Before and after run in turn, A B A B; figures are medians over rounds,
and the ratio is taken within a round.  Both gradients are compared with Flax's own step in float64, and
with each other.

  python -m benchmarks.migration --out migration.json
  python -m benchmarks.report --results migration.json      prints the table
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import rnncore.linen
import rnncore.nnx
from benchmarks import objects
from rnncore._command import timing

SHAPES = ((32, 128, 128, 256), (16, 1000, 64, 128))
QUICK = ((2, 6, 3, 4),)
SIDES = ("flax", "rnncore")
NAMESPACES: dict[str, dict[str, Any]] = {
    "linen": {"flax": flax.linen, "rnncore": rnncore.linen},
    "nnx": {"flax": flax.nnx, "rnncore": rnncore.nnx},
}
CELLS = {
    "linen": ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell", "Bidirectional(LSTMCell)"),
    "nnx": ("LSTMCell", "OptimizedLSTMCell", "GRUCell"),
}
LAYERS = tuple(f"{api}.{cell}" for api, cells in CELLS.items() for cell in cells)

Step = tuple[Any, Any]  # (jitted (params, xs) -> (loss, gradients of both), params in Flax's tree)


def linen_step(nn: Any, cell: str, features: int, hidden: int, dtype: Any) -> Step:
    """The step of a linen layer."""
    name = cell.removeprefix("Bidirectional(").removesuffix(")")
    make = functools.partial(getattr(nn, name), hidden, dtype=dtype, param_dtype=dtype)
    layer = nn.RNN(make()) if name == cell else nn.Bidirectional(nn.RNN(make()), nn.RNN(make()))
    params = layer.init(jax.random.key(0), jnp.zeros((1, 1, features), dtype))

    def loss(params: Any, xs: Any) -> Any:
        return jnp.square(layer.apply(params, xs)).mean()

    return jax.jit(jax.value_and_grad(loss, (0, 1))), params


def nnx_step(nn: Any, cell: str, features: int, hidden: int, dtype: Any) -> Step:
    """The step of an nnx layer; Flax's holds a random state besides its parameters."""
    layer = nn.RNN(getattr(nn, cell)(features, hidden, dtype=dtype, param_dtype=dtype, rngs=nn.Rngs(0)))
    graph, params, rest = nn.split(layer, nn.Param, ...)

    def loss(params: Any, xs: Any) -> Any:
        return jnp.square(nn.merge(graph, params, rest, copy=True)(xs)).mean()

    return jax.jit(jax.value_and_grad(loss, (0, 1))), params


STEPS: dict[str, Callable[..., Step]] = {"linen": linen_step, "nnx": nnx_step}


def build(layer: str, side: str, shape: tuple[int, int, int, int], dtype: Any) -> Step:
    """The step of a layer, named as in LAYERS, from one of the two SIDES."""
    api, cell = layer.split(".")
    return STEPS[api](NAMESPACES[api][side], cell, *shape[2:], dtype)


def arguments(layer: str, shape: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """Flax's initial parameters and random inputs, for both sides."""
    batch, steps, features, _ = shape
    xs = jax.random.normal(jax.random.key(1), (batch, steps, features), jnp.float32)
    return build(layer, "flax", shape, jnp.float32)[1], xs


def measure(layer: str, shape: tuple[int, int, int, int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One record for each side of a layer at a shape."""
    # Made here: random numbers drawn under x64 would be others.
    given = arguments(layer, shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), given)
        truth = jax.tree.map(np.asarray, build(layer, "flax", shape, jnp.float64)[0](*wide))
    calls: dict[str, Callable[[], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for side in SIDES:
        step, own = build(layer, side, shape, jnp.float32)
        trees: list[Any] = [jax.tree.structure(params) for params in (own, given[0])]
        if trees[0] != trees[1]:
            raise AssertionError(f"{layer}: the parameter trees of flax and rnncore are not the same")
        compiled, cost = timing.compile_step(step, given)
        results[side] = jax.tree.map(np.asarray, compiled(*given))
        calls[side] = functools.partial(compiled, *given)
        error = timing.relative_error(results[side], truth)
        records[side] = {"layer": layer, "side": side, "shape_BTDH": shape, "relative_error": error, **cost}
    pairs = zip(*map(jax.tree.leaves, results.values()), strict=True)
    difference = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    turns = timing.take_turns(calls, rounds, seconds)
    for side, record in records.items():
        record |= turns[side] | timing.summary(turns[side]["ms"], turns["flax"]["ms"])
        # Of before and after: the largest in any array, in terms of the largest number in that array.
        record["largest_relative_difference"] = difference
    return list(records.values())


def line(before: dict[str, Any], after: dict[str, Any]) -> str:
    """One layer at one shape in a line for the terminal."""
    return (
        f"{before['shape_BTDH']!s:>20} {before['layer']:>30} {before['median_ms']:9.2f} {after['median_ms']:9.2f} ms, "
        f"{after['speed_against_flax']:.2f} times as fast; they differ by {after['largest_relative_difference']:.1e}"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = objects.parser("migration", __doc__)
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, metavar="LAYER",
                        help=f"some of {', '.join(LAYERS)} (default: all)")  # fmt: skip
    args = objects.parsed(parser, argv)
    # Whatever compiles first also pays for the start of the compiler.
    jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((2, 2))).compile()

    def one(case: tuple[str, tuple[int, int, int, int]]) -> list[dict[str, Any]]:
        return measure(*case, args.rounds, args.seconds)

    cases = [(layer, shape) for shape in (QUICK if args.quick else SHAPES) for layer in args.layers]
    return objects.run("migration", args, cases, one, lambda found: line(*found))


if __name__ == "__main__":
    sys.exit(main())
