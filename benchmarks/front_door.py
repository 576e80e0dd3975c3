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

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rnncore.linen
import rnncore.nnx
from benchmarks import objects
from rnncore._command import timing

SHAPES = {
    "S1": (32, 128, 128, 256), "S2": (16, 1000, 64, 128), "S3": (64, 100, 512, 512), "S4": (8, 256, 64, 64),
    "S5": (1, 512, 64, 64),
}  # fmt: skip
"""(B, T, D, H)"""
QUICK = (2, 6, 3, 4)
MEMORY = (64, 1024, 256, 256)
PARTS = ("step", "forward", "nnx", "tagger", "memory")
SIDES: dict[str, dict[str, Any]] = {
    "linen": {"flax": flax.linen, "rnncore": rnncore.linen}, "nnx": {"flax": flax.nnx, "rnncore": rnncore.nnx}
}  # fmt: skip
TORCH = {"torch": timing.cores(), "torch, one thread": 1}
WORDS, TAGS = 1000, 20

Shape = tuple[int, int, int, int]


class Program(NamedTuple):
    """A jitted function and its arguments."""

    run: Any
    arguments: tuple[Any, ...]


def linen_program(nn: Any, shape: Shape, train: bool) -> Program:
    """An LSTM layer of linen: a training step on the mean square of its outputs, or its outputs."""
    batch, steps, features, hidden = shape
    layer = nn.RNN(nn.OptimizedLSTMCell(hidden))
    xs = jax.random.normal(jax.random.key(1), (batch, steps, features), jnp.float32)
    params = layer.init(jax.random.key(0), xs[:1, :1])
    if not train:
        return Program(jax.jit(layer.apply), (params, xs))
    return _training(lambda params, xs: jnp.square(layer.apply(params, xs)).mean(), params, xs)


def nnx_program(nn: Any, shape: Shape, train: bool) -> Program:
    """The same layer of nnx."""
    batch, steps, features, hidden = shape
    layer = nn.RNN(nn.OptimizedLSTMCell(features, hidden, rngs=nn.Rngs(0)))
    graph, params, rest = nn.split(layer, nn.Param, ...)
    xs = jax.random.normal(jax.random.key(1), (batch, steps, features), jnp.float32)

    def outputs(params: Any, xs: Any) -> Any:
        return nn.merge(graph, params, rest, copy=True)(xs)

    if not train:
        return Program(jax.jit(outputs), (params, xs))
    return _training(lambda params, xs: jnp.square(outputs(params, xs)).mean(), params, xs)


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


def seconds_to_compile(make: Callable[[], Program]) -> tuple[Any, dict[str, Any]]:
    jax.clear_caches()
    program = make()
    return timing.compile_step(program.run, program.arguments)


def programs(part: str, shape: Shape) -> dict[str, Callable[[], Program]]:
    """By side, the program of a part."""
    api = "nnx" if part == "nnx" else "linen"
    build: Any = nnx_program if part == "nnx" else linen_program
    if part == "tagger":
        return {side: functools.partial(tagger, nn, shape) for side, nn in SIDES[api].items()}
    return {side: functools.partial(build, nn, shape, part != "forward") for side, nn in SIDES[api].items()}


def measure(part: str, shape: Shape, rounds: int, seconds: float, compilations: int) -> list[dict[str, Any]]:
    """One record for each contender."""
    makes, results = programs(part, shape), {}
    costs: dict[str, list[dict[str, Any]]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    waits: dict[str, Any] = {}
    for make in makes.values():
        seconds_to_compile(make)  # a cell that is new is compiled here
    for _ in range(compilations):
        for side, make in makes.items():
            compiled, cost = seconds_to_compile(make)
            costs.setdefault(side, []).append(cost)
            if part != "memory":
                arguments = make().arguments
                calls[side] = functools.partial(compiled, *arguments)
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
    for side, call in calls.items():
        results[side] = jax.tree.map(np.asarray, call())
    pairs = list(zip(*map(jax.tree.leaves, results.values()), strict=True))
    difference = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)
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


def line(found: list[dict[str, Any]]) -> str:
    """rnncore beside Flax, for the terminal."""
    of = {record["side"]: record for record in found}
    flax, own = of["flax"], of["rnncore"]
    told = [f"{own['part']} {own['shape_BTDH']}"]
    if "ms" in own:
        told.append(f"{flax['median_ms']:.2f} ms and {own['median_ms']:.2f}")
    for name in ("flax", "torch"):
        if f"speed_against_{name}" in own:
            told.append(f"{own[f'speed_against_{name}']:.2f} times the speed of {name}")
    for what in ("temporary_bytes", "compile_seconds"):
        told.append(f"{own[what] / (flax[what] or 1):.2f} of its {what.replace('_', ' ')}")
    return ", ".join(told)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = objects.parser("front_door", __doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--workloads", nargs="+", default=list(SHAPES), choices=SHAPES, help="(default: all five)")
    parser.add_argument("--compilations", type=int, default=3, help="compilations that are counted (default: 3)")
    args = objects.parsed(parser, argv)
    if args.compilations < 1:
        parser.error(f"--compilations {args.compilations}: expected at least 1")
    cases: list[tuple[str, Shape]] = []
    for part in args.parts:
        fixed = {"tagger": (32, 100, 64, 128), "memory": MEMORY}.get(part)
        named = [fixed] if fixed else [SHAPES[name] for name in args.workloads]
        cases += [(part, shape) for shape in ([QUICK] if args.quick else named)]

    def one(case: tuple[str, Shape]) -> list[dict[str, Any]]:
        return measure(*case, args.rounds, args.seconds, args.compilations)

    return objects.run("front door", args, cases, one, line)


if __name__ == "__main__":
    sys.exit(main())
