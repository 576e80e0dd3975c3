"""Flax models whose import alone is changed, against Flax and PyTorch: whole training steps, forward runs, a tagger.

Every model is built by the same lines from flax.linen or flax.nnx and from rnncore, without an option of ours, and
starts from the same parameters.  A step is loss, gradient and Adam's update by optax (in PyTorch by torch.optim.Adam);
the tagger is an embedding, two bidirectional LSTMs over ragged lengths, dropout and a dense layer, in linen.  PyTorch
takes its turns on all threads and on one, and the faster counts.  All run in turn, A B C A B C; figures are medians
over rounds and ratios are taken within a round.  Seconds to trace and compile are medians too, of programs that nothing
is left of in any cache, once the cell has been compiled.

  python -m benchmarks.front_door --out benchmarks/results/front_door_cpu.json     what README.md shows
  python -m benchmarks.front_door --parts step forward --workloads S1 S3 --rounds 5
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import flax_layers, objects, options
from benchmarks.flax_layers import SIDES, Shape
from benchmarks.workloads import CPU_SHAPES
from rnncore._command import timing

SHAPES: dict[str, Shape] = {f"S{n}": shape for n, shape in enumerate(CPU_SHAPES, 1)}
QUICK: Shape = (2, 6, 3, 4)
PARTS: dict[str, Shape | None] = {
    "step": None, "forward": None, "nnx": None, "tagger": (32, 100, 64, 128), "memory": (64, 1024, 256, 256)
}  # fmt: skip
"""With its shape, where there is one only."""
TORCH = {"torch": timing.cores(), "torch, one thread": 1}
WORDS, TAGS = 1000, 20


class Program(NamedTuple):
    """A jitted function and its arguments."""

    run: Any
    arguments: tuple[Any, ...]


def program(part: str, side: str, shape: Shape) -> Program:
    """Of a part: a training step on the mean square of an LSTM layer's outputs, or those outputs, or the tagger."""
    if part == "tagger":
        return tagger(SIDES["linen"][side], shape)
    api = "nnx" if part == "nnx" else "linen"
    apply, params = flax_layers.layer(api, side, "OptimizedLSTMCell", *shape[2:])
    xs = flax_layers.inputs(shape)
    if part == "forward":
        return Program(jax.jit(apply), (params, xs))
    return _training(lambda params, xs: jnp.square(apply(params, xs)).mean(), params, xs)


def tagger(nn: Any, shape: Shape) -> Program:
    """A training step of a tagger over sequences of different lengths."""
    batch, steps, features, hidden = shape
    lengths = jnp.asarray(np.random.default_rng(2).integers(steps // 4 or 1, steps + 1, batch))
    words = jax.random.randint(jax.random.key(1), (batch, steps), 0, WORDS)
    tags = jax.random.randint(jax.random.key(2), (batch, steps), 0, TAGS)

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, words: Any, lengths: Any) -> Any:
            x = nn.Embed(WORDS, features)(words)
            for _ in range(2):
                both = nn.RNN(nn.OptimizedLSTMCell(hidden)), nn.RNN(nn.OptimizedLSTMCell(hidden))
                x = nn.Bidirectional(*both)(x, seq_lengths=lengths)
                x = nn.Dropout(0.2, deterministic=False)(x)
            return nn.Dense(TAGS)(x)

    model, key = Tagger(), jax.random.key(3)
    params = model.init({"params": jax.random.key(0), "dropout": key}, words, lengths)

    def loss(params: Any, words: Any) -> Any:
        scores = model.apply(params, words, lengths, rngs={"dropout": key})
        each = optax.softmax_cross_entropy_with_integer_labels(scores, tags)
        return jnp.where(jnp.arange(steps) < lengths[:, None], each, 0).sum() / lengths.sum()

    return _training(loss, params, words)


def _training(loss: Callable[[Any, Any], Any], params: Any, xs: Any) -> Program:
    optimizer = optax.adam(1e-3)

    def step(params: Any, state: Any, xs: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, xs)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, value

    return Program(jax.jit(step), (params, optimizer.init(params), xs))


def torch_call(shape: Shape, train: bool, threads: int) -> Callable[[], Any]:
    """The same layer in PyTorch, with weights of its own."""
    import torch

    batch, steps, features, hidden = shape
    layer = torch.nn.LSTM(features, hidden, batch_first=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    xs = torch.randn(batch, steps, features)

    def forward() -> Any:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return layer(xs)[0]

    def step() -> Any:
        torch.set_num_threads(threads)
        optimizer.zero_grad(set_to_none=True)
        loss = layer(xs)[0].square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step if train else forward


def measure(part: str, shape: Shape, rounds: int, seconds: float, compilations: int) -> list[dict[str, Any]]:
    """One record for each contender."""
    costs: dict[str, list[dict[str, Any]]] = {"flax": [], "rnncore": []}
    calls: dict[str, Callable[[], Any]] = {}
    waits: dict[str, Any] = {}
    for number in range(compilations + 1):
        for side, found in costs.items():
            jax.clear_caches()
            made = program(part, side, shape)
            compiled, cost = timing.compile_step(*made)
            if number > 0:  # a cell that is new was compiled before
                found.append(cost)
            calls[side] = functools.partial(compiled, *made.arguments)
    records = {
        side: {
            "part": part, "side": side, "shape_BTDH": shape,
            "compile_seconds": statistics.median(c["compile_seconds"] for c in of),
            "temporary_bytes": of[0]["temporary_bytes"],
        }
        for side, of in costs.items()
    }  # fmt: skip
    if part == "memory":
        return list(records.values())
    difference = flax_layers.difference([call() for call in calls.values()])
    if part != "tagger" and importlib.util.find_spec("torch") is not None:
        for name, threads in TORCH.items():
            calls[name] = torch_call(shape, part != "forward", threads)
            calls[name]()
            waits[name] = lambda out: out
            records[name] = {"part": part, "side": name, "shape_BTDH": shape}
    turns = timing.take_turns(calls, rounds, seconds, waits=waits)
    for side, record in records.items():
        record |= turns[side] | timing.summary(turns[side]["ms"], turns["flax"]["ms"])
    records["rnncore"]["largest_relative_difference"] = difference
    best = [turns[name]["ms"] for name in TORCH if name in turns]
    if best:
        ratios = [min(of) / own for *of, own in zip(*best, turns["rnncore"]["ms"], strict=True)]
        records["rnncore"]["speed_against_torch"] = statistics.median(ratios)
    return list(records.values())


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = objects.parser("front_door", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help=f"some of {', '.join(PARTS)}")
    add("--workloads", nargs="+", default=list(SHAPES), choices=SHAPES, help="(default: all five)")
    add("--compilations", type=options.count, default=3, help="compilations that are counted (default: 3)")
    args = parser.parse_args(argv)
    cases: list[tuple[str, Shape]] = []
    for part in args.parts:
        fixed = PARTS[part]
        named = [fixed] if fixed else [SHAPES[name] for name in args.workloads]
        cases += [(part, shape) for shape in ([QUICK] if args.quick else named)]
    turn = args.rounds, args.seconds, args.compilations
    return objects.run("front door", args, cases, lambda case: measure(*case, *turn))


if __name__ == "__main__":
    sys.exit(main())
