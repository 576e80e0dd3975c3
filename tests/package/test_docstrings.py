"""Docstrings: every public name says what it takes and shows its use; tests/docs runs the examples."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import rnncore

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


FLOORS = {
    name: importlib.import_module(f"rnncore.{name}")
    for name in ("linen", "nnx", "online", "parallel", "training", "gpu", "analysis", "analysis.plots")
}
"""Modules beside `rnncore` itself whose public names follow the same rules."""


def own_names(module: types.ModuleType) -> list[str]:
    """Public names that are rnncore's, not Flax's."""
    return [name for name in dir(module) if getattr(getattr(module, name), "__module__", "").startswith("rnncore.")]


OTHERS = {f"{floor}.{name}": getattr(module, name) for floor, module in FLOORS.items() for name in own_names(module)
          if not name.startswith("_") and callable(getattr(module, name))}  # fmt: skip
RECORDS = [name for name, value in OTHERS.items() if hasattr(value, "_fields") or "    Fields:\n" in value.__doc__]


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in RECORDS])
def test_names_of_the_modules_say_what_they_take_and_show_their_use(name: str):
    value, text = OTHERS[name], OTHERS[name].__doc__ or ""
    if name == "online.Rule":  # an abstract class: its rules have the examples
        assert "    Args:\n" in text
        return
    assert "    Args:\n" in text and "    Example:\n" in text and ">>> " in text.partition("Example:")[2]
    described = text.partition("Args:")[2].partition("Example:")[0]
    if inspect.isfunction(value):
        assert "    Returns:\n" in text and ("    Raises:\n" in text or not checks(value))
        described = described.partition("Returns:")[0]
    if dataclasses.is_dataclass(value):
        taken = [
            field.name for field in dataclasses.fields(value) if field.init and field.name not in ("parent", "name")
        ]
    else:
        how = inspect.signature(value).parameters.values()
        taken = [p.name for p in how if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if "All others: " not in described:
        assert not [p for p in taken if not re.search(rf"\b{p}\b", described)], f"not under Args: {described}"


def checks(function: Any) -> bool:
    """Whether a function raises errors itself."""
    return "raise " in inspect.getsource(function)


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_the_modules_name_their_fields(name: str):
    value = OTHERS[name]
    assert not value.__doc__.startswith(f"{value.__name__}("), "Python's own docstring"
    fields = value._fields if hasattr(value, "_fields") else [field.name for field in dataclasses.fields(value)]
    assert len(fields) < 3 or not [
        f for f in fields if not f.startswith("_") and not re.search(rf"\b{f}\b", value.__doc__)
    ]


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
    others = {"Cell", "GatedCell", "ReducingCell", "PointwiseCell", "Stack", "BackendChoices", "SlowPathWarning"}
    others |= {"Recurrence", "Dense", "Heads", "Diagonal", "LowRank", "Sparse", "Dale", "Unconnected"}
    modules = {name for name, value in PUBLIC.items() if isinstance(value, types.ModuleType)}
    assert set(PUBLIC) - modules == {*RESULTS, *FUNCTIONS, *CELLS, *others}
