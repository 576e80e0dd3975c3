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

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flax_layers, objects
from benchmarks.flax_layers import Shape
from rnncore._command import timing

SHAPES: tuple[Shape, ...] = ((32, 128, 128, 256), (16, 1000, 64, 128))
QUICK: tuple[Shape, ...] = ((2, 6, 3, 4),)
SIDES = ("flax", "rnncore")
CELLS = {
    "linen": ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell", "Bidirectional(LSTMCell)"),
    "nnx": ("LSTMCell", "OptimizedLSTMCell", "GRUCell"),
}
LAYERS = tuple(f"{api}.{cell}" for api, cells in CELLS.items() for cell in cells)


def build(layer: str, side: str, shape: Shape, dtype: Any) -> tuple[Any, Any]:
    """(jitted (params, xs) -> (loss, gradients of both), params) of a layer, named as in LAYERS, of one of SIDES."""
    api, cell = layer.split(".")
    apply, params = flax_layers.layer(api, side, cell, *shape[2:], dtype)
    return jax.jit(jax.value_and_grad(lambda params, xs: jnp.square(apply(params, xs)).mean(), (0, 1))), params


def measure(layer: str, shape: Shape, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One record for each side of a layer at a shape."""
    # Made here: random numbers drawn under x64 would be others.
    given = build(layer, "flax", shape, jnp.float32)[1], flax_layers.inputs(shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), given)
        truth = jax.tree.map(np.asarray, build(layer, "flax", shape, jnp.float64)[0](*wide))
    calls: dict[str, Callable[[], Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    results: list[Any] = []
    for side in SIDES:
        step, own = build(layer, side, shape, jnp.float32)
        trees: list[Any] = [jax.tree.structure(params) for params in (own, given[0])]
        if trees[0] != trees[1]:
            raise AssertionError(f"{layer}: the parameter trees of flax and rnncore are not the same")
        compiled, cost = timing.compile_step(step, given)
        results.append(jax.tree.map(np.asarray, compiled(*given)))
        calls[side] = functools.partial(compiled, *given)
        error = timing.relative_error(results[-1], truth)
        records[side] = {"layer": layer, "side": side, "shape_BTDH": shape, "relative_error": error, **cost}
    turns = timing.take_turns(calls, rounds, seconds)
    for side, record in records.items():
        record |= turns[side] | timing.summary(turns[side]["ms"], turns["flax"]["ms"])
        record["largest_relative_difference"] = flax_layers.difference(results)
    return list(records.values())


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = objects.parser("migration", __doc__)
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS, metavar="LAYER",
                        help=f"some of {', '.join(LAYERS)} (default: all)")  # fmt: skip
    args = parser.parse_args(argv)
    # Whatever compiles first also pays for the start of the compiler.
    jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((2, 2))).compile()
    cases = [(layer, shape) for shape in (QUICK if args.quick else SHAPES) for layer in args.layers]
    return objects.run("migration", args, cases, lambda case: measure(*case, args.rounds, args.seconds))


if __name__ == "__main__":
    sys.exit(main())
