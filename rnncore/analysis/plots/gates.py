"""Plots of the gates: shares of the paths, saturation, time scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnncore.analysis.plots.style import GUIDE, area, finish, finite, named, new_axes, numbers, points


def path_shares(shares: Any, *, first: int = 1, ax: Axes | None = None) -> Axes:
    """Plots the share of each path at every step, stacked; negative shares are stacked downwards from 0.

    Args:
      shares: a mapping from the names of paths to (S,) or (*batch, S), as `path_shares` of `rnncore.analysis`
        returns it by "inner", "adjoint" or "norm_ratio"; for a batch the mean is drawn.
      first: the number of the first step.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes, with a hatched area for each path and a line for their sum.

    Raises:
      ValueError: anything but such a mapping (draw the result by "ablation" with `plots.retention`), different
        lengths, numbers that are not finite.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> shares = {"direct": np.array([0.9, 1.2]), "via_f": np.array([0.1, -0.2])}
      >>> ax = plots.path_shares(shares, ax=Figure().subplots())
      >>> ax.lines[-1].get_ydata().tolist()
      [1.0, 1.0]
    """
    if not isinstance(shares, Mapping) or not shares:
        raise ValueError(
            f"`path_shares(<{type(shares).__name__}>)`: expected a mapping from the names of paths to shares, as "
            "`rnncore.analysis.path_shares` returns it; ablated retention goes to `plots.retention`."
        )
    rows, averaged = {}, False
    for name, value in shares.items():
        array = np.asarray(value)
        averaged |= array.ndim > 1
        array = array.reshape(-1, array.shape[-1]) if array.ndim and array.size else array
        expected = f"shares (S,) or (*batch, S) for {name!r}"
        rows[str(name)] = finite("path_shares", array, 2, expected, "shares").mean(0)
    lengths = {name: len(a) for name, a in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"`path_shares`: expected the same number of steps for every path, got {lengths}.")
    ax = new_axes(ax)
    steps = np.arange(next(iter(lengths.values()))) + first
    up = np.zeros(len(steps))
    down = np.zeros(len(steps))
    for i, (name, row) in enumerate(rows.items()):
        # One polygon for each sign, 0 where the share has the other.
        for sign, base, label in ((1, up, name), (-1, down, None)):
            part = np.where(sign * row > 0, row, 0.0)
            if label is None and not part.any():
                continue
            ax.fill_between(*_steps(steps, base, base + part), linewidth=0.3, label=label, **area(i))
            base += part
    ax.axhline(0.0, **GUIDE)
    ax.plot(steps, sum(rows.values()), color="black", linewidth=1.6, linestyle=(0, (4, 2)), label="sum")
    ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    return finish(ax, "step t", "share of the step's Jacobian" + (", mean of the batch" if averaged else ""))


def _steps(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners of bars without gaps."""
    corners = np.concatenate([x - 0.5, x + 0.5]).reshape(2, -1).T.ravel()
    return corners, np.repeat(low, 2), np.repeat(high, 2)


def gate_saturation(statistics: Any, *, ax: Axes | None = None) -> Axes:
    """Plots how often each unit of each gate is left-saturated (shut) and right-saturated (open).

    A point near the lower right corner is a unit whose gate is always shut, near the upper left always open,
    near the origin neither; no point lies above the diagonal.

    Args:
      statistics: a mapping from gates to what `gate_statistics` returns for them, with `.unit.left` and
        `.unit.right` (H,); or to pairs (left, right) of (H,).
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes, one point set for each gate.

    Raises:
      ValueError: anything but such a mapping, fractions outside 0 to 1.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.gate_saturation({"f": (np.array([0.0, 0.1]), np.array([0.9, 0.5]))}, ax=Figure().subplots())
      >>> ax.collections[0].get_offsets().tolist()
      [[0.0, 0.9], [0.1, 0.5]]

    Source: Karpathy, Johnson and Fei-Fei (2015), arXiv:1506.02078, figure 3.
    """
    if not isinstance(statistics, Mapping) or not statistics:
        raise ValueError(
            f"`gate_saturation(<{type(statistics).__name__}>)`: expected a mapping from gates to statistics, as "
            "`gate_statistics(traj)` returns it."
        )
    found = {}
    for name, one in statistics.items():
        pair = (one.unit.left, one.unit.right) if hasattr(one, "unit") else tuple(one)
        if len(pair) != 2:
            raise ValueError(f"`gate_saturation`: expected (left, right) for gate {name!r}, got {len(pair)} things.")
        left, right = (numbers("gate_saturation", a, 1, f"fractions (H,) for gate {name!r}") for a in pair)
        both = np.concatenate([left, right])
        if len(left) != len(right) or np.any(both < 0) or np.any(both > 1):
            raise ValueError(
                f"`gate_saturation`: expected as many fractions from 0 to 1, left and right, for {name!r}."
            )
        found[str(name)] = (left, right)
    ax = new_axes(ax, (7.2, 4.6))
    ax.plot([0, 1], [1, 0], linestyle="--", label="always saturated", **GUIDE)
    for i, (name, (left, right)) in enumerate(found.items()):
        ax.scatter(left, right, alpha=0.8, label=f"gate {name}", clip_on=False, **points(i))
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    return finish(ax, "fraction of steps left-saturated", "fraction of steps right-saturated")


def timescale_histogram(timescales: Any, *, bins: int = 30, ax: Axes | None = None) -> Axes:
    """Plots a histogram of the time scales of forget gates, on a logarithmic axis.

    Args:
      timescales: steps, of any shape, as `timescales` returns them; or a mapping from labels to such arrays.
      bins: their number, of equal width in the logarithm, over all values that are finite and above 0.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.  Time scales of 0 (a gate of exactly 0) and infinity (exactly 1) have separate, labelled bars at the
      ends.

    Raises:
      ValueError: negative time scales or NaN, no values, fewer than 1 bin.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.timescale_histogram(np.array([1.0, 10.0, 100.0, np.inf]), bins=2, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.texts]
      ['∞']
    """
    if bins < 1:
        raise ValueError(f"`timescale_histogram(bins={bins})`: expected at least 1.")
    groups = {}
    for name, value in named("timescale_histogram", timescales).items():
        array = np.asarray(value)
        if not array.size or array.dtype.kind in "cbOSU" or not np.all(array.astype(np.float64) >= 0):
            raise ValueError(
                f"`timescale_histogram(<{array.dtype} {array.shape}>)`: expected steps of at least 0, as "
                "`timescales(traj.gates.f)` returns them, at least one and none of them NaN."
            )
        groups[name] = array.astype(np.float64).ravel()
    everything = np.concatenate(list(groups.values()))
    inside = everything[(everything > 0) & np.isfinite(everything)]
    low, high = (inside.min(), inside.max()) if inside.size else (1.0, 10.0)
    if low == high:
        low, high = low / 2, high * 2
    borders = np.geomspace(low, high, bins + 1)
    borders[[0, -1]] = low, high  # to the last digit: nothing falls out
    ratio = max(borders[1] / borders[0], (high / low) ** 0.04)
    ax = new_axes(ax)
    for i, (name, values) in enumerate(groups.items()):
        look = area(i) | {"linewidth": 0.5, "alpha": 1.0 if len(groups) == 1 else 0.6}
        ends = (("0", low / ratio**2, np.sum(values == 0)), ("\N{INFINITY}", high * ratio, np.sum(np.isinf(values))))
        counts, _ = np.histogram(values[(values > 0) & np.isfinite(values)], borders)
        ax.bar(borders[:-1], counts / len(values), np.diff(borders), align="edge", label=name or None, **look)
        for mark, left, count in ends:
            if count:
                share = float(count / len(values))
                ax.bar(left, share, left * (ratio - 1), align="edge", **look)
                ax.annotate(
                    mark, (left * ratio**0.5, share), (0, 2), textcoords="offset points", ha="center", va="bottom"
                )
    ax.set_xscale("log")
    return finish(ax, "time scale (steps)", "fraction of units and steps")
