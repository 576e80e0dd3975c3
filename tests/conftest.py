"""Settings that hold for every test."""

import os

# The interpreter of GPU kernels holds a thread of XLA's pool for every thread that waits at a barrier:
# with a pool of two, one waits for the other for ever.
os.environ.setdefault("NPROC", "16")

# The matrices are small, and the tests run in as many processes as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Every cell and dtype would be compiled; test_cpp.py names the backend, test_cpp_choice.py is about choosing it.
os.environ.setdefault("RNNCORE_CPP", "0")

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

import rnncore.sequence  # noqa: E402

jax.config.update("jax_enable_x64", True)


SCRIPTS = (
    "test_benchmark_", "test_example_", "test_front_door", "test_gpu_check", "test_migration",
    "test_analysis_long_runs", "test_analysis_published",
)  # fmt: skip
MAPS = 20_000
"""Memory maps of a process from which on compiled programs are let go; Linux has 65,530 for it, a program takes up to
thirty."""


@pytest.fixture(autouse=True, scope="module")
def forget_compiled(request: pytest.FixtureRequest):
    """What is compiled is kept, for small programs are alike in many modules; not what was made of patched parts."""
    yield
    patched = "monkeypatch" in Path(request.module.__file__).read_text(encoding="utf-8")
    maps = Path("/proc/self/maps")
    if patched or not maps.exists() or maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch) -> list:
    """The functional cells that `rnncore.unroll` was called with."""
    calls: list = []
    original = rnncore.sequence.unroll

    def counted(cell: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(cell)
        return original(cell, *args, **kwargs)

    monkeypatch.setattr(rnncore.sequence, "unroll", counted)
    return calls


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the examples, benchmarks and guides too, as CI does")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of the scripts around the library, and the longest studies, wait for `--all` or for being named."""
    named = any(collection_path.name in argument for argument in config.invocation_params.args)
    return not (config.getoption("--all") or named) and collection_path.name.startswith(SCRIPTS) or None


def pytest_configure(config: pytest.Config) -> None:
    """Many tests are about cells under Flax's scan; test_explain_modules.py is about the warning."""
    config.addinivalue_line("filterwarnings", "ignore::rnncore.SlowPathWarning")
