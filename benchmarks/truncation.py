"""The bias of truncated gradients, predicted by `choose_truncation` and measured on other batches.

Character models of 64 units on the text of the Python language reference, before and after training.  A batch has the
loss terms of so many positions; its gradient in the cell's parameters, truncated after K steps and whole, in float64:

    bias(K) = ||g_K - g|| / ||g||,   the geometric mean over batches: that of a typical one

The mean of the squares is of another kind: ten of six thousand positions may make up nine tenths of it, and it differs
between two samples by factors of 2.  Predicted from some batches, measured on others with the gradient really stopped
K steps before the loss.  On the same batches both are the same number; between two samples they differ by chance, in 19
of 20 cases by no more than the factor in the last column.

    python -m benchmarks.truncation             # minutes; prints the table of docs/analysis.md
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import rnncore
from benchmarks import options
from rnncore import analysis

KS = (5, 10, 20, 50, 100)
UNITS, EMBED, WINDOW, POSITIONS = 64, 32, 200, 128
CELLS = {"RNN": rnncore.Elman(UNITS), "GRU": rnncore.GRU(UNITS), "LSTM": rnncore.LSTM(UNITS, forget_bias=1.0)}
WORTH = 1e-3
"""Biases below it are shown and not judged."""

ROUNDING = 1e-14

Problem = tuple[Any, Any, jax.Array, jax.Array]
"""(cell, parameters of all, inputs (B, T, E), next characters (B,))."""


def batches(cell: Any, params: Any, text: np.ndarray, count: int, seed: int) -> list[Problem]:
    """Positions drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(text) - WINDOW - 1, (count, POSITIONS))
    wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), params)
    pieces = text[starts[..., None] + np.arange(WINDOW + 1)]
    return [(cell, wide, wide["embedding"][piece[:, :-1]], jnp.asarray(piece[:, -1])) for piece in pieces]


def gradients(problem: Problem) -> analysis.GradientsOverTime:
    """Of the loss terms at the end of the windows."""
    cell, params, xs, target = problem

    def loss(carry: Any, outputs: jax.Array) -> jax.Array:
        del outputs
        return optax.softmax_cross_entropy_with_integer_labels(carry.h @ params["readout"], target).mean()

    return analysis.gradients_over_time(loss, cell, params["cell"], xs)


def truncated(problem: Problem, k: int) -> np.ndarray:
    """The gradient that does not go back further than k steps."""
    gradient = _truncated(problem[0], k, *problem[1:])
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(gradient)])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _truncated(cell: Any, k: int, params: Any, xs: jax.Array, target: jax.Array) -> Any:
    def loss(weights: Any) -> jax.Array:
        carry = None
        if k < WINDOW:
            carry, _ = rnncore.unroll(cell, jax.lax.stop_gradient(weights), xs[:, : WINDOW - k])
        carry, _ = rnncore.unroll(cell, weights, xs[:, WINDOW - k :], initial_carry=carry)
        return optax.softmax_cross_entropy_with_integer_labels(carry.h @ params["readout"], target).mean()

    return jax.grad(loss)(params["cell"])


def compare(cell: Any, params: Any, text: np.ndarray, count: int) -> list[tuple[int, float, float, float, float]]:
    """(K, measured, predicted from gradients, predicted from the curve, factor between two samples)."""
    with jax.enable_x64(True):
        probe = batches(cell, params, text, count, 1)
        found = [gradients(problem) for problem in probe]
        by_gradients = analysis.choose_truncation(found, 0.99)
        assert by_gradients.error is not None
        last = jax.tree.map(lambda a: a[:, -1], found[0].states)
        run = analysis.trajectory(cell, probe[0][1]["cell"], probe[0][2])
        curve = analysis.retention_curve(run, kind="adjoint", adjoint=last)
        by_curve = analysis.choose_truncation(curve, 0.99).predicted
        logs = []
        for problem in batches(cell, params, text, count, 2):
            whole = truncated(problem, WINDOW)
            biases = [np.linalg.norm(truncated(problem, k) - whole) / np.linalg.norm(whole) for k in KS]
            logs.append(np.log(biases))
        measured = np.exp(np.mean(logs, 0))
        draw = np.exp(1.96 * np.hypot(by_gradients.error[np.asarray(KS) - 1], np.std(logs, 0, ddof=1) / count**0.5))
        predicted = by_gradients.predicted
        return [
            (k, float(measured[n]), float(predicted[k - 1]), float(by_curve[k - 1]), float(draw[n]))
            for n, k in enumerate(KS)
        ]


def train(cell: Any, params: Any, corpus: Any, steps: int) -> Any:
    """The parameters after so many windows of 100 characters."""
    rate = optax.cosine_decay_schedule(5e-3, steps, alpha=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params: Any, carry: Any, window: Any) -> Any:
        carry, hs = rnncore.unroll(cell, params["cell"], params["embedding"][window[:, :-1]], initial_carry=carry)
        logits = hs @ params["readout"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean(), carry

    @jax.jit
    def step(params: Any, moments: Any, carry: Any, window: Any) -> Any:
        (_, carry), gradient = jax.value_and_grad(loss, has_aux=True)(params, carry, window)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, carry

    moments, start = optimizer.init(params), cell.initial_carry((32,))
    carry, windows = start, corpus_module().Windows(corpus.train, 32, 100, 0)
    for _ in tqdm(range(steps), desc=type(cell).__name__, dynamic_ncols=True):
        window, fresh = next(windows)
        params, moments, carry = step(params, moments, start if fresh else carry, window)
    return params


def corpus_module() -> Any:
    """The text of the examples."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import _corpus

    return _corpus


def main(argv: list[str] | None = None) -> int:
    """Prints the table; 1 where a bias worth judging is predicted by more than a factor of 1.5 wrongly."""
    parser, count = options.parser("truncation", __doc__), options.count
    parser.add_argument("--steps", type=count, default=600, help="training steps")
    parser.add_argument("--batches", type=count, default=64, help="batches to predict from, and as many to measure on")
    args = parser.parse_args(argv)
    corpus, worst = corpus_module().load(None), 1.0
    print("| network | when | K | measured | from gradients | of it | from the curve | of it | two samples |\n"
          + "|---" * 9 + "|")  # fmt: skip
    for name, cell in CELLS.items():
        keys = jax.random.split(jax.random.key(0), 3)
        letters = len(corpus.vocabulary)
        params = {
            "cell": cell.init(keys[0], EMBED), "embedding": jax.random.normal(keys[1], (letters, EMBED)),
            "readout": jax.random.normal(keys[2], (UNITS, letters)) / UNITS**0.5,
        }  # fmt: skip
        for stage in ("before", "after"):
            if stage == "after":
                params = train(cell, params, corpus, args.steps)
            for k, measured, one, other, draw in compare(cell, params, corpus.validation, args.batches):
                if measured >= WORTH:
                    worst = max(worst, one / measured, measured / one)
                ratios = [f"{x / measured:.2f}" if measured > ROUNDING else "" for x in (one, other)]
                numbers = [f"{measured:.2g}", f"{one:.2g}", ratios[0], f"{other:.2g}", ratios[1], f"{draw:.2f}"]
                row = [name, stage, str(k), *numbers]
                print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nLargest factor where the measured bias is at least {WORTH:g}: {worst:.2f}")
    return int(worst > 1.5)


if __name__ == "__main__":
    sys.exit(main())
