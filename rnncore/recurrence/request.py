"""What a backend is asked for, and what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rnncore._types import Array, Differentiation
from rnncore.cells.base import Cell


@dataclasses.dataclass(frozen=True)
class Request:
    """All that is static about a run: backends are chosen by this alone.

    Fields:
      cell: the cell.
      steps, batch_shape, input_size: T, the batch axes, D.
      dtype: name of the dtype of the projected inputs.
      dtypes: names of the dtypes of parameters, inputs and carries together.
      precision: what `jax.default_matmul_precision` asks for, None by default.
      platform, devices: "cpu", "gpu" or "tpu", and how many of them this process sees.
      lengths, resets, mask, stay: whether the run has lengths, resets, a recurrent mask, zoneout.
      states: whether it must return the states.
      differentiation: "any" or "reverse".
      checkpoint_every: steps to a chunk; None lets the backend choose.
      recompute: "nothing", "gates" or "chunk".
      residual_dtype: name of the dtype in which what reverse mode keeps is stored; None for its own.
      time_axis: where time lies in the operands' xs and in the outputs; 0 but for backends that say
        that they take another.
    """

    cell: Cell
    steps: int
    batch_shape: tuple[int, ...]
    input_size: int
    dtype: str
    dtypes: frozenset[str]
    precision: str | None
    platform: str
    devices: int
    lengths: bool
    resets: bool
    mask: bool
    stay: bool
    states: bool
    differentiation: Differentiation
    checkpoint_every: int | None
    recompute: str
    residual_dtype: str | None = None
    time_axis: int = 0


_OPTIONS: dict[str, Callable[[Request], bool]] = {
    "resets": lambda r: r.resets,
    "recurrent_mask": lambda r: r.mask,
    "zoneout": lambda r: r.stay,
    "return_states": lambda r: r.states,
    "checkpoint_every": lambda r: r.checkpoint_every is not None,
    "recompute": lambda r: r.recompute != "nothing",
    "residual_dtype": lambda r: r.residual_dtype not in (None, r.dtype),
}


def only_reverse_and_without(request: Request, options: Sequence[str], because: str) -> str | None:
    """Reason why a backend of reverse mode that lacks these options of `unroll` cannot serve the request, or None."""
    if request.differentiation != "reverse":
        return "it has reverse mode of first order only: say differentiation='reverse'"
    shown = {"return_states": "=True", "recompute": f"={request.recompute!r}"}
    shown["residual_dtype"] = f"={request.residual_dtype!r}"
    for option in options:
        if _OPTIONS[option](request):
            return f"{option}{shown.get(option, '')}: {because}"
    if 0 in request.batch_shape:
        return f"it takes no empty batch, and this one is {request.batch_shape}"
    return None


class Operands(NamedTuple):
    """The arrays of a run besides the parameters, all in the order of processing and, xs apart, time-major.

    Fields:
      xs: (T, *batch, D), or with time along the request's `time_axis`.
      carry: the carry before the first step.
      target: the carry that a reset returns to.
      lengths: (*batch), or None.
      resets: (T, *batch, 1) booleans, or None.
      mask: (*batch, H), multiplies h_{t-1} where it enters the recurrent product; or None.
      stay: a carry whose fields are (T, *batch, H) booleans or shares, or None; or None: see
        `zoneout` in `rnncore.unroll`.
    """

    xs: Array
    carry: Any
    target: Any
    lengths: Array | None
    resets: Array | None
    mask: Array | None
    stay: Any


class Result(NamedTuple):
    """carry: after the last valid step; outputs with time as xs has it; carries and gates stacked, or None."""

    carry: Any
    outputs: Array
    carries: Any
    gates: Any
