"""The common style of all plots: colours and lines that differ in greyscale too, a floor for -inf, checks of input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap, SymLogNorm

OKABE_ITO = {
    "blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73", "purple": "#CC79A7", "orange": "#E69F00",
    "sky": "#56B4E9", "black": "#000000", "yellow": "#F0E442",
}  # fmt: skip
"""A palette safe for colour blindness (Okabe and Ito 2008), the strongest on white first."""
# Yellow is for areas only: a line would be lost on white.
COLOURS = tuple(OKABE_ITO[name] for name in OKABE_ITO if name != "yellow")
DASHES: tuple[Any, ...] = (
    "-", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.5)), (0, (8, 2, 1, 2, 1, 2)), (0, (3, 2)), (0, (12, 2)),
)  # fmt: skip
MARKERS = "os^DvPX"
HATCHES = ("", "////", "....", "\\\\\\\\", "xx", "++", "oo", "--")
AREAS = tuple(OKABE_ITO[name] for name in ("blue", "orange", "sky", "vermillion", "yellow", "green", "purple"))
"""For adjacent areas: neighbours differ in lightness."""
GUIDE: dict[str, Any] = {"color": "0.35", "linewidth": 0.9, "zorder": 1}
"""For lines that are not data: thresholds, zeros, floors."""
FLOOR = "exactly 0: log is \N{MINUS SIGN}\N{INFINITY}"
LOST = "\N{MINUS SIGN}\N{INFINITY}: nothing is left"
DECADES = 8
"""Decades below the largest entry at which the colours of signed data become linear."""
SHADES = "cividis"
"""From dark blue to light yellow, uniform in lightness, so that it works in greyscale."""


def new_axes(ax: Axes | None, size: tuple[float, float] = (7.2, 4.0)) -> Axes:
    """The axes given, or those of a new pyplot figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # chooses a backend, so only if needed

    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax


def line(i: int, points: int = 1, marked: bool = True) -> dict[str, Any]:
    """The look of the i-th curve, of so many points; after seven, colours repeat with another dash."""
    turn, place = divmod(i, len(COLOURS))
    look: dict[str, Any] = {
        "color": COLOURS[place], "linestyle": DASHES[(place + turn) % len(DASHES)], "linewidth": 1.6, "zorder": 2.5,
    }  # fmt: skip
    if marked:
        every = max(1, points // 7)
        # Markers of different curves at different points.
        look |= {"marker": MARKERS[(place + turn) % len(MARKERS)], "markersize": 4.5,
                 "markevery": (i * every // 3 % every, every)}  # fmt: skip
    return look


def points(i: int, size: float = 28.0) -> dict[str, Any]:
    """The look of the i-th set of points; every other one is hollow."""
    colour = COLOURS[i % len(COLOURS)]
    return {
        "s": size, "marker": MARKERS[i % len(MARKERS)], "facecolors": "none" if i % 2 else colour,
        "edgecolors": colour, "linewidths": 1.0, "zorder": 2.5,
    }  # fmt: skip


def area(i: int) -> dict[str, Any]:
    """The look of the i-th area, with its hatch."""
    return {"facecolor": AREAS[i % len(AREAS)], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "0.2"}


def heat(ax: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, **look: Any) -> QuadMesh:
    """A map of values (N, M) at the N centres x and the M centres y, without a grid."""
    ax.grid(False)
    return ax.pcolormesh(edges(x), edges(y), values.T, rasterized=True, **look)


def time_by_unit(ax: Axes, values: np.ndarray, first: int, **look: Any) -> QuadMesh:
    """`heat` of values (T, H), the first of them at step `first`."""
    steps, units = values.shape
    return heat(ax, np.arange(steps, dtype=float) + first, np.arange(units, dtype=float), values, **look)


def signed_map(ax: Axes, values: np.ndarray, first: int, top: float, label: str) -> None:
    """`time_by_unit` in colours of the signed logarithm up to `top`, linear in its lowest part, with its colour bar."""
    # Numbers near the limits of the range would overflow inside the colour map.
    scale = 10.0 ** math.floor(math.log10(top)) if not 1e-250 < top < 1e250 else 1.0
    top = top / scale
    linear = top * 10.0**-DECADES
    norm = SymLogNorm(linthresh=linear, linscale=0.5, vmin=-top, vmax=top, base=10)
    mesh = time_by_unit(ax, values / scale, first, norm=norm, cmap=diverging_map())
    # 0 and at most four powers of ten on either side.
    high, low = math.floor(math.log10(top) + 1e-9), math.ceil(math.log10(linear) - 1e-9)
    powers = [10.0**p for p in range(high, low - 1, -max(1, math.ceil((high - low + 1) / 4)))]
    bar = ax.figure.colorbar(mesh, ax=ax, ticks=[-p for p in powers] + [0.0] + powers[::-1])
    bar.set_label(label if scale == 1 else f"{label} / {scale:.0e}")


def shades(count: int) -> list[Any]:
    """Colours from dark to light, all of them visible on white."""
    return [shade_map()(x) for x in np.linspace(0.0, 0.88, count)]


def shade_map() -> Colormap:
    """The colour map of all heat maps."""
    return matplotlib.colormaps[SHADES]


def diverging_map() -> Colormap:
    """For signed data: blue, grey at 0, orange; from dark to light, so that greyscale keeps the sign."""
    colours = ["#06224d", "#2f66a8", "#8f8f8f", "#f0a040", "#fff4c2"]
    return LinearSegmentedColormap.from_list("blue_grey_orange", colours)


def numbers(call: str, value: Any, ndim: int, expected: str) -> np.ndarray:
    """The value as a float64 array with `ndim` axes, not empty, without NaN and +inf; -inf is allowed."""
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise TypeError("complex numbers")
        array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{call}(<{type(value).__name__}>)`: expected {expected}; {error}.") from error
    if array.ndim != ndim or not array.size:
        raise ValueError(f"`{call}(<{array.shape}>)`: expected {expected}.{_hint(array.ndim, ndim)}")
    if not np.all(array < np.inf):
        raise ValueError(
            f"`{call}(<{array.shape}>)`: NaN or +inf among the numbers; expected finite numbers, or -inf for the "
            "logarithm of 0."
        )
    return array


def finite(call: str, value: Any, ndim: int, expected: str, what: str = "gradients") -> np.ndarray:
    """`numbers` without -inf."""
    array = numbers(call, value, ndim, expected)
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{call}(<{array.shape}>)`: -inf among the numbers; expected {what}, not their logarithms.")
    return array


def _hint(got: int, wanted: int) -> str:
    if got > wanted:
        return " Pick one sequence of a batch, a[0], or average over it first."
    return " One curve has a batch axis of 1: a[None]." if got == wanted - 1 else ""


def named(call: str, value: Any, default: str = "") -> dict[str, Any]:
    """A mapping as it is, a sequence with indices for names, anything else under the name `default`."""
    if isinstance(value, Mapping):
        items = {str(name): item for name, item in value.items()}
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields") and not _plain(value):
        items = {str(i): item for i, item in enumerate(value)}
    else:
        items = {default: value}
    if not items:
        raise ValueError(f"`{call}`: nothing to draw; expected at least one entry.")
    return items


def _plain(value: Sequence[Any]) -> bool:
    """Whether a list holds numbers, and so is a single item."""
    return bool(value) and all(isinstance(item, int | float) for item in value)


def floored(ax: Axes, groups: Sequence[np.ndarray], label: str = FLOOR) -> list[np.ndarray]:
    """The groups with -inf moved to a labelled line below all finite values."""
    finite = np.concatenate([a[np.isfinite(a)].ravel() for a in groups])
    if all(np.all(np.isfinite(a)) for a in groups):
        return list(groups)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    span = max(high - low, 1.0)
    floor = low - 0.12 * span
    ax.axhline(floor, linestyle=(0, (1, 2)), **GUIDE)
    # Below the line, where there are no data.
    ax.annotate(
        label, (0.01, floor), (0, -3), xycoords=("axes fraction", "data"), textcoords="offset points", va="top",
        fontsize="small", color=GUIDE["color"],
    )  # fmt: skip
    ax.set_ylim(floor - 0.12 * span, high + 0.06 * span)
    return [np.where(np.isneginf(a), floor, a) for a in groups]


def finish(ax: Axes, x: str, y: str, title: str | None = None, legend: bool = True) -> Axes:
    """Labels, a faint grid, and a legend beside the axes, where it covers no data."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if title:
        ax.set_title(title, fontsize="medium")
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    if legend and ax.get_legend_handles_labels()[1]:
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, handlelength=3.2)
    return ax


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders halfway between increasing numbers, N + 1 for N."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def increasing(call: str, name: str, values: Any) -> np.ndarray:
    """(N,) strictly increasing, as float64."""
    array = numbers(f"{call}({name}=...)", values, 1, "numbers (N,)")
    if np.any(np.diff(array) <= 0) or not np.all(np.isfinite(array)):
        raise ValueError(f"`{call}({name}=...)`: expected finite, increasing numbers; sort them first.")
    return array
