"""Checks of arguments that many classes and functions take, each with its error."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OTHER_WORDS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("features", "hidden_features"),
    "units": ("hidden_size", "features", "hidden_features"),
    "features": ("hidden_size", "hidden_features"),
    "hidden_features": ("hidden_size", "features"),
    "input_size": ("in_features",),
    "layers": ("num_layers",),
    "nonlinearity": ("activation_fn",),
    "activation": ("activation_fn",),
    "recurrent_activation": ("gate_fn",),
    "kernel_initializer": ("kernel_init",),
    "recurrent_initializer": ("recurrent_kernel_init", "recurrent_init"),
    "bias_initializer": ("bias_init",),
    "unit_forget_bias": ("forget_bias",),
    "return_state": ("return_carry",),
    "initial_state": ("initial_carry",),
    "hx": ("initial_carry",),
    "lengths": ("seq_lengths",),
    "mask": ("seq_lengths",),
    "go_backwards": ("reverse",),
    "axis": ("time_major",),
}
"""Names of PyTorch, Keras and Flax, and what they are called here: the first of these that the class has."""

ADVICE: Mapping[str, str] = {
    "batch_first": "inputs are (batch, T, D), or (T, batch, D) with time_major=True; leave it out",
    "return_sequences": "the outputs of every step are returned; leave it out, and take the last one from the carry",
    "return_state": "the carry is returned first: carry, ys = ...; leave it out",
    "input_size": "the number of features is that of the inputs; `cell.init(key, input_size)` of rnncore takes it",
    "in_features": "the number of features is that of the inputs; `cell.init(key, input_size)` of rnncore takes it",
    "num_layers": "it is one layer; rnncore.Stack(cell, num_layers=...), linen.LSTM and nnx.LSTM have several",
    "bidirectional": "it reads one way; rnncore.Stack(cell, bidirectional=True), linen.LSTM and nnx.LSTM read both",
    "dropout": "it is an option of rnncore.Stack, linen.LSTM and nnx.LSTM",
    "recurrent_dropout": "it is an option of rnncore.Stack, linen.LSTM and nnx.LSTM",
    "stateful": "give the carry that a call returned to the next one as initial_carry",
    "hx": "the state before the first step is initial_carry",
    "proj_size": "rnncore.LSTMP(hidden_size, projection_size=...) is an LSTM with a projection",
    "bias": "there always is one; parameters of a functional cell may have bias=None",
    "use_bias": "there always is one; parameters of a functional cell may have bias=None",
    "differentiation": "it is no longer needed: every run has every mode and order of differentiation; leave it out",
}
"""What to do instead of options of other libraries that rnncore does not have."""


def refuse_renamed(cls: type, names: Mapping[str, str]) -> None:
    """TypeError where a class defines a method by the name that it had before, which nothing would call."""
    for old, new in names.items():
        if old in vars(cls):
            raise TypeError(f"`class {cls.__name__}`: defines `{old}`, which is called `{new}` now; rename it.")


def known_as(option: str, known: Iterable[str]) -> str | None:
    """Advice for an option of another library, or None for an unknown option."""
    names = set(known)
    ours = next((name for name in OTHER_WORDS.get(option, ()) if name in names), None)
    return f"it is called {ours} here" if ours else ADVICE.get(option)


def refuse_foreign(cls: type, given: Mapping[str, Any]) -> None:
    """TypeError for an argument that has another name here than in PyTorch, Keras or Flax."""
    known: set[str] = set()
    for base in cls.__mro__:
        if "__init__" in vars(base):
            known |= inspect.signature(vars(base)["__init__"]).parameters.keys()
    for option in given:
        if option not in known and (advice := known_as(option, known)):
            raise TypeError(f"`{cls.__name__}({option}={given[option]!r})`: {advice}.")


def check_size(call: str, name: str, value: Any) -> None:
    """ValueError unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        given: Any = value
        shown = f"<{given.dtype} {given.shape}>" if hasattr(given, "shape") else repr(given)
        raise ValueError(f"`{call}({name}={shown})`: expected an int, a number of features or units.")


def check_key(call: str, key: Any) -> None:
    """ValueError unless this is a random key, of the new kind or the old one."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        shown = repr(key) if dtype is None else f"<{dtype} {key.shape}>"
        raise ValueError(f"`{call}(key={shown})`: expected a random key, such as jax.random.key(0).")


def check_dtypes(call: str, dtypes: Mapping[str, Any]) -> None:
    """ValueError unless each is None or a dtype of floating or complex numbers."""
    for name, dtype in dtypes.items():
        try:
            known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.inexact)
        except TypeError:
            known = False
        if not known:
            raise ValueError(
                f"`{call}({name}={dtype!r})`: expected a floating dtype, such as jnp.bfloat16 or 'float16', or None."
            )
