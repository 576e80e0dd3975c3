"""`python -m benchmarks.gpu_check` on a CPU: parts that hang, fail or are cut short, and what the table says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import run, workloads
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import checks, parts, problems, processes, results, sanitizer, table, times, toolkit
from benchmarks.gpu_check.processes import RECORDS, TIMES, Runner
from benchmarks.report.results import read_runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(tmp_path, monkeypatch):
    monkeypatch.setenv(processes.BEGIN, "0")
    return Runner(tmp_path, tmp_path, 60, {}, [])


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


# ------------------------------------------------------------------------------------------ processes


def test_a_part_that_goes_silent_is_killed_with_its_children(runner, tmp_path):
    child = "import time; time.sleep(60)"
    text = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    begin = time.monotonic()
    assert not runner.run("silent", command=python(text + "; time.sleep(60)"), stall=1.0)
    assert time.monotonic() - begin < 20
    [record] = runner.found("ran")
    assert "nothing new for 1 s" in record["failed"] and record["of"] == "silent" and record["at"] >= 1
    [log] = tmp_path.glob(processes.LOGS)
    pid = int(log.read_text().split()[-1])
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the child is alive")


def test_one_that_talks_is_left_alone_until_its_time_is_up_and_a_failure_is_said(runner):
    talking = "import time\nwhile True: print('x', flush=True); time.sleep(0.1)"
    assert not runner.run("talks", command=python(talking), stall=1.0, limit=5)
    assert not runner.run("fails", command=python("raise SystemExit(3)"))
    assert runner.run("ends", command=python("print(1)"))
    assert [r["failed"] for r in runner.found("ran")][1:] == ["exit status 3", None]
    assert "more than its 5 s" in runner.found("ran")[0]["failed"]


def test_no_part_is_started_without_time(tmp_path):
    late = Runner(tmp_path, tmp_path, processes.RESERVE + 1, {}, [])
    assert not late.run("x", command=python("raise SystemExit"))
    assert late.found("ran")[0]["failed"] == "not started: no time left"


def test_records_of_several_processes_and_a_line_cut_by_a_kill(runner, tmp_path):
    text = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from benchmarks.gpu_check.processes import tell\n"
        "for n in range(50): tell('x', n=n, long='y' * 2000)"
    )
    started = [runner.start("many", command=[*python(text), str(ROOT)]) for _ in range(3)]
    assert [runner.wait(process, 60, 60) for process in started] == [None] * 3
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"part": "x", "n')
    found = runner.found("x")
    assert sorted(r["n"] for r in found) == sorted(list(range(50)) * 3)


# -------------------------------------------------------------------------------------- the whole command


def checked(out: Path) -> list[dict]:
    return [r for r in processes.read(out / RECORDS) if r["part"] == "check"]


def test_a_dry_run_ends_in_a_table_and_a_verdict(tmp_path, capfd):
    assert command.main(["--dry", "--seconds", "280", "--parts", "checks,times", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "verdict on this GPU" in printed and "mosaic_gpu: not here: " in printed
    assert "flax.linen OptimizedLSTMCell" in printed and "rnncore scan" in printed
    assert {r["backend"] for r in checked(tmp_path)} == set(checks.backends())
    assert all("needs" in r for r in checked(tmp_path))
    measured = [r for r in processes.read(tmp_path / TIMES) if r["record"] == "time"]
    assert {r["workload"] for r in measured} == {"tiny-lstm", "tiny-gru"}
    assert all(r["relative_error"] < 2e-6 for r in measured), "references come from the other process"
    assert not any(r["failed"] for r in processes.read(tmp_path / RECORDS) if r["part"] == "ran")
    assert command.main(["--table", "--out", str(tmp_path)]) == 0
    assert capfd.readouterr().out.strip() in printed


def test_a_signal_ends_all_parts_and_the_table_still_comes(tmp_path):
    options = ["--dry", "--parts", "checks", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), checks.HANG: "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", *options], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    for _ in range(600):
        if (tmp_path / RECORDS).exists() and '"part": "begin"' in (tmp_path / RECORDS).read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "verdict on this GPU" in printed


def test_options_that_cannot_be(capsys):
    for options in (["--parts", "checks,nothing"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            command.main(options)
    assert "nothing: unknown; expected some of environment,checks" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- the parts


def test_every_dtype_is_checked_and_every_group_has_something_to_measure():
    assert {check.dtype for check in checks.PLAIN} == set(checks.ROUNDING)
    for group in times.groups(dry=False):
        assert set(group.contenders) <= set(run.CONTENDERS)
        for name in group.workloads:
            workload = workloads.WORKLOADS[name]
            assert set(group.dtypes) <= set(workload.dtypes), group
            assert (group.product == "inside") in workload.input_product, group


def test_a_problem_is_the_same_in_every_process_and_rounded_to_its_dtype():
    check = problems.Check("gru", 16, 2, 3, True, "float16", 4)
    [(cell, moving, given, cotangents), again] = [problems.draw(check, 1) for _ in range(2)]
    assert cell.hidden_size == 32 and moving[1].shape == (3, 4, problems.FEATURES)
    np.testing.assert_array_equal(moving[1], again[1][1])
    np.testing.assert_array_equal(moving[1], moving[1].astype(np.float16).astype(np.float32))
    assert given[0].shape == (3,) and given[1].shape == (3, 4) and cotangents[0].shape == (3, 4, 32)
    assert check.name == "gru 16x2 B=3 float16 masked"


def test_a_result_that_is_not_finite_is_far_off_and_an_answer_is_read_only_when_it_is_whole(tmp_path):
    assert [problems.distance(np.array([a]), np.ones(1)) for a in (np.nan, np.inf)] == [1e30] * 2
    assert problems.distance(np.array([1.5]), np.ones(1)) == 0.5
    path = tmp_path / "new" / "a.npz"
    with pytest.raises(TimeoutError, match="no float64 reference"):
        problems.load(path, 0.0)
    problems.save(path, [np.ones(2), np.zeros(3)])
    assert [a.shape for a in problems.load(path, 0.0)] == [(2,), (3,)]


def test_loops_of_a_compiled_program():
    text = """HloModule jit_f
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%p), index=1
  %a = f32[4]{0} fusion(%g), kind=kLoop, calls=%f
  %b = f32[4]{0} custom-call(%a), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[4]{0}) tuple(%g, %b)
}
ENTRY %main.2 (x: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%x), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"1024"}}
  %v = (s32[], f32[4]{0}) while(%x), condition=%c, body=%body.1
}"""
    step = {"fusion": 1, "custom-call": 1}
    assert parts.loops(text) == [{"steps": 1024, "operations": step}, {"steps": None, "operations": step}]


def test_what_the_sanitizer_says():
    assert sanitizer.verdict("") == {"errors": None, "first": []}
    good = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizer.verdict(good) == {"errors": 0, "first": []}
    bad = "========= COMPUTE-SANITIZER\n========= Invalid read of size 4\n========= ERROR SUMMARY: 2 errors\n"
    assert sanitizer.verdict(bad) == {"errors": 2, "first": ["Invalid read of size 4"]}
    race = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert sanitizer.verdict(race)["errors"] == 1


def test_where_the_toolkit_is(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: None)
    assert toolkit.home({}) is None and toolkit.environment(None) == {}
    own = tmp_path / "cuda"
    (own / toolkit.LIBDEVICE).parent.mkdir(parents=True)
    (own / toolkit.LIBDEVICE).touch()
    assert toolkit.home({"CUDA_ROOT": str(own), "PATH": ""}) == toolkit.home({"CUDA_HOME": str(own), "PATH": ""}) == own
    assert toolkit.home({"CUDA_ROOT": str(tmp_path), "PATH": ""}) is None
    nvcc = own / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    assert toolkit.home({"PATH": str(nvcc.parent)}) == own
    told = toolkit.environment(own)
    assert told["CUDA_ROOT"] == str(own) and told["PATH"].startswith(str(nvcc.parent))
    assert f"--xla_gpu_cuda_data_dir={own}" in told["XLA_FLAGS"]
    toolkit.link(own)
    assert toolkit.home({"PATH": ""}) == own


# -------------------------------------------------------------------------------------------- the table


def lines_of(tmp_path: Path, records: list[dict], measured: list[dict]) -> str:
    for name, rows in ((RECORDS, records), (TIMES, measured)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table.table(tmp_path)


def test_the_table_says_what_is_right_what_is_wrong_and_what_hung(tmp_path):
    check = {"part": "check", "backend": "mosaic_gpu", "name": "n", "limit": 1e-2, "same": True}
    text = lines_of(tmp_path, [
        {**check, "kind": "block", "error": 1e-3, "right": True},
        {**check, "backend": "cuda", "kind": "lstm float32", "error": 1e-1, "right": False},
        {**check, "backend": "cuda", "kind": "gru float32", "raised": "hung or aborted"},
        {**check, "backend": "cuda", "kind": "gru float16", "needs": "no such thing"},
        {"part": "ran", "of": "graph", "failed": "exit status -6"},
        {"part": "gradients", "name": "curves", "platform": "gpu", "precision": "float32", "unit": "nats", "ms": 2.0,
         "difference": 1e-4, "limit": 1e-3, "right": True},
        {"part": "sanitizer", "tool": "memcheck", "backend": "mosaic_gpu", "number": 0, "errors": 0, "first": []},
    ], [])  # fmt: skip
    for words in (
        "mosaic_gpu: block: right (1 of 1)", "lstm float32: DO NOT USE (0 of 1 right)",
        "gru float32: DO NOT USE (0 of 1 right)", "not here: gru float16 (no such thing)", "WRONG", "hung or aborted",
        "as a CUDA graph: DOES NOT RUN here", "exit status -6",
        "curves on gpu in float32: 2.0 ms, differs from the CPU's by 1.0e-04 nats of 1e-03 allowed: right",
        "memcheck mosaic_gpu 0: 0 errors",
    ):  # fmt: skip
        assert words in text, words


def test_times_stand_beside_torch_and_flax_and_a_case_cut_short_has_its_first_round(tmp_path):
    row = {"workload": "W", "dtype": "float16", "matmul_precision": "default", "input_product": True,
           "relative_error": 1e-3, "library": "x"}  # fmt: skip
    measured = [
        {"record": "round", **row, "contender": "torch", "measurement": "forward", "ms": 9.0},
        {"record": "time", **row, "contender": "torch", "measurement": "forward", "ms": [4.0], "median_ms": 4.0},
        {"record": "round", **row, "contender": "rnncore a", "measurement": "forward", "ms": 2.0},
        {"record": "missing", **row, "contender": "rnncore b", "reason": "a wrong answer"},
    ]
    text = lines_of(tmp_path, [], measured)
    fast, slow = (line for line in text.splitlines() if line.startswith("    "))
    assert "rnncore a" in fast and "2.000*" in fast and "torch  2.00     -" in fast
    assert "4.000 " in slow and "*" not in slow and "torch  1.00" in slow
    assert "missing rnncore b at W: a wrong answer" in text


def test_the_times_of_a_check_are_one_run_for_the_tables(tmp_path):
    out, file = tmp_path / "out", tmp_path / "gpu.jsonl"
    out.mkdir()
    head = {"record": "run", "started": "1", "machine": {}, "commit": "c", "tag": "gpu", "quick": True, "rounds": 5}
    end = {"record": "end", "finished": "2", "interrupted": False, "reason": None}
    one = {"record": "time", "ms": [1.0]}
    first = {"record": "round", "workload": "W", "contender": "x", "dtype": "float32", "measurement": "forward"}
    groups = [[head, first, one, end], [head, one]]  # the second was killed
    lines = [row | {"run": str(n)} for n, group in enumerate(groups) for row in group]
    (out / TIMES).write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert results.as_one_run(out, file) == 2
    [found] = read_runs(file)
    assert len(found.of("time")) == 2 and not found.complete and found.end["reason"] == "cut short"
    (out / TIMES).write_text("")
    with pytest.raises(ValueError, match="no times in"):
        results.as_one_run(out, file)
