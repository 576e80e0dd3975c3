"""Retention against lag and against training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnncore.analysis.plots.style import finish, floored, heat, increasing, line, named, new_axes, numbers, shade_map

BOUNDS = ("bound", "a_priori_bound")
AVERAGES = ("mean_log", "log_mean")
LN10 = math.log(10.0)


def retention(
    curves: Any, *, bound: Any = None, fit: Any = None, average: str = "mean_log", ax: Axes | None = None
) -> Axes:
    """Plots how much of a gradient is left against the lag, for curves of any kinds and paths.

    Args:
      curves: what `retention_curve` returns; a sequence of such curves, labelled by kind and path; a mapping from
        labels to them; or the result of `path_shares(by="ablation")` of `rnncore.analysis`.
      bound: another curve, drawn thin and black, as those of kind "bound" and "a_priori_bound" always are.
      fit: what `RetentionCurve.fit` returns, one of its two lines, or a sequence or mapping of these; drawn in grey
        over its window.
      average: over the batch, "mean_log" (a typical sequence) or "log_mean" (dominated by the few largest).
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes; the curves come first among its lines, the quartiles of a batch are shaded.  -inf lies on a labelled
      floor.

    Raises:
      ValueError: anything but curves and fits, unknown average, NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import RetentionCurve, plots
      >>> lags = jnp.arange(11)
      >>> curve = RetentionCurve(lags, -0.1 * lags, "rms", "state", "end", "", 1, "float32")
      >>> ax = plots.retention(curve, fit=curve.fit(), ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['rms, state', 'exp(-0.1 k)']
    """
    if average not in AVERAGES:
        raise ValueError(f"`retention(average={average!r})`: expected 'mean_log' or 'log_mean'.")
    drawn = [(name, *_curve(one, average)) for name, one in _labelled(curves).items()]
    bounds = [] if bound is None else [(name, *_curve(one, average)) for name, one in _labelled(bound).items()]
    fits = [] if fit is None else [_fit(name, one) for name, one in _fits(fit)]
    ax = new_axes(ax)
    logs = floored(ax, [one[2] for one in drawn + bounds])
    for i, ((name, lags, _, kind), examples) in enumerate(zip(drawn + bounds, logs, strict=True)):
        is_bound = kind in BOUNDS or i >= len(drawn)
        look = line(i, len(lags))
        if is_bound:
            look = {"color": "black", "linewidth": 1.0, "linestyle": "-." if kind == "a_priori_bound" else (0, (5, 4))}
        # The last row is the mean, the others are single sequences.
        ax.plot(lags, examples[-1], label=name, **look)
        if not is_bound and len(examples) > 2:
            low, high = np.quantile(examples[:-1], (0.25, 0.75), axis=0, method="nearest")
            ax.fill_between(lags, low, high, color=look["color"], alpha=0.15, linewidth=0)
    for i, (name, one) in enumerate(fits):
        lags = np.linspace(one.window[0], one.window[1], 200)
        dash = ("-", (0, (1, 1)), (0, (4, 1)))[i % 3]
        label = f"{name}: {_law(one)}" if name else _law(one)
        ax.plot(
            lags, one.log_retention(lags) / LN10, color="0.45", linewidth=2.8, alpha=0.7, linestyle=dash, zorder=2.2,
            label=label,
        )  # fmt: skip
    return finish(ax, "lag k (steps)", r"$\log_{10}$ retention")


def _labelled(curves: Any) -> dict[str, Any]:
    if hasattr(curves, "full") and hasattr(curves, "without"):  # ablated retention holds log10
        parts = {"all paths": curves.full} | {f"without {name}": a for name, a in curves.without.items()}
        return {name: (curves.lags, np.asarray(a, np.float64) * LN10) for name, a in parts.items()}
    items = named("retention", curves)
    if isinstance(curves, Mapping):
        return items
    labelled: dict[str, Any] = {}
    for i, one in enumerate(items.values()):
        name = f"{getattr(one, 'kind', '?')}, {getattr(one, 'path', '?')}".replace("_", " ")
        labelled[f"{name} ({i + 1})" if name in labelled else name] = one
    return labelled


def _curve(one: Any, average: str) -> tuple[np.ndarray, np.ndarray, str]:
    """(lags, the sequences and then their mean (B + 1, L), kind)."""
    if isinstance(one, tuple) and len(one) == 2:
        lags, logs = one
        logs = logs.reshape(-1, logs.shape[-1])
        rows, kind = np.concatenate([logs, logs.mean(0, keepdims=True)]), "rms"
    elif hasattr(one, "log_retention") and hasattr(one, average):
        lags, kind = one.lags, one.kind
        logs = np.asarray(one.log_retention, np.float64)
        logs = logs.reshape(-1, logs.shape[-1])
        if getattr(one, "without_gradient", None) is not None:
            logs = logs[~np.asarray(one.without_gradient).reshape(-1)]
        rows = np.concatenate([logs, np.asarray(getattr(one, average)(), np.float64)[None]])
    else:
        raise ValueError(
            f"`retention(<{type(one).__name__}>)`: expected a `RetentionCurve`, as `retention_curve(traj)` returns it, "
            "a sequence of them, or a mapping from labels to them."
        )
    return increasing("retention", "lags", lags), numbers("retention", rows / LN10, 2, "retention (*batch, L)"), kind


def _fits(fit: Any) -> list[tuple[str, Any]]:
    """Fits with their names, "" without."""
    return [(name if isinstance(fit, Mapping) else "", one) for name, one in named("retention(fit=...)", fit).items()]


def _fit(name: str, fit: Any) -> tuple[str, Any]:
    one = getattr(fit, "chosen", fit)
    if not hasattr(one, "window") or not hasattr(one, "log_retention"):
        raise ValueError(
            f"`retention(fit=<{type(fit).__name__}>)`: expected what `curve.fit()` returns, or its `.exponential` or "
            "`.power`; a `DecayRate` has a slope but no offset."
        )
    return name, one


def _law(fit: Any) -> str:
    return f"exp({-fit.rate:.3g} k)" if fit.model == "exponential" else rf"$(k+1)^{{{-fit.rate:.3g}}}$"


def retention_over_training(steps: Any, lags: Any, log10: Any, *, ax: Axes | None = None) -> Axes:
    """Plots how retention changes in training: a map of training step against lag, dark for little.

    Args:
      steps: (S,) training steps, increasing.
      lags: (L,) increasing.
      log10: (S, L), log10 of the retention at every training step and lag.
      ax: axes to draw into; None makes a new figure.

    Returns:
      The axes.  -inf is hatched, with a label.

    Raises:
      ValueError: shapes that do not match, NaN.

    Example:
      >>> import numpy as np
      >>> from matplotlib.figure import Figure
      >>> from rnncore.analysis import plots
      >>> logs = np.array([[0.0, -1.0, -2.0], [0.0, -0.1, -0.2]])
      >>> ax = plots.retention_over_training([0, 500], [0, 10, 20], logs, ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('training step', 'lag k (steps)')
    """
    call = "retention_over_training"
    steps, lags = increasing(call, "steps", steps), increasing(call, "lags", lags)
    logs = numbers(call, log10, 2, "log10 of retention (S, L)")
    if logs.shape != (len(steps), len(lags)):
        raise ValueError(
            f"`{call}(log10=<{logs.shape}>)`: expected (S, L) = {(len(steps), len(lags))}, a row for each training "
            "step."
        )
    ax = new_axes(ax)
    lost = np.isneginf(logs)
    low, high = (logs[~lost].min(), logs[~lost].max()) if not lost.all() else (-1.0, 0.0)
    ax.patch.set(hatch="////", edgecolor="0.5")  # seen where nothing is drawn above it
    shown_logs, top = np.ma.masked_where(lost, logs), high if high > low else low + 1.0
    mesh = heat(ax, steps, lags, shown_logs, cmap=shade_map(), vmin=low, vmax=top)
    text = r"$\log_{10}$ retention" + (" (hatched: exactly 0)" if lost.any() else "")
    ax.figure.colorbar(mesh, ax=ax).set_label(text)
    ax = finish(ax, "training step", "lag k (steps)")
    ax.grid(False)
    return ax
