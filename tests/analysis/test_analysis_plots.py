"""Plots: the numbers that they show, labels, floors, refusals; reports: one file with everything in it."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

import rnncore
from rnncore import analysis
from rnncore.analysis import RetentionCurve, plots
from rnncore.analysis.plots.style import COLOURS, DASHES, MARKERS, line, numbers

LAGS = np.arange(21)
INF = np.inf


@pytest.fixture(autouse=True)
def no_windows(monkeypatch: pytest.MonkeyPatch):
    """Nothing is shown, and no figure of pyplot's is left over."""
    before = matplotlib.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def axes(**options):
    return Figure(layout="constrained", **options).subplots()


def curve(logs, kind="rms", path="state", lags=LAGS, **options):
    return RetentionCurve(jnp.asarray(lags), jnp.asarray(logs), kind, path, "end", "", 1, "float64", **options)


def drawn(ax):
    """Everything laid out and painted: warnings of matplotlib come from there."""
    ax.figure.savefig(io.BytesIO(), format="png")
    return ax


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def lines(ax):
    """The curves by label, guides and floors left out."""
    return {one.get_label(): one for one in ax.lines if not one.get_label().startswith("_")}


def floor_of(ax):
    """Height of the floor, which has a label below it."""
    (text,) = [text for text in ax.texts if "\N{INFINITY}" in text.get_text()]
    assert ax.get_ylim()[0] < text.xy[1]
    return text.xy[1]


# ------------------------------------------------------------------------------ retention


def test_retention_draws_curves_bounds_and_fits():
    batch = curve(-0.2 * LAGS + np.array([[0.0], [0.1], [0.2], [0.5]]))
    direct = curve(-1.5 * np.log(LAGS + 1.0), path="direct")
    bound = curve(0.1 * LAGS, "bound")
    fits = {"state": batch.fit(), "direct": direct.fit("power").power}
    ax = drawn(plots.retention([batch, direct, direct], bound=bound, fit=fits, ax=axes()))
    got = lines(ax)
    assert list(got) == [
        "rms, state", "rms, direct", "rms, direct (3)", "bound, state", "state: exp(-0.2 k)", "direct: $(k+1)^{-1.5}$",
    ]  # fmt: skip
    assert labels(ax) == list(got)
    np.testing.assert_allclose(got["rms, state"].get_ydata(), (0.2 - 0.2 * LAGS) / math.log(10), atol=1e-12)
    np.testing.assert_allclose(got["rms, direct"].get_ydata(), -1.5 * np.log10(LAGS + 1), atol=1e-12)
    x, y = got["direct: $(k+1)^{-1.5}$"].get_data()
    assert (x[0], x[-1]) == (4, 20)
    np.testing.assert_allclose(y, -1.5 * np.log10(x + 1), atol=1e-12)
    looks = [(one.get_color(), one.get_linestyle(), one.get_marker()) for one in list(got.values())[:3]]
    assert len(set(looks)) == len({c for c, _, _ in looks}) == len({m for _, _, m in looks}) == 3
    assert got["bound, state"].get_color() == "black"
    # The middle half of the four sequences, in one shade; none for a single one.
    (band,) = ax.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.2 / math.log(10))
    assert ax.get_xlabel() == "lag k (steps)" and "log" in ax.get_ylabel()
    logs = drawn(plots.retention(batch, average="log_mean", ax=axes()))
    np.testing.assert_allclose(logs.lines[0].get_ydata(), batch.log_mean() / math.log(10))


def test_retention_of_nothing_lies_on_a_labelled_floor():
    lost = np.where(LAGS > 10, -INF, -0.4 * LAGS)
    ax = drawn(plots.retention({"one": curve(lost), "other": curve(-0.1 * LAGS)}, ax=axes()))
    y = lines(ax)["one"].get_ydata()
    np.testing.assert_allclose(y[:11], -0.4 * LAGS[:11] / math.log(10))
    assert np.all(y[11:] == floor_of(ax)) and floor_of(ax) < -4 / math.log(10)
    nothing = drawn(plots.retention(curve(np.full(21, -INF)), ax=axes()))
    assert np.all(nothing.lines[-1].get_ydata() == floor_of(nothing))
    # Without a gradient at lag 0 a sequence is not among those whose spread is shown.
    without = jnp.array([False, False, True])
    batch = curve(np.stack([-0.1 * LAGS, -0.2 * LAGS, np.full(21, -INF)]), "adjoint", without_gradient=without)
    ax = drawn(plots.retention(batch, ax=axes()))
    assert not ax.texts
    np.testing.assert_allclose(ax.lines[0].get_ydata(), -0.15 * LAGS / math.log(10))


def test_ablated_retention_is_drawn_too():
    ablated = analysis.AblatedRetention(jnp.arange(3), jnp.array([0.0, -1.0, -2.0]), {"via_f": jnp.full(3, -INF)})
    got = lines(drawn(plots.retention(ablated, ax=axes())))
    assert list(got) == ["all paths", "without via_f"]
    np.testing.assert_allclose(got["all paths"].get_ydata(), [0, -1, -2], atol=1e-12)


def test_retention_over_training():
    steps, lags = np.array([0, 10, 100]), np.array([0, 5, 10, 20])
    logs = -np.outer([3.0, 2.0, 1.0], lags)
    logs[0, 3] = -INF
    ax = drawn(plots.retention_over_training(steps, lags, logs, ax=axes()))
    (mesh,) = ax.collections
    values = mesh.get_array()
    assert values.mask.T.reshape(3, 4).tolist() == np.isneginf(logs).tolist()
    np.testing.assert_array_equal(values.filled(-INF).reshape(4, 3).T, logs)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-40, 0)
    assert ax.patch.get_hatch() and "exactly 0" in mesh.colorbar.ax.get_ylabel()
    assert ax.get_xlim() == (-5, 145)  # cells halfway to the neighbours
    drawn(plots.retention_over_training([7], [0], [[-INF]], ax=axes()))


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300])
def test_gradient_heatmap_is_symmetric_and_light_for_positive(scale):
    gradients = np.array([[0.0, 1e-6, -1e-3], [1e-12, 0.5, -1.0]]) * scale
    ax = drawn(plots.gradient_heatmap(gradients, ax=axes()))
    (mesh,) = ax.collections
    assert mesh.get_array().shape == (3, 2)
    assert mesh.norm.vmin == -mesh.norm.vmax
    grey = mesh.cmap(mesh.norm(mesh.get_array())) @ [0.299, 0.587, 0.114, 0]
    # In grey print: the sign of every entry, and its size.
    assert grey[2, 1] < grey[2, 0] < grey[0, 0] < grey[1, 0] < grey[1, 1]
    assert ax.get_xlim() == (-0.5, 1.5) and ax.get_ylim() == (-0.5, 2.5)
    assert len(mesh.colorbar.get_ticks()) in (7, 9)


def test_gradient_heatmap_of_zeros_and_of_other_steps():
    ax = drawn(plots.gradient_heatmap(np.zeros((4, 2)), first=1, label="dL/dc", ax=axes()))
    assert ax.get_xlim() == (0.5, 4.5)
    assert ax.collections[0].colorbar.ax.get_ylabel() == "dL/dc"


def test_gradient_maps_share_colours_and_mark_where_the_gradient_ends():
    fading, lasting = 0.5 ** np.arange(30)[::-1, None] * [2.0, -1.0], np.ones((30, 2))
    figure = plots.gradient_maps({"RNN": fading, "LSTM": lasting}, decades=3, figure=Figure())
    upper, lower, bar = figure.axes
    assert upper.get_title(loc="left") == "RNN: above 1 % of its largest in the last 7 of 30 steps"
    assert lower.get_title(loc="left") == "LSTM: above 1 % of its largest in all 30 steps"
    assert [mark.get_xdata()[0] for mark in upper.lines] == [23.5] and not lower.lines
    (mesh,) = upper.collections
    want = np.maximum(np.log10(0.5) * np.arange(30)[::-1, None] + np.log10([1.0, 0.5]), -3)
    np.testing.assert_allclose(np.asarray(mesh.get_array()), want.T)
    assert mesh.get_clim() == lower.collections[0].get_clim() == (-3, 0)
    assert min(mesh.cmap(0.0)[:3]) > 0.9 > 0.5 > max(mesh.cmap(1.0)[:3])  # light where nothing is left
    assert bar.get_ylabel() and plots.gradient_maps(lasting, figure=Figure()).axes[0].get_ylabel() == "unit"


def test_weight_gradient_bars_and_the_step_at_which_it_is_spent():
    steps = 0.5 ** np.arange(12)[::-1]
    leaves = {"a": np.stack([steps, -steps], -1), "b": steps[:, None, None]}
    ax = plots.weight_gradient_bars(leaves, share=0.95, ax=axes())
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], math.sqrt(3) * steps)
    # Before step 9 lies 2^-4 of all, before step 8 2^-5.
    assert ax.lines[0].get_xdata()[0] == 7.5
    assert "95 % of it is spent by step 8" in ax.get_legend().get_texts()[0].get_text()
    # Two steps that take each other back make no difference.
    ax = plots.weight_gradient_bars(np.array([5.0, -5.0, 0.0, 1.0]), ax=axes())
    assert ax.lines[0].get_xdata()[0] == 0.5


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_saliency_shows_norms_and_the_window(scale):
    gradients = np.array([[0.0, 0.0], [0.3, 0.4], [0.0, 1e-3], [3.0, 4.0]]) * scale
    ax = drawn(plots.saliency(gradients, ax=axes()))
    want = np.log10([0.5, 1e-3, 5.0]) + np.log10(scale)
    np.testing.assert_allclose(ax.lines[-1].get_ydata()[1:], want)
    assert ax.lines[-1].get_ydata()[0] == floor_of(ax)
    assert labels(ax) == ["last 1 of 4 steps: 90 %"]
    wide = plots.saliency(gradients, share=0.999, first=0, ax=axes())
    assert labels(wide) == ["last 3 of 4 steps: 99.9 %"]
    assert wide.patches[0].get_extents().transformed(wide.transData.inverted()).x0 == pytest.approx(0.5)
    assert drawn(plots.saliency(np.zeros((3, 1)), ax=axes())).get_legend() is None


# -------------------------------------------------------------------------------- spectra


def test_singular_fan_has_a_line_for_every_value():
    lags = np.array([0, 5, 10])
    logs = -lags[:, None] * np.array([0.1, 1.0, 2.0, 3.0])
    logs[2, 3] = -INF
    ax = drawn(plots.singular_fan(logs, lags, ax=axes()))
    curves = [one for one in ax.lines if len(one.get_xdata()) == 3]
    np.testing.assert_allclose(curves[0].get_ydata(), logs[:, 0] / math.log(10))
    assert curves[3].get_ydata()[2] == floor_of(ax)
    assert len(curves) == 4 and labels(ax) == [r"$\sigma_{1}$", r"$\sigma_{3}$", r"$\sigma_{4}$"]


def test_eigenvalues_stand_in_the_plane_with_the_unit_circle():
    sets = {"t = 1": np.array([0.5j, -0.5j]), "t = 9": np.array([1.5 + 0j, 0.2])}
    ax = drawn(plots.eigenvalues(sets, ax=axes()))
    assert labels(ax) == ["unit circle", "t = 1", "t = 9"]
    np.testing.assert_allclose(np.hypot(*ax.lines[0].get_data()), 1.0)
    assert ax.collections[0].get_offsets().tolist() == [[0, 0.5], [0, -0.5]]
    assert ax.get_aspect() == 1 and ax.get_xlim()[1] > 1.5
    assert labels(plots.eigenvalues(np.ones((2, 3)), labels=[1, 2], ax=axes())) == ["unit circle", "1", "2"]
    assert labels(drawn(plots.eigenvalues(jnp.array([0.5 + 0j]), ax=axes()))) == ["unit circle"]


def result(exponents, **options):
    history = np.asarray(exponents)[..., None, :] * np.array([[2.0], [1.0]])
    return types.SimpleNamespace(exponents=np.asarray(exponents), history=history, times=(5, 10), **options)


def test_lyapunov_spectra_are_over_i_by_n():
    error = np.array([0.5, INF, 0.0])
    some = result([0.1, -1.0, -INF], n=6, standard_error=error)
    batch = np.array([[0.0, -2.0], [-1.0, -4.0]])
    ax = drawn(plots.lyapunov({"some": some, "batch": batch}, ax=axes()))
    got = lines(ax)
    np.testing.assert_allclose(got["some"].get_xdata(), [1 / 6, 2 / 6, 3 / 6])
    np.testing.assert_allclose(got["some"].get_ydata(), [0.1, -1.0, floor_of(ax)])
    np.testing.assert_allclose(got["batch"].get_ydata(), [-0.5, -3.0])
    bar, band = (one.get_paths()[0].vertices[:, 1] for one in ax.collections)
    assert bar.max() == pytest.approx(0.6) and (band.min(), band.max()) == (-4, 0)
    assert plots.lyapunov([0.1, -0.5], ax=axes()).lines[-1].get_ydata().tolist() == [0.1, -0.5]


def test_lyapunov_convergence_ends_at_the_exponents():
    ax = drawn(plots.lyapunov_convergence(result([[1.0, -1.0, -INF], [3.0, -1.0, -INF]], n=3), count=2, ax=axes()))
    got = lines(ax)
    assert list(got) == [r"$\lambda_{1}$", r"$\lambda_{3}$"]
    assert got[r"$\lambda_{1}$"].get_xdata().tolist() == [5, 10]
    assert got[r"$\lambda_{1}$"].get_ydata().tolist() == [4, 2]
    assert set(got[r"$\lambda_{3}$"].get_ydata()) == {floor_of(ax)}
    long = result([1.0, 0.0], n=2)
    long.times = (1, 1000)
    assert drawn(plots.lyapunov_convergence(long, ax=axes())).get_xscale() == "log"


# ---------------------------------------------------------------------------------- gates


def test_path_shares_are_stacked_by_sign():
    shares = {"direct": [[1.0, 1.5], [0.6, 1.5]], "via_f": [[0.2, -0.3], [0.2, -0.3]], "via_i": [[0.0, -0.2]] * 2}
    ax = drawn(plots.path_shares({name: np.array(a) for name, a in shares.items()}, ax=axes()))
    assert labels(ax) == ["direct", "via_f", "via_i", "sum"]
    areas = [one.get_paths()[0].vertices[:, 1] for one in ax.collections]
    # direct up; via_f up in step 1 and down in step 2; via_i down, below via_f.
    assert [(a.min().round(9), a.max().round(9)) for a in areas] == [
        (0, 1.5),
        (0.8, 1.5),
        (-0.3, 0),
        (1, 1.5),
        (-0.5, 0),
    ]
    np.testing.assert_allclose(lines(ax)["sum"].get_ydata(), [1.0, 1.0])
    assert len({one.get_hatch() for one in ax.collections}) == 3
    assert ax.get_xlim() == (0.5, 2.5) and "batch" in ax.get_ylabel()


def test_gate_saturation_is_left_against_right():
    summary = types.SimpleNamespace(left=np.array([0.0, 0.3]), right=np.array([1.0, 0.2]))
    statistics = {"f": types.SimpleNamespace(unit=summary), "i": (np.array([0.5]), np.array([0.5]))}
    ax = drawn(plots.gate_saturation(statistics, ax=axes()))
    assert labels(ax) == ["always saturated", "gate f", "gate i"]
    assert [one.get_offsets().tolist() for one in ax.collections] == [[[0, 1], [0.3, 0.2]], [[0.5, 0.5]]]
    assert "left" in ax.get_xlabel() and "right" in ax.get_ylabel()


def test_timescales_are_counted_in_logarithmic_bins():
    scales = {"a": np.array([1.0, 2.0, 100.0, INF]), "b": jnp.array([[0.0, 1.0], [1.0, 50.0]])}
    ax = drawn(plots.timescale_histogram(scales, bins=2, ax=axes()))
    assert labels(ax) == ["a", "b"] and ax.get_xscale() == "log"
    bars = [one.get_height() for one in ax.patches]
    assert bars == [0.5, 0.25, 0.25, 0.5, 0.25, 0.25]
    assert [text.get_text() for text in ax.texts] == ["\N{INFINITY}", "0"]
    assert ax.patches[2].get_x() > 100 and ax.patches[5].get_x() < 1
    same = drawn(plots.timescale_histogram(np.ones(5), bins=4, ax=axes()))
    assert sum(one.get_height() for one in same.patches) == 1.0
    ends = drawn(plots.timescale_histogram([0.0, INF], ax=axes()))
    assert [text.get_text() for text in ends.texts] == ["0", "\N{INFINITY}"]


# ------------------------------------------------------------------------- what all share


def test_without_axes_a_new_figure_is_made():
    first, second = plots.saliency(np.ones((3, 2))), plots.saliency(np.ones((3, 2)))
    assert first.figure is not second.figure and len(plt.get_fignums()) == 2
    assert plots.singular_fan(np.zeros((1, 1)), [3]).figure.get_layout_engine() is not None


def test_curves_differ_in_grey_and_in_colour():
    looks = [line(i, 50) for i in range(14)]
    assert len({(look["linestyle"], look["marker"]) for look in looks[:7]}) == 7
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 14
    assert len(COLOURS) == len(set(COLOURS)) == len(DASHES) == len(MARKERS) == 7


@pytest.mark.parametrize("call", ["retention", "shares"])
def test_the_legend_covers_no_data(call):
    if call == "retention":
        ax = plots.retention([curve(-0.1 * LAGS), curve(0.1 * LAGS, "operator")], ax=axes())
    else:
        ax = plots.path_shares({"direct": np.ones(3), "via_f": np.zeros(3)}, ax=axes())
    drawn(ax)
    legend, whole = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert not legend.overlaps(ax.get_window_extent())
    assert legend.x1 <= whole.x1 and legend.y0 >= whole.y0


BAD = {
    "retention-array": (lambda: plots.retention(np.ones(3)), r"`retention\(<ndarray>\)`.*`RetentionCurve`"),
    "retention-nothing": (lambda: plots.retention({}), "`retention`: nothing to draw"),
    "retention-nan": (lambda: plots.retention(curve(np.full(21, np.nan))), "NaN or \\+inf"),
    "retention-average": (lambda: plots.retention(curve(-LAGS), average="mean"), "expected 'mean_log' or 'log_mean'"),
    "retention-fit": (
        lambda: plots.retention(curve(-1.0 * LAGS), fit=curve(-1.0 * LAGS).decay_rate()),
        "a `DecayRate`",
    ),
    "heatmap-batch": (lambda: plots.gradient_heatmap(np.ones((2, 3, 4))), r"expected \(T, H\).*Pick one sequence"),
    "heatmap-nan": (lambda: plots.gradient_heatmap(np.array([[np.nan]])), "`gradient_heatmap"),
    "heatmap-logs": (lambda: plots.gradient_heatmap(np.array([[-INF]])), "not their logarithms"),
    "heatmap-words": (lambda: plots.gradient_heatmap("dL/dh"), "`gradient_heatmap"),
    "maps-nothing": (lambda: plots.gradient_maps({"a": np.zeros((3, 2))}), r"`gradient_maps\('a'\)`: .* is 0"),
    "maps-level": (lambda: plots.gradient_maps(np.ones((3, 2)), level=1.0), "level=1.0"),
    "bars-steps": (lambda: plots.weight_gradient_bars([np.ones(3), np.ones(2)]), r"expected arrays \(T, ...\)"),
    "bars-nothing": (lambda: plots.weight_gradient_bars(np.array([1.0, -1.0])), "the contributions add up to 0"),
    "bars-share": (lambda: plots.weight_gradient_bars(np.ones(2), share=1), "share=1"),
    "saliency": (lambda: plots.saliency(np.ones(3)), r"`saliency\(<\(3,\)>\)`: expected \(T, D\)"),
    "saliency-share": (lambda: plots.saliency(np.ones((3, 1)), share=2), "share=2"),
    "fan-lags": (lambda: plots.singular_fan(np.ones((3, 2)), [0, 1]), "one row for each lag"),
    "fan-order": (lambda: plots.singular_fan(np.ones((2, 2)), [1, 0]), r"`singular_fan\(lags=...\)`.*increasing"),
    "eigenvalues": (lambda: plots.eigenvalues(np.ones((2, 3, 4))), r"expected finite numbers \(n,\)"),
    "eigenvalues-labels": (lambda: plots.eigenvalues(np.ones((2, 3)), labels=["a"]), "expected 2 of them"),
    "lyapunov": (lambda: plots.lyapunov(np.float64(1.0)), "a `LyapunovResult`, or exponents"),
    "lyapunov-complex": (lambda: plots.lyapunov(np.array([1j])), "complex"),
    "convergence": (lambda: plots.lyapunov_convergence(np.ones(3)), "expected what `lyapunov_exponents` returns"),
    "convergence-count": (lambda: plots.lyapunov_convergence(result([1.0], n=1), count=0), r"count=0"),
    "shares-array": (lambda: plots.path_shares(np.ones(3)), "expected a mapping from the names of paths"),
    "shares-lengths": (lambda: plots.path_shares({"a": np.ones(3), "b": np.ones(2)}), "the same number of steps"),
    "shares-inf": (lambda: plots.path_shares({"a": np.array([-INF])}), "not their logarithms"),
    "saturation": (lambda: plots.gate_saturation(np.ones(3)), "`gate_statistics"),
    "saturation-range": (lambda: plots.gate_saturation({"f": ([0.5], [1.5])}), "fractions from 0 to 1"),
    "timescales": (lambda: plots.timescale_histogram(np.array([-1.0])), "expected steps of at least 0"),
    "timescales-nan": (lambda: plots.timescale_histogram(np.array([np.nan])), "none of them NaN"),
    "timescales-bins": (lambda: plots.timescale_histogram(np.ones(2), bins=0), "bins=0"),
    "training": (lambda: plots.retention_over_training([0, 1], [0], np.ones((1, 2))), r"\(S, L\) = \(2, 1\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused_by_name(name):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert str(caught.value).startswith("`") and not plt.get_fignums()


def test_half_precision_and_integers_are_numbers():
    assert numbers("f", jnp.ones(2, jnp.bfloat16), 1, "").dtype == np.float64
    assert numbers("f", [[1, 2]], 2, "").tolist() == [[1.0, 2.0]]


def test_matplotlib_is_loaded_by_the_plots_only_and_its_absence_says_what_to_install():
    code = (
        "import sys, rnncore.analysis\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n    from rnncore.analysis import plots\n"
        "except ImportError as error:\n    print(error)"
    )
    root = Path(rnncore.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert "pip install rnncore[plots]" in done.stdout
