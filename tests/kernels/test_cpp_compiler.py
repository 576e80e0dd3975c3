"""The compiler behind backend "cpp", and what is kept of it and loaded into the process."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from rnncore.kernels import cache, compiler
from rnncore.kernels.cpp import handlers, prebuild

pytestmark = pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that does not exist yet, and nothing compiled in this process."""
    where = tmp_path / "cache"
    monkeypatch.setenv("RNNCORE_CACHE_DIR", str(where))
    monkeypatch.setattr(handlers, "HANDLERS", ())
    forget(monkeypatch)
    return where


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would be."""
    monkeypatch.setattr(handlers, "_names", {})
    monkeypatch.setattr(handlers, "_failed", {})


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of the compiler, as they come."""
    found: list[list[str]] = []
    original = subprocess.Popen

    def popen(command: list[str], *args: Any, **options: Any) -> Any:
        if "-shared" in command:
            found.append(command)
        return original(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    return found


def program(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o700)
    return path


def libraries(where: Path) -> list[Path]:
    return sorted(where.glob("*.so"))


def test_compiled_once_and_kept(fresh: Path, commands: list, monkeypatch: pytest.MonkeyPatch, capfd: Any):
    handlers.targets("int one;", "LSTM(8)")
    assert len(commands) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "compiling LSTM(8)" in said and str(fresh) in said and "RNNCORE_CPP=0" in said
    forget(monkeypatch)
    handlers.targets("int one;")
    assert len(commands) == 1 and capfd.readouterr().err == ""
    handlers.targets("int two;")
    assert len(commands) == 2
    forget(monkeypatch)
    monkeypatch.setattr(handlers, "_processor", lambda: "another one")
    handlers.targets("int two;")
    assert len(commands) == 3


def test_what_is_kept_is_for_its_user_alone(fresh: Path):
    before = os.umask(0)
    try:
        handlers.targets("int one;")
    finally:
        os.umask(before)
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
    assert libraries(fresh)[0].stat().st_mode & 0o777 == 0o600


def to_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(path, 4321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4321)


@pytest.mark.parametrize("which", ["directory", "file"])
def test_what_belongs_to_somebody_else_is_refused(fresh: Path, which: str, monkeypatch: pytest.MonkeyPatch):
    handlers.targets("int one;")
    path = fresh if which == "directory" else libraries(fresh)[0]
    to_another_user(path, monkeypatch)
    forget(monkeypatch)
    with pytest.raises(cache.UntrustedError, match=rf"the {which} {path} belongs to user"):
        handlers.targets("int one;")


@pytest.mark.parametrize("which", ["directory", "file"])
@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_what_others_can_write_is_refused(fresh: Path, which: str, mode: int, monkeypatch: pytest.MonkeyPatch):
    handlers.targets("int one;")
    path = fresh if which == "directory" else libraries(fresh)[0]
    path.chmod(mode)
    forget(monkeypatch)
    with pytest.raises(cache.UntrustedError, match=rf"the {which} {path} can be written by others .mode {mode:04o}"):
        handlers.targets("int one;")


@pytest.mark.parametrize("contents", [b"", b"no library", None], ids=["empty", "foreign", "truncated"])
def test_a_file_that_is_not_whole_is_made_again(
    fresh: Path, commands: list, contents: bytes | None, monkeypatch: pytest.MonkeyPatch
):
    handlers.targets("int one;")
    path = libraries(fresh)[0]
    whole = path.read_bytes()
    path.unlink()  # not under the feet of this process, which has it loaded
    path.write_bytes(whole[:-100] if contents is None else contents)
    forget(monkeypatch)
    handlers.targets("int one;")
    assert len(commands) == 2 and len(libraries(fresh)) == 1
    forget(monkeypatch)
    handlers.targets("int one;")
    assert len(commands) == 2


def test_a_library_that_cannot_be_loaded_is_made_again(fresh: Path, commands: list, monkeypatch: pytest.MonkeyPatch):
    """Whole, but for another machine."""
    handlers.targets("int one;")
    (path,) = libraries(fresh)
    key = path.name.rpartition("-")[0]
    path.unlink()
    other = fresh / "other"
    other.write_bytes(b"for another machine")
    other.rename(fresh / cache._name(key, other))
    forget(monkeypatch)
    handlers.targets("int one;")
    assert len(commands) == 2 and len(libraries(fresh)) == 1


HANGS = """case "$*" in *--version*) echo 1.0; exit;; esac
sleep 300 &
echo $! > "{pid}"
wait
"""


def test_a_compiler_that_hangs_is_given_up(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pid = tmp_path / "pid"
    monkeypatch.setenv("CXX", str(program(tmp_path / "hangs", HANGS.format(pid=pid))))
    monkeypatch.setattr(compiler, "LIMIT", 1.0)
    begin = time.monotonic()
    with pytest.raises(compiler.CompilerError, match="was given up after 1 s"):
        handlers.targets("int one;")
    assert time.monotonic() - begin < 30
    assert not list(fresh.iterdir())  # no folder, no lock
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid.read_text().strip()}").exists() and time.monotonic() < deadline:
        if "zombie" in Path(f"/proc/{pid.read_text().strip()}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert time.monotonic() < deadline, "what the compiler called goes on"


def test_a_compiler_that_does_not_say_its_version(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "none"
    path.write_text("no program")
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(compiler.CompilerError, match="none --version` does not answer"):
        handlers.targets("int one;")


def test_what_the_compiler_says_is_passed_on(fresh: Path):
    with pytest.raises(compiler.CompilerError, match=r"(?s)-O3.*ended with 1.*error"):
        handlers.targets("this is no C++")
    assert not list(fresh.iterdir())


def test_an_interrupted_compilation_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(self: Any, timeout: float | None = None) -> Any:
        if timeout is not None:
            raise KeyboardInterrupt
        return original(self)

    original = subprocess.Popen.communicate
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handlers.targets("int one;")
    assert not list(fresh.iterdir())


def test_what_a_killed_process_left_is_removed(fresh: Path):
    old, new = fresh / "making-old", fresh / "making-new"
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "made.so").write_text("")
    fresh.chmod(0o700)
    os.utime(old, (0, 0))
    handlers.targets("int one;")
    assert not old.exists() and new.exists()


def test_what_is_kept_needs_no_compiler(fresh: Path, commands: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    why = "it needs a C.. compiler, and none is found: install one, or name it in CXX"
    with pytest.raises(compiler.CompilerError, match=why):
        handlers.targets("int one;")
    assert handlers.missing("int one;") == why.replace("..", "++") and not fresh.exists()
    monkeypatch.delenv("CXX")
    handlers.targets("int one;")
    forget(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    handlers.targets("int one;")
    assert handlers.missing("int one;") is None and len(commands) == 1


def test_arguments_in_CXX(fresh: Path, commands: list, monkeypatch: pytest.MonkeyPatch):
    found = compiler.find()
    assert found is not None
    monkeypatch.setenv("CXX", f"{found[0]} -DONE='int one'")
    handlers.targets("ONE;")
    assert commands[0][:2] == [found[0], "-DONE=int one"]
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert compiler.find() is None


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch):
    for value, off in (("0", True), ("off", True), ("1", False), ("", False)):
        monkeypatch.setenv("RNNCORE_CPP", value)
        assert handlers.turned_off() == off
    monkeypatch.delenv("RNNCORE_CPP")
    assert not handlers.turned_off()


@pytest.mark.parametrize("why", ["no directory", "no home", "full"])
def test_where_nothing_can_be_kept(
    fresh: Path, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A loop that was named is compiled for the process; one that nobody named is not made."""
    if why == "no directory":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RNNCORE_CACHE_DIR", str(tmp_path / "file" / "below"))
    elif why == "no home":
        monkeypatch.delenv("RNNCORE_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
    else:

        def full(*args: Any, **options: Any) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", full)
    with caplog.at_level(logging.WARNING, "rnncore"):
        reason = handlers.why_not("int one;", "LSTM(8)")
        assert reason is not None and "RNNCORE_CACHE_DIR" in reason
        assert handlers.why_not("int one;", "LSTM(8)") == reason
    assert len(caplog.records) == 1 and "runs LSTM(8) as a scan" in caplog.text  # said once
    if why == "full":
        with pytest.raises(OSError, match="No space left"):
            handlers.targets("int one;")
        return
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    handlers.targets("int one;")
    assert not list(tmp_path.glob("rnncore-*"))


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RNNCORE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/rnncore")
    monkeypatch.setenv("RNNCORE_CACHE_DIR", "/there")
    assert cache.directory() == Path("/there")


TOGETHER = """
import importlib.util, pathlib, subprocess, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)

def make(to):
    with open(sys.argv[3], "a") as log:
        log.write("made\\n")
    text = to.with_suffix(".cc")
    text.write_text('extern "C" int one() { return 1; }')
    subprocess.run([sys.argv[2], "-shared", "-fPIC", str(text), "-o", str(to)], check=True)

assert cache.load("key", make).one() == 1
"""


def test_eight_processes_at_once(fresh: Path, tmp_path: Path):
    log, found = tmp_path / "log", compiler.find()
    assert found is not None
    command = [sys.executable, "-c", TOGETHER, cache.__file__, found[0], str(log)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert log.read_text() == "made\n" and len(libraries(fresh)) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in handlers.LEVELS, reason="for Linux")
def test_what_came_with_the_package_is_taken(
    fresh: Path, tmp_path: Path, commands: list, monkeypatch: pytest.MonkeyPatch
):
    shipped = tmp_path / "prebuilt"
    monkeypatch.setattr(handlers, "PREBUILT", shipped)
    level = list(handlers.LEVELS[platform.machine()])[-1]
    monkeypatch.setattr(handlers, "levels_here", lambda: [level])
    include = jax.ffi.include_dir()
    prebuild.build({"one": "int one;"}, [level], [include], shipped)
    assert len(commands) == 1
    handlers.targets("int one;")
    assert len(commands) == 1 and not fresh.exists()
    for change in (
        lambda: monkeypatch.setattr(handlers, "levels_here", lambda: []),  # a CPU that lacks it
        lambda: monkeypatch.setattr(compiler, "api_version", lambda include: "0.0"),  # another interface
    ):
        forget(monkeypatch)
        change()
        handlers.targets("int one;")
    assert len(commands) == 2  # the second finds what the first one kept
    forget(monkeypatch)
    handlers.targets("int two;")
    assert len(commands) == 3


def test_the_levels_of_a_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    v3 = "flags : fpu sse2 avx avx2 fma f16c bmi1 bmi2 movbe"
    for flags, levels in (
        ("flags : fpu sse2", []),
        (v3, ["x86-64-v3"]),
        (v3 + " avx512f avx512bw avx512cd avx512dq avx512vl", ["x86-64-v4", "x86-64-v3"]),
    ):
        monkeypatch.setattr(handlers, "_cpu_lines", lambda flags=flags: (flags,))
        assert handlers.levels_here() == levels


def test_the_version_of_the_interface():
    assert compiler.api_version(Path(jax.ffi.include_dir())).count(".") == 1
