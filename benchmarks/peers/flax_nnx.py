"""flax.nnx: `RNN` over its cells, split into graph and parameters as its functional use goes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import rnncore
from benchmarks.peers import jax_programs
from benchmarks.peers.base import Built, Case, Peer
from benchmarks.peers.problem import Problem

CELLS = {"lstm": ("LSTMCell", "OptimizedLSTMCell"), "gru": ("GRUCell",), "elman": ("SimpleCell",)}
LSTM_GATES = ("i", "f_", "g", "o")
"""As `nnx.LSTMCell` names them after "i" or "h", but for the recurrent f, which is `hf`."""


def linears(contender: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Names of the Linears of both sides, and which side has the biases."""
    if contender == "flax.nnx LSTMCell":
        return tuple(f"i{g}" for g in LSTM_GATES), tuple(f"h{g[0]}" for g in LSTM_GATES), "h"
    return ("dense_i",), ("dense_h",), "h" if "LSTM" in contender else "i"


class NnxPeer(Peer):
    """`flax.nnx.RNN(cell)`, one for each layer."""

    library, package, module = "flax.nnx", "flax", "flax"

    def contenders(self, cell: str) -> tuple[str, ...]:
        return tuple(f"flax.nnx {name}" for name in CELLS[cell])

    def form(self, contender: str, cell: str) -> str:
        return "gru without b_hn" if cell == "gru" else "same"

    def build(self, contender: str, case: Case, problem: Problem, measurement: str) -> Built:
        from flax import nnx

        inputs, recurrent, biased = linears(contender)
        with jax.enable_x64(False):
            layers = [_layer(nnx, contender, own) for own in problem.params]
        split: list[Any] = [nnx.split(layer, nnx.Param, ...) for layer in layers]
        states = tuple(found[1] for found in split)

        def merged(states: Any) -> list[Any]:
            pairs = zip(split, states, strict=True)
            return [nnx.merge(found[0], state, found[2], copy=True) for found, state in pairs]

        def forward(states: Any, xs: Any) -> Any:
            for layer in merged(states):
                xs = layer(xs)
            return xs

        def to_core(states: Any) -> tuple[rnncore.CellParams, ...]:
            return tuple(_core(layer.cell, inputs, recurrent, biased) for layer in merged(states))

        return jax_programs.build(forward, states, to_core, case, problem, measurement)


def _layer(nnx: Any, contender: str, params: rnncore.CellParams) -> Any:
    """An RNN whose cell holds these parameters."""
    features, _, hidden = params.input_kernel.shape
    dtype = np.asarray(params.input_kernel).dtype
    make = getattr(nnx, contender.removeprefix("flax.nnx "))
    # Its own initial values are overwritten, and the orthogonal ones do not exist in half types.
    zeros = dict.fromkeys(("kernel_init", "recurrent_kernel_init"), nnx.initializers.zeros_init())
    cell = make(features, hidden, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **zeros)
    inputs, recurrent, biased = linears(contender)
    for names, kernel in ((inputs, params.input_kernel), (recurrent, params.recurrent_kernel)):
        for name, part in zip(names, np.split(kernel, len(names), 1), strict=True):
            getattr(cell, name).kernel[...] = jax.numpy.asarray(part.reshape(part.shape[0], -1))
    names = inputs if biased == "i" else recurrent
    for name, part in zip(names, np.split(np.asarray(params.bias), len(names), 0), strict=True):
        getattr(cell, name).bias[...] = jax.numpy.asarray(part.reshape(-1))
    return nnx.RNN(cell, rngs=nnx.Rngs(0))


def _core(cell: Any, inputs: tuple[str, ...], recurrent: tuple[str, ...], biased: str) -> rnncore.CellParams:
    """The parameters that a cell holds, gates in the order i, f, g, o or r, z, n."""
    hidden = np.shape(getattr(cell, recurrent[0]).kernel[...])[0]

    def side(names: tuple[str, ...], leaf: str) -> np.ndarray:
        parts = [np.asarray(getattr(getattr(cell, name), leaf)[...]) for name in names]
        whole = np.concatenate(parts, -1)
        return whole.reshape(*whole.shape[:-1], -1, hidden)

    bias = side(inputs if biased == "i" else recurrent, "bias")
    return rnncore.CellParams(side(inputs, "kernel"), side(recurrent, "kernel"), bias, None, ())  # type: ignore[arg-type]
