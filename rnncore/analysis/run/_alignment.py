"""Which steps lie how far from the end: sequences of several lengths, and the lags that a call asks for."""

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
    """The run with the last step of every sequence as step T, and its padding first; without lengths.

    What is measured over no more steps than the shortest sequence has never sees the padding.
    """
    if traj.lengths is None:
        return traj
    late, axis = traj.steps - traj.lengths, len(traj.batch_shape)
    names = ("xs", "zs", "carries", "gates", "resets")
    moved = {name: jax.tree.map(lambda a: roll(a, late, axis), getattr(traj, name)) for name in names}
    return dataclasses.replace(traj, **moved, lengths=None)


def roll(a: Array, late: Array, axis: int) -> Array:
    """Every sequence moved `late` (*batch) places towards the end of the time axis, the rest to its start."""
    places = (jnp.arange(a.shape[axis]) - late[..., None]) % a.shape[axis]
    return jnp.take_along_axis(a, places.reshape(*places.shape, *(1,) * (a.ndim - places.ndim)), axis)


def shortest(traj: Trajectory) -> int:
    """Steps of the shortest sequence; T where the lengths cannot be seen."""
    if traj.lengths is None or isinstance(traj.lengths, jax.core.Tracer):
        return traj.steps
    return int(np.min(np.asarray(traj.lengths), initial=traj.steps))


def mask_missing(traj: Trajectory, lags: Any, logs: Array, spare: int = 0) -> Array:
    """+inf, which no retention is, at lags (L,) of (*batch, L) that a sequence less `spare` steps does not have.

    Only inside jit can there be any: outside lengths are seen, and such lags refused.
    """
    if traj.lengths is None:
        return logs
    return jnp.where(jnp.asarray(lags) > traj.lengths[..., None] - spare, jnp.inf, logs)


def check_anchor(call: str, anchor: str) -> None:
    """Refuses all but "end" and "start"."""
    if anchor not in ("end", "start"):
        raise ValueError(f"`{call}(anchor={anchor!r})`: expected 'end' or 'start'.")


def check_lag(call: str, traj: Trajectory, lag: Any, anchor: str) -> int:
    """One lag that the trajectory has."""
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
    """An integer K as 0 to K; a sequence as it is."""
    try:
        chosen = tuple(map(operator.index, lags)) if np.ndim(lags) else tuple(range(operator.index(lags) + 1))
    except TypeError:
        chosen = ()
    if not chosen or chosen[0] < 0 or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f"`{call}(lags={lags!r})`: expected increasing integers of at least 0, or the last of 0 to K.")
    return chosen
