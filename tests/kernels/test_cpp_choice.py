"""When backend "cpp" is chosen without being named, and what happens where it cannot be."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore.kernels import compiler
from rnncore.kernels.cpp import handlers
from rnncore.sequence import call

pytestmark = pytest.mark.skipif(compiler.find() is None, reason="no C++ compiler here")

CASE = cases.BY_ID["lstm-dense"]
PROBLEM = cases.draw(CASE)
run = functools.partial(rnncore.unroll, CASE.cell, PROBLEM.params, PROBLEM.xs)
explain = functools.partial(rnncore.explain_backend, CASE.cell, PROBLEM.params, PROBLEM.xs)


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As for a user, in a new process with an empty cache."""
    monkeypatch.delenv("RNNCORE_CPP")
    monkeypatch.setenv("RNNCORE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(handlers, "_names", {})
    monkeypatch.setattr(handlers, "_failed", {})
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user whose cell has been compiled."""
    monkeypatch.delenv("RNNCORE_CPP")
    run(backend="cpp")


def forget() -> None:
    cases.forget()


@pytest.mark.slow
def test_it_is_chosen_and_said_once(on: Path, capfd: Any):
    choice = explain()
    assert choice.name == "cpp" and not list(on.iterdir()) and capfd.readouterr().err == ""
    _, ys = run()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "compiling LSTM (float64)" in said and "RNNCORE_CPP=0" in said and str(on) in said
    assert len(list(on.glob("*.so"))) == 1
    np.testing.assert_allclose(ys, run(backend="scan")[1], atol=1e-12)
    run(reverse=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["turned off", "no compiler"])
def test_silently_the_scan(on: Path, how: str, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any):
    if how == "turned off":
        monkeypatch.setenv("RNNCORE_CPP", "0")
    else:
        monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "rnncore"):
        assert explain().name == "scan"
        run()
    assert not list(on.iterdir()) and capfd.readouterr() == ("", "") and not caplog.records
    why = explain().rejected["cpp"]
    assert ("RNNCORE_CPP" if how == "turned off" else "none is found: install one, or name it in CXX") in why


def test_a_compiler_that_fails(on: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    """Said once; where it is named it is an error."""
    compiler_that_fails = on.parent / "fails"
    compiler_that_fails.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    compiler_that_fails.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler_that_fails))
    with caplog.at_level(logging.WARNING, "rnncore"):
        run()
        run(reverse=True)
    assert len(caplog.records) == 1 and "runs LSTM (float64) as a scan" in caplog.text and "broken" in caplog.text
    assert explain().name == "scan" and "broken" in explain().rejected["cpp"]
    with pytest.raises(compiler.CompilerError, match="ended with 3"):
        run(backend="cpp")


def test_a_directory_that_others_can_write(on: Path, caplog: Any):
    on.chmod(0o777)
    with caplog.at_level(logging.WARNING, "rnncore"):
        run()
    assert len(caplog.records) == 1 and f"the directory {on} can be written by others" in caplog.text


def request(**options: Any) -> Any:
    return call._prepare(CASE.cell, PROBLEM.params, PROBLEM.xs, call.Options(**options))[0]


def test_several_devices_leave_it_to_those_who_name_it(known: None):
    several = dataclasses.replace(request(), devices=2)
    assert call.choose(several, None).name == "scan"
    assert "sharded over devices" in call.choose(several, None).rejected["cpp"]
    assert call.choose(several, "cpp").name == "cpp"


def test_the_choice_takes_no_time(known: None):
    one = request()
    call.choose(one, None, prepare=True)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        assert call.choose(one, None, prepare=True).name == "cpp"
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3, times


def test_what_is_exported_runs_elsewhere(known: None):
    """A program with this machine's code in it could not be kept: the scan is exported, its gradient too."""

    def loss(params: Any, xs: Any) -> Any:
        return jnp.sum(rnncore.unroll(CASE.cell, params, xs)[1] ** 2)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    assert "rnncore_backward" in step.lower(PROBLEM.params, PROBLEM.xs).as_text()
    exported = jax.export.export(step, platforms=("cpu", "tpu"))(PROBLEM.params, PROBLEM.xs)
    assert "custom_call @rnncore" not in exported.mlir_module()
    mapped = jax.export.export(jax.jit(jax.vmap(step, (None, 0))))(PROBLEM.params, PROBLEM.xs[:, None])
    want = step(PROBLEM.params, PROBLEM.xs)
    cases.assert_close(exported.call(PROBLEM.params, PROBLEM.xs), want, cases.FLOAT64)
    total = jax.tree.map(lambda a: a.sum(0), mapped.call(PROBLEM.params, PROBLEM.xs[:, None]))
    cases.assert_close(total[:1] + total[1][:1], want[:1] + want[1][:1], cases.FLOAT64)
