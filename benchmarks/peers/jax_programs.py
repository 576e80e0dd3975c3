"""What all peers that are JAX libraries share: a compiled program for each measurement."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.base import PRECISIONS, Built, Case
from benchmarks.peers.problem import Problem
from benchmarks.peers.reference import wide
from rnncore._command import timing


def build(
    forward: Callable[[Any, Any], Any],
    params: Any,
    to_core: Callable[[Any], Any],
    case: Case,
    problem: Problem,
    measurement: str,
    *,
    compiler_options: dict[str, Any] | None = None,
    algorithm: str | None = None,
) -> Built:
    """Jits, lowers and compiles one measurement.

    Trees of parameters are flattened outside the program: the time that Python takes to flatten a library's own
    containers at every call is not measured.

    Args:
      forward: (parameters, inputs (B, T, .)) -> outputs (B, T, H).
      params: the library's own tree of parameters.
      to_core: a tree of that kind (of gradients, in NumPy) -> `rnncore.CellParams`.
      compiler_options: for XLA.
    """
    precision = PRECISIONS[case.precision]
    pinned = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
    # The suite may run where x64 is on; libraries that make zeros would make float64 ones.
    with jax.enable_x64(False), pinned:
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
        xs, cotangent = jnp.asarray(problem.xs), jnp.asarray(problem.cotangent)

        def outputs(leaves: list, xs: Any) -> Any:
            return forward(jax.tree.unflatten(tree, leaves), xs)

        def loss(leaves: list, xs: Any, cotangent: Any) -> Any:
            return jnp.vdot(outputs(leaves, xs), cotangent, preferred_element_type=jnp.float32)

        is_forward = measurement == "forward"
        step = outputs if is_forward else jax.value_and_grad(loss, (0, 1))
        arguments = (leaves, xs) if is_forward else (leaves, xs, cotangent)
        compiled, figures = timing.compile_step(jax.jit(step), arguments, compiler_options)
    call = functools.partial(compiled, *arguments)

    def result() -> Any:
        out = wide(call())
        return out if is_forward else (to_core(jax.tree.unflatten(tree, out[1][0])), out[1][1])

    return Built(call, jax.block_until_ready, result, figures, algorithm)
