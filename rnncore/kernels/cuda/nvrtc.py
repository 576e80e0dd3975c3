"""Compiles CUDA C++ to machine code with NVRTC, which comes with JAX's CUDA packages; cached on disk as C++ is."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from rnncore.kernels import compiler

HEADERS = Path(__file__).parent
OPTIONS = ("-std=c++17", "--device-as-default-execution-space")
MISSING = "it needs NVRTC, which `pip install jax[cuda13]` brings, and none is found"
_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib", "cu13/bin", "cuda_nvrtc/bin")
_VERSIONS = ("13", "12")

_log = logging.getLogger("rnncore")
_lock = threading.RLock()


class NvrtcError(RuntimeError):
    """NVRTC is missing or rejected generated source; the message has its output."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC from JAX's CUDA packages, else from a CUDA toolkit; None if there is none."""
    for path in _candidates():
        try:
            folder = Path(path).parent
            # NVRTC opens this one by its bare name, which resolves to the loaded library.
            for part in sorted(folder.glob("libnvrtc-builtins.so.*")) if folder.name else []:
                if part.suffix != ".alt":
                    ctypes.CDLL(str(part))
            return ctypes.CDLL(path)
        except OSError as error:
            _log.debug("%s cannot be loaded: %s", path, error)
    return None


def _required() -> ctypes.CDLL:
    nvrtc = library()
    if nvrtc is None:
        raise NvrtcError(MISSING)
    return nvrtc


def _candidates() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or []) if spec] if spec else []
    folders = [root / folder for root in roots for folder in _FOLDERS]
    for variable in ("CUDA_PATH", "CUDA_HOME", "CUDA_ROOT"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]) / "lib64")
    folders.append(Path("/usr/local/cuda/lib64"))
    names = [f"libnvrtc.so.{version}" for version in _VERSIONS]
    found = [str(folder / name) for folder in folders for name in names if (folder / name).exists()]
    return found + names


def code_for(source: str, capability: int, what: str = "a cell") -> tuple[bytes, str]:
    """(machine code, its key) of a generated file, for a compute capability times ten; compiled where it has not been.

    Raises:
      NvrtcError: there is no NVRTC, or it refuses the file.
      cache.UntrustedError: somebody else can write where compiled files are kept.
    """
    with _lock:
        return _code_for(source, capability, what)


@functools.cache
def try_out(capability: int) -> None:
    """Compiles an empty kernel, as a check.

    Raises:
      NvrtcError: there is no NVRTC, or it does not know the GPU.
    """
    compile_source('extern "C" __global__ void nothing() {}', capability)


@functools.lru_cache(maxsize=256)
def _code_for(source: str, capability: int, what: str) -> tuple[bytes, str]:
    version = ".".join(map(str, _version()))
    key = compiler.digest(source, _headers(), *OPTIONS, str(capability), version)

    def make(to: Path) -> None:
        print(f"rnncore: compiling {what} for this GPU, once, in a few seconds", file=sys.stderr, flush=True)
        to.write_bytes(compile_source(source, capability))

    return compiler.load(f"cubin-{key}", make, Path.read_bytes), key


def compile_source(source: str, capability: int) -> bytes:
    """Machine code; for a GPU newer than this NVRTC, PTX, which the driver compiles."""
    return _compiled(source, capability, ())[0]


def figures(source: str, capability: int) -> dict[str, int]:
    """What the compiler reports of a kernel: registers per thread, and bytes spilled."""
    said = _compiled(source, capability, ("--ptxas-options=-v",))[1]
    found = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", said)
    registers = re.findall(r"Used (\d+) registers", said)
    return {name: int(count) for count, name in found} | {"registers": int(registers[0])}


def _compiled(source: str, capability: int, more: Sequence[str]) -> tuple[bytes, str]:
    nvrtc = _required()
    known = [n for n in _capabilities(nvrtc) if n <= capability]
    if not known:
        raise NvrtcError(f"NVRTC {'.'.join(map(str, _version()))} knows no GPU of compute capability {capability / 10}")
    exact = known[-1] == capability
    options = [f"--gpu-architecture={'sm' if exact else 'compute'}_{known[-1]}", *OPTIONS, *more]
    headers = {path.name: path.read_bytes() for path in sorted(HEADERS.glob("*.cuh"))}
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    _succeed(
        nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"cell.cu", len(headers), texts, names)
    )
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        refused = nvrtc.nvrtcCompileProgram(program, len(options), given)
        said = _bytes(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if refused:
            shown = "\n".join(said.splitlines()[:20])
            raise NvrtcError(f"NVRTC {' '.join(options)} refused what rnncore wrote:\n{shown}")
        return _bytes(nvrtc, program, "CUBIN" if exact else "PTX"), said
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw


def _succeed(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(code).decode()}")


def _capabilities(nvrtc: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    _succeed(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _succeed(nvrtc, nvrtc.nvrtcGetSupportedArchs(found))
    return sorted(found)


@functools.cache
def _version() -> tuple[int, int]:
    nvrtc, major, minor = _required(), ctypes.c_int(), ctypes.c_int()
    _succeed(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted(HEADERS.glob("*.cuh")))
