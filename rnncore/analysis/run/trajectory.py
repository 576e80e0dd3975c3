"""A run of a cell with everything that its linearisation needs: inputs, every carry, every gate."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._lengths import check_lengths
from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell
from rnncore.layers.recording import widened
from rnncore.sequence.call import unroll


class StepInput(NamedTuple):
    """What a step takes besides the state, where a run has resets or lengths.

    Fields:
      z: the projected input.
      reset: whether the state is reset before the step; None without resets.
      padding: whether the step lies past the end of its sequence; None without lengths.
    """

    z: PyTree
    reset: Array | None
    padding: Array | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "xs", "zs", "carries", "gates", "lengths", "resets", "reset_carry"),
    meta_fields=("cell", "narrow"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Trajectory:
    """A stored run, batch-major; a pytree in which the cell is static.

    Past the end of its sequence a run stands still: inputs and gates are 0 and the carry keeps its last value.

    Fields:
      cell: the cell that ran.
      params: its parameters.
      xs: inputs (*batch, T, D).
      zs: projected inputs (*batch, T, ...).
      carries: T + 1 carries, arrays (*batch, T + 1, ...), the initial one first.
      gates: the gates as the cell returns them, arrays (*batch, T, ...).
      lengths: int32 (*batch), the steps that are not padding; None without padding.
      resets: booleans (*batch, T), True where the carry is reset before the step; None without resets.
      reset_carry: the carry (*batch, ...) that a reset restores; None without resets.
      narrow: the half-precision dtype in which the model was given, the run itself being float32; None otherwise.
    """

    cell: Cell
    params: PyTree
    xs: Array
    zs: PyTree
    carries: Any
    gates: PyTree
    lengths: Array | None = None
    resets: Array | None = None
    reset_carry: Any = None
    narrow: str | None = None

    def __repr__(self) -> str:
        sizes = f"T={self.steps}, D={self.xs.shape[-1]}, H={self.cell.hidden_size}"
        dtype = jax.tree.leaves(self.carries)[0].dtype
        given = f", given in {self.narrow}" if self.narrow else ""
        return f"Trajectory({type(self.cell).__name__}, batch {self.batch_shape}, {sizes}, {dtype}{given})"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes; () for one sequence."""
        return self.xs.shape[:-2]

    @property
    def steps(self) -> int:
        """T."""
        return self.xs.shape[-2]

    @property
    def last(self) -> Any:
        """The carry after the last step of each sequence, at which the loss of an adjoint curve is differentiated."""
        # Past the end of a sequence its carry stays the same, so the last entry holds it.
        return jax.tree.map(
            lambda a: jax.lax.index_in_dim(a, self.steps, len(self.batch_shape), keepdims=False), self.carries
        )

    @property
    def before(self) -> Any:
        """The carry that enters each step, arrays (*batch, T, ...): s_{t-1}, or the reset carry."""
        axis = len(self.batch_shape)
        stored = jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 0, self.steps, axis=axis), self.carries)
        resets = self.resets
        if resets is None:
            return stored
        return jax.tree.map(
            lambda a, b: jnp.where(trailing(resets, a), jnp.expand_dims(b, axis), a), stored, self.reset_carry
        )

    @property
    def padding(self) -> Array | None:
        """Whether a step lies past the end of its sequence, (*batch, T); None without lengths."""
        return None if self.lengths is None else jnp.arange(self.steps) >= self.lengths[..., None]

    @property
    def inputs(self) -> PyTree:
        """What `flat_step` takes besides the state, (*batch, T, ...): zs, or a `StepInput` with resets or lengths."""
        if self.resets is None and self.lengths is None:
            return self.zs
        return StepInput(self.zs, self.resets, self.padding)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of the carry, in the order in which the state vector concatenates them."""
        return self.carries._fields

    def take(self, index: Any) -> Trajectory:
        """Selects sequences and cuts them where the longest of them ends.

        If all of them have the same length, it becomes T and the result has no lengths.

        Args:
          index: anything that indexes an array of the batch shape: an integer, a slice, a list, a tuple of these.

        Returns:
          `Trajectory`.  Inside jit lengths have no values yet, and nothing is cut.

        Raises:
          ValueError: an index that does not fit the batch axes, or selects nothing but empty sequences.

        Example:
          >>> import jax, jax.numpy as jnp, rnncore
          >>> from rnncore import analysis
          >>> cell = rnncore.LSTM(4)
          >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
          >>> run = analysis.trajectory(cell, params, xs, seq_lengths=jnp.array([5, 3]))
          >>> one = run.take(1)
          >>> one.batch_shape, one.steps, one.lengths
          ((), 3, None)
        """
        call = f"Trajectory.take({index!r})"
        try:
            chosen = np.arange(math.prod(self.batch_shape)).reshape(self.batch_shape)[index]
        except IndexError as error:
            raise ValueError(f"`{call}`: the batch axes are {self.batch_shape}; {error}.") from error
        if chosen.size == 0:
            raise ValueError(f"`{call}`: no sequence of the batch axes {self.batch_shape} is left.")
        lead = len(self.batch_shape)

        def pick(a: Array) -> Array:
            return a.reshape(-1, *a.shape[lead:])[chosen.reshape(-1)].reshape(*chosen.shape, *a.shape[lead:])

        parts = {name: jax.tree.map(pick, getattr(self, name)) for name in _BATCHED}
        lengths = parts["lengths"]
        if lengths is not None and not isinstance(lengths, jax.core.Tracer):
            values = np.asarray(lengths)
            if not (most := int(values.max())):
                raise ValueError(f"`{call}`: the sequences have length 0, and a trajectory has at least one step.")
            for name in ("xs", "zs", "carries", "gates", "resets"):
                stop = most + (name == "carries")
                parts[name] = jax.tree.map(
                    lambda a, stop=stop: jax.lax.slice_in_dim(a, 0, stop, axis=chosen.ndim), parts[name]
                )
            if np.all(values == most):
                parts["lengths"] = None
        return dataclasses.replace(self, **parts)


_BATCHED = ("xs", "zs", "carries", "gates", "lengths", "resets", "reset_carry")


def cell_trajectory(
    cell: Cell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
) -> Trajectory:
    """`trajectory` of one cell; see there."""
    xs = jnp.asarray(xs)
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(
            f"`trajectory(xs=<{xs.dtype} {xs.shape}>)`: expected floating point (*batch, T, D); "
            "embed or convert the inputs first."
        )
    narrow = next((a.dtype.name for a in jax.tree.leaves((params, xs, initial_carry)) if _is_narrow(a)), None)
    params, xs, initial_carry, reset_carry = widened((params, xs, initial_carry, reset_carry))
    if xs.ndim >= 2 and xs.shape[-2] == 0:
        raise ValueError(f"`trajectory(xs=<{xs.dtype} {xs.shape}>)`: no steps; expected T of at least 1.")
    padding = None
    if seq_lengths is not None and xs.ndim >= 2:
        seq_lengths = check_lengths(seq_lengths, xs.shape[:-2], xs.shape[-2])
        padding = jnp.arange(xs.shape[-2]) >= seq_lengths[..., None]
        xs = blank(padding, xs)
    starts = (("initial_carry", initial_carry), ("reset_carry", reset_carry))
    for name, tree in (("params", params), ("xs", xs), *starts):
        check_finite(f"trajectory({name}=...)", tree)
    last, _, states = unroll(
        cell, params, xs, initial_carry=initial_carry, seq_lengths=seq_lengths, resets=resets, reset_carry=reset_carry,
        return_states=True, include_initial=True,
    )  # fmt: skip
    carries, gates = states.carries, states.gates
    if padding is not None:
        axis = xs.ndim - 2
        after = jnp.concatenate([jnp.zeros_like(padding[..., :1]), padding], -1)
        carries = jax.tree.map(lambda a, b: jnp.where(trailing(after, a), jnp.expand_dims(b, axis), a), carries, last)
        gates = jax.tree.map(lambda a: blank(padding, a), gates)
        resets = None if resets is None else jnp.asarray(resets) & ~padding
    check_finite("trajectory(...)", carries, "the states leave the floating-point range; shorten or rescale")
    if resets is not None:
        resets = jnp.asarray(resets)
        first = jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, xs.ndim - 2, keepdims=False), carries)
        reset_carry = first if reset_carry is None else jax.tree.map(lambda a, b: b.astype(a.dtype), first, reset_carry)
    return Trajectory(
        cell, params, xs, cell.project(params, xs), carries, gates, seq_lengths, resets, reset_carry, narrow
    )


def _is_narrow(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < 32


def trailing(mask: Array, like: Array) -> Array:
    """A mask with trailing axes added until it has as many as the array it selects from."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def blank(padding: Array, a: Array) -> Array:
    """Zeros in the padding, which may hold NaN."""
    return jnp.where(trailing(padding, a), jnp.zeros_like(a), a)


def check_trajectory(call: str, traj: Any, name: str = "traj") -> None:
    """Refuses all but a trajectory, and says how to get one."""
    if isinstance(traj, Trajectory):
        return
    got, advice = f"<{type(traj).__name__}>", "run the cell first"
    if hasattr(traj, "shape"):
        got = f"<{traj.dtype} {traj.shape}>"
    elif isinstance(traj, dict) and any(isinstance(one, Trajectory) for one in traj.values()):
        got, advice = f"<dict of {', '.join(map(repr, traj))}>", "pass one of the layers of the dict"
    elif isinstance(getattr(traj, "run", None), Trajectory):
        advice = "pass its `.run`"
    raise ValueError(
        f"`{call.partition('(')[0]}({name}={got})`: expected a `Trajectory`, as `trajectory(cell, params, xs)` or "
        f"`trajectory(module, variables, xs)` returns it; {advice}."
    )


def check_finite(call: str, tree: PyTree, advice: str = "find out where they come from first") -> None:
    """Refuses NaN and inf in arrays that are not traced."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            continue
        bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
        if bad:
            raise ValueError(
                f"`{call}`: {jax.tree_util.keystr(path) or 'the array'} of shape {leaf.shape} holds {bad} NaN or "
                f"infinite numbers; {advice}."
            )


def check_takes(call: str, loss: Any, takes: str) -> None:
    """Refuses what is not a function of two arguments, such as "(outputs, batch)", before anything runs."""
    try:
        shape = inspect.signature(loss, follow_wrapped=False)  # a wrapper may pass more than it takes
        shape.bind(None, None)
    except TypeError:
        shown = f"{getattr(loss, '__name__', type(loss).__name__)}{shape}" if callable(loss) else type(loss).__name__
        raise ValueError(f"`{call}(loss=<{shown}>)`: expected a function {takes} to one number.") from None
    except ValueError:  # some functions that are not written in Python have no signature
        pass


def check_loss(call: str, value: Any) -> None:
    """Refuses a loss that is not one number."""
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"`{call}(loss=...)`: it returned <{jnp.result_type(value)} {jnp.shape(value)}>, expected one "
            "floating-point number for the whole batch; sum or average it, or pick one loss term."
        )


def refuse_ragged(traj: Trajectory, call: str) -> None:
    """An error for runs with lengths or resets, where the caller supports neither."""
    check_trajectory(call, traj)
    given = [name for name, a in (("seq_lengths", traj.lengths), ("resets", traj.resets)) if a is not None]
    if given:
        raise NotImplementedError(
            f"`{call}` of a trajectory with {' and '.join(given)}: not supported; take one sequence at its own "
            "length, `traj.take(i)`, and run the pieces between resets separately."
        )
