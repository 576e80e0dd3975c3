"""Handwritten digits read as sequences of different lengths, with garbage in the padding.

Three ways to read the 1797 images of 8 x 8 pixels that come with scikit-learn:

  rows      8 features a step, top to bottom; every digit fills its 8 rows
  columns   8 features a step, left to right; blank columns on the right are cut off: 5 to 8 steps
  pixels    1 feature a step, row by row; blank pixels at the end are cut off: 59 to 64 steps

The sequences are put into one array and padded with NaN.  The padding reaches neither the loss nor a gradient, because
`seq_lengths` says where each sequence ends.  The class is read from the last state: that of a bidirectional GRU for
rows and columns, that of a forward LSTM for pixels.

  python examples/digits.py
  python examples/digits.py --readings columns --steps 200 --padding 1e6
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from rnncore import linen as nn

READINGS = ("rows", "columns", "pixels")
HELD_OUT = 360  # images
CLASSES = 10
MORE = 2  # steps of padding after the longest sequence, so that every sequence has some
SHOWN = 8  # images in the figure


class Digits(NamedTuple):
    """Images as sequences.

    Fields:
      xs: float32 (N, T, D), padded.
      lengths: int32 (N,).
      labels: int32 (N,).
    """

    xs: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def at(self, index: Any) -> Digits:
        return Digits(*(a[index] for a in self))


class Classifier(nn.Module):
    """Sequences (B, T, D) with lengths (B,) to logits (B, 10), from the last states only."""

    hidden: int
    both: bool

    @nn.compact
    def __call__(self, xs: jax.Array, lengths: jax.Array) -> jax.Array:
        if self.both:
            layer = nn.Bidirectional(nn.RNN(nn.GRUCell(self.hidden)), nn.RNN(nn.GRUCell(self.hidden)))
            (forward, backward), _ = layer(xs, seq_lengths=lengths, return_carry=True)
            last = jnp.concatenate([forward, backward], -1)
        else:
            (_, last), _ = nn.RNN(nn.LSTMCell(self.hidden))(xs, seq_lengths=lengths, return_carry=True)
        return nn.Dense(CLASSES)(last)


def read(reading: str, padding: float) -> Digits:
    """All images read in one way, trailing blanks replaced by padding."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    if reading == "columns":
        images = images.swapaxes(1, 2)
    xs = images.reshape(len(images), -1, 1) if reading == "pixels" else images
    steps = xs.shape[1]
    ink = (xs > 0).any(-1)
    lengths = steps - np.argmax(ink[:, ::-1], axis=1)
    xs = np.pad(xs, ((0, 0), (0, MORE), (0, 0)))
    xs[np.arange(steps + MORE) >= lengths[:, None]] = padding
    return Digits(xs, lengths.astype(np.int32), labels.astype(np.int32))


def load(args: argparse.Namespace) -> dict[str, tuple[Digits, Digits]]:
    """(training, held-out) images for every reading asked for; the same images in each.

    Raises:
      ValueError: a batch larger than the training set.
    """
    count = len(load_digits().target) - HELD_OUT
    if args.batch > count:
        raise ValueError(f"--batch {args.batch}: there are {count} images to train on")
    order = np.random.default_rng(args.seed).permutation(count + HELD_OUT)
    data = {reading: read(reading, args.padding) for reading in args.readings}
    return {name: (d.at(order[HELD_OUT:]), d.at(order[:HELD_OUT])) for name, d in data.items()}


def batches(data: Digits, size: int, seed: int) -> Iterator[Digits]:
    """Random batches, endlessly; every image at most once in a pass."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(data.labels))
        yield from (data.at(order[n : n + size]) for n in range(0, len(order) - size + 1, size))


def loss(model: Classifier, params: Any, batch: Digits) -> jax.Array:
    """Mean cross-entropy in nats."""
    logits = model.apply({"params": params}, batch.xs, batch.lengths)
    assert isinstance(logits, jax.Array)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def work(args: argparse.Namespace, data: dict[str, tuple[Digits, Digits]], results: dict[str, Any]) -> None:
    """Trains one network for each reading."""
    optimizer = _run.optimizer(args)
    for name, (train, test) in data.items():
        model = Classifier(args.hidden, both=name != "pixels")
        params = model.init(jax.random.key(args.seed), train.xs[:1], train.lengths[:1])["params"]

        @jax.jit
        def classify(params: Any, batch: Digits, model: Any = model) -> Any:
            return jnp.argmax(model.apply({"params": params}, batch.xs, batch.lengths), -1)

        def watch(state: Any, test: Digits = test, classify: Any = classify) -> dict[str, float]:
            return {"accuracy": float((np.asarray(classify(state[0], test)) == test.labels).mean())}

        state, step = (params, optimizer.init(params)), _run.stepper(optimizer, functools.partial(loss, model))
        stream = batches(train, args.batch, args.seed)
        every = max(args.steps // 20, 1)
        params, _ = _run.train(results["runs"], name, args.steps, step, state, stream, watch, every)
        results["runs"][name] |= {
            "lengths": [int(test.lengths.min()), int(test.lengths.max())],
            "parameters": sum(a.size for a in jax.tree.leaves(params)),
            "examples": [
                {"steps": x[:n].tolist(), "label": int(label), "read_as": int(guess)}
                for x, n, label, guess in chosen(test, np.asarray(classify(params, test)))
            ],
        }


def chosen(test: Digits, guesses: np.ndarray) -> list[tuple[np.ndarray, int, int, int]]:
    """Images for the figure: mistakes first, at most half, then the shortest correct sequence of each class."""
    wrong = np.flatnonzero(guesses != test.labels)[: SHOWN // 2]
    right = np.flatnonzero(guesses == test.labels)
    right = right[np.argsort(test.lengths[right], kind="stable")]
    _, first = np.unique(test.labels[right], return_index=True)
    index = np.concatenate([wrong, right[np.sort(first)]])[:SHOWN]
    return [(test.xs[i], int(test.lengths[i]), int(test.labels[i]), int(guesses[i])) for i in index]


def words(results: dict[str, Any]) -> str:
    """One line for each reading."""
    lines = []
    for name, run in results["runs"].items():
        line = f"{name}: {run['accuracy'][-1]:.1%} of {HELD_OUT} held-out images after {run['watched'][-1]} steps"
        if "lengths" in run:
            low, high = run["lengths"]
            line += f"; sequences of {low} to {high} steps, {run['parameters']:,} parameters"
        lines.append(line)
    return "\n".join([*lines, f"the padding was {results['settings']['padding']:g}"])


def draw(results: dict[str, Any]) -> Any:
    """Accuracy over training, and some images as they were read."""
    figure, (left, right) = _run.axes(2, (11.5, 4.8), width_ratios=(1, 1.15))
    for style, (name, run) in zip(_run.STYLES, results["runs"].items(), strict=False):
        error = 1 - np.array(run["accuracy"])
        # A log axis has no 0, so no mistake at all is drawn as half of one.
        drawn = 100 * np.maximum(error, 0.5 / HELD_OUT)
        left.plot(run["watched"], drawn, linewidth=1.8, **style, label=f"{name}: {error[-1]:.1%}")
    left.set_yscale("log")
    left.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    left.minorticks_off()
    left.set_xlabel("training step")
    left.set_ylabel(f"misclassified held-out images, % of {HELD_OUT}")
    left.legend(frameon=False, title="read by, error at the end")
    done = [name for name, run in results["runs"].items() if run.get("examples")]
    right.set_axis_off()
    if done:
        # Pixels show best how a sequence ends early.
        show(right, done[-1], results["runs"][done[-1]]["examples"])
    note = ", interrupted" if results["interrupted"] else ""
    padding = f"padded with {results['settings']['padding']:g}{note}".replace("nan", "NaN")
    figure.suptitle(f"Digits as sequences of different lengths, {padding}", x=0.01, ha="left", fontsize=12)
    return figure


def show(axis: Any, reading: str, examples: list[dict[str, Any]]) -> None:
    """Images in a grid; what was cut off is hatched."""
    for place, example in enumerate(examples):
        steps = np.array(example["steps"])
        inner = axis.inset_axes([place % 4 / 4, 0.5 - 0.52 * (place // 4), 0.22, 0.40])
        cut = np.full((64 if reading == "pixels" else 8, steps.shape[1]), np.nan)
        cut[: len(steps)] = steps
        image = cut.reshape(8, 8)
        image = image.T if reading == "columns" else image
        inner.set_facecolor("white")
        inner.patch.set_hatch("////")
        inner.patch.set_edgecolor("#009E73")
        inner.imshow(np.ma.masked_invalid(image), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        inner.set_xticks([])
        inner.set_yticks([])
        correct = example["label"] == example["read_as"]
        said = "classified correctly" if correct else f"classified as {example['read_as']}"
        inner.set_title(f"{example['label']}, {len(steps)} steps\n{said}", fontsize=9)
    axis.set_title(f"held-out images, read by {reading}; hatched: not part of the sequence", loc="left", fontsize=10)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="digits", steps=1200, batch=64, learning_rate=5e-3)
    add = parser.add_argument
    add("--readings", nargs="+", choices=READINGS, default=list(READINGS), help="which ways to read")
    add("--hidden", type=_options.at_least(1), default=64, help="hidden units")
    add("--padding", type=float, default=float("nan"), help="value after the end of each sequence")
    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
