"""Settings that hold for every test."""

import os

# The interpreter of GPU kernels holds a thread of XLA's pool for every thread that waits at a barrier:
# with a pool of two, one waits for the other for ever.
os.environ.setdefault("NPROC", "16")

# The matrices are small, and the tests run in as many processes as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Every cell and dtype would be compiled; test_cpp.py names the backend, test_cpp_choice.py is about choosing it.
os.environ.setdefault("RNNCORE_CPP", "0")

from typing import Any  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

import rnncore.sequence  # noqa: E402

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """Programs of a finished module are let go: some thousand at once exhaust a process's memory maps."""
    yield
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


def pytest_configure(config: pytest.Config) -> None:
    """Many tests are about cells under Flax's scan; test_explain_modules.py is about the warning."""
    config.addinivalue_line("filterwarnings", "ignore::rnncore.SlowPathWarning")
