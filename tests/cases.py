"""THE table of cells and backends, and what every test draws from it.

A cell added to the library is one row of CASES, a backend one row of BACKENDS; all tests of values
and transformations then hold for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import rnncore
from rnncore.recurrence import primitives
from rnncore.sequence import call

EVERYWHERE = ("scan", "autodiff")
"""The backends that run anywhere and take any pointwise cell.

What needs a GPU, a TPU or a compiler has tests of its own: test_mosaic_gpu.py, test_cudnn.py, test_pallas_tpu.py,
test_cpp.py.
"""

LINEAR = ("associative_scan", *EVERYWHERE)
"""Those of a cell whose state is elementwise linear in its past."""


# ------------------------------------------------------- cells that a user writes, outside the package


class Leaky(rnncore.PointwiseCell):
    """h' = u h + (1 - u) n: the smallest gated cell."""

    gates = ("u", "n")

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        u = jax.nn.sigmoid(z.u + r.u)
        n = jnp.tanh(z.n + r.n)
        return carry._replace(h=u * carry.h + (1 - u) * n), self.Gates(u, n)


class FastSlowCarry(NamedTuple):
    """Two time scales."""

    slow: jax.Array
    h: jax.Array


class FastSlow(rnncore.PointwiseCell):
    """All that a cell may have: two states, per-unit parameters, a product with r that has its own bias."""

    gates = ("u", "k", "n")
    recurrent_bias = ("k", "n")
    units = ("rate", "gain")
    Carry = FastSlowCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: FastSlowCarry) -> tuple[FastSlowCarry, Any]:
        keep = jnp.exp(-jax.nn.softplus(p.rate + z.k * r.k))
        slow = keep * carry.slow + (1 - keep) * jnp.tanh(z.u + r.u)
        n = jnp.where(z.n > 0, r.n, jnp.sin(r.n)) * z.n
        return FastSlowCarry(slow, jnp.tanh(p.gain * slow + n)), {"keep": keep, "n": n}


# -------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Case:
    """A row.

    Fields:
      id: its name in test ids.
      cell: the cell.
      reference: the same in NumPy; None for a cell that is held to the autodiff backend.
      backends: the backends that run it.
      without: parameters that are None here.
    """

    id: str
    cell: rnncore.Cell
    reference: reference.Cell | None
    backends: tuple[str, ...] = EVERYWHERE
    without: tuple[str, ...] = ()


KERNELS = {"dense": rnncore.Dense(), "heads": rnncore.Heads(2), "diagonal": rnncore.Diagonal()}
HIDDEN = 4


def over_kernels(
    name: str, make: Callable[..., rnncore.Cell], ref: reference.Cell | None, **options: Any
) -> list[Case]:
    """One row for each structure of the recurrent kernel."""
    return [Case(f"{name}-{k}", make(HIDDEN, recurrence=r, **options), ref) for k, r in KERNELS.items()]


CASES = [
    *over_kernels("elman", rnncore.Elman, reference.elman()),
    *over_kernels("elman_residual", rnncore.Elman, reference.elman(residual=True), residual=True),
    Case("elman_sigmoid", rnncore.Elman(HIDDEN, activation_fn=jax.nn.sigmoid), reference.elman("sigmoid")),
    Case("elman_relu", rnncore.Elman(HIDDEN, activation_fn=jax.nn.relu), reference.elman("relu")),
    Case("elman_silu", rnncore.Elman(HIDDEN, activation_fn=jax.nn.silu), reference.elman("silu")),
    Case("indrnn", rnncore.IndRNN(HIDDEN), reference.elman("relu")),
    *over_kernels("leaky", rnncore.Leaky, reference.leaky(1 / 10)),
    Case("leaky_tau", rnncore.Leaky(HIDDEN, learn_tau=True), reference.leaky()),
    Case("mingru", rnncore.MinGRU(HIDDEN), reference.mingru(), backends=LINEAR),
    Case("mingru_signed", rnncore.MinGRU(HIDDEN, positive=False), reference.mingru(positive=False)),
    Case("mingru_heads", rnncore.MinGRU(HIDDEN, recurrence=rnncore.Heads(2)), reference.mingru()),
    Case("minlstm", rnncore.MinLSTM(HIDDEN), reference.minlstm()),
    Case("rglru", rnncore.RGLRU(HIDDEN), reference.rglru(), backends=LINEAR),
    Case("qrnn_f", rnncore.QRNN(HIDDEN, pooling="f"), reference.qrnn("f"), backends=LINEAR),
    Case("qrnn_fo", rnncore.QRNN(HIDDEN), reference.qrnn("fo"), backends=LINEAR),
    Case("qrnn_ifo", rnncore.QRNN(HIDDEN, pooling="ifo"), reference.qrnn("ifo"), backends=LINEAR),
    *over_kernels("lstm", rnncore.LSTM, reference.lstm()),
    *over_kernels("lstm_peepholes", rnncore.LSTM, reference.lstm(peepholes=True), peepholes=True),
    *over_kernels("lstm_coupled", rnncore.LSTM, reference.lstm(coupled=True), coupled=True),
    *over_kernels(
        "lstm_both", rnncore.LSTM, reference.lstm(peepholes=True, coupled=True), peepholes=True, coupled=True
    ),
    Case(
        "lstm_functions",
        rnncore.LSTM(HIDDEN, gate_fn=jax.nn.hard_sigmoid, activation_fn=jax.nn.silu),
        reference.lstm("hard_sigmoid", "silu"),
    ),
    Case("lstm_no_bias", rnncore.LSTM(HIDDEN), reference.lstm(), without=("bias",)),
    Case("layer_norm_lstm", rnncore.LayerNormLSTM(HIDDEN), reference.layer_norm_lstm()),
    Case(
        "layer_norm_lstm_heads",
        rnncore.LayerNormLSTM(HIDDEN, recurrence=rnncore.Heads(2)),
        reference.layer_norm_lstm(2),
    ),
    Case("layer_norm_gru", rnncore.LayerNormGRU(HIDDEN), reference.layer_norm_gru()),
    Case("lstmp", rnncore.LSTMP(HIDDEN, projection_size=2), reference.lstmp()),
    Case("slstm", rnncore.SLSTM(HIDDEN, recurrence=rnncore.Heads(2)), reference.slstm()),
    *over_kernels("gru", rnncore.GRU, reference.gru()),
    Case(
        "gru_functions",
        rnncore.GRU(HIDDEN, gate_fn=jax.nn.hard_sigmoid, activation_fn=jax.nn.silu),
        reference.gru("hard_sigmoid", "silu"),
    ),
    Case("gru_no_recurrent_bias", rnncore.GRU(HIDDEN), reference.gru(), without=("recurrent_bias",)),
    *over_kernels("mgu", rnncore.MGU, reference.mgu()),
    *over_kernels("mgu_no_reset", rnncore.MGU, reference.mgu(reset_gate=False), reset_gate=False),
    Case("reset_before_gru", rnncore.ResetBeforeGRU(HIDDEN), reference.reset_before_gru(), backends=("autodiff",)),
    # The same equations as the MGU without its reset, so the user's cell has a reference too.
    Case("user_leaky", Leaky(HIDDEN), reference.mgu(reset_gate=False)),
    *over_kernels("user_fast_slow", FastSlow, None),
]
BY_ID = {case.id: case for case in CASES}
ONE_OF_EACH = ("elman_silu", "lstm_both-dense", "gru-heads", "mgu-diagonal", "reset_before_gru", "user_fast_slow-dense")
"""What the dear tests run on: every cell, kernel structure and kind of parameter at least once."""

EVERY_CELL = (
    "elman-dense", "elman_residual-heads", "elman_relu", "elman_silu", "indrnn", "leaky-diagonal", "leaky_tau",
    "mingru", "minlstm", "rglru", "qrnn_ifo", "lstm-heads", "lstm_peepholes-diagonal", "lstm_coupled-dense",
    "lstm_both-heads", "lstm_no_bias", "gru-dense", "gru_no_recurrent_bias", "mgu-heads", "mgu_no_reset-diagonal",
    "reset_before_gru", "user_fast_slow-dense",
)  # fmt: skip
"""Every equation once, the structures in turn: what holds for a cell and for a structure holds for their pairs, which
test_reference.py runs all."""

FLOAT64 = 1e-12
"""Tolerance of `assert_close` for two ways to the same number in float64; errors seen are below 1e-13."""


def rows(ids: Sequence[str] = (), every_backend: bool = False) -> list[Any]:
    """pytest parameters (case, backend).

    The autodiff backend is left out where another one runs the case, unless `every_backend`.
    """
    chosen = [BY_ID[i] for i in ids] or CASES
    return [
        pytest.param(case, backend, id=f"{case.id}-{backend}")
        for case in chosen
        for backend in case.backends
        if every_backend or backend != "autodiff" or case.backends == ("autodiff",)
    ]


# -------------------------------------------------------------------------------- drawing and running


class Problem(NamedTuple):
    """What `unroll` runs on; lengths and resets may be None."""

    params: Any
    xs: Any
    carry: Any
    lengths: Any
    resets: Any


def draw(
    case: Case, batch: tuple[int, ...] = (4,), steps: int = 5, features: int = 3, *,
    lengths: bool = False, resets: bool = False, dtype: Any = jnp.float64, seed: int = 0,
) -> Problem:  # fmt: skip
    """A random problem.  Lengths go through 0, T, 1, T - 1, ...; resets fall anywhere, the first step included."""
    rng = np.random.default_rng(seed)

    def normal(leaf: Any) -> Any:
        return jnp.asarray(rng.normal(0, 0.6, leaf.shape), dtype)

    params = jax.tree.map(normal, jax.eval_shape(lambda: case.cell.init(jax.random.key(0), features)))
    params = params._replace(**dict.fromkeys(case.without))
    carry = jax.tree.map(normal, jax.eval_shape(lambda: case.cell.initial_carry(batch)))
    if "n" in carry._fields:  # a normaliser: h is a quotient by it
        carry = carry._replace(n=jnp.abs(carry.n) + 0.5)
    xs = jnp.asarray(rng.normal(0, 1, (*batch, steps, features)), dtype)
    several = np.resize([0, steps, 1, max(steps - 1, 0)], batch) if batch else np.asarray(max(steps - 1, 0))
    here = rng.random((*batch, steps)) < 0.3
    here[..., :1] |= np.arange(int(np.prod(batch)) or 1).reshape(batch)[..., None] % 2 == 1
    return Problem(params, xs, carry, jnp.asarray(several) if lengths else None, jnp.asarray(here) if resets else None)


def runner(case: Case, backend: str, **options: Any) -> Callable[..., Any]:
    """(params, xs, carry, lengths, resets) -> what `unroll` returns."""

    def run(params: Any, xs: Any, carry: Any, lengths: Any = None, resets: Any = None) -> Any:
        return rnncore.unroll(
            case.cell, params, xs, initial_carry=carry, seq_lengths=lengths, resets=resets,
            backend=backend, **options,
        )  # fmt: skip

    return run


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs inside of an equation; of a run, a tangent or a backward run what the backend does."""
    if eqn.primitive.name.startswith("rnncore_"):
        avals = [v.aval for v in eqn.invars]
        yield jax.make_jaxpr(lambda *args: eqn.primitive.impl(*args, **eqn.params))(*avals).jaxpr
    for value in eqn.params.values():
        for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def forget() -> None:
    """What has been traced is traced anew: for tests that exchange a part of a backend."""
    call._run.clear_cache()
    for cached in (primitives._forward, primitives._mapped):
        cached.cache_clear()


def cotangents(tree: Any, seed: int = 1) -> Any:
    """Random numbers in the shapes and dtypes of a tree of arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 1, a.shape), a.dtype), tree)


def pull(run: Callable, problem: Problem, seed: int = 1) -> tuple[Any, Any, Any]:
    """(results, gradients of params, xs and carry, the cotangents drawn for them), in one compilation."""
    d_results = cotangents(jax.eval_shape(run, *problem), seed)
    results, gradients = puller(run)(problem, d_results)
    return results, gradients, d_results


def puller(run: Callable) -> Callable[[Problem, Any], tuple[Any, Any]]:
    """The jitted (problem, cotangents) -> (results, gradients of params, xs and carry)."""

    def both(problem: Problem, d_results: Any) -> Any:
        results, back = jax.vjp(lambda *moving: run(*moving, *problem[3:]), *problem[:3])
        return results, back(d_results)

    return jax.jit(both)


@functools.cache
def autodiff_puller(case: Case, **options: Any) -> Callable[[Problem, Any], tuple[Any, Any]]:
    """`puller` of the autodiff backend, compiled once for all tests of a case."""
    return puller(runner(case, "autodiff", **options))


def as_reference(params: Any) -> reference.Params:
    """Parameters, or gradients of them, as the NumPy reference has them."""
    double = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    fields = {"recurrent_bias": None, "units": ()} | double._asdict()
    if "projection" in fields:
        fields["units"] = (fields.pop("projection"),)
    return reference.Params(**fields)._replace(units=tuple(fields["units"]))


def expected(case: Case, problem: Problem, d_results: Any, **options: Any) -> Any:
    """((carry, outputs), gradients) in float64: from NumPy, else from the autodiff backend."""
    problem = Problem(*jax.tree.map(lambda a: a.astype(jnp.float64), problem[:3]), *problem[3:])
    d_carry, d_outputs = jax.tree.map(lambda a: np.asarray(a, np.float64), d_results)
    if case.reference is None:
        results, (params, *rest) = autodiff_puller(case, **options)(problem, (d_carry, d_outputs))
        return results, (as_reference(params), *rest)
    masks = {"lengths": problem.lengths, "resets": problem.resets}
    masks = {name: None if m is None else np.asarray(m) for name, m in masks.items()}
    arguments = (as_reference(problem.params), np.asarray(problem.xs), tuple(map(np.asarray, problem.carry)))
    run = reference.forward(case.reference, *arguments, **masks, **options)
    gradients = reference.gradients(case.reference, *arguments, d_outputs, tuple(d_carry), **masks, **options)
    return (run.last, run.outputs), gradients


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Two trees, leaf by leaf: no error above tolerance * max(1, largest expected number of the leaf)."""
    got_leaves, want_leaves = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    assert len(got_leaves) == len(want_leaves), f"{len(got_leaves)} leaves and not {len(want_leaves)}"
    for (path, g), w in zip(got_leaves, want_leaves, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert g.shape == w.shape, f"{jax.tree_util.keystr(path)}: {g.shape} and not {w.shape}"
        error, allowed = np.max(np.abs(g - w), initial=0), tolerance * np.max(np.abs(w), initial=1)
        assert error <= allowed, f"{jax.tree_util.keystr(path)}: error {error:.1e}, allowed {allowed:.1e}"


def assert_expected(
    case: Case, problem: Problem, results: Any, gradients: Any, d_results: Any, tolerance: float = FLOAT64,
    **options: Any,
) -> None:  # fmt: skip
    """Results and gradients of `pull` are those that are expected; the options are those of the reference."""
    want_results, want_gradients = expected(case, problem, d_results, **options)
    assert_close(results, want_results, tolerance)
    assert_close((as_reference(gradients[0]), *gradients[1:]), want_gradients, tolerance)


# ----------------------------------------------------------------------- what a call must refuse

BAD_MASKS = [
    (dict(seq_lengths=np.array([1])), r"seq_lengths=<int64 \(1,\)>.*expected the batch shape \(2,\)"),
    (dict(seq_lengths=np.array([1, 6])), "values from 1 to 6; expected 0 to T = 5"),
    (dict(seq_lengths=np.array([-1, 5])), "values from -1 to 5"),
    (dict(seq_lengths=np.array([1.0, 2.0])), "expected integers"),
    (dict(resets=np.zeros((5, 2), bool)), r"resets=<bool \(5, 2\)>.*expected bool \(2, 5\)"),
    (dict(resets=np.zeros((2, 5))), r"resets=<float64 \(2, 5\)>.*expected bool"),
]
"""Lengths and resets that do not fit inputs (2, 5, D), and the message."""
