"""Every Python block of the README and of the guides runs, in order, on names that the text introduces."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rnncore import linen
from rnncore.kernels.cpp import compiler

README = Path(__file__).resolve().parent.parent / "README.md"
MIGRATION = README.parent / "docs" / "migration.md"
KERNELS = README.parent / "docs" / "kernels.md"
CPP = README.parent / "docs" / "cpp.md"


def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    flax_cell = linen.LSTMCell(6)
    xs = jnp.ones((2, 101, 3))
    sequence = {"xs": jnp.ones((3, 7, 32)), "lengths": jnp.array([7, 0, 3]), "episode_starts": jnp.zeros((3, 7), bool)}
    model = linen.RNN(flax_cell)
    variables = model.init(jax.random.key(0), xs)
    whole = {"model": model, "variables": variables, "batch": xs, "loss": lambda ys, batch: jnp.mean(ys[:, -1] ** 2)}
    trained = {"xs": xs, "flax_cell": flax_cell, "trained_params": variables["params"]}
    before = {1: sequence, 3: sequence, 4: whole | trained}
    names: dict = {}
    for index, block in enumerate(blocks):
        names |= before.get(index, {})
        exec(compile(block, f"README block {index}", "exec"), names)
    assert "backend 'scan'" in capsys.readouterr().out
    assert names["curve"].log10.shape == (2, 100) and (tmp_path / "page.html").exists()


def test_python_blocks_of_the_migration_guide_run():
    blocks = re.findall(r"```python\n(.*?)```", MIGRATION.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    with jax.enable_x64(False):
        for index, block in enumerate(blocks):
            exec(compile(block, f"migration block {index}", "exec"), names)
    assert names["ys"].shape == (4, 20, 16)


def test_python_blocks_of_the_page_on_kernels_run(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", KERNELS.read_text(), re.DOTALL)
    exec(compile(block, "kernels block", "exec"), {})
    told = capsys.readouterr().out
    assert "not 'mosaic_gpu': it needs an NVIDIA Hopper GPU" in told and "not 'pallas_tpu': it needs a TPU" in told


@pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")
def test_python_blocks_of_the_page_on_the_compiled_loop_run(capsys):
    names: dict = {}
    with jax.enable_x64(False):
        for block in re.findall(r"```python\n(.*?)```", CPP.read_text(), re.DOTALL):
            exec(compile(block, "cpp block", "exec"), names)
    assert names["gradients"].bias.shape == (4, 64) and "struct Cell" in capsys.readouterr().out


def test_the_picture_is_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text()):
        assert (README.parent / path).stat().st_size > 10_000


@pytest.mark.parametrize("page", ["online", "structures"])
def test_python_blocks_of_the_pages_on_learning_online_and_on_structures_run(page: str):
    names: dict = {}
    with jax.enable_x64(False):
        for block in re.findall(r"```python\n(.*?)```", (KERNELS.parent / f"{page}.md").read_text(), re.DOTALL):
            exec(compile(block, f"{page} block", "exec"), names)
    if page == "online":
        assert names["losses"].shape == (1000,) and names["losses"][-1] < names["losses"][0]
    else:
        assert names["ys"].shape == (2, 5, 8) and names["cortex"].hidden_size == 100
