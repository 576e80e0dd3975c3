"""How much of the gradient of one loss term survives 1 to 100 steps back?

Trains a vanilla RNN and an LSTM as language models on real text, by characters or by words, and measures on
held-out text, at initialisation and after training,

  R(k) = ||dl_T/ds_{T-k}|| / ||dl_T/ds_T||,   l_T = -log p(x_{T+1} | x_1 ... x_T)

for the whole state s, which is (c, h) in the LSTM, and for the LSTM's cell state c, with h = o tanh(c)
following it.  It takes one loss term, because every step adds to the gradient of a sum over time, which
therefore cannot decay.  The measurement is exact: the actual dl_T/ds_T is pulled back through the Jacobian
of every step.  The curves are means of log R over positions.  For comparison there are two more curves:
the direct path, which is the product of forget gates that is often taken for R, and the bound, which is
the product of bounds on the single steps.

Training is truncated backpropagation: windows of --length steps in text order, each starting from the
last state of the window before, with no gradient across the boundary.  Clipping scales the whole gradient
by one number, so it changes what the network learns, but not how R is measured.

  python examples/gradient_retention.py
  python examples/gradient_retention.py --cell lstm --forget-bias 1 --text ptb.train.txt --words --out ptb
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _corpus
import _options
import _picture
import _report
import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from tqdm import tqdm

import rnncore
from rnncore import analysis
from rnncore import linen as nn

CELLS: dict[str, Any] = {"rnn": nn.SimpleCell, "lstm": nn.OptimizedLSTMCell}
CURVES: dict[str, dict[str, tuple[str, str]]] = {
    "rnn": {"state": ("state", "adjoint"), "bound": ("state", "bound"), "weight bound": ("state", "a_priori_bound")},
    "lstm": {
        "state": ("state", "adjoint"), "cell": ("cell", "adjoint"), "direct": ("direct", "adjoint"),
        "bound": ("state", "bound"),
    },
}  # fmt: skip
BOUND_POSITIONS = 4  # the norms of whole Jacobians are expensive, and hardly differ between positions
LOGITS = 2**24  # how many logits of the held-out text to hold at a time
SHOW_OVER = 20  # roughly how many windows the loss in the progress bar is averaged over


class LanguageModel(nn.Module):
    """Embedding, recurrent layer, readout: tokens (B, T) to (last carry, logits (B, T, vocabulary), gates)."""

    kind: str
    vocabulary: int
    embed: int
    hidden: int

    def setup(self) -> None:
        self.embedding = nn.Embed(self.vocabulary, self.embed)
        self.rnn = nn.RNN(CELLS[self.kind](self.hidden), return_carry=True)
        self.readout = nn.Dense(self.vocabulary)

    def __call__(self, tokens: jax.Array, carry: Any = None, gates: bool = False) -> tuple[Any, jax.Array, Any]:
        carry, hidden, *rest = self.rnn(self.embedding(tokens), initial_carry=carry, return_states=gates)
        return carry, self.readout(hidden), rest[0].gates if gates else None


def initialise(model: LanguageModel, seed: int, forget_bias: float = 0.0) -> Any:
    """The parameters at initialisation: Flax's own, plus the forget bias of an LSTM."""
    params = jax.jit(LanguageModel.init, static_argnums=0)(model, jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    params = params["params"]
    if model.kind == "lstm":
        forget = params["rnn"]["cell"]["hf"]
        forget["bias"] = forget["bias"] + jnp.asarray(forget_bias, forget["bias"].dtype)
    return params


def zero_carry(model: LanguageModel, batch: int) -> Any:
    """The carry before any text."""
    return CELLS[model.kind](model.hidden).initialize_carry(jax.random.key(0), (batch, model.embed))


def window_loss(
    model: LanguageModel, params: Any, carry: Any, window: jax.Array, sparse_output: float = 0.0
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """(the loss of a window (B, T + 1), (its nats per token, last carry))."""
    sparse = sparse_output > 0 and model.kind == "lstm"
    found: Any = model.apply({"params": params}, window[:, :-1], carry, gates=sparse)
    carry, logits, gates = found
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()
    return nats + (sparse_output * analysis.gate_sparsity(gates) if sparse else 0.0), (nats, carry)


# -------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace, model: LanguageModel, params: Any, text: np.ndarray, record: dict) -> Any:
    """The parameters after `args.steps` windows; `record` is always up to date."""
    rate = optax.cosine_decay_schedule(args.learning_rate, max(args.steps, 1), alpha=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(args.clip), optax.adam(rate))

    @jax.jit
    def step(params: Any, moments: Any, carry: Any, window: jax.Array) -> Any:
        differentiate = jax.value_and_grad(functools.partial(window_loss, model), has_aux=True)
        (_, (loss, carry)), gradient = differentiate(params, carry, window, sparse_output=args.sparse_output)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, carry, loss

    record.update(steps=0, seconds=0.0, tokens_per_second=None, loss_nats=[])
    windows = _corpus.Windows(text, args.batch, args.length, args.seed)
    size, start, shown = args.batch * args.length, zero_carry(model, args.batch), None
    moments, carry, begin = optimizer.init(params), start, time.perf_counter()
    name = f"train {_report.NETWORKS[model.kind]}"
    with tqdm(total=args.steps * size, desc=name, unit="token", unit_scale=True, dynamic_ncols=True) as bar:
        for number in range(1, args.steps + 1):
            window, fresh = next(windows)
            params, moments, carry, value = step(params, moments, start if fresh else carry, window)
            loss, seconds = float(value), time.perf_counter() - begin
            if not math.isfinite(loss):
                raise FloatingPointError(f"training diverged at step {number}; try a smaller --learning-rate")
            record["loss_nats"].append(loss)
            record.update(steps=number, seconds=seconds, tokens_per_second=number * size / seconds)
            shown = loss if shown is None else shown + (loss - shown) / SHOW_OVER
            bar.set_postfix_str(f"loss {shown:.3f} nats", refresh=False)
            bar.update(size)
    return params


# ----------------------------------------------------------------------------------- measurement


def validate(model: LanguageModel, params: Any, text: np.ndarray, batch: int) -> float:
    """Nats per token over a whole text, in `batch` streams from a zero carry."""
    tokens, carry, total = _corpus.streams(text, batch), zero_carry(model, batch), 0.0
    size = max(LOGITS // (batch * model.vocabulary), 1)
    for start in range(0, tokens.shape[1] - 1, size):
        window = tokens[:, start : start + size + 1]
        _, (nats, carry) = jax.jit(window_loss, static_argnums=0)(model, params, carry, window)
        total += float(nats) * (window.shape[1] - 1)
    return total / (tokens.shape[1] - 1)


@functools.partial(jax.jit, static_argnums=0)
def loss_adjoint(model: LanguageModel, params: Any, hidden: jax.Array, target: jax.Array) -> jax.Array:
    """dl_T/dh_T (B, H) of every position's own loss term, which depends on the state only through h_T."""

    def total(hidden: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, hidden, method=lambda m, h: m.readout(h))
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).sum()

    return jax.grad(total)(hidden)


def measure(args: argparse.Namespace, model: LanguageModel, params: Any, text: np.ndarray) -> dict[str, Any]:
    """Validation loss and all curves of a network with these parameters."""
    _, pieces = _corpus.spread(text, args.positions, args.burn_in + args.lags + 1)
    tokens, target = pieces[:, :-1], pieces[:, -1]
    xs = model.apply({"params": params}, tokens, method=lambda m, t: m.embedding(t))
    cell, weights = nn.functional(CELLS[model.kind](model.hidden), params["rnn"]["cell"])
    run = analysis.trajectory(cell, weights, xs)
    slope = loss_adjoint(model, params, run.last.h, target)
    # A token predicted with certainty has a gradient of exactly 0, so its retention is 0 / 0.
    kept = np.flatnonzero(np.asarray(jnp.abs(slope).max(-1) > 0))
    if not len(kept):
        raise FloatingPointError("the gradient of every loss term is exactly 0; there is no retention to measure")
    if len(kept) < args.positions:
        xs, slope = xs[kept], slope[kept]
        run = analysis.trajectory(cell, weights, xs)
    adjoint = jax.tree.map(jnp.zeros_like, run.last)._replace(h=slope)
    few = analysis.trajectory(cell, weights, xs[:: math.ceil(len(kept) / BOUND_POSITIONS)])
    lags = range(1, args.lags + 1)

    curves = {}
    for name, (path, kind) in CURVES[model.kind].items():
        if kind == "adjoint":
            curve = analysis.retention_curve(run, kind=kind, path=path, lags=lags, adjoint=adjoint)
        else:
            curve = analysis.retention_curve(few, kind=kind, path=path, lags=lags)
        low, high = np.percentile(np.asarray(curve.log10), (10, 90), axis=0, method="nearest")
        curves[name] = {**curve.to_dict(), "low_log10": low.tolist(), "high_log10": high.tolist()}
    loss = validate(model, params, text, args.batch)
    return {"validation_loss_nats": loss, "validation_loss_bits": loss / math.log(2), "curves": curves}


# ------------------------------------------------------------------------------------ the whole job


def describe(args: argparse.Namespace, corpus: _corpus.Corpus) -> dict[str, Any]:
    """The results before anything is measured."""
    packages = (jax, jaxlib, flax, optax, np, rnncore)
    return {
        "about": _report.ABOUT,
        "interrupted": False,
        "elapsed_seconds": 0.0,
        "settings": vars(args),
        "versions": {"python": platform.python_version(), **{p.__name__: p.__version__ for p in packages}},
        "device": f"{jax.devices()[0].platform}, {os.cpu_count()} CPU cores",
        "text": corpus.describe(),
        "networks": {},
    }  # fmt: skip


def run_all(
    args: argparse.Namespace, corpus: _corpus.Corpus, results: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measures, trains and measures again; `results` is always up to date, and `save` is called at every stage."""
    networks, held_out = results["networks"], corpus.validation
    models, params = {}, {}
    for kind in CELLS if args.cell == "both" else (args.cell,):
        models[kind] = LanguageModel(kind, len(corpus.vocabulary), args.embed, args.hidden)
        params[kind] = initialise(models[kind], args.seed, args.forget_bias)
        entry = {"cell": CELLS[kind].__name__, "parameters": sum(a.size for a in jax.tree.leaves(params[kind]))}
        entry["initialisation"] = measure(args, models[kind], params[kind], held_out)
        networks[kind] = entry
        save()
    for kind, model in models.items():
        record: dict[str, Any] = {}
        networks[kind]["training"] = record
        trained = train(args, model, params[kind], corpus.train, record)
        networks[kind]["trained"] = measure(args, model, trained, held_out)
        save()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code: 0, 1 if the training diverged, or 130 after Ctrl-C."""
    begin, command = time.perf_counter(), _options.parser(__doc__ or "", tuple(CELLS))
    args = command.parse_args(argv)
    data, picture = Path(f"{args.out}.json"), Path(f"{args.out}.png")
    try:
        corpus = _corpus.load(args.text, args.words)
        _corpus.check_size(corpus, args.batch, args.length, args.burn_in + args.lags)
        data.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        command.error(str(error))
    results = describe(args, corpus)

    def save() -> None:
        results["elapsed_seconds"] = time.perf_counter() - begin
        _report.save(results, data)

    def finish() -> None:
        measured = bool(_report.stages(results))
        if measured:
            save()
        print(_report.text(results))
        if measured:
            _picture.draw(results, picture)
            print(f"\nwrote {data} and {picture} after {results['elapsed_seconds']:.0f} s")

    try:
        print(_report.opening(results))
        run_all(args, corpus, results, save)
        finish()
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("\ninterrupted; writing what was measured so far")
        finish()
        return 130
    except FloatingPointError as error:
        finish()
        print(f"{command.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
