"""The CUDA kernels without a GPU: their source on CPU threads, against float64; and what NVRTC makes of them.

What this cannot show: the order in which a GPU makes the writes of one block visible to another beyond what the header
asks for, and how long anything takes.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import cuda_grid
import cuda_problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_problems import DEVICES

import rnncore
from rnncore.kernels import kernel_body
from rnncore.kernels.cuda import emit, kernels, nvrtc
from rnncore.kernels.cuda.plan import Device, Shape, layouts, plan_of
from rnncore.sequence import backends

HOPPER = Device("a small Hopper", 16, 96 * 1024, 90)
ROUNDING = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 2e-6}


class Own(rnncore.PointwiseCell):
    """A user's, with a gate whose r is apart and operations that the built-in cells lack."""

    gates = ("u", "n")
    units = ("a",)

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> Any:
        u = jax.nn.sigmoid(z.u + r.u + p.a * carry.h)
        n = jnp.sin(z.n + u * r.n) * jnp.exp(-jnp.abs(z.u)) + jnp.where(z.n > 0, jnp.log1p(u), jnp.clip(r.n, -1, 1))
        return carry._replace(h=u * carry.h + (1 - u) * jnp.tanh(n)), self.Gates(u, n)


CASES = {  # cell, dtype, product, layout, sequences, options
    "none, one warp": (rnncore.LSTM(16), "float32", "3xtf32", {"sync": "none", "split": 1}, 3, {}),
    "none, warps share k": (rnncore.LSTM(32), "bfloat16", "mma", {"sync": "none", "split": 1}, 3, {"lengths": True}),
    "none, everything at once": (
        rnncore.LSTM(24, peepholes=True), "float32", "3xtf32", {"sync": "none", "split": 2}, 9,
        {"lengths": True, "resets": True, "mask": True, "zoneout": (1, 2), "states": True},
    ),
    "cluster": (rnncore.GRU(32), "float16", "mma", {"sync": "cluster", "split": 1}, 3, {"resets": True}),
    "cluster, warps share k": (rnncore.LSTM(32), "float32", "tf32", {"sync": "cluster", "split": 2}, 2, {"mask": True}),
    "grid": (rnncore.LSTM(32), "bfloat16", "mma", {"sync": "grid", "split": 1}, 3, {}),
    "grid, units that are nobody's": (
        rnncore.LSTM(40), "bfloat16", "mma", {"sync": "grid", "split": 1, "groups": 1}, 2, {},
    ),
    "grid, gates apart": (rnncore.GRU(32), "float32", "3xtf32", {"sync": "grid", "split": 2}, 3, {"states": True}),
    "grid, tails, masked": (
        Own(20), "float32", "3xtf32", {"sync": "grid", "split": 2}, 9, {"mask": True, "resets": True},
    ),
    "grid, two tiles": (rnncore.Elman(32), "float16", "mma", {"sync": "grid", "tiles": 2}, 9, {"zoneout": (3,)}),
    "no matrix unit": (rnncore.MGU(16), "float32", "fma", {"sync": "none", "split": 1}, 2, {"lengths": True}),
}  # fmt: skip


@pytest.mark.sample("none, everything at once")
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str):
    cell, dtype, product, layout, rows, options = CASES[name]
    with jax.enable_x64(True):
        errors = cuda_problems.check(cuda_grid.settings(HOPPER, product, **layout), cell, rows, 3, dtype, **options)
    limit = 3e-3 if product == "tf32" else ROUNDING[dtype]
    assert max(errors.values()) < limit, errors
    assert max(errors.values()) > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("where", ["in_shared", "streamed"])
def test_the_matrix_wherever_it_lies(where: str):
    """Beside registers, or streamed: the same bits."""
    cell = rnncore.LSTM(32)

    def outputs(where: str) -> Any:
        def choose(device: Device, shape: Shape) -> Any:
            plan = min(layouts(device, shape), key=lambda plan: (plan.sync != "none", plan.split))
            lies = {"in_registers": 0, "in_shared": 0, "streamed": 0, where: plan.each}
            room = (lies["in_shared"] - plan.in_shared) * plan.groups * plan.split * shape.sets * 1024
            return dataclasses.replace(plan, **lies, shared=plan.shared + room)

        settings = cuda_grid.settings(HOPPER, "mma")._replace(choose=choose)
        run, z = cuda_problems.problem(cell, 3, 3, "bfloat16")
        kept = kernels.forward(settings, cell, run, z, "bfloat16")
        found = kernels.backward(settings, cell, run, kept.residuals, kept.hs, run.start)
        return [np.asarray(a, np.float32) for a in (kept.hs, found.z)]

    for a, b in zip(outputs("in_registers"), outputs(where), strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_sequences_run_in_parts():
    """What does not fit at once gives what each sequence gives alone."""
    small = Device("two multiprocessors", 2, 96 * 1024, 80)
    settings = cuda_grid.settings(small, "mma", sync="grid", tiles=1)
    cell = rnncore.LSTM(32)
    run, z = cuda_problems.problem(cell, 17, 2, "bfloat16")
    kept = kernels.forward(settings, cell, run, z, None)
    few = run._replace(start=tuple(a[:8] for a in run.start))
    first = kernels.forward(settings, cell, few, z[:, :8], None)
    assert kept.hs.shape == (2, 17, 32)
    np.testing.assert_array_equal(np.asarray(kept.hs[:, :8], np.float32), np.asarray(first.hs, np.float32))
    with pytest.raises(NotImplementedError, match="no such layout"):
        kernels.forward(cuda_grid.settings(small, "mma", sync="cluster"), cell, run, z, None)


# ------------------------------------------------------------------------------- faults that must be seen


def wrong(name: str, fault: str) -> bool:
    """Whether a case gives wrong numbers with a fault put in."""
    cell, dtype, product, layout, rows, options = CASES[name]
    settings = cuda_grid.settings(HOPPER, product, f"-D{fault}", **layout)
    with jax.enable_x64(True):
        errors = cuda_problems.check(settings, cell, rows, 3, dtype, **options)
    return not max(errors.values()) < 0.1


def test_blocks_that_do_not_wait_are_seen():
    assert wrong("grid", "RNN_WITHOUT_WAITING")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none, everything at once", "cluster", "cluster, warps share k", "grid"])
def test_no_races(name: str):
    assert "data race" not in cuda_grid.races(*CASES[name][:5])


@pytest.mark.slow
def test_a_barrier_left_out_is_a_race():
    assert "data race" in cuda_grid.races(*CASES["none, everything at once"][:5], "-DRNN_WITHOUT_BARRIERS")


# -------------------------------------------------------------------------------- through the primitives


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "emulated", cuda_grid.Emulated())


@pytest.mark.sample(1)
@pytest.mark.parametrize("mode", ["grad", "vmap over sequences", "vmap over parameters", "jvp", "hvp", "states"])
@pytest.mark.usefixtures("emulated")
def test_transformations(mode: str):
    cell = rnncore.GRU(16)
    params = cell.init(jax.random.key(0), 3, jnp.float32)
    xs = jax.random.normal(jax.random.key(1), (2, 3, 3), jnp.float32)

    def loss(params: Any, xs: Any, backend: str) -> Any:
        if mode == "states":
            carry, ys, states = rnncore.unroll(cell, params, xs, backend=backend, return_states=True)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves((carry, ys, states)))
        carry, ys = rnncore.unroll(cell, params, xs, seq_lengths=jnp.array([3, 2]), backend=backend)
        return jnp.sum(jnp.sin(ys[:, :2])) + jnp.sum(carry.h**2)

    def result(backend: str) -> Any:
        f = functools.partial(loss, backend=backend)
        if mode == "vmap over sequences":
            return jax.vmap(jax.grad(f, 1), (None, 0))(params, jnp.stack([xs, 2 * xs]))
        if mode == "vmap over parameters":
            several = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
            return jax.vmap(jax.value_and_grad(f), (0, None))(several, xs)
        if mode == "jvp":
            return jax.jvp(functools.partial(f, params), (xs,), (jnp.cos(xs),))
        if mode == "hvp":
            return jax.jvp(jax.grad(functools.partial(f, params)), (xs,), (jnp.cos(xs),))
        return jax.jit(jax.value_and_grad(f, (0, 1)))(params, xs)

    with jax.default_matmul_precision("highest"):
        chex.assert_trees_all_close(result("emulated"), result("scan"), rtol=1e-5, atol=1e-5)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The heads of every launch."""
    found: list[int] = []
    plain = cuda_grid.launch

    def counted(call: kernels.Call, *options: str) -> Any:
        found.append(call.plan.shape.heads)
        return plain(call, *options)

    monkeypatch.setattr(cuda_grid, "launch", counted)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_vmap_over_parameters_is_more_heads(launches: list[int]):
    """One launch forward and one backward for all models, with masks, biases apart, heads, and a map of sequences."""
    cell = rnncore.GRU(16, recurrence=rnncore.Heads(2))
    draw = functools.partial(cell.init, input_size=3, dtype=jnp.float32)
    params = jax.vmap(draw)(jax.random.split(jax.random.key(0), 3))
    xs = jax.random.normal(jax.random.key(1), (3, 2, 2, 3, 3), jnp.float32)
    mask = 2.0 * jax.random.bernoulli(jax.random.key(2), 0.5, (2, 16)).astype(jnp.float32)
    options = {
        "seq_lengths": jnp.array([3, 2]),
        "resets": jnp.array([[0, 1, 0], [0, 0, 1]], bool),
        "recurrent_mask": mask,
    }

    def gradient(backend: str) -> Any:
        def of_one(params: Any, xs: Any) -> Any:
            carry, ys = rnncore.unroll(cell, params, xs, backend=backend, **options)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(carry.h**2)

        return jax.value_and_grad(lambda p, xs: jnp.sum(jax.vmap(of_one, (None, 0))(p, xs)), (0, 1))

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.vmap(gradient("emulated")))(params, xs)
        one = jax.jit(gradient("scan"))
        models = [one(*jax.tree.map(lambda a, n=n: a[n], (params, xs))) for n in range(3)]
    want = jax.tree.map(lambda *a: jnp.stack(a), *models)
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)
    assert launches == [6, 6]


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
def test_both_directions_are_one_launch(launches: list[int]):
    stack = rnncore.Stack(rnncore.LSTM(16), num_layers=2, bidirectional=True)
    params = stack.init(jax.random.key(0), 3, jnp.float32)
    xs = jax.random.normal(jax.random.key(1), (2, 3, 3), jnp.float32)

    def loss(params: Any, xs: Any, backend: str) -> Any:
        carry, ys = rnncore.unroll_stack(stack, params, xs, seq_lengths=jnp.array([3, 2]), backend=backend)
        valid = jnp.arange(3)[:, None] < jnp.array([3, 2])[:, None, None]
        return jnp.sum(jnp.sin(ys) * valid) + sum(jnp.sum(a**2) for a in jax.tree.leaves(carry))

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
        found, want = (gradient(params, xs, backend) for backend in ("emulated", "scan"))
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-5)
    assert launches == [2, 2, 2, 2]


def test_it_says_what_it_lacks():
    cell = rnncore.LSTM(8)
    xs = jnp.zeros((2, 3, 4), jnp.float32)
    choice = rnncore.explain_backend(cell, cell.init(jax.random.key(0), 4, jnp.float32), xs)
    assert "NVIDIA GPU" in choice.rejected["cuda"]


# --------------------------------------------------------------------------------------------- compiled

SIZES = {"64x12": (64, 12), "256x3": (256, 3), "768x1": (768, 1)}
"""Units of a head, heads."""
REGISTERS = {"64x12": (216, 88), "256x3": (255, 178), "768x1": (255, 255)}
"""Of a thread, forward and backward, on any GPU, by NVRTC 13.0.88, which the tests install."""
SPILLS = {
    ("256x3", "T4"): (0, 8), ("768x1", "T4"): (72, 200), ("768x1", "RTX 3090"): (0, 140), ("768x1", "L4"): (0, 140),
}  # fmt: skip
"""Bytes that the compiler keeps in memory; none elsewhere."""


@pytest.mark.sample(4)
@pytest.mark.skipif(nvrtc.library() is None, reason="needs the package nvidia-cuda-nvrtc")
@pytest.mark.parametrize("gpu", ["T4", "A100", "RTX 3090", "L4", "H100", "B200", "RTX 5090"])
@pytest.mark.parametrize("size", SIZES)
def test_registers_do_not_grow(gpu: str, size: str):
    device = DEVICES[gpu]
    units, heads = SIZES[size]
    dtype = "float16" if device.capability < 80 else "bfloat16"
    cell = rnncore.LSTM(units * heads)
    for n, direction in enumerate(("forward", "backward")):
        shape = Shape(
            direction, dtype, dtype, "mma", gates=4, fields=2, width=kernel_body.of(cell, (1, 1)).width, size=units,
            heads=heads, sequences=16, keeps=direction == "forward",
        )  # fmt: skip
        plan = plan_of(device, shape)
        assert not isinstance(plan, str)
        figures = nvrtc.figures(emit.source(cell, plan), device.capability)
        assert figures["spill stores"] <= SPILLS.get((size, gpu), (0, 0))[n], (plan, figures)
        assert figures["registers"] <= REGISTERS[size][n], (plan, figures)
        assert figures["registers"] * plan.threads <= 65536


@pytest.mark.sample(1)
@pytest.mark.skipif(nvrtc.library() is None, reason="needs the package nvidia-cuda-nvrtc")
@pytest.mark.parametrize("product", ["tf32", "3xtf32", "fma"])
def test_compiles_in_float32(product: str):
    for cell in (rnncore.GRU(256), Own(100)):
        for direction in ("forward", "backward"):
            shape = Shape(
                direction, "float32", "bfloat16", product, gates=len(cell.gates), fields=1,
                width=kernel_body.of(cell, (1, 1)).width, size=cell.hidden_size, heads=1, sequences=64,
                lengths=True, resets=True, mask=True, zoneout=(1,),
            )  # fmt: skip
            plan = plan_of(DEVICES["A100"], shape)
            assert not isinstance(plan, str)
            assert nvrtc.figures(emit.source(cell, plan), 80)["registers"] <= 255


def test_machine_code_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any):
    compiled: list[str] = []

    def compile_source(source: str, capability: int) -> bytes:
        compiled.append(source)
        return b"machine code\0"

    monkeypatch.setenv("RNNCORE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    for _ in range(2):
        nvrtc._code_for.cache_clear()  # as a new process would have it
        code, _ = nvrtc.code_for("a source", 90)
        assert code == b"machine code\0" and compiled == ["a source"]
    [kept] = tmp_path.glob("cubin-*")
    assert kept.read_bytes() == code and kept.stat().st_mode & 0o077 == 0
    assert capfd.readouterr().err.count("compiling a cell for this GPU") == 1
    kept.write_bytes(b"cut")
    nvrtc._code_for.cache_clear()
    assert nvrtc.code_for("a source", 90)[0] == code and len(compiled) == 2
    nvrtc._code_for.cache_clear()


@pytest.mark.skipif(nvrtc.library() is None, reason="needs the package nvidia-cuda-nvrtc")
def test_what_nvrtc_refuses_is_said():
    with pytest.raises(nvrtc.NvrtcError, match="refused"):
        nvrtc.compile_source("this is not CUDA", 80)
