"""jax.export: batch and steps that are not numbers yet, and programs that another process runs."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, cotangents
from flax import nnx as flax_nnx
from jax import export

import rnncore
from rnncore import linen, nnx
from rnncore.kernels import compiler

D, H = 4, 6
SIZES = {"b, t": [(1, 1), (5, 3)], "b, 7": [(3, 7)], "2, t": [(2, 9)]}
INPUTS = {"xs": jnp.float32, "lengths": jnp.int32, "resets": jnp.bool_}


class Foreign(flax.linen.GRUCell):
    """A cell that nothing is known of."""


def of_linen(layer: Any, *names: str, **options: Any) -> Callable[..., Any]:
    variables = layer.init(jax.random.key(0), jnp.ones((2, 7, D)))
    named = {"lengths": "seq_lengths"}

    def run(xs: Any, *more: Any) -> Any:
        return layer.apply(variables, xs, **{named.get(n, n): a for n, a in zip(names, more, strict=True)}, **options)

    return run


def of_nnx(layer: Any) -> Callable[..., Any]:
    return lambda xs, lengths: layer(xs, seq_lengths=lengths)


def of_core(cell: rnncore.Cell, **options: Any) -> Callable[..., Any]:
    params = cell.init(jax.random.key(0), D)

    def run(xs: Any, lengths: Any, resets: Any) -> Any:
        carry, ys, *states = rnncore.unroll(cell, params, xs, seq_lengths=lengths, resets=resets, **options)
        return carry, ys, [jax.tree.leaves(s) for s in states]

    return run


def gradients(cell: rnncore.Cell, **options: Any) -> Callable[..., Any]:
    params = cell.init(jax.random.key(0), D)

    def run(xs: Any) -> Any:
        return jax.grad(lambda p, xs: jnp.sum(jnp.sin(rnncore.unroll(cell, p, xs, **options)[1])), (0, 1))(params, xs)

    return run


def nnx_rnn() -> Any:
    return nnx.RNN(nnx.GRUCell(D, H, rngs=flax_nnx.Rngs(0)))


ALL = ("xs", "lengths", "resets")
PROGRAMS: dict[str, tuple[Callable[[], Callable[..., Any]], tuple[str, ...]]] = {
    "linen": (lambda: of_linen(linen.RNN(linen.OptimizedLSTMCell(H))), ("xs",)),
    "linen, lengths": (
        lambda: of_linen(
            linen.RNN(linen.GRUCell(H), reverse=True, keep_order=True, return_carry=True), "lengths", "resets"
        ),
        ALL,
    ),
    "linen, foreign cell": (lambda: of_linen(linen.RNN(Foreign(H)), "lengths"), ALL[:2]),
    "linen, both ways": (
        lambda: of_linen(
            linen.Bidirectional(linen.RNN(linen.LSTMCell(H)), linen.RNN(linen.SimpleCell(H))), "lengths"
        ),
        ALL[:2],
    ),
    "linen, layers": (
        lambda: of_linen(linen.LSTM(H, num_layers=2, bidirectional=True, learned_carry=True), "lengths"), ALL[:2],
    ),
    "nnx": (lambda: of_nnx(nnx_rnn()), ALL[:2]),
    "nnx, layers": (lambda: of_nnx(nnx.LSTM(D, H, num_layers=2, rngs=flax_nnx.Rngs(0))), ALL[:2]),
    "unroll": (lambda: of_core(rnncore.LSTM(H, peepholes=True), return_states=True), ALL),
    "unroll, autodiff": (lambda: of_core(rnncore.ResetBeforeGRU(H), return_states=True), ALL),
    "gradients": (lambda: gradients(rnncore.LSTM(H)), ("xs",)),
    "gradients, heads": (lambda: gradients(rnncore.GRU(H, recurrence=rnncore.Heads(2))), ("xs",)),
}  # fmt: skip


def some(names: tuple[str, ...], batch: int, steps: int) -> list[Any]:
    rng = np.random.default_rng(batch + steps)
    made = {
        "xs": rng.normal(size=(batch, steps, D)).astype(np.float32),
        "lengths": rng.integers(0, steps + 1, batch).astype(np.int32),
        "resets": rng.random((batch, steps)) < 0.3,
    }
    return [made[name] for name in names]


@pytest.mark.ci
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PROGRAMS)
def test_symbolic_shapes(name: str) -> None:
    make, names = PROGRAMS[name]
    run = make()
    for dims in SIZES if name in ("unroll", "gradients") else ["b, t"]:
        batch, steps = export.symbolic_shape(dims)
        shapes = {"xs": (batch, steps, D), "lengths": (batch,), "resets": (batch, steps)}
        exported = export.export(jax.jit(run))(*(jax.ShapeDtypeStruct(shapes[n], INPUTS[n]) for n in names))
        for sizes in SIZES[dims]:
            arguments = some(names, *sizes)
            assert_close(exported.call(*arguments), run(*arguments), 1e-6)


def test_derivative_of_an_exported_program() -> None:
    run = of_linen(linen.RNN(linen.OptimizedLSTMCell(H)))
    shape = (*export.symbolic_shape("b, t"), D)
    exported = export.deserialize(export.export(jax.jit(run))(jax.ShapeDtypeStruct(shape, jnp.float32)).serialize(1))
    xs = jnp.asarray(some(("xs",), 3, 5)[0])
    ys, back = jax.vjp(run, xs)
    d_ys = cotangents(ys)
    assert_close(jax.vjp(exported.call, xs)[1](d_ys), back(d_ys), 1e-6)


CHILD = """
import pathlib, pickle, sys
import jax, numpy as np
from jax import export
import rnncore
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.exported")):
    inputs, outputs = pickle.loads(path.with_suffix(".pickle").read_bytes())
    got = export.deserialize(bytearray(path.read_bytes())).call(*inputs)
    for a, b in zip(jax.tree.leaves(got), outputs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    print("ran", path.stem)
"""


@pytest.mark.slow
def test_another_process(tmp_path: Path) -> None:
    chosen = {f"{n}": PROGRAMS[name] for n, name in enumerate(PROGRAMS)}
    for stem, (make, names) in chosen.items():
        run, arguments = make(), some(names, 2, 7)
        exported = export.export(jax.jit(run))(*arguments)
        (tmp_path / f"{stem}.exported").write_bytes(exported.serialize())
        outputs = [np.asarray(a) for a in jax.tree.leaves(run(*arguments))]
        (tmp_path / f"{stem}.pickle").write_bytes(pickle.dumps((arguments, outputs)))
    # Parameters, carries and states cross too, by their classes.
    cell = rnncore.LSTM(H, peepholes=True)
    params, xs = cell.init(jax.random.key(0), D), jnp.asarray(some(("xs",), 2, 7)[0])
    exported = export.export(jax.jit(lambda p, xs: rnncore.unroll(cell, p, xs, return_states=True)))(params, xs)
    (tmp_path / "trees.exported").write_bytes(exported.serialize())
    outputs = [np.asarray(a) for a in jax.tree.leaves(rnncore.unroll(cell, params, xs, return_states=True))]
    (tmp_path / "trees.pickle").write_bytes(pickle.dumps(((params, xs), outputs)))
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("ran") == len(PROGRAMS) + 1


@pytest.mark.sample(2)
@pytest.mark.skipif(compiler.find() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["run", "gradient", "mapped", "tangent", "second"])
def test_loops_of_this_machine_are_exported_as_plain_ones(what: str) -> None:
    cell = rnncore.LSTM(H)
    params, xs = cell.init(jax.random.key(0), D), jax.random.normal(jax.random.key(1), (3, 2, 7, D), jnp.float32)

    def run(p: Any, xs: Any) -> Any:
        return rnncore.unroll(cell, p, xs, backend="cpp")[1]

    gradient = jax.grad(lambda p, xs: jnp.sum(jnp.sin(run(p, xs))))
    function = {
        "run": run,
        "gradient": gradient,
        "mapped": jax.vmap(gradient, (None, 0)),
        "tangent": lambda p, xs: jax.jvp(run, (p, xs), (p, xs)),
        "second": lambda p, xs: jax.jvp(gradient, (p, xs), (p, xs))[1],
    }[what]
    exported = export.export(jax.jit(function))(params, xs)  # refuses calls that another machine may not have
    assert_close(export.deserialize(exported.serialize()).call(params, xs), function(params, xs), 1e-5)


def test_what_cannot_be_exported_is_refused() -> None:
    cell = rnncore.LSTM(H)
    params = cell.init(jax.random.key(0), D)

    def exported(shape: str, **options: Any) -> None:
        xs = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
        export.export(jax.jit(lambda xs: rnncore.unroll(cell, params, xs, **options)))(xs)

    with pytest.raises(NotImplementedError, match=r"backend='cpp'.*made for shapes that are numbers"):
        exported("b, 7, 4", backend="cpp")
    with pytest.raises(NotImplementedError, match=r"checkpoint_every=4.*symbolic number of steps, t.*fixed number"):
        exported("2, t, 4", checkpoint_every=4)
    with pytest.raises(NotImplementedError, match=r"recompute='chunk'.*symbolic number of steps"):
        exported("2, t, 4", recompute="chunk")
    with pytest.raises(ValueError, match="the features are symbolic"):
        exported("2, 7, d")
