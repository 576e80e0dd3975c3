"""Bidirectional of rnncore.linen."""

from __future__ import annotations

from typing import Any

import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import LENGTHS, B, D, H, T, close, f32, f64, normal, some_variables, start, with_gradients

from rnncore import linen as ours


def bidirectional_of(nn: Any, cell: str, **fields: Any) -> Any:
    return nn.Bidirectional(*(nn.RNN(getattr(nn, cell)(H, param_dtype=f64)) for _ in range(2)), **fields)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "cell,options",
    [
        ("LSTMCell", {}),
        ("GRUCell", dict(time_major=True)),
        ("GRUCell", dict(seq_lengths=LENGTHS)),
        ("LSTMCell", dict(seq_lengths=LENGTHS, time_major=True)),
    ],
    ids=str,
)
def test_bidirectional(cell: str, options: dict[str, Any], unrolled: list) -> None:
    mine, flaxen = (bidirectional_of(nn, cell, return_carry=True) for nn in (ours, theirs))
    xs = normal(1, (T, 3, D) if options.get("time_major") else (3, T, D))
    carry = start(cell, (3,)), jax.tree.map(jnp.sin, start(cell, (3,)))
    variables = some_variables(flaxen, xs)
    close(*(with_gradients(layer, variables, xs, carry, **options) for layer in (mine, flaxen)))
    assert len(unrolled) == 2


def test_bidirectional_with_children_of_either_library_and_another_merge() -> None:
    xs = normal(1, (B, T, D), f32)

    def layer(nn: Any, forward: Any, backward: Any) -> Any:
        init = theirs.initializers.normal(1.0)
        children = forward.RNN(forward.GRUCell(H, carry_init=init)), backward.RNN(backward.GRUCell(H, carry_init=init))
        return nn.Bidirectional(*children, merge_fn=jnp.multiply)

    flaxen = layer(theirs, theirs, theirs)
    variables = flaxen.init(jax.random.key(0), xs)
    want = flaxen.apply(variables, xs, init_key=jax.random.key(6))
    for libraries in ((ours, ours, theirs), (ours, theirs, ours), (theirs, ours, ours)):
        close(layer(*libraries).apply(variables, xs, init_key=jax.random.key(6)), want, 1e-6)


def test_bidirectional_does_not_override_its_children_in_silence() -> None:
    xs = normal(1, (T, B, D), f32)
    turned, plain = (lambda: ours.RNN(ours.GRUCell(H), time_major=True)), (lambda: ours.RNN(ours.GRUCell(H)))
    for children in ((turned(), turned()), (plain(), turned())):
        with pytest.raises(ValueError, match="give Bidirectional time_major=True as well"):
            ours.Bidirectional(*children).init(jax.random.key(0), xs)
    variables = ours.Bidirectional(plain(), plain(), time_major=True).init(jax.random.key(0), xs)
    want = ours.Bidirectional(plain(), plain()).apply(variables, jnp.swapaxes(xs, 0, 1))
    for layer in (ours.Bidirectional(turned(), turned(), time_major=True), ours.Bidirectional(plain(), plain())):
        close(jnp.swapaxes(layer.apply(variables, xs, time_major=True), 0, 1), want, 1e-6)
    with pytest.raises(NotImplementedError, match="both directions are read already"):
        ours.Bidirectional(plain(), plain()).apply(variables, xs, reverse=True)
    kept = ours.Bidirectional(plain(), plain()).apply(variables, xs, time_major=True, reverse=False, keep_order=True)
    close(jnp.swapaxes(kept, 0, 1), want, 1e-6)


def test_bidirectional_warns_of_one_object_in_both_places() -> None:
    rnn, xs = ours.RNN(ours.GRUCell(H)), jnp.ones((B, T, D), f32)
    with pytest.warns(UserWarning, match="both are the same object"):
        variables = ours.Bidirectional(rnn, rnn).init(jax.random.key(0), xs)
    assert [*variables["params"]] == ["forward_rnn"]
