"""One LSTM layer as flax.linen runs it and with rnncore's memory policies, by the name of each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import rnncore
from benchmarks.peers.flax_linen import to_core, to_flax
from rnncore.kernels import cpp

FLAX, CPP, CHUNKS = "flax.linen", "cpp", "scan, checkpoint_every=16"
# Options of `rnncore.unroll`.
OPTIONS: dict[str, dict[str, Any]] = {
    "scan": {"backend": "scan"},
    "scan, recompute='gates'": {"backend": "scan", "recompute": "gates"},
    "scan, recompute='chunk'": {"backend": "scan", "recompute": "chunk"},
    "scan, residual_dtype=bfloat16": {"backend": "scan", "residual_dtype": jnp.bfloat16},
    CHUNKS: {"backend": "scan", "checkpoint_every": 16},
    CPP: {"backend": "cpp"},
}


class Layer(NamedTuple):
    """How to run it.

    Fields:
      apply: (its own tree of parameters, inputs (B, T, D)) -> outputs (B, T, H).
      own: `rnncore.CellParams` in its own tree.
      core: the way back, of gradients.
    """

    apply: Callable[[Any, Any], Any]
    own: Callable[[Any], Any]
    core: Callable[[Any], Any]


def available(names: Sequence[str]) -> tuple[str, ...]:
    """Those that can run here; of the others stderr is told why not."""
    why = cpp.missing_compiler(jax.default_backend())
    if CPP in names and why is not None:
        print(f"{CPP}: {why}", file=sys.stderr)
    return tuple(name for name in names if name != CPP or why is None)


def lstm(name: str, hidden: int) -> Layer:
    """The layer of a name, FLAX or one of OPTIONS."""
    if name == FLAX:
        layer = nn.RNN(nn.OptimizedLSTMCell(hidden))
        return Layer(layer.apply, functools.partial(to_flax, cell="lstm"), functools.partial(to_core, cell="lstm"))
    cell = rnncore.LSTM(hidden)

    def apply(params: Any, xs: Any) -> Any:
        return rnncore.unroll(cell, params, xs, **OPTIONS[name])[1]

    return Layer(apply, lambda params: params, lambda params: params)
