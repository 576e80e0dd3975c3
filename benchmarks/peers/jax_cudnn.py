"""JAX's own binding to cuDNN, `jax.experimental.rnn`: LSTM, float32, NVIDIA GPUs."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem


class JaxCudnnPeer(Peer):
    """All layers in one call, weights in one flat buffer."""

    library = "jax.experimental.rnn"
    package = module = "jax"

    def version(self) -> str | None:
        return importlib.metadata.version("jax")

    def unavailable(self, platform: str) -> str | None:
        return None if platform == "gpu" else f"needs an NVIDIA GPU; JAX runs on {platform} here"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return ("jax.experimental.rnn",) if cell == "lstm" else ()

    def why_not(self, contender: str, case: Case) -> str | None:
        if case.dtype != "float32":
            return f"jax.experimental.rnn takes float32, not {case.dtype}"
        return super().why_not(contender, case)

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        from jax.experimental import rnn

        batch, steps, features, hidden = case.workload.shape
        layers = case.workload.layers
        precision = {"float32": jax.lax.Precision.HIGHEST, "tf32": jax.lax.Precision.HIGH, "default": None}

        def forward(weights: Any, xs: Any) -> Any:
            zeros = jnp.zeros((layers, batch, hidden), xs.dtype)
            lengths = jnp.full((batch,), steps, jnp.int32)
            return rnn.lstm(
                xs, zeros, zeros, weights, lengths, features, hidden, layers, 0.0, False, precision[case.precision]
            )[0]  # fmt: skip

        back = lambda weights: unpack(weights, features, hidden, layers)  # noqa: E731
        weights = pack(problem.params)
        return jax_programs.build(
            forward, weights, back, case, problem, measurement, algorithm="cuDNN: STANDARD (fixed in jaxlib)"
        )


def pack(params: tuple[rnncore.CellParams, ...]) -> np.ndarray:
    """W_ih and W_hh of every layer, rows gate by gate i, f, g, o; then b_ih and b_hh = 0 of every layer."""
    parts: list[Any] = []
    for own in params:
        parts += [np.asarray(k).reshape(k.shape[0], -1).T for k in (own.input_kernel, own.recurrent_kernel)]
    for own in params:
        parts += [np.asarray(own.bias), np.zeros_like(np.asarray(own.bias))]
    return np.concatenate([part.reshape(-1) for part in parts])


def unpack(weights: np.ndarray, features: int, hidden: int, layers: int) -> tuple[rnncore.CellParams, ...]:
    """The way back, of gradients; those of both biases are equal, the first is taken."""
    at, kernels, biases = 0, [], []
    for layer in range(layers):
        for columns in (hidden if layer else features, hidden):
            size = 4 * hidden * columns
            kernels.append(weights[at : at + size].reshape(4 * hidden, columns).T.reshape(columns, 4, hidden))
            at += size
    for _ in range(layers):
        biases.append(weights[at : at + 4 * hidden].reshape(4, hidden))
        at += 8 * hidden
    pairs = zip(kernels[::2], kernels[1::2], biases, strict=True)
    return tuple(rnncore.CellParams(w, u, b, None, ()) for w, u, b in pairs)  # type: ignore[arg-type]
