"""Checks of arguments that many classes and functions take, each with its error."""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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
    "merge_mode": ("merge", "merge_fn"),
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
    "training": "`deterministic`, its opposite, is an option of layers with dropout; leave it out elsewhere",
    "train": "`deterministic`, its opposite, is an option of layers with dropout; leave it out elsewhere",
    "differentiation": "it is no longer needed: every run has every mode and order of differentiation; leave it out",
}
"""What to do instead of options of other libraries that rnncore does not have."""

FUNCTIONS = frozenset(
    {"activation_fn", "gate_fn", "kernel_init", "recurrent_init", "recurrent_kernel_init", "bias_init", "carry_init"}
)
"""Options that are functions here and names in Keras."""


Method = TypeVar("Method", bound=Callable[..., Any])


def shown(value: Any) -> str:
    """A value as messages have it, on one line: an array by its dtype and shape."""
    return f"<{value.dtype} {value.shape}>" if hasattr(value, "dtype") and hasattr(value, "shape") else repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; the nearest name is ..." where one is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; the nearest name is {near[0]}" if near else ""


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


@functools.lru_cache(maxsize=256)
def _options_of(cls: type) -> tuple[frozenset[str], bool]:
    """(the arguments of a class that can be told, whether there are no others)."""
    makers = [base for base in cls.__mro__ if "__init__" in vars(base)]
    known = {name for base in makers for name in inspect.signature(vars(base)["__init__"]).parameters}
    # A class of a user may take options by **kwargs, also where it has the signature of ours.
    own = inspect.signature(vars(makers[0])["__init__"], follow_wrapped=False).parameters
    closed = makers[0].__module__.startswith("rnncore.") or all(p.kind is not p.VAR_KEYWORD for p in own.values())
    return frozenset(known | own.keys()), closed


def refuse_foreign(cls: type, given: Mapping[str, Any]) -> None:
    """TypeError for an argument that is misspelt, or has another name here than in PyTorch, Keras or Flax."""
    known, closed = _options_of(cls)
    for option, value in given.items():
        if option not in known and (advice := known_as(option, known)):
            raise TypeError(f"`{cls.__name__}({option}={shown(value)})`: {advice}.")
        if option not in known and closed and (near := nearest(option, known)):
            raise TypeError(f"`{cls.__name__}({option}={shown(value)})`: there is no such option{near}.")
        if isinstance(value, str) and option in FUNCTIONS:
            example = "jnp.tanh" if option.endswith("_fn") else "jax.nn.initializers.orthogonal()"
            raise ValueError(f"`{cls.__name__}({option}={value!r})`: expected a function, such as {example}.")


def refuse_positional(cls: type, args: tuple[Any, ...], name: str) -> None:
    """TypeError for sizes as PyTorch has them, of inputs and units."""
    if len(args) < 2:
        return
    made: Any = cls
    places = [p for p in inspect.signature(made.__init__).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if [p.name for p in places if p.name not in ("parent", "name")] == ["self", name]:
        raise TypeError(
            f"`{cls.__name__}({', '.join(map(shown, args))})`: expected {cls.__name__}({name}); the number of features "
            "is that of the inputs, and all options have names."
        )


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of the user's code that led to it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("rnncore", "flax", "jax"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def takes_inputs(call: Method) -> Method:
    """A module's `__call__` of one array of inputs, which says what options of other libraries are called here."""
    known = inspect.signature(call).parameters

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        got = f"{type(self).__name__}(...)"
        for option in (name for name in kwargs if name not in known):
            advice = known_as(option, known) or "there is no such option" + nearest(option, known)
            raise TypeError(f"`{got}(inputs, {option}={shown(kwargs[option])})`: {advice}.")
        if len(args) > 1:
            raise TypeError(
                f"`{got}({', '.join(f'<{type(arg).__name__}>' for arg in args)})`: expected the inputs alone; all else "
                "has a name, such as initial_carry=."
            )
        return call(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def check_size(call: str, name: str, value: Any) -> None:
    """ValueError unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"`{call}({name}={shown(value)})`: expected an int, a number of features or units.")


def check_static(call: str, name: str, value: Any, remedy: str) -> None:
    """ValueError for a switch that is traced; `call` is that of the user, with {} for its name and value."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"`{call.format(name, f'traced {value.dtype}')}`: expected True or False, known when the call is traced; "
            f"{remedy}, or make it a static argument of jax.jit."
        )


def check_key(call: str, key: Any) -> None:
    """ValueError unless this is a random key, of the new kind or the old one."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise ValueError(f"`{call}(key={shown(key)})`: expected a random key, such as jax.random.key(0).")


def check_batch_shape(call: str, batch_shape: Any) -> None:
    """ValueError for the size of a batch in place of its shape."""
    if not isinstance(batch_shape, Sequence):
        raise ValueError(f"`{call}(batch_shape={shown(batch_shape)})`: expected the batch axes, such as (8,) or ().")


def check_inputs(call: str, name: str, inputs: Any) -> None:
    """ValueError for an array of another library, such as a tensor of PyTorch."""
    try:
        jnp.dtype(getattr(inputs, "dtype", None))
    except TypeError:
        got = f"<{type(inputs).__module__}.{type(inputs).__qualname__}>"
        raise ValueError(
            f"`{call}({name}={got})`: expected an array of JAX or NumPy; convert it by numpy.asarray."
        ) from None


def check_dtypes(call: str, dtypes: Mapping[str, Any], kind: Any = jnp.inexact) -> None:
    """ValueError unless each is None or a dtype of a kind; of floating or complex numbers by default."""
    for name, dtype in dtypes.items():
        try:
            known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), kind)
        except TypeError:
            known = False
        if not known:
            raise ValueError(
                f"`{call}({name}={dtype!r})`: expected a floating dtype, such as jnp.bfloat16 or 'float16', or None."
            )
