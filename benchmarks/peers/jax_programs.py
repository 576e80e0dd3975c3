"""What all peers that are JAX libraries share: a compiled program for each measurement."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.base import LEARNING_RATE, MOMENTUM, PRECISIONS, Built, Case, jax_peak
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

    Trees of parameters are taken apart outside the program: what it costs to flatten a library's own
    containers in Python at every call is not measured.

    Args:
      forward: (parameters, inputs (B, T, .)) -> outputs (B, T, H).
      params: the library's own tree of parameters.
      to_core: a tree of that kind (of gradients, in NumPy) -> what `reference.py` has for every layer.
      compiler_options: for XLA.
    """
    precision = PRECISIONS[case.precision]
    pinned = contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)
    # The suite may run where x64 is on; libraries that make zeros would make float64 ones.
    with jax.enable_x64(False), pinned:
        leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
        xs, cotangent = jnp.asarray(problem.xs), jnp.asarray(problem.cotangent)
        make = {"forward": _forward, "gradient": _gradient, "training_step": _training_step}[measurement]
        step, arguments, to_gradients = make(forward, tree, leaves, xs, cotangent)
        compiled, figures = timing.compile_step(jax.jit(step), arguments, compiler_options)
    figures |= timing.argument_and_output_bytes(compiled)
    call = functools.partial(compiled, *arguments)

    def result() -> Any:
        out = wide(call())
        if measurement == "forward":
            return out
        grads, dxs = to_gradients(out)
        return to_core(jax.tree.unflatten(tree, grads)), dxs

    return Built(call, jax.block_until_ready, result, jax_peak, figures, algorithm)


Step = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], Any]]


def _forward(forward: Any, tree: Any, leaves: list, xs: Any, cotangent: Any) -> Step:
    del cotangent
    return lambda leaves, xs: forward(tree.unflatten(leaves), xs), (leaves, xs), lambda out: out


def _gradient(forward: Any, tree: Any, leaves: list, xs: Any, cotangent: Any) -> Step:
    def loss(leaves: list, xs: Any, cotangent: Any) -> Any:
        return jnp.vdot(forward(tree.unflatten(leaves), xs), cotangent, preferred_element_type=jnp.float32)

    return jax.value_and_grad(loss, (0, 1)), (leaves, xs, cotangent), lambda out: out[1]


def _training_step(forward: Any, tree: Any, leaves: list, xs: Any, target: Any) -> Step:
    optimizer = optax.adam(LEARNING_RATE, b1=MOMENTUM)

    def loss(leaves: list, xs: Any, target: Any) -> Any:
        distance = (forward(tree.unflatten(leaves), xs) - target).astype(jnp.float32)
        return jnp.mean(jnp.square(distance))

    def step(leaves: list, state: Any, xs: Any, target: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(leaves, xs, target)
        updates, state = optimizer.update(grads, state, leaves)
        return optax.apply_updates(leaves, updates), state, value

    def to_gradients(out: Any) -> Any:
        return [moment / (1 - MOMENTUM) for moment in out[1][0].mu], None

    return step, (leaves, optimizer.init(leaves), xs, target), to_gradients


def layer_by_layer(layer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """forward(params of every layer, xs) from the run of one layer."""

    def forward(params: Any, xs: Any) -> Any:
        for own in params:
            xs = layer(own, xs)
        return xs

    return forward
