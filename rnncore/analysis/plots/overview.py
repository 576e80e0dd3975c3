"""The report that is made of a trajectory alone: all that its cell has to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnncore.analysis.dynamics.lyapunov import LyapunovResult, lyapunov_exponents
from rnncore.analysis.dynamics.spectra import jacobian_eigenvalues, singular_spectrum
from rnncore.analysis.gradients.over_time import gradients_over_time
from rnncore.analysis.jacobians.steps import step_coefficients
from rnncore.analysis.paths.shares import path_shares
from rnncore.analysis.plots import curves, gates, gradients, spectra
from rnncore.analysis.plots.facts import line_of, settings, state_size, summary
from rnncore.analysis.plots.page import Section, report
from rnncore.analysis.retention.curve import RetentionCurve
from rnncore.analysis.retention.measure import retention_curve
from rnncore.analysis.run._alignment import shortest
from rnncore.analysis.run.gate_statistics import gate_statistics, timescales
from rnncore.analysis.run.trajectory import Trajectory
from rnncore.cells.base import PointwiseCell

LAGS = 100
FAN = 4
"""How many lags the singular values are computed at, besides 0: each compiles anew."""
PATHS = ("state", "cell", "direct")
KINDS = ("operator", "rms", "sigma_min", "adjoint", "bound", "a_priori_bound")


def report_trajectory(
    traj: Trajectory,
    path: str | Path,
    adjoint: Any = None,
    *,
    title: str | None = None,
    lags: Sequence[int] | None = None,
    dense_up_to: int = 256,
    progress: Callable[[list[str]], Iterable[str]] | None = None,
) -> Path:
    """Computes and draws what there is to know of one run, into one file.

    Retention of all kinds and paths that the cell has, shares of the paths, singular values, eigenvalues,
    Lyapunov exponents, saturation and time scales of the gates; with an adjoint the gradient over time too.
    What is drawn of a single sequence is drawn of the longest.  What the cell does not have is listed with
    the reason.

    Args:
      traj: a trajectory of T steps.
      path: ends in .html or .png, as in `report`.
      adjoint: the gradient of a loss at `traj.last`, in the structure of the carry, as in `retention_curve`.
      title: of the page; by default the name of the cell and the sizes.
      lags: of the curves, increasing; about 100 of 0 to T - 1 by default.
      dense_up_to: size n of the state above which nothing is computed that takes n^3 operations a step.
      progress: put around the list of figures to come, such as `tqdm.tqdm`.

    Returns:
      The path.

    Raises:
      ValueError: what `report` and `retention_curve` refuse.

    Example:
      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> from rnncore.analysis import plots
      >>> cell = rnncore.IndRNN(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = plots.report_trajectory(run, pathlib.Path(folder, "run.png"), dense_up_to=0)
      ...     path.read_bytes()[1:4]
      b'PNG'
    """
    work = _Work(traj, adjoint, lags, dense_up_to)
    names = list(work.figures())
    parts: list[Section] = []
    for name in names if progress is None else progress(names):
        parts += _tried(work.figures()[name], name, work.left_out)
    if work.left_out:
        rows = [("what", "why"), *work.left_out]
        parts.append(Section("Left out", text="Not known for this cell or this run:", table=rows))
    kinds = {f"retention, path {path}": ", ".join(dict.fromkeys(names)) for path, names in work.kinds.items()}
    return report(path, title=title or work.name(), sections=parts, settings=settings(traj) | kinds)


def _tried(build: Callable[[], Section], name: str, left_out: list[tuple[str, str]]) -> list[Section]:
    """The section, or none and its reason: `NotImplementedError` says that a cell does not have a thing."""
    try:
        return [build()]
    except NotImplementedError as error:
        left_out.append((name, str(error)))
        return []


@dataclasses.dataclass
class _Work:
    """Everything about one run that more than one figure asks for."""

    traj: Trajectory
    adjoint: Any
    given_lags: Sequence[int] | None
    dense_up_to: int
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kinds: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    exponents: LyapunovResult | None = None
    pulled_back: Any = None

    @property
    def n(self) -> int:
        return state_size(self.traj)

    def figures(self) -> dict[str, Callable[[], Section]]:
        """What to draw, by heading."""
        chosen = {"Retention": self.retention, "Retention by path": self.by_path, "Shares of the paths": self.shares}
        if self.adjoint is not None:
            chosen |= {"Gradient over time": self.heatmap, "Saliency of the inputs": self.saliency}
        return chosen | {
            "Singular values": self.fan,
            "Eigenvalues of single steps": self.eigenvalues,
            "Lyapunov spectrum": self.lyapunov,
            "Convergence of the exponents": self.convergence,
            "Saturation of the gates": self.saturation,
            "Time scales": self.timescales,
        }

    # ---------------------------------------------------------------- what was run

    @property
    def lags(self) -> list[int]:
        if self.given_lags is not None:
            return list(self.given_lags)
        # The cell path has one lag less than there are steps.
        most = max(shortest(self.traj) - 1, 0)
        return sorted({round(float(k)) for k in np.linspace(0, most, min(most, LAGS) + 1)})

    @property
    def place(self) -> int:
        """The longest sequence, batch axes merged."""
        lengths = self.traj.lengths
        return 0 if lengths is None else int(np.argmax(np.asarray(lengths)))

    @property
    def one(self) -> Trajectory:
        """Cut to its length, so without padding."""
        shape = self.traj.batch_shape
        return self.traj.take(tuple(int(i) for i in np.unravel_index(self.place, shape)) if shape else ())

    def name(self) -> str:
        return f"{type(self.traj.cell).__name__}, n = {self.n}, T = {self.traj.steps}"

    def dense(self, what: str) -> None:
        """Refuses what is cubic in n for a large state."""
        if self.n > self.dense_up_to:
            raise NotImplementedError(f"{what}: n = {self.n} is above dense_up_to = {self.dense_up_to}.")

    # --------------------------------------------------------------- the figures

    def curve(self, kind: str, path: str) -> RetentionCurve | None:
        """None for what the cell does not have, which then is listed."""
        if kind == "adjoint" and self.adjoint is None:
            return None
        try:
            if kind in ("operator", "rms", "sigma_min", "bound") and path != "direct":
                self.dense(f"kind {kind!r}, path {path!r}")
            adjoint = self.adjoint if kind == "adjoint" else None
            curve = retention_curve(self.traj, kind=kind, path=path, lags=self.lags, adjoint=adjoint)
            self.kinds.setdefault(path, []).append(kind)
            return curve
        except NotImplementedError as error:
            self.left_out.append((f"Retention, kind {kind}, path {path}", str(error)))
            return None

    def retention(self) -> Section:
        found = [one for kind in KINDS if (one := self.curve(kind, "state")) is not None]
        if not [one for one in found if one.kind != "sigma_min"]:
            raise NotImplementedError("Every kind was left out.")
        # The smallest singular value lies so deep that beside it all others are one line; the fan shows it.
        drawn = [one for one in found if one.kind != "sigma_min"]
        ax = curves.retention(drawn, fit=line_of(drawn, ("adjoint", "rms")), ax=_axes())
        text = (
            "What is left of a gradient k steps back, over the whole state; the mean of the logarithms over the batch, "
            "shaded its middle half. sigma_min is in the table only. "
        )
        text += " ".join(f"{one.kind}: {one.norm}." for one in found)
        return Section("Retention", ax, text, summary(found))

    def by_path(self) -> Section:
        kind = "rms" if self.adjoint is None else "adjoint"
        paths = PATHS if "c" in self.traj.fields else ("state",)
        found = [one for path in paths if (one := self.curve(kind, path)) is not None]
        if len(found) < 2:
            raise NotImplementedError(f"{type(self.traj.cell).__name__} has no path beside that of the state.")
        text = (
            "state: all of s. cell: c with h moving along, the exact d c_T / d c_(T-k). direct: the product of the "
            "forget gates, which is that derivative only where every h is held fixed."
        )
        return Section("Retention by path", curves.retention(found, ax=_axes()), text, summary(found))

    def shares(self) -> Section:
        self.dense("matrices of every path")
        shares = path_shares(self.traj)
        text = "<J_p, J> / |J|^2 of every step Jacobian J, the sum over the paths J_p: signed, and 1 together."
        return Section("Shares of the paths", gates.path_shares(shares, ax=_axes()), text)

    def heatmap(self) -> Section:
        states = self.gradients().states
        h = np.asarray(states.h, np.float64)
        ax = gradients.gradient_heatmap(h.reshape(len(h), -1), ax=_axes())
        return Section("Gradient over time", ax, "dL/dh_t of one sequence, total over all later steps.")

    def saliency(self) -> Section:
        inputs = np.asarray(self.gradients().inputs, np.float64)
        ax = gradients.saliency(inputs, ax=_axes())
        return Section("Saliency of the inputs", ax, "dL/dx_t of one sequence, and the window that holds most of it.")

    def gradients(self) -> Any:
        """Of the states and inputs of the longest sequence, from one backward pass."""
        if self.pulled_back is None:
            self.pulled_back = self.pull_back()
        return self.pulled_back

    def pull_back(self) -> Any:
        one, lead = self.one, len(self.traj.batch_shape)
        v = jax.tree.map(lambda a: jnp.reshape(a, (-1, *jnp.shape(a)[lead:]))[self.place], self.adjoint)

        def loss(carry: Any, _: Any) -> Any:
            """Linear, with the adjoint for its gradient."""
            return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), v, carry)))

        first = jax.tree.map(lambda a: a[0], one.carries)
        options = {"resets": one.resets, "reset_carry": one.reset_carry}
        return gradients_over_time(loss, one.cell, one.params, one.xs, first, norms=True, **options)

    def fan(self) -> Section:
        self.dense("singular values")
        one = self.one
        lags = sorted({round(one.steps * i / FAN) for i in range(FAN + 1)})
        logs = np.stack([np.asarray(singular_spectrum(one, k), np.float64) for k in lags])
        text = "All singular values of the product of the last k step Jacobians of one sequence."
        return Section("Singular values", spectra.singular_fan(logs, lags, ax=_axes()), text)

    def eigenvalues(self) -> Section:
        self.dense("eigenvalues")
        one = self.one
        chosen = sorted({1, (one.steps + 1) // 2, one.steps})
        sets = {f"t = {t}": np.asarray(jacobian_eigenvalues(one, t)) for t in chosen}
        ax = spectra.eigenvalues(sets, ax=_axes((6.0, 4.6)))
        return Section("Eigenvalues of single steps", ax, "Of the step Jacobian J_t of one sequence.")

    def spectrum(self) -> LyapunovResult:
        if self.exponents is None:
            self.dense("Lyapunov exponents")
            whole = self.traj if self.traj.lengths is None else self.one
            self.exponents = lyapunov_exponents(whole)
        return self.exponents

    def lyapunov(self) -> Section:
        result = self.spectrum()
        text = f"All {result.n} exponents of this run of {result.times[-1]} steps, without burn-in."
        if result.sum_rule_residual is not None:
            worst = float(np.max(np.abs(np.asarray(result.sum_rule_residual))))
            text += f" Their sum misses the mean of ln |det J_t| by {worst:.1e}."
        return Section("Lyapunov spectrum", spectra.lyapunov(result, ax=_axes()), text)

    def convergence(self) -> Section:
        ax = spectra.lyapunov_convergence(self.spectrum(), ax=_axes())
        return Section("Convergence of the exponents", ax, "Estimates after so many steps; a level end means enough.")

    def saturation(self) -> Section:
        statistics = gate_statistics(self.traj)
        rows: list[Sequence[Any]] = [("gate", "mean", "left below", "fraction", "right above", "fraction")]
        for name, one in statistics.items():
            low, high = one.thresholds
            whole = one.overall
            rows.append((name, f"{whole.mean:.4f}", low, f"{whole.left:.4f}", high, f"{whole.right:.4f}"))
        text = "For every unit, the fraction of steps at which its gate is shut and open."
        return Section("Saturation of the gates", gates.gate_saturation(statistics, ax=_axes((7.2, 4.6))), text, rows)

    def timescales(self) -> Section:
        cell = self.traj.cell
        if not isinstance(cell, PointwiseCell):
            raise NotImplementedError(f"{type(cell).__name__} is not a PointwiseCell: no unit keeps a share of itself.")
        field = "c" if "c" in self.traj.fields else "h"
        kept = np.asarray(getattr(getattr(step_coefficients(self.traj).state, field), field), np.float64)
        if self.traj.padding is not None:
            # In the padding a unit keeps all of itself.
            kept = kept[~np.asarray(self.traj.padding)]
        if not np.any(kept) or np.any(kept < 0) or np.any(kept > 1):
            raise NotImplementedError(
                f"{type(cell).__name__} has no gate that says which share of {field} a unit keeps."
            )
        ax = gates.timescale_histogram(np.asarray(timescales(jnp.asarray(kept))), ax=_axes())
        text = f"1 / (1 - f) for the share f of {field}_(t-1) that enters {field}_t directly, every unit and step."
        return Section("Time scales", ax, text)


def _axes(size: tuple[float, float] = (7.2, 4.0)) -> Axes:
    """Of a figure that pyplot knows nothing of."""
    return Figure(figsize=size, layout="constrained").subplots()
