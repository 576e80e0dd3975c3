"""The character model in nnx: numbers of flax.nnx, a carried state, text that follows from the model."""

from __future__ import annotations

import math

import example_runs
import flax.nnx
import jax.numpy as jnp
import numpy as np
import pytest

SMALL = "--embed 3 --hidden 5 --length 8 --batch 4 --steps 6 --sample 12 --seed 2".split()


@pytest.fixture(scope="module")
def example():
    return example_runs.load("char_lm_nnx")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The one who reads, writes; the one who writes, reads $again$.\n" * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(example, text_file, tmp_path_factory):
    return example_runs.run(example, tmp_path_factory.mktemp("lm") / "small", *SMALL, "--text", str(text_file))


def test_what_it_measures_and_writes(small, text_file):
    run, text = small.results["runs"]["LSTM"], small.results["text"]
    assert small.code == 0 and len(run["loss"]) == 6 and run["watched"] == [0, 1, 2, 3, 4, 5, 6]
    assert run["held_out_bits"][0] == pytest.approx(math.log2(text["distinct"]), abs=0.5)
    assert run["held_out_bits"][-1] < run["held_out_bits"][0]
    assert len(small.results["sample"]) == len("The ") + 12 and small.results["sample"].startswith("The ")
    assert set(small.results["sample"]) <= set(text_file.read_text())
    assert small.results["sample"] in small.printed
    assert f"{run['held_out_bits'][-1]:.3f} bits per character on {text['held_out']:,} held-out" in small.printed


def test_flax_gives_the_same_numbers(example, small, text_file, tmp_path, monkeypatch):
    """Initial values, training and held-out bits are those of the same model built from flax.nnx."""

    class FlaxModel(flax.nnx.Module):
        def __init__(self, vocabulary, embed, hidden, *, rngs):
            self.embedding = flax.nnx.Embed(vocabulary, embed, rngs=rngs)
            self.rnn = flax.nnx.RNN(flax.nnx.OptimizedLSTMCell(embed, hidden, rngs=rngs), return_carry=True)
            self.readout = flax.nnx.Linear(hidden, vocabulary, rngs=rngs)

        __call__ = example.CharacterModel.__call__

    monkeypatch.setattr(example, "CharacterModel", FlaxModel)
    theirs = example_runs.run(example, tmp_path / "flax", *SMALL, "--text", str(text_file)).results
    for key in ("loss", "held_out_bits"):
        np.testing.assert_allclose(small.results["runs"]["LSTM"][key], theirs["runs"]["LSTM"][key], rtol=2e-6)
    assert small.results["sample"] == theirs["sample"]


def test_the_state_goes_from_window_to_window(example):
    model = example.CharacterModel(7, 3, 4, rngs=flax.nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 7, (2, 13)).astype(np.int32)
    start = example.zero_carry(model, 2)
    first, carry = example.measure(model, start, tokens[:, :7])
    second, carry = example.measure(model, carry, tokens[:, 6:])
    whole, last = example.measure(model, start, tokens)
    assert (first + second) / 2 == pytest.approx(float(whole), abs=1e-6)
    np.testing.assert_allclose(carry[1], last[1], atol=1e-6)
    fresh, _ = example.measure(model, start, tokens[:, 6:])
    assert abs(fresh - second) > 1e-4


def test_a_cold_sample_takes_the_likeliest_character(example):
    model = example.CharacterModel(7, 3, 4, rngs=flax.nnx.Rngs(1))
    prompt = np.array([1, 5, 2], np.int32)
    keys = example.jax.random.split(example.jax.random.key(0), 6)
    tokens = np.asarray(example.continuation(model, prompt, example.zero_carry(model, 1), keys, 1e-6))
    whole = np.concatenate([prompt, tokens])
    _, logits = example.nnx.jit(lambda m, t, c: m(t, c))(model, whole[None], example.zero_carry(model, 1))
    np.testing.assert_array_equal(jnp.argmax(logits[0, 2:-1], -1), tokens)


def test_bits_from_frequencies(example):
    corpus = example._corpus.Corpus("here", "abc", np.array([0, 0, 1, 1, 1]), np.array([0, 2]))
    assert example.frequencies_bits(corpus) == pytest.approx(-(math.log2(3 / 8) + math.log2(1 / 8)) / 2)


def test_a_run_that_was_stopped_is_drawn_too(example, small, tmp_path):
    results = {key: value for key, value in small.results.items() if key != "sample"}
    example_runs.check_partial(example, results, tmp_path)


def test_command_line(example, text_file, tmp_path, capsys):
    own = ("--embed", "--hidden", "--length", "--prompt", "--sample", "--temperature", "--text")
    example_runs.check_help(example, capsys, *own)
    for options, message in (
        (["--prompt", "Über"], "--prompt 'Über': expected characters of the text; it has no ['b', 'Ü']"),
        (["--prompt", ""], "it has no prompt"),
        (["--batch", "99"], "these settings need about 1,980 (smaller --batch or --length need fewer)"),
        (["--temperature", "0"], "0 is not positive"),
    ):
        assert message in example_runs.refused(example, capsys, tmp_path, *SMALL, *options, "--text", str(text_file))
