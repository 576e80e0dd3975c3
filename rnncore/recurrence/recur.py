"""The recurrence s_t = step(p, x_t, mix(U, h_{t-1}), s_{t-1}), and its derivative in every mode.

The derivative of a recurrence is a recurrence.  With L_t the linearised step,

  ds_t = L_t(dp, dx_t, mix(dU, h_{t-1}) + mix(U, dh_{t-1}), ds_{t-1})

and mix(dU, h_{t-1}) needs no loop: it is one product over all steps (`prepare`).  What is left is
the same kind of recurrence with L in the step's place, so `run` runs it as such: every further order
comes out the same way, and JAX transposes it for reverse mode.  No weight gradient travels through
the loop.  L_t is arithmetic on values that the forward loop keeps: the results of the step's
transcendental functions (`pointwise.linearize`).  `inplace.py` transposes the same L by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.cells import pointwise

CARRIES = "rnncore_carries"
"""Name, for checkpoint policies, of what a recurrence with `recompute` keeps."""


class Inputs(NamedTuple):
    """What a recurrence runs on.

    Fields:
      mixing: the parameters of `mix`.
      p: per-unit parameters, broadcast to (*batch, H).
      xs: pytree of (T, *batch, ...) per-step inputs.
      start: the carry before the first step.
      target: the carry that a reset returns to; None without resets.
      resets: (T, *batch, 1) booleans; None without resets.
      mask: (*batch, H), multiplies h where it enters the product; a constant; None for none.
      stay: what of the old carry stays at each step, a constant: a carry of (T, *batch, H) booleans
        (which units stay), or shares, or None; None for none at all.
    """

    mixing: PyTree
    p: PyTree
    xs: PyTree
    start: Any
    target: Any
    resets: Array | None
    mask: Array | None = None
    stay: Any = None

    def entering(self, h: Array) -> Array:
        """h as it enters the product."""
        return h if self.mask is None else h * self.mask.astype(h.dtype)


def _same(*values: Any) -> Any:
    return values[0] if len(values) == 1 else values


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a recurrence.

    Fields:
      run: (p, x_t, rest_t, s_{t-1}) -> (s_t, emitted), elementwise, on a folded x.
      fold: (x, r) -> (x, rest): adds to x the part of r that matters only as a sum with it, so that
        one array stands for both; `rest` is the part that stays apart, None where there is none.
        Linear, and the same for one step and for all steps at once.
      carries: whether every carry is emitted too, and not its h alone.
      join: x -> the form in which its tangents travel; linear.  A loop reads x gate by gate, which on a
        CPU halves its time (XLA does not vectorise a slice of a slice), and its transpose writes one slab.
      fold_joined: `fold` of an x so joined.
      part: (joined x, its rest) -> (x, rest).
    """

    run: Callable
    fold: Callable
    carries: bool = False
    join: Callable = _same
    fold_joined: Callable | None = None
    part: Callable = _same

    def fold_tangent(self, x: Any, r: Any) -> Any:
        """`fold` of a tangent of x."""
        return (self.fold_joined or self.fold)(x, r)


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a recurrence mixes and is differentiated.

    Fields:
      mix: (mixing, h) -> r, linear in the mixing.
      tangent_mix: (tangent mixing, dh) -> dr, bilinear: what `mix` does to a change of h.
      tangent_mixing: mixing -> tangent mixing, linear.
      recompute: keep only the carries and form r and the gates again where derivatives need them.  They
        are named CARRIES; a checkpoint policy around the recurrence can leave out all else, its inputs too.
    """

    mix: Callable
    tangent_mix: Callable
    tangent_mixing: Callable
    recompute: bool = False

    @property
    def tangent(self) -> Rules:
        """The rules of the tangent recurrence, which is its own tangent."""
        return Rules(self.tangent_mix, self.tangent_mix, lambda mixing: mixing)


def advance(step: Step, rules: Rules, now: Inputs, carry: Any) -> Any:
    """One step with its reset, its product and what stays: (s_t, emitted)."""
    reset = now.resets
    if reset is not None:
        carry = jax.tree.map(lambda a, b: jnp.where(reset, a, b), now.target, carry)
    x, rest = step.fold(now.xs, rules.mix(now.mixing, now.entering(carry.h)))
    new, emitted = step.run(now.p, x, rest, carry)
    new = jax.tree.map(lambda n, c: n.astype(c.dtype), new, carry)
    return keep(now.stay, carry, new), emitted


def keep(stay: Any, old: Any, new: Any) -> Any:
    """The new carry, with the old one where or as far as it stays; linear in both."""
    if stay is None:
        return new

    def one(k: Any, o: Array, n: Array) -> Array:
        if k is None:
            return n
        if k.dtype == jnp.bool_:
            return jnp.where(k, o, n)
        k = k.astype(n.dtype)
        return k * o + (1 - k) * n

    return type(new)(*map(one, stay, old, new))


def _loop(step: Step, rules: Rules, inputs: Inputs) -> tuple[Any, Array, PyTree]:
    def body(carry: Any, now: Any) -> Any:
        x, reset, stay = now
        new, emitted = advance(step, rules, inputs._replace(xs=x, resets=reset, stay=stay), carry)
        return new, (new.h, (new if step.carries else None, emitted))

    last, (hs, emitted) = lax.scan(body, inputs.start, (inputs.xs, inputs.resets, inputs.stay))
    return last, hs, emitted


# ------------------------------------------------------------------------------------ derivative


class Derivative:
    """The derivative of one recurrence, in the parts that rules are put together from.

    Args:
      keep: the roles of those inputs of a step that are kept where L_t depends on them: "state" (the
        carry's fields but h), "folded" (x after the product), "input" (x as the caller has it).

    Attributes:
      forward: the step that also emits, as (emitted, kept), what the derivative needs of it.
    """

    def __init__(self, step: Step, rules: Rules, inputs: Inputs, keep: tuple[str, ...]):
        self.step, self.rules = step, rules
        first = jax.tree.map(lambda a: a[0], inputs.xs)
        x, rest = step.fold(first, rules.mix(inputs.mixing, inputs.start.h))
        example = (inputs.p, x, rest, inputs.start)

        def stable(p: Any, x: Any, rest: Any, s: Any) -> Any:
            new, emitted = step.run(p, x, rest, s)
            return jax.tree.map(lambda n, c: n.astype(c.dtype), new, s), emitted

        closed, self._out_tree = pointwise.opened(stable, *example)
        opened = _compat.jaxpr_as_fun(closed)
        policy = jax.checkpoint_policies.nothing_saveable if rules.recompute else pointwise.save_dear
        self._split = pointwise.linearize(lambda *a: tuple(opened(*a)), policy, *jax.tree.leaves(example))

        # The role of each flat input: what the caller has as stacks need not be kept again.
        self._roles = ["unit"] * len(jax.tree.leaves(inputs.p))
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(x), strict=True)
        self._roles += ["input" if a is b else "folded" for a, b in pairs]
        self._roles += ["folded"] * len(jax.tree.leaves(rest))
        self._roles += jax.tree.leaves(jax.tree.map(lambda _: "state", inputs.start)._replace(h="h"))
        self._kept_inputs = [n for n in self._split.needed if n is not None and self._roles[n] in keep]
        self.forward = dataclasses.replace(step, run=self._run_forward)

    def _run_forward(self, p: Any, x: Any, rest: Any, s: Any) -> Any:
        args = jax.tree.leaves((p, x, rest, s))
        out, saved = self._split.forward(*args)
        new, emitted = jax.tree.unflatten(self._out_tree, out)
        return new, (emitted, (saved, tuple(args[n] for n in self._kept_inputs)))

    def previous(self, inputs: Inputs, hs: Array) -> Array:
        """h_{t-1} of every step, after resets."""
        before = jnp.concatenate([inputs.start.h[None], hs[:-1]])
        return before if inputs.resets is None else jnp.where(inputs.resets, inputs.target.h, before)

    def residuals(self, inputs: Inputs, before: Array, kept: Any) -> tuple[Array, ...]:
        """(T, *batch, H) arrays for all that L depends on, per-unit parameters apart."""
        saved, kept_inputs = kept
        held = dict(zip(self._kept_inputs, kept_inputs, strict=True))
        xs, rest = inputs.xs, None
        if "folded" in self._roles and self.rules.recompute:
            xs, rest = self.step.fold(xs, self.rules.mix(inputs.mixing, inputs.entering(before)))
        stacks = [*jax.tree.leaves(inputs.p), *jax.tree.leaves(xs), *jax.tree.leaves(rest)]
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

    def prepare(self, entering: Array, dmixing: Any, dxs: Any, dp: Any) -> tuple[Any, Any, Any]:
        """What of the tangent needs no loop: (dx with the sums of mix(dU, h) in it, their rest, dp per step)."""
        rest, dxs = None, self.step.join(dxs)
        if dmixing is not None:
            dxs, rest = self.step.fold_tangent(dxs, self.rules.mix(dmixing, entering))
        # A per-unit tangent enters once a step, so that its gradient is summed outside the loop.
        return dxs, rest, jax.tree.map(lambda a: jnp.broadcast_to(a, (entering.shape[0], *a.shape)), dp)

    @property
    def tangent(self) -> Step:
        """L as a step: p is the p of the recurrence, x_t = (residuals, dx, rest, dp)."""

        def linear(p: Any, x: Any, dr: Any, ds: Any) -> Any:
            residuals, dx, rest, dp = x
            stacks, units = iter(residuals), jax.tree.leaves(p)
            values = [
                units[n] if n is not None and self._roles[n] == "unit" else next(stacks) for n in self._split.needed
            ]
            dp = jax.tree.map(jnp.zeros_like, p) if dp is None else dp
            tangents = jax.tree.leaves((dp, *self.step.part(dx, dr if rest is None else rest), ds))
            return jax.tree.unflatten(self._out_tree, self._split.tangent(values, tangents))

        def fold(x: Any, dr: Any) -> Any:
            residuals, dx, rest, dp = x
            dx, more = self.step.fold_tangent(dx, dr)
            if rest is None or more is None:
                return (residuals, dx, rest, dp), more
            return (residuals, dx, rest + more, dp), None

        # Checkpointed so that the coefficients of L are formed inside the loop, never stacked.
        return Step(jax.checkpoint(linear, prevent_cse=False), fold, self.step.carries)


def run(step: Step, rules: Rules, inputs: Inputs) -> tuple[Any, Array, PyTree]:
    """(last carry, h of every step (T, *batch, H), (carries or None, emitted) of every step)."""

    @jax.custom_jvp
    def recurrence(inputs: Inputs) -> Any:
        return _loop(step, rules, inputs)

    def rule(primals: Any, tangents: Any) -> Any:
        (inputs,), (moved,) = primals, tangents
        derivative = Derivative(step, rules, inputs, ("state",) if rules.recompute else ("state", "folded"))
        last, hs, (carries, (emitted, kept)) = run(derivative.forward, rules, inputs)
        if rules.recompute:
            hs, kept = checkpoint_name((hs, kept), CARRIES)
        dmixing = _dense(moved.mixing, inputs.mixing) if _moves(moved.mixing) else None
        dp = _dense(moved.p, inputs.p) if _moves(moved.p) else None
        dxs, dstart, dtarget = (_dense(m, i) for m, i in zip(moved[2:5], inputs[2:5], strict=True))

        def tangent(inputs: Any, hs: Any, kept: Any, dmixing: Any, dxs: Any, dp: Any, dstart: Any, dtarget: Any) -> Any:
            before = derivative.previous(inputs, hs)
            residuals = derivative.residuals(inputs, before, kept)
            xs = (residuals, *derivative.prepare(inputs.entering(before), dmixing, dxs, dp))
            mixing = rules.tangent_mixing(inputs.mixing)
            moved = inputs._replace(mixing=mixing, xs=xs, start=dstart, target=dtarget)
            return run(derivative.tangent, rules.tangent, moved)

        return (last, hs, (carries, emitted)), tangent(inputs, hs, kept, dmixing, dxs, dp, dstart, dtarget)

    recurrence.defjvp(rule, symbolic_zeros=True)
    return recurrence(inputs)


def _moves(tangents: Any) -> bool:
    leaves = jax.tree.leaves(tangents, is_leaf=lambda t: isinstance(t, SymbolicZero))
    return any(not isinstance(t, SymbolicZero) for t in leaves)


def _dense(tangents: Any, primals: Any) -> Any:
    """Tangents with the symbolic zeros written out."""
    return jax.tree.map(
        lambda t, x: jnp.zeros_like(x) if isinstance(t, SymbolicZero) else t,
        tangents,
        primals,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
