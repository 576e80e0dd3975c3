"""Mosaic's kernels compiled to machine code without a GPU: figures that may not grow, and what ptxas says of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_code import __main__ as command
from benchmarks.gpu_code import compiler, lowering
from benchmarks.gpu_code.compiler import Figures
from rnncore import _pallas

SAID = """ptxas info    : Compiling entry function 'flat_mosaic_gpu_kernel' for 'sm_90a'
    272 bytes stack frame, 260 bytes spill stores, 292 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
"""
MISSING = compiler.find()


def test_what_ptxas_and_the_log_of_the_passes_say(tmp_path):
    log = tmp_path / "log"
    log.write_text("gpu.launch dynamic_shared_memory_size %x {\n  dynamic_shared_memory_size %c180272_i32 {\n")
    assert compiler.read(SAID, log) == Figures(registers=255, spilled=552, stack=272, shared=180272)
    with pytest.raises(RuntimeError, match="something else"):
        compiler.read("ptxas info: nothing", log)
    log.write_text("")
    with pytest.raises(RuntimeError, match="no size of shared memory"):
        compiler.read(SAID, log)


def test_a_figure_that_has_grown_is_said_and_one_that_has_shrunk_is_not():
    before = {"a, forward": [60, 0, 0, 1000]}
    assert command.grown({"a, forward": [59, 0, 0, 1000]}, before) == []
    [told] = command.grown({"a, forward": [60, 4, 0, 1000]}, before)
    assert told == "a, forward: spilled have grown from 0 to 4"
    assert "not recorded" in command.grown({"b, forward": [1, 0, 0, 1]}, before)[0]


def test_every_kernel_has_a_record_for_each_version():
    recorded = json.loads(command.RECORDED.read_text())
    names = {f"{name}, {way}" for name in lowering.KERNELS for way in command.WAYS}
    assert recorded and all(set(found) == names for found in recorded.values())
    assert all(len(figures) == len(Figures._fields) for found in recorded.values() for figures in found.values())


def test_kernels_are_lowered_without_a_gpu():
    modules = lowering.modules(lowering.CHECKS[0], steps=4)
    assert len(modules) == 2 and all(len(module) > 1000 for module in modules)


@pytest.mark.skipif(isinstance(MISSING, str), reason=str(MISSING))
@pytest.mark.skipif(not _pallas.can_interpret_gpu(), reason="Mosaic's compiler is called as JAX 0.11 and newer have it")
def test_the_first_kernels_are_compiled_and_have_not_grown(capsys):
    assert command.main(["--check", "--first", "1"]) == 0
    printed = capsys.readouterr().out
    assert "LSTM 64x12" in printed and ("no figure has grown" in printed or "nothing recorded for" in printed)
