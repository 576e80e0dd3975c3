"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import rnncore


def with_examples() -> list[str]:
    """Modules whose source holds an example."""
    root = Path(rnncore.__file__).parent
    paths = sorted(path for path in root.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str):
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, "doctest has printed which"
    assert tried > 0, "doctest does not see the examples"
