"""The benchmark suite end to end at tiny sizes: records, right answers, who is missing; no time is asserted on."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from benchmarks import bounds, measure, records, run, workloads
from benchmarks.peers import PEERS, Built, Case, Peer, rnncore_peer, torch_peer
from benchmarks.peers.problem import make_problem
from benchmarks.peers.reference import reference
from rnncore._command import timing
from rnncore.kernels import compiler

TIME = {
    "record", "run", "workload", "cell", "recurrence", "B", "T", "D", "H", "heads", "layers", "contender", "library",
    "version", "dtype", "matmul_precision", "input_product", "measurement", "ms", "calls_a_round", "median_ms",
    "min_ms", "max_ms", "us_per_step", "compile_seconds", "temporary_bytes", "argument_bytes", "output_bytes",
    "device_peak_bytes", "relative_error", "reference", "algorithm",
}  # fmt: skip
BOUND = {
    "record", "run", "workload", "bound", "dtype", "matmul_precision", "input_product", "measurement", "ms",
    "calls_a_round", "median_ms", "min_ms", "max_ms",
}  # fmt: skip
FLAX = {
    "lstm": {f"flax.{api} {cell}" for api in ("linen", "nnx") for cell in ("LSTMCell", "OptimizedLSTMCell")},
    "gru": {"flax.linen GRUCell", "flax.nnx GRUCell"},
    "elman": {"flax.linen SimpleCell", "flax.nnx SimpleCell"},
}
SIBLINGS = {"flax.linen LSTMCell", "flax.nnx OptimizedLSTMCell"}
OURS = {"rnncore scan"}
OPTIONAL = {
    "haiku": ("haiku",), "equinox": ("equinox",), "torch": ("torch", torch_peer.ONE_THREAD),
    "flashrnn": ("FlashRNN triton_fused", "FlashRNN cuda_fused", "FlashRNN cuda"),
}  # fmt: skip


def is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def expected(workload: workloads.Workload, input_product: bool) -> set[str]:
    """Who runs a tiny workload on a CPU, by what is installed."""
    # The compiled loop projects its inputs itself.
    ours = OURS | ({rnncore_peer.CPP} if input_product and compiler.find() is not None else set())
    if workload.recurrence != "dense" or not input_product:
        return ours
    names = ours | FLAX[workload.cell]
    for module in ("haiku", "equinox", "torch"):
        if is_here(module) and (module, workload.cell) != ("equinox", "elman"):
            names |= set(OPTIONAL[module])
    return names


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(found: list[dict], kind: str) -> list[dict]:
    return [r for r in found if r["record"] == kind]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Tiny layers on many threads of a busy machine wait for one another for ever."""
    monkeypatch.setattr(timing, "cores", lambda: 1)
    monkeypatch.setattr(bounds, "QUICK_COPY_BYTES", 2**12)


def go(*options: str) -> int:
    return run.main(["--tag", "cpu", "--quick", "--rounds", "2", "--seconds", "1e-9", *options])


MEASURED = {
    "tiny-lstm": ("gradient", "training_step"), "tiny-gru": ("gradient",),
    "tiny-elman": ("gradient",), "tiny-heads": ("gradient",), "tiny-diagonal": ("forward",),
    "tiny-layers": ("gradient",),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_every_installed_contender_gives_the_right_answers(name, tmp_path, capsys):
    out = tmp_path / "new" / "r.jsonl"
    # What is like what has been seen: two layers of both of Flax's LSTMs, an Elman network in nnx.
    seen = {"tiny-layers": SIBLINGS, "tiny-elman": {"flax.nnx SimpleCell"}}
    some = set(run.CONTENDERS) - seen.get(name, set())
    options = ["--measurements", *MEASURED[name], "--contenders", *sorted(some)]
    assert go("--workloads", name, *options, "--out", str(out)) == 0
    found, workload = lines(out), workloads.WORKLOADS[name]
    assert {r["run"] for r in found} == {found[0]["run"]}
    for product in workload.input_product:
        times = [r for r in of(found, "time") if r["input_product"] is product]
        pairs = {(r["contender"], r["measurement"]) for r in times}
        assert pairs == {(c, m) for c in expected(workload, product) & some for m in MEASURED[name]}
        assert len(times) == len(pairs)
        for r in times:
            assert set(r) == TIME and len(r["ms"]) == 2 and 0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"]
            assert (r["B"], r["T"], r["D"], r["H"]) == workload.shape and r["us_per_step"] == r["median_ms"] * 1e3 / 6
            # The same weights in every library, gates, biases and offsets in their places, gradients too.
            assert 0 < r["relative_error"] < 2e-6, (r["contender"], r["measurement"], r["relative_error"])
            is_torch = r["library"] == "torch"
            assert (r["compile_seconds"] is None) == (r["temporary_bytes"] is None) == is_torch
            assert (r["algorithm"] is None) == (not is_torch and r["library"] != "rnncore")
            assert r["device_peak_bytes"] is None and r["matmul_precision"] == "float32"
        assert {r["calls_a_round"] for r in times} == {1}
    about = [r for r in of(found, "bound") if r["workload"] is not None]
    kinds = [m for m in MEASURED[name] if m != "training_step"]
    assert [(r["bound"], r["measurement"]) for r in about] == [
        (bound, m) for m in kinds for bound in ("products", "products batched", "empty loop")
    ]
    for r in about:
        assert set(r) - {"gigaflops"} == BOUND and ("gigaflops" in r) == (r["bound"] != "empty loop")
    printed = capsys.readouterr().out
    assert "rnncore scan" in printed and "(products batched)" in printed


def test_head_and_end_of_a_run_and_who_is_missing(tmp_path):
    out = tmp_path / "r.jsonl"
    options = ["--workloads", "tiny-lstm", "--measurements", "forward", "--contenders"]
    kernels = [rnncore_peer.MOSAIC, rnncore_peer.OWN, rnncore_peer.TPU]
    everyone = ["rnncore scan", "rnncore cudnn", *kernels, "jax.experimental.rnn"]
    everyone += [n for m in OPTIONAL.values() for n in m]
    for names in (everyone, ["rnncore cudnn"]):
        assert go(*options, *names, "--out", str(out)) == 0
    found = lines(out)
    heads, ends = of(found, "run"), of(found, "end")
    assert len({r["run"] for r in heads}) == len(ends) == 2, "a second run goes behind the first"
    assert heads[0]["tag"] == "cpu" and heads[0]["quick"] is True and heads[0]["rounds"] == 2
    machine = heads[0]["machine"]
    assert machine["jax"] == jax.__version__ == machine["versions"]["jax"] and "device" in machine
    assert {m: machine["versions"][m] is not None for m in OPTIONAL} == {m: is_here(m) for m in OPTIONAL}
    assert [(r["interrupted"], r["reason"]) for r in ends] == [(False, None)] * 2
    absent = {r["contender"]: r["reason"] for r in of(found, "missing") if r["workload"] is None}
    gone = {name for module, names in OPTIONAL.items() if not is_here(module) for name in names}
    assert set(absent) == {"rnncore cudnn", *kernels, "jax.experimental.rnn", *gone}
    assert all("needs an NVIDIA Hopper GPU, and JAX runs on cpu" in absent[name] for name in kernels[:2])
    assert "needs a TPU" in absent[rnncore_peer.TPU]
    assert "needs an NVIDIA GPU" in absent["jax.experimental.rnn"] and "flashrnn is not" in absent["FlashRNN cuda"]
    cannot = [r for r in of(found, "missing") if r["workload"] == "tiny-lstm" and r["contender"] == "haiku"]
    assert len(cannot) == (1 if is_here("haiku") else 0)
    assert all("takes inputs" in r["reason"] and r["input_product"] is False for r in cannot)
    copy = [r for r in of(found, "bound") if r["workload"] is None]
    assert len(copy) == 2 and all(r["gigabytes_per_second"] > 0 and r["bytes"] == 2**13 for r in copy)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in OPTIONAL else real(name, *a))
    out = tmp_path / "r.jsonl"
    names = [name for module in OPTIONAL.values() for name in module]
    assert go("--workloads", "tiny-lstm", "--contenders", *names, "--out", str(out)) == 0
    missing = {r["contender"]: r["reason"] for r in of(lines(out), "missing")}
    packages = {"haiku": "dm-haiku"}
    assert missing == {n: f"{packages.get(m, m)} is not installed" for m, names in OPTIONAL.items() for n in names}
    assert of(lines(out), "time") == []


class Stub(Peer):
    """A library whose one contender does what a test wants."""

    library = package = module = "json"
    tried: str | None = None
    is_asked = True

    def __init__(self, name: str, call=lambda: None, factor: float = 1.0, failure: Exception | None = None) -> None:
        self.name, self.call, self.factor, self.failure = name, call, factor, failure

    def contenders(self, cell):
        return (self.name,)

    def asked(self, contender, workload):
        return self.is_asked

    def fault(self, contender, case):
        return self.tried

    def build(self, contender, case, problem, measurement):
        if self.failure is not None:
            raise self.failure
        right = reference(case.workload, problem, case.input_product, "same")[measurement]
        result = jax.tree.map(lambda a: a * self.factor, right)
        figures = dict.fromkeys(("compile_seconds", "temporary_bytes", "argument_bytes", "output_bytes"))
        return Built(self.call, lambda out: None, lambda: result, lambda call: call(), figures)


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    """Runs the suite over stubs at tiny-elman's forward pass: (exit status, records)."""

    def go_with(*peers: Stub, options=("--rounds", "3")):
        monkeypatch.setattr(run, "PEERS", peers)
        monkeypatch.setattr(run, "CONTENDERS", tuple(p.name for p in peers))
        out = tmp_path / "stubs.jsonl"
        base = ["--tag", "cpu", "--quick", "--seconds", "1e-9", "--workloads", "tiny-elman", "--out", str(out)]
        names = ["--contenders", *(p.name for p in peers)]
        code = run.main([*base, "--measurements", "forward", *names, *options])
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


def test_what_fails_and_what_is_wrong_leave_their_reasons_and_the_others_go_on(stubs, capsys):
    code, found = stubs(
        Stub("broken", failure=RuntimeError("no kernel image\nand much more")), Stub("wrong", factor=1.01),
        Stub("nan", factor=float("nan")), Stub("right"),
    )  # fmt: skip
    missing = {r["contender"]: r["reason"] for r in of(found, "missing")}
    assert code == 0 and missing["broken"] == "RuntimeError: no kernel image"
    assert "missing: broken, forward: RuntimeError: no kernel image\n" in capsys.readouterr().out
    assert missing["wrong"].startswith("a wrong answer: relative error 1.0e-02")
    assert missing["nan"].startswith("a wrong answer: relative error nan")
    assert [r["contender"] for r in of(found, "time")] == ["right"]


def test_what_failed_its_trial_is_not_built_and_what_is_not_asked_is_not_there(stubs):
    hangs, elsewhere = Stub("hangs", failure=AssertionError("built")), Stub("elsewhere")
    hangs.tried, elsewhere.is_asked = "not at its end after 90 s", False
    code, found = stubs(hangs, elsewhere, Stub("right"))
    assert code == 0 and [r["contender"] for r in of(found, "time")] == ["right"]
    assert [(r["contender"], r["reason"]) for r in of(found, "missing")] == [("hangs", hangs.tried)]


def test_without_a_right_answer_nothing_is_timed(stubs, monkeypatch):
    tries = []

    def no_memory(*_):
        tries.append(None)
        raise MemoryError("16 GiB")

    monkeypatch.setattr(measure, "reference", no_memory)
    code, found = stubs(Stub("one"), Stub("two"))
    reasons = [r["reason"] for r in of(found, "missing")]
    assert code == 0 and reasons == ["RuntimeError: no float64 reference: MemoryError: 16 GiB"] * 2 and len(tries) == 1


def test_the_budget_leaves_out_and_names_what_it_does_not_reach(stubs):
    code, found = stubs(Stub("one"), Stub("two"), options=("--budget", "1e-9"))
    assert code == 0 and of(found, "time") == [] and [r for r in of(found, "bound") if r["workload"]] == []
    assert [(r["contender"], r["reason"]) for r in of(found, "missing")] == [
        (name, measure.NOT_REACHED) for name in ("one", "two")
    ]
    assert found[-1]["interrupted"] is False and found[-1]["reason"] == "the budget of 1e-09 s was used up"


def test_past_the_deadline_one_round_is_all():
    turns = timing.take_turns({"a": int, "b": int}, 5, 1e-9, waits={"a": int, "b": int}, deadline=time.monotonic() - 1)
    assert [len(turn["ms"]) for turn in turns.values()] == [1, 1]


def test_rounds_that_not_all_have_run_are_dropped():
    turns = {"a": {"calls_a_round": 1, "ms": [1.0, 2.0]}, "b": {"calls_a_round": 3, "ms": [4.0]}}
    assert timing.complete_rounds(turns) == {"a": {"calls_a_round": 1, "ms": [1.0]}, "b": turns["b"]}
    assert timing.complete_rounds({"a": turns["a"], "b": {"calls_a_round": 3, "ms": []}}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "S9"], r"no such workload; expected one of S1, S2"),
        (["--contenders", "rnncore scan", "pytorch"], "--contenders pytorch: unknown; expected some of rnncore scan,"),
        (["--workloads", "W7-*", "--measurements", "training_step"], "nothing is left to measure"),
        (["--rounds", "0"], "expected at least 1 round"),
        (["--budget", "0"], "expected more than 0 s"),
        (["--tag", "gpu"], f"--tag gpu: JAX {jax.__version__} runs on cpu here (cpu:cpu"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_list_names_everything(capsys):
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*workloads.WORKLOADS, *run.CONTENDERS):
        assert f"\n  {name}" in printed
    assert {n for names in OPTIONAL.values() for n in names} < set(run.CONTENDERS)


def test_the_list_obeys_the_tag(capsys):
    assert run.main(["--list", "--tag", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "  S1 " in said and "W1-" not in said and "tiny-" not in said
    assert run.main(["--list", "--tag", "gpu", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "W1-768x1" in said and "  S1 " not in said and "W2-" not in said


def test_selections():
    assert [w.name for w in workloads.select("cpu")] == ["S1", "S2", "S3", "S4", "S5"]
    assert [w.name for w in workloads.select("cpu", quick=True)] == ["S4", "S5"]
    assert [w.name for w in workloads.select("gpu", names=["W3-768*", "S1", "S1"])] == [
        *(f"W3-768x1-T{t}" for t in (256, 512, 1024, 2048)), "S1"
    ]  # fmt: skip
    quick = workloads.select("gpu", quick=True)
    assert quick[0].name == "W1-768x1" and {w.name for w in quick if w.name.startswith("W1-")} == {
        w.name for w in workloads.WORKLOADS.values() if w.name.startswith("W1-")
    }
    assert {w.name for w in quick} == {w.name for w in workloads.WORKLOADS.values() if w.tags >= {"gpu", "quick"}}
    for w in quick:
        assert set(w.dtypes) <= set(workloads.WORKLOADS[w.name].dtypes)


def test_published_numbers_stand_as_published():
    small = workloads.WORKLOADS["W5-H64-L4"]
    assert small.layers == 4
    assert [(p.forward_ms, p.gradient_ms) for p in small.published] == [(146.5, 364), (13.5, 37.1)]
    flash = {p.contender: p for p in workloads.WORKLOADS["W1-64x12"].published}
    assert (flash["FlashRNN cuda_fused"].gradient_ms, flash["FlashRNN cuda_fused"].input_product) == (8.64, False)
    largest = {(p.contender, p.dtype): p for p in workloads.WORKLOADS["W1-768x1"].published}
    assert largest["torch", "float16"].forward_ms == 2.01 and ("FlashRNN triton_fused", "bfloat16") not in largest
    assert [p.gradient_ms for p in workloads.WORKLOADS["W7-H1-T10000"].published] == [348.5, 1.37]


def test_what_is_wanted_of_a_gpu_is_in_the_short_run_before_all_else():
    """Forward and gradient in bfloat16, the input product given."""
    chosen = run.cases(workloads.select("gpu", quick=True), ("float32", "tf32"), "gpu", quick=True)
    given = [c.workload for c in chosen if not c.input_product]
    assert all(w.measurements == workloads.BOTH and w.dtypes == ("bfloat16",) and w.batch == 16 for w in given)
    assert [w.name for w in given][:6] == [
        "W1-768x1", "W1-64x12", "W1-128x6", "W1-32x24", "W11-gru64x12", "W11-gru768x1"
    ]  # fmt: skip
    assert [w.name for w in given if w.own_cell] == ["W1-64x12"]
    aims = {w.name: [(p.forward_ms, p.gradient_ms) for p in w.wanted] for w in given if w.wanted}
    assert aims == {
        "W1-768x1": [(2.5, 6)], "W1-64x12": [(1, 4), (None, None)], "W1-128x6": [(1.2, 5)], "W1-32x24": [(1, None)]
    }  # fmt: skip
    assert all(p.dtype == "bfloat16" and not p.input_product for w in given for p in (*w.wanted, w.floor) if p)
    floors = {w.name: (w.floor.low_us, w.floor.high_us) for w in given if w.floor}
    assert floors == {"W1-768x1": (1.2, 1.6), "W1-64x12": (0.4, 0.6), "W1-128x6": (0.7, 1.0)}
    assert all("an estimate" in w.floor.source for w in given if w.floor)


def test_cases_pin_the_precision_of_float32_only():
    chosen = [workloads.WORKLOADS["W1-768x1"]]
    found = run.cases(chosen, ("float32", "tf32"), "gpu", quick=False)
    assert [(c.dtype, c.precision, c.input_product) for c in found] == [
        ("bfloat16", "default", True), ("bfloat16", "default", False), ("float32", "float32", True),
        ("float32", "float32", False), ("float32", "tf32", True), ("float32", "tf32", False),
    ]  # fmt: skip


def test_a_short_run_does_the_second_precision_last():
    found = run.cases(workloads.select("gpu", quick=True), ("float32", "tf32"), "gpu", quick=True)
    told = [(c.workload.name, c.dtype, c.precision, c.input_product) for c in found]
    assert len(set(told)) == len(told) and told[:5] == [
        ("W1-768x1", "bfloat16", "default", True), ("W1-768x1", "bfloat16", "default", False),
        ("W1-64x12", "bfloat16", "default", True), ("W1-64x12", "bfloat16", "default", False),
        ("W1-128x6", "bfloat16", "default", True),
    ]  # fmt: skip
    first = told.index(("W1-768x1", "float32", "float32", True))
    assert told[first + 1] == ("W1-768x1", "float32", "tf32", True)
    late = [c.precision == "tf32" for c in found[first + 2 :]]
    assert late == sorted(late) and any(late) and not any(c.precision == "tf32" for c in found[:first])


def test_a_slow_build_is_left_to_a_whole_run():
    flash = next(p for p in PEERS if p.library == "flashrnn")
    entries = [(flash, name) for name in flash.contenders("lstm")]
    case = Case(workloads.WORKLOADS["W1-64x12"], "bfloat16", "default", False, "gpu")
    written: list[str] = []
    for quick, able in ((True, 1), (False, 3)):
        plan = measure.plan_case(case, entries, True, quick, lambda kind, **fields: written.append(fields["reason"]))
        assert len(plan.entries) == able
    assert len(written) == 2 and all("without --quick" in reason for reason in written)


@pytest.mark.parametrize("name", ["tiny-lstm", "tiny-heads", "tiny-layers", "tiny-diagonal"])
def test_the_bounds_hold_as_many_operations_as_they_say(name):
    """Counted by XLA in the batched products of a gradient."""
    workload = workloads.WORKLOADS[name]
    operands = [bounds._operands(workload, "float32", layer) for layer in range(workload.layers)]
    compiled = jax.jit(lambda layers: bounds._products(True, True, True, layers)).lower(operands).compile()
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(3e9 * bounds.workload_gigaflop(workload, True))


def test_the_problem_is_the_same_in_every_dtype_and_with_given_products():
    workload = workloads.WORKLOADS["tiny-gru"]
    exact, half = (make_problem(workload, dtype, True) for dtype in ("float32", "bfloat16"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(half), strict=True):
        assert b.dtype == "bfloat16"
        np.testing.assert_array_equal(a.astype(b.dtype), b)
    np.testing.assert_array_equal(half.params[0].bias.astype("float32"), exact.params[0].bias)
    with_x, with_products = (
        reference(workload, make_problem(workload, "float32", product), product, "same") for product in (True, False)
    )
    np.testing.assert_allclose(with_products["forward"], with_x["forward"], atol=1e-6)
    (params,), dxs = with_products["gradient"]
    assert params.input_kernel is None and dxs.shape == (2, 6, 12)
    np.testing.assert_allclose(dxs @ exact.params[0].input_kernel.reshape(5, 12).T, with_x["gradient"][1], atol=1e-5)


def test_half_a_line_of_a_killed_run_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"record": "ru')
    writer = records.Writer(path)
    writer("end", finished=records.now(), interrupted=False, reason=None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer("time", ms=[float("nan")])
    writer.close()
    assert json.loads(path.read_text().splitlines()[1])["run"] == writer.run


def test_results_are_named_after_tag_device_and_jax():
    name = records.default_path("cpu", True).name
    assert name.startswith("cpu_") and name.endswith(f"_jax{'.'.join(jax.__version__.split('.')[:2])}.jsonl")
    assert " " not in name and name == name.lower()
