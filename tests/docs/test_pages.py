"""Every Python block of the README and of the pages runs, in order, on names that the text introduces."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rnncore import linen
from rnncore.kernels import compiler

README = Path(__file__).resolve().parent.parent.parent / "README.md"
DOCS = README.parent / "docs"


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_each_python_block_of_the_readme_runs_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flax, gradients, own = ({} for _ in range(3))
    for names, block in zip((flax, gradients, own), blocks_of(README), strict=True):
        exec(compile(block, "README block", "exec"), names)
    assert isinstance(flax["layer"], linen.RNN)
    assert gradients["curve"].log10.shape == (8, 100) and (tmp_path / "page.html").exists()
    assert "of the squared gradient of the loss reaches back" in capsys.readouterr().out
    assert own["ys"].shape == (8, 100, 128)


def test_python_blocks_of_the_recipes_run(capsys):
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks_of(DOCS / "recipes.md"):
            exec(compile(block, "recipe", "exec"), names)
    shown = re.findall(r"```text\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    assert capsys.readouterr().out == "".join(shown)
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    assert jnp.abs(names["pieces"] - names["whole"]).max() < 1e-6
    assert jnp.abs(names["y"] - names["whole"][:, 0]).max() < 1e-6
    assert names["translation_losses"][-1] < 0.1 * names["translation_losses"][0]
    assert names["outputs"].shape == (4, 8, 12, 16) and names["gradients"].bias.shape == (3, 16)


@pytest.mark.parametrize(("page", "count"), [("sequences", 2), ("cells", 1)])
def test_python_blocks_of_the_pages_on_sequences_and_cells_run(page: str, count: int, capsys):
    blocks, names = blocks_of(DOCS / f"{page}.md"), {}
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, f"{page} block", "exec"), names)
    assert "backend 'scan'" in capsys.readouterr().out or page == "cells"
    assert names["ys"].shape == {"sequences": (3, 7, 128), "cells": (8, 100, 128)}[page]


def test_python_blocks_of_the_migration_guide_run():
    blocks = blocks_of(DOCS / "migration.md")
    assert len(blocks) == 5
    names: dict = {}
    with jax.enable_x64(False):
        for index, block in enumerate(blocks):
            exec(compile(block, f"migration block {index}", "exec"), names)
    assert names["ys"].shape == (4, 20, 16)


def test_python_blocks_of_the_page_on_kernels_run(capsys):
    (block,) = blocks_of(DOCS / "kernels.md")
    exec(compile(block, "kernels block", "exec"), {})
    told = capsys.readouterr().out
    assert "not 'mosaic_gpu': it needs an NVIDIA Hopper GPU" in told and "not 'pallas_tpu': it needs a TPU" in told


@pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")
def test_python_blocks_of_the_page_on_the_compiled_loop_run(capsys):
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks_of(DOCS / "cpp.md"):
            exec(compile(block, "cpp block", "exec"), names)
    assert names["gradients"].bias.shape == (4, 64) and "struct Cell" in capsys.readouterr().out


def test_python_blocks_of_the_page_on_the_analysis_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks_of(DOCS / "analysis.md"):
            exec(compile(block, "analysis block", "exec"), names)
    assert (tmp_path / "report.html").exists() and "of the squared gradient of the loss" in capsys.readouterr().out
    assert 1 < int(names["steps"]) < 64 and names["pieces"].shape[1:] == (8, int(names["steps"]), 16)


@pytest.mark.parametrize("page", ["online", "structures"])
def test_python_blocks_of_the_pages_on_learning_online_and_on_structures_run(page: str):
    names: dict = {}
    with jax.enable_x64(False):
        for block in blocks_of(DOCS / f"{page}.md"):
            exec(compile(block, f"{page} block", "exec"), names)
    if page == "online":
        assert names["losses"].shape == (1000,) and names["losses"][-1] < names["losses"][0]
    else:
        assert names["ys"].shape == (2, 5, 8) and names["cortex"].hidden_size == 100
