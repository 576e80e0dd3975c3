"""Matrices with a separate scale, and products of many Jacobians that neither vanish nor overflow."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._lengths import check_lengths
from rnncore._types import Array
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.trajectory import check_finite

LN2 = math.log(2.0)


class ScaledMatrix(NamedTuple):
    """exp(log_scale) * matrix, for numbers beyond the range of floating point.

    Fields:
      matrix: (..., m, n).
      log_scale: (...), natural logarithm.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore.analysis import ScaledMatrix
      >>> tiny = ScaledMatrix(2 * jnp.eye(3), jnp.asarray(-1000.0))
      >>> round(float(tiny.log10_operator_norm()), 3), float(tiny.to_dense().max())
      (-433.993, 0.0)
    """

    matrix: Array
    log_scale: Array

    def __repr__(self) -> str:
        return shown(self)

    def log_operator_norm(self) -> Array:
        """ln of the largest singular value, (...); -inf for a matrix of zeros."""
        return log_operator_norm(self.matrix) + self.log_scale

    def log_frobenius_norm(self) -> Array:
        """ln of the root of the sum of squares, (...); -inf for a matrix of zeros."""
        return log_frobenius_norm(self.matrix) + self.log_scale

    def log10_operator_norm(self) -> Array:
        """log10 of the largest singular value, (...)."""
        return self.log_operator_norm() / math.log(10.0)

    def log10_frobenius_norm(self) -> Array:
        """log10 of the root of the sum of squares, (...)."""
        return self.log_frobenius_norm() / math.log(10.0)

    def to_dense(self) -> Array:
        """The plain matrix (..., m, n); 0 or inf where it leaves the range of its dtype."""
        return self.matrix * jnp.exp(self.log_scale)[..., None, None]


@jax.jit
def log_operator_norm(matrix: Array) -> Array:
    """ln of the largest singular value of (..., m, n), from above and to rounding.

    With S = A A^T, ||S^(2^k)||_F^(1 / 2^(k+1)) is at least ||A||_2 and exceeds it by a factor of at most
    n^(1 / 2^(k+2)).  A few dozen squarings of a symmetric matrix bring that below an ulp, at a tenth of
    the time of a singular value decomposition, and on any accelerator.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = jnp.swapaxes(matrix, -1, -2)
    size = matrix.shape[-2]
    squarings = max(0, math.ceil(math.log2((1 + math.log(size)) / float(jnp.finfo(matrix.dtype).eps))))
    matrix, exponent = renormalise(matrix, jnp.zeros(matrix.shape[:-2], jnp.int32))

    def square(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        power, log = state
        power, scale = renormalise(jnp.matmul(power, power, precision="highest"), jnp.zeros_like(exponent))
        return power, log + nats(scale, log.dtype) * 0.5 ** (jnp.asarray(k, log.dtype) + 2)

    gram = jnp.matmul(matrix, jnp.swapaxes(matrix, -1, -2), precision="highest")
    power, scale = renormalise(gram, jnp.zeros_like(exponent))
    start = nats(scale, power.dtype) / 2 + nats(exponent, power.dtype)
    power, log = jax.lax.fori_loop(0, squarings, square, (power, start))
    return log + log_frobenius_norm(power) * 0.5 ** (squarings + 1)


@jax.jit
def log_frobenius_norm(matrix: Array) -> Array:
    """ln of the root of the sum of squares of (..., m, n)."""
    scaled, exponent = renormalise(matrix, jnp.zeros(matrix.shape[:-2], jnp.int32))
    return 0.5 * jnp.log(jnp.sum(jnp.square(scaled), (-2, -1))) + nats(exponent, scaled.dtype)


def nats(exponent: Array, dtype: Any) -> Array:
    """ln of 2^exponent."""
    return exponent.astype(dtype) * LN2


def renormalise(matrix: Array, exponent: Array) -> tuple[Array, Array]:
    """2^exponent * matrix (..., m, n) with the largest entry brought to [1/2, 1); zeros stay as they are.

    Powers of two and integers: nothing is rounded, so ten thousand steps add up no error in the scale.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(matrix), (-2, -1)))
    _, power = jnp.frexp(largest)
    # In two halves: 2^-power alone may leave the range where the product does not.
    half = power // 2
    for part in (half, power - half):
        matrix = matrix * _power_of_two(-part, matrix.dtype)[..., None, None]
    return matrix, exponent + power


def _power_of_two(exponent: Array, dtype: Any) -> Array:
    """2^exponent for normal numbers, from its bits: exp2 and pow may be an ulp off."""
    info = jnp.finfo(dtype)
    integer = jnp.dtype(f"int{info.bits}")
    bits = (exponent.astype(integer) + (info.maxexp - 1)) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)


def jacobian_product(
    jacobians: Array, anchor: str = "end", *, associative: bool = False, seq_lengths: Any = None
) -> ScaledMatrix:
    """All partial products of a sequence of Jacobians, later steps on the left.

    anchor "end":   P_k = J_T J_{T-1} ... J_{T-k+1} = d s_T / d s_{T-k}
    anchor "start": P_k = J_k J_{k-1} ... J_1       = d s_k / d s_0

    Args:
      jacobians: (*batch, T, n, n), as `step_jacobians(traj)` returns them.
      anchor: which end is fixed.
      associative: multiply in about log2(T) rounds of independent products instead of T products one after the
        other, for devices with parallelism to spare.  Twice the work; equal up to rounding.
      seq_lengths: integers (*batch) as given to `trajectory`: with anchor "end" every sequence then ends at its own
        last step.  From the lag of its length on P_k stays d s_L / d s_0.

    Returns:
      `ScaledMatrix` with matrix (*batch, T + 1, n, n) and log_scale (*batch, T + 1); [..., k, :, :] is
      P_k, the identity at k = 0.  A product that is exactly zero has a matrix of zeros, and norms of -inf.

    Raises:
      ValueError: Jacobians of another shape or dtype, or not finite (outside jit); unknown anchor.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore.analysis import jacobian_product
      >>> halves = jnp.broadcast_to(0.5 * jnp.eye(2), (1000, 2, 2))
      >>> round(float(jacobian_product(halves).log10_operator_norm()[-1]), 2)
      -301.03
    """
    if not (hasattr(jacobians, "__array__") or isinstance(jacobians, (list, tuple))):
        raise ValueError(
            f"`jacobian_product(<{type(jacobians).__name__}>)`: expected Jacobians (*batch, T, n, n), as "
            "`step_jacobians(traj)` returns them."
        )
    jacobians = jnp.asarray(jacobians)
    what = f"jacobian_product(<{jacobians.dtype} {jacobians.shape}>)"
    if jacobians.ndim < 3 or jacobians.shape[-1] != jacobians.shape[-2]:
        raise ValueError(f"`{what}`: expected (*batch, T, n, n), as `step_jacobians(traj)` returns them.")
    if not jnp.issubdtype(jacobians.dtype, jnp.floating):
        raise ValueError(f"`{what}`: expected floating point; convert the Jacobians first.")
    if anchor not in ("end", "start"):
        raise ValueError(f"`jacobian_product(anchor={anchor!r})`: expected 'end' or 'start'.")
    if seq_lengths is not None:
        seq_lengths = check_lengths(seq_lengths, jacobians.shape[:-3], jacobians.shape[-3])
    check_finite(what, jacobians)
    return _products(jacobians, seq_lengths, anchor, associative)


@functools.partial(jax.jit, static_argnames=("anchor", "associative"))
def _products(jacobians: Array, lengths: Array | None, anchor: str, associative: bool) -> ScaledMatrix:
    steps = _in_order(jacobians, lengths, anchor)
    first = jnp.broadcast_to(jnp.eye(steps.shape[-1], dtype=steps.dtype), steps.shape[1:])
    start = renormalise(first, jnp.zeros(steps.shape[1:-2], jnp.int32))

    def multiply(nearer: Any, further: Any) -> Any:
        """Joins the factors near the anchor and those further away: to the right from the end of time, to the left
        from its start."""
        (a, a_exponent), (b, b_exponent) = (nearer, further) if anchor == "end" else (further, nearer)
        return renormalise(jnp.matmul(a, b, precision="highest"), a_exponent + b_exponent)

    factors = renormalise(steps, jnp.zeros(steps.shape[:-2], jnp.int32))
    if associative:
        rest = jax.lax.associative_scan(multiply, factors)
    else:

        def step(product: Any, factor: Any) -> Any:
            product = multiply(product, factor)
            return product, product

        _, rest = jax.lax.scan(step, start, factors)
    matrix, exponent = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, rest)
    batch = jacobians.ndim - 3
    log_scale = nats(exponent, jacobians.dtype)
    return ScaledMatrix(jnp.moveaxis(matrix, 0, batch), jnp.moveaxis(log_scale, 0, batch))


def _in_order(jacobians: Array, lengths: Array | None, anchor: str) -> Array:
    """Time-major, the Jacobian next to the anchor first; the identity in the padding."""
    if lengths is not None:
        # From its end a sequence of length L has J_L first and J_1 at L - 1; from the start it is in place.
        count = jnp.arange(jacobians.shape[-3])
        place = lengths[..., None] - 1 - count if anchor == "end" else jnp.broadcast_to(count, jacobians.shape[:-2])
        inside = (count < lengths[..., None])[..., None, None]
        chosen = jnp.take_along_axis(jacobians, jnp.maximum(place, 0)[..., None, None], -3)
        eye = jnp.eye(jacobians.shape[-1], dtype=jacobians.dtype)
        return jnp.moveaxis(jnp.where(inside, chosen, eye), -3, 0)
    steps = jnp.moveaxis(jacobians, -3, 0)
    return jnp.flip(steps, 0) if anchor == "end" else steps
