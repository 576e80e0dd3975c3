"""Shares of the paths of a step's gradient, and what is left over many steps without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import LSTMS, close, linear, run_of
from cases import FastSlow

import rnncore
from rnncore import analysis

EXACT = 1e-12
LSTM, GRU_BEFORE = LSTMS["plain"], rnncore.ResetBeforeGRU(4)
USER = FastSlow(4, recurrence=rnncore.Heads(2))


def inner(terms, name):
    whole = sum(np.asarray(a) for a in terms.values())
    return (np.asarray(terms[name]) * whole).sum((-2, -1)) / (whole**2).sum((-2, -1))


@pytest.mark.sample(2)
@pytest.mark.parametrize("cell", [LSTM, GRU_BEFORE, USER], ids=["lstm", "gru_before", "user"])
def test_shares_add_up_to_one(cell):
    run = run_of(cell)
    paths = analysis.gate_paths(run)
    shares = analysis.path_shares(run)
    assert list(shares) == list(paths.terms())
    for name, share in shares.items():
        close(share, inner(paths.terms(), name), EXACT)
    close(sum(shares.values()), np.ones((2, 6)), EXACT)

    adjoint = jax.tree.map(lambda a: jnp.sin(7 * a) * 1e-200, run.carries)
    shares = analysis.path_shares(paths, by="adjoint", adjoint=adjoint)
    close(sum(shares.values()), np.ones((2, 6)), EXACT)
    v = np.concatenate(adjoint, -1)[:, 1:] * 1e200
    back = {name: np.einsum("...ij,...i->...j", a, v)[..., None] for name, a in paths.terms().items()}
    for name, share in shares.items():
        close(share, inner(back, name), EXACT)

    ratios = analysis.path_shares(paths, by="norm_ratio")
    for name, a in paths.terms().items():
        close(ratios[name], np.linalg.norm(a, axis=(-2, -1)) / np.linalg.norm(paths.total(), axis=(-2, -1)), EXACT)
    assert np.abs(sum(ratios.values()) - 1).min() > 0.01


def test_shares_of_the_four_terms_of_an_lstm():
    run = run_of(LSTM)
    paths = analysis.lstm_paths(run)
    shares = analysis.path_shares(paths)
    assert list(shares) == ["forget_direct", "via_forget", "via_input", "via_candidate"]
    close(sum(shares.values()), np.ones((2, 5)), EXACT)
    close(shares["via_input"], inner(paths.terms(), "via_input"), EXACT)
    adjoint = jax.tree.map(jnp.cos, run.carries)
    shares = analysis.path_shares(paths, by="adjoint", adjoint=adjoint)
    o, c = np.asarray(run.gates.o)[:, 1:], np.asarray(run.carries.c)[:, 2:]
    v = adjoint.c[:, 2:] + o * (1 - np.tanh(c) ** 2) * adjoint.h[:, 2:]
    back = {name: np.einsum("...ij,...i->...j", a, v)[..., None] for name, a in paths.terms().items()}
    for name, share in shares.items():
        close(share, inner(back, name), EXACT)


def test_shares_of_nothing_are_zero():
    run = linear(np.zeros((3, 3)), 2)
    zeros = np.zeros(2)
    for options in ({}, {"by": "norm_ratio"}, {"by": "adjoint", "adjoint": rnncore.HiddenCarry(jnp.ones((3, 3)))}):
        shares = analysis.path_shares(run, **options)
        assert list(shares) == ["direct", "via_h"]
        np.testing.assert_array_equal(np.stack(list(shares.values())), np.stack([zeros, zeros]))


def test_ablation_takes_a_path_out_of_every_step():
    run = run_of(rnncore.GRU(4))
    paths = analysis.gate_paths(run)
    left = analysis.path_shares(paths, by="ablation", lags=(0, 2, 6))
    assert left.lags.tolist() == [0, 2, 6] and list(left.without) == list(paths.terms())
    whole = analysis.step_jacobians(run)
    for logs, term in ((left.full, 0), *((left.without[name], a) for name, a in paths.terms().items())):
        jacobians = np.asarray(whole - term)[1]
        products = (np.eye(4), jacobians[5] @ jacobians[4], np.linalg.multi_dot(jacobians[::-1]))
        close(10 ** logs[1], [np.linalg.norm(product) / 2 for product in products])
    nothing = analysis.path_shares(linear(np.eye(3), 2), by="ablation").without["via_h"]
    close(10**nothing, [1.0, 0.0, 0.0])
    assert np.all(np.isneginf(nothing[1:]))


ADJOINT = rnncore.LSTMCarry(jnp.ones((2, 7, 4)), jnp.ones((2, 7, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "norm"}, r"`path_shares\(by='norm'\)`: expected one of 'inner', 'adjoint', 'ablation', 'norm_ratio'"),
        ({"by": "adjoint"}, "needs adjoint=, `gradients_over_time"),
        ({"adjoint": ADJOINT}, "takes no adjoint"),
        ({"lags": 3}, "takes no lags"),
        ({"by": "ablation", "lags": (2, 1)}, r"`path_shares\(lags=\(2, 1\)\)`: expected increasing integers"),
        ({"by": "ablation", "lags": 1.5}, "expected increasing integers"),
        ({"by": "ablation", "lags": 7}, "has T = 6 steps; run at least 7 or ask for fewer lags"),
        ({"by": "adjoint", "adjoint": ADJOINT.h}, r"of float64 \(2, 7, 4\)>.*one entry for each of T \+ 1 = 7 states"),
        ({"by": "adjoint", "adjoint": ADJOINT._replace(c=jnp.ones((2, 6, 4)))}, "as in `gradients_over_time"),
        ({"by": "adjoint", "adjoint": ADJOINT._replace(c=jnp.ones((2, 7, 4), int))}, "floating point with leading"),
        ({"by": "adjoint", "adjoint": ADJOINT._replace(c=jnp.full((2, 7, 4), jnp.inf))}, "holds 56 NaN or infinite"),
    ],
)  # fmt: skip
def test_bad_options_of_shares(options, message):
    for source in (run_of(LSTM), analysis.gate_paths(run_of(LSTM))):
        with pytest.raises(ValueError, match=message):
            analysis.path_shares(source, **options)


def test_shares_of_something_else():
    with pytest.raises(ValueError, match=r"`path_shares\(source=<LSTM>\)`: expected a `Trajectory`"):
        analysis.path_shares(LSTM)
