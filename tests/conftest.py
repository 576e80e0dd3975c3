"""Settings that hold for every test."""

import os
import random

# The interpreter of GPU kernels holds a thread of XLA's pool for every thread that waits at a barrier:
# with a pool of two, one waits for the other endlessly.
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


AROUND = ("benchmarks", "docs", "examples")
"""Folders of tests of what stands around the library: scripts, and the code in documents and docstrings."""
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
    parser.addoption("--all", action="store_true", help="every case, and the documents, examples and benchmarks")
    parser.addoption("--draw", type=int, metavar="SEED", help="as --all, but a third of what it adds, as CI does")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of what stands around the library wait for `--all` or `--draw`, or for being named, or their folder."""
    asked = config.getoption("--all") or config.getoption("--draw") is not None
    waits = collection_path.parent.name in AROUND and not asked
    return (waits and not named(config) & {collection_path, collection_path.parent}) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--all`, of the tests that compile much: none that is marked `slow` or `ci`, some cases of a `sample`."""
    if config.getoption("--all"):
        return
    files, seed = named(config), config.getoption("--draw")
    plain = seed is None and files == {config.rootpath / "tests"}
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[pytest.Item] = set()
    for name, same in cases.items():
        ci, slow, sample = (same[0].get_closest_marker(mark) for mark in ("ci", "slow", "sample"))
        if ci and plain:
            continue
        if same[0].path in files or not (slow or sample):
            left |= {*same}
        elif sample and isinstance(sample.args[0], int):
            left |= {*random.Random(name).sample(same, min(sample.args[0], len(same)))}
        elif sample:
            left |= {item for item in same if item.name.partition("[")[2][:-1] in sample.args}
    if seed is not None:
        # By name, for all processes have to draw the same.
        left |= {item for item in items if random.Random(f"{seed} {item.nodeid}").random() < 1 / 3}
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = [item for item in items if item in left]


def named(config: pytest.Config) -> set[Path]:
    """The files and folders on the command line; all tests of a file that is named run."""
    return {(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args}


def pytest_configure(config: pytest.Config) -> None:
    """Many tests are about cells under Flax's scan; test_explain_modules.py is about the warning."""
    config.addinivalue_line("filterwarnings", "ignore::rnncore.SlowPathWarning")
    config.addinivalue_line("markers", "slow: runs with --all, or where its file is named")
    config.addinivalue_line("markers", "ci: as slow, and in CI, and where a folder or file is named")
    config.addinivalue_line("markers", "sample(n, or ids): n of its cases, or these, unless --all or its file is named")
