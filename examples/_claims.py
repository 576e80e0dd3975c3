"""Shared by the examples that check a claim: networks at named initialisations, and their retention."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import _options
import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore import analysis, initializers

FLOAT = jnp.float64
Build = Callable[[int, int, jax.Array], tuple[rnncore.PointwiseCell, Any]]


def command(document: str, *, out: str, hidden: int, inputs: int, lags: int, seeds: int) -> argparse.ArgumentParser:
    """The options of an example that measures networks without training them."""
    parser = _options.bare(document)
    add = parser.add_argument
    add("--hidden", type=_options.at_least(2), default=hidden, help="hidden units H")
    add("--inputs", type=_options.at_least(1), default=inputs, help="input features D, normally distributed")
    add("--lags", type=_options.at_least(10), default=lags, help="steps back to measure")
    add("--seeds", type=_options.at_least(1), default=seeds, help="draws of the parameters and of the inputs")
    add("--out", metavar="PREFIX", default=out, help="writes PREFIX.json and PREFIX.png")
    return parser


def spread(text: str) -> float:
    """Type of an option that is a standard deviation; 0 is allowed."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a standard deviation, expected a finite number of at least 0")
    return value


# ------------------------------------------------------------------------------- initialisations


def torch(kind: str, forget: float | None = None) -> Build:
    """torch.nn.RNN or LSTM, all from U(-1/sqrt H, 1/sqrt H), with two biases of which rnncore keeps the sum.

    Args:
      forget: sets the sum of the two forget biases instead; 2 is what setting both to 1 gives.
    """

    def build(hidden: int, inputs: int, key: jax.Array) -> tuple[rnncore.PointwiseCell, Any]:
        cell = make(kind, hidden)
        params, edge = cell.init(key, inputs, FLOAT), hidden**-0.5
        one, two, three, four = jax.random.split(key, 4)

        def draw(key: jax.Array, like: jax.Array) -> jax.Array:
            return jax.random.uniform(key, like.shape, FLOAT, -edge, edge)

        bias = draw(three, params.bias) + draw(four, params.bias)
        if forget is not None:
            bias = bias.at[cell.gates.index("f")].set(forget)
        inward, recurrent = draw(one, params.input_kernel), draw(two, params.recurrent_kernel)
        return cell, params._replace(bias=bias, input_kernel=inward, recurrent_kernel=recurrent)

    return build


def keras(kind: str) -> Build:
    """Glorot's input kernel and one orthogonal recurrent kernel, both over all gates at once; forget bias 1."""

    def build(hidden: int, inputs: int, key: jax.Array) -> tuple[rnncore.PointwiseCell, Any]:
        cell = make(kind, hidden)
        params = cell.init(key, inputs, FLOAT)
        one, two = jax.random.split(key)
        gates = len(cell.gates)
        glorot = jax.nn.initializers.glorot_uniform()(one, (inputs, gates * hidden), FLOAT)
        whole = initializers.orthogonal(two, (hidden, gates * hidden), FLOAT)
        bias = jnp.zeros_like(params.bias)
        if "f" in cell.gates:
            bias = bias.at[cell.gates.index("f")].set(1.0)
        return cell, params._replace(
            input_kernel=glorot.reshape(inputs, gates, hidden),
            recurrent_kernel=whole.reshape(hidden, gates, hidden), bias=bias,
        )  # fmt: skip

    return build


def orthogonal(kind: str, bias: Any = None) -> Build:
    """rnncore's own and flax.linen's: an orthogonal recurrent matrix for each gate, LeCun's input kernel, biases 0.

    Args:
      bias: an initialiser for the (G, H) bias, instead of 0.
    """

    def build(hidden: int, inputs: int, key: jax.Array) -> tuple[rnncore.PointwiseCell, Any]:
        cell = make(kind, hidden)
        params = cell.init(key, inputs, FLOAT)
        if bias is None:
            return cell, params
        return cell, params._replace(bias=bias(jax.random.fold_in(key, 1), params.bias.shape, FLOAT))

    return build


def make(kind: str, hidden: int) -> Any:
    """The cell of a kind of network."""
    return {"RNN": rnncore.Elman, "LSTM": rnncore.LSTM}[kind](hidden)


# -------------------------------------------------------------------------------------- measuring


def run(cell: Any, params: Any, xs: jax.Array, burn_in: int) -> analysis.Trajectory:
    """The trajectory after the first `burn_in` of the inputs (T, D), from a zero state."""
    carry = None
    if burn_in:
        carry, _ = rnncore.unroll(cell, params, xs[:burn_in])
    return analysis.trajectory(cell, params, xs[burn_in:], carry)


def inputs(key: jax.Array, steps: int, features: int, scale: float) -> jax.Array:
    """(T, D) normal numbers of standard deviation `scale`."""
    return scale * jax.random.normal(key, (steps, features), FLOAT)


def quartiles(values: Sequence[float] | np.ndarray) -> list[float]:
    """[lower quartile, median, upper quartile]; a retention of exactly 0 is -inf and sorts below all others."""
    array = np.asarray(values, float)
    if np.all(np.isfinite(array)):
        return [float(x) for x in np.percentile(array, (25, 50, 75))]
    # Nothing lies between -inf and a number.
    return [float(x) for x in np.percentile(array, (25, 50, 75), method="nearest")]


# ---------------------------------------------------------------------------------------- printing


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns, the first `left` of them left-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        texts = [c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(texts).rstrip()

    return "\n".join([line(head), "-" * len(line(head)), *map(line, rows)])


def exponent(log10: float | None) -> str:
    """A power of ten as text, or 0."""
    if log10 is None or not math.isfinite(log10):
        return "0"
    return f"10^{round(log10, 1) + 0.0:.1f}"


def powers_axis(axis: Any, low: float, high: float, every: int = 5, which: str = "y") -> None:
    """Labels an axis of log10 values with powers of ten."""
    ticks = list(range(every * math.floor(low / every), every * math.ceil(high / every) + 1, every))
    labels = [f"$10^{{{tick}}}$" for tick in ticks]
    (axis.set_yticks if which == "y" else axis.set_xticks)(ticks, labels)
