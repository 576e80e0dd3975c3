"""What the RNN modules of both Flax flavours share.  This file does not import Flax."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _arguments, _lengths, sequence
from rnncore._types import Array, PyTree
from rnncore.cells import Cell, PointwiseCell, pointwise
from rnncore.layers.layer_modules import without
from rnncore.sequence import choices
from rnncore.sequence.call import States


def front(
    name: str, own: types.ModuleType, flax: types.ModuleType
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a module: its own public names, and for all others Flax's."""
    public = sorted({n for module in (own, flax) for n in dir(module) if not n.startswith("_")})

    def __getattr__(asked: str) -> Any:
        if asked.startswith("__") or not hasattr(flax, asked):
            near = "" if asked.startswith("__") else _arguments.nearest(asked, public)
            raise AttributeError(f"module {name!r} has no attribute {asked!r}, nor has {flax.__name__}{near}")
        return getattr(flax, asked)

    return public, __getattr__, lambda: public


def to_core(cell: Any, carry: Any) -> Any:
    """Flax's carry, (c, h) or h, as the functional cell's named tuple."""
    fields = cell.Carry._fields
    if len(fields) == 1:
        if isinstance(carry, tuple | list):
            raise ValueError(
                f"`cell(carry=<{type(carry).__name__} of {len(carry)}>, ...)`: expected one array, {fields[0]}, as "
                "`cell.initialize_carry` makes it."
            )
        return cell.Carry(carry)
    if not isinstance(carry, tuple | list) or len(carry) != len(fields):
        raise ValueError(
            f"`cell(carry=<{type(carry).__name__}>, ...)`: expected the tuple ({', '.join(fields)}), as "
            "`cell.initialize_carry` makes it."
        )
    return cell.Carry(*carry)


def from_core(carry: Any) -> Any:
    """The functional cell's named tuple as Flax's carry, (c, h) or h."""
    return carry[0] if len(carry) == 1 else tuple(carry)


def core_of(kind: type[PointwiseCell], module: Any, size: int) -> PointwiseCell:
    """The functional cell with H = size and the options that a Flax cell has too."""
    taken = {field.name for field in dataclasses.fields(kind)} & {"gate_fn", "activation_fn", "reset_gate", "residual"}
    return kind(size, **{name: getattr(module, name) for name in taken if hasattr(module, name)})


class Call(NamedTuple):
    """A call of an RNN module: its arguments, and where they are None the fields of the module.

    Fields:
      inputs, seq_lengths, resets, reset_carry, return_states, return_carry, time_major, reverse, keep_order: as there.
      carry: the initial one.
      time_axis: of the inputs.
      step_shape: the inputs' shape without time.
    """

    inputs: Array
    carry: Any
    seq_lengths: Any
    resets: Any
    reset_carry: Any
    return_states: bool
    time_axis: int
    step_shape: tuple[int, ...]
    return_carry: bool
    time_major: bool
    reverse: bool
    keep_order: bool


def call_of(
    rnn: Any, inputs: Any, initialize: Callable[[tuple[int, ...]], Any], *, initial_carry: Any = None,
    seq_lengths: Any = None, resets: Any = None, reset_carry: Any = None, return_states: bool = False,
    return_carry: bool | None = None, time_major: bool | None = None, reverse: bool | None = None,
    keep_order: bool | None = None,
) -> Call:  # fmt: skip
    """`Call` of an RNN module, or ValueError; `initialize` makes the carry for inputs of the shape of a step."""
    given = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
    said = {name: getattr(rnn, name) if value is None else value for name, value in given.items()}
    for name, value in said.items():
        _arguments.check_static(
            "RNN(...)(inputs, {}=<{}>)", name, value, f"set it in the module, as RNN(cell, {name}=True)"
        )
    features = rnn.cell.num_feature_axes
    if not hasattr(inputs, "ndim"):
        raise ValueError(
            f"`RNN(cell)(inputs=<{type(inputs).__name__}>)`: expected one array; join several inputs into one, and "
            "give episode boundaries as `resets`."
        )
    _arguments.check_inputs("RNN(cell)", "inputs", inputs)
    if inputs.ndim < features + 1:
        raise ValueError(
            f"`RNN(cell)(inputs=<{inputs.dtype} {inputs.shape}>)`: expected at least {features + 1} axes, time and "
            "features."
        )
    axis = 0 if said["time_major"] else inputs.ndim - features - 1
    step_shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
    carry = initialize(step_shape) if initial_carry is None else initial_carry
    carry = cast(carry, getattr(rnn, "carry_dtype", None))
    reset_carry = _checked_reset_carry(reset_carry, carry, resets)
    return Call(inputs, carry, seq_lengths, resets, reset_carry, return_states, axis, step_shape, **said)


def check_is_cell(cell: Any, flavour: str, example: str) -> None:
    """ValueError unless an RNN module of "linen" or "nnx" is given a cell of that flavour that has been made."""
    if isinstance(cell, type) or not hasattr(type(cell), "initialize_carry"):
        shown = cell.__name__ if isinstance(cell, type) else type(cell).__name__
        why = "an instance and not the class" if isinstance(cell, type) else "of Flax or of this module"
        if isinstance(cell, PointwiseCell):
            why += "; `rnncore.unroll` takes this one"
        raise ValueError(f"`RNN(cell=<{shown}>)`: expected a cell, such as {example}, {why}.")
    other = "nnx" if flavour == "linen" else "linen"
    made_of = {base.__module__.split(".")[1] for base in type(cell).__mro__ if base.__module__.startswith("flax.")}
    if other in made_of and flavour not in made_of:  # a bridge between both has both
        raise ValueError(
            f"`RNN(cell=<{type(cell).__name__}>)`: a cell of {other}, expected one of {flavour}, such as "
            f"{flavour}.{example}."
        )


def check_are_rnns(layer: Any) -> None:
    """ValueError unless a Bidirectional is given two RNN modules."""
    for name in ("forward_rnn", "backward_rnn"):
        rnn = getattr(layer, name)
        if isinstance(rnn, type) or hasattr(type(rnn), "initialize_carry") or not callable(rnn):
            shown = rnn.__name__ if isinstance(rnn, type) else type(rnn).__name__
            why = ", an instance and not the class" if isinstance(rnn, type) else ""
            raise ValueError(f"`Bidirectional({name}=<{shown}>)`: expected an RNN module, such as RNN(cell){why}.")
    if not callable(layer.merge_fn):
        raise ValueError(
            f"`Bidirectional(merge_fn={layer.merge_fn!r})`: expected a function of the outputs of both directions."
        )


def check_dtypes(layer: Any) -> None:
    """ValueError for invalid dtypes of a module."""
    names = ("dtype", "param_dtype", "carry_dtype", "output_dtype")
    _arguments.check_dtypes(type(layer).__name__, {n: getattr(layer, n) for n in names if hasattr(layer, n)})


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The floating point arrays of a tree cast to this dtype, if it is not None."""
    if dtype is None:
        return tree

    def one(a: Any) -> Any:
        return jnp.asarray(a, dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a

    return jax.tree.map(one, tree)


def _checked_reset_carry(reset_carry: Any, carry: Any, resets: Any) -> Any:
    """The carry that resets return to, in the dtypes of the first one; ValueError where it makes no sense."""
    if reset_carry is None:
        return None
    got = "`RNN(cell)(reset_carry=...)`"
    if resets is None:
        raise ValueError(f"{got}: has an effect only with resets.")
    if not pointwise.same_structure(reset_carry, carry) or any(
        jnp.shape(a) != jnp.shape(b) for a, b in zip(jax.tree.leaves(reset_carry), jax.tree.leaves(carry), strict=True)
    ):
        shapes = jax.tree.map(jnp.shape, (reset_carry, carry))
        raise ValueError(f"{got}: has arrays of shapes {shapes[0]}, expected those of the initial carry, {shapes[1]}.")
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), reset_carry, carry)


def result_of(rnn: Any, call: Call, last: Any, outputs: Array, *states: States) -> Any:
    """What an RNN module returns of the last carry, the outputs and, if they were asked for, the states."""
    outputs = cast(outputs, getattr(rnn, "output_dtype", None))
    return without(last, outputs, *states, return_carry=call.return_carry)


class SlowPathWarning(UserWarning):
    """A cell runs under Flax's scan in an `RNN` of rnncore, and the message says what would be faster.

    It is issued once for each class of cells and reason; `warnings.simplefilter("ignore", rnncore.SlowPathWarning)`
    silences it.
    """


class SlowPath(NamedTuple):
    """Why a cell runs under Flax's scan, and what to do about it; None if nothing can be done."""

    reason: str
    remedy: str | None = None


_warned: set[tuple[type, str]] = set()
_silent: contextvars.ContextVar[bool] = contextvars.ContextVar("silent", default=False)
AS_POINTWISE = "write its update as an `rnncore.PointwiseCell` and run that by `rnncore.unroll`"


def unknown_cell(cell: Any, known: Iterable[type], flavour: str) -> SlowPath:
    """For a cell whose equations are not known."""
    reason = f"{type(cell).__name__} is not exactly one of the pointwise cells of rnncore.{flavour} or flax.{flavour}"
    base = next((kind for kind in type(cell).__mro__ if kind in set(known)), None)
    if base is not None:
        name = base.__name__
        return SlowPath(reason, f"pass {name} itself if that is what it computes; else {AS_POINTWISE}")
    return SlowPath(reason, AS_POINTWISE if getattr(cell, "num_feature_axes", None) == 1 else None)


def complex_numbers(cell: Any, inputs: Array, carry: Any) -> SlowPath | None:
    """Of complex inputs, carries, parameters or products, or None: the loops compute in real numbers."""
    dtypes = [inputs.dtype, *map(jnp.result_type, jax.tree.leaves(carry)), cell.dtype, cell.param_dtype]
    if any(dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return SlowPath("its numbers are complex")
    return None


def unfit_functions(cell: Any, core: Callable[[], Cell], size: int, module: type) -> SlowPath | None:
    """Of functions of units that no loop can apply, or None; `core` makes the functional cell with them."""
    functions = [getattr(cell, name) for name in ("gate_fn", "activation_fn") if hasattr(cell, name)]
    for function in functions:
        if isinstance(function, module):
            reason = f"its function {type(function).__name__} is a module"
            return SlowPath(reason, f"give a plain function, or {AS_POINTWISE}")
    if why := pointwise.why_not_static(functions, size):
        return SlowPath(why, "give a function that is made outside of the transformed one, such as jnp.tanh")
    made = core()
    why = pointwise.why_not_elementwise(made) if isinstance(made, PointwiseCell) else None
    return SlowPath(why) if why else None


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """A context in which cells run under Flax's scan without a warning, because the user did not ask for it."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def unroll(rnn: Any, call: Call, core: Cell, params: Any, recompute: str | None = None) -> Any:
    """What the call of an RNN module returns, through `rnncore.unroll`, in Flax's carries and dtypes.

    `recompute` overrides the module's own.
    """
    xs = jnp.asarray(call.inputs, params.input_kernel.dtype)
    start = to_core(core, call.carry)
    with choices.layer(rnn):
        last, outputs, *states = sequence.unroll(
            core, params, xs, initial_carry=start, seq_lengths=call.seq_lengths, resets=call.resets,
            reset_carry=None if call.reset_carry is None else to_core(core, call.reset_carry), reverse=call.reverse,
            keep_order=call.keep_order, time_major=call.time_major, return_states=call.return_states,
            checkpoint_every=rnn.checkpoint_every, recompute=recompute or rnn.recompute, backend=rnn.backend,
        )  # fmt: skip
    outputs = outputs.astype(output_dtype(call, core, params, start, xs.dtype))
    return result_of(rnn, call, from_core(last), outputs, *(s._replace(carries=from_core(s.carries)) for s in states))


def output_dtype(call: Call, core: Cell, params: Any, carry: Any, dtype: Any) -> Any:
    """The dtype of a step's output, also where the carry has another one."""
    x = jax.ShapeDtypeStruct(call.step_shape, dtype)
    return jax.eval_shape(lambda x: core.step(params, carry, core.project(params, x))[1], x).dtype


def scan_cell(rnn: Any, call: Call, name: str, slow: SlowPath, scan: Callable[..., Any]) -> Any:
    """What the call of an RNN module returns with any cell: Flax's scan, with correct lengths.

    Args:
      rnn, call: the module and its call.
      name: of Flax's scan.
      slow: why it is taken.  Options that it does not have are refused, and there is a warning if there is a remedy.
      scan: Flax's scan over the cell: (rnn, step, carry, xs) -> (carry, ys), where step is
        (cell, carry, x) -> (carry, y) and all is time-major.
    """
    _before_scan(rnn, name, slow)
    features, time_axis, carry, resets = rnn.cell.num_feature_axes, call.time_axis, call.carry, call.resets
    xs = jnp.moveaxis(call.inputs, time_axis, 0)
    steps, batch_shape = xs.shape[0], xs.shape[1 : xs.ndim - features]
    lengths = None
    if call.seq_lengths is not None:
        lengths = _lengths.check_lengths(call.seq_lengths, batch_shape, steps)
        flat = xs.reshape(*xs.shape[: xs.ndim - features], math.prod(xs.shape[xs.ndim - features :]))
        xs = _lengths.blank_padding(flat, lengths).reshape(xs.shape)
    if resets is not None:
        resets = jnp.asarray(resets)
        expected = (*batch_shape[:time_axis], steps, *batch_shape[time_axis:])
        if resets.dtype != jnp.bool_ or resets.shape != expected:
            raise ValueError(f"`RNN(cell)(resets=<{resets.dtype} {resets.shape}>)`: expected bool {expected}.")
        resets = jnp.moveaxis(resets, time_axis, 0)
    if call.reverse:
        xs, resets = _lengths.reverse_time((xs, resets), lengths)
    back = carry if call.reset_carry is None else call.reset_carry
    # The last valid carry is part of the loop's carry, so that the carries need not be stacked.
    last = carry if lengths is not None and call.return_carry else None
    if last is not None or resets is not None:
        _check_batch(rnn.cell, carry, batch_shape)

    def step(cell: Any, state: Any, now: Any) -> Any:
        (before, last), (x, reset, t) = state, now
        if reset is not None:
            before = jax.tree.map(
                lambda a, b: jnp.where(reset.reshape(reset.shape + (1,) * (a.ndim - reset.ndim)), a, b), back, before
            )
        new, y = cell(before, x)
        new = _in_dtypes_of(before, new)
        if last is not None:
            assert lengths is not None
            last = _lengths.last_valid(last, jax.tree.map(lambda a: a[None], new), lengths, t)
        return (new, last), (y, new if call.return_states else None)

    # While a backend is explained nothing is compiled, and this scan would become a Python loop.
    with jax.disable_jit(False) if choices.is_recording() else contextlib.nullcontext():
        (end, last), ys = scan(rnn, step, (carry, last), (xs, resets, jnp.arange(steps)))
    if call.reverse and call.keep_order:
        ys = _lengths.reverse_time(ys, lengths)
    outputs, carries = jax.tree.map(lambda a: jnp.moveaxis(a, 0, time_axis), ys)
    states = (States(carries, None),) if call.return_states else ()
    return result_of(rnn, call, end if last is None else last, outputs, *states)


def _before_scan(rnn: Any, scan: str, slow: SlowPath) -> None:
    """Refuses options that Flax's scan does not have, and warns if there is a remedy."""
    cell = type(rnn.cell)
    for name, default in (("checkpoint_every", None), ("recompute", "nothing"), ("backend", None)):
        if getattr(rnn, name) != default:
            raise NotImplementedError(
                f"`RNN({cell.__name__}(...), {name}={getattr(rnn, name)!r})`: this cell runs under {scan}, where "
                f"{name} means nothing, because {slow.reason}. Leave it out, or use a cell of rnncore."
            )
    if choices.is_recording():
        remedies = () if slow.remedy is None else (slow.remedy,)
        with choices.layer(rnn):
            choices.record(choices.BackendChoice(scan, f"Flax's own scan, because {slow.reason}", {}, remedies))
    elif slow.remedy is not None and not _silent.get() and (cell, slow.reason) not in _warned:
        _arguments.warn(
            f"`RNN({cell.__name__}(...))`: runs under {scan}, as in Flax and no faster, because {slow.reason}. To have "
            f"it run in rnncore's loops, {slow.remedy}.",
            SlowPathWarning,
        )
        _warned.add((cell, slow.reason))


def _in_dtypes_of(before: PyTree, new: PyTree) -> PyTree:
    """The new carry in the dtypes of the old one, where both are floating; the scan reports other mismatches."""
    if not pointwise.same_structure(before, new):
        return new

    def one(b: Any, n: Any) -> Any:
        both = jnp.issubdtype(b.dtype, jnp.floating) and jnp.issubdtype(n.dtype, jnp.floating)
        return n.astype(b.dtype) if both else n

    return jax.tree.map(one, before, new)


def _check_batch(cell: Any, carry: Any, batch_shape: tuple[int, ...]) -> None:
    for leaf in jax.tree.leaves(carry):
        if jnp.shape(leaf)[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"`RNN({type(cell).__name__}(...))(seq_lengths or resets)`: the cell's carry has an array of shape "
                f"{jnp.shape(leaf)}, expected the batch axes {batch_shape} in front."
            )


# ------------------------------------------------------------------------------------ both directions


def concatenate(a: Array, b: Array) -> Array:
    """Features of both directions side by side: Flax's default merge."""
    return jnp.concatenate([a, b], axis=-1)


def both_directions(
    layer: Any, inputs: Array, random: Sequence[Mapping[str, Any]], *, initial_carry: Any, seq_lengths: Any,
    return_carry: bool | None, time_major: bool | None, reverse: bool | None,
) -> Any:  # fmt: skip
    """What the call of a Bidirectional returns; `random` is what each child takes for a random initial carry."""
    if reverse:
        raise NotImplementedError(
            "`Bidirectional(...)(inputs, reverse=True)`: both directions are read already; flip the inputs, or swap "
            "forward_rnn and backward_rnn."
        )
    if time_major is None:
        time_major = layer.time_major
        for name in ("forward_rnn", "backward_rnn"):
            if getattr(getattr(layer, name), "time_major", False) and not time_major:
                raise ValueError(
                    f"`Bidirectional({name}=RNN(..., time_major=True), time_major=False)`: the layer would pass its "
                    "batch axis to this child as time; give Bidirectional time_major=True as well."
                )
    if layer.forward_rnn is layer.backward_rnn:
        _arguments.warn(
            "`Bidirectional(forward_rnn, backward_rnn)`: both are the same object, so they share parameters."
        )
    starts = (None, None) if initial_carry is None else initial_carry
    ways = ((layer.forward_rnn, {"reverse": False}), (layer.backward_rnn, {"reverse": True, "keep_order": True}))
    carries, outputs = zip(
        *(
            rnn(
                inputs, initial_carry=start, seq_lengths=seq_lengths, return_carry=True, time_major=time_major,
                **given, **order,
            )
            for (rnn, order), start, given in zip(ways, starts, random, strict=True)
        ),
        strict=True,
    )  # fmt: skip
    merged = jax.tree.map(layer.merge_fn, *outputs)
    return without(carries, merged, return_carry=layer.return_carry if return_carry is None else return_carry)
