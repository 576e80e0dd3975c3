"""The pair of pictures: the RNN's gradient is gone after a few steps, the LSTM's is not, and both files are there."""

import example_runs


def test_pictures_and_table(tmp_path, capsys, monkeypatch):
    example, drawn = example_runs.load("gradient_maps"), []
    made = example.plots.gradient_maps
    monkeypatch.setattr(example.plots, "gradient_maps", lambda found: drawn.append(made(found)) or drawn[0])
    example.main(["--hidden", "8", "--steps", "40", "--out", str(tmp_path / "maps")])
    printed = capsys.readouterr().out
    assert "dL/dU_f" in printed and printed.count("\n") == 14
    for name in ("maps.png", "maps_bars.png"):
        example_runs.check_picture(tmp_path / name)
    rnn, lstm = (ax.get_title(loc="left") for ax in drawn[0].axes[:2])
    reach = [int(title.split("in the last ")[1].split()[0]) for title in (rnn, lstm)]
    assert reach[0] <= 10 and reach[1] >= 20
