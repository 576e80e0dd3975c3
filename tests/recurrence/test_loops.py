"""What the loops carry: read from the jaxpr, no weight gradient travels from step to step."""

import cases
import jax
import jax.numpy as jnp
import pytest

import rnncore

BATCH, STEPS, FEATURES, HIDDEN = 2, 6, 3, 5
CELLS = {
    "lstm": rnncore.LSTM(HIDDEN),
    "lstm-peepholes": rnncore.LSTM(HIDDEN, peepholes=True),
    "gru": rnncore.GRU(HIDDEN),
    "indrnn": rnncore.IndRNN(HIDDEN),
}


def scans(jaxpr):
    """Every scan at any depth as (length, shapes of the carry, body)."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            # The carries are the first outputs: a fact of every supported version, unlike parameter names.
            count = len(eqn.outvars) - sum(
                v.aval.ndim > 0 and v.aval.shape[:1] == (eqn.params["length"],) and b.aval.shape == v.aval.shape[1:]
                for v, b in zip(eqn.outvars, body.outvars, strict=True)
            )
            yield eqn.params["length"], [v.aval.shape for v in body.outvars[:count]], body
        for inner in cases.inner_jaxprs(eqn):
            yield from scans(inner)


def problem(cell):
    keys = jax.random.split(jax.random.key(0), 2)
    params = cell.init(keys[0], FEATURES, jnp.float64)
    return params, jax.random.normal(keys[1], (BATCH, STEPS, FEATURES), jnp.float64)


def orders(cell, **options):
    """Functions of (params, xs): first order, forward over reverse, reverse over forward."""

    def loss(params, xs):
        return jnp.sum(jnp.sin(rnncore.unroll(cell, params, xs, **options)[1]))

    def forward_over_reverse(params, xs):
        return jax.jvp(lambda p: jax.grad(loss)(p, xs), (params,), (params,))

    def reverse_over_forward(params, xs):
        return jax.grad(lambda p: jax.jvp(lambda q: loss(q, xs), (p,), (params,))[1])(params)

    return {"first": jax.grad(loss), "forward-over-reverse": forward_over_reverse,
            "reverse-over-forward": reverse_over_forward}  # fmt: skip


def step_carries(function, cell):
    """Shapes that the per-step loops carry."""
    found = list(scans(jax.make_jaxpr(function)(*problem(cell)).jaxpr))
    assert found
    return {shape for _, shapes, body in found if not list(scans(body)) for shape in shapes}


@pytest.mark.sample(5)
@pytest.mark.parametrize("order", ["first", "forward-over-reverse", "reverse-over-forward"])
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("name", CELLS)
def test_no_weight_gradient_in_the_loop(name, every, order):
    cell = CELLS[name]
    weights = jax.tree.leaves(problem(cell)[0])
    shapes = {w.shape for w in weights} | {(w.shape[0], w.size // w.shape[0]) for w in weights}
    carried = step_carries(orders(cell, checkpoint_every=every)[order], cell)
    assert (BATCH, HIDDEN) in carried and not carried & shapes


def test_plain_autodiff_does_carry_it():
    """The check above can fail: it does for the backend that leaves everything to JAX."""
    cell = CELLS["lstm"]
    carried = step_carries(orders(cell, backend="autodiff")["first"], cell)
    assert (HIDDEN, 4, HIDDEN) in carried or (HIDDEN, 4 * HIDDEN) in carried
