"""C++ to calls that XLA can make: compiled by the compiler that is there, once, and kept on the disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib

HEADERS = Path(__file__).parent
# Clang for ARM, Apple's for one, has no -march=native.
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (
    "-std=c++17", "-O3", NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fvisibility=hidden", "-fPIC", "-shared", "-w",
)  # fmt: skip
HANDLERS = ("forward", "forward_keeping", "backward")

_log = logging.getLogger("rnncore")
_lock = threading.Lock()


class CompilerError(RuntimeError):
    """The compiler refused what rnncore wrote; the message has its command and its words."""


def find() -> str | None:
    """The C++ compiler: what CXX names, else c++, g++ or clang++; None where there is none."""
    named = os.environ.get("CXX")
    return next((path for path in map(shutil.which, [named] if named else ["c++", "g++", "clang++"]) if path), None)


def cache_directory() -> Path:
    """Where compiled files are kept: RNNCORE_CACHE_DIR, else rnncore in the user's cache directory."""
    named = os.environ.get("RNNCORE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnncore"


def targets(source: str) -> dict[str, str]:
    """The names under which XLA finds the handlers of a source: compiled where they have not been yet."""
    with _lock:
        return _registered(source)


@functools.cache
def _registered(source: str) -> dict[str, str]:
    path = library(source)
    handlers = ctypes.CDLL(str(path))
    names = {}
    for handler in HANDLERS:
        names[handler] = f"rnncore_{handler}_{path.stem}"
        function = jax.ffi.pycapsule(getattr(handlers, f"rnn_{handler}"))
        jax.ffi.register_ffi_target(names[handler], function, platform="cpu")
    return names


def library(source: str) -> Path:
    """A source as a shared library, compiled where it has not been yet; named after all that it depends on."""
    compiler = find()
    if compiler is None:
        raise CompilerError("no C++ compiler: install one, or name it in CXX.")
    path = cache_directory() / f"{_key(source, compiler)}.so"
    return path if path.exists() else _compile(source, compiler, path)


def _key(source: str, compiler: str) -> str:
    """A name for all that the compiled file depends on."""
    parts = [source, *FLAGS, compiler, _version(compiler), jaxlib.__version__, _processor()]
    parts += [path.read_text() for path in sorted(HEADERS.glob("*.h"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """What NATIVE stands for: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(source: str, compiler: str, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # a home that cannot be written: this process compiles for itself
        directory = tempfile.mkdtemp(prefix="rnncore-")
        path = Path(directory) / path.name
    made, text = Path(directory) / "made.so", Path(directory) / "cell.cc"
    text.write_text(source)
    command = [compiler, *FLAGS, f"-I{HEADERS}", f"-I{jax.ffi.include_dir()}", str(text), "-o", str(made)]
    _log.info("compiling a cell: %s", " ".join(command))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        said = "\n".join(run.stderr.splitlines()[:20])
        raise CompilerError(f"{' '.join(command)}\nended with {run.returncode}:\n{said}")
    os.replace(made, path)  # whole or not at all, whoever else compiles the same
    if path.parent != Path(directory):
        shutil.rmtree(directory, ignore_errors=True)
    return path
