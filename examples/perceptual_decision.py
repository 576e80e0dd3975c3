"""A model of cortex that decides which of two noisy streams is stronger, and remembers the answer.

The task imitates random dots.  For 800 ms two inputs show the evidence for left and right, (1 - c) / 2 and (1 + c) / 2
with noise, where c is the coherence.  After a delay a cue goes off, and the network has to say which side was stronger.
The network follows what is known about cortex:

  tau dr/dt = -r + relu(W x + U r + b + noise),   tau 100 ms, Euler steps of 20 ms

with Dale's law (four of five units excite, the rest inhibit, and no unit connects to itself), rates and input weights
that are not negative, independent noise in every unit, and a readout of the excitatory units.  After training, the
example measures what an experiment would: the share of choices by coherence, compared with an observer who adds up all
evidence without loss.  It also measures what only a model can tell: exactly how much each moment of evidence counts,
and between which states the network decides.

  python examples/perceptual_decision.py
  python examples/perceptual_decision.py --hidden 50 --noise 0.3

Task and network: Song, Yang and Wang (2016), doi:10.1371/journal.pcbi.1004792; the experiment: Roitman and Shadlen
(2002), doi:10.1523/JNEUROSCI.22-21-09475.2002.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore import analysis

DT, TAU = 20.0, 100.0  # ms
FIXATION, STIMULUS, DELAY, CHOICE = 10, 40, 15, 10  # steps of a trial
STEPS = FIXATION + STIMULUS + DELAY + CHOICE
COHERENCES = (0.032, 0.064, 0.128, 0.256, 0.512)
EVIDENCE_NOISE = 0.3  # standard deviation of each stream at each step
MOST_FIXED_POINTS = 8  # that are printed one by one


class Trials(NamedTuple):
    """B trials.

    Fields:
      xs: float32 (B, STEPS, 3): evidence for left, for right, and the cue, which is 1 until the network has to choose.
      right: int (B,), 1 where right is the answer.
      seed: of the noise in the network.
    """

    xs: np.ndarray
    right: np.ndarray
    seed: int


def trials(random: np.random.Generator, coherence: np.ndarray) -> Trials:
    """One trial for each signed coherence (B,), positive for right; at coherence 0 the answer is a coin flip."""
    xs = np.zeros((len(coherence), STEPS, 3))
    stimulus = slice(FIXATION, FIXATION + STIMULUS)
    mean = np.stack([1 - coherence, 1 + coherence], -1) / 2
    xs[:, stimulus, :2] = mean[:, None] + EVIDENCE_NOISE * random.normal(size=(len(coherence), STIMULUS, 2))
    xs[:, : STEPS - CHOICE, 2] = 1
    right = np.where(coherence == 0, random.integers(0, 2, len(coherence)), coherence > 0)
    return Trials(xs.astype(np.float32), right.astype(int), int(random.integers(2**31)))


def signed() -> np.ndarray:
    """The coherences on both sides, from left to right."""
    return np.concatenate([-np.array(COHERENCES[::-1]), [0.0], COHERENCES])


def batches(size: int, seed: int) -> Iterator[Trials]:
    """New trials, endlessly; all coherences are equally likely."""
    random = np.random.default_rng(seed)
    while True:
        yield trials(random, random.choice(signed(), size))


# ---------------------------------------------------------------------------------------- the network


def balanced(signs: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Weights (H, 1, H): excitation and inhibition cancel on average, and deviations have a spectral radius near 1."""
    sign = np.array(signs)
    size = np.where(sign > 0, 1.0, (sign > 0).sum() / max((sign < 0).sum(), 1))
    scale = size / math.sqrt((1 - 2 / math.pi) * (size**2).sum())

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)[:, None, None]

    return init


def cortex(hidden: int) -> rnncore.Leaky:
    """Four excitatory units for each inhibitory one; every unit is connected to all others but not to itself."""
    excitatory = round(0.8 * hidden)
    signs = (1,) * excitatory + (-1,) * (hidden - excitatory)
    connections = rnncore.Dale(signs, rnncore.Sparse.of(~np.eye(hidden, dtype=bool)))
    return rnncore.Leaky(
        hidden, dt=DT, tau=TAU, activation_fn=jax.nn.relu, recurrence=connections, recurrent_init=balanced(signs)
    )


class Weights(NamedTuple):
    """Parameters of the cell, and the readout (E, 2) of the excitatory units: left and right."""

    cell: rnncore.CellParams
    readout: jax.Array


def positive_inputs(params: rnncore.CellParams) -> rnncore.CellParams:
    """The parameters that the network runs with: long-range inputs excite."""
    return params._replace(input_kernel=jnp.abs(params.input_kernel))


def choices(weights: Weights, rates: jax.Array) -> jax.Array:
    """Log odds of right over left, from the rates (..., H)."""
    excitatory, _ = weights.readout.shape
    left, right = jnp.moveaxis(rates[..., :excitatory] @ weights.readout, -1, 0)
    return right - left


def rates(cell: rnncore.Leaky, weights: Weights, xs: Any, seed: Any, noise: float) -> jax.Array:
    """(B, STEPS, H), with the noise drawn from the seed."""
    params, xs = cell.with_noise(jax.random.key(seed), positive_inputs(weights.cell), jnp.asarray(xs), noise)
    return rnncore.unroll(cell, params, xs)[1]


def loss(cell: rnncore.Leaky, weights: Weights, batch: Trials, noise: float, cost: float) -> jax.Array:
    """Cross-entropy of the choice over its steps, plus a cost on the mean squared rate."""
    r = rates(cell, weights, batch.xs, batch.seed, noise)
    odds = choices(weights, r[:, -CHOICE:])
    return jnp.mean(jax.nn.softplus(jnp.where(batch.right[:, None] > 0, -odds, odds))) + cost * jnp.mean(r**2)


# ---------------------------------------------------------------------------------------- measurement


def ideal(coherence: Any) -> Any:
    """How often an observer who adds up all evidence chooses right: the sum of differences is normal."""
    return np.asarray(jax.scipy.special.ndtr(jnp.asarray(coherence) * math.sqrt(STIMULUS / 2) / EVIDENCE_NOISE))


def threshold(right: np.ndarray) -> float:
    """The coherence at which an observer with this sensitivity k and no bias is right in 84 of 100 trials: 1 / k.

    P(right) = Phi(k (c - b)), with k and b by maximum likelihood over a fine grid, from the share of choices to the
    right by coherence; 1 if that share is always the same.
    """
    if np.ptp(right) == 0:
        return 1.0
    k, b = np.geomspace(1, 1000, 1501)[:, None, None], np.linspace(-0.3, 0.3, 61)[:, None]
    p = np.clip(np.asarray(jax.scipy.special.ndtr(k * (signed() - b))), 1e-6, 1 - 1e-6)
    likelihood = (right * np.log(p) + (1 - right) * np.log1p(-p)).sum(-1).max(1)
    return 1 / float(k[likelihood.argmax()].item())


def weight_of_evidence(cell: rnncore.Leaky, weights: Weights, batch: Trials, noise: float) -> tuple[Any, Any]:
    """For trials with noise, in float64: how much each step counts for the choice, and how its gradient is retained.

    Returns:
      (d log odds / d (right - left), the mean at every step of the stimulus;
      |d log odds / d rates_{T-k}| / |d log odds / d rates_T|, the geometric mean for every lag k).
    """
    with jax.enable_x64(True):
        odds, retention = gradients(cell, in_float64(weights), jnp.asarray(batch.xs, jnp.float64), batch.seed, noise)
        counts = (odds[..., 1] - odds[..., 0]).mean(0)[FIXATION : FIXATION + STIMULUS] / 2
        return counts.tolist(), np.exp(np.asarray(retention).mean(0)).tolist()


@functools.partial(jax.jit, static_argnums=0)
def gradients(cell: rnncore.Leaky, weights: Weights, xs: jax.Array, seed: Any, noise: float) -> Any:
    """(d log odds at the end / d inputs and noise (B, STEPS, 3 + H), its log retention (B, STEPS + 1))."""
    params, noisy = cell.with_noise(jax.random.key(seed), positive_inputs(weights.cell), xs, noise)
    run = analysis.trajectory(cell, params, noisy)
    odds = jax.grad(lambda xs: choices(weights, rnncore.unroll(cell, params, xs)[1][:, -1]).sum())(noisy)
    last = jax.grad(lambda carry: choices(weights, carry.h).sum())(run.last)
    return odds, analysis.retention_curve(run, kind="adjoint", adjoint=last).log_retention


def in_float64(weights: Weights) -> Weights:
    """The weights in float64, so that rounding does not affect what is measured."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), weights)


def fixed_points(cell: rnncore.Leaky, weights: Weights, r: np.ndarray, x: Sequence[float]) -> list[dict[str, Any]]:
    """The fixed points under a constant input, searched from rates (N, H): their log odds and slowest directions."""
    with jax.enable_x64(True):
        wide = in_float64(weights)
        found = analysis.fixed_points(cell, positive_inputs(wide.cell), jnp.asarray(x, jnp.float64), r.astype(float))
        odds = choices(wide, jnp.asarray(found.states))
    rows = zip(odds, found.unstable_directions, found.time_constants, strict=True)
    return [{"log_odds": float(o), "unstable": int(n), "slowest_ms": float(np.abs(t).max() * DT)} for o, n, t in rows]


def work(args: argparse.Namespace, _: None, results: dict[str, Any]) -> None:
    """Trains the network, tests its decisions, and analyses it."""
    cell, optimizer = cortex(args.hidden), _run.optimizer(args)
    keys = jax.random.split(jax.random.key(args.seed))
    excitatory = round(0.8 * args.hidden)
    readout = jax.random.normal(keys[1], (excitatory, 2)) / excitatory**0.5
    weights = Weights(cell.init(keys[0], 3), readout)
    coherence = np.repeat(signed(), args.test_trials)
    test = trials(np.random.default_rng(12345), coherence)
    undecided = trials(np.random.default_rng(123), np.zeros(64))
    run = jax.jit(lambda weights, xs, seed: rates(cell, weights, xs, seed, args.noise))

    def watch(state: Any) -> dict[str, Any]:
        r = run(state[0], test.xs, test.seed)
        odds = np.asarray(choices(state[0], r))
        right = (odds[:, -CHOICE:].mean(-1) > 0).reshape(-1, args.test_trials).mean(-1)
        counts, kept = weight_of_evidence(cell, state[0], undecided, args.noise)
        return {
            "right": right.tolist(),
            "threshold": threshold(right),
            "log_odds": odds.reshape(-1, args.test_trials, STEPS).mean(1).tolist(),
            "rate": float(r.mean()),
            "counts": counts,
            "kept": kept,
        }

    step = _run.stepper(optimizer, lambda weights, batch: loss(cell, weights, batch, args.noise, args.cost))
    stream, every = batches(args.batch, args.seed + 1), max(args.steps // 5, 1)
    state = (weights, optimizer.init(weights))
    weights, _ = _run.train(results["runs"], "cortex", args.steps, step, state, stream, watch, every)
    seen = np.asarray(run(weights, test.xs, test.seed))[:: max(len(test.xs) // 64, 1)]
    starts = seen[:, FIXATION:-CHOICE:8].reshape(-1, args.hidden)
    results["fixed_points"] = {
        "in the delay": fixed_points(cell, weights, starts, (0, 0, 1)),
        "while evidence of no coherence comes in": fixed_points(cell, weights, starts, (0.5, 0.5, 1)),
    }


def words(results: dict[str, Any]) -> str:
    """How well the network decides, which evidence counts, and between which states it decides."""
    run = results["runs"]["cortex"]
    least = 1 / (math.sqrt(STIMULUS / 2) / EVIDENCE_NOISE)
    counts, kept = np.array(run["counts"][-1]), run["kept"][-1]
    lines = [
        f"after {run['watched'][-1]} steps of training, 84 % of choices are correct from a coherence of "
        f"{run['threshold'][-1]:.1%} on, {run['threshold'][-1] / least:.2f} times the threshold of an observer who "
        f"adds up all evidence, {least:.1%}; mean rate {run['rate'][-1]:.3f}",
        f"share of choices to the right, from coherence {signed()[0]:.0%} to {signed()[-1]:.0%}: "
        + " ".join(f"{p:.2f}" for p in run["right"][-1]),
        "weight of the evidence's first, second, third and last quarter: "
        + ", ".join(f"{p:.0%}" for p in (counts / np.abs(counts).sum()).reshape(4, -1).sum(-1)),
        f"of the gradient of the choice {kept[STEPS - FIXATION]:.2g} reaches the onset of the evidence, "
        f"{(STEPS - FIXATION) * DT:.0f} ms back ({run['kept'][0][STEPS - FIXATION]:.2g} before training; a unit that "
        f"only leaks keeps {(1 - DT / TAU) ** (STEPS - FIXATION):.0e})",
    ]
    for when, points in results.get("fixed_points", {}).items():
        stable = sum(point["unstable"] == 0 for point in points)
        lines.append(f"fixed points {when}: {stable} stable, {len(points) - stable} saddles")
        for point in points[:MOST_FIXED_POINTS]:
            kind = f"saddle with {point['unstable']} unstable directions" if point["unstable"] else "stable"
            slowest = f"the slowest direction changes by e in {point['slowest_ms']:.0f} ms"
            lines.append(f"  {kind}, log odds of right {point['log_odds']:+.1f}, {slowest}")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Choices by coherence, the decision over time, and the weight of evidence over time."""
    run, coherence = results["runs"]["cortex"], 100 * signed()
    figure, (choice, course, weight) = _run.axes(3, (15, 4.6))
    fine = np.linspace(coherence[0], coherence[-1], 201)
    choice.plot(fine, ideal(fine / 100), linewidth=1.2, **_run.STYLES[2], label="adds up all evidence")
    stages = [
        (style, which) for style, which in zip(_run.STYLES[1::-1], (1, -1), strict=False) if which < len(run["right"])
    ]
    for style, which in stages:
        label = f"after {run['watched'][which]} steps: threshold {run['threshold'][which]:.1%}"
        choice.plot(coherence, run["right"][which], marker="o", markersize=4, linewidth=1.6, **style, label=label)
    choice.set(xlabel="coherence, %; right is positive", ylabel="share of choices to the right", ylim=(-0.03, 1.03))
    choice.legend(frameon=False, loc="lower right", fontsize=8.5)
    choice.set_title("Psychometric curve", loc="left", fontsize=11)

    ms = (np.arange(STEPS) - FIXATION + 1) * DT
    for value, odds in zip(coherence, run["log_odds"][-1], strict=True):
        shade = 0.25 + 0.75 * abs(value) / coherence[-1]
        colour = "#000000" if value == 0 else "#0072B2" if value > 0 else "#D55E00"
        course.plot(ms, odds, color=colour, alpha=shade, linewidth=1.6)
    for begin in (0, STIMULUS, STIMULUS + DELAY):
        course.axvline(begin * DT, color="#777777", linewidth=0.8, linestyle=(0, (1, 2)))
    course.set(xlabel="ms since the onset of the evidence", ylabel="mean log odds of right over left")
    course.set_title("Decision by coherence: evidence, delay, choice", loc="left", fontsize=11)

    for style, which in stages:
        counts = np.array(run["counts"][which])
        label = f"after {run['watched'][which]} steps"
        weight.plot(np.arange(1, STIMULUS + 1) * DT, counts / np.abs(counts).sum(), linewidth=1.8, **style, label=label)
    weight.axhline(1 / STIMULUS, linewidth=1.2, **_run.STYLES[2], label="adds up all evidence")
    weight.set_ylim(bottom=min(weight.get_ylim()[0], 0))
    weight.set(xlabel="ms since the onset of the evidence", ylabel="share of the gradient of the choice")
    weight.legend(frameon=False, fontsize=8.5)
    weight.set_title("What each moment of evidence counts", loc="left", fontsize=11)
    settings, note = results["settings"], ", interrupted" if results["interrupted"] else ""
    taken = f"{run['watched'][-1]} steps of training{note}"
    title = f"A perceptual decision: {settings['hidden']} units under Dale's law, {taken}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="perceptual_decision", steps=1500, batch=64, learning_rate=5e-3)
    parser.add_argument("--hidden", type=_options.at_least(5), default=100, help="units, a fifth of them inhibitory")
    parser.add_argument("--noise", type=_options.positive, default=0.1, help="standard deviation of a leaking unit")
    parser.add_argument(
        "--cost", type=_options.positive, default=0.01, help="weight of the mean squared rate in the loss"
    )
    parser.add_argument("--test-trials", type=_options.at_least(1), default=200, help="trials for each coherence")
    return _run.main(parser, argv, lambda args: None, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
