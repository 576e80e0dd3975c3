"""Whether the library works at all with the versions that are installed here: a training step by every door.

    python tests/smoke.py

Run by CI with the lowest versions that are declared and with the newest; needs nothing but the library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, linen, nnx
from rnncore.kernels import compiler
from rnncore.training import StreamState, segments, truncated_bptt

B, T, D, H = 4, 12, 3, 8
XS = jax.random.normal(jax.random.key(0), (B, T, D), jnp.float32)
TARGET = jnp.cumsum(XS, 1)[..., :1] / 4
BACKENDS = ("scan", "autodiff", *(("cpp",) if compiler.find() else ()))


def error(ys: jax.Array) -> jax.Array:
    return jnp.mean((ys[..., :1] - TARGET) ** 2)


def train(run: Callable[[Any, jax.Array], jax.Array], params: Any) -> float:
    """What Adam makes of the loss in twenty steps; it has to be less."""
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: error(run(p, XS)))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses
    return losses[-1]


def unroll() -> None:
    cell = rnncore.LSTM(H, forget_bias=1.0)
    params = cell.init(jax.random.key(1), D)
    ends = [train(lambda p, xs, b=b: rnncore.unroll(cell, p, xs, backend=b)[1], params) for b in BACKENDS]
    assert max(ends) - min(ends) < 1e-4, dict(zip(BACKENDS, ends, strict=True))


def of_linen() -> None:
    for layer in (linen.RNN(linen.OptimizedLSTMCell(H)), linen.GRU(H, num_layers=2, bidirectional=True)):
        train(layer.apply, layer.init(jax.random.key(1), XS))


def of_nnx() -> None:
    rngs = flax_nnx.Rngs(0)
    for layer in (nnx.RNN(nnx.GRUCell(D, H, rngs=rngs)), nnx.LSTM(D, H, num_layers=2, rngs=rngs)):
        graph, params = flax_nnx.split(layer, flax_nnx.Param)
        train(lambda p, xs, graph=graph: flax_nnx.merge(graph, p)(xs), params)


def streams() -> None:
    cell, optimizer = rnncore.GRU(H), optax.sgd(1e-2)

    def loss(params: Any, carry: Any, segment: Any) -> Any:
        carry, ys = rnncore.unroll(cell, params, segment, initial_carry=carry)
        return jnp.mean(ys**2), carry

    params = cell.init(jax.random.key(1), D)
    state = StreamState(params, optimizer.init(params), cell.initial_carry((B,)))
    _, losses = jax.lax.scan(truncated_bptt(loss, optimizer), state, segments(XS, 4))
    assert losses.shape == (3,) and bool(jnp.isfinite(losses).all())


def report() -> None:
    model = linen.RNN(linen.LSTMCell(H))
    found = analysis.report(model, model.init(jax.random.key(1), XS), XS, lambda ys, _: error(ys))
    assert len(found.layers) == 1 and str(found)


def main() -> None:
    packages = ("jax", "jaxlib", "flax", "optax", "chex", "numpy")
    print(f"Python {sys.version.split()[0]}:", ", ".join(f"{name} {version(name)}" for name in packages), flush=True)
    os.environ.setdefault("RNNCORE_CPP", "0")  # compiled where it is named
    for part in (unroll, of_linen, of_nnx, streams, report):
        part()
        print("works:", part.__name__, flush=True)


if __name__ == "__main__":
    main()
