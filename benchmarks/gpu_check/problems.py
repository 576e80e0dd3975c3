"""Small problems on which a kernel is compared with float64, and the float64 answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FEATURES = 32


class Check(NamedTuple):
    """A problem.

    Fields:
      cell: lstm, gru or elman.
      size, heads: units of a head, and how many.
      batch, steps: sequences, and steps of each.
      masked: with lengths and resets.
      dtype: of parameters, inputs and carries.
    """

    cell: str
    size: int
    heads: int
    batch: int
    masked: bool
    dtype: str
    steps: int = 33

    @property
    def name(self) -> str:
        return f"{self.cell} {self.size}x{self.heads} B={self.batch} {self.dtype}" + (" masked" if self.masked else "")


def make_cell(check: Check) -> Any:
    """The cell of a problem; imported late, because the driver needs no JAX."""
    import rnncore

    kernel = rnncore.Heads(check.heads) if check.heads > 1 else rnncore.Dense()
    kind = {"lstm": rnncore.LSTM, "gru": rnncore.GRU, "elman": rnncore.Elman}[check.cell]
    return kind(check.size * check.heads, recurrence=kernel)


def draw(check: Check, seed: int) -> tuple[Any, Any, Any, Any]:
    """(cell, (params, xs, carry), (lengths, resets), cotangents): from NumPy, so that every process draws the same.

    Values are rounded to the dtype of the problem and given in float32.
    """
    import jax
    import jax.numpy as jnp

    cell, rng = make_cell(check), np.random.default_rng(seed)
    batch, steps, hidden = check.batch, check.steps, check.size * check.heads

    def normal(shape: tuple[int, ...], scale: float) -> np.ndarray:
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        return values.astype(jnp.dtype(check.dtype)).astype(np.float32)

    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), FEATURES))
    params = jax.tree.map(lambda a: normal(a.shape, check.size**-0.5 if a.ndim > 2 else 0.5), params)
    xs = normal((batch, steps, FEATURES), 0.3)
    carry = cell.Carry(*(normal((batch, hidden), 0.5) for _ in cell.Carry._fields))
    lengths = rng.integers(0, steps + 1, batch).astype(np.int32) if check.masked else None
    resets = rng.random((batch, steps)) < 0.1 if check.masked else None
    cotangents = normal((batch, steps, hidden), 1), jax.tree.map(lambda a: normal(a.shape, 1), carry)
    return cell, (params, xs, carry), (lengths, resets), cotangents


def pulled(cell: Any, backend: str, gradient: bool = True) -> Any:
    """Jitted (moving, given, cotangents) -> results, and with `gradient` the gradients of everything."""
    import jax

    import rnncore

    def run(moving: Any, given: Any, cotangents: Any) -> Any:
        def outputs(params: Any, xs: Any, carry: Any) -> Any:
            last, ys = rnncore.unroll(
                cell, params, xs, initial_carry=carry, seq_lengths=given[0], resets=given[1], backend=backend
            )
            return ys, last

        if not gradient:
            return outputs(*moving)
        results, pull = jax.vjp(outputs, *moving)
        return results, pull(cotangents)

    return jax.jit(run)


def reference_path(work: Path, check: Check) -> Path:
    """Where the answers of a problem lie once they are there."""
    return work / f"{check.name.replace(' ', '_')}.npz"


def save_reference(work: Path, check: Check, seed: int) -> None:
    """Computes and keeps the answers, on the device that JAX has; float64 has to be on."""
    import jax

    cell, moving, given, cotangents = draw(check, seed)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (moving, cotangents))
    answers = jax.tree.leaves(pulled(cell, "scan")(wide[0], given, wide[1]))
    save(reference_path(work, check), [np.asarray(a) for a in answers])


def save(path: Path, arrays: list[np.ndarray]) -> None:
    """Under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *arrays)
    partial.rename(path)


def load(path: Path, patience: float) -> list[np.ndarray]:
    """Waits for another process to keep them.

    Raises:
      TimeoutError: after `patience` seconds.
    """
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > patience:
            raise TimeoutError(f"no float64 reference after {patience:g} s: {path.name}")
        time.sleep(0.1)
    return list(np.load(path).values())


def distance(got: Any, want: Any) -> float:
    """Relative Frobenius-norm error; 1e30 for what is not finite."""
    found = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))
    return found if np.isfinite(found) else 1e30
