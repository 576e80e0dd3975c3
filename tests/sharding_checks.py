"""Checks on eight virtual devices; `test_sharding.py` runs them in a process for each backend.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharding_checks.py scan shard_map pmap
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import plain_kernels
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rnncore
from rnncore.sequence.backends import BACKENDS

jax.config.update("jax_enable_x64", True)
BATCH, STEPS, FEATURES, HIDDEN = 16, 6, 3, 4
CELLS = (
    rnncore.LSTM(HIDDEN, peepholes=True),
    rnncore.GRU(HIDDEN),
    rnncore.IndRNN(HIDDEN),
    rnncore.LSTM(HIDDEN, recurrence=rnncore.Heads(2)),
    rnncore.Stack(
        rnncore.Elman(HIDDEN), num_layers=2, dropout=0.2, recurrent_dropout=0.3, zoneout=rnncore.HiddenCarry(0.2),
        learned_carry=True,
    ),
)  # fmt: skip


def run(cell, params, xs, key=None, **options):
    """A cell or a stack over a sequence; a key draws a stack's masks."""
    if isinstance(cell, rnncore.Stack):
        return rnncore.unroll_stack(cell, params, xs, key=key, **options)
    return rnncore.unroll(cell, params, xs, **options)


def dtype_of(backend):
    """The plain kernels have float32 inside."""
    return jnp.float32 if backend == "plain" else jnp.float64


def problem(cell, backend):
    keys = jax.random.split(jax.random.key(0), 4)
    params = cell.init(keys[0], FEATURES, dtype_of(backend))
    xs = jax.random.normal(keys[1], (BATCH, STEPS, FEATURES), dtype_of(backend))
    lengths = jax.random.randint(keys[2], (BATCH,), 0, STEPS + 1)
    resets = jax.random.bernoulli(keys[3], 0.3, (BATCH, STEPS))
    return params, xs, lengths, resets


def loss_of(cell, backend, options, key=None):
    """Sum over the batch of a function of outputs and final carry, with lengths and resets or without."""

    def loss(params, xs, lengths, resets):
        extra = {"seq_lengths": lengths, "resets": resets} if options else {}
        carry, ys = run(cell, params, xs, key, backend=backend, **extra)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(carry))

    return loss


@functools.cache
def expected(cell, backend, options, random):
    """Value and gradients on one device."""
    loss = loss_of(cell, backend, options, jax.random.key(5) if random else None)
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(*problem(cell, backend))


def assert_equal(got, want, what):
    tolerance = 2e-5 if " plain" in what else 1e-12
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=tolerance, atol=tolerance, err_msg=what)


def assert_reduced_outside_loops(text, what):
    """The text of a compiled step sums gradients over devices, and never inside a loop."""
    computations = {c.split(" ")[0].lstrip("%"): c for c in re.split(r"\n(?=%|ENTRY)", text)}
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert loops, what
    reached = set()

    def visit(name):
        if name in reached or name not in computations:
            return
        reached.add(name)
        for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name]):
            visit(called)

    for name in loops:
        visit(name)
    inside = [name for name in reached if "all-reduce" in computations[name]]
    assert not inside, f"{what}: all-reduce inside the loop {inside}"
    assert "all-reduce" in text, f"{what}: no all-reduce at all, so the check shows nothing"


def check_shard_map(backend):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for cell in CELLS if backend == "scan" else CELLS[:1]:
        for options in (False, True) if cell is CELLS[0] else (True,):
            loss = loss_of(cell, backend, options)
            arguments = problem(cell, backend)
            want = expected(cell, backend, options, False)

            def local(params, *data, loss=loss):
                return jax.lax.psum(loss(params, *data), "data")

            def sharded(*args, local=local):
                specs = (P(), P("data"), P("data"), P("data"))
                return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*args)

            step = jax.jit(jax.value_and_grad(sharded, (0, 1))).lower(*arguments).compile()
            what = f"{type(cell).__name__} {backend} options={options}"
            assert_equal(step(*arguments), want, what)
            if backend == "scan":
                assert_reduced_outside_loops(step.as_text(), what)


def check_mesh(backend, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    for cell in CELLS if backend == "scan" else CELLS[:1]:
        for options in (False, True) if cell is CELLS[0] else (True,):
            loss = loss_of(cell, backend, options, jax.random.key(5))
            arguments = problem(cell, backend)
            want = expected(cell, backend, options, isinstance(cell, rnncore.Stack))
            with jax.set_mesh(mesh):
                split = NamedSharding(mesh, P("data"))
                params = jax.device_put(arguments[0], NamedSharding(mesh, P()))
                placed = (params, *(jax.device_put(a, split) for a in arguments[1:]))
                step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*placed).compile()
                what = f"{type(cell).__name__} {backend} options={options}"
                assert_equal(step(*placed), want, what)
                if backend == "scan":
                    assert_reduced_outside_loops(step.as_text(), what)
                # A carry that the caller made without thinking of devices.
                given = cell.initial_carry((BATCH,), dtype_of(backend))
                carry, _ = jax.jit(lambda p, x, c, cell=cell: run(cell, p, x, initial_carry=c))(
                    placed[0], placed[1], given
                )
            # Outside of the mesh: since JAX 0.12 an array that is made inside belongs to it.
            given = cell.initial_carry((BATCH,), dtype_of(backend))
            assert_equal(carry, run(cell, *arguments[:2], initial_carry=given)[0], what)


def check_pmap(backend):
    for cell in CELLS[:2] if backend == "scan" else CELLS[:1]:
        params, xs, *_ = problem(cell, backend)
        parts = xs.reshape(8, BATCH // 8, STEPS, FEATURES)

        def gradient(params, xs, cell=cell):
            return jax.grad(lambda p, x: jnp.sum(jnp.sin(run(cell, p, x, backend=backend)[1])), (0, 1))(params, xs)

        one = jax.jit(gradient)
        want = [one(params, part) for part in parts]
        want = jax.tree.map(lambda *a: jnp.stack(a), *want)
        assert_equal(jax.pmap(gradient, in_axes=(None, 0))(params, parts), want, f"{type(cell).__name__} {backend}")


CHECKS = {
    "shard_map": check_shard_map,
    "auto": lambda backend: check_mesh(backend, AxisType.Auto),
    "explicit": lambda backend: check_mesh(backend, AxisType.Explicit),
    "pmap": check_pmap,
}

if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    BACKENDS["plain"] = plain_kernels.PLAIN
    for kind in sys.argv[2:] or CHECKS:
        CHECKS[kind](sys.argv[1])
        print(kind)
