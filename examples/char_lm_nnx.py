"""A character language model in nnx, trained by truncated backpropagation, and text sampled from it.

Embedding, LSTM, readout: an nnx model written as for Flax, with the recurrent classes of `rnncore.nnx`.
The text is cut into --batch streams, and each stream into windows of --length characters.  Each window
starts from the state at the end of the window before, with no gradient across the boundary.  The example
measures how many bits the model needs per character of held-out text.

  python examples/char_lm_nnx.py
  python examples/char_lm_nnx.py --text book.txt --steps 5000 --prompt "It was "
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import _corpus
import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rnncore import nnx

LINES = 24  # of the sample in the figure


class CharacterModel(nnx.Module):
    """Tokens (B, T) and the carry so far to (carry, logits (B, T, vocabulary))."""

    def __init__(self, vocabulary: int, embed: int, hidden: int, *, rngs: Any):
        self.embedding = nnx.Embed(vocabulary, embed, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(embed, hidden, rngs=rngs), return_carry=True)
        self.readout = nnx.Linear(hidden, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
        carry, hidden = self.rnn(self.embedding(tokens), initial_carry=carry)
        return carry, self.readout(hidden)


def window_loss(model: CharacterModel, carry: Any, window: jax.Array) -> tuple[jax.Array, Any]:
    """(nats per character of a window (B, T + 1), last carry)."""
    carry, logits = model(window[:, :-1], carry)
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean(), carry


@nnx.jit
def train_step(model: CharacterModel, optimizer: Any, carry: Any, window: jax.Array) -> tuple[jax.Array, Any]:
    """One update, in place."""
    differentiate = nnx.value_and_grad(window_loss, has_aux=True)
    (loss, carry), gradient = differentiate(model, carry, window)
    optimizer.update(model, gradient)
    return loss, carry


measure = nnx.jit(window_loss)


@nnx.jit
def continuation(model: CharacterModel, prompt: jax.Array, carry: Any, keys: jax.Array, temperature: Any) -> jax.Array:
    """One token for each key, drawn one after the other, to follow the prompt (T,)."""
    graph, state = nnx.split(model)
    carry, logits = model(prompt[None], carry)

    def one(before: Any, key: jax.Array) -> Any:
        carry, logits = before
        token = jax.random.categorical(key, logits / temperature)
        carry, logits = nnx.merge(graph, state, copy=True)(token[:, None], carry)
        return (carry, logits[:, -1]), token[0]

    return jax.lax.scan(one, (carry, logits[:, -1]), keys)[1]


def zero_carry(model: CharacterModel, batch: int) -> Any:
    """The carry before any text."""
    return jax.tree.map(jnp.zeros_like, model.rnn.cell.initialize_carry((batch, model.embedding.features), nnx.Rngs(0)))


def windows(corpus: _corpus.Corpus, args: argparse.Namespace) -> Iterator[tuple[np.ndarray, bool]]:
    """(window, whether it begins a pass over the text), endlessly."""
    source = _corpus.Windows(corpus.train, args.batch, args.length, args.seed)
    while True:
        yield next(source)


def load(args: argparse.Namespace) -> _corpus.Corpus:
    """The text.

    Raises:
      ValueError: it cannot be read, is too short, or lacks a character of the prompt.
    """
    corpus = _corpus.load(args.text)
    _corpus.check_size(corpus, args.batch, args.length, args.length, "--batch or --length")
    missing = sorted(set(args.prompt) - set(corpus.vocabulary))
    if missing or not args.prompt:
        raise ValueError(f"--prompt {args.prompt!r}: expected characters of the text; it has no {missing or 'prompt'}")
    return corpus


def frequencies_bits(corpus: _corpus.Corpus) -> float:
    """Bits per held-out character of a model that knows only how frequent each character is."""
    count = np.bincount(corpus.train, minlength=len(corpus.vocabulary)) + 1.0
    return float(-np.log2(count / count.sum())[corpus.validation].mean())


def work(args: argparse.Namespace, corpus: _corpus.Corpus, results: dict[str, Any]) -> None:
    """Trains, measures on held-out text, and samples."""
    model = CharacterModel(len(corpus.vocabulary), args.embed, args.hidden, rngs=nnx.Rngs(args.seed))
    optimizer = nnx.Optimizer(model, _run.optimizer(args), wrt=nnx.Param)
    start, held_out = zero_carry(model, args.batch), _corpus.streams(corpus.validation, args.batch)
    results["text"] = {"source": corpus.source, "held_out": held_out.size, "distinct": len(corpus.vocabulary)}
    results["frequencies_bits"] = frequencies_bits(corpus)

    def step(carry: Any, batch: tuple[np.ndarray, bool]) -> tuple[Any, jax.Array]:
        window, fresh = batch
        loss, carry = train_step(model, optimizer, start if fresh else carry, jnp.asarray(window))
        return carry, loss

    def watch(_: Any) -> dict[str, float]:
        return {"held_out_bits": float(measure(model, start, jnp.asarray(held_out))[0]) / math.log(2)}

    every = max(args.steps // 16, 1)
    _run.train(results["runs"], "LSTM", args.steps, step, start, windows(corpus, args), watch, every)
    prompt = jnp.array([corpus.vocabulary.index(c) for c in args.prompt], jnp.int32)
    keys = jax.random.split(jax.random.key(args.seed), args.sample)
    tokens = continuation(model, prompt, zero_carry(model, 1), keys, args.temperature)
    results["sample"] = args.prompt + "".join(corpus.vocabulary[t] for t in np.asarray(tokens))


def words(results: dict[str, Any]) -> str:
    """What the model wrote, and how good it is."""
    run, text = results["runs"]["LSTM"], results["text"]
    lines = [f"--- the model writes:\n{results['sample']}\n---"] if "sample" in results else []
    lines.append(
        f"{run['held_out_bits'][-1]:.3f} bits per character on {text['held_out']:,} held-out characters of "
        f"{text['source']} after {run['watched'][-1]} steps; {run['held_out_bits'][0]:.3f} before, "
        f"{results['frequencies_bits']:.3f} from the frequencies of characters alone"
    )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Bits per character over training, and the text that the model wrote."""
    figure, (left, right) = _run.axes(2, (12, 5), width_ratios=(1, 1))
    run, settings = results["runs"]["LSTM"], results["settings"]
    bits = np.array(run["loss"]) / math.log(2)
    steps = np.arange(1, len(bits) + 1)
    left.plot(steps, bits, color=_run.STYLES[0]["color"], linewidth=0.5, alpha=0.35)
    left.plot(steps, _run.smooth(bits, 20), linewidth=1.8, label="training text", **_run.STYLES[0])
    left.plot(run["watched"], run["held_out_bits"], linestyle="", marker="o", markersize=5, markerfacecolor="white",
              color="#D55E00", label=f"held-out text, {run['held_out_bits'][-1]:.2f} at the end")  # fmt: skip
    left.axhline(results["frequencies_bits"], linewidth=1.4, label="frequencies of characters alone", **_run.STYLES[2])
    left.set_xlim(left=0)
    left.set_ylim(bottom=0)
    left.set_xlabel(f"training step ({settings['batch']} windows of {settings['length']} characters)")
    left.set_ylabel("bits per character")
    left.legend(frameon=False)
    right.set_axis_off()
    rows = results.get("sample", "").split("\n")
    lines = [part for row in rows for part in (textwrap.wrap(row, 66) or [""])]
    right.set_title(f"what the model writes after {settings['prompt']!r}", loc="left", fontsize=10)
    right.text(0, 0.98, "\n".join(lines[:LINES]), family="monospace", fontsize=9, va="top", parse_math=False)
    note = ", interrupted" if results["interrupted"] else ""
    figure.suptitle(f"A character model with an LSTM of {settings['hidden']} units in nnx{note}",
                    x=0.01, ha="left", fontsize=12)  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="char_lm", steps=1200, batch=32, learning_rate=1e-2)
    add, positive = parser.add_argument, _options.at_least(1)
    add("--embed", type=positive, default=32, help="size of the character embedding")
    add("--hidden", type=positive, default=192, help="hidden units")
    add("--length", type=positive, default=64, help="characters in a window")
    add("--prompt", default="The ", help="what the sample begins with")
    add("--sample", type=positive, default=800, help="characters to write")
    add("--temperature", type=_options.positive, default=0.7, help="of the sample; lower is more cautious")
    add("--text", metavar="FILE", help="utf-8 text to use instead of pydoc_data.topics from the standard library")
    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
