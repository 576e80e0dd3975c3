"""Layers as modules: the stack and the run of `LSTM`, `GRU` and `Elman` in both Flax flavours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from rnncore._types import Activation, Array, Initializer
from rnncore.cells import PointwiseCell
from rnncore.cells.recurrent_kernels import Dense, Heads
from rnncore.layers.compose import unroll_stack
from rnncore.layers.stack import Stack, StackParams
from rnncore.sequence import choices


def without(last: Any, outputs: Any, *states: Any, return_carry: bool) -> Any:
    """(carry, outputs[, states]) without the carry unless it is asked for; what is alone is not in a tuple."""
    result = (last, outputs, *states) if return_carry else (outputs, *states)
    return result[0] if len(result) == 1 else result


def stack_of(
    make: Callable[..., PointwiseCell], size: int, *, heads: int, activation_fn: Activation, kernel_init: Initializer,
    recurrent_kernel_init: Initializer | None, bias_init: Initializer, zoneout: Mapping[str, float], **options: Any,
) -> Stack:  # fmt: skip
    """The stack of such a module with H = size.

    Args:
      make: the functional cell, with the options that only this kind has.
      zoneout: rates by field of the carry.
      options: those of `Stack`.
    """
    cell = make(
        size, activation_fn=activation_fn, recurrence=Dense() if heads == 1 else Heads(heads),
        kernel_init=kernel_init, recurrent_init=recurrent_kernel_init, bias_init=bias_init,
    )  # fmt: skip
    rates = cell.Carry(*(zoneout[name] for name in cell.Carry._fields))
    return Stack(cell, zoneout=rates if any(rates) else None, **options)


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
