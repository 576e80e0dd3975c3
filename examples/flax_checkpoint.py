"""A checkpoint of flax.linen, loaded and trained further by rnncore.linen, and loaded by flax.linen again.

The model is written once, as a function of the module namespace, and learns to put the spaces back into
text: it reads a line without them, in both directions, and predicts for each character whether a space
followed.  Flax's modules train it, and orbax saves parameters and optimiser state.  The same code with
rnncore.linen loads that checkpoint, gives the same outputs, trains it further and saves it, and Flax's
modules load it again.  The example also shows the time of a training step of both.

  python examples/flax_checkpoint.py
  python examples/flax_checkpoint.py --text book.txt --steps 1000
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _corpus
import _options
import _run
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # type: ignore[import-untyped]

import rnncore.linen

LIBRARIES: dict[str, Any] = {"flax.linen": flax.linen, "rnncore.linen": rnncore.linen}
TEST_WINDOWS = 64


def model(nn: Any, vocabulary: int, embed: int, hidden: int) -> Any:
    """The same model for both libraries: tokens (B, T) to logits (B, T, 1)."""
    forward, backward = (nn.RNN(nn.OptimizedLSTMCell(hidden)) for _ in range(2))
    return nn.Sequential([nn.Embed(vocabulary, embed), nn.Bidirectional(forward, backward), nn.Dense(1)])


class Tagged(NamedTuple):
    """Text without its spaces.

    Fields:
      tokens: int32 (..., T).
      spaces: bool (..., T), whether white space followed.
    """

    tokens: np.ndarray
    spaces: np.ndarray


class Data(NamedTuple):
    """A corpus for this task; `windows` is the held-out part in pieces (B, T)."""

    source: str
    vocabulary: int
    train: Tagged
    windows: Tagged


def without_spaces(tokens: np.ndarray, characters: Sequence[str]) -> Tagged:
    """The characters other than white space, and after which of them white space stood."""
    blank = np.array([c.isspace() for c in characters])[tokens]
    followed = np.append(blank[1:], False)
    return Tagged(tokens[~blank], followed[~blank])


def load(args: argparse.Namespace) -> Data:
    """Reads and tags the text.

    Raises:
      ValueError: the text cannot be read, or is too short.
    """
    corpus = _corpus.load(args.text)
    train, test = (without_spaces(part, corpus.vocabulary) for part in (corpus.train, corpus.validation))
    for part, tagged in (("first nine tenths", train), ("last tenth", test)):
        if len(tagged.tokens) <= args.length:
            raise ValueError(
                f"{corpus.source} has {len(tagged.tokens)} characters besides spaces in its {part}; --length "
                f"{args.length} needs more (a smaller --length needs fewer)"
            )
    windows = [_corpus.spread(a, TEST_WINDOWS, args.length)[1] for a in test]
    return Data(corpus.source, len(corpus.vocabulary), train, Tagged(*windows))


def batches(text: Tagged, size: int, length: int, seed: int) -> Iterator[Tagged]:
    """Random windows, endlessly."""
    random = np.random.default_rng(seed)
    while True:
        index = random.integers(len(text.tokens) - length, size=(size, 1)) + np.arange(length)
        yield Tagged(text.tokens[index], text.spaces[index])


def loss(net: Any, params: Any, batch: Tagged) -> jax.Array:
    """Mean cross-entropy of the tags in nats."""
    logits = net.apply({"params": params}, batch.tokens)[..., 0]
    return optax.sigmoid_binary_cross_entropy(logits, jnp.asarray(batch.spaces, logits.dtype)).mean()


def f1_score(said: np.ndarray, right: np.ndarray) -> float:
    """Harmonic mean of precision and recall of the spaces."""
    return float(2 * (said & right).sum() / max(said.sum() + right.sum(), 1))


def work(args: argparse.Namespace, data: Data, results: dict[str, Any]) -> None:
    """Flax trains and saves; rnncore loads, compares, trains and saves; Flax loads and compares."""
    results["text"] = data.source
    rate = optax.cosine_decay_schedule(args.learning_rate, 2 * args.steps, alpha=0.05)
    optimizer = optax.adam(rate)
    nets = {name: model(nn, data.vocabulary, args.embed, args.hidden) for name, nn in LIBRARIES.items()}
    read = {name: jax.jit(lambda p, tokens, net=net: net.apply({"params": p}, tokens)) for name, net in nets.items()}
    test, stream = data.windows, batches(data.train, args.batch, args.length, args.seed)
    params = nets["flax.linen"].init(jax.random.key(args.seed), test.tokens[:1])["params"]
    state = (params, optimizer.init(params))
    results["handed over"] = {}
    for name, other in zip(LIBRARIES, reversed(LIBRARIES), strict=True):
        measure = jax.jit(functools.partial(loss, nets[name]))

        def watch(state: Any, measure: Any = measure, name: str = name) -> dict[str, float]:
            said = np.asarray(read[name](state[0], test.tokens))[..., 0] > 0
            return {"held_out": float(measure(state[0], test)), "f1": f1_score(said, test.spaces)}

        step, every = _run.stepper(optimizer, functools.partial(loss, nets[name])), max(args.steps // 8, 1)
        state = _run.train(results["runs"], name, args.steps, step, state, stream, watch, every)
        folder = Path(f"{args.out}.{name}").absolute()
        before = np.asarray(read[name](state[0], test.tokens))
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, {"params": state[0], "moments": state[1]}, force=True)
            checkpointer.wait_until_finished()
            # What is restored has to match the other library's model in every name and shape.
            init = functools.partial(nets[other].init, jax.random.key(0), test.tokens[:1])
            expected = jax.eval_shape(lambda init=init: (p := init()["params"], optimizer.init(p)))
            loaded = checkpointer.restore(folder, {"params": expected[0], "moments": expected[1]})
        state = loaded["params"], loaded["moments"]
        after = np.asarray(read[other](state[0], test.tokens))
        results["handed over"][f"{name} to {other}"] = {
            "largest_difference": float(np.abs(after - before).max()), "largest_output": float(np.abs(before).max()),
            "folder": folder.name,
        }  # fmt: skip


def milliseconds(run: dict[str, Any]) -> float | None:
    """Median time of a training step."""
    return 1e3 * statistics.median(run["seconds"]) if run["seconds"] else None


def words(results: dict[str, Any]) -> str:
    """How close the outputs are, how fast each library is, and how well the model learned."""
    lines = [f"text: {results['text']}"]
    for name, run in results["runs"].items():
        time = milliseconds(run)
        lines.append(
            f"trained by {name}: held-out loss {run['held_out'][0]:.4f} to {run['held_out'][-1]:.4f} nats, spaces "
            f"found with F1 {run['f1'][-1]:.1%}" + (f", {time:.1f} ms per step" if time else "")
        )
    for way, seen in results["handed over"].items():
        lines.append(
            f"checkpoint from {way}: outputs differ by {seen['largest_difference']:.1e} at most; the largest output is "
            f"{seen['largest_output']:.1f}"
        )
    times = [milliseconds(run) for run in results["runs"].values()]
    if len(times) == 2 and all(times):
        lines.append(f"a training step takes {times[0] / times[1]:.2f} times as long in Flax")  # type: ignore[operator]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """The loss over both parts of the training."""
    figure, (axis,) = _run.axes(1, (8.5, 5))
    begin = 0
    for style, (name, run) in zip(_run.STYLES, results["runs"].items(), strict=False):
        time = milliseconds(run)
        steps = begin + np.arange(1, len(run["loss"]) + 1)
        axis.plot(steps, run["loss"], color=style["color"], linewidth=0.6, alpha=0.35)
        axis.plot(steps, _run.smooth(run["loss"], 20), linewidth=1.8, **style,
                  label=f"trained by {name}" + (f", {time:.1f} ms per step" if time else ""))  # fmt: skip
        axis.plot(begin + np.array(run["watched"]), run["held_out"], linestyle="", marker="os"[begin > 0],
                  markersize=5, markerfacecolor="white", color=style["color"], label="held-out text")  # fmt: skip
        begin += len(run["loss"])
    top = 1.15 * max(max(run["held_out"]) for run in results["runs"].values())
    middle = len(results["runs"]["flax.linen"]["loss"])
    for place, (way, seen) in zip((middle, begin), results["handed over"].items(), strict=False):
        axis.axvline(place, color="#777777", linewidth=1)
        axis.text(0.985 * place, 0.66 * top, f"{way.replace(' to ', chr(10) + 'to ')}:\nlargest difference\nof outputs "
                  f"{seen['largest_difference']:.0e}", ha="right", va="top", fontsize=9, color="#444444",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})  # fmt: skip
    axis.set_xlim(0, max(begin, 1))
    axis.set_ylim(0, top)
    axis.set_xlabel("training step")
    axis.set_ylabel("loss, nats per character")
    axis.legend(ncols=2, loc="upper right", fontsize=9, framealpha=1, edgecolor="white")
    note = ", interrupted" if results["interrupted"] else ""
    figure.suptitle(f"One model, one checkpoint, two libraries: putting spaces back into text{note}",
                    x=0.01, ha="left", fontsize=12)  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="checkpoint", steps=300, batch=32, learning_rate=5e-3)
    parser.epilog = f"{parser.epilog}\nThe checkpoints are in the folders PREFIX.flax.linen and PREFIX.rnncore.linen."
    add, positive = parser.add_argument, _options.at_least(1)
    add("--embed", type=positive, default=32, help="size of the character embedding")
    add("--hidden", type=positive, default=96, help="hidden units in each direction")
    add("--length", type=positive, default=96, help="characters in a piece of text")
    add("--text", metavar="FILE", help="utf-8 text to use instead of pydoc_data.topics from the standard library")
    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
