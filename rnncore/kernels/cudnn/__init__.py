"""Backend "cudnn": layers and directions in one call of NVIDIA's library, called as PyTorch calls it.

Platform: CUDA, with cuDNN 9 (it comes with JAX's packages) and a C++ compiler, which compiles the calls once
(`library.py`).  Cells: `rnncore.LSTM`, `GRU` and `Elman` (tanh or relu) with a dense recurrence and the standard
functions.  Dtypes: float32, float16, or bfloat16 (cuDNN 9.13 or newer), of all arrays alike; sums are float32, and
products of float32 numbers TF32 unless `jax.default_matmul_precision` says otherwise.  Which of cuDNN's algorithms runs
is PyTorch's choice (`algorithm.py`), so that the two are of one speed.  Where a persistent one runs both ways, and
there are no lengths, this backend is chosen unasked.

Lengths and any number of batch axes: yes; resets, masks, zoneout, states, chunks: no.  Outputs past the length are
zeros, with zero derivatives, and not what the cell makes of the padding.  Where there are lengths an LSTM, and layers
or directions in one call, take cuDNN's standard algorithm and wait for the device at each call, to read the lengths on
the host: a CUDA graph cannot hold that.  A single GRU or Elman runs over the padding and waits for nothing.

Differentiation: every mode and order.  Reverse mode of first order is cuDNN's; all else runs a scan.  vmap over
sequences makes more of them; where each has parameters, or gradients of them, of its own, one call runs after the
other.  Data that is sharded over devices is gathered to each of them, unless shard_map or an explicit mesh parts it.
Memory besides gradients: what cuDNN asks for, in its persistent algorithms much: 572 MB at work, 126 MB kept for
LSTM(768), T = 1024, B = 16, float16.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array, PyTree
from rnncore.cells.base import CellParams
from rnncore.kernels.cudnn import algorithm, library, weights
from rnncore.kernels.cudnn.calls import Calls, Inputs, Outputs
from rnncore.recurrence import plain
from rnncore.recurrence.backend import GATHERED, LoopBackend, without
from rnncore.recurrence.layers import run_layers
from rnncore.recurrence.run import Differentiable, Problem, Request, Result, dense


class CuDNN(LoopBackend):
    """See the module.

    Of layers the parameters and initial carries are, for each layer, a tuple of those of its directions.
    """

    name = "cudnn"
    opaque = True
    maps_into_batch = True

    def unsupported(self, request: Request) -> str | None:
        refused = weights.why_not(request.cell) or library.missing(request.platform)
        if refused is not None:
            return refused
        if len(request.dtypes) != 1 or request.dtype not in algorithm.DATA:
            got = ", ".join(sorted(request.dtypes))
            return f"it takes float32, float16 or bfloat16, one of them; parameters, inputs and carry are {got}"
        version = library.version(str(library.find()))
        if request.dtype == "bfloat16" and version < library.OLDEST_WITH_BFLOAT16:
            return f"it takes bfloat16 with cuDNN 9.13 or newer, and this one is of version {version}"
        if request.precision not in algorithm.TF32_ALLOWED:
            return f"it multiplies in float32 or TF32, and jax.default_matmul_precision is {request.precision!r}"
        if 0 in request.batch_shape:
            return f"it takes no empty batch, and this one is {request.batch_shape}"
        return without(
            request,
            ("resets", "recurrent_mask", "zoneout", "return_states", "checkpoint_every", "recompute", "residual_dtype"),
            "its call runs all steps and shows the outputs and the last carry only",
        )

    def why_not_by_default(self, request: Request) -> str | None:
        if request.devices > 1:
            return GATHERED
        if request.lengths:
            return "only where it is named: its outputs past the length are zeros"
        # On an H200 4 to 49 times as fast as the scan where these algorithms run both ways.  Else kernels are launched
        # for each step, as the scan's are, and the backward pass takes 1.6 times as long as the scan's.
        if request.dtype == "bfloat16" or algorithm.STANDARD in _algorithms(request, 1, 1):
            return (
                "only where it is named: cuDNN has no persistent algorithm for this, and trains no faster than 'scan'"
            )
        return None

    def prepare(self, request: Request) -> str | None:
        return library.fault()

    def runs_layers(self, request: Request, layers: int, directions: int) -> bool:
        together, apart = _algorithms(request, layers, directions), _algorithms(request, 1, 1)
        return algorithm.STANDARD not in together or algorithm.STANDARD in apart

    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        run = _Run(problem)
        outputs = run.calls.forward(run.inputs, keep)
        return run.result(outputs), run.residuals(outputs) if keep else None

    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        with_params = any(jax.tree.leaves(wanted.params))
        return _Run(problem).cotangents(result, residuals, dense(cotangents, result), with_params)

    def plain(self, problem: Problem) -> Result:
        request, differentiable, constants = problem
        params, starts = _layers(differentiable)
        by_layer = differentiable._replace(params=params, initial_carry=starts)
        carries, ys, *_ = run_layers(plain.run, problem._replace(differentiable=by_layer))
        if constants.lengths is not None:
            ys = jnp.where(_lengths.valid_mask(constants.lengths, request.steps)[..., None], ys, 0)
        return Result(_like(differentiable, carries), ys)

    def plain_tangent(self, problem: Problem, result: Result, tangents: Differentiable) -> Result:
        # Of several layers only the outputs of the last are known.
        return plain.jvp(self.plain, problem, tangents)


def _algorithms(request: Request, layers: int, directions: int) -> tuple[int, int]:
    """Those of the forward and the backward pass of a call."""
    mode = weights.mode(request.cell)
    shape = (request.steps, math.prod(request.batch_shape), request.input_size, request.cell.hidden_size)
    lengths = request.lengths and not _runs_over_padding(mode, layers, directions)
    gpu = algorithm.device()
    forward, backward = (
        algorithm.choose(gpu, mode, request.dtype, shape, layers, directions, lengths, way) for way in (True, False)
    )
    return forward, backward


def _runs_over_padding(mode: int, layers: int, directions: int) -> bool:
    """Whether lengths are none of the library's business: h after a sequence's last step is its output there."""
    return mode != algorithm.LSTM and layers == directions == 1


def _layers(differentiable: Differentiable) -> tuple[Any, Any]:
    """Parameters and initial carries by layer and direction."""
    params, _, start, _ = differentiable
    return (((params,),), ((start,),)) if isinstance(params, CellParams) else (params, start)


def _like(differentiable: Differentiable, by_layer: Any) -> Any:
    """What is by layer and direction, as the caller has the parameters."""
    return by_layer[0][0] if isinstance(differentiable.params, CellParams) else by_layer


class _Residuals(NamedTuple):
    """What a backward call needs of a forward one, in shapes that let vmap put sequences into the batch.

    The reserve is of a whole batch: parted, repeated, or put in another order it is worth nothing.  The other fields
    show whether it is what it was.

    Fields:
      reserve: (1, *batch, bytes for each sequence).
      place: (1, *batch), number of each sequence in the batch.
      whole: (1, *batch, 0, sequences in the batch): by its shape alone.
      y: the library's own outputs, as its backward call wants them; None where the result has them.
    """

    reserve: Array
    place: Array
    whole: Array
    y: Array | None


class _Run:
    """The arrays of a run as the calls have them, with one batch axis, and back."""

    def __init__(self, problem: Problem):
        request, differentiable, constants = problem
        self.request, self.differentiable, self.layers = request, differentiable, _layers(differentiable)[0]
        self.rows, self.hidden = math.prod(request.batch_shape), request.cell.hidden_size
        mode, directions = weights.mode(request.cell), len(self.layers[0])
        self.calls = Calls(mode, directions, request.precision)
        x = differentiable.xs.reshape(request.steps, self.rows, -1)
        self.lengths = None if constants.lengths is None else constants.lengths.reshape(self.rows)
        self.over_padding = _runs_over_padding(mode, len(self.layers), directions)
        asked = jnp.zeros((0,), jnp.int32)
        if self.lengths is not None:
            self.inside = _lengths.valid_mask(self.lengths, request.steps)[..., None]  # (T, B, 1)
            # What stands in the padding is the library's own affair, of the gradients too: none of it gets out.
            x = jnp.where(self.inside, x, 0)
            asked = asked if self.over_padding else jnp.maximum(self.lengths, 1)  # it wants a step of every sequence
        self.start = self.flat(differentiable.initial_carry)
        self.inputs = Inputs(x, *self.start, weights.pack(self.layers), asked)

    def flat(self, carries: Any) -> tuple[Array, Array]:
        """(h, c) of carries, (layers * directions, B, H) each; c is (0,) where there is none."""
        by_layer = ((carries,),) if hasattr(carries, "_fields") else carries
        every = [own for row in by_layer for own in row]
        stacked = {
            f: jnp.stack([getattr(own, f).reshape(self.rows, self.hidden) for own in every]) for f in every[0]._fields
        }
        return stacked["h"], stacked.get("c", jnp.zeros((0,), stacked["h"].dtype))

    def carries(self, h: Array, c: Array) -> Any:
        """The carries of (h, c), as the caller has them."""
        shape, ways = (*self.request.batch_shape, self.hidden), self.calls.directions
        kind = type(_layers(self.differentiable)[1][0][0])
        fields = {"h": h, "c": c}
        every = [kind(*(fields[f][n].reshape(shape) for f in kind._fields)) for n in range(len(h))]
        return _like(self.differentiable, tuple(tuple(every[n : n + ways]) for n in range(0, len(every), ways)))

    def result(self, outputs: Outputs) -> Result:
        """What the library gives, with the meaning that lengths have here."""
        y, h, c, _ = outputs
        if self.lengths is not None:
            if self.over_padding:
                h = _lengths.last_valid(self.start[0][0], y, self.lengths, 0)[None]
            ran = (self.lengths > 0)[:, None]
            h, c = (jnp.where(ran, a, b) if a.size else a for a, b in zip((h, c), self.start, strict=True))
            y = jnp.where(self.inside, y, 0)
        y = y.reshape(self.request.steps, *self.request.batch_shape, -1)
        return Result(self.carries(h, c), y)

    def residuals(self, outputs: Outputs) -> _Residuals:
        """What the backward call needs."""
        batch = (1, *self.request.batch_shape)
        y = None if self.lengths is None else outputs.y.reshape(self.request.steps, *batch[1:], -1)
        place = jnp.arange(self.rows, dtype=jnp.int32).reshape(batch)
        return _Residuals(outputs.reserve.reshape(*batch, -1), place, jnp.zeros((*batch, 0, self.rows), jnp.uint8), y)

    def cotangents(self, result: Result, residuals: _Residuals, cotangents: Result, params: bool) -> Differentiable:
        """Those of what is differentiable, from those of the result; None for the parameters unless they are wanted."""
        shape = self.inputs.x.shape[:2]
        dy = cotangents.outputs.reshape(*shape, -1)
        if residuals.whole.shape[-1] == self.rows:
            reserve = residuals.reserve.reshape(-1)
            y = (result.outputs if residuals.y is None else residuals.y).reshape(*shape, -1)
            in_order = jnp.all(residuals.place.reshape(-1) == jnp.arange(self.rows))
            dy = jnp.where(in_order, dy, jnp.nan)  # nobody gets gradients of another order
        else:  # under vmap of a run that was not, or the other way round
            y, _, _, reserve = self.calls.forward(self.inputs, True)
        dh, dc = dlast = self.flat(cotangents.carry)
        if self.lengths is not None:
            ran = (self.lengths > 0)[:, None]
            dy = jnp.where(self.inside, dy, 0)
            dh, dc = (jnp.where(ran, a, 0) if a.size else a for a in dlast)
            if self.over_padding:
                last = jnp.arange(self.request.steps)[:, None, None] == self.lengths[:, None] - 1
                dy, dh = dy + jnp.where(last, dh, 0), jnp.zeros_like(dh)
        dx, dh, dc, dweights = self.calls.backward(self.inputs, y, reserve, dy, dh, dc, params)
        if self.lengths is not None:
            dx = jnp.where(self.inside, dx, 0)
            dh, dc = (jnp.where(ran, a, b) if a.size else a for a, b in zip((dh, dc), dlast, strict=True))
        dparams: Any = jax.tree.map(lambda _: None, self.differentiable.params)
        if params:
            dparams = _like(self.differentiable, weights.unpack(dweights, self.layers))
        dxs = dx.reshape(self.differentiable.xs.shape)
        return Differentiable(dparams, dxs, self.carries(dh, dc), None)
