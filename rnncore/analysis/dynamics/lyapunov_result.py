"""The result of a computation of Lyapunov exponents."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from rnncore._types import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("exponents", "local", "standard_error", "sum_rule_residual"),
    meta_fields=("times", "n", "direction", "dtype"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class LyapunovResult:
    """Lyapunov exponents and their errors; a pytree.  Natural logarithms per step.

    Fields:
      exponents: (*batch, k), in the order of the frame: the largest first if the run is long enough.
      local: (*batch, M, k), the same over each interval between two QR decompositions.
      standard_error: (*batch, k), from the means of about sqrt(M) blocks of intervals; it does not include the bias
        of a short run.  inf where M is below 4, 0 for an exponent of -inf.
      sum_rule_residual: (*batch), the sum of all exponents minus the mean of ln |det J_t|, 0 up to rounding if no
        direction is lost.  None unless all n exponents were requested.
      times: M integers, the number of steps until the end of each interval, without burn-in.
      n: size of the state.
      direction, dtype: of the computation.
    """

    exponents: Array
    local: Array
    standard_error: Array
    sum_rule_residual: Array | None
    times: tuple[int, ...]
    n: int
    direction: str
    dtype: str

    def __repr__(self) -> str:
        shape = f"{self.exponents.shape[-1]} of n = {self.n} exponents, {self.times[-1]} steps, {self.direction}"
        if isinstance(self.exponents, jax.core.Tracer):
            return f"LyapunovResult({shape}, traced)"
        exponents, errors = (
            np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (self.exponents, self.standard_error)
        )
        leading = ", ".join(f"{x:.3g} ± {e:.2g}" for x, e in zip(exponents.mean(0)[:4], errors.mean(0), strict=False))
        return f"LyapunovResult({shape}: {leading}{', ...' if exponents.shape[-1] > 4 else ''})"

    @property
    def history(self) -> np.ndarray:
        """The estimate after each interval, (*batch, M, k); the last is `exponents`.  In NumPy, so not inside jit."""
        local, times = np.asarray(self.local), np.asarray(self.times)
        # In float64: a running sum in float32 would lose digits over many steps.
        sums = np.cumsum(local.astype(np.float64) * np.diff(times, prepend=0)[:, None], -2)
        return (sums / times[:, None]).astype(local.dtype)
