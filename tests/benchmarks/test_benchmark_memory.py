"""The benchmarks of memory policies and of compilation: records, Ctrl-C, tables; no time is asserted on."""

from __future__ import annotations

import statistics

import jax
import pytest

from benchmarks import compile as compiling
from benchmarks import memory
from benchmarks.report import others
from benchmarks.report.results import read
from rnncore._command import timing

TINY = ["--shape", "2", "24", "4", "8", "--rounds", "2", "--seconds", "1e-4"]
SHORT = ["--shape", "2", "3", "4", "--repeats", "2", "--steps"]


def test_every_policy_has_a_whole_record_right_gradients_and_a_row(tmp_path):
    path = tmp_path / "new" / "memory.jsonl"
    assert memory.main([*TINY, "--out", str(path)]) == 0
    results = read([path])
    (run,) = results.runs
    found = {r["policy"]: r for r in run.of("memory")}
    assert run.complete and (run.head["tag"], run.head["rounds"], run.head["argv"]) == ("memory", 2, TINY)
    assert tuple(found) == memory.available(memory.POLICIES) and run.machine["versions"]["jax"] == jax.__version__
    flax = found["flax.linen"]
    assert flax["times_flax_time"] == flax["times_flax_memory"] == 1
    for name, r in found.items():
        assert r["shape_BTDH"] == [2, 24, 4, 8] and len(r["ms"]) == 2
        assert 0 < r["relative_error"] < (2e-2 if "bfloat16" in name else 2e-6)
        ratios = [ours / theirs for ours, theirs in zip(r["ms"], flax["ms"], strict=True)]
        assert r["times_flax_time"] == pytest.approx(statistics.median(ratios))
        assert r["times_flax_memory"] == pytest.approx(r["temporary_bytes"] / flax["temporary_bytes"])
    # The options reach the layer: each makes a program of its own.
    sizes = [found["scan" + rest]["temporary_bytes"] for rest in ("", ", recompute='gates'", ", recompute='chunk'")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert found["scan, residual_dtype=bfloat16"]["relative_error"] > 1e-4
    text = others.memory(results)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    assert tuple(row[1].strip() for row in rows) == tuple(found) and "None" not in text
    assert rows[0][4].strip() == rows[0][6].strip() == "1.00" and "2 interleaved rounds" in text


def test_ctrl_c_in_the_rounds_keeps_the_whole_ones(tmp_path, monkeypatch, capsys):
    names = ("flax.linen", "scan")
    monkeypatch.setattr(memory, "POLICIES", names)
    monkeypatch.setattr(memory, "LARGEST_CHECK", 5)
    take_turns = timing.take_turns

    def cut(calls, rounds, seconds, *, turns):
        left = iter(range(3))  # of the second policy: one call to see how many fill a turn, then one a round

        def counted():
            if next(left) == 2:
                raise KeyboardInterrupt
            return calls["scan"]()

        return take_turns(calls | {"scan": counted}, rounds, 1e-9, turns=turns)

    monkeypatch.setattr(timing, "take_turns", cut)
    path = tmp_path / "cut.jsonl"
    assert memory.main([*TINY[:5], "--rounds", "3", "--seconds", "1e-4", "--out", str(path)]) == 130
    (run,) = read([path]).runs
    assert [(r["policy"], len(r["ms"]), r["relative_error"]) for r in run.of("memory")] == [(n, 1, None) for n in names]
    assert not run.complete and run.end["reason"] == "Ctrl-C"
    assert "did not come to its end (Ctrl-C)" in others.memory(read([path]))
    assert "interrupted; what was done is in" in capsys.readouterr().err


def test_without_the_compilers_account_there_is_no_ratio_of_memory():
    turns = {name: {"calls_a_round": 1, "ms": ms} for name, ms in (("flax.linen", [2.0, 4.0]), ("scan", [3.0, 3.0]))}
    found = {name: {"policy": name, "temporary_bytes": None, "relative_error": None} for name in turns}
    _, own = memory.in_terms_of_flax(found, turns)
    assert own["times_flax_time"] == 1.125 and own["times_flax_memory"] is None


def test_compilations_take_turns_and_ctrl_c_keeps_them(tmp_path, monkeypatch):
    real, order = compiling.seconds_to_compile, []

    def compiled(contender, *shape):
        order.append((contender, shape[1]))
        if len(order) == 2 + 2 * 4 + 2:
            raise KeyboardInterrupt
        return real(contender, *shape) if len(order) == 1 else float(len(order))

    monkeypatch.setattr(compiling, "CONTENDERS", ("flax.linen", "scan"))
    monkeypatch.setattr(compiling, "seconds_to_compile", compiled)
    path, before = tmp_path / "cut.jsonl", jax.config.jax_enable_compilation_cache
    assert compiling.main([*SHORT[:4], "--repeats", "3", "--steps", "40", "8", "--out", str(path)]) == 130
    assert jax.config.jax_enable_compilation_cache == before
    lengths = [(name, steps) for steps in (8, 40) for name in compiling.CONTENDERS]
    assert order == [*lengths[:2], *lengths * 2, *lengths[:2]]  # the first of each is not counted
    results = read([path])
    (run,) = results.runs
    found = {(r["contender"], r["T"]): r["compile_seconds"] for r in run.of("compile")}
    assert found["flax.linen", 8] == [3.0, 7.0, 11.0] and found["scan", 8] == [4.0, 8.0] and len(found) == 4
    text = others.compiling(results)
    assert not run.complete and "B=2, D=3, H=4, median [least..largest] of 2 to 3." in text
    assert "| contender | T = 8: s | T = 40: s | T = 40 / T = 8 |" in text and text.count("\n| ") == 2


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (memory, ["--shape", "1", "2", "0", "4"], "--shape: 0: expected a whole number of at least 1"),
        (memory, ["--seconds", "nan"], "--seconds: nan: expected more than 0 s"),
        (compiling, ["--repeats", "0"], "--repeats: 0: expected a whole number of at least 1"),
    ],
)
def test_wrong_options_are_refused(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_names_of_policies_are_known():
    assert {*memory.POLICIES, *compiling.CONTENDERS} == {memory.FLAX, *memory.OPTIONS}
