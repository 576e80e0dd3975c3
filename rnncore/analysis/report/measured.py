"""The measurements of a report for one recurrent layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore.analysis.dynamics.lyapunov import lyapunov_exponents
from rnncore.analysis.dynamics.lyapunov_result import LyapunovResult
from rnncore.analysis.paths.shares import path_shares
from rnncore.analysis.retention.curve import RetentionCurve
from rnncore.analysis.retention.measure import retention_curve
from rnncore.analysis.retention.window import effective_window
from rnncore.analysis.run._alignment import shortest
from rnncore.analysis.run.flat import flatten_carry, state_size
from rnncore.analysis.run.gate_statistics import GateStatistics, gate_statistics
from rnncore.analysis.run.model import RecurrentLayer
from rnncore.analysis.run.trajectory import Trajectory
from rnncore.cells.base import PointwiseCell

SHARE = 0.9
"""The share of the squared gradient that its reach holds."""
FEW = 4
"""The number of sequences for expensive measurements."""
ENTRIES = 2**25
"""The most entries that the matrices of all paths may have together."""


class Spread(NamedTuple):
    """The quartiles of a number over sequences.

    Fields:
      median, low, high: quartiles; inf beyond the measured range.
      sequences: the number of sequences.
    """

    median: float
    low: float
    high: float
    sequences: int

    def __str__(self) -> str:
        if not math.isfinite(self.median):
            return "none"
        if self.sequences < 2:
            return _short(self.median)
        high = _short(self.high) if math.isfinite(self.high) else "beyond"
        return f"{_short(self.median)} ({_short(self.low)} to {high})"


@dataclasses.dataclass(frozen=True, repr=False)
class LayerReport:
    """One layer of a `Report`.

    Fields:
      layer: the layer itself, with its trajectory and dL/ds_t, dL/dx_t of the loss.
      n: the number of entries of its state.
      reach: the number of last steps that hold 90 % of the squared gradient at its states, over sequences.
      half_life: steps until half of the gradient at the last state is gone within the layer, over sequences.
      rate: the rate of that decay, ln per step, fitted for each sequence.
      retention: the curve of that gradient, kind "adjoint"; "rms" if no gradient arrives at the last state.
      rms, direct, bound: other curves, of a few sequences if expensive; None if not known or too expensive.
      shares: the mean share of each path in the step Jacobian.
      gates: statistics by gate.
      exponents: the leading Lyapunov exponents.
      left_out: pairs of what was not computed and why.
    """

    layer: RecurrentLayer
    n: int
    reach: Spread | None
    half_life: Spread | None
    rate: Spread | None
    retention: RetentionCurve | None
    rms: RetentionCurve | None = None
    direct: RetentionCurve | None = None
    bound: RetentionCurve | None = None
    shares: dict[str, float] | None = None
    gates: dict[str, GateStatistics] | None = None
    exponents: LyapunovResult | None = None
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.layer.name

    @property
    def steps(self) -> int:
        """T, or the length of the shortest sequence."""
        return shortest(self.layer.run)

    @property
    def cut_off(self) -> bool:
        """Whether no gradient reaches any state."""
        states = self.layer.states
        return states is not None and not any(np.any(np.asarray(a)) for a in jax.tree.leaves(states))

    def __repr__(self) -> str:
        return f"LayerReport({self.name!r}, reach {self.reach}, half-life {self.half_life}, of {self.steps} steps)"


def measure(layer: RecurrentLayer, dense_up_to: int, exponents: int) -> LayerReport:
    """Measures one layer; what is not known for its cell is left out, with the reason."""
    run, n, left_out = layer.run, state_size(layer.run), []

    def tried(what: str, make: Any) -> Any:
        try:
            return make()
        except NotImplementedError as error:
            left_out.append((what, str(error)))
            return None

    def dense(make: Any) -> Any:
        if n > dense_up_to:
            raise NotImplementedError(f"n = {n} is above dense_up_to = {dense_up_to}")
        return make()

    steps, few = shortest(run), _few(run)
    lags = sorted({round(float(k)) for k in np.linspace(0, steps, min(steps, 100) + 1)})
    adjoint = _at_last(layer)
    curve = None
    if adjoint is not None and any(np.any(np.asarray(a)) for a in jax.tree.leaves(adjoint)):
        curve = retention_curve(run, kind="adjoint", adjoint=adjoint)
    rms = tried("retention over all directions", lambda: dense(lambda: retention_curve(few, lags=lags)))
    direct = None
    if "c" in run.fields:
        direct = tried("the path of the forget gates", lambda: retention_curve(run, path="direct", lags=lags))
    bound = tried("bound", lambda: dense(lambda: retention_curve(few, kind="bound", lags=lags)))
    shares = tried("shares of the paths", lambda: dense(lambda: _shares(run)))
    gates = tried("gates", lambda: gate_statistics(run))
    spectrum = None
    if steps >= 8 and exponents:
        burn_in = steps // 4
        spectrum = tried("exponents", lambda: lyapunov_exponents(few, min(exponents, n), burn_in=burn_in))
    main = rms if curve is None else curve
    return LayerReport(
        layer, n, _reach(layer), _half_life(main), _rate(main), main, rms, direct, bound, shares, gates, spectrum,
        tuple(left_out),
    )  # fmt: skip


def _few(run: Trajectory) -> Trajectory:
    """The first sequences."""
    count = math.prod(run.batch_shape)
    if not run.batch_shape or count <= FEW:
        return run
    return run.take(np.unravel_index(np.arange(FEW), run.batch_shape))


def _at_last(layer: RecurrentLayer) -> Any:
    """dL/ds at the last step of every sequence."""
    if layer.states is None:
        return None
    lead, lengths = len(layer.run.batch_shape), layer.run.lengths
    if lengths is None:
        return jax.tree.map(lambda a: jax.lax.index_in_dim(a, -1, lead, keepdims=False), layer.states)

    def pick(a: Any) -> Any:
        index = lengths.reshape(*lengths.shape, *(1,) * (a.ndim - lead))
        return jnp.take_along_axis(a, index, lead)[(slice(None),) * lead + (0,)]

    return jax.tree.map(pick, layer.states)


def _reach(layer: RecurrentLayer) -> Spread | None:
    if layer.states is None:
        return None
    run = layer.run
    flat = flatten_carry(layer.states, len(run.batch_shape) + 1)[..., 1:, :]
    late = 0 if run.lengths is None else run.steps - np.asarray(run.lengths)
    windows = np.asarray(effective_window(flat, SHARE)) - late
    some = np.any(np.asarray(flat), (-2, -1))
    return _spread(np.maximum(windows, 0)[some]) if some.any() else None


def _half_life(curve: RetentionCurve | None) -> Spread | None:
    if curve is None:
        return None
    return _spread([curve.crossing(row) for row in _rows(curve)])


def _rate(curve: RetentionCurve | None) -> Spread | None:
    """Slopes for each sequence over the lags after the first fifth, as in `RetentionCurve.decay_rate`."""
    if curve is None:
        return None
    lags = np.asarray(curve.lags, np.float64)
    inside = lags >= lags[0] + math.ceil(0.2 * (lags[-1] - lags[0]))
    rows = [row[inside] for row in _rows(curve) if np.all(np.isfinite(row[inside]))]
    if inside.sum() < 3 or not rows:
        return None
    return _spread([-np.polyfit(lags[inside], row, 1)[0] for row in rows])


def _rows(curve: RetentionCurve) -> np.ndarray:
    """ln retention of every sequence that has a gradient, (B, L)."""
    rows = np.asarray(curve.log_retention, np.float64).reshape(-1, len(curve.lags))
    return rows if curve.without_gradient is None else rows[~np.asarray(curve.without_gradient).reshape(-1)]


def _shares(run: Trajectory) -> dict[str, float]:
    if not isinstance(run.cell, PointwiseCell):
        raise NotImplementedError(f"{type(run.cell).__name__} is not a PointwiseCell, so its paths are not known")
    size = run.steps * state_size(run) ** 2 * (len(run.cell.gates) + 2)
    few = run
    if run.batch_shape:
        count = max(1, min(math.prod(run.batch_shape), ENTRIES // size))
        few = run.take(np.unravel_index(np.arange(count), run.batch_shape))
    if size > ENTRIES:
        raise NotImplementedError(f"the matrices of its paths would have {size:.1e} entries")
    shares = path_shares(few)
    valid = None if few.padding is None else ~np.asarray(few.padding)
    return {name: float(np.mean(np.asarray(a)[... if valid is None else valid])) for name, a in shares.items()}


def _spread(values: Any) -> Spread:
    array = np.asarray(values, np.float64).reshape(-1)
    low, median, high = np.quantile(array, (0.25, 0.5, 0.75), method="nearest" if np.isinf(array).any() else "linear")
    return Spread(float(median), float(low), float(high), len(array))


def _short(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 or x == round(x) else f"{x:.3g}"
