"""Writes docs/recipes.ipynb: the page of recipes as a notebook, with what its cells print.

python tests/make_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipes.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
INSTALL = "# In a hosted notebook, install the library first.\n%pip install -q rnncore"


def notebook(page: str) -> dict[str, Any]:
    """A notebook in the format 4.5 of a page in Markdown."""
    cells = [_cell(0, "code", INSTALL)]
    for language, code, text in re.findall(r"```(\w+)\n(.*?)```|(.*?)(?=```|\Z)", page, re.DOTALL):
        if language == "python":
            cells.append(_cell(len(cells), "code", code))
        elif language == "text":
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": code.splitlines(True)}]
        elif text.strip():
            # Links lead to other pages of the documentation, which a notebook does not have beside it.
            text = re.sub(r"\[([^\]]*)\]\([^)]*\.(?:md|ipynb)[^)]*\)", r"\1", text)
            cells.append(_cell(len(cells), "markdown", text))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(number: int, kind: str, source: str) -> dict[str, Any]:
    cell = {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": source.strip("\n").splitlines(True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def text() -> str:
    return json.dumps(notebook(PAGE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(text(), encoding="utf-8")
