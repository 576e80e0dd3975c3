"""In a language model the gradient falls as e^(-0.5 t) in an RNN and as e^(-0.01 t) in an LSTM: does it?

Trains language models, by characters or by words, and measures on held-out text, at initialisation, after about one
pass over the text, and at the end,

  R(k) = ||dl_T/ds_{T-k}|| / ||dl_T/ds_T||,   l_T = -log p(x_{T+1} | x_1 ... x_T)

for one loss term at many positions, where s is h in the RNN, and the cell state c with h following it in the LSTM.  The
measurement is not truncated, and starts from a state that has seen text.  On the lags 5 to 40 and 40 to 100, an
exponential e^(-lambda k) and a power law (k + 1)^(-p) are fitted to the mean of ln R (the typical position) and to the
ln of the mean of R (dominated by few positions); the lower AIC decides between the two.  A claim holds if the
exponential is the better model and its rate lies within a quarter of the claimed one.  The default weights are
PyTorch's, U(-1/sqrt H, 1/sqrt H) with two biases; in the third network both forget biases are set to 1.  The control is
the gradient of the sum of all loss terms, to which every step adds.

  python examples/claim_language_model.py
  python examples/claim_language_model.py --text ptb.train.txt --words --steps 20000 --hidden 200 --out ptb
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import _claims
import _corpus
import _options
import _run
import gradient_retention as base
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rnncore import analysis
from rnncore import linen as nn

NETWORKS: dict[str, tuple[str, float | None]] = {
    "RNN": ("rnn", None), "LSTM": ("lstm", None), "LSTM, both forget biases 1": ("lstm", 2.0),
}  # fmt: skip
CLAIMED = {"rnn": 0.5, "lstm": 0.01}  # per step
WITHIN = 0.25
STAGES = ("at initialisation", "after one pass", "after training")
WINDOWS = ((5, 40), (40, 100))
LAGS, BURN_IN = 128, 50
AVERAGES = {"mean_log": "mean of ln R", "log_mean": "ln of mean R"}


def as_torch(params: Any, hidden: int, forget: float | None, seed: int) -> Any:
    """The parameters, with the cell's drawn as in PyTorch; rnncore holds the sum of PyTorch's two biases."""
    edge = hidden**-0.5
    cell, tree = jax.tree_util.tree_flatten_with_path(params["rnn"]["cell"])
    leaves = []
    for (path, leaf), key in zip(cell, jax.random.split(jax.random.key(seed), len(cell)), strict=True):
        parts = 2 if path[-1].key == "bias" else 1
        drawn = jax.random.uniform(key, (parts, *leaf.shape), leaf.dtype, -edge, edge).sum(0)
        leaves.append(drawn if forget is None or path[-2].key != "hf" or parts == 1 else jnp.full_like(leaf, forget))
    return {**params, "rnn": {**params["rnn"], "cell": jax.tree.unflatten(tree, leaves)}}


def measure(args: argparse.Namespace, model: Any, params: Any, text: np.ndarray) -> dict[str, Any]:
    """Held-out loss, curve, fits and control of a network with these parameters."""
    _, pieces = _corpus.spread(text, args.positions, BURN_IN + LAGS + 1)
    tokens, target = pieces[:, :-1], pieces[:, -1]
    xs = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding(t))
    cell, weights = nn.functional(base.CELLS[model.kind](model.hidden), params["rnn"]["cell"])
    run = analysis.trajectory(cell, weights, xs)
    slope = base.loss_adjoint(model, params, run.last.h, target)
    adjoint = jax.tree.map(jnp.zeros_like, run.last)._replace(h=slope)
    path = "cell" if model.kind == "lstm" else "state"
    curve = analysis.retention_curve(run, kind="adjoint", path=path, lags=range(1, LAGS + 1), adjoint=adjoint)
    fits: dict[str, Any] = {}
    for average in AVERAGES:
        for window in WINDOWS:
            try:
                fit = curve.fit("auto", window, average=average).to_dict()
            except ValueError as error:  # a retention of exactly 0 has no logarithm to fit
                fit = {"error": str(error)}
            fits[f"{average} {window[0]}-{window[1]}"] = fit
    loss = base.validate(model, params, text, args.batch)
    return {"loss_nats": loss, "curve": curve.to_dict(), "fits": fits, "control": control(model, params, pieces, xs)}


def control(model: Any, params: Any, pieces: np.ndarray, xs: jax.Array) -> float:
    """log10 of the gradient of the sum of all loss terms with respect to h, 100 steps back over 5 steps back."""
    cell, weights = nn.functional(base.CELLS[model.kind](model.hidden), params["rnn"]["cell"])

    def total(carry: Any, outputs: jax.Array) -> jax.Array:
        del carry
        logits = model.apply({"params": params}, outputs, method=lambda m, h: m.readout(h))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(pieces[:, 1:])).sum()

    states = analysis.gradients_over_time(total, cell, weights, xs).states
    norms = jnp.linalg.norm(states.h, axis=-1)
    return float(jnp.mean(jnp.log10(norms[:, -101] / norms[:, -6])))


def work(args: argparse.Namespace, corpus: _corpus.Corpus, results: dict[str, Any]) -> None:
    """One network after the other: measure, train for a pass, measure, train for the rest, measure."""
    per_pass = max(len(corpus.train) // (args.batch * args.length), 1)
    first = min(per_pass, args.steps)
    results["text"] = {**corpus.describe(), "unit": corpus.unit, "steps_of_a_pass": per_pass}
    results["training"] = {}
    rate = optax.cosine_decay_schedule(args.learning_rate, args.steps, alpha=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(args.clip), optax.adam(rate))
    for name, (kind, forget) in NETWORKS.items():
        model = base.LanguageModel(kind, len(corpus.vocabulary), args.embed, args.hidden)
        params = as_torch(base.initialise(model, args.seed), args.hidden, forget, args.seed)
        zero = base.zero_carry(model, args.batch)

        @jax.jit
        def step(state: Any, batch: Any, model: Any = model, zero: Any = zero) -> Any:
            (params, moments, carry), (window, fresh) = state, batch
            carry = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), zero, carry)
            differentiate = jax.value_and_grad(lambda p: base.window_loss(model, p, carry, window), has_aux=True)
            (_, (loss, carry)), gradient = differentiate(params)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments, carry), loss

        entry: dict[str, Any] = {"kind": kind, "stages": {}}
        entry["stages"][STAGES[0]] = measure(args, model, params, corpus.validation)
        results["runs"][name] = entry
        state, stream = (params, optimizer.init(params), zero), windows(corpus.train, args)
        for stage, count in ((STAGES[1], first), (STAGES[2], args.steps - first)):
            if not count:
                continue
            state = _run.train(results["training"], f"{name} {stage}", count, step, state, stream, lambda _: {}, count)
            entry["stages"][stage] = measure(args, model, state[0], corpus.validation)


def windows(text: np.ndarray, args: argparse.Namespace) -> Iterator[Any]:
    """Windows of the text in order, endlessly."""
    stream = _corpus.Windows(text, args.batch, args.length, args.seed)
    while True:
        yield next(stream)


def words(results: dict[str, Any]) -> str:
    """A table of the fits, and the verdicts."""
    rows = []
    for name, entry in results["runs"].items():
        for stage, found in entry["stages"].items():
            for key, fit in found["fits"].items():
                average, _, window = key.rpartition(" ")
                cells = ["", "", "", "", "exactly 0"]
                if "error" not in fit:
                    e, p = fit["exponential"], fit["power"]
                    cells = [f"{e['rate']:+.4f}", f"{e['r_squared']:.3f}", f"{p['rate']:+.2f}", f"{p['r_squared']:.3f}",
                             fit["model"]]  # fmt: skip
                rows.append([name, stage, AVERAGES[average], window, *cells])
    head = ["network", "when", "average", "lags", "rate/step", "R^2", "power p", "R^2", "better by AIC"]
    lines = [_claims.table(head, rows, left=3), ""]
    for name, entry in results["runs"].items():
        for stage, found in entry["stages"].items():
            last = found["curve"]["mean_log10"][99]
            lines.append(
                f"{name} {stage}: held-out loss {found['loss_nats']:.3f} nats; 100 steps back {_claims.exponent(last)} "
                f"of one loss term; of the sum of all terms {_claims.exponent(found['control'])} from lag 5 to 100"
            )
    return "\n".join([*lines, "", *(verdict(name, entry) for name, entry in results["runs"].items())])


def verdict(name: str, entry: dict[str, Any]) -> str:
    """The stages and windows at which the claim about a network holds."""
    claim, held, seen = CLAIMED[entry["kind"]], [], []
    for stage, found in entry["stages"].items():
        for key, fit in found["fits"].items():
            if "error" in fit:
                continue
            rate = fit["exponential"]["rate"]
            seen.append(rate)
            if fit["model"] == "exponential" and abs(rate - claim) <= WITHIN * claim:
                held.append(f"{stage}, lags {key.rpartition(' ')[2]}, {AVERAGES[key.rpartition(' ')[0]]}: {rate:.4f}")
    text = f'"{entry["kind"].upper()} e^(-{claim:g} t)", {name}: '
    if not seen:
        return text + "no fit was possible"
    text += f"holds in {len(held)} of {len(seen)} fits (rates from {min(seen):+.4f} to {max(seen):+.4f} per step)"
    return text + ("; " + "; ".join(held) if held else "")


def draw(results: dict[str, Any]) -> Any:
    """One panel for each network, with a curve for each stage and the claim as a line."""
    runs = results["runs"]
    figure, panels = _run.axes(len(runs), (max(9.0, 1.4 + 4.4 * len(runs)), 5.2))
    for axis, (name, entry) in zip(panels, runs.items(), strict=True):
        lags = np.arange(1, LAGS + 1)
        claim, low = CLAIMED[entry["kind"]], 0.0
        for window in WINDOWS:
            axis.axvspan(*window, color="#000000", alpha=0.04 if window is WINDOWS[0] else 0.08, linewidth=0)
        for n, (stage, found) in enumerate(entry["stages"].items()):
            for key, width, alpha in (("mean_log10", 2.0, 1.0), ("log10_of_mean", 1.0, 0.6)):
                values = np.array([-np.inf if v is None else v for v in found["curve"][key]], float)
                low = min(low, values[np.isfinite(values)].min(initial=0.0))
                axis.plot(lags, values, linewidth=width, alpha=alpha, **_run.STYLES[(0, 3, 1)[n]],
                          label=stage if key == "mean_log10" else None)  # fmt: skip
        line = -claim * lags / math.log(10)
        low = max(min(low, line[-1] if entry["kind"] == "rnn" else 0.0), -35.0)
        label = f"claim: $e^{{-{claim:g}t}}$"
        axis.plot(lags, line, color="#000000", linewidth=1.4, linestyle=(0, (1, 1.5)), label=label)
        _claims.powers_axis(axis, low, 0, every=5 if low < -12 else 2 if low < -4 else 1)
        axis.set_ylim(low - 0.03 * abs(low) - 0.2, 0.6)
        axis.set_xlim(0, LAGS)
        axis.set_title(name, loc="left", fontsize=11)
        axis.set_xlabel("lag k in steps")
        axis.legend(frameon=False, loc="lower left", handlelength=3.2, fontsize=9)
    panels[0].set_ylabel("share of the gradient of one loss term left")
    note = ", interrupted" if results["interrupted"] else ""
    figure.suptitle(
        f"How much of the gradient of one loss term survives: {results['text']['unit']} models with "
        f"{results['settings']['hidden']} units{note}\n"
        "held-out text; thick: mean of log, thin: log of mean; grey: windows of the fits",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="claim_language_model", steps=1500, batch=32, learning_rate=3e-3)
    add = parser.add_argument
    add("--hidden", type=_options.at_least(2), default=128, help="hidden units")
    add("--embed", type=_options.at_least(1), default=32, help="size of the embedding of characters or words")
    add("--length", type=_options.at_least(1), default=35, help="steps of backpropagation in training")
    add("--clip", type=_options.positive, default=0.25, help="largest global norm of a training gradient")
    add("--positions", type=_options.at_least(1), default=256, help="loss terms to measure")
    _options.text(parser)

    def load(args: argparse.Namespace) -> _corpus.Corpus:
        corpus = _corpus.load(args.text, args.words)
        _corpus.check_size(corpus, args.batch, args.length, BURN_IN + LAGS, "--batch or --length")
        return corpus

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
