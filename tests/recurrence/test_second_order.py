"""Second derivatives where JAX splits, maps or moves the loop of a value and its tangent; against plain autodiff."""

from __future__ import annotations

import functools
import gc
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rnncore

CELL = rnncore.LSTM(3)
PARAMS = CELL.init(jax.random.key(0), 2, jnp.float64)
XS, DIRECTION = jax.random.normal(jax.random.key(1), (2, 2, 4, 2), jnp.float64)
LENGTHS = jnp.array([4, 2])
POLICIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "gates": {"recompute": "gates"},
    "gates in chunks": {"recompute": "gates", "checkpoint_every": 2},
    "chunks": {"recompute": "chunk", "checkpoint_every": 2},
}


def loss(xs: Any, backend: str, **options: Any) -> Any:
    return jnp.sum(jnp.sin(rnncore.unroll(CELL, PARAMS, xs, seq_lengths=LENGTHS, backend=backend, **options)[1]))


def second_order(f: Any) -> Any:
    """Programs of second order by name, of a function of the inputs."""

    def moved(x: Any) -> Any:
        return jax.jvp(f, (x,), (DIRECTION,))[1]

    def norm(x: Any) -> Any:
        return jnp.sum(jax.grad(f)(x) ** 2)

    saveable = jax.checkpoint_policies.dots_saveable
    return {
        "jvp of grad": lambda x: jax.jvp(jax.grad(f), (x,), (DIRECTION,))[1],
        "grad of jvp": jax.grad(moved),
        "grad of the gradient's norm": jax.grad(norm),
        "grad of checkpoint of jvp": jax.grad(jax.checkpoint(moved)),
        "grad of checkpoint of the norm": jax.grad(jax.checkpoint(norm, policy=saveable)),
        "grad of a scan of checkpoints": jax.grad(
            lambda x: jax.lax.scan(lambda total, _: (total + jax.checkpoint(moved)(x), None), 0.0, None, length=2)[0]
        ),
        "jvp of grad of checkpoint, mapped": jax.vmap(jax.grad(lambda x, s: jax.checkpoint(moved)(s * x)), (None, 0)),
    }


def results(f: Any) -> dict[str, Any]:
    scales = jnp.array([0.5, 1.0])
    return jax.jit(lambda x: {n: g(x, scales) if "mapped" in n else g(x) for n, g in second_order(f).items()})(XS)


@functools.cache
def expected() -> dict[str, Any]:
    return results(lambda x: loss(x, "autodiff"))


@pytest.mark.sample("chunks")
@pytest.mark.parametrize("policy", POLICIES)
def test_under_memory_policies_and_checkpoint(policy: str):
    for name, found in results(lambda x: loss(x, "scan", **POLICIES[policy])).items():
        assert jnp.abs(found - expected()[name]).max() < 1e-12, name


def test_inside_shard_map():
    """Residuals are constants there, so what depends on them is formed from the outputs."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("i")

    def program(x: Any, lengths: Any, direction: Any) -> tuple[Any, ...]:
        def f(x: Any) -> Any:
            return jnp.sum(jnp.sin(rnncore.unroll(CELL, PARAMS, x, seq_lengths=lengths, backend="scan")[1]))

        def moved(x: Any) -> Any:
            return jax.jvp(f, (x,), (direction,))[1]

        again = jax.jvp(moved, (x,), (direction,))[1]
        return again[None], jax.grad(moved)(x), jax.jvp(jax.grad(f), (x,), (direction,))[1]

    inside = jax.shard_map(program, mesh=mesh, in_specs=(split,) * 3, out_specs=(split,) * 3)
    for found, want in zip(*(jax.jit(p)(XS, LENGTHS, DIRECTION) for p in (inside, program)), strict=True):
        assert jnp.abs(found - want).max() < 1e-12


def test_no_tracer_outlives_its_program():
    def tracers() -> int:
        gc.collect()
        return sum("JaxprTracer" in type(a).__name__ for a in gc.get_objects())

    f, before = functools.partial(loss, backend="scan"), tracers()
    jax.jit(lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (x,))[1], (x,), (x,))[1])(XS).block_until_ready()
    assert tracers() <= before
