"""The report: what it reads, which runs count, what stands in tables and the chart, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest

from benchmarks.peers import CONTENDERS, PEERS
from benchmarks.report import __main__ as command
from benchmarks.report import compact, contenders, front_door, others, words
from benchmarks.report.results import Results, read
from benchmarks.workloads import MEASUREMENTS, WORKLOADS

MACHINE = {
    "device": "1 x cpu (Some CPU)", "cores": 2, "python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8",
    "rnncore": "0.1.0", "commit": "abc1234", "versions": {"jax": "0.10.2", "torch": "2.13.0", "haiku": None},
}  # fmt: skip
LIBRARIES = {"rnncore scan": "rnncore", "rnncore cpp": "rnncore", "torch": "torch", "equinox": "equinox"}


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
        "D": shape.features, "H": shape.hidden, "heads": shape.heads, "contender": contender,
        "library": LIBRARIES.get(contender, "flax"), "dtype": "float32", "matmul_precision": "float32",
        "input_product": True, "measurement": measurement, "ms": ms, "median_ms": middle, "min_ms": min(ms),
        "max_ms": max(ms), "us_per_step": middle * 1e3 / shape.steps, "compile_seconds": 0.5,
        "temporary_bytes": 3 * 2**20, "relative_error": 4e-7, "algorithm": None,
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


FLAX, SCAN, TORCH, EQUINOX, CPP = (
    [40.0, 80.0, 60.0], [20.0, 20.0, 60.0], [50.0, 50.0, 90.0], [70.0, 90.0, 80.0], [10.0, 8.0, 15.0],
)  # fmt: skip
ONE = [
    head(),
    time("flax OptimizedLSTMCell", FLAX), time("equinox", EQUINOX), time("torch", TORCH), time("rnncore scan", SCAN),
    bound("products", [10.0, 10.0, 15.0]), bound("copy bandwidth", [1.0], workload=None, measurement=None),
    missing("equinox", "failed with a step", "S1", "float32") | {"measurement": "forward", "input_product": True},
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


# ------------------------------------------------------------------------------------------------------------- tables


def test_a_compact_row_has_ratios_within_rounds(tmp_path):
    four = (("flax OptimizedLSTMCell", FLAX), ("torch", TORCH), ("rnncore scan", SCAN), ("rnncore cpp", CPP))
    second = [time(name, [ms[0] * 4, ms[1] * 4, ms[2]], "S5") for name, ms in four]
    first = [*ONE[:-1], time("rnncore cpp", CPP)]
    text = compact.cpu(results(tmp_path, [*first, *second, end()]), "gradient")
    titles, one, five, mean = rows(text)
    assert titles == list(compact.HEAD)
    # Within rounds: flax over cpp 4, 10, 4; torch over cpp 5, 6.25, 6.
    assert one == ["(32, 128, 128, 256)", "60.0 (flax OptimizedLSTMCell)", "50.0", "20.0", "10.0", "4.00", "6.00"]
    assert five[0] == "(1, 512, 64, 64)"
    assert mean[0] == "geometric mean" and mean[1:] == ["", "", "", "", "4.00", "6.00"]
    for told in ("3 interleaved rounds", "dtype float32", "matmul precision float32", "weights included", "JAX 0.10.2",
                 "torch 2.13.0", "commit abc1234, 2026-01-02"):  # fmt: skip
        assert told in text
    assert "None" not in text


def test_what_was_not_measured_is_a_dash_and_leaves_no_mean(tmp_path):
    without = [r for r in ONE if r.get("contender") != "torch"] + [time("rnncore cpp", CPP)]
    without += [time("torch, one thread", TORCH, "S2", library="torch"), time("rnncore cpp", CPP, "S2")]
    _, one, two, mean = rows(compact.cpu(results(tmp_path, without), "gradient"))
    assert one[2] == "-" and one[-2:] == ["4.00", "-"] and two[1:4] == ["-", "50.0 (one thread)", "-"]
    assert two[-2:] == ["-", "6.00"] and mean[-2:] == ["-", "-"]


def test_the_whole_table_has_every_contender_and_bound(tmp_path):
    text = contenders.table(
        results(tmp_path, [*ONE[:-1], time("torch", [9.0, 8.0, 9.0], measurement="forward"), end()]), "cpu"
    )
    titles, *body = rows(text)
    assert titles == ["contender", *contenders.NEAR, "error", "algorithm"] and WORKLOADS["S1"].origin in text
    assert [row[0] for row in body] == [
        "rnncore scan",
        "torch",
        "flax OptimizedLSTMCell",
        "equinox",
        "*the products alone, by XLA*",
    ]
    # The best peer is torch: 2.5, 2.5, 1.5 within the rounds.
    assert body[0][1:] == ["-", "-", "20.0 [20.0..60.0]", "2.50", "4e-07", "-"]
    assert body[1][1:5] == ["9.00 [8.00..9.00]", "1.00", "50.0 [50.0..90.0]", "1.00"]


def test_what_differs_has_a_column_and_is_not_compared_and_published_numbers_stand_apart(tmp_path):
    name = "W1-768x1"
    records = [head(tag="gpu", quick=True)]
    for contender, product, factor in (("torch", True, 1.0), ("rnncore scan", True, 0.5), ("rnncore cuda", False, 2)):
        for measurement, ms in (("forward", [4.0, 4.0]), ("gradient", [8.0, 8.0])):
            records.append(time(contender, [factor * t for t in ms], name, measurement, dtype="bfloat16",
                                library=contender.split()[0], matmul_precision="default", input_product=product,
                                algorithm="STANDARD"))  # fmt: skip
    records.append(time("torch", [1.0, 1.0], name, "forward"))
    records += [missing("equinox", "takes inputs", name, "bfloat16") | {"input_product": False, "measurement": None}]
    records.append(end(reason="time is up"))
    text = contenders.table(results(tmp_path, records), "gpu")
    titles, *body = rows(text)
    assert titles[1:4] == ["dtype", "precision", "input product"] and "dtype by row" in text
    found = {(row[0], row[1]): row for row in reversed(body)}
    scan = found["rnncore scan", "bfloat16"]
    assert scan[4:8] == ["2.00 [2.00..2.00]", "2.00", "4.00 [4.00..4.00]", "2.00"] and scan[-3:] == ["-"] * 3
    assert found["rnncore cuda", "bfloat16"][5] == "-", "its products are given: no peer is"
    for p in WORKLOADS[name].published:
        row = found[p.contender, p.dtype] if p.contender != "torch" else next(r for r in body if r[1] == "float16")
        assert row[-3:] == [words.number(p.forward_ms), words.number(p.gradient_ms), f"{p.device}, {p.source}"]
    assert f"- `equinox` at {name} (bfloat16 without the input product): takes inputs" in text
    assert "quick run" in text and "did not come to its end (time is up)" in text


def test_missing_contenders_stand_together_where_their_reason_is_one(tmp_path):
    gone = [missing("haiku", "no GPU"), missing("torch", "no GPU"), missing("x", "why", "S4")]
    for w, d in (("S1", "float32"), ("S2", "float32"), ("S2", "float16"), ("S3", "float32")):
        gone.append(missing("flax", "out of memory", w, d))
    run = results(tmp_path, [head(), time("torch", TORCH), *gone, end()]).runs[0]
    records = [time("torch", TORCH, name) for name in ("S1", "S2", "S3")]
    assert words.missing(run, records).splitlines()[2:] == [
        "- `haiku`, `torch`: no GPU",
        "- `flax` at S1 (float32), S2 (float32), S2 (float16), S3 (float32): out of memory",
    ]
    assert "S2" not in words.missing(run, records[:1]) and words.missing(run, []).count("\n- ") == 1


def test_memory_and_compile_tables(tmp_path):
    memory = {"record": "memory", "policy": "recompute='chunk'", "shape_BTDH": [64, 1024, 256, 256],
              "ms": [3.0, 4.0, 5.0], "median_ms": 4.0, "temporary_bytes": 2**21,
              "times_flax_time": 1.1, "times_flax_memory": 0.2}  # fmt: skip
    compiling = [
        {"record": "compile", "contender": who, "T": t, "compile_seconds": s}
        for who, t, s in (("scan", 8192, [1.1, 1.2, 1.3]), ("scan", 128, [1.0, 1.0, 2.0]), ("flax", 128, [0.5]))
    ]
    found = results(tmp_path, [head(), memory, *compiling, end()])  # these name no run: that above is theirs
    assert rows(others.memory(found))[1] == ["recompute='chunk'", "(64, 1024, 256, 256)", "4.00", "1.10", "2", "0.20"]
    assert rows(others.compiling(found)) == [
        ["contender", "T = 128: s", "T = 8192: s", "T = 8192 / T = 128"],
        ["scan", "1.00 [1.00..2.00]", "1.20 [1.10..1.30]", "1.20"], ["flax", "0.50 [0.50..0.50]", "-", "-"],
    ]  # fmt: skip


def test_numbers_have_three_digits():
    found = [words.number(x) for x in (None, 0.01234, 1.234, 12.34, 123.4, 12345.6)]
    assert found == ["-", "0.0123", "1.23", "12.3", "123", "12346"]


def test_the_names_are_those_of_the_peers():
    libraries = {peer.library for peer in PEERS}
    jax = {name for name in libraries if words.is_jax_peer({"library": name})}
    assert jax == {"flax.linen", "haiku", "equinox"} and "torch" in libraries
    assert {name for name in libraries if not words.is_peer({"library": name})} == {"rnncore"}
    assert {names[0] for names in compact.OURS.values()} <= set(CONTENDERS)
    assert set(MEASUREMENTS) <= {"forward", "gradient"}


# ---------------------------------------------------------------------------------------------------- which runs count


def test_the_newest_complete_run_of_a_device_and_jax_counts(tmp_path):
    def run(name, day, jax="0.10.2", cut=None, **changes):
        machine = MACHINE | {"jax": jax}
        start = head(name, started=f"2026-01-{day}T00:00:00", machine=machine, **changes)
        return [
            start,
            time("rnncore scan", SCAN, run=name),
            *([] if cut == "killed" else [end(name, cut == "stopped")]),
        ]

    def chosen(*runs):
        return [r.head["run"] for r in results(tmp_path, *runs).chosen("time", "cpu")]

    old, new, newest = run("old", "01"), run("new", "02"), run("newest", "03")
    assert chosen(old + newest, new) == ["newest"]
    assert chosen(old, run("killed", "04", cut="killed"), run("stopped", "05", cut="stopped")) == ["old"]
    assert chosen(run("killed", "04", cut="killed")) == ["killed"]
    assert chosen(old, run("quick", "04", quick=True)) == ["old"]
    assert chosen(old, run("patch", "02", jax="0.10.3"), run("other", "01", jax="0.12.0")) == ["patch", "other"]
    assert chosen(old, run("gpu", "09", tag="gpu")) == ["old"]
    wide = [*old[:-1], time("rnncore scan", SCAN, "S2", run="old"), old[-1]]
    assert chosen(wide, newest) == ["old"]  # a run that was asked for fewer workloads
    for cut, why in (("stopped", "interrupted"), ("killed", "cut off")):
        text = compact.cpu(results(tmp_path, run(cut, "05", cut=cut)), "gradient")
        assert f"did not come to its end ({why})" in text


def test_the_compact_table_is_of_the_run_with_the_most_contenders(tmp_path):
    few = [head("few", machine=MACHINE | {"jax": "0.12.0"}, started="2027"), time("rnncore scan", SCAN, run="few")]
    found = results(tmp_path, ONE, [*few, end("few")])
    assert compact.run_of(found, "gradient").head["run"] == "one"
    assert all(f"**JAX {version}," in contenders.table(found, "cpu") for version in ("0.12.0", "0.10.2"))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([head(), time("torch", TORCH, run="two")], "line 2: belongs to no run above it"),
        ([head(), head()], "line 2: a second run 'one'"),
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
    root = tmp_path / "root"
    for path in (*command.TABLES, command.CHART, "benchmarks/results"):
        source, target = command.ROOT / path, root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for path in (root / "benchmarks" / "results").glob("*.jsonl"):
        path.unlink()
    monkeypatch.setattr(command, "ROOT", root)
    return root


def test_the_documents_say_what_the_results_say(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().err


def test_everything_is_written_and_a_check_finds_what_is_stale(pages, capsys):
    assert command.main([]) == 0 and command.main(["--check"]) == 0
    before = {path: (pages / path).read_text() for path in command.TABLES}
    sentence = "Not yet measured. `python -m benchmarks.gpu_check` measures it."
    assert sentence in before["benchmarks/README.md"]
    (pages / "benchmarks/results/cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ONE))
    assert command.main(["--check"]) == 1 and "README.md: not what the results give" in capsys.readouterr().err
    assert {path: (pages / path).read_text() for path in command.TABLES} == before  # a check writes nothing
    assert command.main([]) == 0 and command.main(["--check"]) == 0
    page = (pages / "benchmarks/README.md").read_text()
    assert "| rnncore scan | - | - | 20.0 [20.0..60.0] |" in page and sentence in page
    assert "| (32, 128, 128, 256) | 60.0 (flax OptimizedLSTMCell) |" in (pages / "docs/performance.md").read_text()


def test_the_chart_is_drawn_from_the_results(pages, capsys):
    path = pages / command.CHART
    path.unlink()
    assert command.main(["--check"]) == 1 and f"{command.CHART}: not what" in capsys.readouterr().err
    assert command.main([]) == 0
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG") and 10_000 < len(first) < 150_000
    data = front_door.steps(read([pages / "benchmarks/results/front_door_cpu.json"]))
    assert front_door.png(data) == first and front_door.shows(path, data)
    assert not front_door.shows(path, data | {"title": "x"})


def test_given_files_are_printed_and_the_documents_left_alone(pages, capsys):
    everything = {path: path.read_bytes() for path in pages.rglob("*") if path.is_file()}
    mine = pages.parent / "mine.jsonl"
    mine.write_text("".join(json.dumps(r) + "\n" for r in ONE))
    assert command.main(["--results", str(mine)]) == 0
    printed = capsys.readouterr().out
    assert "cpu-gradient:" in printed and "flax OptimizedLSTMCell" in printed
    mine.write_text(json.dumps(head()) + "\n")
    assert command.main(["--results", str(mine)]) == 1
    assert {path: path.read_bytes() for path in pages.rglob("*") if path.is_file()} == everything


def test_markers_are_asked_for(pages, capsys):
    page = pages / "benchmarks/README.md"
    text = page.read_text()
    for wrong, message in (
        (text.replace("<!-- table: gpu -->", ""), "benchmarks/README.md: expected the lines <!-- table: gpu -->"),
        (text + "\n<!-- table: tpu -->\n<!-- end of table -->\n", "<!-- table: tpu --> names no table; expected"),
        (text.replace("<!-- end of table -->", "", 1), "expected the lines <!-- table: cpu -->"),
    ):
        page.write_text(wrong)
        readme = (pages / "README.md").read_text()
        for options in ([], ["--check"]):
            with pytest.raises(SystemExit) as stop:
                command.main(options)
            assert stop.value.code == 2 and message in capsys.readouterr().err
        assert page.read_text() == wrong and (pages / "README.md").read_text() == readme
    with pytest.raises(SystemExit):
        command.main(["--results", str(pages / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


def test_without_results_there_is_no_table():
    assert {table(Results()) for found in command.TABLES.values() for table, _ in found.values()} == {None}
