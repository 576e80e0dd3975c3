# ruff: noqa: B018
"""A user's file, never run: what type checkers have to accept, and what they have to report.

`mypy --strict` and pyright read it.  Every `type: ignore` names an error that has to be found: mypy reports those
that it does not need.
"""

from __future__ import annotations

from typing import assert_type

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, linen, nnx


class Tagger(nnx.Module):
    """A model in nnx, whose modules are Flax's but for the recurrent ones."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(4, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, xs: jax.Array) -> jax.Array:
        assert_type(self.head, flax_nnx.Linear)
        self.haed  # type: ignore[attr-defined]
        return self.head(self.rnn(xs))


class Classifier(linen.Module):
    """A model in linen."""

    hidden: int

    @linen.compact
    def __call__(self, xs: jax.Array) -> jax.Array:
        layer = linen.RNN(linen.OptimizedLSTMCell(self.hidden), return_carry=True)
        assert_type(layer.backend, str | None)
        linen.Dense(2, kernel_initt=None)  # type: ignore[call-arg]
        head = linen.Dense(2)
        assert_type(head, flax.linen.Dense)
        return jnp.asarray(head(layer(xs)[1]))


linen.Densse  # type: ignore[attr-defined]
nnx.Linnear  # type: ignore[attr-defined]
rnncore.nonsense  # type: ignore[attr-defined]

cell = rnncore.LSTM(8, recurrence=rnncore.Heads(2))
rnncore.LSTM(hidden_sise=8)  # type: ignore[call-arg]
params = cell.init(jax.random.key(0), 4)
assert_type(params, rnncore.CellParams)
carry, ys = rnncore.unroll(cell, params, jnp.ones((2, 5, 4)))
assert_type(ys, jax.Array)
rnncore.unroll(cell, params, ys, chunk=3)  # type: ignore[call-overload]
rnncore.unroll(cell, params, ys, reverse="yes")  # type: ignore[call-overload]
assert_type(rnncore.explain_backend(cell, params, ys, time_major=True).name, str)

run = rnncore.analysis.trajectory(cell, params, jnp.ones((5, 4)))
curve = analysis.retention_curve(run, kind="rms", path="cell", lags=range(1, 4))
assert_type(curve, analysis.RetentionCurve)
rate: analysis.DecayRate = curve.decay_rate()
rule = rnncore.online.RTRL(cell)
pieces = rnncore.training.segments
