"""A recurrent filter over rows of packed episodes, with `resets` where each episode begins.

A swinging mass is observed through noise.  Its state is s = (position, velocity),

  s' = A s + w,  w ~ N(0, Q),   z = position + v,  v ~ N(0, r),   s_1 ~ N(0, P) in every episode,

and only z is measured.  Episodes of 5 to 60 steps are packed end to end into rows of 240 steps, as in a
replay buffer.  A GRU learns to estimate position and velocity, once with `resets` at the first step of
every episode, and once without.  For such a system no filter has a smaller mean squared error than the
Kalman filter, which knows A, Q, r and P; the networks see only examples.

  python examples/filter_with_resets.py
  python examples/filter_with_resets.py --hidden 16 --steps 300
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np

from rnncore import linen as nn

SHORTEST, LONGEST = 5, 60  # steps of an episode
ROW = 240  # steps of a row
TEST_ROWS = 400
TEST_SEED = 12345  # the test set is the same for every --seed
# An oscillator with a period of 24 steps that loses 5 % of its amplitude per step and is pushed at random.
# Velocity is in units in which it has the same amplitude as the position.
TURN, KEEP = 2 * math.pi / 24, 0.95
A = KEEP * np.array([[math.cos(TURN), math.sin(TURN)], [-math.sin(TURN), math.cos(TURN)]])
Q = np.diag([0.0, 0.02])
R = 0.25
P = np.diag([4.0, 4.0])


class Rows(NamedTuple):
    """Packed episodes.

    Fields:
      z: float32 (B, T, 1), the measurements.
      states: float32 (B, T, 2), position and velocity.
      starts: bool (B, T), the first step of every episode.
    """

    z: np.ndarray
    states: np.ndarray
    starts: np.ndarray


class Filter(nn.Module):
    """Measurements (B, T, 1) to estimates (B, T, 2)."""

    hidden: int

    @nn.compact
    def __call__(self, z: jax.Array, starts: jax.Array | None) -> jax.Array:
        return nn.Dense(2)(nn.RNN(nn.GRUCell(self.hidden))(z, resets=starts))


def simulate(random: np.random.Generator, rows: int, steps: int = ROW) -> Rows:
    """Rows of episodes; the first begins with the row, and the last is cut off where the row ends."""
    starts = np.zeros((rows, steps), bool)
    for row in starts:
        at = 0
        while at < steps:
            row[at] = True
            at += int(random.integers(SHORTEST, LONGEST + 1))
    fresh = random.normal(size=(steps, rows, 2)) * np.sqrt(np.diag(P))
    push = random.normal(size=(steps, rows, 2)) * np.sqrt(np.diag(Q))
    states = np.empty((steps, rows, 2))
    for t in range(steps):
        # Every first step of a row is a start, so states[-1] is never used.
        states[t] = np.where(starts[:, t, None], fresh[t], states[t - 1] @ A.T + push[t])
    states = states.swapaxes(0, 1)
    z = states[..., :1] + math.sqrt(R) * random.normal(size=(rows, steps, 1))
    return Rows(z.astype(np.float32), states.astype(np.float32), starts)


def kalman(z: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact filter: estimates (B, T, 2) and the mean squared error (B, T) that it expects of itself."""
    rows, steps = starts.shape
    mean, cov = np.zeros((rows, 2)), np.tile(P, (rows, 1, 1))
    estimates, expected = np.empty((rows, steps, 2)), np.empty((rows, steps))
    for t in range(steps):
        begin = starts[:, t]
        mean = np.where(begin[:, None], 0.0, mean @ A.T)
        cov = np.where(begin[:, None, None], P, A @ cov @ A.T + Q)
        gain = cov[:, :, 0] / (cov[:, :1, 0] + R)
        mean = mean + gain * (z[:, t] - mean[:, :1])
        cov = cov - gain[:, :, None] * cov[:, :1, :]
        estimates[:, t], expected[:, t] = mean, np.trace(cov, axis1=1, axis2=2)
    return estimates, expected


def since_start(starts: np.ndarray) -> np.ndarray:
    """(B, T): the number of the step within its episode, from 1."""
    t = np.arange(starts.shape[1])
    return t - np.maximum.accumulate(np.where(starts, t, 0), axis=1) + 1


def by_age(errors: np.ndarray, ages: np.ndarray) -> list[float]:
    """Mean error of all first steps, of all second steps, and so on."""
    count = np.bincount(ages.ravel(), minlength=LONGEST + 1)[1:]
    return (np.bincount(ages.ravel(), errors.ravel(), LONGEST + 1)[1:] / np.maximum(count, 1)).tolist()


def squared_error(estimates: np.ndarray, rows: Rows) -> np.ndarray:
    """(B, T): squared error of position plus that of velocity."""
    return np.square(np.asarray(estimates, np.float64) - rows.states).sum(-1)


def batches(size: int, seed: int) -> Iterator[Rows]:
    """New episodes, endlessly."""
    random = np.random.default_rng(seed)
    while True:
        yield simulate(random, size)


def work(args: argparse.Namespace, test: Rows, results: dict[str, Any]) -> None:
    """Runs the Kalman filter, then trains the network with and without resets on the same episodes."""
    ages, runs = since_start(test.starts), results["runs"]
    estimates, expected = kalman(test.z, test.starts)
    errors = squared_error(estimates, test)
    results["kalman"] = {"error": float(errors.mean()), "expected": float(expected.mean()),
                         "by_age": by_age(errors, ages), "expected_by_age": by_age(expected, ages)}  # fmt: skip
    model, optimizer = Filter(args.hidden), _run.optimizer(args)
    start = model.init(jax.random.key(args.seed), test.z[:1], test.starts[:1])["params"]

    for name, told in (("with resets", True), ("without resets", False)):

        @jax.jit
        def estimate(params: Any, rows: Rows, told: bool = told) -> Any:
            return model.apply({"params": params}, rows.z, rows.starts if told else None)

        def loss(params: Any, rows: Rows, estimate: Any = estimate) -> Any:
            return jnp.square(estimate(params, rows) - rows.states).sum(-1).mean()

        def watch(state: Any, estimate: Any = estimate) -> dict[str, Any]:
            errors = squared_error(estimate(state[0], test), test)
            return {"error": float(errors.mean()), "by_age": by_age(errors, ages)}

        stream, every = batches(args.batch, args.seed + 1), max(args.steps // 10, 1)
        step = _run.stepper(optimizer, loss)
        _run.train(runs, name, args.steps, step, (start, optimizer.init(start)), stream, watch, every)


def words(results: dict[str, Any]) -> str:
    """Mean squared errors in a few lines."""
    optimum = results["kalman"]
    lines = [
        f"mean squared error of position plus velocity; with no measurement yet: {np.trace(P):.2f}",
        f"Kalman filter: {optimum['error']:.3f}, the least possible (it expects {optimum['expected']:.3f})",
    ]
    for name, run in results["runs"].items():
        error = run["error"][-1]
        lines.append(
            f"GRU {name}: {error:.3f}, {error / optimum['error']:.2f} times the Kalman filter's, after "
            f"{run['watched'][-1]} steps; on the first step of an episode {run['by_age'][-1][0]:.2f} against "
            f"{optimum['by_age'][0]:.2f}"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Mean squared error against the step of the episode."""
    figure, (axis,) = _run.axes(1, (8, 5))
    ages = np.arange(1, LONGEST + 1)
    for style, (name, run) in zip(_run.STYLES, results["runs"].items(), strict=False):
        axis.plot(ages, run["by_age"][-1], linewidth=1.8, **style, label=f"GRU {name}: {run['error'][-1]:.3f}")
    kalman = results["kalman"]
    axis.plot(ages, kalman["by_age"], linewidth=1.8, **_run.STYLES[2],
              label=f"Kalman filter, the optimum: {kalman['error']:.3f}")  # fmt: skip
    axis.set_yscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(0, LONGEST)
    axis.set_xlabel("steps since the start of the episode")
    axis.set_ylabel("mean squared error, position plus velocity (squared units)")
    axis.legend(frameon=False, title="mean over all steps")
    note = ", interrupted" if results["interrupted"] else ""
    axis.set_title(f"Filtering packed episodes: does the filter know where one begins?{note}", loc="left", fontsize=12)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="filter", steps=1000, batch=32, learning_rate=1e-2)
    parser.add_argument("--hidden", type=_options.at_least(1), default=32, help="hidden units")
    parser.add_argument("--test-rows", type=_options.at_least(1), default=TEST_ROWS, help="rows to measure on")

    def load(args: argparse.Namespace) -> Rows:
        return simulate(np.random.default_rng(TEST_SEED), args.test_rows)

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
