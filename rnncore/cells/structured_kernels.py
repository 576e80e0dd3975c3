"""Recurrent kernels computed from parameters: low-rank, sparse, sign-constrained, or absent.

Each names the plain structure that it runs as and forms that kernel of its parameters, `effective`.  A run then forms
its products over all steps for the effective kernel, on every backend, and their gradient is pulled back once; so a
structure need not be linear in its parameters.  Where its own product is the cheaper one, loops that have it take that.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore import _products
from rnncore._types import Array
from rnncore.cells.recurrent_kernels import Dense, Diagonal, Recurrence


@dataclasses.dataclass(frozen=True)
class Structured(Recurrence):
    """A structure that runs as another one over a kernel computed from its parameters: define `shape`, `effective`."""

    @abc.abstractmethod
    def effective(self, kernel: Array) -> tuple[Recurrence, Array]:
        """The plain structure and its kernel; differentiable in the parameters, not necessarily linear."""

    def prefers_own_product(self, gates: int, hidden_size: int) -> bool:
        """Whether to multiply by its own `matmul` on a CPU, in a loop that does, and not by the effective kernel."""
        del gates, hidden_size
        return False

    def default_init(self, key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        """Normal, so that U h has about the size of h."""
        return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5

    def matmul(self, kernel: Array, h: Array) -> Array:
        plain, own = self.effective(kernel)
        return plain.matmul(own, h)

    def transposed(self, kernel: Array) -> Array:
        plain, own = self.effective(kernel)
        return plain.transposed(own)

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        return Dense().matmul_transposed(kernel, h)

    def gate_matrices(self, kernel: Array) -> Array:
        plain, own = self.effective(kernel)
        return plain.gate_matrices(own)


@dataclasses.dataclass(frozen=True)
class LowRank(Structured):
    """Low rank: all gates read the same r projections of h: kernel (r, 1 + G, H), the readouts first.

    U_g = sum_k a_k b_kg^T,   a_k = kernel[k, 0] (H,),   b_kg = kernel[k, 1 + g] (H,)

    Where it is faster a step reads and then writes, r H (1 + G) multiplications in place of H^2 G.

    Args:
      rank: r.

    Example:
      >>> import jax, rnncore
      >>> cell = rnncore.Elman(8, recurrence=rnncore.LowRank(2))
      >>> params = cell.init(jax.random.key(0), 3)
      >>> params.recurrent_kernel.shape, cell.recurrence.gate_matrices(params.recurrent_kernel).shape
      ((2, 2, 8), (1, 8, 8))

    Source: Mastrogiuseppe and Ostojic (2018), doi:10.1016/j.neuron.2018.07.003.
    """

    rank: int

    def default_init(self, key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        """Normal, so that the entries of U have variance 1 / H."""
        return jax.random.normal(key, shape, dtype) * (shape[0] * shape[-1]) ** -0.25

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        if not 1 <= self.rank <= hidden_size:
            raise ValueError(f"`LowRank(rank={self.rank})`: expected a rank from 1 to hidden_size={hidden_size}.")
        return (self.rank, 1 + gates, hidden_size)

    def effective(self, kernel: Array) -> tuple[Recurrence, Array]:
        return Dense(), jnp.einsum("kj,kgi->jgi", kernel[:, 0], kernel[:, 1:])

    def prefers_own_product(self, gates: int, hidden_size: int) -> bool:
        """Whether it needs at most half of the multiplications of a dense kernel."""
        return 2 * self.rank * (1 + gates) <= hidden_size * gates

    def matmul(self, kernel: Array, h: Array) -> Array:
        read = _products.times_transposed(h, kernel[:, 0])
        return _products.times(read, kernel[:, 1:].reshape(kernel.shape[0], -1))

    def transposed(self, kernel: Array) -> Array:
        return kernel

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        return self.matmul(kernel, h)


@dataclasses.dataclass(frozen=True)
class Sparse(Structured):
    """Sparse connections, the same for all gates: kernel (H, G, H), whose masked entries are ignored.

    r_g = h (mask * kernel[:, g])

    Args:
      hidden_size: H.
      bits: the mask (H, H) packed by `numpy.packbits`; make it by `Sparse.of` or `Sparse.random`.

    Example:
      >>> import jax, numpy as np, rnncore
      >>> ring = rnncore.Sparse.of(np.roll(np.eye(8, dtype=bool), 1, axis=1))   # unit j reaches unit j + 1
      >>> cell = rnncore.Elman(8, recurrence=ring)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> int((cell.recurrence.gate_matrices(params.recurrent_kernel) != 0).sum())
      8

    Source: plain masking; the products are those of a dense kernel.
    """

    hidden_size: int
    bits: bytes

    @classmethod
    def of(cls, mask: Any) -> Sparse:
        """From booleans (H, H), mask[j, i]: whether unit j reaches unit i."""
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.dtype != np.bool_:
            raise ValueError(f"`Sparse.of(mask=<{mask.dtype} {mask.shape}>)`: expected bool (H, H).")
        return cls(len(mask), np.packbits(mask).tobytes())

    @classmethod
    def random(cls, hidden_size: int, density: float, seed: int = 0) -> Sparse:
        """Each connection is present with probability `density`."""
        if not 0 <= density <= 1:
            raise ValueError(f"`Sparse.random({hidden_size}, density={density})`: expected a share from 0 to 1.")
        return cls.of(np.random.default_rng(seed).random((hidden_size, hidden_size)) < density)

    @property
    def mask(self) -> np.ndarray:
        """Booleans (H, H), mask[j, i]: whether unit j reaches unit i."""
        size = self.hidden_size
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=size * size).reshape(size, size).astype(bool)

    def default_init(self, key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        """Normal, with variance 1 over the mean number of connections to a unit."""
        each = max(float(self.mask.sum()) / max(self.hidden_size, 1), 1.0)
        return jax.random.normal(key, shape, dtype) * each**-0.5

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        if self.hidden_size != hidden_size:
            raise ValueError(f"`Sparse`: its mask is of {self.hidden_size} units, the cell has {hidden_size}.")
        return (hidden_size, gates, hidden_size)

    def effective(self, kernel: Array) -> tuple[Recurrence, Array]:
        return Dense(), jnp.where(self.mask[:, None], kernel, jnp.zeros_like(kernel))


@dataclasses.dataclass(frozen=True)
class Dale(Structured):
    """Dale's law: all outgoing weights of a unit have its sign: kernel as in the structure `within`, (H, G, H).

    U_g[j, i] = sign_j |kernel[j, g, i]|

    Args:
      signs: 1 or -1 for each unit.
      within: the structure of the connections: Dense() or `Sparse`.

    Example:
      >>> import jax, rnncore
      >>> cell = rnncore.Leaky(5, recurrence=rnncore.Dale((1, 1, 1, 1, -1)))
      >>> u = cell.recurrence.gate_matrices(cell.init(jax.random.key(0), 3).recurrent_kernel)[0]
      >>> bool((u[:, :4] >= 0).all()), bool((u[:, 4] <= 0).all())
      (True, True)

    Source: Song, Yang and Wang (2016), doi:10.1371/journal.pcbi.1004792, who rectify; this takes the absolute
    value, so that a weight at 0 keeps learning.
    """

    signs: tuple[int, ...]
    within: Recurrence = dataclasses.field(default_factory=Dense)

    def __post_init__(self) -> None:
        if not set(self.signs) <= {1, -1} or not isinstance(self.within, Dense | Sparse):
            raise ValueError(
                f"`Dale(signs={self.signs}, within={self.within})`: expected 1 or -1, and Dense or Sparse."
            )

    def default_init(self, key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        """That of the structure within."""
        return self.within.default_init(key, shape, dtype)

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        if len(self.signs) != hidden_size:
            raise ValueError(f"`Dale(signs=<{len(self.signs)}>)`: expected one for each of {hidden_size} units.")
        return self.within.shape(gates, hidden_size)

    def effective(self, kernel: Array) -> tuple[Recurrence, Array]:
        signed = jnp.abs(kernel) * jnp.asarray(self.signs, kernel.dtype)[:, None, None]
        return self.within.effective(signed) if isinstance(self.within, Structured) else (self.within, signed)


@dataclasses.dataclass(frozen=True)
class Unconnected(Structured):
    """No recurrent product: r is 0, and a unit's past reaches it through its own carry only; kernel (0, G, H).

    The structure of cells whose gates see only the inputs.  It runs as a diagonal kernel of zeros, so what is
    exact and cheap over `Diagonal` is exact and cheap here too.

    Example:
      >>> import jax, rnncore
      >>> rnncore.MinGRU(4).init(jax.random.key(0), 3).recurrent_kernel.shape
      (0, 2, 4)

    Source: Martin and Cundy (2018), arXiv:1709.04057, name such recurrences linear surrogates.
    """

    def default_init(self, key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        """Nothing to draw."""
        return jnp.zeros(shape, dtype)

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        return (0, gates, hidden_size)

    def effective(self, kernel: Array) -> tuple[Recurrence, Array]:
        return Diagonal(), jnp.zeros(kernel.shape[1:], kernel.dtype)

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        return Diagonal().matmul_transposed(kernel, h)


def prefers_own_product(cell: Any) -> bool:
    """Whether the cell is best run over its kernel as it is, where a loop takes that."""
    recurrence = getattr(cell, "recurrence", None)
    return isinstance(recurrence, Structured) and recurrence.prefers_own_product(len(cell.gates), cell.hidden_size)


def plain(cell: Any, params: Any) -> tuple[Any, Any]:
    """The cell over the plain structure that its recurrence runs as, and its parameters; itself where it is plain."""
    recurrence = getattr(cell, "recurrence", None)
    if not isinstance(recurrence, Structured):
        return cell, params
    if isinstance(params.recurrent_kernel, jax.ShapeDtypeStruct):
        kernel = jax.eval_shape(lambda k: recurrence.effective(k)[1], params.recurrent_kernel)
        example = jnp.zeros(params.recurrent_kernel.shape)
        structure = recurrence.effective(example)[0]
    else:
        structure, kernel = recurrence.effective(params.recurrent_kernel)
    return dataclasses.replace(cell, recurrence=structure), params._replace(recurrent_kernel=kernel)
