"""The gradient-retention example: what it measures, what it leaves behind, and how it stops."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest

import rnncore

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = "--hidden 6 --embed 4 --batch 4 --length 8 --lags 12 --positions 5 --burn-in 3 --seed 3".split()
STAGES = ("initialisation", "trained")
PATHS = {"rnn": ("state", "bound", "weight bound"), "lstm": ("state", "cell", "direct", "bound")}


@pytest.fixture(scope="module")
def example():
    """The script as a module; run as a script it finds its helper files beside it, and so it does here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("gradient_retention")


def read(prefix: Path) -> dict[str, Any]:
    return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))


def call(example, *options: str) -> tuple[int, str]:
    """(exit code, what was printed)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = example.main(list(options))
    return code, printed.getvalue()


@pytest.fixture(scope="module")
def both(example, tmp_path_factory):
    """One run over both networks, with the parameters after training."""
    prefix, trained, train = tmp_path_factory.mktemp("both") / "new" / "small", {}, example.train

    def recorded(args, model, params, *rest):
        trained[model.kind] = train(args, model, params, *rest)
        return trained[model.kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "train", recorded)
        code, printed = call(example, *SMALL, "--steps", "3", "--forget-bias", "0.5", "--out", str(prefix))
    return SimpleNamespace(prefix=prefix, trained=trained, code=code, printed=printed, json=read(prefix))


def test_json_holds_settings_versions_losses_and_curves(both):
    results = both.json
    assert both.code == 0
    assert results["interrupted"] is False
    assert results["elapsed_seconds"] > 0
    assert results["settings"]["hidden"] == 6 and results["settings"]["forget_bias"] == 0.5
    assert results["versions"]["jax"] == jax.__version__ and results["versions"]["rnncore"] == rnncore.__version__
    assert 400_000 < results["text"]["characters"] < 600_000
    assert results["text"]["validation"] == results["text"]["characters"] // 10
    assert list(results["networks"]) == ["rnn", "lstm"]
    for network, entry in results["networks"].items():
        assert entry["training"]["steps"] == len(entry["training"]["loss_nats"]) == 3
        assert entry["training"]["tokens_per_second"] > 0
        for stage in STAGES:
            assert tuple(entry[stage]["curves"]) == PATHS[network]
            for curve in entry[stage]["curves"].values():
                assert curve["lags"] == list(range(1, 13)) and len(curve["mean_log10"]) == 12
                assert None not in curve["mean_log10"]
                assert set(curve["half_life"]) == {"exponential", "crossing"}
                assert curve["decay_rate"]["window"] == [4, 12]
            state = entry[stage]["curves"]["state"]
            low, mean, high = (np.array(state[key]) for key in ("low_log10", "mean_log10", "high_log10"))
            assert state["sequences"] == 5 and (low <= mean).all() and (mean <= high).all() and (low < high).any()
        uniform = np.log(results["text"]["distinct"])
        start = entry["initialisation"]
        assert abs(start["validation_loss_nats"] - uniform) < 0.5
        assert start["validation_loss_bits"] == pytest.approx(start["validation_loss_nats"] / np.log(2), rel=1e-5)


def test_table_and_verdict_say_what_the_json_says(both):
    lines = both.printed.splitlines()
    for network, name in (("rnn", "vanilla RNN"), ("lstm", "LSTM")):
        for stage, when in zip(STAGES, ("at initialisation", "after training"), strict=True):
            for path in PATHS[network]:
                (row,) = (line for line in lines if line.split("  ")[0] == name and f"{when}" in line
                          and [c.strip() for c in line.split("  ") if c.strip()][2] == path)  # fmt: skip
                curve = both.json["networks"][network][stage]["curves"][path]
                cells = [c for c in row.split("  ") if c.strip()][3:]
                powers = [float(c.strip().removeprefix("10^")) for c in cells[:3]]
                assert powers == pytest.approx([curve["mean_log10"][lag - 1] for lag in (1, 10, 12)], abs=0.051)
                assert float(cells[3]) == pytest.approx(curve["decay_rate"]["rate"], abs=0.51e-4)
                assert float(cells[4]) == pytest.approx(curve["decay_rate"]["r_squared"], abs=0.51e-3)
        state = both.json["networks"][network]["trained"]["curves"]["state"]
        (verdict,) = (line for line in lines if line.startswith(f"{name}, state: after training, lag 12 keeps"))
        assert f"10^{round(state['mean_log10'][-1], 1) + 0.0:.1f} of the gradient" in verdict
        assert f"{abs(state['decay_rate']['rate']):.4f} per step" in verdict and "half-life" in verdict


def test_picture_shows_both_networks(both):
    pixels = matplotlib.image.imread(f"{both.prefix}.png")[..., :3]
    assert pixels.shape[0] > 600 and pixels.shape[1] > 1200
    for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"):
        rgb = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
        columns = np.flatnonzero((np.abs(pixels - rgb).max(-1) < 0.02).any(0))
        assert len(columns) > 20, colour


def step_by_hand(kind: str, params: Any, hidden: int):
    """One step, and the gates' forget part, in flax.linen's own cells."""
    cell = {"rnn": flax.linen.SimpleCell, "lstm": flax.linen.OptimizedLSTMCell}[kind](hidden)
    return lambda carry, x: cell.apply({"params": params["rnn"]["cell"]}, carry, x)[0]


def retention_by_hand(kind: str, params: Any, piece: np.ndarray, hidden: int, lag: int) -> dict[str, float]:
    """log10 of the retention of one position by jax.grad of the loss term in terms of earlier states."""
    step = step_by_hand(kind, params, hidden)
    xs = params["embedding"]["embedding"][piece[:-1]]
    zero = jnp.zeros(hidden)
    carries = [(zero, zero) if kind == "lstm" else zero]
    for x in xs:
        carries.append(step(carries[-1], x))

    def loss(carry: Any, left: int) -> Any:
        for x in xs[len(xs) - left :]:
            carry = step(carry, x)
        logits = jax.tree.leaves(carry)[-1] @ params["readout"]["kernel"] + params["readout"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, piece[-1])

    def size(tree: Any) -> float:
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))

    def share(gradient_at: Any) -> float:
        return np.log10(size(gradient_at(lag)) / size(gradient_at(0)))

    result = {"state": share(lambda left: jax.grad(loss)(carries[-1 - left], left))}
    if kind == "lstm":

        def through_cell(left: int) -> Any:
            c, h = carries[-1 - left]
            o = h / jnp.tanh(c)
            return jax.grad(lambda c: loss((c, o * jnp.tanh(c)), left))(c)

        gates = params["rnn"]["cell"]
        total = adjoint = through_cell(0)
        for (_, h), x in list(zip(carries[:-1], xs, strict=True))[-lag:]:
            a = x @ gates["if"]["kernel"] + h @ gates["hf"]["kernel"] + gates["hf"]["bias"]
            total = total * jax.nn.sigmoid(a)
        result |= {"cell": share(through_cell), "direct": np.log10(size(total) / size(adjoint))}
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["rnn", "lstm"])
def test_retention_is_that_of_jax_grad(example, both, kind, stage):
    corpus, lag = example._corpus.load(None), 7
    model = example.LanguageModel(kind, len(corpus.vocabulary), 4, 6)
    params = both.trained[kind] if stage == "trained" else example.initialise(model, 3, 0.5)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    starts = np.linspace(0, len(corpus.validation) - 16, 5).astype(int)
    each = [retention_by_hand(kind, params, corpus.validation[s : s + 16], 6, lag) for s in starts]
    curves = both.json["networks"][kind][stage]["curves"]
    for path in each[0]:
        expected = np.mean([one[path] for one in each])
        assert curves[path]["mean_log10"][lag - 1] == pytest.approx(expected, abs=2e-5), path


def without_times(entry: dict[str, Any]) -> dict[str, Any]:
    training = {k: v for k, v in entry["training"].items() if k not in ("seconds", "tokens_per_second")}
    return {**entry, "training": training}


def test_same_seed_gives_the_same_numbers_and_another_others(example, both, tmp_path):
    code, _ = call(example, *SMALL, "--steps", "3", "--cell", "rnn", "--out", str(tmp_path / "again"))
    again = read(tmp_path / "again")
    assert code == 0 and list(again["networks"]) == ["rnn"]
    assert without_times(again["networks"]["rnn"]) == without_times(both.json["networks"]["rnn"])
    assert not Path(tmp_path / "again.json.part").exists()
    call(example, *SMALL, "--steps", "1", "--cell", "rnn", "--seed", "4", "--out", str(tmp_path / "other"))
    other = read(tmp_path / "other")["networks"]["rnn"]["initialisation"]["curves"]["state"]
    assert other["mean_log10"] != again["networks"]["rnn"]["initialisation"]["curves"]["state"]["mean_log10"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "übung.txt"
    path.write_text("wer übt, lernt; wer lernt, übt wieder.\n" * 40, encoding="utf-8")
    return path


def test_own_text_is_learned(example, text_file, tmp_path):
    options = [*SMALL, "--steps", "60", "--learning-rate", "0.05", "--text", str(text_file)]
    code, printed = call(example, *options, "--cell", "rnn", "--out", str(tmp_path / "own"))
    results = read(tmp_path / "own")
    entry = results["networks"]["rnn"]
    assert code == 0 and "vanilla RNN" in printed and "LSTM" not in printed
    assert results["text"] == {"source": str(text_file), "characters": 1560, "distinct": 15, "train": 1404,
                               "validation": 156}  # fmt: skip
    assert entry["training"]["loss_nats"][0] == pytest.approx(np.log(15), abs=0.7)
    assert entry["training"]["loss_nats"][-1] < 1.5 and entry["trained"]["validation_loss_nats"] < 1.5


def test_words_are_those_of_the_penn_treebank(example, tmp_path):
    corpus = example._corpus.encode_words(" no it was n't black monday \n\n it was <unk> \n" * 10, "here", 100)
    assert corpus.vocabulary[:3] == ["it", "was", "<eos>"] and corpus.unit == "word" and len(corpus.vocabulary) == 8
    words = [corpus.vocabulary[t] for t in np.concatenate([corpus.train, corpus.validation])]
    assert words[:11] == "no it was n't black monday <eos> it was <unk> <eos>".split() and len(words) == 110
    few = example._corpus.encode_words("a a a b b c d\n" * 10, "here", 4)
    assert few.vocabulary == ["a", "b", "<eos>", "<unk>"]
    assert [few.vocabulary[t] for t in few.train[:8]] == "a a a b b <unk> <unk> <eos>".split()
    with pytest.raises(ValueError, match="fewer than two distinct words"):
        example._corpus.encode_words("word word", "here", 10)
    (tmp_path / "ptb.txt").write_text("the cat sat on the mat\nthe dog sat\n" * 60, encoding="utf-8")
    options = [*SMALL, "--steps", "2", "--text", str(tmp_path / "ptb.txt"), "--words", "6", "--cell", "lstm"]
    code, printed = call(example, *options, "--sparse-output", "0.1", "--out", str(tmp_path / "ptb"))
    assert code == 0 and "660 words, 6 distinct" in printed and "nats per word" in printed
    assert read(tmp_path / "ptb")["text"]["words"] == 660


def test_the_penalty_is_the_mean_output_gate(example):
    model = example.LanguageModel("lstm", 5, 3, 4)
    params, window = example.initialise(model, 0), np.arange(12).reshape(2, 6) % 5
    plain, (nats, carry) = example.window_loss(model, params, None, window)
    sparse, (same, _) = example.window_loss(model, params, None, window, 0.5)
    cell, weights = example.nn.functional(example.CELLS["lstm"](4), params["rnn"]["cell"])
    xs = params["embedding"]["embedding"][window[:, :-1]]
    gates = example.analysis.trajectory(cell, weights, xs).gates
    assert plain == nats == same and sparse - plain == pytest.approx(0.5 * float(gates.o.mean()), rel=1e-5)


def test_forget_bias_moves_the_forget_gate_alone(example):
    model = example.LanguageModel("lstm", 5, 3, 4)
    plain, biased = example.initialise(model, 0), example.initialise(model, 0, 1.5)
    np.testing.assert_array_equal(biased["rnn"]["cell"]["hf"]["bias"], np.full(4, 1.5))
    biased["rnn"]["cell"]["hf"]["bias"] -= 1.5
    jax.tree.map(np.testing.assert_array_equal, plain, biased)


def test_windows_go_on_where_the_last_one_stopped(example):
    tokens = np.arange(4 * 35)
    windows = example._corpus.Windows(tokens, batch=4, length=8, seed=0)
    passes: list[list[np.ndarray]] = []
    for _ in range(12):
        window, fresh = next(windows)
        assert window.shape == (4, 9) and (np.diff(window) == 1).all()
        if fresh:
            passes.append([])
        else:
            np.testing.assert_array_equal(window[:, 0], passes[-1][-1][:, -1])
        passes[-1].append(window)
    assert len(passes) >= 3 and len({int(windows[0][0, 0]) for windows in passes}) > 1


# ------------------------------------------------------------------------------------- interruption


def stopped(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_stopped_before_training_keeps_what_was_measured(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "train", stopped)
    code, printed = call(example, *SMALL, "--out", str(tmp_path / "cut"))
    results = read(tmp_path / "cut")
    assert code == 130 and results["interrupted"] is True
    for network in ("rnn", "lstm"):
        assert "trained" not in results["networks"][network]
        assert tuple(results["networks"][network]["initialisation"]["curves"]) == PATHS[network]
    assert "interrupted" in printed and "LSTM, cell: at initialisation, lag 12 keeps" in printed
    assert matplotlib.image.imread(tmp_path / "cut.png").std() > 0.05


def test_stopped_in_training_keeps_the_losses_so_far(example, tmp_path, monkeypatch):
    ahead, count = example._corpus.Windows.__next__, iter(range(100))
    monkeypatch.setattr(example._corpus.Windows, "__next__", lambda w: stopped() if next(count) == 2 else ahead(w))
    code, _ = call(example, *SMALL, "--cell", "rnn", "--out", str(tmp_path / "cut"))
    entry = read(tmp_path / "cut")["networks"]["rnn"]
    assert code == 130
    assert entry["training"]["steps"] == len(entry["training"]["loss_nats"]) == 2
    assert "initialisation" in entry and "trained" not in entry


def test_stopped_before_anything_was_measured_leaves_older_files_alone(example, tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("{}")
    monkeypatch.setattr(example, "measure", stopped)
    code, printed = call(example, *SMALL, "--out", str(tmp_path / "old"))
    assert code == 130 and "nothing was measured" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"] and read(tmp_path / "old") == {}


def trained(shown: Path) -> str:
    """The last count of characters on the progress bar of the training; empty where none was trained on yet."""
    text = shown.read_bytes().decode(errors="replace")  # the last line may end in half a character
    counts = re.findall(r"train vanilla RNN:[^\r\n]*?\| *([1-9][\d.]*[kMG]?)/", text)
    return counts[-1] if counts else ""


def interrupt(process: subprocess.Popen, shown: Path) -> None:
    """Ctrl-C in the training, and again as long as the training goes on all the same; three times at most.

    JAX registers a callback with the garbage collector, and Python drops an exception that is raised in one.
    """
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
            return
        before, until = trained(shown), time.monotonic() + 12  # the bar moves once in ten seconds at least
        while process.poll() is None and trained(shown) == before and time.monotonic() < until:
            time.sleep(0.2)
        if trained(shown) == before:
            return  # it has heard, and is slow to write


# What is started in the background, and all that it starts, ignores Ctrl-C; the script here must not.
HEARING = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.argv.pop(0); sys.path.insert(0, sys.argv.pop(0)); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_ctrl_c_on_the_running_script(tmp_path):
    roots = [str(Path(rnncore.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}
    script = [sys.executable, "-c", HEARING, EXAMPLES, EXAMPLES / "gradient_retention.py"]
    command = [*script, *SMALL, "--cell", "rnn", "--steps", "1000000"]
    shown = tmp_path / "shown"
    with (
        shown.open("w") as errors,
        subprocess.Popen(
            [*command, "--out", tmp_path / "cut"], env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        try:
            # A signal that comes while the script compiles is lost more easily: see `interrupt`.
            while not trained(shown) and process.poll() is None:
                time.sleep(0.05)
            interrupt(process, shown)
            printed, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    errors_shown = shown.read_text(errors="replace")
    assert process.returncode == 130, errors_shown
    assert "Traceback" not in errors_shown
    results = read(tmp_path / "cut")
    assert results["interrupted"] is True and (tmp_path / "cut.png").exists()
    assert results["networks"]["rnn"]["training"]["steps"] > 0
    assert "vanilla RNN, state: at initialisation, lag 12 keeps" in printed


def test_training_that_diverges_says_so_and_keeps_the_rest(example, tmp_path, capsys):
    code = example.main([*SMALL, "--cell", "rnn", "--learning-rate", "1e38", "--out", str(tmp_path / "far")])
    entry = read(tmp_path / "far")["networks"]["rnn"]
    assert code == 1 and "training diverged at step" in capsys.readouterr().err
    assert "initialisation" in entry and "trained" not in entry


# ------------------------------------------------------------------------------------- command line


def test_help_names_every_option_and_its_default(example, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    names = ("--steps", "--hidden", "--cell", "--seed", "--out", "--text", "--batch", "--length", "--embed",
             "--learning-rate", "--clip", "--forget-bias", "--lags", "--positions", "--burn-in", "--sparse-output",
             "--words")  # fmt: skip
    assert [name for name in names if name not in text] == []
    assert text.count("(default:") == len(names) - 2 and "(default: None)" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "no such file"], "cannot read no such file: No such file or directory"),
        (["--text", "{folder}/latin.txt"], "latin.txt is not utf-8 text"),
        (["--text", "{folder}/empty.txt"], "empty.txt is empty"),
        (["--text", "{folder}/short.txt"], "short.txt has 300 characters; these settings need about 7,147"),
        (["--cell", "gru"], "argument --cell: invalid choice: 'gru'"),
        (["--steps", "-1"], "argument --steps: -1 is too small, expected at least 0"),
        (["--hidden", "many"], "argument --hidden: invalid integer value: 'many'"),
        (["--learning-rate", "0"], "argument --learning-rate: 0 is not positive"),
    ],
)
def test_wrong_options_are_refused_in_words(example, tmp_path, capsys, options, message):
    (tmp_path / "latin.txt").write_bytes("übung".encode("latin-1") * 1000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc" * 100)
    with pytest.raises(SystemExit) as stop:
        example.main([option.format(folder=tmp_path) for option in options] + ["--out", str(tmp_path / "none")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
