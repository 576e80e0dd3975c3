"""Fixed points of a cell under a constant input, by Newton's method on exact Jacobians."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree
from rnncore.analysis.run.flat import flatten_carry, unflatten_carry
from rnncore.analysis.run.trajectory import check_finite
from rnncore.cells.base import Cell
from rnncore.sequence.checks import check_cell

HALVINGS = 12
"""How many times a Newton step that does not lower the residual is halved."""
SLOW = 1e-3
"""Damping, relative to the largest diagonal entry, for points that plain Newton steps do not improve."""
STALLED = 1e-3
"""A step that lowers the residual by less than this fraction has not improved it."""
FAR_BELOW = 1e-2
"""Fraction of the tolerance at which a point needs no further step."""


@dataclasses.dataclass(frozen=True, repr=False)
class FixedPoints:
    """States that a step leaves unchanged; the most stable first.

    Fields:
      states: (K, n), s = F(s, x).
      residuals: (K,), ||F(s, x) - s||_2.
      eigenvalues: (K, n) complex, of dF/ds, in order of falling modulus.
      stable: booleans (K,), whether all eigenvalues lie inside the unit circle.
      unstable_directions: (K,), the number that do not.
      counts: (K,), the number of starts that led there.
      lost: the number of starts that led to no point within the tolerance.
    """

    states: np.ndarray
    residuals: np.ndarray
    eigenvalues: np.ndarray
    stable: np.ndarray
    unstable_directions: np.ndarray
    counts: np.ndarray
    lost: int

    @property
    def time_constants(self) -> np.ndarray:
        """-1 / ln |lambda| in steps, (K, n): of the decay of each direction, or, if negative, of its growth."""
        with np.errstate(divide="ignore"):
            return -1.0 / np.log(np.abs(self.eigenvalues))

    @property
    def periods(self) -> np.ndarray:
        """2 pi / |arg lambda| in steps, (K, n): the period of directions that rotate; inf for others."""
        with np.errstate(divide="ignore"):
            return 2 * math.pi / np.abs(np.angle(self.eigenvalues))

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        kinds = f"{int(self.stable.sum())} stable, {int((~self.stable).sum())} not"
        worst = f"{self.residuals.max():.1e}" if len(self) else "none"
        return f"FixedPoints({len(self)}: {kinds}; largest residual {worst}; {self.lost} starts lost)"


def fixed_points(
    cell: Cell, params: PyTree, x: Array, starts: Any, *, tolerance: float | None = None, merge: float | None = None,
    iterations: int = 100,
) -> FixedPoints:  # fmt: skip
    """The fixed points of a cell under a constant input that Newton's method reaches from given states.

    F(s, x) = s;   s <- s - a (J - I)^-1 (F(s, x) - s),   J = dF/ds

    The Jacobians are exact, by `jax.jacrev` of the step.  A step is halved until the residual falls.  If it never does,
    a damped one is taken, (A'A + mu I)^-1 A' r with A = J - I and mu proportional to the residual, so that slow points,
    where A is nearly singular, are reached too.  All starts run together.

    Args:
      cell: any rnncore cell, a `foreign_cell` included.
      params: its parameters; float64 for residuals below 1e-12.
      x: the constant input (D,).
      starts: initial states, a carry of arrays (K, H), such as `traj.carries` of a run with its leading axes merged,
        or an array (K, n) with the fields side by side.
      tolerance: the largest residual of a fixed point; by default 1e-12 in float64, 1e-5 in float32.
      merge: points within this distance are one; by default the square root of the tolerance.
      iterations: the most Newton steps to take.

    Returns:
      `FixedPoints`.

    Raises:
      ValueError: starts or inputs of other shapes, or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(1)  # h' = tanh(2 h): 0, and two others
      >>> params = cell.init(jax.random.key(0), 1)._replace(recurrent_kernel=jnp.full((1, 1, 1), 2.0))
      >>> found = analysis.fixed_points(cell, params, jnp.zeros(1), jnp.linspace(-1, 1, 8)[:, None])
      >>> [round(s, 3) for s in found.states.ravel().tolist()], found.stable.tolist()
      ([-0.958, 0.958, 0.0], [True, True, False])

    Source: Sussillo and Barak (2013), "Opening the black box", who minimise |F(s) - s|^2 by gradient descent; Newton's
    method with a line search and damping as in Nocedal and Wright (2006), chapters 10 and 11.
    """
    call = "fixed_points"
    check_cell(call, cell)
    x = jnp.asarray(x)
    one = jax.eval_shape(functools.partial(cell.initial_carry, (), _dtype(params)))
    n = sum(math.prod(a.shape) for a in jax.tree.leaves(one))
    states = jnp.asarray(starts) if hasattr(starts, "ndim") else flatten_carry(starts, 1)
    if x.ndim != 1 or states.ndim != 2 or states.shape[-1] != n:
        raise ValueError(
            f"`{call}(x=<{x.shape}>, starts=<{states.shape}>)`: expected an input (D,) and states (K, {n}), or a "
            "carry of arrays (K, H)."
        )
    check_finite(f"{call}(starts=...)", (states, x))
    dtype = _dtype(params)
    tolerance = (1e-12 if dtype == jnp.float64 else 1e-5) if tolerance is None else tolerance
    ends, residuals = _search(cell, params, x.astype(dtype), states.astype(dtype), iterations, float(tolerance))
    reached = np.asarray(residuals) <= tolerance
    points, counts = _merged(
        np.asarray(ends)[reached], np.asarray(residuals)[reached], math.sqrt(tolerance) if merge is None else merge
    )
    found = jnp.asarray(points, dtype).reshape(-1, n)
    residuals, jacobians = map(np.asarray, _linearised(cell, params, x.astype(dtype), found))
    values = np.linalg.eigvals(jacobians).astype(complex) if len(found) else np.zeros((0, n), complex)
    values = np.take_along_axis(values, np.argsort(-np.abs(values), -1, kind="stable"), -1)
    unstable = (np.abs(values) >= 1).sum(-1)
    order = np.lexsort([*np.asarray(found).T[::-1].round(9), unstable])
    return FixedPoints(
        np.asarray(found)[order], residuals[order], values[order], (unstable == 0)[order], unstable[order],
        counts[order], int((~reached).sum()),
    )  # fmt: skip


def _dtype(params: PyTree) -> Any:
    return jnp.result_type(*jax.tree.leaves(params))


def _map(cell: Cell, params: PyTree, x: Array) -> Any:
    """s -> F(s, x) - s of one state (n,)."""
    unflatten = unflatten_carry(jax.eval_shape(functools.partial(cell.initial_carry, (), x.dtype)))
    z = cell.project(params, x)

    def change(state: Array) -> Array:
        carry, _ = cell.update(params, unflatten(state), z)
        return flatten_carry(carry, 0).astype(state.dtype) - state

    return change


@functools.partial(jax.jit, static_argnums=0)
def _linearised(cell: Cell, params: PyTree, x: Array, states: Array) -> tuple[Array, Array]:
    """(residuals (K,), dF/ds (K, n, n))."""
    change, eye = _map(cell, params, x), jnp.eye(states.shape[-1], dtype=states.dtype)
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.norm(jax.vmap(change)(states), axis=-1), jax.vmap(jax.jacrev(change))(states) + eye[None]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _search(
    cell: Cell, params: PyTree, x: Array, states: Array, iterations: int, tolerance: float
) -> tuple[Array, Array]:
    """(states, residuals) after the iterations, or once no start improves any more."""
    with jax.default_matmul_precision("highest"):
        change = _map(cell, params, x)
        eye = jnp.eye(states.shape[-1], dtype=states.dtype)
        sizes = jnp.asarray(0.5 ** np.arange(HALVINGS), states.dtype)

        def size_of(state: Array) -> Array:
            size = jnp.linalg.norm(change(state))
            return jnp.where(jnp.isfinite(size), size, jnp.inf)

        def one(state: Array, size: Array) -> tuple[Array, Array]:
            residual, matrix = change(state), jax.jacrev(change)(state)
            plain = -jnp.linalg.solve(matrix, residual)
            gram = matrix.T @ matrix
            damping = SLOW * jnp.max(jnp.diagonal(gram)) * jnp.minimum(1, size)
            damped = -jnp.linalg.solve(gram + damping * eye, matrix.T @ residual)
            steps = [sizes[:, None] * d[None] for d in (plain, damped)]
            tried = state[None] + jnp.concatenate([*steps, jnp.zeros_like(state)[None]])
            tried = jnp.where(jnp.all(jnp.isfinite(tried), -1)[:, None], tried, state[None])
            after = jax.vmap(size_of)(tried)
            # The longest Newton step that lowers the residual well; else whatever lowers it most.
            good = after[:HALVINGS] <= (1 - 0.1 * sizes) * size
            best = jnp.where(jnp.any(good), jnp.argmax(good), jnp.argmin(after))
            return tried[best], after[best]

        def again(carry: Any) -> Any:
            states, size, _, count = carry
            states, after = jax.vmap(one)(states, size)
            going = (after < (1 - STALLED) * size) & (after > FAR_BELOW * tolerance)
            return states, after, jnp.any(going), count + 1

        start = (states, jax.vmap(size_of)(states), jnp.asarray(True), 0)
        states, size, _, _ = jax.lax.while_loop(lambda c: c[2] & (c[3] < iterations), again, start)
        return states, size


def _merged(points: np.ndarray, residuals: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """(distinct points, number of starts at each); of merged points the one with the least residual."""
    kept: list[np.ndarray] = []
    counts: list[int] = []
    for i in np.argsort(residuals, kind="stable"):
        near = [k for k, point in enumerate(kept) if np.linalg.norm(point - points[i]) <= distance]
        if near:
            counts[near[0]] += 1
        else:
            kept.append(points[i])
            counts.append(1)
    return np.asarray(kept).reshape(len(kept), -1), np.asarray(counts, int)
