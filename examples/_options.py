"""The command line of the retention example, and option types for all examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(document: str, cells: Sequence[str]) -> argparse.ArgumentParser:
    """The options; `document` is the help text: a summary, then the details."""
    p = bare(document)

    def add(group: argparse._ArgumentGroup, name: str, kind: Callable, default: float, text: str) -> None:
        group.add_argument(name, type=kind, default=default, help=text)

    group = p.add_argument_group("network")
    group.add_argument("--cell", choices=("both", *cells), default="both", help="which network to train and measure")
    add(group, "--hidden", at_least(1), 128, "hidden units")
    add(group, "--embed", at_least(1), 32, "size of the embedding of characters or words")
    add(group, "--forget-bias", float, 0.0, "added to the LSTM's forget bias at initialisation")

    group = p.add_argument_group("training")
    add(group, "--steps", at_least(0), 1500, "training steps for each network")
    add(group, "--batch", at_least(1), 32, "streams of text to train on side by side")
    add(group, "--length", at_least(1), 100, "steps of backpropagation in training")
    add(group, "--learning-rate", positive, 5e-3, "of Adam, at the start; it falls to a tenth along a cosine")
    add(group, "--clip", positive, 1.0, "largest global norm of a training gradient")
    add(group, "--sparse-output", float, 0.0, "weight of the LSTM's mean output gate in the loss")
    add(group, "--seed", at_least(0), 0, "of the initial parameters and the offsets of the windows")

    group = p.add_argument_group("measurement")
    add(group, "--lags", at_least(1), 100, "measure 1 to this many steps back")
    add(group, "--positions", at_least(1), 32, "loss terms to measure, spread over the held-out text")
    add(group, "--burn-in", at_least(1), 50, "steps from a zero state to the state at the largest lag")

    group = p.add_argument_group("files")
    text(group)
    group.add_argument("--out", metavar="PREFIX", default="retention", help="writes PREFIX.json and PREFIX.png")
    return p


def text(group: Any) -> None:
    """The options that choose the text and how it is split into tokens."""
    group.add_argument("--text", metavar="FILE", help="utf-8 text to use instead of pydoc_data.topics from the "
                       "standard library; its last tenth is held out")  # fmt: skip
    group.add_argument("--words", type=at_least(3), nargs="?", const=10_000, metavar="N",
                       help="read by words, one sentence per line as in the Penn Treebank, with the N most frequent "
                       "words (10000); without it, read by characters")  # fmt: skip


def bare(document: str) -> argparse.ArgumentParser:
    """A parser without options, with the help text in its place."""
    summary, _, details = document.partition("\n\n")
    return argparse.ArgumentParser(description=summary, epilog=details, formatter_class=Formatter)


def at_least(smallest: int) -> Callable[[str], int]:
    """Type of an integer option with a smallest value."""

    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is too small, expected at least {smallest}")
        return value

    return integer


def positive(text: str) -> float:
    """Type of an option that is a positive number."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
