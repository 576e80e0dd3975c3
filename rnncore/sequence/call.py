"""unroll: run a cell over a sequence.  Checks once, converts to time-major, chooses a backend, calls it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from rnncore import _arguments, _compat, _lengths
from rnncore._types import Array, PyTree, exportable
from rnncore.cells import linear_state, pointwise, structured_kernels
from rnncore.cells.base import Cell, GatedCell, PointwiseCell
from rnncore.recurrence.backend import Backend, LoopBackend
from rnncore.recurrence.run import Constants, Differentiable, Problem, Request, Result
from rnncore.sequence import checks as _checks
from rnncore.sequence import choices, translated
from rnncore.sequence.backends import BACKENDS
from rnncore.sequence.choices import BackendChoice as BackendChoice
from rnncore.sequence.choices import BackendChoices

RECOMPUTE = ("nothing", "gates", "chunk")


@exportable
class States(NamedTuple):
    """The inner states of a run, with the time axis where the input has it.

    Fields:
      carries: the carry after every step; with `include_initial` T + 1 of them, the initial one first.
      gates: what the cell calls its gates, at every step.
    """

    carries: Any
    gates: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where time lies and which way it runs."""

    time_major: bool = False
    reverse: bool = False
    keep_order: bool = False
    include_initial: bool = False


class Options(NamedTuple):
    """The options of `unroll`, see there."""

    initial_carry: Any = None
    seq_lengths: Any = None
    resets: Any = None
    reset_carry: Any = None
    recurrent_mask: Any = None
    zoneout: Any = None
    reverse: bool = False
    keep_order: bool = False
    time_major: bool = False
    return_states: bool = False
    include_initial: bool = False
    checkpoint_every: int | None = None
    recompute: str = "nothing"
    residual_dtype: Any = None
    backend: str | None = None


class OptionsDict(TypedDict, total=False):
    """`Options` as keyword arguments, but for `return_states`, which says what is returned."""

    initial_carry: Any
    seq_lengths: Any
    resets: Any
    reset_carry: Any
    recurrent_mask: Any
    zoneout: Any
    reverse: bool
    keep_order: bool
    time_major: bool
    include_initial: bool
    checkpoint_every: int | None
    recompute: str
    residual_dtype: Any
    backend: str | None


@overload
def unroll(
    cell: Cell, params: PyTree, xs: Array, *, return_states: Literal[False] = False, **options: Unpack[OptionsDict]
) -> tuple[Any, Array]: ...


@overload
def unroll(
    cell: Cell, params: PyTree, xs: Array, *, return_states: Literal[True], **options: Unpack[OptionsDict]
) -> tuple[Any, Array, States]: ...


@overload
def unroll(
    cell: Cell, params: PyTree, xs: Array, *, return_states: bool, **options: Unpack[OptionsDict]
) -> tuple[Any, Array] | tuple[Any, Array, States]: ...


def unroll(
    cell: Cell,
    params: PyTree,
    xs: Array = None,  # type: ignore[assignment]
    *,
    initial_carry: Any = None,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
    recurrent_mask: Any = None,
    zoneout: Any = None,
    reverse: bool = False,
    keep_order: bool = False,
    time_major: bool = False,
    return_states: bool = False,
    include_initial: bool = False,
    checkpoint_every: int | None = None,
    recompute: str = "nothing",
    residual_dtype: Any = None,
    backend: str | None = None,
    **removed: Any,
) -> tuple[Any, Array] | tuple[Any, Array, States]:
    """Runs a cell over time.

    s_t = update(params, s_{t-1}, project(params, x_t)),   y_t = output(s_t),   s_0 = initial_carry

    Args:
      cell: the description of the cell.
      params: its parameters, as `cell.init` makes them.
      xs: inputs (*batch, T, D), or (T, *batch, D) with `time_major`; any number of batch axes, none
        too; floating point.
      initial_carry: carry of (*batch, H) arrays in the structure of `cell.initial_carry`; zeros by
        default.  Its dtypes are those of the carry throughout.
      seq_lengths: integers (*batch), 0 to T.  The returned carry is the one after step length - 1,
        the initial one where the length is 0.  Outputs past the length go on from the padding, as in
        Flax (backend "cudnn": they are zeros); NaN and inf in the padding count as 0.  Outside jit
        values out of range are an error; inside jit they cannot be seen: a negative length then acts as 0,
        one above T as T.  Finite padding is run as it is: if it overflows the state, gradients can still
        become NaN.
      resets: booleans of the shape of xs without D.  Where True the carry returns to `reset_carry`
        before that step (the first of an episode); in the order of processing.
      reset_carry: the carry that resets return to; the initial carry by default.  Give it where the
        initial carry is what an earlier piece of the same stream ended with.
      recurrent_mask: (*batch, H), multiplies h_{t-1} where it enters the recurrent product, the same at
        every step: a scaled dropout mask gives variational dropout.  A constant to derivatives.
      zoneout: how much of the old carry is kept: the carry's named tuple with, for each field, None, a number
        (the share that is kept, s = share s_{t-1} + (1 - share) update), or an array of xs's shape with H
        in D's place, of shares or of booleans (where True the unit keeps its value).  A constant to
        derivatives.  For an LSTM h is formed from the new c before zoneout, as in its paper.
      reverse: run from the last step to the first; with lengths, from the last valid one.
      keep_order: with `reverse`, outputs and states in the order of the inputs and not of processing.
      time_major: the time axis is the first one, of inputs, resets, outputs and states.
      return_states: also return every carry and every gate.
      include_initial: with `return_states`, the carries start with the initial one.
      checkpoint_every: K, steps to a chunk of the outer of two levels of loops.  A chunk projects its
        inputs, runs, and sums its weight gradients.  None: the backend chooses, with `recompute` about
        sqrt(T).
      recompute: what reverse mode recomputes: "nothing", all carries and gates are kept; "gates",
        the carries are kept, the projected inputs and gates are two products more; "chunk", only the
        carry of every K-th step is kept and the chunk runs again.  On the scan the temporary memory of a
        gradient step is, in arrays of T x B x H and besides gradients of inputs and outputs, at most

          "nothing"  1 + R + 5 G K/T             R: what a step's derivative needs; LSTM 5, GRU 4, MGU 3, Elman 1
          "gates"    F + (5 G + R) K/T           F: fields of the carry; LSTM 2, the others 1
          "chunk"    1 + F/K + (5 G + R) K/T     G: gates

        plus terms that do not grow with T: at B = 64, T = 1024, D = H = 256 an LSTM takes 6.1, 2.6 and 1.3 arrays, and
        flax.linen's 16.  "cpp" keeps less, see docs/cpp.md.
      residual_dtype: dtype in which what the derivative needs is stored, bfloat16 for half of R; None stores it
        as it is.  It saves memory traffic on GPUs; gradients are then as accurate as that dtype.
      backend: name of a backend, which then runs or raises; None chooses one, see `explain_backend`.  "scan"
        and "autodiff" run everywhere.  "cpp" compiles any pointwise cell for this machine's CPU and is fastest there;
        "cuda" compiles it for an NVIDIA GPU, as one kernel; "mosaic_gpu" (Hopper GPUs, 16 bits) and "pallas_tpu" are
        kernels by Pallas; "cudnn" is NVIDIA's library, for plain LSTMs, GRUs and Elman networks;
        "associative_scan" runs all steps at once, of cells with a linear state.

    Returns:
      (carry, outputs), or (carry, outputs, States) with `return_states`.  The carry has no time axis,
      outputs are (*batch, T, H), or (T, *batch, H) with `time_major`.

    Raises:
      ValueError: invalid shapes, dtypes, lengths or options.
      NotImplementedError: the named backend cannot do this; the message says why.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.LSTM(hidden_size=8, forget_bias=1.0)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> carry, ys = rnncore.unroll(cell, params, jnp.ones((2, 5, 3)), seq_lengths=jnp.array([5, 0]))
      >>> ys.shape, carry.c.shape, float(jnp.abs(carry.h[1]).max())
      ((2, 5, 8), (2, 8), 0.0)

    Source: the two-level scan is that of Chen et al. (2016), arXiv:1604.06174; variational dropout Gal
    and Ghahramani (2016), arXiv:1512.05287; zoneout Krueger et al. (2017), arXiv:1606.01305.  flax.linen.RNN takes
    one batch axis with lengths and returns a padded step's carry for length 0; torch.nn.LSTM returns
    (outputs, (h, c)) and wants packed sequences.
    """
    _checks.refuse_removed("unroll", removed, Options._fields)
    _checks.check_cell("unroll", cell)
    _checks.check_arguments("unroll", "cell", params, xs)
    options = Options(
        initial_carry, seq_lengths, resets, reset_carry, recurrent_mask, zoneout, reverse, keep_order, time_major,
        return_states, include_initial, checkpoint_every, recompute, residual_dtype, backend,
    )  # fmt: skip
    request, layout, arrays = _prepare(cell, params, xs, options)
    inside = translated.inside(request, params, options)
    if inside is not None:
        return inside.outside(params, options, *unroll(inside.cell, inside.params, xs, **inside.options))
    if choices.is_recording():
        choices.record(choose(request, backend))
        carry, outputs, states = choices.zeros_like(_run, request, layout, BACKENDS["autodiff"], *arrays)
    else:
        choice = choose(request, backend, prepare=True)
        carry, outputs, states = _run(request, layout, BACKENDS[choice.name], *arrays)
    return (carry, outputs, states) if return_states else (carry, outputs)


@overload
def explain_backend(
    cell: Cell, params: PyTree, xs: Any = None, *, return_states: bool = False, **options: Unpack[OptionsDict]
) -> BackendChoice: ...


@overload
def explain_backend(cell: Any, params: PyTree, xs: Any = None, *inputs: Any, **options: Any) -> BackendChoices: ...


def explain_backend(
    cell: Any, params: PyTree, xs: Any = None, *inputs: Any, **options: Any
) -> BackendChoice | BackendChoices:
    """Which backend a call uses, why, why not the others, and what would be faster on this machine.

    In one of three forms; nothing is run:

      explain_backend(cell, params, xs, **options)            as `unroll`
      explain_backend(module, variables, inputs, **options)   as `module.apply` of a linen model
      explain_backend(module, inputs, **options)              as the call of an nnx model

    Args:
      cell, params, xs, options: as in the call to explain; arrays may be `jax.ShapeDtypeStruct`s.  A module
        is an `RNN`, `Bidirectional` or layer of `rnncore.linen` or `rnncore.nnx`, or a model of such.
      inputs: more arguments of a module.

    Returns:
      `BackendChoice`, which prints as a report; of a module `BackendChoices`, one by the name of each recurrent layer.
      A layer whose cell runs under Flax's scan reports that as its backend, with the reason and, if there is one,
      a remedy.

    Raises:
      As the call itself does.  ValueError for a module without a recurrent layer of rnncore.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> cell = rnncore.ResetBeforeGRU(8)
      >>> print(rnncore.explain_backend(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3))))
      backend 'autodiff': the first that can serve this call
      not 'mosaic_gpu': ResetBeforeGRU is not a PointwiseCell, so no kernel can be made of its pointwise update
      not 'cuda': ResetBeforeGRU is not a PointwiseCell, so no kernel can be made of its pointwise update
      not 'pallas_tpu': ResetBeforeGRU is not a PointwiseCell, so no kernel can be made of its pointwise update
      not 'cudnn': cuDNN has rnncore.LSTM, GRU and Elman, and ResetBeforeGRU is none of them
      not 'associative_scan': the state of ResetBeforeGRU is not linear in its past
      not 'cpp': ResetBeforeGRU is not a PointwiseCell, so no loop can be made of its pointwise update
      not 'scan': ResetBeforeGRU is not a PointwiseCell, so its derivative rules cannot be derived
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), backend="scan")
      >>> rnncore.explain_backend(layer, jnp.ones((2, 5, 3)))["RNN"].reason
      'named by the caller'
    """
    explain = choices.explainer(cell)
    if explain is not None:
        return explain(cell, params, *(() if xs is None else (xs,)), *inputs, **options)
    unknown = {name: options[name] for name in options if name not in Options._fields}
    _checks.refuse_removed("explain_backend", unknown, Options._fields)
    if inputs:
        raise TypeError(f"`explain_backend(cell, params, xs, {len(inputs)} more)`: expected options by their names.")
    _checks.check_cell("unroll", cell)
    _checks.check_arguments("explain_backend", "cell", params, xs)
    asked = Options(**options)
    request = _prepare(cell, params, xs, asked)[0]
    inside = translated.inside(request, params, asked)
    if inside is not None:
        return explain_backend(inside.cell, inside.params, xs, **inside.options)
    return choose(request, asked.backend)


def choose(request: Request, backend: str | None, prepare: bool = False) -> BackendChoice:
    """The named backend, or the first that can serve the request; `prepare`: it is about to run."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"`unroll(backend={backend!r})`: unknown; expected one of {', '.join(BACKENDS)}, or None.")
    reasons = {name: _why_not(module, request) for name, module in BACKENDS.items()}
    if all(reasons.values()):
        every = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise NotImplementedError(f"`unroll({type(request.cell).__name__}, ...)`: no backend can do this: {every}.")
    if backend is not None:
        if reasons[backend] is not None:
            raise NotImplementedError(
                f"`unroll(backend={backend!r})`: {reasons[backend]}. Use backend=None to let rnncore choose."
            )
        others = {name: why or "another one was named" for name, why in reasons.items() if name != backend}
        about = None if prepare else BACKENDS[backend].describe(request)
        return BackendChoice(backend, f"named by the caller; {about}" if about else "named by the caller", others)
    reasons = {name: why or BACKENDS[name].why_not_by_default(request) for name, why in reasons.items()}
    for name in reasons:
        if prepare and reasons[name] is None:
            reasons[name] = BACKENDS[name].prepare(request)
        if reasons[name] is None:
            break
    others = {other: why or f"{name!r} comes first" for other, why in reasons.items() if other != name}
    if prepare:
        return BackendChoice(name, "the first that can serve this call", others)
    preferred = itertools.takewhile(lambda other: other != name, BACKENDS)
    remedies = (BACKENDS[other].remedy(request) for other in preferred)
    return BackendChoice(name, "the first that can serve this call", others, tuple(filter(None, remedies)))


def _why_not(backend: Backend, request: Request) -> str | None:
    """Reason why a backend cannot serve the request, or None."""
    cell = request.cell
    if isinstance(backend, LoopBackend) and isinstance(cell, GatedCell) and pointwise.has_caught_traced(cell):
        return (
            f"the update of {type(cell).__name__} uses a value from outside that is being differentiated, mapped or "
            "compiled, which its derivative rules do not see; declare it in `units`"
        )
    if request.symbolic and not backend.takes_symbolic:
        return "its loop is made for shapes that are numbers, and this call has symbolic ones"
    return backend.unsupported(request)


def _takes_own_product(backend: str | None, cell: Cell) -> bool:
    """Whether the cell's own product is the best way to run it, and what runs takes it: on a GPU none is faster."""
    if not structured_kernels.prefers_own_product(cell):
        return False
    if backend is None:
        return jax.default_backend() == "cpu"
    assert isinstance(cell, GatedCell)
    return backend in BACKENDS and BACKENDS[backend].takes_product(cell.recurrence)


def _prepare(cell: Cell, params: PyTree, xs: Any, options: Options) -> tuple[Request, Layout, tuple[Any, ...]]:
    """All checks of a call, in one place."""
    initial_carry, seq_lengths, resets, reset_carry, recurrent_mask, zoneout = options[:6]
    layout = Layout(options.time_major, options.reverse, options.keep_order, options.include_initial)
    for name, value in vars(layout).items():
        _arguments.check_static("unroll({}=<{}>)", name, value, "pass it as a Python value")
    checkpoint_every, recompute, residual_dtype = options.checkpoint_every, options.recompute, options.residual_dtype
    _arguments.check_inputs("unroll", "xs", xs)
    if not isinstance(xs, jax.ShapeDtypeStruct):
        xs = jnp.asarray(xs)
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(f"`unroll(xs=<{xs.dtype} {xs.shape}>)`: expected floating point; embed or convert it first.")
    if xs.ndim < 2:
        raise ValueError(f"`unroll(xs=<{xs.dtype} {xs.shape}>)`: expected (*batch, T, D), at least two axes.")
    time_axis = 0 if layout.time_major else xs.ndim - 2
    steps, batch_shape = xs.shape[time_axis], xs.shape[: xs.ndim - 2] if not layout.time_major else xs.shape[1:-1]
    if recompute not in RECOMPUTE:
        raise ValueError(f"`unroll(recompute={recompute!r})`: expected one of {', '.join(map(repr, RECOMPUTE))}.")
    if checkpoint_every is not None and (not isinstance(checkpoint_every, int | np.integer) or checkpoint_every < 1):
        raise ValueError(f"`unroll(checkpoint_every={checkpoint_every!r})`: expected at least 1 step, or None.")
    _arguments.check_dtypes("unroll", {"residual_dtype": residual_dtype}, jnp.floating)
    if layout.include_initial and not options.return_states:
        raise ValueError("`unroll(include_initial=True)`: has an effect only with return_states=True.")
    if layout.keep_order and layout.include_initial and layout.reverse and seq_lengths is not None:
        raise ValueError(
            "`unroll(include_initial=True, keep_order=True, reverse=True, seq_lengths=...)`: the initial carry has no "
            "place of its own in that order; use keep_order=False."
        )
    _checks.check_symbolic(xs, steps, checkpoint_every=checkpoint_every, recompute=recompute)
    if isinstance(cell, PointwiseCell):
        pointwise.check_elementwise(cell)
    _checks.check_params(cell, params, xs)
    linear = linear_state.linear_fields(cell)
    if not _takes_own_product(options.backend, cell):
        cell, params = structured_kernels.plain(cell, params)
    z = jax.eval_shape(cell.project, params, jax.ShapeDtypeStruct(xs.shape[-1:], xs.dtype))
    dtype = jax.tree.leaves(z)[0].dtype
    for name, carry in (("initial_carry", initial_carry), ("reset_carry", reset_carry)):
        if carry is not None:
            _checks.check_carry(name, cell, carry, batch_shape, dtype)
    if reset_carry is not None and resets is None:
        raise ValueError("`unroll(reset_carry=...)`: has an effect only with resets.")
    if seq_lengths is not None:
        seq_lengths = _lengths.check_lengths(seq_lengths, batch_shape, steps)
    if resets is not None:
        resets = _checks.check_resets(resets, xs.shape[:-1])
    if recurrent_mask is not None:
        recurrent_mask = _checks.check_mask(recurrent_mask, (*batch_shape, cell.output_size))
    if zoneout is not None:
        zoneout = _checks.check_zoneout(cell, zoneout, xs.shape[:-1])
    request = Request(
        cell=cell, steps=steps, batch_shape=batch_shape, input_size=xs.shape[-1], dtype=dtype.name,
        dtypes=frozenset(jnp.result_type(a).name for a in jax.tree.leaves((params, xs, initial_carry))),
        precision=_compat.matmul_precision(), platform=jax.default_backend(), devices=jax.device_count(),
        lengths=seq_lengths is not None, resets=resets is not None, recurrent_mask=recurrent_mask is not None,
        zoneout=zoneout is not None, return_states=options.return_states, checkpoint_every=checkpoint_every,
        recompute=recompute, residual_dtype=None if residual_dtype is None else jnp.dtype(residual_dtype).name,
        linear=linear,
    )  # fmt: skip
    differentiable = Differentiable(params, xs, initial_carry, reset_carry)
    return request, layout, (differentiable, Constants(seq_lengths, resets, recurrent_mask, zoneout))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    request: Request, layout: Layout, backend: Backend, differentiable: Differentiable, constants: Constants
) -> tuple[Any, Array, States | None]:
    """The run, in processing order and, where the backend requires it, time-major."""
    cell = request.cell
    params, xs, carry, reset_carry = differentiable
    lengths, resets, mask, zoneout = constants
    if not layout.time_major and not layout.reverse and request.steps and backend.keeps_time_axis:
        request = dataclasses.replace(request, time_axis=len(request.batch_shape))
    axis = request.time_axis
    if not layout.time_major:
        xs = jnp.moveaxis(xs, -2, axis)
        resets = None if resets is None else jnp.moveaxis(resets, -1, 0)
        zoneout = jax.tree.map(lambda z: jnp.moveaxis(z, -2, 0) if z.ndim else z, zoneout)
    if carry is None:
        carry = cell.initial_carry(request.batch_shape, request.dtype)
    if lengths is not None:
        xs = _lengths.blank_padding(xs, lengths, axis)
    if layout.reverse:
        xs, resets = _lengths.reverse_time((xs, resets), lengths)
        zoneout = jax.tree.map(lambda z: _lengths.reverse_time(z, lengths) if z.ndim else z, zoneout)
    if reset_carry is not None:
        reset_carry = jax.tree.map(lambda a, c: jnp.asarray(a, c.dtype), reset_carry, carry)
    elif resets is not None:
        reset_carry = carry
    mask, zoneout = jax.lax.stop_gradient((mask, zoneout))
    differentiable, constants = _follow(
        Differentiable(params, xs, carry, reset_carry), Constants(lengths, resets, mask, zoneout), axis
    )
    if request.steps == 0:
        result = _empty(cell, differentiable)
    else:
        result = backend.run(Problem(request, differentiable, constants))
    last, outputs, states = result.carry, result.outputs, States(result.carries, result.gates)

    if layout.reverse and layout.keep_order:
        outputs, states = _lengths.reverse_time((outputs, states), lengths)
    if request.return_states and layout.include_initial:
        first = jax.tree.map(lambda a: a[None], differentiable.initial_carry)
        pair = (states.carries, first) if layout.reverse and layout.keep_order else (first, states.carries)
        states = states._replace(carries=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair))
    if not layout.time_major:
        outputs = jnp.moveaxis(outputs, axis, len(request.batch_shape))
        states = jax.tree.map(lambda a: jnp.moveaxis(a, 0, len(request.batch_shape)), states)
    return last, outputs, states if request.return_states else None


def _follow(differentiable: Differentiable, constants: Constants, axis: int) -> tuple[Differentiable, Constants]:
    """Parameters and carries marked as varying over the devices that the data varies over.

    Inside shard_map this puts the sum of the parameters' gradients over devices outside the loop.
    """
    both = differentiable._replace(params=None), constants
    axes = frozenset().union(*map(_compat.varying_axes, jax.tree.leaves(both)))
    differentiable, constants = jax.tree.map(lambda a: _compat.vary_over(a, axes), (differentiable, constants))
    xs, zoneout = differentiable.xs, constants.zoneout
    if not xs.shape[axis]:
        return differentiable, constants
    # With an explicit mesh zeros of the data's sharding bring the carries and selections to it.
    like = jnp.moveaxis(jnp.zeros_like(xs[..., :1]), axis, 0)
    carries = jax.tree.map(lambda a: a + like[0].astype(a.dtype), differentiable[2:])
    zoneout = jax.tree.map(lambda z: z | like.astype(bool) if z.ndim and z.dtype == jnp.bool_ else z, zoneout)
    return Differentiable(differentiable.params, xs, *carries), constants._replace(zoneout=zoneout)


def _empty(cell: Cell, differentiable: Differentiable) -> Result:
    """The result of a run without steps."""
    params, xs, carry, _ = differentiable
    x = jnp.zeros(xs.shape[1:], xs.dtype)
    new, gates = jax.eval_shape(lambda: cell.update(params, carry, cell.project(params, x)))
    stack = functools.partial(jax.tree.map, lambda a: jnp.zeros((0, *a.shape), a.dtype))
    y = cell.output(carry)
    return Result(carry, jnp.zeros((0, *y.shape), y.dtype), stack(new), stack(gates))
