"""Every public entry point under JAX's switches that add checks or change semantics, called and jitted.

A switch changes no number here: what an entry point returns under it is what it returns without.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_ID, assert_close
from flax import nnx as flax_nnx

import rnncore
from rnncore import analysis, linen, nnx, online, training

B, T, D, H = 2, 5, 3, 4
f32 = jnp.float32
XS = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
LENGTHS, RESETS = np.array([T, 2], np.int32), np.arange(B * T).reshape(B, T) % 4 == 2
CELL, GRU = rnncore.LSTM(H, peepholes=True), rnncore.GRU(H)
STACK = rnncore.Stack(rnncore.LSTM(H), num_layers=2, bidirectional=True, dropout=0.2, recurrent_dropout=0.2,
                      zoneout=rnncore.LSTMCarry(0.1, 0.2), learned_carry=True)  # fmt: skip

Entry = Callable[[jax.Array], Any]


def key() -> jax.Array:
    return jax.random.key(3)


def loss(tree: Any) -> jax.Array:
    return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(tree))  # type: ignore[return-value]


def gradient(run: Callable[..., Any], params: Any, xs: jax.Array) -> Any:
    return jax.value_and_grad(lambda p, x: loss(run(p, x)), (0, 1))(params, xs)


# ------------------------------------------------------------------------------------- the entry points


def of_unroll(cell: rnncore.Cell, **options: Any) -> Entry:
    def run(xs: jax.Array) -> Any:
        masks = {"seq_lengths": jnp.asarray(LENGTHS), "resets": jnp.asarray(RESETS)}
        return gradient(lambda p, x: rnncore.unroll(cell, p, x, **masks, **options), cell.init(key(), D, f32), xs)

    return run


def of_stack(xs: jax.Array) -> Any:
    params = STACK.init(key(), D, f32)
    return gradient(lambda p, x: rnncore.unroll_stack(STACK, p, x, seq_lengths=LENGTHS, key=key()), params, xs)


def of_linen(make: Callable[[], Any], **options: Any) -> Entry:
    def run(xs: jax.Array) -> Any:
        layer = make()
        variables = layer.init(key(), xs)
        return gradient(lambda v, x: layer.apply(v, x, **options), variables, xs)

    return run


def of_nnx(make: Callable[[flax_nnx.Rngs], Any], **options: Any) -> Entry:
    def run(xs: jax.Array) -> Any:
        graph, params, rest = flax_nnx.split(make(flax_nnx.Rngs(key())), flax_nnx.Param, ...)
        return gradient(lambda p, x: flax_nnx.merge(graph, p, rest)(x, **options), params, xs)

    return run


def of_training(xs: jax.Array) -> Any:
    def segment_loss(params: Any, carry: Any, segment: Any) -> Any:
        carry, ys = rnncore.unroll(GRU, params, segment, initial_carry=carry)
        return jnp.mean(ys**2), carry

    params, optimizer = GRU.init(key(), D, f32), optax.sgd(1e-2)  # Adam itself mixes dtypes
    state = training.StreamState(params, optimizer.init(params), GRU.initial_carry((B,), f32))
    pieces = training.segments(xs, 2, drop_remainder=True)
    return jax.lax.scan(training.truncated_bptt(segment_loss, optimizer), state, pieces)


def of_online(rule: type, **options: Any) -> Entry:
    def run(xs: jax.Array) -> Any:
        cell = rnncore.GRU(H, recurrence=rnncore.Diagonal()) if rule is online.RTRL else rnncore.Elman(H)
        made, optimizer = rule(cell, **options), optax.sgd(1e-2)
        params = {"cell": cell.init(key(), D, f32), "readout": jnp.ones((H, 1), f32)}
        memory = made.init(params["cell"], cell.initial_carry((), f32))
        state = online.OnlineState(params, optimizer.init(params), memory)
        update = online.online_update(made, lambda w, y, target: jnp.mean((y @ w - target) ** 2), optimizer)
        now = online.OnlineInput(xs[0], xs[0, :, :1], key=jax.random.split(key(), T))
        return jax.lax.scan(update, state, now)

    return run


def of_run(cell: rnncore.Cell, measure: Callable[[analysis.Trajectory], Any]) -> Entry:
    return lambda xs: measure(analysis.trajectory(cell, cell.init(key(), D, f32), xs))


def of_gradients(measure: Callable[..., Any]) -> Entry:
    return lambda xs: measure(lambda carry, ys: loss((carry, ys)), CELL, CELL.init(key(), D, f32), xs)


def of_report(xs: jax.Array) -> Any:
    model = linen.RNN(linen.GRUCell(H, param_dtype=f32))
    found = analysis.report(model, model.init(key(), xs), xs, lambda ys, _: jnp.mean(ys[:, -1] ** 2), exponents=1)
    assert "RNN" in str(found) or found.layers
    return found.layers[next(iter(found.layers))].half_life.median


def of_fixed_points(xs: jax.Array) -> Any:
    return analysis.fixed_points(GRU, GRU.init(key(), D, f32), xs[0, 0], jnp.zeros((2, H), f32)).states


ENTRIES: dict[str, Entry] = {
    "unroll, scan": of_unroll(CELL, backend="scan"),
    "unroll, heads, reverse": of_unroll(rnncore.GRU(H, recurrence=rnncore.Heads(2)), reverse=True, keep_order=True),
    "unroll, chunks": of_unroll(GRU, checkpoint_every=2, recompute="chunk"),
    "unroll, autodiff": of_unroll(rnncore.ResetBeforeGRU(H)),
    "unroll, own cell": of_unroll(BY_ID["user_fast_slow-dense"].cell, return_states=True),
    "unroll, linear": of_unroll(rnncore.MinGRU(H)),
    "unroll_stack": of_stack,
    "linen.RNN": of_linen(lambda: linen.RNN(linen.OptimizedLSTMCell(H, param_dtype=f32)), seq_lengths=LENGTHS),
    "linen.RNN, nn.scan": of_linen(lambda: linen.RNN(linen.GRUCell(H, gate_fn=jax.nn.softmax, param_dtype=f32))),
    "linen.RNN, ConvLSTM": of_linen(lambda: linen.RNN(linen.ConvLSTMCell(2, (3,), param_dtype=f32))),
    "linen.Bidirectional": of_linen(
        lambda: linen.Bidirectional(*(linen.RNN(linen.SimpleCell(H, param_dtype=f32)) for _ in "ab"))
    ),
    "linen.LSTM": of_linen(lambda: linen.LSTM(H, num_layers=2, learned_carry=True, param_dtype=f32)),
    "nnx.RNN": of_nnx(lambda rngs: nnx.RNN(nnx.LSTMCell(D, H, param_dtype=f32, rngs=rngs)), seq_lengths=LENGTHS),
    "nnx.Bidirectional": of_nnx(
        lambda rngs: nnx.Bidirectional(*(nnx.RNN(nnx.GRUCell(D, H, rngs=rngs)) for _ in "ab"), rngs=rngs)
    ),
    "nnx.GRU": of_nnx(lambda rngs: nnx.GRU(D, H, num_layers=2, rngs=rngs)),
    "truncated_bptt": of_training,
    "online.RTRL": of_online(online.RTRL),
    "online.EProp": of_online(online.EProp),
    "online.UORO": of_online(online.UORO),
    "step_jacobians": of_run(CELL, lambda run: analysis.jacobian_product(analysis.step_jacobians(run)).log10_frobenius
                             if hasattr(analysis.ScaledMatrix, "log10_frobenius") else analysis.step_jacobians(run)),
    "retention_curve": of_run(CELL, lambda run: [
        analysis.retention_curve(run, kind=kind, path=path, lags=(1, 3)).log10
        for kind, path in (("rms", "state"), ("rms", "cell"), ("rms", "direct"), ("operator", "state"))
    ]),
    "lyapunov_exponents": of_run(CELL, lambda run: [
        analysis.lyapunov_exponents(run, 2).exponents, analysis.finite_time_lyapunov(run, 2, 2),
    ]),
    "singular_spectrum": of_run(CELL, lambda run: [
        analysis.singular_spectrum(run, 3),
    ]),
    "jacobian_eigenvalues": of_run(CELL, lambda run: jnp.abs(analysis.jacobian_eigenvalues(run, 2)).sum(-1)),
    "norms": of_run(CELL, lambda run: [
        analysis.frobenius_norm(run, 3, probes=2).log10, analysis.operator_norm(run, 3).log10,
    ]),
    "paths": of_run(rnncore.LSTM(H), lambda run: [
        analysis.cell_products(run), analysis.lstm_paths(run), analysis.two_step_residual(run),
    ]),
    "shares": of_run(GRU, analysis.path_shares),
    "gate_paths": of_run(GRU, analysis.gate_paths),
    "window": of_run(CELL, lambda run: [analysis.effective_window(run), analysis.input_influence(run)]),
    "gate_statistics": of_run(CELL, lambda run: jax.tree.leaves(analysis.gate_statistics(run))),
    "bounds": of_run(CELL, lambda run: [
        analysis.gradient_bound(rnncore.Elman(H), rnncore.Elman(H).init(key(), D, f32)),
    ]),
    "gradients_over_time": of_gradients(analysis.gradients_over_time),
    "pascanu_omega": of_gradients(analysis.pascanu_omega),
    "gradient_flossing": lambda xs: analysis.gradient_flossing(CELL, CELL.init(key(), D, f32), xs, 2),
    "h_detach": lambda xs: analysis.h_detach(rnncore.LSTM(H), rnncore.LSTM(H).init(key(), D, f32), xs, key()),
    "report": of_report,
    "fixed_points": of_fixed_points,
}  # fmt: skip


# ----------------------------------------------------------------------------------------- the switches


@contextlib.contextmanager
def switched(**options: Any) -> Any:
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@contextlib.contextmanager
def strict() -> Any:
    """Every check of tracing at once, and random numbers of another kind: a switch is told by what it raises."""
    with (
        jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.default_prng_impl("rbg"),
        jax.checking_leaks(), frozen(),
    ):  # fmt: skip
        yield


@contextlib.contextmanager
def frozen() -> Any:
    """The search for leaks collects garbage again and again; what earlier tests left need not be looked through."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def narrow() -> Any:
    """32 bits in a context of a program of 64, and keys that are numbers."""
    with jax.enable_x64(False), switched(jax_enable_custom_prng=False):
        yield


CONCRETE = ("report", "fixed_points", "window", "gate_statistics", "jacobian_eigenvalues")
"""What looks at numbers, and so cannot be traced."""
STEP_BY_STEP = ("unroll, chunks", "linen.RNN", "nnx.RNN", "online.RTRL", "retention_curve", "gradients_over_time")
"""One of each package: without jit every operation is compiled for itself."""


@pytest.mark.sample(4)
@pytest.mark.parametrize("switch", [strict, narrow])
@pytest.mark.parametrize("name", ENTRIES)
def test_traced_under(name: str, switch: Callable[[], Any]) -> None:
    with switch():
        if name in CONCRETE:
            ENTRIES[name](jnp.asarray(XS))
        else:
            jax.jit(ENTRIES[name]).trace(jax.ShapeDtypeStruct(XS.shape, f32))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ENTRIES)
def test_run_under(name: str) -> None:
    """Checks of NaN and inf; nothing moved to a device that is not asked for; every operation by itself."""
    xs = jnp.asarray(XS)
    run = ENTRIES[name] if name in CONCRETE else jax.jit(ENTRIES[name])
    with jax.debug_nans(True), jax.debug_infs(True):
        want = jax.block_until_ready(run(xs))
    if name not in CONCRETE:
        with jax.transfer_guard("disallow"):
            run(xs)
    if name in STEP_BY_STEP:
        with jax.disable_jit():
            assert_close(ENTRIES[name](xs), want, 5e-5)
