"""The cache of compiled files on disk: who may own them, since they are loaded into the process, and atomic writes."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # elsewhere processes may make the same file at once, which harms nothing
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("rnncore")

PATIENCE = 330.0
"""Seconds that one process waits for another that makes the same file."""
STALE = 3600.0
"""Seconds after which what a killed process left is removed."""


class UntrustedError(RuntimeError):
    """Another user could have written a file that would be loaded."""


def directory() -> Path | None:
    """RNNCORE_CACHE_DIR, else rnncore in the user's cache directory; None where there is no home."""
    named = os.environ.get("RNNCORE_CACHE_DIR")
    if named:
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "rnncore"
    except RuntimeError:
        return None


def library(path: Path) -> ctypes.CDLL:
    """A file as a library of this process."""
    return ctypes.CDLL(str(path))


def find(key: str) -> ctypes.CDLL | None:
    """The library of a key, if it is on disk; raises UntrustedError if another user can write it."""
    where = directory()
    if where is None or not where.is_dir():
        return None
    _check(where, "directory")
    return _found(where, key, library)


def load(key: str, make: Callable[[Path], object], read: Callable[[Path], Any] = library) -> Any:
    """The file of a key as `read` has it, from the disk or by `make`, which writes it to a path.

    A key may be the beginning of one.  Names have digests of the contents, so that what is not whole is never loaded.

    Raises:
      UntrustedError: somebody else can write it.
      OSError: it cannot be kept.
    """
    where = directory()
    if where is None:
        raise OSError("there is no home directory")
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check(where, "directory")
    found = _found(where, key, read)
    if found is not None:
        return found
    with _turn(where / f"{key}.lock"):
        return _found(where, key, read) or _made(where, key, make, read)  # perhaps another process has made it


def _found(where: Path, key: str, read: Callable[[Path], Any]) -> Any:
    for path in sorted(where.glob(f"{key}*.so")):
        _check(path, "file")
        try:
            if path.name == _name(path.name.rpartition("-")[0], path):
                return read(path)
        except OSError as error:  # for example, built for another machine
            _log.info("%s is made again: %s", path, error)
        path.unlink(missing_ok=True)
    return None


def _made(where: Path, key: str, make: Callable[[Path], object], read: Callable[[Path], Any]) -> Any:
    _remove_stale(where)
    with tempfile.TemporaryDirectory(prefix="making-", dir=where, ignore_cleanup_errors=True) as alone:
        made = Path(alone) / "made.so"
        make(made)
        path = where / _name(key, made)
        made.chmod(0o600)
        os.replace(made, path)  # atomic
    return read(path)


def _name(key: str, path: Path) -> str:
    return f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so"


def _check(path: Path, kind: str) -> None:
    """UntrustedError unless it belongs to this user or root, and no one else can write it."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        whose = f"belongs to user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        whose = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return
    raise UntrustedError(
        f"the {kind} {path} {whose}, and what is in it would be loaded into this process: expected one that user "
        f"{os.getuid()} alone can write. Remove it, or name another place in RNNCORE_CACHE_DIR."
    )


def _remove_stale(where: Path) -> None:
    for left in where.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """A lock: one process makes a file while the others wait, up to a time limit."""
    if fcntl is None:
        yield
        return
    with open(path, "w") as lock:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
