"""Reports on the choice of a backend, and how the layers of a module report theirs without being run."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class BackendChoice(NamedTuple):
    """Which backend runs, why, why not each of the others, and what would be faster; prints as a short report."""

    name: str
    reason: str
    rejected: dict[str, str]
    faster: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [f"backend {self.name!r}: {self.reason}"]
            + [f"not {name!r}: {why}" for name, why in self.rejected.items()]
            + [f"faster: {advice}" for advice in self.faster]
        )


class BackendChoices(dict[str, BackendChoice]):
    """The `BackendChoice` of every recurrent layer of a module, by its name; prints as a short report."""

    def __str__(self) -> str:
        alike: dict[str, list[str]] = {}
        for name, choice in self.items():
            alike.setdefault(str(choice), []).append(name)
        return "\n".join(f"{', '.join(names)}: {said}" for said, names in alike.items())


class _Recording:
    """The choices collected so far in one call of a module."""

    def __init__(self, name_of: Callable[[Any], str]):
        self.name_of = name_of
        self.found = BackendChoices()
        self.layer = ""  # the module that runs now
        self.parts: Iterator[str] = iter(())  # of it, those that have not run yet


_recording: contextvars.ContextVar[_Recording | None] = contextvars.ContextVar("recording", default=None)
_explainers: dict[type, Callable[..., BackendChoices]] = {}


def explains(kind: type, explain: Callable[..., BackendChoices]) -> None:
    """Has `explain_backend` ask this function about modules of a kind."""
    _explainers[kind] = explain


def explainer(module: Any) -> Callable[..., BackendChoices] | None:
    """The function that explains a module, or None."""
    return next((explain for kind, explain in _explainers.items() if isinstance(module, kind)), None)


def of_shapes(call: Callable[..., Any], name_of: Callable[[Any], str], *arguments: Any) -> BackendChoices:
    """The choices that layers make while the shapes of a call's result are evaluated.

    Args:
      call: of a module; what it is called inside `jax.jit` is traced anew, so that nothing here is kept for real runs.
      name_of: the name of a module that holds a cell or layers.
      arguments: pytrees for the call, whose arrays may be `jax.ShapeDtypeStruct`s.
    """
    leaves, tree = jax.tree.flatten(arguments)
    where = [n for n, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def run(arrays: list[Any]) -> None:
        filled = list(leaves)
        for n, array in zip(where, arrays, strict=True):
            filled[n] = array
        with jax.disable_jit():
            call(*jax.tree.unflatten(tree, filled))

    recording = _Recording(name_of)
    token = _recording.set(recording)
    try:
        jax.eval_shape(run, [leaves[n] for n in where])
    finally:
        _recording.reset(token)
    return recording.found


def some(found: BackendChoices, call: str, flavour: str) -> BackendChoices:
    """The collected choices, or ValueError."""
    if not found:
        raise ValueError(
            f"{call}: no recurrent layer of rnncore runs in it. flax.{flavour}'s own RNN runs under Flax's scan; take "
            f"that of rnncore.{flavour}, which has the same fields and parameters."
        )
    return found


def is_recording() -> bool:
    """Whether choices are being collected, and nothing may run."""
    return _recording.get() is not None


@contextlib.contextmanager
def layer(module: Any, parts: Sequence[str] = ()) -> Iterator[None]:
    """Choices inside are those of this module, or of its parts one after the other."""
    recording = _recording.get()
    if recording is not None:
        recording.layer, recording.parts = recording.name_of(module), iter(parts)
    yield


def record(choice: BackendChoice, together: bool = False) -> None:
    """Keeps a choice for the module that runs now; `together`: it is that of all its parts."""
    recording = _recording.get()
    assert recording is not None
    part = None if together else next(recording.parts, None)
    name = recording.layer if part is None else f"{recording.layer}/{part}"
    count, whole = 1, name
    while whole in recording.found:
        count += 1
        whole = f"{name} (call {count})"
    recording.found[whole] = choice


def zeros_like(run: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in place of what a compiled function gives."""
    static, arrays = arguments[:3], arguments[3:]
    with jax.disable_jit(False):
        shapes = jax.eval_shape(lambda *arrays: run(*static, *arrays), *arrays)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
