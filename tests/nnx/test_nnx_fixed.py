"""Faults of flax.nnx's recurrent layers: what Flax does where it still does it, and what rnncore.nnx does."""

from __future__ import annotations

from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BAD_MASKS
from flax import nnx as theirs
from nnx_cases import B, D, H, T, bf16, both, close, f32, f64, make, noisy, normal, projected, same_bits, start

from rnncore import nnx as ours


class Sub(ours.GRUCell):
    """A subclass, which runs under nnx.scan."""


def kinds() -> list:
    """The same GRU for either way to run it."""
    fast = noisy(make(ours, "GRUCell", param_dtype=f64))
    return [fast, noisy(Sub(D, H, param_dtype=f64, rngs=theirs.Rngs(0)))]


WAYS = pytest.mark.parametrize("way", [0, 1], ids=["unroll", "nnx.scan"])


# ------------------------------------------------------------------------------------------ rng state


def test_an_rnn_without_randomness_has_no_rng_state() -> None:
    """Flax's cannot be split into parameters, and fails in a module that jax.jit or jax.vmap has closed over."""
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = (nn.RNN(cell) for nn, cell in zip((ours, theirs), both("GRUCell"), strict=True))
    want = flaxen(xs)
    with pytest.raises(ValueError, match="Non-exhaustive filters"):
        theirs.split(flaxen, theirs.Param)
    for transformed in (lambda f: jax.jit(f), lambda f: jax.vmap(f), lambda f: jax.checkpoint(f)):
        with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate RngCount"):
            transformed(lambda xs: flaxen(xs))(xs)
        close(transformed(lambda xs: mine(xs))(xs), want, 1e-6)
    graph, state = theirs.split(flaxen)
    with pytest.raises(flax.errors.TraceContextError):
        jax.vmap(lambda xs: theirs.merge(graph, state)(xs))(xs)
    graph, params = theirs.split(mine, theirs.Param)
    close(jax.vmap(lambda xs: theirs.merge(graph, params)(xs))(xs), want, 1e-6)
    before = jax.tree.leaves(theirs.state(flaxen, theirs.RngCount))
    flaxen(xs)
    assert before[0] < jax.tree.leaves(theirs.state(flaxen, theirs.RngCount))[0]


def test_zeros_need_no_rngs() -> None:
    for name in ("LSTMCell", "SimpleCell"):
        mine, flaxen = both(name)
        with pytest.raises(ValueError, match="RNGs must be provided"):
            flaxen.initialize_carry((B, D))
        rngs, drawn_from = theirs.Rngs(0), theirs.Rngs(0)
        same_bits(mine.initialize_carry((B, D), rngs), flaxen.initialize_carry((B, D), drawn_from))
        assert drawn_from.carry.count[...] == (2 if name == "LSTMCell" else 1)
        same_bits(mine.initialize_carry((B, D)), mine.initialize_carry((B, D), rngs))
        assert rngs.carry.count[...] == 0
        assert jax.tree.leaves(mine.initialize_carry((B, D), None, theirs.initializers.ones))[0].all()
    xs = jnp.ones((B, T, D), f32)
    with pytest.raises(ValueError, match="RNGs must be provided"):
        theirs.RNN(flaxen, rngs=False)(xs)
    same_bits(ours.RNN(mine, rngs=False)(xs), ours.RNN(flaxen, rngs=False)(xs))
    with pytest.raises(ValueError, match="this carry is random and needs `rngs`"):
        mine.initialize_carry((B, D), carry_init=theirs.initializers.normal())


def test_a_stream_is_accepted_as_the_annotation_says() -> None:
    xs = jnp.ones((B, T, D), f32)
    with pytest.warns(UserWarning, match="carry_init is provided"):
        mine, flaxen = both("GRUCell", carry_init=theirs.initializers.normal())
    with pytest.raises(ValueError, match="Expected rngs to be"):
        theirs.RNN(flaxen, rngs=theirs.RngStream(3, tag="carry"))
    close(ours.RNN(mine, rngs=theirs.RngStream(3, tag="carry"))(xs), theirs.RNN(flaxen, rngs=theirs.Rngs(3))(xs), 1e-6)
    for layer in (ours.RNN, lambda cell, rngs: ours.Bidirectional(ours.RNN(cell), ours.RNN(cell), rngs=rngs)):
        with pytest.raises(ValueError, match=r"\(rngs=<int>\)`: expected nnx.Rngs, an nnx.RngStream, True or False"):
            layer(mine, rngs=3)
    with pytest.raises(ValueError, match="needs `rngs`"):
        ours.RNN(mine, rngs=False)(xs)


def test_a_random_carry_differs_between_directions_and_calls() -> None:
    with pytest.warns(UserWarning, match="carry_init is provided"):
        cell = make(ours, "GRUCell", carry_init=theirs.initializers.normal())
    layer = ours.Bidirectional(ours.RNN(cell), ours.RNN(theirs.clone(cell)), return_carry=True)
    carries = [a for _ in range(2) for a in layer(jnp.ones((B, 0, D), f32))[0]]
    assert all(jnp.abs(carries[i] - carries[j]).max() > 1e-2 for i in range(4) for j in range(i))


def test_directions_start_apart_in_our_example() -> None:
    """Flax's builds either direction from a seed of its own, the same one."""
    apart, rngs = [], theirs.Rngs(0)
    for nn, given in ((theirs, lambda: theirs.Rngs(0)), (ours, lambda: rngs)):
        layer = nn.Bidirectional(*(nn.RNN(nn.GRUCell(D, H, rngs=given())) for _ in range(2)))
        kernels = [rnn.cell.dense_i.kernel[...] for rnn in (layer.forward_rnn, layer.backward_rnn)]
        apart.append(float(jnp.abs(kernels[0] - kernels[1]).max()))
    assert apart[0] == 0 and apart[1] > 0.1


# -------------------------------------------------------------------------------------------- lengths


@pytest.mark.sample(1)
@WAYS
def test_length_zero_gives_the_initial_carry(way: int) -> None:
    xs, carry, lengths = normal(1, (3, T, D)), start("GRUCell", (3,)), jnp.array([0, 2, 0])
    cell = kinds()[way]
    last, ys = ours.RNN(cell, return_carry=True)(xs, initial_carry=carry, seq_lengths=lengths)
    close(last, carry.at[1].set(ys[1, 1]))
    last, ys = theirs.RNN(cell, return_carry=True)(xs, initial_carry=carry, seq_lengths=lengths)
    same_bits(last[0], ys[0, -1])


def test_several_batch_axes_with_lengths() -> None:
    """Flax gives a carry of another shape where the axes are equal, and fails where they are not."""
    lengths, xs, carry = jnp.array([[0, 1, 2], [3, 4, 5], [5, 2, 0]]), normal(1, (3, 3, T, D)), start("", (3, 3))

    @jax.jit
    def run() -> Any:
        layers = [ours.RNN(cell, return_carry=True, reverse=True) for cell in kinds()]
        several = [layer(xs, initial_carry=carry, seq_lengths=lengths) for layer in layers]
        flat = layers[0](xs.reshape(9, T, D), initial_carry=carry.reshape(9, H), seq_lengths=lengths.reshape(9))
        return several, flat

    several, (last, ys) = run()
    close(several, [(last.reshape(3, 3, H), ys.reshape(3, 3, T, H))] * 2)

    def in_flax(xs: Any, carry: Any, lengths: Any) -> Any:
        layer = theirs.RNN(make(theirs, "GRUCell", param_dtype=f64), return_carry=True)
        return layer(xs, initial_carry=carry, seq_lengths=lengths)[0]

    assert jax.eval_shape(in_flax, xs, carry, lengths).shape == (3, 3, 3, H)
    with pytest.raises((ValueError, TypeError, IndexError)):
        jax.eval_shape(in_flax, xs[:2], carry[:2], lengths[:2])


@WAYS
@pytest.mark.parametrize("kwargs,message", BAD_MASKS, ids=str)
def test_bad_lengths_and_resets(way: int, kwargs: dict[str, Any], message: str) -> None:
    cell, xs = kinds()[way], jnp.ones((B, T, D))
    with pytest.raises(ValueError, match=message):
        ours.RNN(cell, return_carry=True)(xs, **kwargs)


def test_lengths_that_flax_takes_in_silence() -> None:
    def in_flax(lengths: Any) -> Any:
        layer = theirs.RNN(make(theirs, "GRUCell"), return_carry=True)
        return layer(jnp.ones((B, T, D), f32), seq_lengths=lengths)[0]

    for lengths in ([2], [2, T + 1]):
        assert jax.eval_shape(in_flax, jnp.array(lengths)).shape == (B, H)


def test_padding_that_is_not_finite_reaches_nothing() -> None:
    """In Flax it poisons the gradients of all weights, though masked outputs and the carry are sound."""
    lengths, inside = jnp.array([0, 2, T]), (jnp.arange(T) < jnp.array([0, 2, T])[:, None])[..., None]
    clean = jnp.where(inside, normal(1, (3, T, D)), 0.0)
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    dirty, carry = jnp.where(inside, clean, bad), start("GRUCell", (3,))

    def gradients(rnn: Any, xs: jax.Array) -> Any:
        graph, params = theirs.split(rnn, theirs.Param)

        def loss(params: Any, xs: Any, carry: Any) -> Any:
            last, ys = theirs.merge(graph, params)(xs, initial_carry=carry, seq_lengths=lengths, return_carry=True)
            out = last, jnp.where(inside, ys, 0.0)
            return projected(out), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, xs, carry)

    @jax.jit
    def run(clean: jax.Array, dirty: jax.Array) -> Any:
        layers = [ours.RNN(cell) for cell in kinds()]
        flaxen = theirs.RNN(kinds()[0], rngs=False)
        return [(gradients(r, dirty), gradients(r, clean)) for r in layers], gradients(flaxen, dirty)[0][0]

    pairs, flaxen = run(clean, dirty)
    for got, want in pairs:
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(got))
        close(got, want, 0.0)
    assert not any(jnp.isfinite(a).all() for a in jax.tree.leaves(flaxen))


def test_no_steps_at_all() -> None:
    xs, carry = jnp.ones((B, 0, D)), start("GRUCell")
    for cell in kinds():
        for lengths in (None, jnp.zeros(B, int)):
            last, ys = ours.RNN(cell, return_carry=True)(xs, initial_carry=carry, seq_lengths=lengths)
            same_bits(last, carry)
            assert ys.shape == (B, 0, H)
    with pytest.raises((ValueError, TypeError, IndexError, ZeroDivisionError)):
        theirs.RNN(cell, return_carry=True)(xs, initial_carry=carry, seq_lengths=jnp.zeros(B, int))


# ------------------------------------------------------------------------------------ resets and states


@pytest.mark.sample(1)
@pytest.mark.parametrize("way,time_major", [(0, False), (1, True)], ids=["unroll", "nnx.scan, time major"])
def test_resets_start_again_from_the_initial_carry(way: int, time_major: bool) -> None:
    xs, carry, cell = normal(1, (B, T, D)), start("GRUCell"), kinds()[way]
    layer, resets = ours.RNN(cell, return_carry=True), jnp.zeros((B, T), bool).at[:, 2].set(True)

    def turned(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(a, 0, 1) if time_major else a

    last, ys = layer(turned(xs), initial_carry=carry, resets=turned(resets), time_major=time_major)
    _, first = layer(xs[:, :2], initial_carry=carry)
    again, second = layer(xs[:, 2:], initial_carry=carry)
    close((last, turned(ys)), (again, jnp.concatenate([first, second], 1)))


@WAYS
def test_resets_return_to_another_carry_than_the_stored_one(way: int) -> None:
    xs, stored, cell = normal(1, (B, T, D)), start("GRUCell"), kinds()[way]
    own = cell.initialize_carry((B, D))
    resets = jnp.array([[True, False, False, True, False], [False, False, True, True, False]])
    carry, ys = stored, []
    for t in range(T):
        carry, y = cell(jnp.where(resets[:, t, None], own, carry), xs[:, t])
        ys.append(y)
    got = ours.RNN(cell, return_carry=True)(xs, initial_carry=stored, resets=resets, reset_carry=own)
    close(got, (carry, jnp.stack(ys, 1)))


def test_states_are_the_last_element() -> None:
    xs, carry = normal(1, (3, T, D)), start("LSTMCell", (3,))
    options = dict(reverse=True, seq_lengths=jnp.array([0, 2, T]))
    layer = ours.RNN(noisy(make(ours, "LSTMCell", param_dtype=f64)))
    ys, states = layer(xs, initial_carry=carry, return_states=True, **options)
    (c, h), ys_too, _ = layer(xs, initial_carry=carry, return_states=True, return_carry=True, **options)
    same_bits((ys, ys), (ys_too, states.carries[1]))
    assert states.carries[0].shape == ys.shape and {a.shape for a in states.gates} == {ys.shape}
    close((c[1], h[1]), (states.carries[0][1, 1], ys[1, 1]))
    _, others = ours.RNN(kinds()[1])(xs, return_states=True)
    assert others.gates is None and others.carries.shape == ys.shape


# ----------------------------------------------------------------------------------- dtypes and inputs


def test_the_simple_cell_in_bfloat16_runs_where_flax_fails() -> None:
    xs = normal(1, (B, T, D), f32)
    mine, flaxen = both("SimpleCell", dtype=bf16)
    with pytest.raises(TypeError, match="carry"):
        theirs.RNN(flaxen)(xs)

    class Subclass(ours.SimpleCell):
        pass

    slow = Subclass(D, H, dtype=bf16, rngs=theirs.Rngs(0))
    theirs.update(slow, theirs.state(mine))
    exact = theirs.RNN(both("SimpleCell")[1])(xs)
    for cell in (mine, flaxen, slow):
        h, ys = ours.RNN(cell, return_carry=True)(xs)
        assert (h.dtype, ys.dtype) == (f32, bf16)
        np.testing.assert_allclose(ys.astype(f32), exact, rtol=0, atol=0.03)


def test_bad_inputs_and_carries() -> None:
    layer = ours.RNN(make(ours, "LSTMCell"))
    flaxen = theirs.RNN(make(theirs, "LSTMCell"))
    pair = (jnp.ones((B, T, D)), jnp.ones((B, T)))
    with pytest.raises(AttributeError, match="ndim"):
        flaxen(pair)
    with pytest.raises(ValueError, match="expected one array.*`resets`"):
        layer(pair)
    with pytest.raises(ValueError, match="expected at least 2 axes"):
        layer(jnp.ones(D))
    with pytest.raises(ValueError, match=r"expected the tuple \(c, h\)"):
        layer(jnp.ones((B, T, D)), initial_carry=jnp.zeros((B, H)))
    with pytest.raises(ValueError, match="expected floating point"):
        layer(jnp.ones((B, T, D)), initial_carry=(jnp.zeros((B, H + 1)), jnp.zeros((B, H + 1))))
    with pytest.raises(ValueError, match="D = 7 features, the parameters expect D = 3"):
        layer(jnp.ones((B, T, 7)))
    with pytest.raises(ValueError, match="the cell's carry has an array of shape"):
        ours.RNN(kinds()[1])(jnp.ones((B, T, D)), initial_carry=jnp.zeros(H), resets=jnp.zeros((B, T), bool))


# -------------------------------------------------------------------------------------- Bidirectional


def test_bidirectional_does_not_override_its_children_in_silence() -> None:
    xs = normal(1, (T, B, D), f32)
    turned, plain = (ours.RNN(make(ours, "GRUCell"), time_major=t) for t in (True, False))
    for children in ((turned, plain), (plain, turned)):
        with pytest.raises(ValueError, match="give Bidirectional time_major=True as well"):
            ours.Bidirectional(*children)(xs)
    batch_as_time = theirs.Bidirectional(turned, plain)(xs)
    assert batch_as_time.shape == (T, B, 2 * H)
    want = jnp.swapaxes(ours.Bidirectional(plain, theirs.clone(plain))(jnp.swapaxes(xs, 0, 1)), 0, 1)
    assert jnp.abs(batch_as_time - want).max() > 1e-2
    for layer in (ours.Bidirectional(turned, plain, time_major=True), ours.Bidirectional(turned, plain)):
        close(layer(xs, time_major=True), want, 1e-6)
    with pytest.raises(NotImplementedError, match="both directions are read already"):
        ours.Bidirectional(turned, plain, time_major=True)(xs, reverse=True)
    assert theirs.Bidirectional(plain, turned)(xs, reverse=True).shape == (T, B, 2 * H)
    kept = ours.Bidirectional(turned, plain)(xs, time_major=True, reverse=False, keep_order=True)
    close(kept, want, 1e-6)
    with pytest.warns(UserWarning, match="both are the same object"):
        ours.Bidirectional(plain, plain)(xs)


def test_a_bidirectional_layer_without_randomness_has_no_rng_state() -> None:
    xs = normal(1, (B, T, D), f32)
    pairs = zip(both("GRUCell"), both("GRUCell"), strict=True)
    mine, flaxen = (nn.Bidirectional(*map(nn.RNN, cells)) for nn, cells in zip((ours, theirs), pairs, strict=True))
    with pytest.raises(ValueError, match="Non-exhaustive filters"):
        theirs.split(flaxen, theirs.Param)
    graph, params = theirs.split(mine, theirs.Param)
    close(jax.jit(lambda params: theirs.merge(graph, params)(xs))(params), flaxen(xs), 1e-6)
    silent = theirs.RNN(make(theirs, "GRUCell"), rngs=False)
    assert ours.Bidirectional(silent, silent).rngs is not None and mine.rngs is None
