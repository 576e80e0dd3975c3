"""Backend "mosaic_gpu": its kernels run, lowered for CUDA, and its choices.

On a Hopper GPU the kernels run as they are, larger ones too; elsewhere they are interpreted (JAX 0.11 and newer).

    python -m pytest -o addopts= -W default -q tests/kernels/test_mosaic_gpu.py
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore import _pallas
from rnncore.kernels import kernel_body
from rnncore.kernels import mosaic_gpu as GPU
from rnncore.kernels.mosaic_gpu import kernels
from rnncore.kernels.mosaic_gpu import plan as plans
from rnncore.recurrence.run import Request
from rnncore.sequence import call as sequence
from rnncore.sequence.backends import BACKENDS

BACKEND = BACKENDS["mosaic_gpu"]
FEATURES, STEPS = 16, 5
MODE = "mosaic_gpu"
CALL = "@mosaic_gpu_v2("  # how XLA is told to run a Mosaic GPU kernel

ON_HOPPER = GPU.missing_gpu(jax.default_backend()) is None

runs = pytest.mark.skipif(
    not (ON_HOPPER or _pallas.can_interpret_gpu()),
    reason="no Hopper GPU, and this JAX cannot interpret Mosaic GPU kernels; 0.11 and newer can",
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were the GPU; what is traced under it is forgotten again."""
    monkeypatch.setattr(GPU, "missing_gpu", lambda platform: None)
    cases.forget()
    yield
    cases.forget()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the GPU kernels run in the interpreter, which raises where two threads race for memory."""
    if not ON_HOPPER:
        monkeypatch.setattr(kernels, "kernels", functools.partial(kernels.kernels, True))


def sized(id: str, heads: int = 1) -> cases.Case:
    """A case of the table with heads of 64 units."""
    case = cases.BY_ID[id]
    kernel = rnncore.Heads(heads) if heads > 1 else rnncore.Dense()
    return dataclasses.replace(case, cell=dataclasses.replace(case.cell, hidden_size=64 * heads, recurrence=kernel))


def draw(case: cases.Case, batch: tuple[int, ...], masked: bool = False, dtype: Any = jnp.bfloat16) -> cases.Problem:
    """A problem whose gates see sums of about 1, whatever the number of units."""
    problem = cases.draw(case, batch, STEPS, FEATURES, lengths=masked, resets=masked, dtype=jnp.float32)
    size = problem.params.recurrent_kernel.shape[-1]
    params = problem.params._replace(
        recurrent_kernel=problem.params.recurrent_kernel / np.sqrt(size),
        input_kernel=problem.params.input_kernel / np.sqrt(FEATURES),
    )
    moving = jax.tree.map(lambda a: a.astype(dtype), (params, problem.xs, problem.carry))
    return cases.Problem(*moving, *problem[3:])


def errors(case: cases.Case, problem: cases.Problem, backend: str = MODE, **options: Any) -> list[float]:
    """Norm of the error of every result and gradient over its own, against the scan in float64."""
    results, gradients, cotangents = cases.pull(cases.runner(case, backend, **options), problem)
    moving, cotangents = jax.tree.map(lambda a: a.astype(jnp.float64), (problem[:3], cotangents))
    exact = cases.Problem(*moving, *problem[3:])
    want = cases.puller(cases.runner(case, "scan", **options))(exact, cotangents)

    def error(got: Any, want: Any) -> float:
        return float(jnp.linalg.norm((got - want).ravel()) / jnp.maximum(jnp.linalg.norm(want.ravel()), 1e-30))

    pairs = zip(jax.tree.leaves((results, gradients)), jax.tree.leaves(want), strict=True)
    return [error(a.astype(jnp.float64), b) for a, b in pairs]


def assert_exact_as_the_dtype(case: cases.Case, problem: cases.Problem) -> None:
    """No error above an eps, or, of a cell that magnifies its roundings, above the scan's own in the same dtype.

    A number is rounded to the dtype a few times on its way, by at most half an eps each.
    """
    found, eps = errors(case, problem), float(jnp.finfo(problem.xs.dtype).eps)
    allowed = [eps] * len(found)
    if max(found) > eps:
        allowed = [max(eps, a) for a in errors(case, problem, "scan")]
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), (found, allowed)


# --------------------------------------------------------------------------------- values, interpreted

VALUES = [
    # id, heads, batch, ragged: heads side by side, several batch tiles, wide ones.
    ("elman_relu", 1, (3,), False),
    ("elman_silu", 1, (8,), True),
    ("lstm-dense", 2, (2, 9), True),
    ("lstm_both-dense", 1, (8,), True),
    ("lstm_functions", 1, (8,), False),
    ("gru-dense", 1, (11,), True),
    ("mgu-dense", 2, (8,), True),
    ("user_leaky", 1, (8,), False),
    ("user_fast_slow-dense", 1, (8,), True),
]
if ON_HOPPER:  # The interpreter takes minutes for such sizes.
    VALUES += [("lstm-dense", 12, (16,), True), ("gru-dense", 12, (256,), True)]


@runs
@pytest.mark.parametrize("id, heads, batch, masked", VALUES, ids=[f"{v[0]}-64x{v[1]}" for v in VALUES])
def test_values_and_gradients(simulated: None, id: str, heads: int, batch: tuple, masked: bool):
    case = sized(id, heads)
    assert_exact_as_the_dtype(case, draw(case, batch, masked))


@runs
def test_few_stages_and_wide_tiles(simulated: None, monkeypatch: pytest.MonkeyPatch):
    """As where U leaves room for the inputs of two steps only, and where narrow tiles would not run at once."""
    monkeypatch.setattr(plans, "DEPTH", (2, 2))
    monkeypatch.setattr(plans, "PROCESSORS", 1)
    case = sized("gru-dense")
    problem = draw(case, (10,), True)
    assert plans.plan_of(case.cell, 10, True, True).batch == 16
    assert_exact_as_the_dtype(case, problem)


@runs
def test_float16(simulated: None):
    case = sized("gru-dense")
    assert_exact_as_the_dtype(case, draw(case, (8,), True, jnp.float16))


@runs
@pytest.mark.parametrize("id", ["lstm-dense", "gru-dense", "user_leaky"])
def test_large_pre_activations(simulated: None, id: str):
    """Gates at their ends: what is formed there must neither overflow nor give NaN."""
    case = sized(id)
    problem = draw(case, (8,))
    bias = jnp.where(jnp.arange(64) % 2, 100.0, -100.0) + 0 * problem.params.bias
    problem = problem._replace(params=problem.params._replace(bias=bias.astype(jnp.bfloat16)))
    results, gradients, _ = cases.pull(cases.runner(case, MODE), problem)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((results, gradients)))
    # Where the gate is a constant its gradient is 0 and its relative error says nothing; results do.
    assert max(errors(case, problem)[: len(jax.tree.leaves(results))]) < jnp.finfo(jnp.bfloat16).eps


@runs
def test_vmap_over_sequences(simulated: None):
    case = sized("gru-dense")
    problem = draw(case, (3, 2))

    def gradient(backend: str) -> Any:
        def loss(params: Any, xs: Any, carry: Any) -> Any:
            last, ys = cases.runner(case, backend)(params, xs, carry)
            return jnp.sum(jnp.sin(ys.astype(jnp.float32))) + jnp.sum(last.h.astype(jnp.float32))

        return jax.vmap(jax.grad(loss), (None, 0, 0))(*problem[:3])

    got, want = gradient(MODE), gradient("scan")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert jnp.linalg.norm((a - b).astype(jnp.float32)) < 0.02 * jnp.linalg.norm(b.astype(jnp.float32))


@pytest.mark.skipif(
    ON_HOPPER or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12),
    reason="0.12's interpreter raises where 0.11's goes on",
)
def test_the_interpreter_sees_a_race(simulated: None, monkeypatch: pytest.MonkeyPatch):
    """Where nothing says that h is written before the matrix unit reads it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = sized("elman_silu")
    problem = draw(case, (8,))
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with pytest.raises(Exception, match="(?i)race"):
        jax.block_until_ready(cases.runner(case, MODE)(*problem[:3]))
    plgpu_interpreter().reset_gpu_interpret_mode_state()


def plgpu_interpreter() -> Any:
    """After an error in a kernel the interpreter has to be told to forget it; no public route exists."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call


# --------------------------------------------------------------------------------- lowering for CUDA

LOWERED = [
    # id, heads, batch, ragged
    ("elman_relu", 1, 3, False),
    ("lstm-dense", 12, 16, True),
    ("gru-dense", 12, 256, False),
    ("user_fast_slow-dense", 1, 8, True),
]


def lowered(case: cases.Case, batch: int, masked: bool, **options: Any) -> str:
    problem = jax.eval_shape(lambda: draw(case, (batch,), masked))
    problem = problem._replace(lengths=jax.ShapeDtypeStruct((batch,), jnp.int32) if masked else None)

    def loss(*arguments: Any) -> Any:
        return cases.runner(case, MODE, **options)(*arguments)[1].astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss)).trace(*problem).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.sample(2)
@pytest.mark.parametrize("id, heads, batch, masked", LOWERED, ids=[f"{v[0]}-64x{v[1]}" for v in LOWERED])
def test_lowers_for_cuda(id: str, heads: int, batch: int, masked: bool):
    """A gradient is one kernel forward and one backward, and no other loop over time."""
    text = lowered(sized(id, heads), batch, masked)
    assert text.count(CALL) == 2
    assert "stablehlo.while" not in text


def test_inference_is_one_kernel():
    case = sized("lstm-dense")
    problem = jax.eval_shape(lambda: draw(case, (8,)))
    run = jax.jit(lambda *a: cases.runner(case, MODE)(*a)[1])
    assert run.trace(*problem[:3]).lower(lowering_platforms=("cuda",)).as_text().count(CALL) == 1


def test_layers_of_both_directions_are_kernels_all():
    stack = rnncore.Stack(rnncore.LSTM(64), num_layers=2, bidirectional=True)
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), FEATURES, jnp.bfloat16))
    xs = jax.ShapeDtypeStruct((8, STEPS, FEATURES), jnp.bfloat16)

    def loss(params: Any, xs: Any, lengths: Any) -> Any:
        options: Any = {"seq_lengths": lengths, "backend": "mosaic_gpu"}
        return rnncore.unroll_stack(stack, params, xs, **options)[1].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, xs, jax.ShapeDtypeStruct((8,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Both directions of a layer are the same function, which stands in the program once.
    assert text.count(CALL) == 2 * 2 and "stablehlo.while" not in text


class Every(rnncore.PointwiseCell):
    """A cell that applies all that the kernel language is said to have."""

    gates = ("a", "b")

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        a, b = z.a + r.a, z.b + r.b
        one = jnp.asarray(1, a.dtype)
        s = jnp.abs(a) + jax.lax.clamp(-one, a, one) + jnp.cos(b) / 2
        s = s + jnp.exp2(-b * b) + a**3 + jnp.log(1 + b * b) + jnp.maximum(a, b) - jnp.minimum(a, 0.5) + jnp.round(b)
        s = s + jax.lax.rsqrt(1 + a * a) + jnp.sign(b) + jnp.sin(a) + jnp.tanh(b)
        chosen = ((a > 0) & (b < 1)) | (a >= b) & ~(b <= 0.5) ^ (a == 1) | (b != 2)
        return carry._replace(h=jnp.tanh(jnp.where(chosen, s, -s))), self.Gates(a, b)


class Many(rnncore.PointwiseCell):
    """A cell with more gates than a block has room for."""

    gates = tuple(f"g{n}" for n in range(32))

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        gates = [jnp.tanh(a + b) for a, b in zip(z, r, strict=True)]
        return carry._replace(h=sum(gates)), self.Gates(*gates)


def test_every_known_operation_lowers():
    part = kernel_body.of(Every(64), (64, 8))
    used = {e.primitive.name for e in (*part._forward.eqns, *part._backward.eqns)}
    sometimes = {"bitcast_convert_type", "broadcast_in_dim", "convert_element_type"}  # by the version of JAX
    assert GPU.KNOWN <= used | sometimes, GPU.KNOWN - used
    assert part.why_not(GPU.KNOWN) is None
    assert lowered(cases.Case("every", Every(64), None), 8, False).count(CALL) == 2


SHARDED = """
import jax, jax.numpy as jnp, rnncore
from jax.sharding import AxisType, PartitionSpec as P
from rnncore.kernels import mosaic_gpu
mosaic_gpu.missing_gpu = lambda platform: None
cell, dtype = rnncore.LSTM(64, coupled=True, peepholes=True), jnp.bfloat16
params = cell.init(jax.random.key(0), 4, dtype)
xs = jax.random.normal(jax.random.key(1), (6, 3, 4), dtype)
def gradient(name):
    def local(params, xs):
        def loss(params):
            ys = rnncore.unroll(cell, params, xs, backend=name)[1]
            return jnp.sum(ys.astype(jnp.float32) ** 2)
        return jax.grad(loss)(params)
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P()))
text = gradient("mosaic_gpu").trace(params, xs).lower(lowering_platforms=("cuda",)).as_text()
assert text.count("@mosaic_gpu_v2(") == 2
print("ok")
"""


@pytest.mark.slow
def test_the_batch_over_devices():
    """Inside shard_map the kernels lower; test_fused.py has the values there, which the interpreter cannot give."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", SHARDED], Path(rnncore.__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stdout + done.stderr


# --------------------------------------------------------------------------------- layouts and choices


@pytest.mark.parametrize("id", ["elman_relu", "lstm-dense", "lstm_both-dense", "gru-dense", "user_fast_slow-dense"])
@pytest.mark.parametrize("masked", [False, True])
def test_layouts_fit_the_chip(id: str, masked: bool):
    for heads, rows in [(12, 16), (12, 256), (1, 1), (1, 512)]:
        plan = plans.plan_of(sized(id, heads).cell, rows, masked, masked)
        assert isinstance(plan, plans.Plan), (heads, rows, plan)
        assert plan.tiles * plan.batch >= rows and plan.batch % 8 == 0
        assert plan.bytes <= plans.SHARED_BYTES and min(plan.stages) >= 2


def test_tiles_are_wide_only_where_narrow_ones_would_wait():
    def tile(batch: int) -> int:
        return plans.plan_of(rnncore.LSTM(768, recurrence=rnncore.Heads(12)), batch, False, False).batch

    assert [tile(batch) for batch in (8, 64, 128, 256, 4096)] == [8, 8, 16, 32, 32]


def test_a_small_batch_wastes_no_rows():
    plan = plans.plan_of(rnncore.LSTM(768, recurrence=rnncore.Heads(12)), 16, False, False)
    assert (plan.batch, plan.tiles) == (8, 2)


def request_of(cell: Any, batch: tuple[int, ...] = (16,), **fields: Any) -> Any:
    values: dict[str, Any] = {
        "cell": cell, "steps": 8, "batch_shape": batch, "input_size": 4, "dtype": "bfloat16",
        "dtypes": frozenset({"bfloat16"}), "precision": None, "platform": "gpu", "devices": 1, "lengths": False,
        "resets": False, "recurrent_mask": False, "zoneout": False, "return_states": False,
        "checkpoint_every": None, "recompute": "nothing",
    }  # fmt: skip
    return Request(**(values | fields))


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("float32", lambda: request_of(rnncore.LSTM(64), dtype="float32", dtypes=frozenset({"float32"})), "bfloat16 or"),
    ("mixed", lambda: request_of(rnncore.LSTM(64), dtypes=frozenset({"bfloat16", "float32"})), "alike"),
    ("residuals", lambda: request_of(rnncore.LSTM(64), residual_dtype="float32"), "residual_dtype='float32'"),
    ("small", lambda: request_of(rnncore.LSTM(32)), "heads of 64 units, and these have 32; backend='cuda' takes any"),
    ("large", lambda: request_of(rnncore.GRU(256, recurrence=rnncore.Heads(2))), "and these have 128"),
    ("room", lambda: request_of(Many(64)), "32 x 64 x 64 and the inputs of two steps do not fit the shared memory"),
    ("empty", lambda: request_of(rnncore.LSTM(64), (0,)), "no empty batch"),
    (
        "operation",
        lambda: request_of(rnncore.Elman(64, activation_fn=jax.scipy.special.gammaln)),
        "`lgamma`, which its kernel language lacks",
    ),
]


@pytest.mark.parametrize("make, why", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals(make: Callable[[], Any], why: str):
    assert why in (BACKEND.unsupported(make()) or "")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    case = sized("lstm-dense")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU, and JAX runs on cpu here"):
        cases.runner(case, MODE)(*draw(case, (8,)))
    assert GPU.missing_gpu("tpu") is not None


def test_chosen_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch):
    heads = rnncore.LSTM(128, recurrence=rnncore.Heads(2))
    choose = sequence.choose
    choice = choose(request_of(heads), None)
    assert choice.name == "scan" and "an interface of JAX that may change" in choice.rejected["mosaic_gpu"]
    assert choose(request_of(heads), "mosaic_gpu").name == "mosaic_gpu"
    monkeypatch.setattr(type(BACKEND), "must_be_named", None)
    assert choose(request_of(heads), None).name == "mosaic_gpu"
    assert choose(request_of(heads), "scan").name == "scan"
    assert choose(request_of(heads, dtype="float32", dtypes=frozenset({"float32"})), None).name == "scan"


def test_says_in_words_that_the_cuda_toolkit_is_not_found(tmp_path: Path):
    why = GPU.missing_toolkit("None", tmp_path)
    assert "CUDA_ROOT" in why and "'None'" in why and "before JAX is imported" in why
    assert GPU.missing_toolkit(None, tmp_path) is None and GPU.missing_toolkit("/opt/cuda", tmp_path) is None
    (tmp_path / GPU.LIBDEVICE).parent.mkdir(parents=True)
    (tmp_path / GPU.LIBDEVICE).touch()
    assert GPU.missing_toolkit("None", tmp_path) is None
