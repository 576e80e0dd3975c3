"""Initial values of kernels and carries, and which of them need random keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from rnncore import _arguments, initializers
from rnncore._types import Array, Initializer

CONSTANT = (None, nnx.initializers.zeros, nnx.initializers.ones)
"""The carry initialisers that are known to ignore their key; None stands for zeros."""


def orthogonal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Flax's orthogonal matrix, also in half precision, where it is drawn in float32 and rounded."""
    # The QR behind it has no half-precision form.
    return initializers.orthogonal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def orthogonal_in_default_dtype(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Flax's orthogonal matrix of nnx.LSTMCell, drawn in JAX's default dtype and rounded."""
    return initializers.orthogonal(key, shape, jnp.result_type(float)).astype(dtype)


@initializers.as_value
def gate_blocks(block: Initializer, gates: int) -> Initializer:
    """Initialiser of a (rows, G*H) kernel that draws the (rows, H) block of every gate on its own."""
    draw = initializers.per_gate(block)

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        rows, columns = shape
        return draw(key, (rows, gates, columns // gates), dtype).reshape(shape)

    return init


def check_rngs(cls: type, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """TypeError where `rngs` is left out; ValueError unless it is a source of random numbers for the parameters."""
    if not args and not given:
        return  # copied or unpickled
    example = "streams of random numbers, such as rngs=nnx.Rngs(0)"
    if "rngs" not in given and cls.__module__.startswith("rnncore."):
        raise TypeError(f"`{cls.__name__}(...)` without `rngs=`: expected {example}.")
    if "rngs" in given and not hasattr(given["rngs"], "params"):
        raise ValueError(f"`{cls.__name__}(rngs={_arguments.shown(given['rngs'])})`: expected {example}.")


class Cell(nnx.RNNCellBase):
    """Base class: a carry that needs a random key only if it is random."""

    hidden_features: int
    param_dtype: Any
    carry_init: Initializer | None
    rngs: nnx.RngStream | None

    carries: ClassVar[int] = 1
    """Number of arrays in the carry; one is returned by itself, several as a tuple."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        check_rngs(cls, args, kwargs)
        for name, value in (*zip(("in_features", "hidden_features"), args, strict=False), *kwargs.items()):
            if name in ("in_features", "hidden_features"):
                _arguments.check_size(cls.__name__, name, value)
            elif name in ("dtype", "param_dtype"):
                _arguments.check_dtypes(cls.__name__, {name: value})
        return super().__new__(cls)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """The carry before the first step.

        Args:
          input_shape: (*batch, D), the shape of one step's input.
          rngs: one key is drawn from it for each array; not needed, and not used, where the
            carry is zeros or ones.
          carry_init: in place of the cell's own.

        Returns:
          (c, h) of an LSTM, h of the others: arrays (*batch, H) in `param_dtype`.

        Raises:
          ValueError: a random carry without `rngs`.
        """
        init, sizes = self.carry_init if carry_init is None else carry_init, self.carry_sizes()
        if init in CONSTANT:
            keys: list[Any] = [None] * len(sizes)
        else:
            stream = self.rngs if rngs is None else rngs
            stream = stream.carry if isinstance(stream, nnx.Rngs) else stream
            if stream is None:
                raise ValueError(
                    f"`{type(self).__name__}(...).initialize_carry({input_shape})`: this carry is random and needs "
                    "`rngs`; RNN takes them at construction and at each call."
                )
            keys = [stream() for _ in sizes]
        draw = nnx.initializers.zeros if init is None else init
        shapes = ((*input_shape[:-1], size) for size in sizes)
        arrays = tuple(draw(key, shape, self.param_dtype) for key, shape in zip(keys, shapes, strict=True))
        return arrays if len(arrays) > 1 else arrays[0]

    def carry_sizes(self) -> tuple[int, ...]:
        """The features of every array of the carry."""
        return (self.hidden_features,) * self.carries

    @property
    def num_feature_axes(self) -> int:
        """Number of trailing axes of an input that are not batch axes: 1."""
        return 1


_KNOWN = (
    Cell.initialize_carry,
    nnx.LSTMCell.initialize_carry,
    nnx.OptimizedLSTMCell.initialize_carry,
    nnx.GRUCell.initialize_carry,
    nnx.SimpleCell.initialize_carry,
)


def is_random(cell: Any) -> bool:
    """Whether the cell's initial carry is random, or cannot be known not to be."""
    known = getattr(type(cell), "initialize_carry", None) in _KNOWN
    return not known or cell.carry_init not in CONSTANT


def carry_stream(rngs: Any, random: bool, call: str) -> nnx.RngStream | None:
    """The stream that a layer keeps for its initial carries, by its argument `rngs`.

    True keeps one only where it is needed; Rngs and RngStream are forked as Flax forks Rngs.
    """
    if rngs is True:
        return nnx.RngStream(0, tag="carry") if random else nnx.data(None)
    if rngs is False:
        return nnx.data(None)
    if isinstance(rngs, nnx.Rngs):
        rngs = rngs.carry
    if not isinstance(rngs, nnx.RngStream):
        raise ValueError(f"`{call}(rngs=<{type(rngs).__name__}>)`: expected nnx.Rngs, an nnx.RngStream, True or False.")
    return rngs.fork()


def carry(cell: Any, step_shape: tuple[int, ...], rngs: Any) -> Any:
    """The initial carry that a cell makes for inputs of a step."""
    if not is_random(cell):
        # Flax's cells require a key even for zeros: they get one that is not kept.
        spare = None if isinstance(cell, Cell) else nnx.RngStream(0, tag="carry")
        return cell.initialize_carry(step_shape, spare)
    # Flax forks an Rngs and draws from a stream.
    return cell.initialize_carry(step_shape, rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs)
