"""What a report says about a run in words and numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore.analysis.retention.curve import RetentionCurve
from rnncore.analysis.retention.fits import CurveFit
from rnncore.analysis.run._alignment import shortest
from rnncore.analysis.run.trajectory import Trajectory

HEADER = ("kind", "path", "largest lag", "log10 there", "rate per step", "R squared", "half is gone at lag")


def state_size(traj: Trajectory) -> int:
    """n, the entries of the state of one sequence."""
    lead = len(traj.batch_shape) + 1
    return sum(math.prod(a.shape[lead:]) for a in jax.tree.leaves(traj.carries))


def settings(traj: Trajectory) -> dict[str, Any]:
    """What ran: the cell, its sizes, the dtype."""
    fields = dataclasses.fields(traj.cell) if dataclasses.is_dataclass(traj.cell) else ()
    options = {field.name: getattr(traj.cell, field.name) for field in fields}
    facts = {
        "cell": type(traj.cell).__name__,
        "options": ", ".join(f"{name}={_name(value)}" for name, value in options.items()),
        "fields of the state": ", ".join(traj.fields),
        "entries of the state n": state_size(traj),
        "parameters": sum(a.size for a in jax.tree.leaves(traj.params)),
        "input size": traj.xs.shape[-1],
        "steps T": traj.steps,
        "batch axes": traj.batch_shape or "none: one sequence",
        "dtype of the state": jnp.result_type(*jax.tree.leaves(traj.carries)).name,
        "anchor": "end: the last state in terms of earlier ones",
        "JAX": jax.__version__,
    }
    if traj.lengths is not None:
        facts["lengths"] = f"{shortest(traj)} to {int(np.max(np.asarray(traj.lengths)))}"
    return facts


def _name(value: Any) -> str:
    """Functions without the place in memory that their repr may hold."""
    for name in ("__qualname__", "__name__"):
        if isinstance(found := getattr(value, name, None), str):
            return found.replace(".<locals>", "")
    return f"{value}"


def line_of(found: Sequence[RetentionCurve], kinds: Sequence[str]) -> dict[str, CurveFit] | None:
    """The better line through the first curve of these kinds; none where no line fits."""
    for kind in kinds:
        for one in found:
            if one.kind == kind:
                try:
                    return {f"fit of {kind}": one.fit()}
                except ValueError:  # too few lags, or a retention of exactly 0: then the curve has no line
                    return None
    return None


def summary(found: Sequence[RetentionCurve]) -> list[Sequence[Any]]:
    """A row of a table for each curve."""
    rows: list[Sequence[Any]] = [HEADER]
    for one in found:
        facts = one.to_dict()
        rate = facts["decay_rate"] or {"rate": None, "r_squared": None}
        numbers = (facts["mean_log10"][-1], rate["rate"], rate["r_squared"], facts["half_life"]["crossing"])
        last, *others = ["-" if x is None else f"{x:.4g}" for x in numbers]
        rows.append((one.kind, one.path, facts["lags"][-1], last, *others))
    return rows
