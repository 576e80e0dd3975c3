"""Finds the machine's C++ compiler, and compiles sources to libraries, once, into the cache on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from rnncore.kernels import cache

MISSING = "it needs a C++ compiler, and none is found: install one, or name it in CXX"
FLAGS = ("-std=c++17", "-O2", "-fvisibility=hidden", "-fPIC", "-shared", "-w")
"""For sources whose time does not matter."""
LIMIT = 300.0
"""Seconds after which a compiler is given up; it usually takes six."""

_log = logging.getLogger("rnncore")


class CompilerError(RuntimeError):
    """The compiler rejected generated source, or timed out; the message has its command and output."""


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


def require() -> tuple[str, ...]:
    """`find`, or CompilerError where there is none."""
    command = find()
    if command is None:
        raise CompilerError(MISSING)
    return command


def digest(*parts: str) -> str:
    """A hash of everything that a compiled file depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.cache
def version(command: Sequence[str]) -> str:
    """The version that a compiler reports."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"`{shlex.join(command)} --version` does not answer: {error}") from error


def api_version(include: Path) -> str:
    """The version of XLA's interface, which a library has to be compiled for exactly, of the headers of a jaxlib."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    return ".".join(re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", text))


def library(source: str, what: str) -> tuple[ctypes.CDLL, str]:
    """A source of calls that XLA can make, compiled and loaded; and its key."""
    command = require()
    key = digest(source, *FLAGS, *command, version(command), api_version(Path(jax.ffi.include_dir())))
    return load(key, lambda to: compile_to(to, source, (*command, *FLAGS), what)), key


def load(key: str, make: Callable[[Path], object], read: Callable[[Path], Any] = cache.library) -> Any:
    """`cache.load`, or a temporary file for this process alone if the cache cannot be written."""
    try:
        return cache.load(key, make, read)
    except OSError as error:
        _log.info("nothing can be kept in %s (%s): this process compiles for itself", cache.directory(), error)
        with tempfile.TemporaryDirectory(prefix="rnncore-") as alone:
            made = Path(alone) / "made.so"
            make(made)
            return read(made)  # once loaded, the file is not needed


def compile_to(to: Path, source: str, command: Sequence[str], what: str, *folders: str | Path) -> None:
    """Compiles a source, in the directory of the result; `folders` have headers besides XLA's."""
    text = to.with_suffix(".cc")
    text.write_text(source)
    headers = [f"-I{folder}" for folder in (*folders, jax.ffi.include_dir())]
    whole = [*command, *headers, str(text), "-o", str(to)]
    _log.info("compiling %s: %s", what, shlex.join(whole))
    # Its temporary files are removed with this directory.
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
    """Kills a compiler and its child processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
