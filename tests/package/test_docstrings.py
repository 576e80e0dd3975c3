"""Docstrings: every example runs, and every public name says what it takes and shows its use."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rnncore

MODULES = sorted(m.name for m in pkgutil.walk_packages(rnncore.__path__, "rnncore."))
PUBLIC = {name: getattr(rnncore, name) for name in rnncore.__all__}
# What a caller gets and never makes needs no example; its fields are what it has to say.
RESULTS = (
    "CellParams",
    "HiddenCarry",
    "LSTMCarry",
    "LSTMPParams",
    "SLSTMCarry",
    "States",
    "BackendChoice",
    "StackParams",
)
INITIALIZERS = ("per_gate", "forget_bias", "chrono", "uniform_gate", "critical_forget_bias")
FUNCTIONS = (
    "unroll",
    "explain_backend",
    "unroll_stack",
    "from_torch",
    "to_torch",
    "from_keras",
    "to_keras",
    "from_haiku",
    "to_haiku",
    "from_equinox",
    "to_equinox",
    "foreign_cell",
    "windows",
)
CELLS = (
    "Elman",
    "IndRNN",
    "Leaky",
    "MinGRU",
    "MinLSTM",
    "QRNN",
    "RGLRU",
    "SLSTM",
    "LSTM",
    "LSTMP",
    "GRU",
    "MGU",
    "LayerNormLSTM",
    "LayerNormGRU",
    "ResetBeforeGRU",
)


@pytest.mark.parametrize("name", ["rnncore", *MODULES])
def test_examples_run(name: str):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, "doctest has printed which"
    assert tried > 0 or name not in ("rnncore.sequence.call", "rnncore.initializers", "rnncore.cells.lstm")


def documented() -> list[Any]:
    names = [pytest.param(value, id=name) for name, value in PUBLIC.items() if not isinstance(value, types.ModuleType)]
    return names + [pytest.param(getattr(rnncore.initializers, name), id=name) for name in INITIALIZERS]


@pytest.mark.parametrize("value", documented())
def test_public_names_have_a_docstring(value: Any):
    text = inspect.cleandoc(value.__doc__ or "")
    first = text.partition("\n")[0]
    # NamedTuples and dataclasses without a docstring are given "Name(field, ...)" by Python.
    assert first and not first.startswith(f"{value.__name__}("), "a line that says what it is"


@pytest.mark.parametrize("name", [*FUNCTIONS, *INITIALIZERS, *CELLS, "Stack"])
def test_what_a_user_calls_says_what_it_takes_and_shows_its_use(name: str):
    value = PUBLIC.get(name) or getattr(rnncore.initializers, name)
    text = value.__doc__
    for section in ("Args:", "Example:"):
        assert f"    {section}\n" in text, f"{name} has no {section}"
    assert ">>> " in text.partition("Example:")[2]
    if inspect.isfunction(value):
        assert "    Returns:\n" in text and "    Raises:\n" in text
        described = text.partition("Args:")[2].partition("Returns:")[0]
        if "As in `unroll`" not in described:
            missing = [
                p
                for p, how in inspect.signature(value).parameters.items()
                if how.kind is not how.VAR_KEYWORD and not re.search(rf"\n      [\w, ]*\b{p}\b[\w, ]*:", described)
            ]
            assert not missing, f"not under Args: {missing}"


@pytest.mark.parametrize("name", CELLS)
def test_cells_name_their_equation_their_fields_and_their_source(name: str):
    cell = PUBLIC[name]
    assert "h_t = " in cell.__doc__ and "    Source: " in cell.__doc__
    described = cell.__doc__.partition("Args:")[2].partition("Example:")[0]
    assert not [field.name for field in dataclasses.fields(cell) if field.name not in described]


@pytest.mark.parametrize("name", RESULTS)
def test_results_name_their_fields(name: str):
    value = PUBLIC[name]
    assert value.__doc__.strip()
    missing = [f for f in value._fields if f not in value.__doc__]
    assert not missing or name == "BackendChoice"


def test_explain_backend_takes_what_unroll_takes():
    cell, taken = rnncore.LSTM(2), inspect.signature(rnncore.unroll).parameters
    given = {name: p.default for name, p in taken.items() if p.kind is p.KEYWORD_ONLY}
    assert len(given) > 10
    rnncore.explain_backend(cell, cell.init(jax.random.key(0), 3), jnp.ones((4, 3)), **given)


def test_every_public_name_is_in_one_of_the_lists():
    others = {"Cell", "GatedCell", "PointwiseCell", "Stack", "BackendChoices", "SlowPathWarning"}
    others |= {"Recurrence", "Dense", "Heads", "Diagonal", "LowRank", "Sparse", "Dale", "Unconnected"}
    modules = {name for name, value in PUBLIC.items() if isinstance(value, types.ModuleType)}
    assert set(PUBLIC) - modules == {*RESULTS, *FUNCTIONS, *CELLS, *others}
