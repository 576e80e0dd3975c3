"""Checks on eight virtual devices; `test_sharding.py` runs each in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharding_checks.py shard_map
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rnncore

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


def problem(cell):
    keys = jax.random.split(jax.random.key(0), 4)
    params = cell.init(keys[0], FEATURES, jnp.float64)
    xs = jax.random.normal(keys[1], (BATCH, STEPS, FEATURES), jnp.float64)
    lengths = jax.random.randint(keys[2], (BATCH,), 0, STEPS + 1)
    resets = jax.random.bernoulli(keys[3], 0.3, (BATCH, STEPS))
    return params, xs, lengths, resets


def loss_of(cell, mode, options, key=None):
    """Sum over the batch of a function of outputs and final carry, with lengths and resets or without."""

    def loss(params, xs, lengths, resets):
        extra = {"seq_lengths": lengths, "resets": resets} if options else {}
        carry, ys = run(cell, params, xs, key, differentiation=mode, **extra)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(carry))

    return loss


def assert_equal(got, want, what):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-12, atol=1e-12, err_msg=what)


def scans(jaxpr):
    """Every jaxpr that is the body of a loop, at any depth."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    if eqn.primitive.name in ("scan", "while"):
                        yield inner
                    yield from scans(inner)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def assert_reduced_outside_loops(step, arguments, what):
    """The compiled step sums gradients over devices, and never inside a loop."""
    text = step.lower(*arguments).compile().as_text()
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


def check_shard_map(mode):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    for cell in CELLS:
        for options in (True,) if isinstance(cell, rnncore.Stack) else (False, True):
            loss = loss_of(cell, mode, options)
            arguments = problem(cell)
            want = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)

            def local(params, *data, loss=loss):
                return jax.lax.psum(loss(params, *data), "data")

            def sharded(*args, local=local):
                specs = (P(), P("data"), P("data"), P("data"))
                return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(*args)

            step = jax.jit(jax.value_and_grad(sharded, (0, 1)))
            what = f"{type(cell).__name__} {mode} options={options}"
            assert_equal(step(*arguments), want, what)
            for body in scans(jax.make_jaxpr(step)(*arguments).jaxpr):
                assert not any("psum" in name for name in primitives(body)), what
            assert_reduced_outside_loops(step, arguments, what)


def check_mesh(mode, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    for cell in CELLS:
        for options in (True,) if isinstance(cell, rnncore.Stack) else (False, True):
            loss = loss_of(cell, mode, options, jax.random.key(5))
            arguments = problem(cell)
            want = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
            with jax.set_mesh(mesh):
                split = NamedSharding(mesh, P("data"))
                params = jax.device_put(arguments[0], NamedSharding(mesh, P()))
                placed = (params, *(jax.device_put(a, split) for a in arguments[1:]))
                step = jax.jit(jax.value_and_grad(loss, (0, 1)))
                what = f"{type(cell).__name__} {mode} options={options}"
                assert_equal(step(*placed), want, what)
                assert_reduced_outside_loops(step, placed, what)
                # A carry that the caller made without thinking of devices.
                given = cell.initial_carry((BATCH,), jnp.float64)
                carry, _ = jax.jit(lambda p, x, c, cell=cell: run(cell, p, x, initial_carry=c))(
                    placed[0], placed[1], given
                )
            assert_equal(carry, run(cell, *arguments[:2], initial_carry=given)[0], what)


CHECKS = {
    "shard_map": check_shard_map,
    "auto": lambda mode: check_mesh(mode, AxisType.Auto),
    "explicit": lambda mode: check_mesh(mode, AxisType.Explicit),
}

if __name__ == "__main__":
    assert jax.device_count() == 8, jax.devices()
    for mode in ("any", "reverse"):
        CHECKS[sys.argv[1]](mode)
    print("ok")
