"""Backend "cpp": its loops against the NumPy references and the scan, its layouts, its compiler, its refusals."""

from __future__ import annotations

import collections
import dataclasses
import platform
import re
import threading
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_devices

import rnncore
from rnncore.kernels import compiler
from rnncore.kernels.cpp import emit, handlers

CPP, SCAN = "cpp", "scan"
# Two orders of summing some hundred terms of about 1 in float32, forward, back and over steps.
FLOAT32 = 1e-5
IDS = ("elman_relu", "lstm-dense", "lstm_both-heads", "lstm_functions", "gru-heads", "user_fast_slow-heads")

pytestmark = pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")


def compare(case: cases.Case, problem: cases.Problem, tolerance: float, **options: Any) -> None:
    """Results and gradients for random cotangents, against the scan's."""
    results, gradients, cotangents = cases.pull(cases.runner(case, CPP, **options), problem)
    want = cases.puller(cases.runner(case, SCAN, **options))(problem, cotangents)
    cases.assert_close((results, gradients), want, tolerance)


def sized(id: str, hidden: int) -> cases.Case:
    case = cases.BY_ID[id]
    return dataclasses.replace(case, cell=dataclasses.replace(case.cell, hidden_size=hidden))


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("id", IDS)
def test_float64_against_the_references(id: str, masked: bool):
    case = cases.BY_ID[id]
    problem = cases.draw(case, lengths=masked, resets=masked)
    cases.assert_expected(case, problem, *cases.pull(cases.runner(case, CPP), problem))


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("id", "hidden", "batch", "steps", "features"),
    [
        ("lstm-dense", 40, 13, 70, 19),  # units and inputs that fill no vector, blocks of unequal rows, several chunks
        ("lstm-dense", 64, 3, 150, 33),
        ("gru-heads", 74, 5, 21, 1),  # heads of 37: each is padded for itself
        ("gru-dense", 32, 2, 9, 70),
    ],
)
def test_float32_in_several_blocks(id: str, hidden: int, batch: int, steps: int, features: int, masked: bool):
    case = sized(id, hidden)
    problem = cases.draw(case, (batch,), steps, features, dtype=jnp.float32, lengths=masked, resets=masked)
    shrunk = jax.tree.map(lambda a: a / 4, problem.params)  # with larger ones the sums grow to hundreds
    compare(case, problem._replace(params=shrunk), FLOAT32)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("batch", "options"),
    [((), {}), ((2, 3), {}), ((2, 3), {"reverse": True}), ((3,), {"reverse": True, "keep_order": True}), ((1,), {})],
    ids=["none", "two", "reversed", "kept", "one"],
)
def test_batch_axes_and_directions(batch: tuple[int, ...], options: dict):
    case = cases.BY_ID["lstm_both-heads"]
    compare(case, cases.draw(case, batch, 6, lengths=True, resets=True), cases.FLOAT64, **options)


def test_time_major():
    case = cases.BY_ID["gru-heads"]
    problem = cases.draw(case, resets=True)
    turned = problem._replace(xs=jnp.moveaxis(problem.xs, 1, 0), resets=problem.resets.T)
    compare(case, turned, cases.FLOAT64, time_major=True)


def test_masks_of_the_recurrent_product():
    case = sized("lstm_both-heads", 20)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 20)) * 2.0)
    compare(case, cases.draw(case, resets=True), cases.FLOAT64, recurrent_mask=mask)


def test_a_reset_carry_of_its_own():
    case = cases.BY_ID["lstm_both-heads"]
    problem = cases.draw(case, resets=True, lengths=True)

    def gradient(backend: str) -> Any:
        def loss(target: Any) -> Any:
            out = cases.runner(case, backend, reset_carry=target)(*problem)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out))

        return jax.value_and_grad(loss)(cases.cotangents(problem.carry, 5))

    cases.assert_close(gradient(CPP), gradient(SCAN), cases.FLOAT64)


def test_no_steps():
    case = cases.BY_ID["lstm-dense"]
    compare(case, cases.draw(case, steps=0), 0.0)


# ------------------------------------------------------------------------------------ options


def zoneout(case: cases.Case, problem: cases.Problem, kind: str) -> Any:
    """What of the old carry stays: a share, booleans, shares of their own, or some of each and nothing of a field."""
    rng, shape = np.random.default_rng(3), (*problem.xs.shape[:-1], case.cell.hidden_size)
    of = {
        "share": lambda: 0.3,
        "chosen": lambda: jnp.asarray(rng.random(shape) < 0.4),
        "shares": lambda: jnp.asarray(rng.random(shape), problem.xs.dtype),
        "nothing": lambda: None,
    }
    fields = case.cell.Carry._fields
    names = {"mixed": ("chosen", "share", "nothing", "shares")}.get(kind, (kind,))
    return case.cell.Carry(*(of[names[n % len(names)]]() for n in range(len(fields))))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["share", "chosen", "shares", "mixed"])
@pytest.mark.parametrize("id", ["lstm_both-heads", "gru-diagonal"])
def test_zoneout(id: str, kind: str):
    case = sized(id, 20)
    problem = cases.draw(case, resets=True, lengths=True)
    compare(case, problem, cases.FLOAT64, zoneout=zoneout(case, problem, kind))


STATES = ["elman_relu", "lstm_both-heads", "user_fast_slow-heads", "gru-diagonal"]


@pytest.mark.slow
@pytest.mark.parametrize("id", STATES)
def test_states_and_their_gradients(id: str):
    case = sized(id, 18)
    problem = cases.draw(case, resets=True, lengths=True)
    compare(case, problem, cases.FLOAT64, return_states=True)
    compare(case, problem, cases.FLOAT64, return_states=True, reverse=True, keep_order=True)


@pytest.mark.slow
def test_states_with_all_the_rest():
    case = sized("lstm_both-heads", 18)
    problem = cases.draw(case, (2, 3), 21, resets=True, lengths=True)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 3, 18)) * 2.0)
    options: dict[str, Any] = {"return_states": True, "recurrent_mask": mask, "recompute": "chunk"}
    compare(case, problem, cases.FLOAT64, zoneout=zoneout(case, problem, "mixed"), **options)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "chunk", "checkpoint_every": 3}, {"recompute": "gates", "checkpoint_every": 7},
        {"recompute": "chunk"}, {"recompute": "gates", "checkpoint_every": 1}, {"checkpoint_every": 5},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("id", ["lstm_both-heads", "gru-diagonal", "lstm-dense"])
def test_stretches_that_are_run_again(id: str, options: dict):
    case = sized(id, 20)
    problem = cases.draw(case, (5,), 29, 7, resets=True, lengths=True)
    compare(case, problem, cases.FLOAT64, **options)


@pytest.mark.slow
def test_stretches_that_a_team_runs_again():
    case = sized("lstm-dense", 192)
    problem = cases.draw(case, (3,), 30, 40, dtype=jnp.float32, lengths=True, resets=True)
    shrunk = problem._replace(params=jax.tree.map(lambda a: a / 8, problem.params))
    compare(case, shrunk, FLOAT32, recompute="chunk", checkpoint_every=7)


def test_running_again_gives_the_same_bits():
    case = sized("lstm-dense", 48)
    problem = cases.draw(case, (7,), 50, 20, dtype=jnp.float32)
    plain = cases.pull(cases.runner(case, CPP), problem)
    again = cases.pull(cases.runner(case, CPP, recompute="chunk", checkpoint_every=8), problem)
    cases.assert_close(again[0], plain[0], 0.0)
    cases.assert_close(again[1], plain[1], FLOAT32)  # chunks of another length sum in another order


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("id", ["indrnn", "lstm_both-diagonal", "user_fast_slow-diagonal"])
def test_diagonal_recurrences(id: str):
    case = sized(id, 37)
    problem = cases.draw(case, (5,), 40, 7, resets=True, lengths=True)
    compare(case, problem._replace(params=jax.tree.map(lambda a: a / 2, problem.params)), cases.FLOAT64)


@pytest.mark.parametrize("options", [{}, {"return_states": True}, {"recompute": "chunk"}], ids=str)
def test_an_empty_batch(options: dict):
    case = cases.BY_ID["lstm_both-heads"]
    one = cases.draw(case, (1,), lengths=True, resets=True)
    nothing = jax.tree.map(lambda a: a[:0], one._replace(params=None))
    compare(case, nothing._replace(params=one.params), 0.0, **options)


def errors_in(case: cases.Case, problem: cases.Problem, dtypes: Any, backend: str, **options: Any) -> list[float]:
    """Of every result and gradient in these dtypes (params, xs, carry), in terms of its largest number in float64."""
    cast = [jax.tree.map(lambda a, d=d: a.astype(d), a) for a, d in zip(problem[:3], dtypes, strict=True)]
    narrow = problem._replace(params=cast[0], xs=cast[1], carry=cast[2])
    exact = narrow._replace(**{n: jax.tree.map(lambda a: a.astype(jnp.float64), getattr(narrow, n))
                               for n in ("params", "xs", "carry")})  # fmt: skip
    results, gradients, given = cases.pull(cases.runner(case, backend, **options), narrow)
    # The cotangents are rounded to the dtypes of the results, the same for both.
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), given)
    want = cases.puller(cases.runner(case, SCAN))(exact, wide)
    like = jax.eval_shape(cases.runner(case, SCAN), *narrow)
    assert jax.tree.map(lambda a: a.dtype, results) == jax.tree.map(lambda a: a.dtype, like)
    assert jax.tree.map(lambda a: a.dtype, gradients) == jax.tree.map(lambda a: a.dtype, tuple(cast))
    pairs = zip(jax.tree.leaves((results, gradients)), jax.tree.leaves(want), strict=True)
    return [float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()) for a, b in pairs]


BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes",
    [(BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, F32), (BF16, BF16, F32)],
    ids=["bf16", "f16", "inputs", "carry"],
)
def test_narrow_numbers_are_no_worse_than_the_scan(dtypes: Any):
    """Sums and the carry are float32 inside, so errors are those of rounding what goes in and out and what is kept."""
    case = sized("lstm_both-heads", 20)
    problem = cases.draw(case, (5,), 20, 7, resets=True, lengths=True)
    problem = problem._replace(params=jax.tree.map(lambda a: a / 2, problem.params))
    found, scan = (errors_in(case, problem, dtypes, backend) for backend in (CPP, SCAN))
    eps = max(float(jnp.finfo(d).eps) for d in dtypes)
    assert max(found) <= 2 * eps, (found, scan)
    assert sum(found) <= 1.01 * sum(scan), (found, scan)  # of float32 parameters the inputs' rounding is all, of both


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "eps"), [(BF16, 2**-8), (F16, 2**-11), (F32, 2**-24)], ids=["bf16", "f16", "f32"])
def test_what_is_kept_in_fewer_bits(stored: Any, eps: float):
    case = sized("lstm_both-heads", 20)
    problem = cases.draw(case, (5,), 20, 7, resets=True, lengths=True)
    exact = cases.pull(cases.runner(case, CPP), problem)
    got = cases.pull(cases.runner(case, CPP, residual_dtype=stored), problem)
    cases.assert_close(got[0], exact[0], 0.0)
    cases.assert_close(got[1], exact[1], 8 * eps)
    differ = [float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (got[1], exact[1])), strict=True)]
    assert max(differ) > eps / 100  # it was stored so


class Functions(rnncore.PointwiseCell):
    """Every field of its carry is a function of the input."""

    gates = ("x",)
    Carry = collections.namedtuple("Carry", ("h", "logistic", "exp", "expm1", "softplus", "gelu", "several", "others"))

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        x = z.x + r.x
        several = jnp.sqrt(jnp.abs(x)) + jnp.log1p(jnp.square(x)) + jnp.arctan2(x, 2.0) + jnp.minimum(x, 20.0) ** 5
        others = jnp.sin(x) + jnp.floor(x) * 0.1 + jnp.round(x) + jnp.sign(x) + jnp.clip(x, -1, 1)
        others = jnp.where((x > 0) & jnp.isfinite(x), jax.lax.rsqrt(1 + x * x), others)
        new = jnp.tanh(x), jax.nn.sigmoid(x), jnp.exp(x), jnp.expm1(x), jax.nn.softplus(x)
        return self.Carry(*new, jax.nn.gelu(x, approximate=False), several, others), self.Gates(x)


# Against float64, in units of the last place of the result: what the float32 formulas were written for.
ULPS = {"h": 4, "logistic": 3, "exp": 2, "expm1": 4, "softplus": 4}
EXACT = {
    "h": np.tanh, "logistic": lambda x: 1 / (1 + np.exp(-x)), "exp": np.exp, "expm1": np.expm1,
    "softplus": lambda x: np.logaddexp(x, 0),
}  # fmt: skip


@pytest.mark.ci
def test_functions():
    cell = Functions(1)
    one = jnp.ones((1, 1, 1), jnp.float32)
    params = cell.init(jax.random.key(0), 1)._replace(input_kernel=one, recurrent_kernel=0 * one)
    size = 10.0 ** np.linspace(-30, 1.9, 4001)
    x = np.concatenate([-size, [0.0], size, np.linspace(-87, 88, 4001)]).astype(np.float32)
    x = np.concatenate([x, [np.nan, 1e30, -1e30, 100, -100]]).astype(np.float32)

    def run(backend: str) -> Any:
        options: Any = {"backend": backend}
        return jax.tree.map(lambda a: np.asarray(a[:, 0]), rnncore.unroll(cell, params, x[:, None, None], **options)[0])

    got, want = run(CPP), run(SCAN)
    for name in cell.Carry._fields:
        a, b = getattr(got, name), getattr(want, name)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
        if name in ULPS:
            inside = x[:-5].astype(np.float64)
            exact = EXACT[name](inside)
            unit = np.maximum(np.spacing(np.abs(exact).astype(np.float32)), 1e-37)
            error = np.abs(a[:-5] - exact) / unit
            assert error.max() <= ULPS[name], (name, x[error.argmax()], error.max())


def test_long_sums_of_weight_gradients():
    """Half a million terms: one after the other they would lose three digits in float32."""
    cell = rnncore.LSTM(4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), cell.init(jax.random.key(0), 2)
    )
    xs = jnp.asarray(rng.normal(0.5, 1, (256, 2048, 2)), jnp.float32)

    @jax.jit
    def gradient(params: Any, xs: Any) -> Any:
        backend = "cpp" if xs.dtype == jnp.float32 else "scan"
        return jax.grad(lambda p: rnncore.unroll(cell, p, xs, backend=backend)[1].sum())(params)

    got, want = gradient(params, xs), gradient(*jax.tree.map(lambda a: a.astype(jnp.float64), (params, xs)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(g - w).max() < 5e-6 * np.abs(w).max()


def test_a_team_shares_every_step_of_few_sequences():
    """Two threads on three sequences of 192 units; one alone where there is but one core."""
    case = sized("lstm-dense", 192)
    problem = cases.draw(case, (3,), 30, 40, dtype=jnp.float32, lengths=True, resets=True)
    compare(case, problem._replace(params=jax.tree.map(lambda a: a / 8, problem.params)), FLOAT32)


def test_large_pre_activations_give_finite_gradients():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, dtype=jnp.float32)
    results, gradients, _ = cases.pull(cases.runner(case, CPP), problem._replace(xs=100 * problem.xs))
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((results, gradients)))


# -------------------------------------------------------------------------- transformations


@pytest.mark.sample(1)
@pytest.mark.parametrize("over", ["sequences", "twice", "parameters", "carry"])
def test_vmap_of_gradients(over: str):
    case = cases.BY_ID["user_fast_slow-heads"]
    problem = cases.draw(case, batch=(3, 2, 4), lengths=True, resets=True)
    axes = {"sequences": (None, 0, 0, 0, 0), "carry": (None, None, 0, None, None), "parameters": (0, 0, 0, 0, 0)}
    problem = {
        "carry": problem._replace(xs=problem.xs[0], lengths=problem.lengths[0], resets=problem.resets[0]),
        "parameters": problem._replace(
            params=jax.tree.map(lambda a: a * jnp.arange(1, 4).reshape(3, *[1] * a.ndim), problem.params)
        ),
    }.get(over, problem)

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any, carry: Any, lengths: Any, resets: Any) -> Any:
            out = cases.runner(case, backend)(params, xs, carry, lengths, resets)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(out))

        one = jax.value_and_grad(loss, (0, 1, 2))
        for _ in range(2 if over == "twice" else 1):
            one = jax.vmap(one, axes.get(over, axes["sequences"]))
        return jax.jit(one)(*problem)

    cases.assert_close(gradient(CPP), gradient(SCAN), cases.FLOAT64)


def test_gradient_of_a_vmap_and_checkpoint():
    case = cases.BY_ID["gru-heads"]
    problem = cases.draw(case, batch=(3, 2))

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any, carry: Any) -> Any:
            run = jax.checkpoint(cases.runner(case, backend))
            return jnp.sum(jax.vmap(run, (None, 0, 0))(params, xs, carry)[1] ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*problem[:3])

    cases.assert_close(gradient(CPP), gradient(SCAN), cases.FLOAT64)


def test_vmap_over_parameters_of_a_run_alone():
    cell = rnncore.GRU(3)
    several = jax.vmap(lambda key: cell.init(key, 2))(jax.random.split(jax.random.key(0), 2))
    xs = jax.random.normal(jax.random.key(1), (4, 2))
    found = jax.vmap(lambda params: rnncore.unroll(cell, params, xs, backend="cpp")[1])(several)
    for n, ys in enumerate(found):
        one = jax.tree.map(lambda a, n=n: a[n], several)
        np.testing.assert_allclose(ys, rnncore.unroll(cell, one, xs, backend="scan")[1], rtol=1e-6, atol=1e-7)


def test_vmap_over_nothing():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, batch=(1, 2))

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any) -> Any:
            return jnp.sum(cases.runner(case, backend)(params, xs, None)[1])

        return jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(problem.params, problem.xs[:0])

    cases.assert_close(gradient(CPP), gradient(SCAN), 0.0)


def test_what_runs_is_the_call_and_no_loop():
    case = cases.BY_ID["lstm-dense"]
    problem = cases.draw(case, dtype=jnp.float32)

    def loss(params: Any, xs: Any) -> Any:
        return jnp.sum(cases.runner(case, CPP)(params, xs, problem.carry)[1])

    def text(arguments: Any) -> str:
        return jax.jit(jax.grad(loss, arguments)).lower(problem.params, problem.xs).as_text()

    both, params_only = text((0, 1)), text(0)
    called = re.findall(r"custom_call @(\w+?)_[0-9a-f]{24}\(", both)
    assert called == ["rnncore_forward_keeping", "rnncore_backward"]
    assert "stablehlo.while" not in both and "dot_general" not in both
    dx = f"tensor<{'x'.join(map(str, problem.xs.shape))}xf32>"
    assert dx in both.split("rnncore_backward")[1].split("->")[1]
    assert dx not in params_only.split("rnncore_backward")[1].split("->")[1]  # nobody asked for it


def test_memory_of_a_gradient_step():
    """1 + R arrays: the outputs, which nobody asks for here, and the gates; c of few steps alone."""
    cell = rnncore.LSTM(32)
    params, xs = cell.init(jax.random.key(0), 32, jnp.float32), jnp.ones((8, 256, 32), jnp.float32)

    def loss(params: Any, xs: Any) -> Any:
        return jnp.sum(rnncore.unroll(cell, params, xs, backend="cpp")[1])

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, xs).compile()
    arrays = compiled.memory_analysis().temp_size_in_bytes / (4 * 8 * 256 * 32)
    assert 5 <= arrays < 6.5, arrays  # and the cotangent of the outputs


def test_gradients_of_the_parameters_alone():
    case = cases.BY_ID["lstm_both-heads"]
    problem = cases.draw(case, resets=True)

    def gradient(backend: str) -> Any:
        return jax.grad(lambda p: jnp.sum(cases.runner(case, backend)(p, *problem[1:])[1] ** 2))(problem.params)

    cases.assert_close(gradient(CPP), gradient(SCAN), cases.FLOAT64)


def test_the_same_bits_every_time_and_from_several_threads():
    case = sized("lstm-dense", 48)
    problem = cases.draw(case, (7,), 50, 20, dtype=jnp.float32)
    pull = cases.puller(cases.runner(case, CPP))
    given = cases.cotangents(jax.eval_shape(cases.runner(case, CPP), *problem))
    first = jax.tree.map(np.asarray, pull(problem, given))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(pull(problem, given))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for again in found:
        cases.assert_close(again, first, 0.0)


@pytest.mark.slow
def test_the_batch_over_devices():
    """Inside shard_map, over two: the gradients are summed over both."""
    two_devices.assert_gradients_are_summed("cpp", "float64", cases.FLOAT64)


# ------------------------------------------------------------------- the text and the compiler


def test_the_text_depends_on_the_update_alone():
    plain = emit.Variant("float32", "float32", "float32")
    text = emit.source(rnncore.LSTM(8), plain)
    assert text == emit.source(rnncore.LSTM(300, recurrence=rnncore.Heads(3), forget_bias=1.0), plain)
    assert text != emit.source(rnncore.LSTM(8, peepholes=True), plain)
    assert text != emit.source(rnncore.LSTM(8), plain._replace(residual="bfloat16"))
    assert "gates = 4, fields = 2, hidden = 1, units = 0, residuals = 5, rest = 0, emitted = 0;" in text
    assert "count = 4, h_at = -1, reformed = 1;" in text
    assert "emitted = 4;" in emit.source(rnncore.LSTM(8), plain._replace(states=True))
    assert text.count("logistic(") == 6 and text.count("hyperbolic_tangent(") == 5  # tanh(c) is formed again backwards


PROCESSORS = ["x86-64", "x86-64-v3"] if platform.machine() == "x86_64" else []


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_processors_with_narrower_vectors(processor: str, monkeypatch: pytest.MonkeyPatch):
    flags = tuple(flag.replace("native", processor) for flag in handlers.FLAGS)
    monkeypatch.setattr(handlers, "FLAGS", flags)
    monkeypatch.setattr(handlers, "_names", {})
    forget()
    case = sized("lstm_both-heads", 40)
    problem = cases.draw(case, (7,), 20, 5, dtype=jnp.float32, lengths=True, resets=True)
    compare(case, problem._replace(params=jax.tree.map(lambda a: a / 4, problem.params)), FLOAT32)
    forget()


def forget() -> None:
    """What refers to compiled cells."""
    cases.forget()


class First(rnncore.PointwiseCell):
    """Four gates, the first of which does not see z + r alone."""

    gates = ("a", "b", "c", "d")
    apart = 0

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        a = [zg * rg if g == self.apart else zg + rg for g, (zg, rg) in enumerate(zip(z, r, strict=True))]
        return carry._replace(h=jnp.tanh(a[0] + 2 * a[1] - a[2] * a[3])), self.Gates(*a)


class Last(First):
    apart = 3


@pytest.mark.slow
def test_two_cells_in_one_process_do_not_share_symbols():
    for cell in (First(4), Last(4), First(5)):
        case = cases.Case("own", cell, None)
        compare(case, cases.draw(case), cases.FLOAT64)


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("id", "options", "why"),
    [
        ("lstm-dense", {"residual_dtype": jnp.float8_e4m3fn}, "it takes float32, .* residuals .* float8_e4m3fn"),
        ("reset_before_gru", {}, "not a PointwiseCell"),
    ],
)
def test_refusals(id: str, options: dict, why: str):
    case = cases.BY_ID[id]
    problem = cases.draw(case)
    options = {"backend": "cpp"} | options
    with pytest.raises(NotImplementedError, match=why):
        rnncore.unroll(case.cell, problem.params, problem.xs, **options)


@pytest.mark.slow
def test_refusals_of_what_is_here(monkeypatch: pytest.MonkeyPatch):
    odd = rnncore.Elman(4, activation_fn=jax.lax.erf_inv)
    xs = jnp.ones((2, 3, 4))
    with pytest.raises(NotImplementedError, match="Elman applies `erf_inv`, for which it has no C"):
        rnncore.unroll(odd, odd.init(jax.random.key(0), 4, xs.dtype), xs, backend="cpp")

    rounding = rnncore.Elman(4, activation_fn=lambda x: jnp.tanh(x).astype(jnp.bfloat16).astype(x.dtype))
    with pytest.raises(NotImplementedError, match="Elman applies `convert_element_type` to bfloat16"):
        rnncore.unroll(rounding, odd.init(jax.random.key(0), 4, xs.dtype), xs, backend="cpp")

    class Doubled(rnncore.LSTM):
        def project(self, params: Any, xs: Any) -> Any:
            return 2 * super().project(params, xs)

    doubled = Doubled(4)
    with pytest.raises(NotImplementedError, match="Doubled has a `project` of its own"):
        rnncore.unroll(doubled, doubled.init(jax.random.key(0), 4, xs.dtype), xs, backend="cpp")
    fresh = cases.Case("fresh", First(7), None)
    monkeypatch.setattr(handlers, "_names", {})
    monkeypatch.setenv("RNNCORE_CACHE_DIR", "/nothing/here")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotImplementedError, match="C.. compiler, and none is found: install one, or name it in CXX"):
        cases.runner(fresh, CPP)(*cases.draw(fresh))
