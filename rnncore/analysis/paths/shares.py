"""The share of each path in the gradient of a step, and retention with one path removed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import jacobian_product
from rnncore.analysis.paths.gates import Paths, gate_paths
from rnncore.analysis.paths.lstm import LSTMPaths
from rnncore.analysis.run._alignment import chosen_lags
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.trajectory import Trajectory, check_finite, check_trajectory

WAYS = ("inner", "adjoint", "ablation", "norm_ratio")


class AblatedRetention(NamedTuple):
    """Retention with one path removed from every step, and with all of them.

    Fields:
      lags: (L,) integers.
      full: log10 of ||P_k||_F / sqrt(n), (*batch, L); P_k is the product of the last k step Jacobians.
      without: the same without one path, by the name of that path; -inf where nothing is left.
    """

    lags: Array
    full: Array
    without: dict[str, Array]

    def __repr__(self) -> str:
        return shown(self)


def path_shares(
    source: Trajectory | Paths, *, by: str = "inner", adjoint: Any = None, lags: int | Sequence[int] | None = None
) -> Any:
    """How much each path contributes to the step Jacobians J_t = sum_p J_p.

    by "inner":       <J_p, J>_F / ||J||_F^2, signed; the shares of a step add up to 1
    by "adjoint":     <J_p^T v, J^T v> / ||J^T v||^2 for v = dL/ds_t, signed; they add up to 1
    by "norm_ratio":  ||J_p||_F / ||J||_F, which does NOT add up to 1
    by "ablation":    retention over k steps with J_t - J_p in place of J_t, for each path in turn

    Args:
      source: a trajectory, which `gate_paths` splits; or what `gate_paths` or `lstm_paths` returned.
      by: as above.
      adjoint: with "adjoint", the T + 1 gradients `gradients_over_time(...).states`.  For `lstm_paths` v is dL/dc_t
        with h_t moving along.
      lags: with "ablation", increasing integers, an integer K for 0 to K, or None for all; at most T.

    Returns:
      A dict by path of shares (*batch, S), one for each step; 0 where J_t (or J_t^T v) is 0, as at a reset.
      By "ablation" `AblatedRetention`.

    Raises:
      ValueError: unknown `by`; an adjoint that is missing, not used or of other shapes; bad lags.
      NotImplementedError: a cell whose paths are not known; ablation of `lstm_paths`, or with lengths.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.GRU(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> shares = analysis.path_shares(run)
      >>> list(shares)
      ['direct', 'via_r', 'via_z', 'via_n']
      >>> bool(jnp.allclose(sum(shares.values()), 1.0))
      True
    """
    if by not in WAYS:
        raise ValueError(f"`path_shares(by={by!r})`: expected one of {', '.join(map(repr, WAYS))}.")
    if (adjoint is None) == (by == "adjoint"):
        need = "needs adjoint=, `gradients_over_time(...).states`" if adjoint is None else "takes no adjoint"
        raise ValueError(f"`path_shares(by={by!r})` {need}.")
    if lags is not None and by != "ablation":
        raise ValueError(f"`path_shares(by={by!r})` takes no lags, since its shares are of single steps.")
    paths = _paths(source)
    terms = paths.terms()
    if by == "ablation":
        return _ablation(paths, terms, lags)
    if by == "adjoint":
        _check_adjoint(paths, adjoint)
        terms = _pulled_back(terms, paths.cotangents(adjoint))
    shares = _ratios(terms) if by == "norm_ratio" else _projections(terms)
    return {name: shares[name] for name in terms}  # jit sorts its keys


def _paths(source: Any) -> Paths:
    if isinstance(source, Paths):
        return source
    check_trajectory("path_shares", source, "source")
    return gate_paths(source)


@jax.jit
def _pulled_back(terms: dict[str, Array], v: Array) -> dict[str, Array]:
    """J_p^T v as matrices of one column."""
    size = jnp.max(jnp.abs(v), -1, keepdims=True)
    v = v / jnp.where(size > 0, size, 1)  # the shares do not depend on the size of the gradient
    return {
        name: jnp.einsum("...ij,...i->...j", a, v.astype(a.dtype), precision="highest")[..., None]
        for name, a in terms.items()
    }


@jax.jit
def _projections(terms: dict[str, Array]) -> dict[str, Array]:
    """<A_p, A> / ||A||^2, with A the sum of the A_p."""
    scaled, total = _scaled(terms)
    square = jnp.sum(jnp.square(total), (-2, -1))
    safe = jnp.where(square > 0, square, 1)
    return {name: jnp.sum(a * total, (-2, -1)) / safe for name, a in scaled.items()}


@jax.jit
def _ratios(terms: dict[str, Array]) -> dict[str, Array]:
    scaled, total = _scaled(terms)
    size = jnp.sqrt(jnp.sum(jnp.square(total), (-2, -1)))
    safe = jnp.where(size > 0, size, 1)
    return {
        name: jnp.where(size > 0, jnp.sqrt(jnp.sum(jnp.square(a), (-2, -1))) / safe, 0) for name, a in scaled.items()
    }


def _scaled(terms: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """The matrices scaled so that the largest entry of their sum is 1 and no square overflows; and that sum."""
    total = functools.reduce(jnp.add, terms.values())
    size = jnp.max(jnp.abs(total), (-2, -1), keepdims=True)
    size = jnp.where(size > 0, size, 1)
    return {name: a / size for name, a in terms.items()}, total / size


def _ablation(paths: Paths, terms: dict[str, Array], lags: Any) -> AblatedRetention:
    if isinstance(paths, LSTMPaths):
        raise NotImplementedError(
            "`path_shares(<LSTMPaths>, by='ablation')`: a product of one-step totals is not a derivative of the run; "
            "pass the trajectory instead."
        )
    if paths.padded:
        raise NotImplementedError(
            "`path_shares(by='ablation')` of a trajectory with seq_lengths: its sequences do not end together; "
            "select one by `traj.take(i)`."
        )
    total = paths.total()
    steps = total.shape[-3]
    chosen = chosen_lags("path_shares", steps if lags is None else lags)
    if chosen[-1] > steps:
        raise ValueError(
            f"`path_shares(by='ablation', lags up to {chosen[-1]})`: the trajectory has T = {steps} steps; run at "
            f"least {chosen[-1]} or ask for fewer lags."
        )

    def retention(jacobians: Array) -> Array:
        logs = jacobian_product(jacobians[..., steps - chosen[-1] :, :, :]).log10_frobenius_norm()
        return logs[..., np.asarray(chosen)] - math.log10(jacobians.shape[-1]) / 2

    without = {name: retention(total - a) for name, a in terms.items()}
    return AblatedRetention(jnp.asarray(chosen, jnp.int32), retention(total), without)


def _check_adjoint(paths: Paths, adjoint: Any) -> None:
    one = next(iter(paths.terms().values()))
    steps = one.shape[-3] + (paths.first - 1 if isinstance(paths, LSTMPaths) else 0)
    lead = (*one.shape[:-3], steps + 1)
    leaves, fields = jax.tree.leaves(adjoint), getattr(adjoint, "_fields", ())
    wanted = ("c", "h") if isinstance(paths, LSTMPaths) else ("h",)
    sizes = sum(math.prod(jnp.shape(a)[len(lead) :]) for a in leaves)
    if (
        not set(wanted) <= set(fields)
        or any(jnp.shape(a)[: len(lead)] != lead or not jnp.issubdtype(a.dtype, jnp.floating) for a in leaves)
        or sizes != one.shape[-1] * (2 if isinstance(paths, LSTMPaths) else 1)
    ):
        shapes = ", ".join(f"{jnp.result_type(a)} {jnp.shape(a)}" for a in leaves)
        raise ValueError(
            f"`path_shares(adjoint=<{type(adjoint).__name__} of {shapes}>)`: expected the carry of the cell, floating "
            f"point with leading axes {lead}, one entry for each of T + 1 = {lead[-1]} states, as in "
            "`gradients_over_time(...).states`."
        )
    check_finite("path_shares(adjoint=...)", adjoint)
