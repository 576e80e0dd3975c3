"""The parameters of a cell as a checkpoint has them: {"input_kernel": ..., "recurrent_kernel": ..., "bias": ...}.

A per-unit parameter p is `units_p`; what is None is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell, CellParams, named, parameter_shapes

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


def fitting_entries(call: str, cell: Cell, params: Any, input_size: int) -> dict[str, Array]:
    """The entries of a cell for inputs of that size from functional parameters, zeros for a bias that is None."""
    entries, made = to_entries(params), {}
    for name, like in entry_shapes(cell, input_size).items():
        made[name] = entries.get(name, jnp.zeros(like.shape, params.input_kernel.dtype))
        if made[name].shape != like.shape:
            raise ValueError(f"`{call}`: {name} has shape {made[name].shape}, expected {like.shape}.")
    return made


def from_gates(
    inputs: Sequence[Mapping[str, Array]], recurrent: Sequence[Mapping[str, Array]], gates: int, dtypes: Sequence[Any]
) -> CellParams:
    """The parameters of a cell from the kernels and biases of its gates.

    Args:
      inputs, recurrent: {"kernel": (., k * H)[, "bias": (k * H,)]} of k gates side by side, of W and of U.
      gates: how many there are in all.
      dtypes: of the parameters of W and of U.
    """
    hidden = sum(part["kernel"].shape[-1] for part in inputs) // gates

    def joined(arrays: Sequence[Array], dtype: Any) -> Array:
        single = len(inputs) == gates
        if any(a.shape[-1] != hidden if single else a.shape[-1] % max(hidden, 1) for a in arrays):
            raise ValueError(
                f"the parameters of the gates have {', '.join(str(a.shape[-1]) for a in arrays)} units: expected as "
                "many in each."
            )
        wide = arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, -1)
        return wide.reshape(*wide.shape[:-1], -1, hidden).astype(dtype)

    # Each gate has one bias; where it has a second, that one stays with U h (the GRU's b_hn).
    on_inputs = all("bias" in part for part in inputs)
    biases = [[part["bias"] for part in (i, r) if "bias" in part] for i, r in zip(inputs, recurrent, strict=True)]
    second = [both[1] for both in biases if len(both) == 2]
    return CellParams(
        input_kernel=joined([part["kernel"] for part in inputs], dtypes[0]),
        recurrent_kernel=joined([part["kernel"] for part in recurrent], dtypes[1]),
        bias=joined([either[0] for either in biases], dtypes[0 if on_inputs else 1]),
        recurrent_bias=joined(second, dtypes[1]) if second else None,
        units=named("Units", ())(),
    )
