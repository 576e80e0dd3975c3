"""A value and its tangent, in one loop where nothing is to be transposed.

JAX differentiates a scan as one loop over values and tangents, which reads all that both need once.  Its transpose then
sums the gradients of weights step by step, so that two loops after each other are faster under reverse mode.  Which of
both is needed shows only when the program is lowered or split, and so the choice is a primitive's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.interpreters import batching as jax_batching
from jax.interpreters import partial_eval as pe

from rnncore import _compat
from rnncore._types import Array, PyTree

joint_p = Primitive("rnncore_joint")
joint_p.multiple_results = True


def value_and_tangent(
    function: Callable[[PyTree], PyTree], apart: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    primals: PyTree, tangents: PyTree,
) -> tuple[PyTree, PyTree]:  # fmt: skip
    """`jax.jvp(function, primals, tangents)` where it is lowered as it stands, `apart(primals, tangents)` elsewhere.

    Some of the tangents may be of type SymbolicZero.  Neither function closes over arrays.
    """
    tree: Any
    leaves, tree = jax.tree.flatten(primals)
    changes = tree.flatten_up_to(tangents)
    at = [n for n, t in enumerate(changes) if not isinstance(t, SymbolicZero)]
    operands, count = [*leaves, *(changes[n] for n in at)], len(leaves)
    zeros = {n: t for n, t in enumerate(changes) if isinstance(t, SymbolicZero)}
    # What closes over an array would keep it alive for as long as the program is cached.
    del primals, tangents, leaves, changes

    def jointly(*flat: Array) -> Any:
        moved = dict(zip(at, flat[count:], strict=True))
        return jvp_at(lambda *primals: function(tree.unflatten(primals)), at, flat[:count], moved)

    def separately(*flat: Array) -> list[Array]:
        moved = zeros | dict(zip(at, flat[count:], strict=True))
        return jax.tree.leaves(apart(tree.unflatten(flat[:count]), tree.unflatten([moved[n] for n in range(count)])))

    joint, shapes = jax.make_jaxpr(jointly, return_shape=True)(*operands)
    found = joint_p.bind(*operands, joint=joint, apart=separately, count=count)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def jvp_at(
    function: Callable, at: Sequence[int], primals: Sequence[Any], tangents: Mapping[int, Any] | Sequence[Any]
) -> Any:
    """(values, tangents) of a function of all primals, of which those `at` these positions move."""

    def of_moving(*some: Array) -> Any:
        changed = dict(zip(at, some, strict=True))
        return function(*(changed.get(n, a) for n, a in enumerate(primals)))

    return jax.jvp(of_moving, [primals[n] for n in at], [tangents[n] for n in at])


def _evaluate(*operands: Array, joint: Any, apart: Callable, count: int) -> list[Array]:
    return _compat.jaxpr_as_fun(joint)(*operands)


def _jvp(primals: Any, tangents: Any, joint: Any, apart: Callable, count: int) -> Any:
    at = [n for n, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    return jvp_at(apart, at, primals, tangents)


def _batch(operands: Any, dims: Any, joint: Any, apart: Callable, count: int) -> Any:
    each = len(joint.out_avals) // 2
    # The value of one run under many tangents stays one value.
    values = None if all(d is None for d in dims[:count]) else 0
    out = [values] * each + [0] * each
    return jax.vmap(apart, dims, out)(*operands), out


def _split(trace: Any, *operands: Any, joint: Any, apart: Callable, count: int) -> list[Any]:
    with _compat.current_trace(trace):
        return apart(*operands)


def _split_in_remat(saveable: Any, unknown: Any, instantiate: Any, eqn: Any) -> Any:
    """The rule of `jax.checkpoint`, which splits programs as they stand: that of a call in place of this equation."""
    call = eqn.params["apart"] if any(unknown) else functools.partial(_evaluate, **eqn.params)
    (inner,) = jax.make_jaxpr(jax.jit(lambda *operands: list(call(*operands))))(*(v.aval for v in eqn.invars)).eqns
    eqn = eqn.replace(primitive=inner.primitive, params=inner.params, effects=inner.effects)
    return pe.partial_eval_jaxpr_custom_rules[inner.primitive](saveable, unknown, instantiate, eqn)


joint_p.def_impl(_evaluate)
joint_p.def_effectful_abstract_eval(lambda *_, joint, **__: (joint.out_avals, joint.effects))
mlir.register_lowering(joint_p, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[joint_p] = _jvp
jax_batching.primitive_batchers[joint_p] = _batch
pe.custom_partial_eval_rules[joint_p] = _split
pe.partial_eval_jaxpr_custom_rules[joint_p] = _split_in_remat
