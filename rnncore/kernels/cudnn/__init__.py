"""Backend "cudnn": LSTM layers in one call of NVIDIA's library, through `jax.experimental.rnn`.

Platform: CUDA.  Cell: `rnncore.LSTM` with a dense recurrence and the standard functions.  Dtype: float32.
Lengths and any number of batch axes: yes; resets, masks, zoneout, states, chunks: no.
Differentiation: reverse mode of first order; no jvp, and no vmap: put the axis among the batch axes.
Outputs past the length are zeros, with zero gradients, and not what the cell makes of the padding.
Every call waits for the device once, to read the lengths on the host: no CUDA graph can hold it.  Data
that is sharded over devices is gathered to each of them, unless shard_map (check_vma=False) parts it.

Not yet run on a GPU: what is tested is everything up to the library's call, with JAX's own reference
(`lstm_ref`) in its place, and that the call is refused where there is no GPU.

The weights go in one flat buffer: W_ih, W_hh of every layer and direction, then b_ih, b_hh of each, the
gates in the order i, f, g, o, a row of a matrix for each unit.  rnncore's LSTM has one bias, so b_hh is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore import _compat, _lengths
from rnncore._types import Array
from rnncore.cells.base import CellParams
from rnncore.cells.lstm import LSTM, LSTMCarry
from rnncore.cells.recurrent_kernels import Dense
from rnncore.recurrence.request import Operands, Request, Result, only_reverse_and_without

SIGMOIDS = (jax.nn.sigmoid, lax.logistic)
TANHS = (jnp.tanh, lax.tanh)

# As XLA takes these words for float32 products on a GPU: all that is below "highest" may be TF32.
TF32_ALLOWED: dict[str | None, bool] = {
    **dict.fromkeys(("highest", "float32", "F32_F32_F32"), False),
    **dict.fromkeys((None, "default", "fastest", "bfloat16", "high", "tensorfloat32", "bfloat16_3x"), True),
    **dict.fromkeys(("DEFAULT", "TF32_TF32_F32"), True),
}
"""Value of `jax.default_matmul_precision` to whether cuDNN may round the factors of a product to TF32."""


def unsupported(request: Request) -> str | None:
    """Reason why this backend cannot serve the request, or None."""
    cell = request.cell
    if type(cell) is not LSTM:
        return f"{type(cell).__name__} is not rnncore.LSTM, the only cell that jax.experimental.rnn has"
    for option, is_plain in (
        ("peepholes", not cell.peepholes),
        ("coupled", not cell.coupled),
        ("gate_fn", cell.gate_fn in SIGMOIDS),
        ("activation_fn", cell.activation_fn in TANHS),
        ("recurrence", type(cell.recurrence) is Dense),
    ):
        if not is_plain:
            value = getattr(cell, option)
            value = getattr(value, "__name__", repr(value))
            return f"its LSTM is dense, with the standard gates and functions, and this one has {option}={value}"
    missing = missing_library(request.platform)
    if missing is not None:
        return missing
    if request.dtypes != {"float32"}:
        return f"it takes float32 only; parameters, inputs and carry are {', '.join(sorted(request.dtypes))}"
    if request.precision not in TF32_ALLOWED:
        return f"it multiplies in float32 or TF32, and jax.default_matmul_precision is {request.precision!r}"
    return only_reverse_and_without(
        request,
        ("resets", "recurrent_mask", "zoneout", "return_states", "checkpoint_every", "recompute", "residual_dtype"),
        "its call runs all steps and shows the outputs and the last carry only",
    )


def unchosen(request: Request) -> str | None:
    """Reason why this backend runs only where it is named."""
    del request
    return "only where it is named: it has not been measured against 'scan' on a GPU yet"


def missing_library(platform: str) -> str | None:
    """Reason why cuDNN cannot be called on this platform by this JAX, or None."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {platform} here"
    from jax.experimental import rnn  # slow to import, and of use on a GPU only

    if "rocm" in _compat.platform_version():
        return "it needs an NVIDIA GPU; on AMD's, jax.experimental.rnn has another order of gates and is not tested"
    # What the module is without its compiled half, which comes with jax's CUDA plugin.
    if not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
        return "jax.experimental.rnn finds no library; install jax's CUDA plugin, as by `pip install jax[cuda13]`"
    return None


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    carry, outputs = run_layers(((params,),), ((operands.carry,),), operands.xs, operands.lengths, request.precision)
    return Result(carry[0][0], outputs, None, None)


def run_layers(
    layers: Sequence[Sequence[CellParams]], carry: Any, xs: Array, lengths: Array | None, precision: str | None
) -> tuple[Any, Array]:
    """Runs layers, each over the outputs of the one below, both directions side by side, in one call.

    Args:
      layers: for each layer the parameters of one direction, or of the forward and the backward one.
      carry: the initial carries in the same arrangement.
      xs: (T, *batch, D), at least one step and one sequence.
      lengths: (*batch) int32 from 0 to T, or None.
      precision: of products, one of `TF32_ALLOWED`.

    Returns:
      (carry after the last valid step, in the arrangement of the initial one; outputs (T, *batch, directions * H)).
    """
    if _compat.varying_axes(xs):
        raise NotImplementedError(
            "`unroll(backend='cudnn')` inside shard_map: JAX cannot see over which devices the library's results "
            "differ; use `jax.shard_map(..., check_vma=False)`, or backend='scan'."
        )
    steps, *batch, features = xs.shape
    rows, directions, hidden = math.prod(batch), len(layers[0]), carry[0][0].h.shape[-1]
    x = jnp.moveaxis(xs.reshape(steps, rows, features), 0, 1)  # (B, T, D)
    flat = jnp.full(rows, steps, jnp.int32) if lengths is None else lengths.reshape(rows)
    starts = [own for row in carry for own in row]
    h, c = (jnp.stack([getattr(s, name).reshape(rows, hidden) for s in starts]) for name in "hc")
    inside = _lengths.valid_mask(flat, steps).T[..., None]  # (B, T, 1)
    if lengths is not None:
        # What stands in the padding is the library's own affair, of the gradients too: none of it gets out.
        x = jnp.where(inside, x, 0)
    y, last_h, last_c = _lstm(
        x, h, c, pack(layers), jnp.maximum(flat, 1),  # the library wants a step of every sequence
        features, hidden, len(layers), directions == 2, TF32_ALLOWED[precision],
    )  # fmt: skip
    if lengths is not None:
        y = jnp.where(inside, y, 0)
        last_h, last_c = (jnp.where((flat > 0)[:, None], a, b) for a, b in ((last_h, h), (last_c, c)))
    ends = [LSTMCarry(*(a.reshape(*batch, hidden) for a in end)) for end in zip(last_c, last_h, strict=True)]
    arranged = tuple(tuple(ends[n : n + directions]) for n in range(0, len(ends), directions))
    return arranged, jnp.moveaxis(y, 1, 0).reshape(steps, *batch, directions * hidden)


def pack(layers: Sequence[Sequence[CellParams]]) -> Array:
    """The parameters of layers and directions as the library's flat buffer of weights."""
    every = [own for row in layers for own in row]
    matrices = [k for own in every for k in (own.input_kernel, own.recurrent_kernel)]
    rows = [jnp.transpose(k, (1, 2, 0)).reshape(-1) for k in matrices]  # (D, G, H) to (G * H, D)
    for own in every:
        bias = jnp.zeros_like(own.recurrent_kernel[0]) if own.bias is None else own.bias
        rows += [bias.reshape(-1), jnp.zeros_like(bias).reshape(-1)]
    return jnp.concatenate(rows)


def _lstm(
    x: Array, h: Array, c: Array, weights: Array, lengths: Array,
    input_size: int, hidden_size: int, num_layers: int, bidirectional: bool, allow_tf32: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The library's call: (outputs, last h, last c); h and c are (layers * directions, B, H)."""
    from jax.experimental import rnn

    # Pinned here: left to itself the backward pass would ask for the policy again, when it is traced.
    precision = lax.Precision.HIGH if allow_tf32 else lax.Precision.HIGHEST
    dropout = 0.0
    sizes = (input_size, hidden_size, num_layers, dropout, bidirectional, precision)
    return rnn.lstm(x, h, c, weights, lengths, *sizes)
