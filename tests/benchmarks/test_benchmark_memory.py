"""The benchmarks of memory policies and of compilation: records, Ctrl-C, tables; no time is asserted on."""

from __future__ import annotations

import json
import statistics

import jax
import pytest

from benchmarks import compile as compiling
from benchmarks import memory, policies, records
from benchmarks.report import others
from benchmarks.report.results import read
from rnncore._command import timing

MEMORY = {
    "record", "run", "policy", "shape_BTDH", "relative_error", "compile_seconds", "temporary_bytes", "argument_bytes",
    "output_bytes", "calls_a_round", "ms", "median_ms", "min_ms", "max_ms", "times_flax_time", "times_flax_memory",
}  # fmt: skip
TINY = ["--shape", "2", "24", "4", "8", "--rounds", "2", "--seconds", "1e-4"]
SHORT = ["--shape", "2", "3", "4", "--repeats", "2", "--steps"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "new" / "memory.jsonl"
    assert memory.main([*TINY, "--out", str(path)]) == 0
    return read([path])


def test_every_policy_has_a_whole_record_and_right_gradients(measured):
    (run,) = measured.runs
    found = {r["policy"]: r for r in run.of("memory")}
    assert run.complete and (run.head["tag"], run.head["rounds"]) == ("memory", 2)
    assert tuple(found) == policies.available(memory.POLICIES) and run.machine["versions"]["jax"] == jax.__version__
    flax = found["flax.linen"]
    assert flax["times_flax_time"] == flax["times_flax_memory"] == 1
    for name, r in found.items():
        assert set(r) == MEMORY and r["shape_BTDH"] == [2, 24, 4, 8] and len(r["ms"]) == 2
        assert 0 < r["relative_error"] < (2e-2 if "bfloat16" in name else 2e-6)
        ratios = [ours / theirs for ours, theirs in zip(r["ms"], flax["ms"], strict=True)]
        assert r["times_flax_time"] == pytest.approx(statistics.median(ratios))
        assert r["times_flax_memory"] == pytest.approx(r["temporary_bytes"] / flax["temporary_bytes"])
    # The options reach the layer: each makes a program of its own.
    sizes = [found["scan" + rest]["temporary_bytes"] for rest in ("", ", recompute='gates'", ", recompute='chunk'")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert found["scan, residual_dtype=bfloat16"]["relative_error"] > 1e-4


def test_the_memory_table_has_a_row_for_every_policy(measured):
    text = others.memory(measured)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert tuple(row[1].strip() for row in rows) == policies.available(memory.POLICIES)
    assert {row[2].strip() for row in rows} == {"(2, 24, 4, 8)"} and "None" not in text
    assert rows[0][4].strip() == rows[0][6].strip() == "1.00" and "2 interleaved rounds" in text


@pytest.fixture
def three(monkeypatch):
    """Only three policies, and no float64 reference."""
    names = ("flax.linen", "scan", "cpp")
    monkeypatch.setattr(memory, "POLICIES", names)
    monkeypatch.setattr(memory, "LARGEST_CHECK", 5)
    return names


def test_ctrl_c_in_the_rounds_keeps_the_whole_ones(three, tmp_path, monkeypatch, capsys):
    take_turns = timing.take_turns

    def cut(calls, rounds, seconds, tick, *, turns):
        left = iter(range(5))  # the second policy of the second round is the last to be timed

        def counted():
            tick()
            if next(left) == 4:
                raise KeyboardInterrupt

        return take_turns(calls, rounds, seconds, counted, turns=turns)

    monkeypatch.setattr(timing, "take_turns", cut)
    path = tmp_path / "cut.jsonl"
    assert memory.main([*TINY[:5], "--rounds", "3", "--seconds", "1e-4", "--out", str(path)]) == 130
    (run,) = read([path]).runs
    assert [(r["policy"], len(r["ms"]), r["relative_error"]) for r in run.of("memory")] == [(n, 1, None) for n in three]
    assert not run.complete and run.end["reason"] == "Ctrl-C"
    assert "did not come to its end (Ctrl-C)" in others.memory(read([path]))
    printed = capsys.readouterr()
    assert "interrupted; what was done is in" in printed.err and printed.out.count("of flax.linen's") == 3
    monkeypatch.setattr(timing, "take_turns", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert memory.main([*TINY, "--out", str(path)]) == 130  # before any round there is nothing to keep
    assert [json.loads(text)["record"] for text in path.read_text().splitlines()[5:]] == ["run", "end"]


def test_without_the_compilers_account_there_is_no_ratio_of_memory():
    taken = {"flax.linen": [2.0, 4.0, 3.0], "scan": [3.0] * 3}
    turns = {name: {"calls_a_round": 1, "ms": ms} for name, ms in taken.items()}
    shared = {"shape_BTDH": [1, 2, 3, 4], "temporary_bytes": None, "relative_error": None}
    found = {name: {"policy": name, **shared} for name in turns}
    _, own = memory.in_terms_of_flax(found, turns)
    assert own["times_flax_time"] == 1.0 and own["times_flax_memory"] is None
    assert "- MiB, - of it" in memory.line(own)


def test_compile_records_have_every_length_and_make_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "CONTENDERS", ("flax.linen", "scan, checkpoint_every=16"))
    path = tmp_path / "compile.jsonl"
    before = jax.config.jax_enable_compilation_cache
    assert compiling.main([*SHORT, "40", "8", "--out", str(path)]) == 0
    assert jax.config.jax_enable_compilation_cache == before
    found = read([path])
    (run,) = found.runs
    assert run.complete and run.head["tag"] == "compile"
    assert [(r["contender"], r["T"]) for r in run.of("compile")] == [
        (name, steps) for name in compiling.CONTENDERS for steps in (8, 40)
    ]
    assert all(len(r["compile_seconds"]) == 2 and min(r["compile_seconds"]) > 0 for r in run.of("compile"))
    text = others.compiling(found)
    assert "| contender | T = 8: s | T = 40: s | T = 40 / T = 8 |" in text and text.count("\n| ") == 2
    assert "a gradient step of a float32 LSTM layer, B=2, D=3, H=4, median [least..largest] of 2." in text


def test_compilations_take_turns_and_ctrl_c_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "CONTENDERS", compiling.CONTENDERS[:4])
    order = []

    def compiled(contender, batch, steps, features, hidden):
        order.append((contender, steps))
        if len(order) == 4 + 2 * 8 + 2:
            raise KeyboardInterrupt
        return float(len(order))

    monkeypatch.setattr(compiling, "seconds_to_compile", compiled)
    path = tmp_path / "cut.jsonl"
    assert compiling.main([*SHORT[:4], "--repeats", "3", "--steps", "8", "40", "--out", str(path)]) == 130
    lengths = [(name, steps) for steps in (8, 40) for name in compiling.CONTENDERS]
    assert order == [*lengths[:4], *lengths * 2, *lengths[:2]]  # the first of each is not counted
    (run,) = read([path]).runs
    found = {(r["contender"], r["T"]): r["compile_seconds"] for r in run.of("compile")}
    assert found["flax.linen", 8] == [5.0, 13.0, 21.0] and found["scan", 8] == [6.0, 14.0] and len(found) == 8
    assert not run.complete and "of 2 to 3." in others.compiling(read([path]))


def test_results_go_where_the_caller_is_and_only_when_asked_beside_the_others(monkeypatch, tmp_path):
    here, results = tmp_path / "here", tmp_path / "results"
    here.mkdir(), results.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setattr(compiling, "seconds_to_compile", lambda *_: 1.0)
    version = ".".join(jax.__version__.split(".")[:2])
    name = f"compile_cpu_jax{version}.jsonl"
    assert compiling.main([*SHORT, "8"]) == 0
    assert [path.name for path in here.iterdir()] == [name] and not list(results.iterdir())
    assert compiling.main([*SHORT, "8", "--record"]) == 0
    assert [path.name for path in results.iterdir()] == [name]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (memory, ["--shape", "1", "2", "0", "4"], "--shape 1 2 0 4: expected sizes of at least 1"),
        (memory, ["--rounds", "0"], "at least 1 round"),
        (memory, ["--seconds", "nan"], "of more than 0 s"),
        (compiling, ["--repeats", "0"], "expected numbers of at least 1"),
        (compiling, ["--steps", "8", "0"], "expected numbers of at least 1"),
    ],
)
def test_wrong_options_are_refused(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_where_the_records_went_is_not_recorded(measured):
    (run,) = measured.runs
    assert run.head["argv"] == TINY and records.asked(["--out=x", "--shape", "1"]) == ["--shape", "1"]


def test_names_of_policies_are_known():
    assert {*memory.POLICIES, *compiling.CONTENDERS} == {policies.FLAX, *policies.OPTIONS}
