"""One step of a recurrence, with all options of a run, and its linearisation.

  s_{t-1} = reset_carry where resets_t,   r_t = U (recurrent_mask h_{t-1}),
  s_t = zoneout_t s_{t-1} + (1 - zoneout_t) update(p, x_t, r_t, s_{t-1})

`advance` is the one implementation of this for loops that are written in JAX; the tangent and the transposed step are
derived from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import CellParams, GatedCell
from rnncore.recurrence.run import Constants, Problem, Request

# ------------------------------------------------------------------------------- what a run does to a step


def reset(resets: Array | None, reset_carry: Any, carry: Any) -> Any:
    """The carry that a step begins with; resets (*batch, 1), or with time in front as the carries have it."""
    if resets is None:
        return carry
    return jax.tree.map(lambda a, b: jnp.where(resets, jnp.broadcast_to(a, b.shape), b), reset_carry, carry)


def masked(recurrent_mask: Array | None, h: Array) -> Array:
    """h as it enters the recurrent product."""
    return h if recurrent_mask is None else h * jnp.broadcast_to(recurrent_mask.astype(h.dtype), h.shape)


def blend(zoneout: Any, old: Any, new: Any) -> Any:
    """The new carry in the old one's dtypes, with the old one where or as far as it stays; linear in both."""
    new = jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)
    if zoneout is None:
        return new

    def one(z: Any, o: Array, n: Array) -> Array:
        if z is None:
            return n
        if z.dtype == jnp.bool_:
            return jnp.where(z, o, n)
        z = z.astype(n.dtype)
        return z * o + (1 - z) * n

    return type(new)(*map(one, zoneout, old, new))


def at_end(here: Array, new: Any, last: Any) -> Any:
    """The last carry of each sequence: the new one where `here` (*batch) says that its length ends here."""
    return jax.tree.map(lambda a, b: jnp.where(here[..., None], a, b), new, last)


def per_step(request: Request, constants: Constants) -> tuple[Array | None, Any]:
    """(resets (T, *batch, 1), zoneout of arrays (T, ...)) to be read step by step."""
    every = (request.steps,) + (1,) * (len(request.batch_shape) + 1)
    resets = None if constants.resets is None else constants.resets[..., None]
    return resets, jax.tree.map(lambda z: z if z.ndim else jnp.broadcast_to(z, every), constants.zoneout)


# ------------------------------------------------------------------------------------------ the recurrence


class Inputs(NamedTuple):
    """What a recurrence runs on.

    Fields:
      recurrent_params: the parameters of the recurrent product.
      units: per-unit parameters, broadcast to (*batch, H).
      xs: pytree of (T, *batch, ...) per-step inputs.
      initial_carry: the carry before the first step.
      reset_carry: the carry that a reset returns to; None without resets.
      resets: (T, *batch, 1) booleans; None without resets.
      recurrent_mask: (*batch, H), or None; a constant.
      zoneout: a carry of (T, *batch, H) arrays or None, or None; a constant.
    """

    recurrent_params: PyTree
    units: PyTree
    xs: PyTree
    initial_carry: Any
    reset_carry: Any
    resets: Array | None = None
    recurrent_mask: Array | None = None
    zoneout: Any = None


def _same(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


@dataclasses.dataclass(frozen=True)
class Step:
    """The elementwise part of a step.

    Fields:
      update: (units, x_t, rest_t, s_{t-1}) -> (s_t, emitted), on an x with the recurrent product in it.
      add_recurrent: (x, r) -> (x, rest): adds to x the part of r that matters only as a sum with it, so that one array
        stands for both; `rest` is the part that stays apart, None where there is none.  Linear, and the same for one
        step and for all steps at once.
      carries: whether every carry is emitted too, and not its h alone.
      join: x -> the form in which its tangents travel; linear.  A loop reads x gate by gate, which on a CPU halves its
        time (XLA does not vectorise a slice of a slice), and its transpose writes one slab.
      add_joined: `add_recurrent` of an x so joined.
      part: (joined x, its rest) -> (x, rest).
    """

    update: Callable
    add_recurrent: Callable
    carries: bool = False
    join: Callable = _same
    add_joined: Callable | None = None
    part: Callable = _same

    def add_to_tangent(self, x: Any, r: Any) -> Any:
        """`add_recurrent` of a tangent of x."""
        return (self.add_joined or self.add_recurrent)(x, r)


@dataclasses.dataclass(frozen=True)
class RecurrentProduct:
    """The recurrent product and its derivative.

    Fields:
      product: (recurrent_params, h) -> r, linear in h.
      tangent_product: (tangent_params, dh) -> dr: what `product` does to a change of h, the same as to h itself.
      tangent_params: recurrent_params -> tangent_params: laid out so that the transpose is fast.
    """

    product: Callable
    tangent_product: Callable
    tangent_params: Callable

    def of_change(self, params: PyTree, dparams: PyTree, h: Array) -> Array:
        """What a change of the parameters does to r: linear in the change, a product or two for any number of steps."""
        return jax.jvp(lambda params: self.product(params, h), (params,), (dparams,))[1]

    @property
    def with_tangent_params(self) -> RecurrentProduct:
        """The same product of (recurrent_params, tangent_params), both formed once for a loop over chunks."""
        return RecurrentProduct(lambda both, h: self.product(both[0], h), self.tangent_product, lambda both: both[1])

    @property
    def tangent(self) -> RecurrentProduct:
        """That of the tangent recurrence, which is its own tangent."""
        return RecurrentProduct(self.tangent_product, self.tangent_product, lambda params: params)


def advance(step: Step, product: RecurrentProduct, now: Inputs, carry: Any) -> tuple[Any, Any]:
    """One step of inputs of one step: (s_t, emitted)."""
    carry = reset(now.resets, now.reset_carry, carry)
    h = masked(now.recurrent_mask, carry.h)
    x, rest = step.add_recurrent(now.xs, product.product(now.recurrent_params, h))
    new, emitted = step.update(now.units, x, rest, carry)
    return blend(now.zoneout, carry, new), emitted


# ------------------------------------------------------------------------------------------ of a gated cell


def recurrent_params(params: CellParams) -> CellParams:
    """What the recurrent product reads."""
    return CellParams(None, params.recurrent_kernel, None, params.recurrent_bias, ())  # type: ignore[arg-type]


def input_params(cell: GatedCell, params: CellParams) -> CellParams:
    """What the projection of the inputs reads: units too, where it is the cell's own."""
    units = () if type(cell).project is GatedCell.project else params.units
    return CellParams(params.input_kernel, None, params.bias, None, units)  # type: ignore[arg-type]


def spread_units(params: CellParams, like: Array) -> Any:
    """Per-unit parameters for every sequence."""
    return jax.tree.map(lambda u: jnp.broadcast_to(u, like.shape), params.units)


def recurrent_product(cell: GatedCell) -> RecurrentProduct:
    return RecurrentProduct(
        cell.recurrent_matmul,
        lambda kernel, h: cell.recurrence.matmul_transposed(kernel, h.astype(kernel.dtype)),
        lambda params: cell.recurrence.transposed(params.recurrent_kernel),
    )


def of(problem: Problem) -> Step:
    """The update of the cell as a step, which reads its inputs gate by gate."""
    request, (params, xs, carry, _), _ = problem
    cell = request.cell
    assert isinstance(cell, GatedCell)
    z = cell.project(params, jnp.take(xs, 0, request.time_axis))
    r, units = cell.recurrent_matmul(params, carry.h), spread_units(params, carry.h)
    additive = pointwise.additive_gates(cell, units, cell.split(z), cell.split(r), carry)

    def update(units: Any, zs: Any, rest: Any, carry: Any) -> Any:
        apart = iter(rest or ())
        rs = cell.Gates(*(jnp.zeros_like(zg) if a else next(apart) for zg, a in zip(zs, additive, strict=True)))
        new, gates = cell.combine(units, zs, rs, carry)
        return new, gates if request.return_states else None

    def add_recurrent(zs: Any, r: Array) -> Any:
        """Gates that see only z + r take r into z; the others keep theirs apart."""
        pairs = list(zip(zs, cell.split(r), additive, strict=True))
        sums = cell.Gates(*(zg + rg if a else zg for zg, rg, a in pairs))
        return sums, tuple(rg for _, rg, a in pairs if not a) or None

    def join(zs: Any) -> Array:
        return jnp.concatenate(zs, -1)

    def add_joined(z: Array, r: Array) -> Any:
        if all(additive):
            return z + r, None
        zs, rest = add_recurrent(cell.split(z), r)
        return join(zs), join(rest)

    def part(z: Array, rest: Array | None) -> Any:
        if rest is None:
            return cell.split(z), None
        count = len(cell.gates) - sum(additive)
        return cell.split(z), tuple(jax.lax.split(rest, [cell.hidden_size] * count, rest.ndim - 1))

    return Step(update, add_recurrent, request.return_states or request.lengths, join, add_joined, part)


# ------------------------------------------------------------------------------------------ the linearised step


class LinearizedStep:
    """L_t, the derivative of one step, in the parts that loops are put together from.

    Args:
      keep: the roles of those inputs of a step that are kept where L_t depends on them: "state" (the carry's fields but
        h), "sum" (x after the product), "input" (x as the caller has it).
      rematerialize: keep nothing that the step can recompute.

    Attributes:
      forward: the step that also emits, as (emitted, kept), what L_t needs of it.
    """

    def __init__(
        self, step: Step, product: RecurrentProduct, first: Inputs, keep: tuple[str, ...], rematerialize: bool = False
    ):
        """`first` are the inputs of one step."""
        self.step, self.product, self.rematerialize = step, product, rematerialize
        r = product.product(first.recurrent_params, first.initial_carry.h)
        x, rest = step.add_recurrent(first.xs, r)
        example = (first.units, x, rest, first.initial_carry)

        def stable(units: Any, x: Any, rest: Any, s: Any) -> Any:
            new, emitted = step.update(units, x, rest, s)
            return jax.tree.map(lambda n, c: n.astype(c.dtype), new, s), emitted

        closed, self._out_tree = pointwise.opened(stable, *example)
        opened = _compat.jaxpr_as_fun(closed)
        policy = jax.checkpoint_policies.nothing_saveable if rematerialize else pointwise.save_transcendentals
        self._split = pointwise.linearize(lambda *a: tuple(opened(*a)), policy, *jax.tree.leaves(example))

        self._numbers = [v.ndim == 0 for v in jax.eval_shape(self._split.forward, *jax.tree.leaves(example))[1]]

        # The role of each flat input: what the caller has as stacks need not be kept again.
        self._roles = ["unit"] * len(jax.tree.leaves(first.units))
        pairs = zip(jax.tree.leaves(first.xs), jax.tree.leaves(x), strict=True)
        self._roles += ["input" if a is b else "sum" for a, b in pairs]
        self._roles += ["sum"] * len(jax.tree.leaves(rest))
        self._roles += jax.tree.leaves(jax.tree.map(lambda _: "state", first.initial_carry)._replace(h="h"))
        self._kept_inputs = [n for n in self._split.needed if n is not None and self._roles[n] in keep]
        self.forward = dataclasses.replace(step, update=self._update)

    def _update(self, units: Any, x: Any, rest: Any, s: Any) -> Any:
        args = jax.tree.leaves((units, x, rest, s))
        out, saved = self._split.forward(*args)
        # Values that depend only on a captured number are scalars too; rows have a value for every unit.
        saved = tuple(v if v.ndim else jnp.broadcast_to(v, s.h.shape) for v in saved)
        new, emitted = jax.tree.unflatten(self._out_tree, out)
        return new, (emitted, (saved, tuple(args[n] for n in self._kept_inputs)))

    def residuals(self, inputs: Inputs, before: Array, kept: Any) -> tuple[Array, ...]:
        """Arrays (..., *batch, H) for all that L depends on but units; before: h_{t-1}, after resets."""
        saved, kept_inputs = kept
        held = dict(zip(self._kept_inputs, kept_inputs, strict=True))
        xs, rest = inputs.xs, None
        if "sum" in self._roles and self.rematerialize:
            r = self.product.product(inputs.recurrent_params, masked(inputs.recurrent_mask, before))
            xs, rest = self.step.add_recurrent(xs, r)
        stacks = [*jax.tree.leaves(inputs.units), *jax.tree.leaves(xs), *jax.tree.leaves(rest)]
        next_saved = iter(saved)
        residuals = []
        for n in self._split.needed:
            if n is None:
                residuals.append(next(next_saved))
            elif n in held:
                residuals.append(held[n])
            elif self._roles[n] == "h":
                residuals.append(before)
            elif self._roles[n] != "unit":
                residuals.append(stacks[n])
        return tuple(residuals)

    def prepare(self, masked_h: Array, params: Any, dparams: Any, dxs: Any, dunits: Any) -> tuple[Any, Any, Any]:
        """The part of the tangent that needs no loop: (dx with the sums of dU h in it, their rest, dunits per step)."""
        rest, dxs = None, self.step.join(dxs)
        if dparams is not None:
            dxs, rest = self.step.add_to_tangent(dxs, self.product.of_change(params, dparams, masked_h))
        # A per-unit tangent enters once a step, so that its gradient is summed outside the loop.
        return dxs, rest, jax.tree.map(lambda a: jnp.broadcast_to(a, (masked_h.shape[0], *a.shape)), dunits)

    @property
    def tangent(self) -> Step:
        """L as a step: its units are those of the recurrence, its x_t = (residuals, dx, rest, dunits)."""

        def linear(units: Any, x: Any, dr: Any, ds: Any) -> Any:
            residuals, dx, rest, dunits = x
            stacks, leaves, numbers = iter(residuals), jax.tree.leaves(units), iter(self._numbers)
            values = []
            for n in self._split.needed:
                value = leaves[n] if n is not None and self._roles[n] == "unit" else next(stacks)
                values.append(value[(0,) * value.ndim] if n is None and next(numbers) else value)
            dunits = jax.tree.map(jnp.zeros_like, units) if dunits is None else dunits
            tangents = jax.tree.leaves((dunits, *self.step.part(dx, dr if rest is None else rest), ds))
            return jax.tree.unflatten(self._out_tree, self._split.tangent(values, tangents))

        def add_recurrent(x: Any, dr: Any) -> Any:
            residuals, dx, rest, dunits = x
            dx, more = self.step.add_to_tangent(dx, dr)
            if rest is None or more is None:
                return (residuals, dx, rest, dunits), more
            return (residuals, dx, rest + more, dunits), None

        # Checkpointed so that the coefficients of L are formed inside the loop, never stacked.
        return Step(jax.checkpoint(linear, prevent_cse=False), add_recurrent, self.step.carries)
