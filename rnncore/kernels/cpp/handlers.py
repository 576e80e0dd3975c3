"""The calls of a cell: compiled by the compiler that is there, once, and kept on the disk, or from the package."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys
import threading
from pathlib import Path

import jax
import jaxlib

from rnncore.kernels import cache, compiler, ffi

HEADERS = Path(__file__).parent
PREBUILT = HEADERS / "prebuilt"
"""Cells that came with the package compiled, see `prebuild.py`; most installations have none."""
# Clang for ARM, Apple's for one, has no -march=native.
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
LEVELS = {
    "x86_64": {
        "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v3": "avx2 fma f16c bmi1 bmi2 movbe",
    },
    "aarch64": {"armv8-a": ""},
}  # fmt: skip
"""Machine to the levels that cells are compiled for beforehand, the best first, and the flags of a CPU that has it."""
FLAGS = (
    "-std=c++17", "-O3", NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fvisibility=hidden", "-fPIC", "-shared", "-w",
)  # fmt: skip
HANDLERS = ("forward", "forward_keeping", "backward")

_log = logging.getLogger("rnncore")
_lock = threading.RLock()
_names: dict[str, dict[str, str]] = {}
_failed: dict[str, str] = {}


def turned_off() -> bool:
    """Whether RNNCORE_CPP=0 is set."""
    return os.environ.get("RNNCORE_CPP", "").strip().lower() in ("0", "false", "off", "no")


def targets(source: str, what: str = "a cell", keep: bool = False) -> dict[str, str]:
    """The names under which XLA finds the handlers of a source: compiled where they have not been yet.

    Args:
      source: the whole file.
      what: it is of, for messages.
      keep: fail where the compiled file cannot be kept.

    Raises:
      compiler.CompilerError: there is no compiler, or it fails.
      cache.UntrustedError: somebody else can write where compiled files are kept.
    """
    with _lock:
        if source not in _names:
            library, key = _library(source, what, keep)
            _names[source] = {
                handler: ffi.register(f"rnncore_{handler}_{key}", library, f"rnn_{handler}", "cpu")
                for handler in HANDLERS
            }
        return _names[source]


def why_not(source: str, what: str = "a cell") -> str | None:
    """Reason why a source cannot be compiled and kept here, or None; it is compiled, and said so once where it fails.

    This is for a loop that nobody named: where a compiled file could not be kept, every process would compile it again.
    """
    with _lock:
        if source not in _failed:
            error = _error(source, what)
            if error is None:
                return None
            _failed[source] = error
            _log.warning(
                "rnncore runs %s as a scan, because its C++ loop could not be made: %s\nRNNCORE_CPP=0 turns it off.",
                what, error,
            )  # fmt: skip
        return _failed[source]


def failed(source: str) -> str | None:
    """Why a source could not be compiled when it was last tried, or None."""
    return _failed.get(source)


def missing(source: str) -> str | None:
    """Reason why a source has no handlers here and can get none, or None; nothing is compiled."""
    return None if source in _names or compiler.find() is not None else _error(source, "a cell")


def _error(source: str, what: str) -> str | None:
    try:
        targets(source, what, keep=True)
    except (compiler.CompilerError, cache.UntrustedError, OSError) as error:
        return str(error)
    return None


def _library(source: str, what: str, keep: bool) -> tuple[ctypes.CDLL, str]:
    """The loaded file of a source and its key: what came with the package, what is kept, or what is compiled now."""
    shipped = _shipped(source)
    if shipped is not None:
        return shipped
    command = compiler.find()
    key = key_of(source, *FLAGS, jaxlib.__version__, _processor())
    if command is None:
        found = cache.find(f"{key}-")  # whichever compiler made it
        if found is None:
            raise compiler.CompilerError(compiler.MISSING)
        return found, key
    by = compiler.digest(*command, compiler.version(command))[:8]

    def make(to: Path) -> None:
        _announce(what, to)
        compiler.compile_to(to, source, (*command, *FLAGS), what, HEADERS)

    if not keep:
        return compiler.load(f"{key}-{by}", make), key
    try:
        return cache.load(f"{key}-{by}", make), key
    except OSError as error:
        where = cache.directory() or "a home directory that does not exist"
        why = f"nothing can be kept in {where} ({error}): name another place in RNNCORE_CACHE_DIR"
        raise compiler.CompilerError(why) from error


def _announce(what: str, to: Path) -> None:
    kept = cache.directory() if to.parent.parent == cache.directory() else "memory, for this process alone"
    print(
        f"rnncore: compiling {what} for this CPU, once, usually in 5 to 15 seconds; kept in {kept}. "
        "RNNCORE_CPP=0 or backend='scan' does without.",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _shipped(source: str) -> tuple[ctypes.CDLL, str] | None:
    """What came with the package for a source, this jaxlib and this CPU."""
    if not PREBUILT.is_dir():
        return None
    for level in levels_here():
        key = key_of(source, level, compiler.api_version(Path(jax.ffi.include_dir())))
        path = PREBUILT / f"{key}.so"
        if path.exists():
            try:
                return ctypes.CDLL(str(path)), key
            except OSError as error:  # made for another C library
                _log.info("%s cannot be loaded: %s", path, error)
    return None


def levels_here() -> list[str]:
    """Of LEVELS, those that this CPU has."""
    here = set(" ".join(_cpu_lines()).split())
    return [name for name, flags in LEVELS.get(platform.machine(), {}).items() if set(flags.split()) <= here]


def key_of(source: str, *rest: str) -> str:
    """A name for all that a compiled file depends on."""
    return compiler.digest(source, _headers(), *rest)


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))


def _processor() -> str:
    """What NATIVE stands for: a cache may be shared by machines of several kinds."""
    return "\n".join(_cpu_lines()) or f"{platform.machine()} {platform.processor()}"


@functools.cache
def _cpu_lines() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    return tuple(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
