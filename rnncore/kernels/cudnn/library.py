"""cuDNN itself: where it is, which version, and the calls that XLA makes of it, compiled around it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import jax

from rnncore import _compat
from rnncore.kernels import compiler, ffi

SOURCES = tuple(Path(__file__).with_name(name) for name in ("api.h", "plan.h", "handlers.cc"))
HANDLERS = ("forward", "backward", "forward_capturable", "backward_capturable")
FILE = "libcudnn.so.9"
OLDEST, OLDEST_WITH_BFLOAT16 = 90000, 91300
"""As PyTorch has it: its calls of this interface are for 9.0 and newer, in bfloat16 for 9.13 and newer."""


class Kind(NamedTuple):
    """A run as cuDNN's descriptors say it: its own numbers in the order of `Kind` in plan.h."""

    mode: int
    algorithm: int
    math: int
    data: int
    directions: int
    layers: int
    steps: int
    batch: int
    inputs: int
    hidden: int

    @property
    def gates(self) -> int:
        return (1, 1, 4, 3)[self.mode]


class Sizes(NamedTuple):
    """Bytes: of the weights, of working memory without and with a backward pass to come, and of the reserve."""

    weights: int
    inference: int
    training: int
    reserve: int


class Library:
    """A libcudnn with the handlers that call it, registered with XLA.

    Args:
      path: of libcudnn, or its name where the system finds it.
      on_host: it computes on the CPU, as a library for tests does.
    """

    def __init__(self, path: str, on_host: bool = False):
        self.path = path
        self._handlers, key = compiler.library(source(on_host), "the calls of cuDNN")
        version = ctypes.c_int64()
        gpus = [0] if on_host else [device.local_hardware_id for device in jax.local_devices()]
        self._gpu = ctypes.c_int64(gpus[0])
        numbers = (ctypes.c_int64 * len(gpus))(*gpus)
        self._ask("load", path.encode(), numbers, ctypes.c_int64(len(gpus)), ctypes.byref(version))
        self.version = version.value
        self._sizes: dict[Kind, Sizes] = {}
        platform = "cpu" if on_host else "CUDA"
        self.targets = {
            handler: ffi.register(f"rnncore_cudnn_{handler}_{key}", self._handlers, f"rnn_{handler}", platform)
            for handler in HANDLERS
        }

    def sizes(self, kind: Kind) -> Sizes:
        """What a run needs; the order of the weights is checked the first time."""
        if kind not in self._sizes:
            found = (ctypes.c_int64 * len(Sizes._fields))()
            self._ask("sizes", self._gpu, _numbers(kind), found)
            self._sizes[kind] = Sizes(*found)
            self._check_places(kind)
        return self._sizes[kind]

    def _check_places(self, kind: Kind) -> None:
        places, end = expected_places(kind)
        got = (ctypes.c_int64 * (3 * len(places)))()
        self._ask("places", self._gpu, _numbers(kind), got)
        if list(zip(*[iter(got)] * 3, strict=True)) != places or self._sizes[kind].weights != end:
            del self._sizes[kind]
            raise RuntimeError(
                f"cuDNN {self.version} has its weights in another order than rnncore puts them in, for {kind}; "
                "use another backend, and please report this."
            )

    def _ask(self, name: str, *arguments: object) -> None:
        message = ctypes.create_string_buffer(2000)
        if getattr(self._handlers, f"rnn_{name}")(*arguments, message, ctypes.c_int64(len(message))):
            raise RuntimeError(f"cuDNN ({self.path}): {message.value.decode(errors='replace')}")


def _numbers(kind: Kind) -> ctypes.Array:
    return (ctypes.c_int64 * len(kind))(*kind)


def source(on_host: bool = False) -> str:
    """The handlers as one file."""
    parts = [re.sub(r'#pragma once|#include "(api|plan)\.h"', "", path.read_text()) for path in SOURCES]
    return "\n".join((["#define RNN_CUDNN_ON_HOST"] if on_host else []) + parts)


def expected_places(kind: Kind) -> tuple[list[tuple[int, int, int]], int]:
    """Where `weights.pack` puts things: (first byte, rows, columns) of each as the library is asked, and the end.

    For each layer and direction the matrices of the gates, of the inputs and then of h, and both biases likewise.
    """
    item = 4 if kind.data == 0 else 2
    matrices, biases, at = [], [], 0
    runs = kind.layers * kind.directions
    for run in range(runs):
        features = kind.inputs if run < kind.directions else kind.directions * kind.hidden
        for columns in [features] * kind.gates + [kind.hidden] * kind.gates:
            matrices.append((at * item, kind.hidden, columns))
            at += kind.hidden * columns
    for _ in range(runs * 2 * kind.gates):
        biases.append((at * item, kind.hidden, 1))
        at += kind.hidden
    each = 2 * kind.gates
    places = [n for r in range(runs) for part in (matrices, biases) for n in part[r * each : (r + 1) * each]]
    return places, at * item


@functools.cache
def library() -> Library:
    """The one that is there."""
    path = find()
    if path is None:
        raise RuntimeError(f"{FILE} is not found")
    return Library(path)


@functools.cache
def fault() -> str | None:
    """Reason why the library that is there cannot be called, or None; its calls are compiled."""
    try:
        library()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


@functools.cache
def find() -> str | None:
    """Where cuDNN is: in NVIDIA's package, which comes with JAX's, else where the system looks; None if nowhere."""
    package = importlib.util.find_spec("nvidia")
    for place in package.submodule_search_locations or () if package else ():
        found = sorted(Path(place).glob(f"*/lib/{FILE}"))
        if found:
            return str(found[0])
    try:
        ctypes.CDLL(FILE)
    except OSError:
        return None
    return FILE


@functools.cache
def version(path: str) -> int:
    """Of the library there, such as 91002 for 9.10.2."""
    return ctypes.CDLL(path).cudnnGetVersion()


def missing(platform: str) -> str | None:
    """Reason why cuDNN cannot be called on this platform, or None."""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {platform} here"
    if "rocm" in _compat.platform_version():
        return "it needs an NVIDIA GPU, and this is one of AMD's"
    path = find()
    if path is None:
        return f"{FILE} is not found: it comes with JAX's packages for CUDA, as by `pip install jax[cuda13]`"
    if version(path) < OLDEST:
        return f"it needs cuDNN 9, and {path} is of version {version(path)}"
    if compiler.find() is None:
        return "its calls are compiled once, and no C++ compiler is found: install one, or name it in CXX"
    return None
