"""Sequences of different lengths aligned at their ends, and the lags of a call."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.run.trajectory import Trajectory, check_trajectory


def ending_together(traj: Trajectory) -> Trajectory:
    """The run with every sequence moved so that its last step is step T and its padding comes first; without lengths.

    A measurement over no more steps than the shortest sequence never reaches the padding.
    """
    if traj.lengths is None:
        return traj
    late, axis = traj.steps - traj.lengths, len(traj.batch_shape)
    names = ("xs", "zs", "carries", "gates", "resets")
    moved = {name: jax.tree.map(lambda a: roll(a, late, axis), getattr(traj, name)) for name in names}
    return dataclasses.replace(traj, **moved, lengths=None)


def roll(a: Array, late: Array, axis: int) -> Array:
    """Rolls every sequence by `late` (*batch) places along the time axis."""
    places = (jnp.arange(a.shape[axis]) - late[..., None]) % a.shape[axis]
    return jnp.take_along_axis(a, places.reshape(*places.shape, *(1,) * (a.ndim - places.ndim)), axis)


def shortest(traj: Trajectory) -> int:
    """Steps of the shortest sequence; T where the lengths are traced."""
    if traj.lengths is None or isinstance(traj.lengths, jax.core.Tracer):
        return traj.steps
    return int(np.min(np.asarray(traj.lengths), initial=traj.steps))


def mask_missing(traj: Trajectory, lags: Any, logs: Array, spare: int = 0) -> Array:
    """Sets logs (*batch, L) to +inf, which no retention is, at lags (L,) above the length of a sequence less `spare`.

    This happens inside jit only: outside, lengths are known and such lags refused.
    """
    if traj.lengths is None:
        return logs
    return jnp.where(jnp.asarray(lags) > traj.lengths[..., None] - spare, jnp.inf, logs)


def check_anchor(call: str, anchor: str) -> None:
    """Refuses anchors other than "end" and "start"."""
    if anchor not in ("end", "start"):
        raise ValueError(f"`{call}(anchor={anchor!r})`: expected 'end' or 'start'.")


def check_lag(call: str, traj: Trajectory, lag: Any, anchor: str) -> int:
    """A single lag, checked against the length of the trajectory."""
    check_trajectory(call, traj)
    check_anchor(call, anchor)
    most = shortest(traj)
    if not isinstance(lag, int | np.integer) or not 0 <= lag <= most:
        raise ValueError(
            f"`{call}(lag={lag})`: expected an integer of 0 to {most}, the steps of the (shortest) sequence; run more "
            "steps, or pick longer sequences by `traj.take(index)`."
        )
    return int(lag)


def chosen_lags(call: str, lags: Any) -> tuple[int, ...]:
    """The lags of a call: an integer K means 0 to K, a sequence is taken as it is."""
    try:
        chosen = tuple(map(operator.index, lags)) if np.ndim(lags) else tuple(range(operator.index(lags) + 1))
    except TypeError:
        chosen = ()
    if not chosen or chosen[0] < 0 or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"`{call}(lags={lags!r})`: expected increasing integers of at least 0, or K for 0 to K.")
    return chosen
