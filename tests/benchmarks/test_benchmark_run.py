"""The benchmark suite end to end at tiny sizes: records, right answers, what is missing; no time is asserted on."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

from benchmarks import bounds, measure, options, records, run, workloads
from benchmarks.peers import PEERS, Built, Case, Peer, rnncore_peer, torch_peer
from benchmarks.peers.problem import make_problem, reference
from rnncore._command import timing
from rnncore.kernels import compiler

TIME = {
    "record", "run", "workload", "cell", "B", "T", "D", "H", "heads", "contender", "library", "version", "dtype",
    "matmul_precision", "input_product", "measurement", "ms", "calls_a_round", "median_ms", "min_ms", "max_ms",
    "us_per_step", "compile_seconds", "temporary_bytes", "relative_error", "algorithm",
}  # fmt: skip
FLAX = {
    "lstm": {"flax.linen LSTMCell", "flax.linen OptimizedLSTMCell"},
    "gru": {"flax.linen GRUCell"},
    "elman": {"flax.linen SimpleCell"},
}
OPTIONAL = {"haiku": ("haiku",), "equinox": ("equinox",), "torch": ("torch", torch_peer.ONE_THREAD)}


def is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def expected(workload: workloads.Workload, input_product: bool) -> set[str]:
    """Who runs a tiny workload on a CPU, by what is installed."""
    # The compiled loop projects its inputs itself.
    ours = {rnncore_peer.SCAN} | ({"rnncore cpp"} if input_product and compiler.find() is not None else set())
    if workload.heads > 1 or not input_product:
        return ours
    names = ours | FLAX[workload.cell]
    for module, contenders in OPTIONAL.items():
        if is_here(module) and (module, workload.cell) not in (
            ("equinox", "elman"),
            ("haiku", "gru"),
            ("haiku", "elman"),
        ):
            names |= set(contenders)
    return names


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(found: list[dict], kind: str) -> list[dict]:
    return [r for r in found if r["record"] == kind]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Tiny layers on many threads of a busy machine wait for one another for ever."""
    monkeypatch.setattr(timing, "cores", lambda: 1)


def go(*options: str) -> int:
    return run.main(["--rounds", "2", "--seconds", "1e-9", *options])


@pytest.mark.parametrize("name", ["tiny-lstm", "tiny-gru", "tiny-elman", "tiny-heads"])
def test_every_installed_contender_gives_the_right_answers(name, tmp_path, capsys):
    out = tmp_path / "new" / "r.jsonl"
    assert go("--workloads", name, "--out", str(out)) == 0
    found, workload = lines(out), workloads.WORKLOADS[name]
    assert {r["run"] for r in found} == {found[0]["run"]}
    for product in workload.input_product:
        times = [r for r in of(found, "time") if r["input_product"] is product]
        pairs = {(r["contender"], r["measurement"]) for r in times}
        assert pairs == {(c, m) for c in expected(workload, product) for m in workloads.MEASUREMENTS}
        assert len(times) == len(pairs)
        for r in times:
            assert set(r) == TIME and len(r["ms"]) == 2 and 0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"]
            assert (r["B"], r["T"], r["D"], r["H"]) == workload.shape and r["us_per_step"] == r["median_ms"] * 1e3 / 6
            # The same weights in every library, gates and biases in their places, gradients too.
            assert 0 < r["relative_error"] < 2e-6, (r["contender"], r["measurement"], r["relative_error"])
            is_torch = r["library"] == "torch"
            assert (r["compile_seconds"] is None) == (r["temporary_bytes"] is None) == is_torch
            assert (r["algorithm"] is None) == (not is_torch and r["library"] != "rnncore")
    about = [(r["bound"], r["measurement"]) for r in of(found, "bound")]
    assert about == [("products", m) for m in workloads.MEASUREMENTS] * len(workload.input_product)
    printed = capsys.readouterr().out
    assert "rnncore scan" in printed and "(products)" in printed


def test_head_and_end_of_a_run_and_what_is_missing(tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    real = importlib.util.find_spec
    some = ["flax.linen LSTMCell", "rnncore mosaic_gpu", "rnncore pallas_tpu", "rnncore cuda, own cell"]
    some += [name for names in OPTIONAL.values() for name in names]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in OPTIONAL else real(name, *a))
    assert go("--workloads", "tiny-lstm", "--out", str(out), "--contenders", *some) == 0
    assert go("--workloads", "tiny-elman", "--out", str(out), "--contenders", "rnncore cudnn") == 0
    found = lines(out)
    heads, ends = of(found, "run"), of(found, "end")
    assert len({r["run"] for r in heads}) == len(ends) == 2, "a second run is appended to the first"
    assert heads[0]["tag"] == "cpu" and heads[0]["quick"] is False and heads[0]["rounds"] == 2
    assert heads[0]["argv"][:2] == ["--rounds", "2"] and str(out) not in heads[0]["argv"]
    machine = heads[0]["machine"]
    assert machine["jax"] == jax.__version__ == machine["versions"]["jax"] and "device" in machine
    assert [(r["interrupted"], r["reason"]) for r in ends] == [(False, None)] * 2
    absent = {r["contender"]: r["reason"] for r in of(found, "missing") if r["workload"] is None}
    for module, names in OPTIONAL.items():
        package = "dm-haiku" if module == "haiku" else module
        assert {absent[name] for name in names} == {f"{package} is not installed"}
    assert "needs an NVIDIA Hopper GPU, and JAX runs on cpu" in absent["rnncore mosaic_gpu"]
    assert "needs a TPU" in absent["rnncore pallas_tpu"] and "needs an NVIDIA GPU" in absent["rnncore cuda, own cell"]
    cannot = {r["contender"]: r for r in of(found, "missing") if r["workload"] == "tiny-lstm"}
    refused = cannot["flax.linen LSTMCell"]
    assert "takes inputs" in refused["reason"] and refused["input_product"] is False


class Stub(Peer):
    """A library whose one contender does what a test wants."""

    library = package = module = "json"

    def __init__(self, name: str, call=lambda: None, factor: float = 1.0, failure: Exception | None = None) -> None:
        self.name, self.call, self.factor, self.failure = name, call, factor, failure

    def contenders(self, cell):
        return (self.name,)

    def build(self, contender, case, problem, measurement):
        if self.failure is not None:
            raise self.failure
        right = reference(case.workload, problem, case.input_product)[measurement]
        result = jax.tree.map(lambda a: a * self.factor, right)
        figures = dict.fromkeys(("compile_seconds", "temporary_bytes"))
        return Built(self.call, lambda out: None, lambda: result, figures)


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """Runs stubs over tiny-elman's forward pass: (exit status, records)."""

    def go_with(*peers: Stub, **changes):
        monkeypatch.setattr(measure, "PEERS", peers)
        monkeypatch.setattr(measure, "MEASUREMENTS", ("forward",))
        settings = measure.Settings(3, 1e-9, with_products=False)._replace(**changes)
        todo, names = [Case(workloads.WORKLOADS["tiny-elman"])], [peer.name for peer in peers]
        out = tmp_path / "stubs.jsonl"
        code = records.session("cpu", out, [], 3, 1e-9, functools.partial(run.run_all, todo, names, settings))
        return code, lines(out)

    return go_with


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interruption_keeps_the_rounds_that_all_have_run(how, stubs, capsys):
    calls = []

    def third_round():
        calls.append(None)
        # One call warms up, one is timed to see how many fill a turn, then there is one a round.
        if len(calls) == 5:
            if how == "Ctrl-C":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # The handler runs first.

    before = signal.getsignal(signal.SIGTERM)
    code, found = stubs(Stub("first"), Stub("second", third_round), Stub("third"))
    assert code == 130 and signal.getsignal(signal.SIGTERM) == before
    assert {r["contender"]: len(r["ms"]) for r in of(found, "time")} == {"first": 2, "second": 2, "third": 2}
    assert (found[-1]["record"], found[-1]["interrupted"], found[-1]["reason"]) == ("end", True, how)
    assert "interrupted" in capsys.readouterr().err


def test_failures_and_wrong_answers_leave_their_reasons_and_the_others_go_on(stubs, capsys):
    code, found = stubs(
        Stub("broken", failure=RuntimeError("no kernel image\nand much more")), Stub("wrong", factor=1.01),
        Stub("nan", factor=math.nan), Stub("right"),
    )  # fmt: skip
    missing = {r["contender"]: r["reason"] for r in of(found, "missing")}
    assert code == 0 and missing["broken"] == "RuntimeError: no kernel image"
    assert "missing: broken, forward: RuntimeError: no kernel image\n" in capsys.readouterr().out
    assert missing["wrong"].startswith("a wrong answer: relative error 1.0e-02")
    assert missing["nan"].startswith("a wrong answer: relative error nan")
    assert [r["contender"] for r in of(found, "time")] == ["right"]


def test_without_a_reference_and_past_the_deadline_nothing_is_timed(stubs):
    def no_memory(*_):
        raise MemoryError("16 GiB")

    code, found = stubs(Stub("one"), reference=no_memory)
    reasons = [r["reason"] for r in of(found, "missing")]
    assert code == 0 and reasons == ["RuntimeError: no float64 reference: MemoryError: 16 GiB"]
    code, found = stubs(Stub("one"), deadline=time.monotonic())
    assert of(found, "missing")[-1]["reason"] == measure.NOT_REACHED and of(found, "time") == []


def test_programs_built_in_threads_are_the_same_and_the_first_round_is_written_at_once(tmp_path):
    found: list[dict] = []
    settings = measure.Settings(2, 1e-9, threads=3, with_products=False)
    names = {"rnncore scan", "flax.linen OptimizedLSTMCell"}
    entries = [(peer, c) for peer in PEERS for c in peer.contenders("lstm") if c in names]
    case = Case(workloads.WORKLOADS["tiny-lstm"])
    times = measure.run_case(case, entries, settings, lambda kind, **r: found.append(r | {"record": kind}) or r)
    pairs = {(r["contender"], r["measurement"]) for r in times}
    assert len(pairs) == len(times) == 4 and pairs == {(r["contender"], r["measurement"]) for r in of(found, "round")}
    assert all(r["compile_seconds"] is None for r in times), "others compiled beside it"
    assert all(0 < r["relative_error"] < 2e-6 and len(r["ms"]) == 2 for r in times)
    assert all(r["ms"] in [t["ms"][0] for t in times] for r in of(found, "round"))


def test_past_the_deadline_one_round_is_all():
    turns = timing.take_turns({"a": int, "b": int}, 5, 1e-9, waits={"a": int, "b": int}, deadline=time.monotonic() - 1)
    assert [len(turn["ms"]) for turn in turns.values()] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "S9"], r"no such workload; expected one of S1, S2"),
        (["--contenders", "rnncore scan", "pytorch"], "--contenders: invalid choice: 'pytorch'"),
        (["--rounds", "0"], "--rounds: 0: expected a whole number of at least 1"),
        (["--tag", "gpu"], f"--tag gpu: JAX {jax.__version__} runs on cpu here (cpu:cpu"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_list_names_everything_and_obeys_the_tag(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*workloads.WORKLOADS, *run.CONTENDERS):
        assert f"\n  {name}" in printed
    assert run.main(["--list", "--tag", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "  S1 " in printed and "W1-" not in printed and "tiny-" not in printed


def test_selections_and_cases():
    assert [w.name for w in workloads.select("cpu")] == ["S1", "S2", "S3", "S4", "S5"]
    assert [w.name for w in workloads.select("gpu", ["W12-*", "S1", "S1"])] == ["W12-H256", "W12-H512", "S1"]
    found = run.cases([workloads.WORKLOADS["W1-768x1"]], ("float32", "tf32"), "gpu")
    assert [(c.dtype, c.precision, c.input_product) for c in found] == [
        ("bfloat16", "default", True), ("bfloat16", "default", False), ("float32", "float32", True),
        ("float32", "float32", False), ("float32", "tf32", True), ("float32", "tf32", False),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny-lstm", "tiny-heads"])
def test_the_products_alone_are_those_of_a_gradient(name):
    """As many operations as three times the forward pass, without those of the loop; XLA counts a loop's body once."""
    w = workloads.WORKLOADS[name]
    compiled = jax.jit(lambda own: bounds._products(True, True, own)).lower(bounds._operands(w, "float32")).compile()
    slab = w.gates * w.hidden
    at_once = 3 * w.steps * w.batch * w.features * slab + w.steps * w.batch * w.hidden // w.heads * slab
    step = 2 * w.batch * w.hidden // w.heads * slab
    assert 2 * (at_once + step) <= compiled.cost_analysis()["flops"] < 2.2 * (at_once + step)


def test_the_problem_is_the_same_in_every_dtype_and_with_given_products():
    workload = workloads.WORKLOADS["tiny-gru"]
    exact, half = (make_problem(workload, dtype, True) for dtype in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(half), strict=True):
        assert b.dtype == "bfloat16"
        np.testing.assert_array_equal(a.astype(b.dtype), b)
    with_x, with_products = (
        reference(workload, make_problem(workload, "float32", product), product) for product in (True, False)
    )
    np.testing.assert_allclose(with_products["forward"], with_x["forward"], atol=1e-6)
    params, dxs = with_products["gradient"]
    assert params.input_kernel is None and dxs.shape == (2, 6, 12)
    np.testing.assert_allclose(dxs @ exact.params.input_kernel.reshape(5, 12).T, with_x["gradient"][1], atol=1e-5)


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"record": "ru')
    writer = records.Writer(path)
    writer("end", finished=records.now(), interrupted=False, reason=None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer("time", ms=[math.nan])
    writer.close()
    assert json.loads(path.read_text().splitlines()[1])["run"] == writer.run


def test_results_are_named_after_tag_device_and_jax(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = records.default_path("cpu", False)
    version = ".".join(jax.__version__.split(".")[:2])
    assert path.parent == tmp_path and records.default_path("cpu", True).parent == options.RESULTS
    assert path.name.startswith("cpu_") and path.name.endswith(f"_jax{version}.jsonl")
    assert " " not in path.name and path.name == path.name.lower()
