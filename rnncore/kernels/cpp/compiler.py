"""C++ to calls that XLA can make: compiled by the compiler that is there, once, and kept on the disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
import jaxlib

from rnncore.kernels.cpp import cache

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
LIMIT = 300.0
"""Seconds after which a compiler is given up; it usually takes six."""

_log = logging.getLogger("rnncore")
_lock = threading.RLock()
_failed: dict[str, str] = {}


class CompilerError(RuntimeError):
    """The compiler refused what rnncore wrote, or was not heard of again; the message has its command and its words."""


def turned_off() -> bool:
    """Whether RNNCORE_CPP=0 is set."""
    return os.environ.get("RNNCORE_CPP", "").strip().lower() in ("0", "false", "off", "no")


def find() -> tuple[str, ...] | None:
    """The C++ compiler, as a command: what CXX names, with its arguments, else c++, g++ or clang++; None for none."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        _log.warning("CXX=%r is no command (%s), so that rnncore compiles nothing", os.environ["CXX"], error)
        return None
    for program, *arguments in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(program)
        if path:
            return (path, *arguments)
    return None


def targets(source: str, what: str = "a cell") -> dict[str, str]:
    """The names under which XLA finds the handlers of a source: compiled where they have not been yet.

    Args:
      source: the whole file.
      what: it is of, for messages.

    Raises:
      CompilerError: there is no compiler, or it fails.
      cache.UntrustedError: somebody else can write where compiled files are kept.
    """
    with _lock:
        return _registered(source, what)


def why_not(source: str, what: str = "a cell") -> str | None:
    """Reason why a source cannot be compiled and kept here, or None; it is compiled, and said so once where it fails.

    This is for a loop that nobody named: where a compiled file could not be kept, every process would compile it again.
    """
    with _lock:
        if source in _failed:
            return _failed[source]
        try:
            _registered(source, what, keep=True)
            return None
        except (CompilerError, cache.UntrustedError, OSError) as error:
            _failed[source] = str(error)
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
    with _lock:
        if source in _names or find() is not None:
            return None
        try:
            _registered(source, "a cell", keep=True)
            return None
        except (CompilerError, cache.UntrustedError, OSError) as error:
            return str(error)


_names: dict[str, dict[str, str]] = {}
_taken: set[str] = set()


def _registered(source: str, what: str, keep: bool = False) -> dict[str, str]:
    if source not in _names:
        library, key = _library(source, what, keep)
        names = {}
        for handler in HANDLERS:
            name = names[handler] = f"rnncore_{handler}_{key}"
            if name not in _taken:  # a process registers a name once
                function = jax.ffi.pycapsule(getattr(library, f"rnn_{handler}"))
                jax.ffi.register_ffi_target(name, function, platform="cpu")
                _taken.add(name)
        _names[source] = names
    return _names[source]


def _library(source: str, what: str, keep: bool) -> tuple[ctypes.CDLL, str]:
    """The loaded file of a source and its key: what came with the package, what is kept, or what is compiled now."""
    shipped = _shipped(source)
    if shipped is not None:
        return shipped
    command = find()
    key = key_of(source, *FLAGS, jaxlib.__version__, _processor())
    if command is None:
        found = cache.find(f"{key}-")  # whichever compiler made it
        if found is None:
            raise CompilerError("it needs a C++ compiler, and none is found: install one, or name it in CXX")
        return found, key
    by = hashlib.sha256("\0".join([*command, _version(command)]).encode()).hexdigest()[:8]

    def make(to: Path) -> None:
        _announce(what, to)
        compile_to(to, source, (*command, *FLAGS), what)

    try:
        return cache.load(f"{key}-{by}", make), key
    except OSError as error:
        if keep:
            where = cache.directory() or "a home directory that does not exist"
            why = f"nothing can be kept in {where} ({error}): name another place in RNNCORE_CACHE_DIR"
            raise CompilerError(why) from error
        _log.info("nothing can be kept in %s (%s): this process compiles for itself", cache.directory(), error)
        with tempfile.TemporaryDirectory(prefix="rnncore-") as alone:
            made = Path(alone) / "made.so"
            make(made)
            return ctypes.CDLL(str(made)), key  # loaded, it needs no name


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
        key = key_of(source, level, api_version(Path(jax.ffi.include_dir())))
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


def api_version(include: Path) -> str:
    """The version of XLA's interface, which a library has to be compiled for exactly, of the headers of a jaxlib."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    return ".".join(re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", text))


def key_of(source: str, *rest: str) -> str:
    """A name for all that a compiled file depends on."""
    return hashlib.sha256("\0".join([source, _headers(), *rest]).encode()).hexdigest()[:24]


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))


@functools.cache
def _version(command: Sequence[str]) -> str:
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"`{shlex.join(command)} --version` does not answer: {error}") from error


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


def plain_library(source: str, what: str) -> tuple[ctypes.CDLL, str]:
    """A source that is no cell's, such as calls of another library, compiled and loaded; and its key."""
    command = find()
    if command is None:
        raise CompilerError("it needs a C++ compiler, and none is found: install one, or name it in CXX")
    flags = ("-std=c++17", "-O2", "-fvisibility=hidden", "-fPIC", "-shared", "-w")
    parts = [source, *flags, *command, _version(command), api_version(Path(jax.ffi.include_dir()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def make(to: Path) -> None:
        compile_to(to, source, (*command, *flags), what)

    try:
        return cache.load(key, make), key
    except OSError:
        with tempfile.TemporaryDirectory(prefix="rnncore-") as alone:
            made = Path(alone) / "made.so"
            make(made)
            return ctypes.CDLL(str(made)), key  # loaded, it needs no name


def compile_to(to: Path, source: str, command: Sequence[str], what: str, include: str | None = None) -> None:
    """Compiles a source, in the directory of the result."""
    text = to.with_suffix(".cc")
    text.write_text(source)
    whole = [*command, f"-I{HEADERS}", f"-I{include or jax.ffi.include_dir()}", str(text), "-o", str(to)]
    _log.info("compiling %s: %s", what, shlex.join(whole))
    # What it puts into TMPDIR goes when the directory goes.
    environment = os.environ | {"TMPDIR": str(to.parent)}
    try:
        process = subprocess.Popen(
            whole, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise CompilerError(f"{shlex.join(whole)}\ncould not be started: {error}") from error
    try:
        said = process.communicate(timeout=LIMIT)[1]
    except subprocess.TimeoutExpired:
        _kill(process)
        raise CompilerError(f"{shlex.join(whole)}\nwas given up after {LIMIT:.0f} s.") from None
    except BaseException:
        _kill(process)
        raise
    if process.returncode:
        shown = "\n".join(said.splitlines()[:20])
        raise CompilerError(f"{shlex.join(whole)}\nended with {process.returncode}:\n{shown}")


def _kill(process: subprocess.Popen) -> None:
    """Ends a compiler and the programs that it calls."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
