"""Layers as modules: the fields that `LSTM`, `GRU` and `Elman` have in both Flax flavours, and their run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from rnncore import initializers
from rnncore._types import Activation, Array, Initializer
from rnncore.cells import PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.layers.compose import unroll_stack
from rnncore.layers.stack import Merge, Stack, StackParams
from rnncore.sequence import choices


def without(last: Any, outputs: Any, *states: Any, return_carry: bool) -> Any:
    """(carry, outputs[, states]) without the carry unless it is asked for; what is alone is not in a tuple."""
    result = (last, outputs, *states) if return_carry else (outputs, *states)
    return result[0] if len(result) == 1 else result


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class LayerFields:
    """The fields of a module that is a `Stack`; the flavours add sizes, parameters and the call."""

    make: ClassVar[Callable[..., PointwiseCell]]
    """The functional cell."""
    own: ClassVar[tuple[str, ...]] = ()
    """Fields that only this kind of cell has."""

    num_layers: int = 1
    bidirectional: bool = False
    merge: Merge = "concat"
    dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    heads: int = 1
    learned_carry: bool = False
    activation_fn: Activation = jnp.tanh
    kernel_init: Initializer = initializers.lecun_normal
    recurrent_kernel_init: Initializer | None = None
    bias_init: Initializer = initializers.zeros
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_dtype: Any = None
    output_dtype: Any = None
    time_major: bool = False
    return_carry: bool = False
    checkpoint_every: int | None = None
    recompute: str = "nothing"
    backend: str | None = None


def recurrence(heads: int) -> Dense | Heads:
    """The recurrent kernel of so many heads."""
    return Dense() if heads == 1 else Heads(heads)


def stack_of(layers: Any, size: int) -> Stack:
    """The description of these layers of H = size."""
    cell = layers.make(
        size, **{name: getattr(layers, name) for name in layers.own}, activation_fn=layers.activation_fn,
        recurrence=recurrence(layers.heads), kernel_init=layers.kernel_init,
        recurrent_init=layers.recurrent_kernel_init, bias_init=layers.bias_init,
    )  # fmt: skip
    rates = {"h": layers.zoneout, "c": getattr(layers, "zoneout_cell", 0.0)}
    zoneout = cell.Carry(*(rates[name] for name in cell.Carry._fields))
    return Stack(
        cell, num_layers=layers.num_layers, bidirectional=layers.bidirectional, merge=layers.merge,
        dropout=layers.dropout, recurrent_dropout=layers.recurrent_dropout, zoneout=zoneout if any(zoneout) else None,
        learned_carry=layers.learned_carry,
    )  # fmt: skip


def run_layers(
    layers: Any, stack: Stack, params: StackParams, xs: Array, *, initial_carry: Any = None,
    return_carry: bool | None = None, run: Callable[..., Any] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """What the call of these layers returns, by `unroll_stack` or `run`, from their fields and the call's options."""
    if run is None:
        run = functools.partial(
            unroll_stack, checkpoint_every=layers.checkpoint_every, recompute=layers.recompute, backend=layers.backend
        )
    with choices.layer(layers, [name for row in stack.names for name in row]):
        last, outputs, *states = run(
            stack, params, xs, initial_carry=initial_carry, dtype=layers.dtype,
            carry_dtype=layers.carry_dtype if initial_carry is not None else carry_dtype(layers),
            output_dtype=layers.output_dtype, time_major=layers.time_major, **options,
        )  # fmt: skip
    return without(last, outputs, *states, return_carry=layers.return_carry if return_carry is None else return_carry)


def carry_dtype(layers: Any) -> Any:
    """The dtype of the layers' own initial carry; that of the parameters by default."""
    return layers.param_dtype if layers.carry_dtype is None else layers.carry_dtype
