"""Gradients over time: a map of every unit, and what the inputs do."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm

from rnncore.analysis.plots.style import COLOURS, GUIDE, diverging_map, edges, finish, floored, new_axes, numbers
from rnncore.analysis.retention.window import effective_window

DECADES = 8
"""How far below the largest entry the logarithmic colours begin, unless told."""


def gradient_heatmap(
    gradients: Any, *, linear_below: float | None = None, first: int = 0, label: str = "dL/dh", ax: Axes | None = None
) -> Axes:
    """The gradient at every unit and step, in colours of its signed logarithm.

    Dark is negative, light positive, the grey between them 0; in grey print too.

    Args:
      gradients: (T, H), as one sequence of a field of `state_gradients`; 0 is a value like others.
      linear_below: size below which colours are linear and so run into 0; by default 1e-8 of the largest.
      first: the step that the first row belongs to; 0 for `state_gradients`.
      label: of the colours.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: another shape, numbers that are not finite, a linear_below that is not above 0.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.gradient_heatmap(np.array([[1e-6, -1e-3], [1e-2, 1.0]]), ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('step t', 'unit')
    """
    values = _finite("gradient_heatmap", gradients, "(T, H), the gradients of one sequence")
    top = float(np.abs(values).max()) or 1.0
    linear = top * 10.0**-DECADES if linear_below is None else float(linear_below)
    if not 0 < linear < math.inf:
        raise ValueError(f"`gradient_heatmap(linear_below={linear_below!r})`: expected a size above 0.")
    top = max(top, linear)
    ax = new_axes(ax)
    steps, units = values.shape
    # Numbers at the very end of the range would leave it inside the colour map.
    scale = 10.0 ** math.floor(math.log10(top)) if not 1e-250 < top < 1e250 else 1.0
    norm = SymLogNorm(linthresh=linear / scale, linscale=0.5, vmin=-top / scale, vmax=top / scale, base=10)
    mesh = ax.pcolormesh(
        edges(np.arange(steps, dtype=float) + first), edges(np.arange(units, dtype=float)), values.T / scale, norm=norm,
        cmap=diverging_map(), rasterized=True,
    )  # fmt: skip
    ax.figure.colorbar(mesh, ax=ax, ticks=_ticks(linear / scale, top / scale)).set_label(
        label if scale == 1 else f"{label} / {scale:.0e}"
    )
    ax = finish(ax, "step t", "unit")
    ax.grid(False)
    return ax


def _ticks(low: float, high: float) -> list[float]:
    """0 and at most four powers of ten on either side."""
    top, bottom = math.floor(math.log10(high) + 1e-9), math.ceil(math.log10(low) - 1e-9)
    powers = [10.0**p for p in range(top, bottom - 1, -max(1, math.ceil((top - bottom + 1) / 4)))]
    return [-p for p in powers] + [0.0] + powers[::-1]


def saliency(gradients: Any, *, share: float = 0.9, first: int = 1, ax: Axes | None = None) -> Axes:
    """How large the gradient at each input is, and how many of the last inputs hold most of it.

    log10 ||dL/dx_t||_2 against t; shaded, the last `effective_window(gradients, share)` steps

    Args:
      gradients: (T, D), as one sequence of `input_gradients`.
      share: of the sum of squares that the window holds.
      first: the number of the first step.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: another shape, numbers that are not finite, a share that is not in (0, 1].

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.saliency(np.array([[1e-9], [1e-3], [1.0]]), ax=Figure().subplots())
      >>> ax.get_legend().get_texts()[0].get_text()
      'last 1 of 3 steps: 90 %'
    """
    values = _finite("saliency", gradients, "(T, D), the gradients at the inputs of one sequence")
    # Of size 1 first: without x64 an array of 1e-60 would be one of zeros.
    window = int(effective_window(jnp.asarray(values / (np.abs(values).max() or 1.0)), share))
    size = np.abs(values).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        # The largest entry goes first: squares of 1e-200 are 0.
        logs = np.log10(size[:, 0]) + np.log10(np.linalg.norm(values / np.where(size > 0, size, 1), axis=-1))
    logs = np.where(size[:, 0] > 0, logs, -np.inf)
    ax = new_axes(ax)
    steps = np.arange(len(logs)) + first
    if window:
        ax.axvspan(
            steps[-window] - 0.5, steps[-1] + 0.5, facecolor="0.88", edgecolor=GUIDE["color"], linewidth=0.8, zorder=0,
            label=f"last {window} of {len(steps)} steps: {100 * share:.3g} %",
        )  # fmt: skip
    ax.plot(steps, floored(ax, [logs])[0], color=COLOURS[0], linewidth=1.6, marker="o", markersize=3, zorder=2.5)
    return finish(ax, "step t", r"$\log_{10}\,\|dL/dx_t\|_2$")


def _finite(call: str, value: Any, expected: str) -> np.ndarray:
    array = numbers(call, value, 2, expected)
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"`{call}(<{array.shape}>)`: -inf among the numbers; expected gradients, not their logarithms."
        )
    return array
