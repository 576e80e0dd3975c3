"""d c_T / d c_k of an LSTM: the product of forget gates, the product of four-term sums, or neither?

Three matrices are called the gradient through the cell state over many steps:

  direct          F_T ... F_{k+1},   F_t = diag(f_t), with every h held fixed
  four terms      A_T ... A_{k+1},   A_t = d c_t / d c_{t-1} with h_{t-1} = o_{t-1} tanh(c_{t-1}): through the forget
                  gate itself, and through h_{t-1} into the forget gate, the input gate and the candidate
  exact           [I 0] J_T ... J_{k+1} [I; Delta_k],   J_t the Jacobian of the whole state (c, h)

A_t is exact for one step, but a product of them is not: c_k also reaches c_{k+2} through h_k, the output gate o_{k+1}
and h_{k+1}, without passing through c_{k+1}; over two steps K_{k+2} G_{k+1} Delta_k is missing.  This example measures
all three at initialisation and after training on the adding problem (two marked numbers among noise, whose sum is
asked for at the end), and lets finite differences decide: it moves c_k along random directions, and h_k with it at a
fixed o_k, and runs the network on from there.

  python examples/claim_four_terms.py
  python examples/claim_four_terms.py --hidden 64 --lags 100 --steps 2000
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import _claims
import _options
import _run
import jax
import jax.numpy as jnp
import numpy as np

import rnncore
from rnncore import analysis

STAGES = ("at initialisation", "after training")
PRODUCTS = {"direct": "product of forget gates", "one_step_total": "product of four-term sums", "state": "exact"}
STEP = 1e-5  # of the central differences; their error is about its square
SEQUENCES = 4
DIRECTIONS = 8
CHOICES = ((0.1, 0.7, 0.1, 0.1), (0.0, 0.7, 0.0, 0.0))  # A, B, C, D


def chosen(a: float, b: float, c: float, d: float, lags: int) -> np.ndarray:
    """log10 of d c_T / d c_(T-k), k = 0 .. lags, if the four terms of every step are the given numbers."""
    cell, params, carry = with_terms(a, b, c, d)
    run = analysis.trajectory(cell, params, jnp.zeros((lags + 1, 1), _claims.FLOAT), carry)
    return np.asarray(analysis.retention_curve(run, path="cell", lags=lags).log10)


def with_terms(a: float, b: float, c: float, d: float) -> tuple[rnncore.LSTM, Any, Any]:
    """(cell, parameters, carry) of one unit at rest: A through h into the forget gate, B = f, C into i, D into g.

    The unit stays at c = 1/2 with i = o = 1/2 and g = 1 - b.  U_o = 0, so nothing bypasses c through the output gate,
    and the product of the sums is the derivative.
    """
    values = {"i": 0.5, "f": b, "g": 1 - b, "o": 0.5}
    h = 0.5 * math.tanh(0.5)
    slope = 0.5 * (1 - math.tanh(0.5) ** 2)
    kernel = {"f": a / (0.5 * b * (1 - b)), "i": c / ((1 - b) * 0.25), "g": d / (0.5 * (1 - (1 - b) ** 2)), "o": 0.0}
    cell, u = rnncore.LSTM(1), {gate: value / slope for gate, value in kernel.items()}
    before = {gate: math.atanh(v) if gate == "g" else math.log(v / (1 - v)) for gate, v in values.items()}
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 1, _claims.FLOAT))._replace(
        recurrent_kernel=jnp.array([[[u[gate]] for gate in cell.gates]], _claims.FLOAT),
        bias=jnp.array([[before[gate] - u[gate] * h] for gate in cell.gates], _claims.FLOAT),
    )
    return cell, params, rnncore.LSTMCarry(c=jnp.full(1, 0.5, _claims.FLOAT), h=jnp.full(1, h, _claims.FLOAT))


class Batch(NamedTuple):
    """Adding problem: xs (B, T, 2), numbers from 0 to 1 and marks; targets (B,), the sum of the two marked numbers."""

    xs: np.ndarray
    targets: np.ndarray


def draw_batch(random: np.random.Generator, count: int, steps: int) -> Batch:
    """One mark in each half."""
    values, marks, rows = random.uniform(size=(count, steps)), np.zeros((count, steps)), np.arange(count)
    marks[rows, random.integers(steps // 2, size=count)] = 1
    marks[rows, random.integers(steps // 2, steps, size=count)] = 1
    return Batch(np.stack([values, marks], -1), (values * marks).sum(-1))


def batches(count: int, steps: int, seed: int) -> Iterator[Batch]:
    """New sequences, endlessly."""
    random = np.random.default_rng(seed)
    while True:
        yield draw_batch(random, count, steps)


def measure(cell: rnncore.LSTM, params: Any, xs: np.ndarray, lags: int) -> dict[str, Any]:
    """Retention of every product by lag, its error against the exact one, and its error against finite differences."""
    run = analysis.trajectory(cell, params, jnp.asarray(xs))
    products = analysis.cell_products(run)
    exact = products.state
    found: dict[str, Any] = {"lags": list(range(1, lags + 1))}
    for name, product in products._asdict().items():
        logs = product.log_frobenius_norm() - 0.5 * math.log(cell.hidden_size)
        found[name] = mean_log10(logs[:, 1 : lags + 1])
        if name != "state":
            # Scale both as the exact product, so that nothing underflows.
            shift = jnp.exp(product.log_scale - exact.log_scale)[..., None, None]
            gap = analysis.ScaledMatrix(product.matrix * shift - exact.matrix, exact.log_scale)
            relative = gap.log_frobenius_norm() - exact.log_frobenius_norm()
            found[f"{name}_error"] = np.median(np.exp(relative[:, 1 : lags + 1]), 0).tolist()
    state = analysis.retention_curve(run, kind="rms", path="state", lags=range(1, lags + 1))
    found["whole_state"] = mean_log10(state.log_retention)
    found["residual"] = residual(run)
    found["differences"] = {str(lag): differences(run, products, lag) for lag in {1, 2, min(10, lags)}}
    return found


def mean_log10(logs: Any) -> list[float]:
    """Mean over the sequences of ln (B, L), as log10."""
    return (np.asarray(logs).mean(0) / math.log(10)).tolist()


def residual(run: analysis.Trajectory) -> dict[str, float]:
    """||K G Delta||_F over the norm of the exact derivative over the same two steps, over all steps and sequences."""
    missing = analysis.two_step_residual(run)
    totals = analysis.lstm_paths(run).one_step_total()
    exact = totals[:, 1:] @ totals[:, :-1] + missing
    shares = np.asarray(jnp.linalg.norm(missing, axis=(-2, -1)) / jnp.linalg.norm(exact, axis=(-2, -1)))
    low, middle, high = np.percentile(shares, (10, 50, 90))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def differences(run: analysis.Trajectory, products: analysis.CellProducts, lag: int) -> dict[str, float]:
    """Relative error of every product's directional derivatives against central differences of the run itself."""
    cell, start = run.cell, run.steps - lag
    c = run.carries.c[:, start]
    v = jax.random.normal(jax.random.key(lag), (DIRECTIONS, *c.shape), c.dtype)

    @jax.jit
    def end(c: jax.Array) -> jax.Array:
        moved = type(run.carries)(c=c, h=run.gates.o[:, start - 1] * jnp.tanh(c))
        carry, _ = rnncore.unroll(cell, run.params, run.xs[:, start:], initial_carry=moved)
        return carry.c

    measured = jax.vmap(lambda v: (end(c + STEP * v) - end(c - STEP * v)) / (2 * STEP))(v)
    errors = {}
    for name, product in products._asdict().items():
        predicted = jnp.einsum("bij,nbj->nbi", product.to_dense()[:, lag], v)
        errors[name] = float(jnp.linalg.norm(predicted - measured) / jnp.linalg.norm(measured))
    return errors


def work(args: argparse.Namespace, test: Batch, results: dict[str, Any]) -> None:
    """Measures, trains and measures again on the same sequences."""
    cell = rnncore.LSTM(args.hidden, forget_bias=args.forget_bias)
    key, last = jax.random.split(jax.random.key(args.seed))
    readout = jax.random.normal(last, (args.hidden,), _claims.FLOAT) / math.sqrt(args.hidden)
    params = {"cell": cell.init(key, 2, _claims.FLOAT), "readout": readout, "offset": jnp.zeros((), _claims.FLOAT)}
    results["variance"] = 1 / 6  # of the sum of two numbers: the error of a network that knows only the mean
    results["chosen"] = [{"terms": terms, "log10": chosen(*terms, args.lags).tolist()} for terms in CHOICES]
    results["runs"][STAGES[0]] = measure(cell, params["cell"], test.xs, args.lags)

    def loss(params: Any, batch: Batch) -> Any:
        carry, _ = rnncore.unroll(cell, params["cell"], jnp.asarray(batch.xs))
        return jnp.square(carry.h @ params["readout"] + params["offset"] - batch.targets).mean()

    optimizer = _run.optimizer(args)
    results["training"] = {}
    stream = batches(args.batch, test.xs.shape[1], args.seed + 1)
    step = _run.stepper(optimizer, loss)
    state = (params, optimizer.init(params))
    name, steps = "adding problem", args.steps
    params, _ = _run.train(results["training"], name, steps, step, state, stream, lambda _: {}, steps)
    results["runs"][STAGES[1]] = measure(cell, params["cell"], test.xs, args.lags)


def words(results: dict[str, Any]) -> str:
    """Retention by lag and the verdict."""
    runs, last = results["runs"], results["settings"]["lags"]
    chosen = sorted({lag for lag in (1, 2, 10, 20, 50) if lag <= last} | {last})
    rows = []
    for stage, run in runs.items():
        for name, label in {**PRODUCTS, "whole_state": "whole state (c, h)"}.items():
            rows.append([stage, label, *(_claims.exponent(run[name][lag - 1]) for lag in chosen)])
    lines = [
        f"terms A, B, C, D chosen as {', '.join(map(str, entry['terms']))}: over {last} steps "
        f"{_claims.exponent(entry['log10'][last])} is left, which is the power of their sum"
        for entry in results["chosen"]
    ]
    lines += ["", "retention ||M||_F / sqrt n, mean of log10 over sequences",
             _claims.table(["when", "matrix", *(f"lag {lag}" for lag in chosen)], rows, left=2), ""]  # fmt: skip
    record = results.get("training", {}).get("adding problem")
    if record and record["loss"]:
        lines.append(f"training: squared error {np.mean(record['loss'][-20:]):.4f} after {len(record['loss'])} steps; "
                     f"{results['variance']:.4f} for knowing only the mean")  # fmt: skip
    for stage, run in runs.items():
        part = run["residual"]
        lines.append(
            f"{stage}: over two steps the four-term product misses {part['median']:.2%} of the exact derivative "
            f"(8 in 10 steps: {part['low']:.2%} to {part['high']:.2%})"
        )
        for lag, errors in sorted(run["differences"].items(), key=lambda item: int(item[0])):
            lines.append(
                f"  lag {lag:>2} against finite differences: exact {errors['state']:.1e}, four-term product "
                f"{errors['one_step_total']:.2g}, forget gates {errors['direct']:.2g} (relative errors)"
            )
        lines.append(
            f"  lag {last} against the exact product: four-term product {run['one_step_total_error'][-1]:.2g}, "
            f"forget gates {run['direct_error'][-1]:.2g} (relative errors, medians)"
        )
    held = all(errors["state"] < 1e-4 for run in runs.values() for errors in run["differences"].values())
    worst = max(run["one_step_total_error"][-1] for run in runs.values())
    lines.append(
        "verdict: the product of state Jacobians alone is d c_T / d c_k. The four-term sum is exact for one step, but "
        f"its product is off by up to {worst:.2g} of the derivative at lag {last}; the product of forget gates is the "
        "derivative with every h held fixed (h-detach with p = 1)." if held else
        "verdict: none; finite differences do not confirm the exact product (too little of it is left to measure)."
    )  # fmt: skip
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """On the left the retention of all four, on the right the errors of the two products; a row for each stage."""
    runs = results["runs"]
    figure, grid = _run._picture.plt.subplots(
        len(runs), 2, figsize=(11.5, 1.4 + 3.6 * len(runs)), squeeze=False, layout="constrained", sharex=True
    )
    styles = {"direct": _run.STYLES[1], "one_step_total": _run.STYLES[3], "state": _run.STYLES[0],
              "whole_state": _run.STYLES[2]}  # fmt: skip
    labels = {"direct": "direct: product of forget gates", "one_step_total": "product of four-term sums",
              "state": "exact $dc_T/dc_{T-k}$", "whole_state": "exact, whole state (c, h)"}  # fmt: skip
    for row, (stage, run) in zip(grid, runs.items(), strict=True):
        lags = run["lags"]
        for name, label in labels.items():
            width, alpha = (3.2, 0.5) if name == "state" else (1.7, 1.0)
            row[0].plot(lags, run[name], linewidth=width, alpha=alpha, label=label, **styles[name])
        low = min(min(run[name]) for name in labels)
        high = max(max(run[name]) for name in labels)
        _claims.powers_axis(row[0], low, high, every=max(1, round((high - low) / 6)))
        row[0].set_title(f"Retention {stage}", loc="left", fontsize=11)
        row[0].set_ylabel(r"$\Vert M_k\Vert_F\,/\,\sqrt{n}$")
        for name in ("direct", "one_step_total"):
            row[1].plot(lags, [100 * e for e in run[f"{name}_error"]], linewidth=1.7, **styles[name])
        row[1].axhline(100, color="#000000", linewidth=0.8)
        row[1].set_ylim(0, 1.1 * max(100, *(100 * e for e in run["one_step_total_error"] + run["direct_error"])))
        row[1].set_title(f"Error against the exact derivative {stage}", loc="left", fontsize=11)
        row[1].set_ylabel("relative error (%)")
        for axis in row:
            axis.grid(True, color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(0, lags[-1])
    for axis in grid[-1]:
        axis.set_xlabel("lag k in steps")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, handlelength=3.4)
    note = ", interrupted" if results["interrupted"] else ""
    which = f"LSTM with {results['settings']['hidden']} units{note}"
    figure.suptitle(f"Which product is the derivative of the cell state? {which}", x=0.01, ha="left", fontsize=12)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit code."""
    parser = _run.command(__doc__ or "", out="claim_four_terms", steps=1500, batch=32, learning_rate=1e-2)
    parser.add_argument("--hidden", type=_options.at_least(2), default=32, help="hidden units")
    parser.add_argument(
        "--lags", type=_options.at_least(3), default=60, help="steps back to measure; also the sequence length"
    )
    parser.add_argument("--forget-bias", type=float, default=1.0, help="of the LSTM at initialisation")

    def load(args: argparse.Namespace) -> Batch:
        jax.config.update("jax_enable_x64", True)
        # One step more than the lags, because the cell path starts after the first step.
        return draw_batch(np.random.default_rng(12345), SEQUENCES, args.lags + 1)

    return _run.main(parser, argv, load, work, words, draw)


if __name__ == "__main__":
    sys.exit(main())
