"""Statistics of the gates along a trajectory, and the time scales of a forget gate."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.trajectory import Trajectory, check_trajectory
from rnncore.cells.elman import Elman
from rnncore.cells.gru import GRU
from rnncore.cells.gru_reset_before import ResetBeforeGRU
from rnncore.cells.lstm import LSTM
from rnncore.cells.mgu import MGU

SATURATED = (0.1, 0.9)
"""A gate below the first counts as left-saturated, above the second as right-saturated."""
CANDIDATES: tuple[tuple[type, str], ...] = ((LSTM, "g"), (GRU, "n"), (MGU, "n"), (ResetBeforeGRU, "n"), (Elman, "h"))
"""Entries among a cell's gates that are candidates with values from -1 to 1."""
KINDS = ("lin", "exp", "half_life")


class GateSummary(NamedTuple):
    """Moments of one gate.

    Fields:
      mean: (...).
      quantiles: (Q, ...), in the order of the request.
      left, right: (...), the fractions of all values below the lower and above the upper threshold.
    """

    mean: Array
    quantiles: Array
    left: Array
    right: Array

    def __repr__(self) -> str:
        return shown(self)


class GateStatistics(NamedTuple):
    """One gate over sequences and steps.

    Fields:
      unit: `GateSummary` of arrays (H,), for each unit.
      overall: `GateSummary` of scalars, over all units.
      thresholds: (lower, upper).
    """

    unit: GateSummary
    overall: GateSummary
    thresholds: tuple[float, float]

    def __repr__(self) -> str:
        return shown(self)


def gate_statistics(
    traj: Trajectory,
    *,
    thresholds: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
) -> dict[str, GateStatistics]:
    """Mean, quantiles and saturation of every gate, over the sequences and steps of a trajectory.

    left = fraction of values < lower,   right = fraction of values > upper

    Args:
      traj: a trajectory of T steps; padding is left out.
      thresholds: (lower, upper) for all gates, or a mapping by gate for some of them; by default
        (0.1, 0.9), and (-0.9, 0.9) for the candidates g and n and for the h of an Elman network.
      quantiles: from 0 to 1.

    Returns:
      A dict by gate of `GateStatistics`.

    Raises:
      ValueError: thresholds in the wrong order or for a gate that the cell does not have; quantiles outside 0 to 1;
        a run that is all padding.
      NotImplementedError: a cell that returns its gates without names.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4, forget_bias=6.0)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.zeros((5, 3)))
      >>> statistics = analysis.gate_statistics(run)
      >>> statistics["f"].unit.right.tolist(), float(statistics["i"].overall.mean)
      ([1.0, 1.0, 1.0, 1.0], 0.5)

    Source: the saturated fractions are those of Karpathy, Johnson and Fei-Fei (2015), arXiv:1506.02078.
    """
    check_trajectory("gate_statistics", traj)
    gates = _by_name(traj)
    levels = tuple(map(float, quantiles))
    if not levels or not all(0 <= q <= 1 for q in levels):
        raise ValueError(f"`gate_statistics(quantiles={quantiles!r})`: expected numbers from 0 to 1, at least one.")
    bounds = _thresholds(traj, gates, thresholds)
    padding = traj.padding
    if padding is not None and not isinstance(padding, jax.core.Tracer) and np.all(np.asarray(padding)):
        raise ValueError("`gate_statistics(...)`: every sequence of the trajectory has length 0.")
    statistics = {}
    for name, a in gates.items():
        unit, overall = _summaries(a, padding, *bounds[name], levels)
        statistics[name] = GateStatistics(unit, overall, bounds[name])
    return statistics


def timescales(f: Array, kind: str = "lin") -> Array:
    """The time scale, in steps, of a forget gate.

    lin        1 / (1 - f)        exp        -1 / ln f        half_life        ln 2 / -ln f

    Args:
      f: gate values from 0 to 1, any shape.
      kind: as above.

    Returns:
      An array like f; inf at f = 1, and 1, 0 and 0 at f = 0.

    Raises:
      ValueError: unknown kind; integers; values that are not from 0 to 1 (outside jit).

    Example:
      >>> import jax
      >>> from rnncore import analysis
      >>> [round(float(analysis.timescales(jax.nn.sigmoid(1.0), kind)), 2) for kind in ("lin", "exp", "half_life")]
      [3.72, 3.19, 2.21]

    Source: lin, Tallec and Ollivier (2018), arXiv:1804.11188; exp, Mahto, Vo, Turek and Huth (2021), ICLR.
    """
    if kind not in KINDS:
        raise ValueError(f"`timescales(kind={kind!r})`: expected one of {', '.join(map(repr, KINDS))}.")
    f = jnp.asarray(f)
    what = f"timescales(<{f.dtype} {f.shape}>)"
    if not jnp.issubdtype(f.dtype, jnp.floating):
        raise ValueError(f"`{what}`: expected floating point; convert the gate values first.")
    if not isinstance(f, jax.core.Tracer):
        values = np.asarray(f)
        if not np.all((values >= 0) & (values <= 1)):
            raise ValueError(f"`{what}`: expected gate values from 0 to 1, as `trajectory(...).gates` holds them.")
    if kind == "lin":
        return 1 / (1 - f)
    # The absolute value: -ln 1 would be -0, and its inverse -inf.
    return (math.log(2.0) if kind == "half_life" else 1.0) / jnp.abs(jnp.log(f))


def _by_name(traj: Trajectory) -> dict[str, Array]:
    gates = traj.gates
    if hasattr(gates, "_asdict"):
        return gates._asdict()
    if isinstance(gates, Mapping) and (named := {name: a for name, a in gates.items() if name != "output"}):
        return named
    if isinstance(gates, Mapping):
        raise NotImplementedError(
            "`gate_statistics(...)`: this foreign cell has no named gates; pass gates= to `rnncore.foreign_cell`, a "
            "function of one step that returns them by name."
        )
    raise NotImplementedError(
        f"`gate_statistics(...)`: {type(traj.cell).__name__} returns its gates as a {type(gates).__name__}; "
        "return a named tuple or a dict of arrays, so that they have names."
    )


def _thresholds(traj: Trajectory, gates: dict[str, Array], given: Any) -> dict[str, tuple[float, float]]:
    """(lower, upper) by gate."""
    candidates = {name for cell, name in CANDIDATES if isinstance(traj.cell, cell)}
    bounds = {name: (-SATURATED[1], SATURATED[1]) if name in candidates else SATURATED for name in gates}
    named = given if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(gates, given)
    for name, pair in named.items():
        if name not in gates:
            raise ValueError(
                f"`gate_statistics(thresholds={given!r})`: {type(traj.cell).__name__} has no gate {name!r}, only "
                f"{', '.join(gates)}."
            )
        if len(pair) != 2 or not pair[0] <= pair[1]:
            raise ValueError(f"`gate_statistics(thresholds={given!r})`: expected (lower, upper) with lower <= upper.")
        bounds[name] = (float(pair[0]), float(pair[1]))
    return bounds


@functools.partial(jax.jit, static_argnames=("levels",))
def _summaries(
    gate: Array, padding: Array | None, lower: float, upper: float, levels: tuple[float, ...]
) -> tuple[GateSummary, GateSummary]:
    """Of every unit, and of all."""
    if padding is not None:
        gate = jnp.where(padding[..., None], jnp.nan, gate)  # ignored by the functions below
    rows = gate.reshape(-1, gate.shape[-1])

    def summary(a: Array) -> GateSummary:
        def fraction(inside: Array) -> Array:
            return jnp.nanmean(jnp.where(jnp.isnan(a), jnp.nan, inside.astype(a.dtype)), 0)

        quantiles = jnp.nanquantile(a, jnp.asarray(levels, a.dtype), 0)
        return GateSummary(jnp.nanmean(a, 0), quantiles, fraction(a < lower), fraction(a > upper))

    return summary(rows), summary(rows.reshape(-1))
