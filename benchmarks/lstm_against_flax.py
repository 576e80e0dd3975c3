"""Forward plus backward of one LSTM layer: rnncore against flax.linen's RNN(OptimizedLSTMCell).

The claim: with differentiation="reverse" rnncore is at least as fast on each of five shapes and 1.3
times in the geometric mean; with "any" never more than 10 % slower.

    python -m benchmarks.lstm_against_flax --out benchmarks/results/lstm_against_flax_cpu.json

All contenders of a shape run in turn, A B C A B C, for a number of rounds; the figures are medians
over rounds, and ratios are taken within a round.  Each contender's gradients are compared with a
float64 run of the same step, so that no time stands for a wrong answer.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks import timing

SHAPES = ((32, 128, 128, 256), (16, 1000, 64, 128), (64, 100, 512, 512), (8, 256, 64, 64), (1, 512, 64, 64))
CONTENDERS = ("flax", "reverse", "any")
GATES = "ifgo"


def flax_params(params: rnncore.CellParams) -> dict:
    """The same parameters in the tree of flax.linen.OptimizedLSTMCell."""
    tree = {}
    assert params.bias is not None
    for g, name in enumerate(GATES):
        tree[f"i{name}"] = {"kernel": params.input_kernel[:, g]}
        tree[f"h{name}"] = {"kernel": params.recurrent_kernel[:, g], "bias": params.bias[g]}
    return {"params": {"cell": tree}}


def core_params(tree: dict) -> rnncore.CellParams:
    """Gradients in Flax's tree as rnncore arranges them."""
    cell = tree["params"]["cell"]
    stack = lambda name: jnp.stack([cell[f"{name}{g}"]["kernel"] for g in GATES], 1)  # noqa: E731
    bias = jnp.stack([cell[f"h{g}"]["bias"] for g in GATES])
    return rnncore.CellParams(stack("i"), stack("h"), bias, None, ())


def gradient_step(contender: str, hidden: int) -> Any:
    """(params, xs, cotangent) -> (sum of outputs times cotangent, gradients of params and xs), jitted."""
    if contender == "flax":
        layer = nn.RNN(nn.OptimizedLSTMCell(hidden))

        def loss(params: Any, xs: Any, ct: Any) -> Any:
            return jnp.vdot(layer.apply(params, xs), ct)  # type: ignore[arg-type]
    else:
        cell = rnncore.LSTM(hidden)

        def loss(params: Any, xs: Any, ct: Any) -> Any:
            return jnp.vdot(rnncore.unroll(cell, params, xs, differentiation=contender)[1], ct)  # type: ignore[arg-type]

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def problem(shape: tuple[int, int, int, int], dtype: Any) -> tuple[rnncore.CellParams, Any, Any]:
    """Parameters, inputs and cotangent of a shape (B, T, D, H); the same values in every dtype."""
    batch, steps, features, hidden = shape
    keys = jax.random.split(jax.random.key(0), 3)
    params = rnncore.LSTM(hidden).init(keys[0], features, jnp.float32)
    xs = jax.random.normal(keys[1], (batch, steps, features), jnp.float32)
    ct = jax.random.normal(keys[2], (batch, steps, hidden), jnp.float32)
    return jax.tree.map(lambda a: a.astype(dtype), (params, xs, ct))


def measure(shape: tuple[int, int, int, int], contenders: tuple[str, ...], rounds: int, seconds: float) -> list[dict]:
    """One record for each contender at a shape."""
    with jax.enable_x64(True):
        truth = jax.tree.map(np.asarray, gradient_step("any", shape[3])(*problem(shape, jnp.float64)))
    calls: dict[str, Callable[[], Any]] = {}
    records: dict[str, dict] = {}
    for name in contenders:
        params, xs, ct = problem(shape, jnp.float32)
        arguments = (flax_params(params) if name == "flax" else params, xs, ct)
        compiled, cost = timing.compile_step(gradient_step(name, shape[3]), arguments)
        value, (grads, dxs) = jax.block_until_ready(compiled(*arguments))
        grads = core_params(grads) if name == "flax" else grads
        error = timing.relative_error((value, (grads, dxs)), truth)
        calls[name] = functools.partial(compiled, *arguments)
        records[name] = {"shape_BTDH": shape, "contender": name, "relative_error": error, **cost}
    turns = timing.take_turns(calls, rounds, seconds)
    for name, record in records.items():
        record |= turns[name] | timing.summary(turns[name]["ms"], turns["flax"]["ms"])
    return list(records.values())


def main(argv: list[str] | None = None) -> int:
    """Runs the script; exit status 0, or 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of all contenders in turn")
    parser.add_argument("--seconds", type=float, default=0.2, help="time of one contender's turn in a round")
    every = list(range(len(SHAPES)))
    parser.add_argument("--shapes", type=int, nargs="*", default=every, choices=every, help="which shapes, by index")
    parser.add_argument("--contenders", nargs="*", default=CONTENDERS, choices=CONTENDERS, help="flax must be one")
    parser.add_argument("--out", type=Path, help="JSON file; written after every shape")
    args = parser.parse_args(argv)
    if "flax" not in args.contenders:
        parser.error("--contenders: flax is what the others are compared with")
    result: dict[str, Any] = {"machine": timing.machine(), "records": [], "interrupted": False}
    print(f"{'(B, T, D, H)':>22} {'contender':>10} {'median ms':>10} {'min':>8} {'max':>8} {'speed':>6} {'error':>8}")
    try:
        for index in args.shapes:
            for record in measure(SHAPES[index], tuple(args.contenders), args.rounds, args.seconds):
                result["records"].append(record)
                print(
                    f"{record['shape_BTDH']!s:>22} {record['contender']:>10} {record['median_ms']:10.2f} "
                    f"{record['min_ms']:8.2f} {record['max_ms']:8.2f} {record['speed_against_flax']:6.2f} "
                    f"{record['relative_error']:8.1e}",
                    flush=True,
                )
            timing.write(args.out, result)
    except KeyboardInterrupt:
        result["interrupted"] = True
        timing.write(args.out, result)
        return 130
    for name in args.contenders:
        speeds = [r["speed_against_flax"] for r in result["records"] if r["contender"] == name]
        mean = timing.geometric_mean(speeds)
        print(f"{name:>10}: geometric mean {mean:.2f}, least {min(speeds):.2f} times Flax's speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
