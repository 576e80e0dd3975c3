"""The parameters of a cell as a checkpoint has them: {"input_kernel": ..., "recurrent_kernel": ..., "bias": ...}.

A per-unit parameter p is `units_p`; what is None is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell, parameter_shapes

_OPTIONAL = ("bias", "recurrent_bias")


def to_entries(params: Any) -> dict[str, Array]:
    """The entries of a cell's parameters."""
    entries = {n: a for n, a in params._asdict().items() if n != "units" and a is not None}
    units = getattr(params, "units", ())
    return entries | ({f"units_{n}": a for n, a in units._asdict().items()} if units else {})


def entry_shapes(cell: Cell, input_size: int) -> dict[str, Any]:
    """The shapes of the entries of the parameters that `cell.init` makes."""
    return to_entries(parameter_shapes(cell, input_size))


def from_entries(cell: Cell, entries: Mapping[str, Array]) -> PyTree:
    """The cell's parameters; KeyError for one that is not among the entries."""
    like: Any = parameter_shapes(cell, 1)
    own = {n: entries.get(n) if n in _OPTIONAL else entries[n] for n in like._fields if n != "units"}
    if "units" in like._fields:
        own["units"] = type(like.units)(*(entries[f"units_{n}"] for n in getattr(like.units, "_fields", ())))
    return type(like)(**own)
