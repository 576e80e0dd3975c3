"""The digits example: sequences, lengths and padding, and what a run leaves behind."""

from __future__ import annotations

import example_runs
import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

LENGTHS = {"rows": {8}, "columns": {5, 6, 7, 8}, "pixels": {59, 60, 61, 62, 63, 64}}


@pytest.fixture(scope="module")
def example():
    return example_runs.load("digits")


@pytest.mark.parametrize("reading", LENGTHS)
def test_sequences_hold_the_images(example, reading):
    data = example.read(reading, -1.0)
    assert set(data.lengths) == LENGTHS[reading]
    assert data.xs.dtype == np.float32 and data.xs.shape[1] == max(LENGTHS[reading]) + example.MORE
    inside = np.arange(data.xs.shape[1]) < data.lengths[:, None]
    assert (data.xs[~inside] == -1).all() and (data.xs[inside] >= 0).all()
    last = np.take_along_axis(data.xs, (data.lengths - 1)[:, None, None], 1)
    assert (last.max(-1) > 0).all()
    images = np.maximum(data.xs, 0)[:, : -example.MORE].reshape(-1, 8, 8)
    images = images.swapaxes(1, 2) if reading == "columns" else images
    np.testing.assert_array_equal(images * 16, load_digits().images)
    np.testing.assert_array_equal(data.labels, load_digits().target)


@pytest.mark.parametrize("reading", LENGTHS)
def test_padding_reaches_neither_loss_nor_gradient(example, reading):
    model = example.Classifier(3, both=reading != "pixels")
    index = np.argsort(example.read(reading, 0.0).lengths)[[0, 1, -1]]
    batch = {padding: example.read(reading, padding).at(index) for padding in (0.0, 7.0, np.nan)}
    params = jax.jit(model.init)(jax.random.key(0), batch[0.0].xs, batch[0.0].lengths)["params"]
    step = jax.jit(jax.value_and_grad(lambda p, b: example.loss(model, p, b)))
    value, gradient = step(params, batch[0.0])
    assert np.isfinite(value) and min(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 0
    for padding in (7.0, np.nan):
        got = step(params, batch[padding])
        jax.tree.map(np.testing.assert_array_equal, got, (value, gradient))
    # Without lengths it does reach it: the last state would be one after the padding.
    whole = batch[7.0]._replace(lengths=np.full_like(batch[7.0].lengths, batch[7.0].xs.shape[1]))
    assert abs(step(params, whole)[0] - value) > 1e-3


def test_batches_are_passes_and_the_held_out_images_are_others(example):
    args = example.argparse.Namespace(batch=64, seed=3, padding=0.0, readings=["rows", "pixels"])
    data = example.load(args)
    images = {name: [d.xs[:, : -example.MORE].reshape(-1, 64) for d in pair] for name, pair in data.items()}
    for place, count in ((0, 1797 - example.HELD_OUT), (1, example.HELD_OUT)):
        np.testing.assert_array_equal(images["rows"][place], images["pixels"][place])
        assert len(images["rows"][place]) == count
    rows = {tuple(image) for image in images["rows"][0]}
    assert not rows & {tuple(image) for image in images["rows"][1]}
    train = data["rows"][0]
    stream = example.batches(train, 64, seed=0)
    one_pass = np.concatenate([next(stream).xs for _ in range(len(train.labels) // 64)])
    assert len(np.unique(one_pass.reshape(len(one_pass), -1), axis=0)) == len(one_pass)


def test_it_learns_and_writes_its_files(example, tmp_path):
    options = "--readings columns pixels --steps 60 --hidden 12 --learning-rate 0.03 --batch 32".split()
    run = example_runs.run(example, tmp_path / "new" / "small", *options)
    runs = run.results["runs"]
    assert run.code == 0 and run.results["interrupted"] is False and list(runs) == ["columns", "pixels"]
    for name, record in runs.items():
        assert len(record["loss"]) == 60 and len(record["seconds"]) == 59
        assert record["watched"][0] == 0 and record["watched"][-1] == 60
        assert f"{name}: {record['accuracy'][-1]:.1%} of 360 held-out images after 60 steps" in run.printed
        assert {len(e["steps"]) for e in record["examples"]} <= LENGTHS[name] and len(record["examples"]) == 8
    assert runs["columns"]["accuracy"][0] < 0.3 < 0.7 < runs["columns"]["accuracy"][-1]
    assert run.results["settings"]["padding"] is None and "the padding was nan" in run.printed
    record = runs["pixels"]
    cut = {key: record[key] for key in ("loss", "seconds", "watched", "accuracy")}
    example_runs.check_partial(example, run.results | {"runs": {"pixels": cut}, "settings": {"padding": 1.0}}, tmp_path)


def test_stopped_on_the_way_it_keeps_what_was_done(example, tmp_path, monkeypatch):
    batches = example.batches

    def stopped(*args):
        stream = batches(*args)
        yield from (next(stream) for _ in range(2))
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "batches", stopped)
    run = example_runs.run(example, tmp_path / "cut", "--readings", "rows", "--hidden", "2", "--steps", "9")
    assert run.code == 130 and run.results["interrupted"] is True and "interrupted" in run.printed
    assert len(run.results["runs"]["rows"]["loss"]) == 2 and run.results["runs"]["rows"]["watched"] == [0, 1, 2]


def test_stopped_before_anything_was_measured_leaves_older_files_alone(example, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    (tmp_path / "old.json").write_text("{}")
    monkeypatch.setattr(example._run, "train", stopped)
    code = example.main(["--readings", "rows", "--hidden", "2", "--out", str(tmp_path / "old")])
    assert code == 130 and "nothing was measured" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"]


def test_training_that_diverges_says_so_and_keeps_the_rest(example, tmp_path, capsys):
    options = "--readings rows --hidden 2 --steps 30 --learning-rate 1e38".split()
    run = example_runs.run(example, tmp_path / "far", *options)
    assert run.code == 1 and "rows diverged at step" in capsys.readouterr().err
    assert run.results["runs"]["rows"]["watched"][0] == 0


def test_command_line(example, tmp_path, capsys):
    example_runs.check_help(example, capsys, "--readings", "--hidden", "--padding")
    for options, message in (
        (["--batch", "2000"], "--batch 2000: there are 1437 images to train on"),
        (["--readings", "spirals"], "invalid choice: 'spirals'"),
        (["--steps", "0"], "0 is too small, expected at least 1"),
        (["--learning-rate", "-1"], "-1 is not positive"),
    ):
        assert message in example_runs.refused(example, capsys, tmp_path, *options)
