"""The page of a single run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rnncore.analysis.report.model_report import of_trajectory
from rnncore.analysis.run.trajectory import Trajectory


def report_trajectory(
    traj: Trajectory, path: str | Path, adjoint: Any = None, *, title: str | None = None, dense_up_to: int = 256
) -> Path:
    """The page of a single run, as `Report.save` writes it of the layers of a model.

    Args:
      traj: a trajectory of T steps.
      path: ends in .html.
      adjoint: the gradient of a loss at `traj.last`, in the structure of the carry, as in `retention_curve`; with it
        the page has the gradient over time.
      title: of the page; by default the name of the cell.
      dense_up_to: size n of the state above which nothing is computed that takes n^3 operations a step.

    Returns:
      The path.

    Raises:
      ValueError: another ending; what `retention_curve` refuses.

    Example:
      >>> import pathlib, tempfile
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> from rnncore.analysis import plots
      >>> cell = rnncore.IndRNN(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = plots.report_trajectory(run, pathlib.Path(folder, "run.html"), dense_up_to=0)
      ...     "<h2>Findings" in path.read_text(encoding="utf-8")
      True
    """
    return of_trajectory(traj, adjoint, title=title, dense_up_to=dense_up_to).save(path)
