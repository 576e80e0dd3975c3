"""Plots of singular values, eigenvalues and Lyapunov exponents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnncore.analysis.plots.style import (
    GUIDE,
    LOST,
    finish,
    floored,
    increasing,
    line,
    named,
    new_axes,
    numbers,
    points,
    shades,
)


def singular_fan(log_singular_values: Any, lags: Any, *, ax: Axes | None = None) -> Axes:
    """Plots all singular values of the product of k step Jacobians against k.

    Args:
      log_singular_values: (L, n) natural logarithms, largest first, one row per lag from `singular_spectrum`.
      lags: (L,) increasing.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes, with a line for each of the n values, in log10, dark for the largest.  -inf lies on a labelled floor.

    Raises:
      ValueError: other shapes, lags that do not increase, NaN.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> lags = np.array([1, 10, 20])
      >>> logs = np.log(10.0) * lags[:, None] * np.array([0.0, -0.1, -1.0])
      >>> ax = plots.singular_fan(logs, lags, ax=Figure().subplots())
      >>> ax.lines[2].get_ydata().tolist()
      [-1.0, -10.0, -20.0]
    """
    logs = numbers("singular_fan", log_singular_values, 2, "natural logarithms (L, n), one row for each lag")
    lags = increasing("singular_fan", "lags", lags)
    if len(lags) != len(logs):
        raise ValueError(
            f"`singular_fan(<{logs.shape}>, lags=<{lags.shape}>)`: expected one row for each lag; stack "
            "`singular_spectrum(traj, lag)` over the lags."
        )
    ax = new_axes(ax)
    (values,) = floored(ax, [logs / math.log(10.0)])
    n = values.shape[-1]
    for i, (column, colour) in enumerate(zip(values.T, shades(n), strict=True)):
        outer = i in (0, n - 1)
        name = rf"$\sigma_{{{i + 1}}}$" if outer or i == n // 2 else None
        ends: dict[str, Any] = {"linewidth": 2.0, "marker": "o", "markersize": 3.5, "zorder": 3} if outer else {}
        if i == n - 1 and n > 1:
            ends |= {"linestyle": "--", "marker": "s"}
        ax.plot(lags, column, color=colour, label=name, **({"linewidth": 0.8, "zorder": 2.5} | ends))
    return finish(ax, "lag k (steps)", r"$\log_{10}\,\sigma_i(P_k)$")


def eigenvalues(eigs: Any, *, labels: Any = None, ax: Axes | None = None) -> Axes:
    """Plots eigenvalues of step Jacobians in the complex plane, with the unit circle.

    Inside of the circle a direction fades, outside of it it grows, on it it stays.

    Args:
      eigs: (n,) complex, as `jacobian_eigenvalues` returns it for one sequence; several as (S, n), or a mapping
        from labels, such as the steps t, to (n,).
      labels: S names for (S, n).
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes, one point set for each step.

    Raises:
      ValueError: another shape, numbers that are not finite, a wrong number of labels.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.eigenvalues({"t = 1": np.array([0.5j, -0.5j])}, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['unit circle', 't = 1']
    """
    sets = eigs if isinstance(eigs, Mapping) else _rows(eigs, labels)
    chosen = {str(name): np.asarray(a) for name, a in sets.items()}
    for name, a in chosen.items():
        if a.ndim != 1 or not a.size or a.dtype.kind not in "fciu" or not np.all(np.isfinite(a)):
            raise ValueError(
                f"`eigenvalues(<{a.dtype} {a.shape}> at {name!r})`: expected finite numbers (n,), (S, n), or a mapping "
                "from labels to (n,); pick one sequence of a batch, a[0]."
            )
    ax = new_axes(ax, (6.0, 4.6))
    turn = np.linspace(0, 2 * np.pi, 361)
    ax.plot(np.cos(turn), np.sin(turn), label="unit circle", **GUIDE)
    for i, (name, a) in enumerate(chosen.items()):
        ax.scatter(a.real, a.imag, label=name or None, **points(i))
    ax.set_aspect("equal", adjustable="datalim")
    return finish(ax, r"Re $\lambda(J_t)$", r"Im $\lambda(J_t)$")


def _rows(eigs: Any, labels: Any) -> dict[str, np.ndarray]:
    array = np.asarray(eigs)
    if array.ndim < 2:
        array = array[None]
    names = [f"{i + 1}" if len(array) > 1 else "" for i in range(len(array))] if labels is None else list(labels)
    if len(names) != len(array):
        raise ValueError(f"`eigenvalues(labels=<{len(names)}>)`: expected {len(array)} of them, one for each row.")
    return dict(zip(map(str, names), array, strict=True))


def lyapunov(result: Any, *, ax: Axes | None = None) -> Axes:
    """Plots the Lyapunov spectrum: exponent i against i / n.

    Args:
      result: what `lyapunov_exponents` returns; or all n exponents as (n,) or (B, n); or a mapping from labels
        to any of these.  Of a batch the mean is drawn, and a band from the smallest to the largest; of one
        sequence the standard error where it is known.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.  -inf lies on a labelled floor.

    Raises:
      ValueError: another shape, NaN.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> ax = plots.lyapunov(np.array([0.1, -0.5, -2.0, -np.inf]), ax=Figure().subplots())
      >>> ax.lines[-1].get_xdata().tolist()
      [0.25, 0.5, 0.75, 1.0]
    """
    spectra = {}
    for name, one in named("lyapunov", result).items():
        values = np.asarray(getattr(one, "exponents", one))
        values = numbers("lyapunov", _merged(values, 1), 2, "a `LyapunovResult`, or exponents (n,) or (B, n)")
        n = one.n if hasattr(one, "exponents") else values.shape[-1]
        spectra[name] = (values, n, getattr(one, "standard_error", None))
    ax = new_axes(ax)
    lows = floored(ax, [values for values, _, _ in spectra.values()], LOST)
    ax.axhline(0.0, **GUIDE)
    for i, (name, values) in enumerate(zip(spectra, lows, strict=True)):
        _, n, error = spectra[name]
        x, look = (np.arange(values.shape[-1]) + 1) / n, line(i, values.shape[-1])
        if len(values) > 1:
            ax.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)
        elif error is not None:
            bars = np.asarray(error, np.float64).reshape(-1)
            bars = np.where(np.isfinite(bars), bars, 0.0)
            ax.fill_between(x, values[0] - bars, values[0] + bars, color=look["color"], alpha=0.3, linewidth=0)
        ax.plot(x, values.mean(0), label=name or None, **look)
    ax.set_xlim(0.0, 1.02)
    return finish(ax, "i / n", r"$\lambda_i$ (per step)")


def lyapunov_convergence(result: Any, *, count: int = 6, ax: Axes | None = None) -> Axes:
    """Plots how the estimates of the exponents converge with the length of the run.

    Args:
      result: what `lyapunov_exponents` returns; for a batch the mean is drawn.
      count: how many of the k exponents, evenly chosen from the largest to the smallest.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes, a line for each chosen exponent.

    Raises:
      ValueError: anything but such a result; a count below 1.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from matplotlib.figure import Figure
      >>> from rnncore import analysis
      >>> from rnncore.analysis import plots
      >>> cell = rnncore.Elman(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((20, 3)))
      >>> ax = plots.lyapunov_convergence(analysis.lyapunov_exponents(run), count=2, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['$\\\\lambda_{1}$', '$\\\\lambda_{4}$']
    """
    if not hasattr(result, "history") or not hasattr(result, "times"):
        raise ValueError(
            f"`lyapunov_convergence(<{type(result).__name__}>)`: expected what `lyapunov_exponents` returns, "
            "which knows how it came about."
        )
    if count < 1:
        raise ValueError(f"`lyapunov_convergence(count={count})`: expected at least 1 exponent.")
    history = np.asarray(result.history)
    history = numbers("lyapunov_convergence", _merged(history, 2), 3, "a history (*batch, M, k)").mean(0)
    times = np.asarray(result.times)
    k = history.shape[-1]
    chosen = np.unique(np.linspace(0, k - 1, min(count, k)).round().astype(int))
    ax = new_axes(ax)
    (values,) = floored(ax, [history[:, chosen]], LOST)
    ax.axhline(0.0, **GUIDE)
    for i, index in enumerate(chosen):
        ax.plot(times, values[:, i], label=rf"$\lambda_{{{index + 1}}}$", **line(i, len(times)))
    if len(times) > 1 and times[-1] > 100 * times[0]:
        ax.set_xscale("log")
    return finish(ax, "steps", "estimate after so many steps (per step)")


def _merged(values: np.ndarray, kept: int) -> np.ndarray:
    """All axes but the last few as one."""
    return values.reshape(-1, *values.shape[values.ndim - kept :]) if values.ndim >= kept else values
