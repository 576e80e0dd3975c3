"""The checkpoint example: what Flax saved rnncore reads, what rnncore saved Flax reads."""

from __future__ import annotations

from pathlib import Path

import example_runs
import flax.linen
import numpy as np
import orbax.checkpoint
import pytest

SMALL = "--embed 3 --hidden 4 --length 12 --batch 8 --steps 8".split()


@pytest.fixture(scope="module")
def example():
    return example_runs.load("flax_checkpoint")


@pytest.fixture(scope="module")
def small(example, tmp_path_factory):
    return example_runs.run(example, tmp_path_factory.mktemp("checkpoint") / "small", *SMALL)


def test_outputs_are_equal_both_ways(small):
    seen = small.results["handed over"]
    assert small.code == 0 and list(seen) == ["flax.linen to rnncore.linen", "rnncore.linen to flax.linen"]
    for way, entry in seen.items():
        assert entry["largest_output"] > 0.1 and entry["largest_difference"] <= 1e-6
        assert f"checkpoint from {way}: outputs differ by {entry['largest_difference']:.1e} at most" in small.printed
    assert seen["flax.linen to rnncore.linen"]["folder"] == "small.flax.linen"


def test_both_libraries_write_the_same_tree(small):
    trees = []
    for name in ("flax.linen", "rnncore.linen"):
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(Path(f"{small.prefix}.{name}").absolute()).item_metadata.tree
        cell = metadata["params"]["layers_1"]["forward_rnn"]["cell"]
        assert sorted(cell) == ["hf", "hg", "hi", "ho", "if", "ig", "ii", "io"]
        assert tuple(cell["hf"]["kernel"].shape) == (4, 4)
        trees.append(shapes(metadata))
    assert trees[0] == trees[1] and len(trees[0]) > 3 * 20


def shapes(tree, path: str = "") -> dict[str, tuple]:
    if hasattr(tree, "shape"):
        return {path: (tuple(tree.shape), str(tree.dtype))}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree or ())
    return {k: v for name, value in items for k, v in shapes(value, f"{path}/{name}").items()}


def test_the_training_goes_on_as_flax_alone_would(example, small, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "LIBRARIES", {"flax.linen": flax.linen, "rnncore.linen": flax.linen})
    alone = example_runs.run(example, tmp_path / "alone", *SMALL)
    mixed, pure = (run.results["runs"]["rnncore.linen"] for run in (small, alone))
    np.testing.assert_allclose(mixed["loss"], pure["loss"], rtol=1e-5)
    first = small.results["runs"]["flax.linen"]
    assert len(first["loss"]) == len(mixed["loss"]) == 8
    assert mixed["held_out"][0] == pytest.approx(first["held_out"][-1], abs=1e-6)
    assert mixed["held_out"][-1] < first["held_out"][0] - 0.02


def test_a_run_that_was_stopped_is_drawn_too(example, small, tmp_path):
    runs = {"flax.linen": small.results["runs"]["flax.linen"]}
    example_runs.check_partial(example, small.results | {"runs": runs, "handed over": {}}, tmp_path)


def test_spaces_are_taken_out_and_remembered(example):
    corpus = example._corpus.encode("ab c  d\n", "here")
    tokens = np.concatenate([corpus.train, corpus.validation])
    tagged = example.without_spaces(tokens, corpus.vocabulary)
    assert "".join(corpus.vocabulary[t] for t in tagged.tokens) == "abcd"
    np.testing.assert_array_equal(tagged.spaces, [False, True, True, True])
    said = np.array([True, True, True, False])
    assert example.f1_score(said, tagged.spaces) == pytest.approx(2 / 3)


def test_command_line(example, tmp_path, capsys):
    example_runs.check_help(example, capsys, "--embed", "--hidden", "--length", "--text")
    (tmp_path / "short.txt").write_text("a b c d e f g " * 10)
    message = example_runs.refused(example, capsys, tmp_path, "--text", str(tmp_path / "short.txt"))
    assert "short.txt has 63 characters besides spaces in its first nine tenths; --length 96 needs more" in message
    assert "cannot read nowhere" in example_runs.refused(example, capsys, tmp_path, "--text", "nowhere")
