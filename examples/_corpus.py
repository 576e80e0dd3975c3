"""Text for a language model, by characters or by words: read, encode, split, and cut into batches."""

from __future__ import annotations

import collections
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

HELD_OUT = 0.1
END, UNKNOWN = "<eos>", "<unk>"


class Corpus(NamedTuple):
    """A text as integers.

    Fields:
      source: where it comes from.
      vocabulary: what the tokens index: a string of the distinct characters in order; or words, most frequent first.
      train: int32 (N,), the first nine tenths of the text.
      validation: int32 (M,), the rest.
      unit: "character" or "word".
    """

    source: str
    vocabulary: Sequence[str]
    train: np.ndarray
    validation: np.ndarray
    unit: str = "character"

    def describe(self) -> dict[str, object]:
        """What a JSON file says about it."""
        train, validation = len(self.train), len(self.validation)
        return {
            "source": self.source, f"{self.unit}s": train + validation, "distinct": len(self.vocabulary),
            "train": train, "validation": validation,
        }  # fmt: skip


def load(path: str | None, words: int | None = None) -> Corpus:
    """Reads a utf-8 file or, without one, the Python language reference from the standard library.

    Args:
      path: of the file.
      words: the largest size of a vocabulary of words; None reads by characters.

    Raises:
      ValueError: the file cannot be read as text; the message is meant for the user.
    """
    source = "pydoc_data.topics (standard library)" if path is None else path
    text = read(path)
    return encode(text, source) if words is None else encode_words(text, source, words)


def read(path: str | None) -> str:
    """The text of a file, or of the language reference."""
    if path is None:
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not utf-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
    if len(set(text)) < 2:
        raise ValueError(f"{path} is empty or repeats one character; there is nothing to predict")
    return text


def encode(text: str, source: str) -> Corpus:
    """The corpus of a text; its last tenth, in one piece, is held out."""
    codes, tokens = np.unique(np.array([text]).view(np.uint32), return_inverse=True)
    tokens = tokens.reshape(-1).astype(np.int32)
    return Corpus(source, "".join(map(chr, codes)), *split(tokens))


def encode_words(text: str, source: str, most: int) -> Corpus:
    """The corpus of a text in the form of the Penn Treebank: words separated by blanks, one sentence per line.

    Every line ends in <eos>, empty lines are left out, and all but the most frequent words become <unk>.  The Penn
    Treebank's own files are in lower case, with N for numbers, and already have <unk> for all but 10000 words.

    Args:
      most: the largest size of the vocabulary, including <eos> and <unk>.

    Source: Mikolov, Karafiat, Burget, Cernocky and Khudanpur (2010), whose files these are.
    """
    words = [word for line in text.splitlines() if line.strip() for word in (*line.split(), END)]
    counts = collections.Counter(words)
    if len(counts) < 3:
        raise ValueError(f"{source} has fewer than two distinct words; there is nothing to predict")
    kept = [word for word, _ in counts.most_common()]
    if len(kept) > most:
        kept = [word for word in kept if word not in (END, UNKNOWN)][: most - 2] + [END, UNKNOWN]
    index = {word: number for number, word in enumerate(kept)}
    tokens = np.array([index[word] if word in index else index[UNKNOWN] for word in words], np.int32)
    return Corpus(source, kept, *split(tokens), unit="word")


def split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the first nine tenths, the last tenth)."""
    cut = len(tokens) - int(len(tokens) * HELD_OUT)
    return tokens[:cut], tokens[cut:]


def check_size(
    corpus: Corpus, batch: int, length: int, window: int, options: str = "--batch, --length, --lags or --burn-in"
) -> None:
    """Rejects a text that is too short to train and measure on; smaller `options` need less text.

    Raises:
      ValueError: with the number of characters or words that would be enough.
    """
    # Training needs one window in every stream; the random start of a pass takes up to one more.
    train, validation = batch * (2 * length + 1), max(window + 1, 2 * batch)
    if len(corpus.train) >= train and len(corpus.validation) >= validation:
        return
    size = len(corpus.train) + len(corpus.validation)
    need = max(int(np.ceil(train / (1 - HELD_OUT))), int(np.ceil(validation / HELD_OUT)))
    raise ValueError(
        f"{corpus.source} has {size:,} {corpus.unit}s; these settings need about {need:,} "
        f"(smaller {options} need fewer)"
    )


def streams(tokens: np.ndarray, batch: int, start: int = 0) -> np.ndarray:
    """(batch, n): the text from `start` on, cut into `batch` contiguous pieces of equal length."""
    count = (len(tokens) - start) // batch
    return tokens[start : start + batch * count].reshape(batch, count)


class Windows:
    """Training windows of `length` + 1 tokens in text order, for truncated backpropagation.

    In every stream, window n + 1 starts where window n stopped, so the state can be carried over.
    Each pass over the text starts at a new random offset below `length`.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        self.tokens, self.batch, self.length = tokens, batch, length
        self.random = np.random.default_rng(seed)
        self.left = 0

    def __next__(self) -> tuple[np.ndarray, bool]:
        """((batch, length + 1) tokens, whether a new pass begins here)."""
        fresh = self.left == 0
        if fresh:
            self.text = streams(self.tokens, self.batch, int(self.random.integers(self.length)))
            self.left, self.at = (self.text.shape[1] - 1) // self.length, 0
        window = self.text[:, self.at : self.at + self.length + 1]
        self.at += self.length
        self.left -= 1
        return window, fresh


def spread(tokens: np.ndarray, count: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, (count, window) tokens): pieces spread evenly over a text, overlapping where it is short."""
    starts = np.linspace(0, len(tokens) - window, count).astype(int)
    return starts, tokens[starts[:, None] + np.arange(window)]
