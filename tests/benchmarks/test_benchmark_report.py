"""The report: what it reads, which runs count, what stands in tables and plots, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from benchmarks.peers import CONTENDERS, PEERS
from benchmarks.peers.reference import FORMS
from benchmarks.report import command, compact, gpu, others, plots, whole, words
from benchmarks.report.results import Results, read
from benchmarks.workloads import WORKLOADS

MACHINE = {
    "device": "1 x cpu (Some CPU)", "cores": 2, "python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8",
    "rnncore": "0.1.0", "commit": "abc1234", "versions": {"jax": "0.10.2", "torch": "2.13.0", "haiku": None},
}  # fmt: skip
LIBRARIES = {
    "rnncore scan": "rnncore", "rnncore reverse": "rnncore", "rnncore cpp": "rnncore", "torch": "torch",
    "flax OptimizedLSTMCell": "flax", "equinox": "equinox",
}  # fmt: skip


def head(run="one", **changes):
    base = {"record": "run", "run": run, "argv": [], "started": "2026-01-02T03:04:05", "machine": MACHINE,
            "commit": "abc1234", "tag": "cpu", "quick": False, "rounds": 3, "seconds": 0.2}  # fmt: skip
    return base | changes


def end(run="one", interrupted=False, reason=None):
    return {"record": "end", "run": run, "finished": "x", "interrupted": interrupted, "reason": reason}


def time(contender, ms, workload="S1", measurement="gradient", run="one", **changes):
    shape = WORKLOADS[workload]
    middle = sorted(ms)[len(ms) // 2]
    base = {
        "record": "time", "run": run, "workload": workload, "cell": shape.cell, "B": shape.batch, "T": shape.steps,
        "D": shape.features, "H": shape.hidden, "heads": shape.heads, "layers": shape.layers, "contender": contender,
        "library": LIBRARIES.get(contender, "flax"), "dtype": "float32", "matmul_precision": "float32",
        "input_product": True, "measurement": measurement, "ms": ms, "calls_a_round": 1, "median_ms": middle,
        "min_ms": min(ms), "max_ms": max(ms), "us_per_step": middle * 1e3 / shape.steps, "compile_seconds": 0.5,
        "temporary_bytes": 3 * 2**20, "argument_bytes": 1, "output_bytes": 1, "device_peak_bytes": None,
        "relative_error": 4e-7, "algorithm": None,
    }  # fmt: skip
    return base | changes


def bound(name, ms, workload="S1", measurement="gradient", run="one", **changes):
    base = {"record": "bound", "run": run, "workload": workload, "bound": name, "dtype": "float32",
            "measurement": measurement, "ms": ms, "median_ms": sorted(ms)[len(ms) // 2], "min_ms": min(ms),
            "max_ms": max(ms)}  # fmt: skip
    return base | changes


def missing(contender, reason, workload=None, dtype=None, run="one"):
    return {"record": "missing", "run": run, "workload": workload, "contender": contender, "dtype": dtype,
            "reason": reason}  # fmt: skip


# Best JAX peer is flax: the ratios within rounds to "scan" are 2, 4 and 1: their median is 2; that of medians is 1.5.
FLAX, ANY, REVERSE, TORCH, EQUINOX, CPP = (
    [40.0, 80.0, 60.0], [20.0, 20.0, 60.0], [25.0, 20.0, 30.0], [50.0, 50.0, 90.0], [70.0, 90.0, 80.0],
    [10.0, 8.0, 15.0],
)  # fmt: skip
ANY_MEDIAN_RATIO = 2.0
ONE = [
    head(),
    time("flax OptimizedLSTMCell", FLAX), time("equinox", EQUINOX), time("torch", TORCH, temporary_bytes=None,
         compile_seconds=None), time("rnncore scan", ANY), time("rnncore reverse", REVERSE),
    bound("products", [10.0, 10.0, 15.0]), bound("empty loop", [1.0, 1.0, 1.0]),
    bound("copy bandwidth", [1.0], workload=None, measurement=None, gigabytes_per_second=12.34),
    missing("equinox", "failed with a step", "S1", "float32") | {"measurement": "training_step", "input_product": True},
    missing("haiku", "dm-haiku is not installed"), missing("flax LSTMCell", "failed with OOM", "S1", "float32"),
    end(),
]  # fmt: skip


def results(tmp_path, *files):
    paths = []
    for n, records in enumerate(files):
        paths.append(tmp_path / f"{n}.jsonl")
        paths[-1].write_text("".join(json.dumps(r) + "\n" for r in records))
    return read(paths)


def rows(text):
    """Cells of the lines of all tables in a text, without those of the rules."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# -------------------------------------------------------------------------------------------------- tables of the CPU


def test_a_compact_row_has_ratios_within_rounds(tmp_path):
    second = [time(name, [ms[0] * 4, ms[1] * 4, ms[2]], "S5") for name, ms in
              (("flax OptimizedLSTMCell", FLAX), ("torch", TORCH), ("rnncore scan", ANY), ("rnncore reverse", REVERSE),
               ("rnncore cpp", CPP))]  # fmt: skip
    second.append(bound("products", [7.0, 7.0, 7.0, 7.0], "S5"))
    first = [*ONE[:-1], time("rnncore cpp", CPP)]
    text = compact.cpu(results(tmp_path, [*first, *second, end()]), "gradient")
    titles, one, five, mean = rows(text)
    assert titles == list(compact.HEAD)
    # Within rounds: flax over scan 2, 4, 1, over cpp 4, 10, 4; torch over scan 2.5, 2.5, 1.5, over cpp 5, 6.25, 6;
    # cpp, the fastest, over products 1, 0.8, 1.
    assert one == ["S1 (32, 128, 128, 256)", "flax OptimizedLSTMCell", "60.0", "50.0", "20.0", "10.0", "2.00", "4.00",
                   "2.50", "6.00", "10.0", "1.00"]  # fmt: skip
    # Bounds of other rounds are compared by medians: cpp 32 of 7.
    assert five[0] == "S5 (1, 512, 64, 64)" and five[-2:] == ["7.00", f"{32 / 7:.2f}"]
    assert mean[0] == "geometric mean" and mean[6:10] == ["2.00", "4.00", "2.50", "6.00"]
    assert mean[-1] == f"{(32 / 7) ** 0.5:.2f}"
    for told in ("3 interleaved rounds", "dtype float32", "matmul precision float32", "weights included", "JAX 0.10.2",
                 "torch 2.13.0", "commit abc1234, 2026-01-02", "- `haiku`: dm-haiku is not installed",
                 "- `flax LSTMCell` at S1 (float32): failed with OOM"):  # fmt: skip
        assert told in text
    assert "failed with a step" not in text and "None" not in text


def test_what_was_not_measured_is_a_dash_and_leaves_no_mean(tmp_path):
    without = [r for r in ONE if r.get("contender") != "torch"]
    without += [time("torch", TORCH, "S2"), time("rnncore scan", ANY, "S2")]
    _, one, two, mean = rows(compact.cpu(results(tmp_path, without), "gradient"))
    assert one[3] == "-" and one[8] == "-" and two[1] == "-" and two[3:5] == ["50.0", "20.0"]
    assert two[5:] == ["-", "-", "-", "2.50", "-", "-", "-"]
    assert mean[6:10] == ["-"] * 4 and mean[-1] == "-"


def test_the_whole_table_has_every_contender_and_bound(tmp_path):
    text = whole.cpu(results(tmp_path, ONE), "gradient")
    titles, *body = rows(text)
    assert titles == list(whole.HEAD)
    assert [row[0] for row in body] == ["rnncore scan", "rnncore reverse", "torch", "flax OptimizedLSTMCell", "equinox",
                                        "*bound: products*", "*bound: empty loop*"]  # fmt: skip
    # The best peer is torch: 2.5, 2.5, 1.5 within the rounds.
    assert body[0][1:] == ["20.0 [20.0..60.0]", f"{20e3 / 128:.0f}", "2.50", "0.5", "3", "4e-07"]
    assert body[2][3:6] == ["1.00", "-", "-"] and body[5][1:3] == ["10.0 [10.0..15.0]", "78.1"]
    assert "copy bandwidth (float32): 12.3 GB/s" in text and WORKLOADS["S1"].origin in text


def test_missing_contenders_stand_together_where_their_reason_is_one(tmp_path):
    gone = [
        missing("haiku", "no GPU"),
        missing("torch", "no GPU"),
        *(
            missing("flax", "out of memory", w, d)
            for w, d in (("S1", "float32"), ("S2", "float32"), ("S2", "float16"), ("S3", "float32"))
        ),
        missing("x", "why", "S4"),
    ]
    run = results(tmp_path, [head(), time("torch", TORCH), *gone, end()]).runs[0]
    records = [time("torch", TORCH, name) for name in ("S1", "S2", "S3")]
    assert words.missing(run, records).splitlines()[2:] == [
        "- `haiku`, `torch`: no GPU", "- `flax` at S1, S3 (float32) and S2 (float16, float32): out of memory",
    ]  # fmt: skip
    assert "S2" not in words.missing(run, records[:1]) and words.missing(run, []).count("\n- ") == 1


def test_other_equations_and_torch_with_one_thread_are_named(tmp_path):
    one = time("torch, one thread", [ms / 2 for ms in TORCH], library="torch", reference="a GRU without b_hn")
    found = results(tmp_path, [*ONE[:-1], one, end()])
    assert rows(compact.cpu(found, "gradient"))[1][3] == "25.0 (one thread)"
    assert "in float64: torch, one thread: a GRU without b_hn." in whole.cpu(found, "gradient")
    same = time("torch", TORCH, reference=FORMS["same"].note)
    assert "Other equations" not in whole.cpu(results(tmp_path, [*ONE[:-1], same, end()]), "gradient")


def test_fields_that_differ_get_a_column_and_are_not_compared(tmp_path):
    records = [head(), time("torch", [30.0, 30.0]), time("torch", [3.0, 3.0], dtype="bfloat16"),
               time("rnncore scan", [15.0, 15.0]), end()]  # fmt: skip
    text = whole.cpu(results(tmp_path, records), "gradient")
    assert rows(text)[0][-1] == "dtype" and "dtype by row" in text
    assert [(row[0], row[3], row[-1]) for row in rows(text)[1:]] == [
        ("rnncore scan", "2.00", "float32"), ("torch", "1.00", "float32"), ("torch", "1.00", "bfloat16"),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- other tables


def test_published_numbers_stand_in_their_own_columns(tmp_path):
    name = "W1-768x1"
    records = [head(tag="gpu", quick=True)]
    for contender, precision, product, factor in (
        ("torch", "default", True, 1.0),
        ("rnncore scan", "default", True, 0.5),
        ("FlashRNN cuda_fused", "default", False, 2),
    ):
        for measurement, ms in (("forward", [4.0, 4.0]), ("gradient", [8.0, 8.0])):
            records.append(time(contender, [factor * t for t in ms], name, measurement, dtype="bfloat16",
                                matmul_precision=precision, input_product=product, algorithm="STANDARD"))  # fmt: skip
    records.append(bound("products", [1.0, 1.0], name, "forward", dtype="bfloat16"))
    records += [missing("equinox", "takes inputs", name, "bfloat16") | {"input_product": False, "measurement": None}]
    records.append(end(reason="time is up"))  # the budget ended it, nobody interrupted it
    text = gpu.gpu(results(tmp_path, records))
    titles, *body = rows(text)
    assert titles == list(gpu.HEAD)
    found = {row[0]: row for row in reversed(body)}  # the first of each name, which is that measured
    assert found["rnncore scan"][4:10] == ["2.00 [2.00..2.00]", "1.95", "2.00", "4.00 [4.00..4.00]", "3.91", "2.00"]
    assert found["rnncore scan"][-3:] == ["-", "-", "-"] and found["torch"][-4] == "STANDARD"
    published = {(p.contender, p.dtype): p for p in WORKLOADS[name].published}
    for (contender, dtype), p in published.items():
        row = next(r for r in body if r[0] == contender and r[1] == dtype and r[-1] != "-")
        assert row[-3:-1] == [words.number(p.forward_ms), words.number(p.gradient_ms)]
        assert row[-1] == f"{p.device}, {p.source}"
        assert (row[4] == "-") == (contender != "FlashRNN cuda_fused")  # measured only where it was
    (aim,) = WORKLOADS[name].wanted
    told = found["*wanted: rnncore*"]
    assert told[1:4] == ["bfloat16", "-", "not included"] and told[-3:] == ["2.50", "6.00", f"H200, {aim.source}"]
    assert found["*floor, an estimate*"][-3:-1] == ["1.23 to 1.64", "-"] and body[-1] == found["*floor, an estimate*"]
    assert found["FlashRNN cuda_fused"][3] == "not included" and found["*bound: products*"][4] == "1.00 [1.00..1.00]"
    assert f"- `equinox` at {name} (bfloat16 without the input product): takes inputs" in text
    assert "quick run" in text and "did not come to its end (time is up)" in text


def test_bounds_of_two_precisions_have_a_row_each(tmp_path):
    name, rounds = "W1-768x1", {"float32": [4.0, 4.0], "tf32": [1.0, 1.0]}
    records = [head(tag="gpu")]
    for precision, ms in rounds.items():
        records.append(time("torch", [2 * t for t in ms], name, "forward", matmul_precision=precision))
        records.append(bound("products", ms, name, "forward", matmul_precision=precision, input_product=True))
    found = [row for row in rows(gpu.gpu(results(tmp_path, [*records, end()]))) if row[0] == "*bound: products*"]
    assert [row[2:5] for row in found] == [
        ["float32", "included", "4.00 [4.00..4.00]"], ["tf32", "included", "1.00 [1.00..1.00]"],
    ]  # fmt: skip


def retention_record(cell="LSTM", name="Flax defaults", **changes):
    base = {"record": "retention", "cell": cell, "initialisation": name, "path": "state", "kind": "rms", "B": 8,
            "T": 120, "D": 32, "H": 128, "seeds": 5, "retention_log10": {"1": -0.04, "100": None},
            "retention_log10_quartiles": {"1": [-0.05, 0.03], "100": [None, -300.0]}, "decay_rate": None,
            "curve": {"lags": [1, 50, 100],
                      "log10_quartiles": [[-0.1, 0.0, 0.1], [-3.0, -2.0, -1.0], [None, None, -3.0]]},
    }  # fmt: skip
    return base | changes


def test_the_retention_table_knows_what_is_exactly_0(tmp_path):
    other = retention_record("GRU", retention_log10={"1": -0.3, "100": -41.06}, decay_rate=0.93456, path="cell")
    text = others.retention(results(tmp_path, [head(tag="retention"), retention_record(), other, end()]))
    assert rows(text) == [
        ["cell", "initialisation", "path", "k = 1", "k = 100", "decay rate per step"],
        ["LSTM", "Flax defaults", "state", "-0.04 (-0.05, 0.03)", "exactly 0 (exactly 0, -300.0)", "-"],
        ["GRU", "Flax defaults", "cell", "-0.30 (-0.05, 0.03)", "-41.1 (exactly 0, -300.0)", "0.9346"],
    ]
    ours = ("path", "kind", "retention_log10_quartiles", "curve")  # which no other writer has to give
    bare = {k: v for k, v in retention_record().items() if k not in ours}
    assert rows(others.retention(results(tmp_path, [head(), bare, end()])))[1][3] == "-0.04"
    with pytest.raises(ValueError, match="lags"):
        others.retention(results(tmp_path, [head(), bare, bare | {"retention_log10": {"7": 0.0}}]))


def test_memory_and_compile_tables(tmp_path):
    memory = {"record": "memory", "policy": "recompute='chunk'", "shape_BTDH": [64, 1024, 256, 256],
              "ms": [3.0, 4.0, 5.0], "median_ms": 4.0, "temporary_bytes": 2**21,
              "times_flax_time": 1.1, "times_flax_memory": 0.2}  # fmt: skip
    compiling = [
        {"record": "compile", "contender": who, "T": t, "compile_seconds": s}
        for who, t, s in (("any", 8192, [1.1, 1.2, 1.3]), ("any", 128, [1.0, 1.0, 2.0]), ("flax", 128, [0.5]))
    ]
    found = results(tmp_path, [head(), memory, *compiling, end()])  # these name no run: that above is theirs
    assert rows(others.memory(found))[1] == ["recompute='chunk'", "(64, 1024, 256, 256)", "4.00", "1.10", "2", "0.20"]
    assert rows(others.compiling(found)) == [
        ["contender", "T = 128: s", "T = 8192: s", "T = 8192 / T = 128"],
        ["any", "1.00 [1.00..2.00]", "1.20 [1.10..1.30]", "1.20"], ["flax", "0.50 [0.50..0.50]", "-", "-"],
    ]  # fmt: skip
    assert "median [least..largest] of 1 to 3" in others.compiling(found)


def test_without_results_there_is_no_table():
    tables = [table for found in command.TABLES.values() for table, _ in found.values()]
    assert {table(Results()) for table in tables} == {None}
    assert [data(Results()) for data, *_ in plots.PLOTS.values()] == [None] * len(plots.PLOTS)


# ----------------------------------------------------------------------------------------------------- which runs count


def test_the_newest_complete_run_of_a_device_and_jax_counts(tmp_path):
    def run(name, day, jax="0.10.2", cut=None, **changes):
        machine = MACHINE | {"jax": jax}
        start = head(name, started=f"2026-01-{day}T00:00:00", machine=machine, **changes)
        return [start, time("rnncore scan", ANY, run=name), *([] if cut == "killed" else [end(name, cut == "stopped")])]

    def chosen(*runs):
        return [r.head["run"] for r in results(tmp_path, *runs).chosen("time", "cpu")]

    old, new, newest = run("old", "01"), run("new", "02"), run("newest", "03")
    assert chosen(old + newest, new) == ["newest"]
    assert chosen(old, run("killed", "04", cut="killed"), run("stopped", "05", cut="stopped")) == ["old"]
    assert chosen(run("killed", "04", cut="killed")) == ["killed"]
    assert chosen(old, run("quick", "04", quick=True)) == ["old"]
    assert chosen(old, run("patch", "02", jax="0.10.3"), run("other", "01", jax="0.12.0")) == ["patch", "other"]
    assert chosen(old, run("gpu", "09", tag="gpu")) == ["old"]
    wide = [*old[:-1], time("rnncore scan", ANY, "S2", run="old"), old[-1]]
    assert chosen(wide, newest) == ["old"]  # a run that was asked for fewer workloads
    for cut, why in (("stopped", "interrupted"), ("killed", "cut off")):
        text = compact.cpu(results(tmp_path, run(cut, "05", cut=cut)), "gradient")
        assert f"did not come to its end ({why})" in text


def test_the_compact_table_is_of_the_run_with_the_most_contenders(tmp_path):
    few = [head("few", machine=MACHINE | {"jax": "0.12.0"}, started="2027"), time("rnncore scan", ANY, run="few")]
    found = results(tmp_path, ONE, [*few, end("few")])
    assert compact.run_of(found, "gradient").head["run"] == "one"
    assert [text in whole.cpu(found, "gradient") for text in ("**JAX 0.12.0,", "**JAX 0.10.2,")] == [True, True]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([head(), {"record": "speed", "run": "one"}], "line 2: an unknown record 'speed'; expected one of run, time"),
        ([{"run": "one"}], "line 1: an unknown record None"),
        ([head(), {"record": "end", "run": "one"}], "the record 'end' lacks finished, interrupted, reason"),
        ([head(), time("torch", TORCH, run="two")], "line 2: belongs to no run above it"),
        ([time("torch", TORCH)], "line 1: belongs to no run above it"),
        ([head(), head()], "line 2: a second run 'one'"),
        ([head(), time("torch", TORCH) | {"median_ms": float("nan")}], "line 2: NaN among the numbers"),
        ([head(), time("torch", TORCH) | {"ms": []}], r"ms = \[\]; expected a positive time"),
        ([head(), time("torch", TORCH) | {"ms": [1.0, -1.0]}], "expected a positive time"),
        ([[1]], "expected an object, got list"),
    ],
)
def test_records_that_are_not_agreed_on_are_refused(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        results(tmp_path, records)


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path, capsys):
    path = tmp_path / "cut.jsonl"
    whole_lines = "".join(json.dumps(r) + "\n" for r in ONE[:3])
    path.write_text(whole_lines + '{"record": "ti')
    (run,) = read([path]).runs
    assert len(run.records) == 2 and not run.complete and "line 4: cut off" in capsys.readouterr().err
    later = "".join(json.dumps(r) + "\n" for r in (head("two"), end("two")))
    path.write_text(whole_lines + '{"record": "ti\n' + later)
    assert [(run.head["run"], run.complete) for run in read([path]).runs] == [("one", False), ("two", True)]
    path.write_text('{"record": "ti\n' + json.dumps(end()) + "\n")  # in the middle of a run it is a fault
    with pytest.raises(ValueError, match="line 1: no JSON"):
        read([path])
    (tmp_path / "x.json").write_text('{"benchmark": "speed", "records": []}')
    with pytest.raises(ValueError, match="benchmark 'speed'; expected one of migration"):
        read([tmp_path / "x.json"])


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Copies of the documents and the results, which the command takes for its own."""
    for path in (*command.TABLES, "benchmarks/results"):
        source, target = command.ROOT / path, tmp_path / "root" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for path in (tmp_path / "root" / "benchmarks" / "results").glob("*.jsonl"):
        path.unlink()
    monkeypatch.setattr(command, "ROOT", tmp_path / "root")
    return tmp_path / "root"


def test_the_documents_say_what_the_results_say(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().err


def test_everything_is_written_and_then_found_in_order(pages, capsys):
    assert command.main([]) == 0
    before = {path: (pages / path).read_text() for path in command.TABLES}
    sentence = "Not yet measured. `python -m benchmarks.run --tag gpu --quick` measures it."
    assert sentence in before["benchmarks/README.md"] and command.main(["--check"]) == 0
    lines = [*ONE[:-1], retention_record(run="one"), ONE[-1]]
    (pages / "benchmarks/results/cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert command.main(["--check"]) == 1 and "README.md: not what the results give" in capsys.readouterr().err
    assert {path: (pages / path).read_text() for path in command.TABLES} == before  # a check writes nothing
    assert command.main([]) == 0 and command.main(["--check"]) == 0
    page = (pages / "benchmarks/README.md").read_text()
    assert "plots/speed_cpu.png)" in page and "plots/retention.png)" in page and "benchmarks/plots" not in page
    assert "| rnncore scan | 20.0 [20.0..60.0] |" in page and sentence in page
    assert "| S1 (32, 128, 128, 256) | flax OptimizedLSTMCell |" in (pages / "docs/performance.md").read_text()
    pictures = [pages / path for _, _, path, _ in plots.PLOTS.values() if path.startswith("benchmarks")]
    first = [path.read_bytes() for path in pictures]
    assert all(data.startswith(b"\x89PNG") and 10_000 < len(data) < 150_000 for data in first)
    pictures[0].unlink()
    assert command.main(["--check"]) == 1 and command.main([]) == 0
    assert [path.read_bytes() for path in pictures] == first  # the same bytes again
    lines[1] = time("flax OptimizedLSTMCell", [41.0, *FLAX[1:]])
    (pages / "benchmarks/results/cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    capsys.readouterr()
    assert command.main(["--check"]) == 1 and "benchmarks/plots/speed_cpu.png: not what" in capsys.readouterr().err


def test_given_files_change_only_their_own_tables(pages):
    assert command.main([]) == 0
    before = (pages / "docs/performance.md").read_text()
    new = pages / "other.jsonl"
    new.write_text("".join(json.dumps(r) + "\n" for r in ONE))
    assert command.main(["--results", str(new), "--documents"]) == 0
    after = (pages / "docs/performance.md").read_text()
    assert "flax OptimizedLSTMCell" in after and "Lyapunov exponents" in after
    assert command.put(after, "cpu-gradient", "x") == command.put(before, "cpu-gradient", "x")


def test_given_files_are_printed_and_the_documents_left_alone(pages, capsys):
    assert command.main([]) == 0
    everything = {path: path.read_bytes() for path in pages.rglob("*") if path.is_file()}
    mine = pages.parent / "mine" / "mine.jsonl"
    mine.parent.mkdir()
    mine.write_text("".join(json.dumps(r) + "\n" for r in ONE))
    capsys.readouterr()
    assert command.main(["--results", str(mine)]) == 0
    printed = capsys.readouterr().out
    assert "cpu-gradient, as docs/performance.md has it:" in printed and "flax OptimizedLSTMCell" in printed
    assert sorted(p.name for p in mine.parent.iterdir()) == ["mine.jsonl", "mine_speed_cpu.png"]
    assert {path: path.read_bytes() for path in pages.rglob("*") if path.is_file()} == everything


def test_markers_are_asked_for(pages, capsys):
    page = pages / "benchmarks/README.md"
    text = page.read_text()
    for wrong, message in (
        (text.replace("<!-- table: gpu -->", ""), "benchmarks/README.md: expected the lines <!-- table: gpu -->"),
        (text + "\n<!-- table: tpu -->\n<!-- end of table -->\n", "<!-- table: tpu --> names no table; expected"),
        (text.replace("<!-- end of table -->", "", 1), "expected the lines <!-- table: plot-speed -->"),
    ):  # fmt: skip
        page.write_text(wrong)
        readme = (pages / "README.md").read_text()
        given = ["--results", str(pages / "benchmarks/results/analysis_cpu.json"), "--documents"]
        for options in ([], ["--check"], given):
            with pytest.raises(SystemExit) as stop:
                command.main(options)
            assert stop.value.code == 2 and message in capsys.readouterr().err
        assert page.read_text() == wrong and (pages / "README.md").read_text() == readme
    with pytest.raises(SystemExit):
        command.main(["--results", str(pages / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


def test_bars_are_of_the_fastest_contender_of_a_library(tmp_path):
    slow = time("flax LSTMCell", [ms * 2 for ms in FLAX])
    data = plots.speed(results(tmp_path, [*ONE[:-1], slow, end()]))
    assert data["groups"] == ["S1\n(32, 128, 128, 256)", "geometric\nmean"]
    assert data["bars"]["flax"][0] == [1.0, 1.0, 1.0] and "haiku" not in data["bars"]
    assert data["bars"]["rnncore scan"] == [[ANY_MEDIAN_RATIO, 1.5, 3.0], [pytest.approx(ANY_MEDIAN_RATIO)] * 3]
    assert plots.digest(data) != plots.digest(data | {"title": "x"})


def test_the_names_are_those_of_the_peers():
    libraries = {peer.library for peer in PEERS}
    jax = {name for name in libraries if words.is_jax_peer({"library": name})}
    assert jax == {"flax.linen", "flax.nnx", "haiku", "equinox", "jax.experimental.rnn"}
    assert {name for name in libraries if not words.is_peer({"library": name})} == {"rnncore"} and "torch" in libraries
    ours = {names[0] for names in compact.OURS.values()}
    assert ours <= set(CONTENDERS) and ours <= set(plots.BARS)


def test_titles_say_what_a_shape_is():
    record = time("rnncore scan", ANY, "S2")
    assert words.shape(record) == "(16, 1000, 64, 128)"
    assert words.shape(record | {"heads": 4, "layers": 2}) == "(16, 1000, 64, 128), 4 heads, 2 layers"
    diagonal = next(w for w in WORKLOADS.values() if w.recurrence == "diagonal")
    assert f"`{diagonal.name}`: diagonal " in words.title(time("rnncore scan", ANY, diagonal.name))
    assert words.title(record | {"workload": "gone"}) == "`gone`: lstm (16, 1000, 64, 128)"
    assert dataclasses.asdict(WORKLOADS["S1"])["measurements"] == tuple(whole.MEASURES)
    assert [words.number(x) for x in (None, 0.01234, 1.234, 12.34, 123.4, 12345.6)] == [
        "-", "0.0123", "1.23", "12.3", "123", "12346"]  # fmt: skip
