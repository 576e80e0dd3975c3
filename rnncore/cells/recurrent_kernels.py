"""Structures of the recurrent kernel: how h_{t-1} reaches the pre-activations of all gates.

Each is a frozen, hashable description with the same functions; `Recurrence` says what they promise.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp

from rnncore import _arguments, _products, initializers
from rnncore._types import Array, Initializer


class Recurrence(abc.ABC):
    """The interface of a recurrent kernel structure.

    `matmul` is linear in h and differentiable in the kernel, not necessarily linear: a run forms the kernel's gradient
    from products over all steps, by the derivative of `matmul` in the kernel.  `matmul_transposed` of the transposed
    kernel is the same function of h.  Both take any number of leading axes and return a slab (..., G*H).  The scan
    takes whatever holds to this; a kernel for the other loops too derives from `structured_kernels.Structured`.
    """

    default_init: Initializer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _arguments.refuse_renamed(cls, {"mix": "matmul", "mix_transposed": "matmul_transposed"})

    @abc.abstractmethod
    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        """Shape of the kernel, or ValueError where the hidden size does not fit."""

    @abc.abstractmethod
    def matmul(self, kernel: Array, h: Array) -> Array:
        """r = matmul(U, h): (..., H) to a slab (..., G*H)."""

    @abc.abstractmethod
    def transposed(self, kernel: Array) -> Array:
        """The kernel laid out for `matmul_transposed`."""

    @abc.abstractmethod
    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        """matmul(U, h) from the transposed kernel: slower itself, its own transpose (dr to dh) faster."""

    @abc.abstractmethod
    def gate_matrices(self, kernel: Array) -> Array:
        """The kernel as (G, H, H) matrices U_g with r_g = U_g h, row = output."""


@dataclasses.dataclass(frozen=True)
class Dense(Recurrence):
    """Every unit sees every unit: kernel (H, G, H), r_g = h kernel[:, g]."""

    default_init = staticmethod(initializers.per_gate())

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        return (hidden_size, gates, hidden_size)

    def matmul(self, kernel: Array, h: Array) -> Array:
        return _products.times(h, kernel.reshape(kernel.shape[0], -1))

    def transposed(self, kernel: Array) -> Array:
        return kernel.reshape(kernel.shape[0], -1).T

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        return _products.times_transposed(h, kernel)

    def gate_matrices(self, kernel: Array) -> Array:
        return jnp.transpose(kernel, (1, 2, 0))


@dataclasses.dataclass(frozen=True)
class Heads(Recurrence):
    """Block-diagonal: N heads of H/N units that see only their own: kernel (N, H/N, G, H/N).

    Source: the head-wise recurrence of Poeppel, Beck and Hochreiter (2024), arXiv:2412.07752.
    """

    num_heads: int
    default_init = staticmethod(initializers.per_gate())

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        if self.num_heads < 1 or hidden_size % self.num_heads:
            raise ValueError(
                f"`Heads(num_heads={self.num_heads})`: does not divide hidden_size={hidden_size}; "
                "choose a number of heads that does."
            )
        size = hidden_size // self.num_heads
        return (self.num_heads, size, gates, size)

    def matmul(self, kernel: Array, h: Array) -> Array:
        heads, size, gates, _ = kernel.shape
        r = jnp.einsum("...nd,ndge->...gne", h.reshape(*h.shape[:-1], heads, size), kernel)
        return r.reshape(*h.shape[:-1], gates * heads * size)

    def transposed(self, kernel: Array) -> Array:
        return jnp.transpose(kernel, (0, 2, 3, 1))

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        heads, gates, size, _ = kernel.shape
        r = jnp.einsum("...nd,nged->...gne", h.reshape(*h.shape[:-1], heads, size), kernel)
        return r.reshape(*h.shape[:-1], gates * heads * size)

    def gate_matrices(self, kernel: Array) -> Array:
        heads, size, gates, _ = kernel.shape
        blocks = jnp.einsum("ndge,nm->gnemd", kernel, jnp.eye(heads, dtype=kernel.dtype))
        return blocks.reshape(gates, heads * size, heads * size)


@dataclasses.dataclass(frozen=True)
class Diagonal(Recurrence):
    """Every unit sees only itself: kernel (G, H), r_g = kernel[g] * h.

    Source: Li, Li, Cook, Zhu and Gao (2018), IndRNN, arXiv:1803.04831, whose recurrent weights
    start uniform between 0 and a bound near 1; here the bound is 1.
    """

    default_init = staticmethod(initializers.unit_interval)

    def shape(self, gates: int, hidden_size: int) -> tuple[int, ...]:
        return (gates, hidden_size)

    def matmul(self, kernel: Array, h: Array) -> Array:
        gates, size = kernel.shape
        r = h[..., None, :] * kernel.reshape((1,) * (h.ndim - 1) + kernel.shape)
        return r.reshape(*h.shape[:-1], gates * size)

    def transposed(self, kernel: Array) -> Array:
        return kernel

    def matmul_transposed(self, kernel: Array, h: Array) -> Array:
        return self.matmul(kernel, h)

    def gate_matrices(self, kernel: Array) -> Array:
        return kernel[:, :, None] * jnp.eye(kernel.shape[1], dtype=kernel.dtype)
