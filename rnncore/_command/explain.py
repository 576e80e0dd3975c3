"""Shows which backend runs a shape or the layers of a model, why, and why not the others.  Nothing is run.

  python -m rnncore explain 32 128 128 256 --cell gru --dtype bfloat16
  python -m rnncore explain model.py:make_model --inputs 8 100 64

A file is imported as a module; NAME in it is a linen or nnx model, or a function that makes one without arguments.
Without a name the file has to hold exactly one model.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rnncore

CELLS: dict[str, type[rnncore.Cell]] = {
    "lstm": rnncore.LSTM, "gru": rnncore.GRU, "elman": rnncore.Elman, "mgu": rnncore.MGU,
    "indrnn": rnncore.IndRNN, "reset_before_gru": rnncore.ResetBeforeGRU,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add = parser.add_argument
    add("what", nargs="+", metavar="B T D H | FILE[:NAME]", help="batch, steps, features and units; or a model's file")
    add("--cell", choices=tuple(CELLS), default="lstm", help="of a shape (default: lstm)")
    add("--heads", type=int, default=1, help="of a shape: blocks of the recurrent kernel (default: 1, dense)")
    add("--inputs", type=int, nargs="+", metavar="SIZE", help="of a model: the shape of its inputs, as 8 100 64")
    add("--dtype", default="float32", help="of the inputs; int32 for tokens (default: float32)")


def main(args: argparse.Namespace) -> int:
    """Prints the choice."""
    inputs = args.inputs and jax.ShapeDtypeStruct(tuple(args.inputs), jnp.dtype(args.dtype))
    if len(args.what) == 1 and not args.what[0].isdigit():
        if not inputs:
            raise ValueError(f"`explain {args.what[0]}`: give the shape of the model's inputs, as --inputs 8 100 64.")
        print(of_model(load(args.what[0]), inputs))
    else:
        print(of_shape(args.what, args.cell, args.heads, args.dtype))
    return 0


def of_shape(sizes: Sequence[str], name: str, heads: int, dtype: str) -> rnncore.BackendChoice:
    """The choice for a cell and (B, T, D, H)."""
    if len(sizes) != 4 or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(
            f"`explain {' '.join(sizes)}`: expected four sizes B T D H, as 32 128 128 256, or a file, as model.py:NAME."
        )
    batch, steps, features, hidden = map(int, sizes)
    made: Any = CELLS[name]
    cell = made(hidden) if heads == 1 else made(hidden, recurrence=rnncore.Heads(heads))
    params = jax.eval_shape(lambda: cell.init(jax.random.key(0), features, jnp.dtype(dtype)))
    return rnncore.explain_backend(cell, params, jax.ShapeDtypeStruct((batch, steps, features), jnp.dtype(dtype)))


def load(where: str) -> Any:
    """The model of FILE:NAME, or the only one of FILE."""
    file, _, name = where.partition(":")
    if not Path(file).is_file():
        raise ValueError(
            f"`explain {where}`: no such file; expected a Python file with a model, or four sizes B T D H."
        )
    held = runpy.run_path(file)
    if name:
        if name not in held:
            raise ValueError(f"`explain {where}`: {file} defines no {name!r}.")
        found = held[name]
        return found if _is_model(found) else found()
    models = {key: value for key, value in held.items() if _is_model(value)}
    if len(models) != 1:
        named = ", ".join(models) or "none"
        raise ValueError(f"`explain {where}`: expected one model in the file, found {named}; name it: {file}:NAME.")
    return next(iter(models.values()))


def _is_model(value: Any) -> bool:
    return isinstance(value, rnncore.linen.Module | rnncore.nnx.Module)


def of_model(model: Any, inputs: jax.ShapeDtypeStruct) -> Any:
    """The choices of its recurrent layers."""
    if isinstance(model, rnncore.nnx.Module):
        return rnncore.explain_backend(model, inputs)
    if not isinstance(model, rnncore.linen.Module):
        raise TypeError(f"`explain`: {type(model).__name__} is no model; expected a linen or nnx module.")
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(model.init, keys, inputs)
    return rnncore.explain_backend(model, variables, inputs)
