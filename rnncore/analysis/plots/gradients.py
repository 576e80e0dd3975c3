"""Gradients over time: a map of every unit, and what the inputs do."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnncore.analysis.plots.style import (
    COLOURS,
    GUIDE,
    OKABE_ITO,
    finish,
    finite,
    floored,
    named,
    new_axes,
    signed_map,
    time_by_unit,
)
from rnncore.analysis.retention.window import effective_window

PALE = "Blues"
"""From white, for maps that are mostly empty."""


def gradient_heatmap(gradients: Any, *, first: int = 0, label: str = "dL/dh", ax: Axes | None = None) -> Axes:
    """Plots the gradient at every unit and step, coloured by its signed logarithm.

    Dark is negative, light positive and grey 0, also in greyscale; below 1e-8 of the largest colours are linear.

    Args:
      gradients: (T, H), one sequence of a field of `gradients_over_time(...).states`.
      first: the step that the first row belongs to; 0 where the initial state is among them.
      label: of the colour bar.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: another shape, numbers that are not finite.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.gradient_heatmap(np.array([[1e-6, -1e-3], [1e-2, 1.0]]), ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('step t', 'unit')
    """
    values = finite("gradient_heatmap", gradients, 2, "(T, H), the gradients of one sequence")
    ax = new_axes(ax)
    signed_map(ax, values, first, float(np.abs(values).max()) or 1.0, label)
    ax = finish(ax, "step t", "unit")
    ax.grid(False)
    return ax


def gradient_maps(
    gradients: Any, *, level: float = 0.01, decades: float = 4.0, first: int = 1, figure: Figure | None = None
) -> Figure:
    """Plots the size of dL/dh_t by step and unit for several networks, and how far back it reaches.

    colour: log10 (|dL/dh_t| / max |dL/dh|), from white for nothing to dark
    reach:  from the first step with ||dL/dh_t|| >= level max_t ||dL/dh_t||, marked by a line, to the last

    Args:
      gradients: a mapping from the names of networks to (T, H), one sequence of
        `gradients_over_time(...).states.h`.
      level: the smallest norm that counts, relative to the largest.
      decades: the range of the colours.
      first: the number of the first step; 0 where the initial state is among them.
      figure: to draw into; None makes a new one.

    Returns:
      The figure, with axes for each network, one above the other, and a colour bar.

    Raises:
      ValueError: another shape, numbers that are not finite, no gradient at all; a level outside 0 to 1, no decades.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> fading, lasting = 0.5 ** np.arange(40)[::-1, None], 0.99 ** np.arange(40)[::-1, None]
      >>> figure = plots.gradient_maps({"RNN": fading * np.ones(3), "LSTM": lasting * np.ones(3)}, figure=Figure())
      >>> [axes.get_title(loc="left") for axes in figure.axes[:2]]
      ['RNN: above 1 % of its largest in the last 7 of 40 steps', 'LSTM: above 1 % of its largest in all 40 steps']
    """
    if not 0 < level < 1 or not 0 < decades < math.inf:
        raise ValueError(
            f"`gradient_maps(level={level}, decades={decades})`: expected 0 < level < 1 and decades above 0."
        )
    found = {}
    for name, one in named("gradient_maps", gradients).items():
        sizes = np.abs(finite("gradient_maps", one, 2, "(T, H), one sequence, by the name of the network"))
        if not sizes.any():
            raise ValueError(f"`gradient_maps({name!r})`: the gradient is 0 at every step.")
        found[name] = sizes / sizes.max()
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(9.0, 0.8 + 1.9 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), squeeze=False)[:, 0]
    mesh: Any = None
    for ax, (name, sizes) in zip(panels, found.items(), strict=True):
        steps = len(sizes)
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log10(sizes), -decades)
        mesh = time_by_unit(ax, logs, first, vmin=-decades, vmax=0, cmap=PALE)
        norms = np.linalg.norm(sizes, axis=-1)
        begin = int(np.argmax(norms >= level * norms.max()))
        reach = f"the last {steps - begin} of {steps}" if begin else f"all {steps}"
        ax.set_title(f"{name}: above {100 * level:g} % of its largest in {reach} steps", loc="left", fontsize="medium")
        if begin:
            ax.axvline(first + begin - 0.5, color=OKABE_ITO["vermillion"], linewidth=1.8)
        ax.set_ylabel("unit")
    panels[-1].set_xlabel("step t")
    bar = figure.colorbar(mesh, ax=list(panels), ticks=range(-math.floor(decades), 1), aspect=30)
    bar.ax.set_yticklabels([f"$10^{{{power}}}$" for power in range(-math.floor(decades), 0)] + ["1"])
    bar.set_label(r"$|dL/dh_t|$ over its largest")
    return figure


def weight_gradient_bars(parameters: Any, *, share: float = 0.99, first: int = 1, ax: Axes | None = None) -> Axes:
    """Plots the contribution of every step to the gradient of the weights, and the step at which it is spent.

    bars:  ||g_t||_2,   dL/dtheta = g_1 + ... + g_T
    spent: at the first t with ||g_1 + ... + g_t|| > (1 - share) ||dL/dtheta||, counted back from the end

    Args:
      parameters: arrays (T, ...), `gradients_over_time(...).parameters` or a part of them; with `norms` the sums
        are those of norms.
      share: the share of the whole, above 0 and below 1.
      first: the number of the first step.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: arrays of different T, numbers that are not finite, no gradient at all; a share outside 0 to 1.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.weight_gradient_bars(np.array([[1e-9], [1e-3], [1.0]]), ax=Figure().subplots())
      >>> ax.get_legend().get_texts()[0].get_text()
      '99 % of it is spent by step 3, counted from the end'
    """
    if not 0 < share < 1:
        raise ValueError(f"`weight_gradient_bars(share={share})`: expected more than 0 and less than 1.")
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(parameters)]
    if not leaves or any(a.ndim < 1 or len(a) != len(leaves[0]) for a in leaves):
        raise ValueError(
            f"`weight_gradient_bars(<{', '.join(str(a.shape) for a in leaves)}>)`: expected arrays (T, ...), one entry "
            "for each step, as in `gradients_over_time(...).parameters`."
        )
    values = np.concatenate([a.reshape(len(a), -1) for a in leaves], -1)
    values = finite("weight_gradient_bars", values, 2, "arrays (T, ...) with at least one step")
    norms, before = np.linalg.norm(values, axis=-1), np.linalg.norm(np.cumsum(values, 0), axis=-1)
    if not before[-1]:
        raise ValueError("`weight_gradient_bars(...)`: the contributions add up to 0.")
    spent = int(np.argmax(before > (1 - share) * before[-1]))
    ax, steps = new_axes(ax), np.arange(len(norms)) + first
    ax.bar(steps, norms, width=0.85, color=COLOURS[0], zorder=2.5)
    ax.axvline(
        steps[spent] - 0.5, color=COLOURS[1], linewidth=1.8, linestyle=(0, (6, 2)),
        label=f"{100 * share:.3g} % of it is spent by step {steps[spent]}, counted from the end",
    )  # fmt: skip
    ax = finish(ax, "step t", r"$\|g_t\|_2$, what step t adds to $dL/d\theta$", legend=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    return ax


def saliency(gradients: Any, *, share: float = 0.9, first: int = 1, ax: Axes | None = None) -> Axes:
    """Plots the size of the gradient at each input, and how many of the last inputs hold most of it.

    log10 ||dL/dx_t||_2 against t; shaded, the last `effective_window(gradients, share)` steps

    Args:
      gradients: (T, D), one sequence of `gradients_over_time(...).inputs`.
      share: the share of the sum of squares that the window holds.
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
    values = finite("saliency", gradients, 2, "(T, D), the gradients at the inputs of one sequence")
    # Scaled to size 1 first: without x64 numbers of 1e-60 would become 0.
    window = int(effective_window(jnp.asarray(values / (np.abs(values).max() or 1.0)), share))
    size = np.abs(values).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        # Divided by the largest entry first: squares of 1e-200 are 0.
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
