"""Reports of whole models: findings on models whose answers are known, and the page in a real browser."""

import dataclasses
import math
import re

import browser
import flax.linen as fnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import rnncore
from rnncore import analysis, linen
from rnncore.analysis import plots
from rnncore.analysis.plots import report_page
from rnncore.analysis.report.findings import findings

DECAY, H, T, B = 0.9, 3, 40, 4
F64 = {"param_dtype": jnp.float64}
XS = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, H)))


class Decaying(fnn.Module):
    """Two layers of h_t = a h_{t-1} + x_t; what the lower one says is cut off where asked."""

    cut: bool = False

    @fnn.compact
    def __call__(self, xs):
        lower = linen.RNN(linen.SimpleCell(H, activation_fn=jax.nn.identity, **F64), name="lower")(xs)
        read = jax.lax.stop_gradient(lower) if self.cut else xs
        return linen.RNN(linen.SimpleCell(H, activation_fn=jax.nn.identity, **F64), name="upper")(read)


def known(cut=False, decay=DECAY, xs=XS):
    model = Decaying(cut)
    variables = model.init(jax.random.key(0), xs)

    def set_to(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "bias":
            return jnp.zeros_like(leaf)
        return jnp.eye(H) * (decay if "h" in names else 1.0)

    return model, jax.tree_util.tree_map_with_path(set_to, variables)


def last(outputs, _):
    return jnp.sum(outputs[:, -1])


@pytest.mark.ci
def test_findings_of_a_known_decay():
    model, variables = known(cut=True)
    found = analysis.report(model, variables, XS, last)
    upper, lower = found.layers["upper"], found.layers["lower"]
    half = math.log(2) / -math.log(DECAY)
    # The curve is read between whole steps, along its own straight line.
    assert upper.half_life.median == pytest.approx(half, abs=1e-9) and upper.half_life.sequences == B
    assert upper.rate.median == pytest.approx(-math.log(DECAY), abs=1e-12)
    mass = np.cumsum(DECAY ** (2 * np.arange(T)))
    assert upper.reach.median == 1 + int(np.sum(mass < 0.9 * mass[-1]))
    assert lower.cut_off and not upper.cut_off
    assert found.findings[0] == "No gradient of the loss reaches lower."
    assert found.findings[1].startswith(
        f"90 % of the squared gradient of the loss reaches back {int(upper.reach.median)}"
    )
    assert (
        "upper loses half of the gradient that arrives at its last state in 6.58 (6.58 to 6.58) steps"
        in found.findings[2]
    )
    assert any("lower: it is cut off from the loss" in text for text in found.warnings)
    assert 3 <= len(found.findings) <= 6
    text = str(found)
    assert text == repr(found) and all(f"- {one}" in text for one in found.findings)
    assert re.search(r"^upper +Elman +3 +40 +4 ", text, re.M)
    lengths = dataclasses.replace(upper.layer.run, lengths=jnp.array([24, T, T, T]))
    ragged = findings([dataclasses.replace(upper, layer=upper.layer._replace(run=lengths))])
    assert "reaches back 11 (11 to 11) of 24 to 40 steps in upper" in ragged[0]
    assert "after as many steps as the shortest sequence has (24): " in ragged[2]
    assert repr(upper) == "LayerReport('upper', reach 11 (11 to 11), half-life 6.58 (6.58 to 6.58), of 40 steps)"


@pytest.mark.slow
def test_a_window_too_short_a_bound_that_tells_nothing_and_saturated_gates():
    model, variables = known(decay=0.999)
    found = analysis.report(model, variables, XS, last, exponents=0)
    assert any("upper: the window of 40 steps is too short for a half-life" in text for text in found.warnings)
    assert any("upper keeps more than half of the gradient over all 40 steps" in text for text in found.findings)
    model, variables = known(decay=1.05)
    grown = analysis.report(model, variables, XS, last, exponents=0)
    assert any(f"it grows by 10^{40 * math.log10(1.05):.1f}" in text for text in grown.findings)

    layer = linen.RNN(linen.LSTMCell(H, **F64))
    saturated = jax.tree.map(lambda a: 40 * a, layer.init(jax.random.key(0), XS))
    found = analysis.report(layer, saturated, XS, last, exponents=0)
    said = r"the gate o is saturated: \d+% of its values lie below 0.1 or above 0.9"
    assert any(re.search(said, text) for text in found.warnings)
    assert any(
        "The upper bound, a product of norms, is 10^" in text and "too loose to tell" in text for text in found.findings
    )


@pytest.mark.slow
def test_the_limit_of_float32_and_half_precision_are_said():
    xs = XS.astype(jnp.float32)
    model = linen.RNN(linen.SimpleCell(H, activation_fn=jax.nn.identity), name="layer")
    variables = jax.tree.map(
        lambda a: 0.05 * jnp.eye(*a.shape) if a.ndim == 2 else a, model.init(jax.random.key(0), xs)
    )
    found = analysis.report(model, variables, xs, last, exponents=0, dense_up_to=0)
    assert any("10^-52 is left after 40 steps, below the range of float32" in text for text in found.warnings)
    half = linen.RNN(linen.GRUCell(H, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    xs = xs.astype(jnp.bfloat16)
    variables = half.init(jax.random.key(0), xs)
    found = analysis.report(
        half, variables, xs, lambda ys, _: jnp.sum(ys.astype(jnp.float32)), exponents=0, dense_up_to=0
    )
    assert any("the model runs it in bfloat16; the analysis uses float32" in text for text in found.warnings)


def test_what_is_wrong_is_said_by_name():
    model, variables = known()
    with pytest.raises(ValueError, match=r"`report\(loss=...\)`: it returned <float64 \(4, 3\)>"):
        analysis.report(model, variables, XS, lambda outputs, _: outputs[:, -1])
    with pytest.raises(ValueError, match=r"loss=<ArrayImpl>\)`: expected the loss last, a function"):
        analysis.report(model, variables, XS)
    with pytest.raises(ValueError, match=r"loss=<<lambda>\(outputs\)>\)`: expected a function \(outputs, batch\) to"):
        analysis.report(model, variables, XS, lambda outputs: 0.0)
    with pytest.raises(ValueError, match=r"`report\(model\)`: expected \(model, variables, batch, loss\)"):
        analysis.report(model)


# ---------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of two reports side by side: the largest there is."""
    layer = linen.Bidirectional(*(linen.RNN(linen.LSTMCell(6, **F64)) for _ in range(2)))
    variables = layer.init(jax.random.key(0), XS)
    after = analysis.report(layer, variables, XS, last, title="A layer <b> & its gradient", exponents=0)
    before = analysis.report(layer, jax.tree.map(lambda a: 6 * a, variables), XS, last, exponents=0)
    folder = tmp_path_factory.mktemp("page")
    return after, after.save(folder / "page.html", before=before), after.save(folder / "alone.html")


@pytest.mark.slow
def test_the_page_is_one_file_with_findings_first_and_how_it_was_computed_last(page):
    report, path, alone = page
    text = path.read_text(encoding="utf-8")
    plain = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|<script|<link rel=\"style|@import|url\(", plain)
    assert "<b> &" not in plain.replace("<figcaption><b>", "") and "&lt;b&gt; &amp;" in plain
    assert "nan" not in re.sub(r"<style>.*?</style>", "", plain).lower().replace("tenant", "")
    headings = re.findall(r"<h2>(.*?)</h2>", plain)
    assert headings[0].startswith("Findings before") and headings[1].startswith("Findings after")
    assert headings[2:4] == ["Bidirectional/forward", "Bidirectional/backward"]
    assert headings[-2:] == ["Numbers", "How it was computed"]
    # A layer has three pictures, each in a light and a dark form, before and after.
    assert plain.count("<figure>") == 2 * 2 * 3 and plain.count("<source media") == 12
    assert alone.read_text(encoding="utf-8").count("<figure>") == 2 * 3
    assert plain.count("<caption>") == 4 and plain.count("<li>") > 12
    with pytest.raises(ValueError, match="expected a name that ends in .html"):
        report.save("page.png")


@pytest.mark.slow
def test_the_page_of_a_single_run(tmp_path):
    cell = rnncore.GRU(3)
    xs = XS[:, :10]
    run = analysis.trajectory(
        cell, cell.init(jax.random.key(0), H, jnp.float64), xs, seq_lengths=jnp.array([7, 10, 9, 10])
    )
    adjoint = jax.tree.map(jnp.ones_like, run.last)
    text = plots.report_trajectory(run, tmp_path / "run.html", adjoint).read_text(encoding="utf-8")
    assert text.count("<figure>") == 3 and "GRU loses half of the gradient" in text
    text = plots.report_trajectory(run, tmp_path / "run.html", title="mine", dense_up_to=2).read_text(encoding="utf-8")
    assert text.count("<figure>") == 1 and "<h1>mine</h1>" in text and "n = 3 is above dense_up_to = 2" in text


@pytest.mark.slow
def test_a_bound_never_squashes_the_curves():
    model, variables = known(decay=0.9)
    one = analysis.report(model, variables, XS, last, exponents=0).layers["upper"]
    low = float(one.retention.mean_log()[-1]) / math.log(10)
    logs = jnp.asarray(one.bound.lags) * 1.5 * jnp.ones((B, 1))
    huge = dataclasses.replace(one.bound, log_retention=logs)
    ax = Figure().subplots()
    report_page._retention(dataclasses.replace(one, bound=huge), [one]).draw(ax)
    bottom, top = ax.get_ylim()
    assert top < 0.5 and low - 0.5 < bottom < low
    assert any(text.get_text() == "bound: 10^26 at lag 40, not drawn" for text in ax.get_legend().get_texts())


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium here; .ci/run installs one and names it")
def test_in_a_real_browser(page, tmp_path):
    for path in page[1:]:
        seen, console = browser.open_page(path, (420, 1024, 1600), tmp_path)
        assert not re.search("error", console, re.I), console
        assert [one["width"] for one in seen] == [420, 1024, 1600]
        for one in seen:
            assert one["scroll"] <= one["width"] and one["wide"] == [] and one["errors"] == []
            assert one["size"] >= 16 and len(one["pictures"]) in (6, 12)
            for picture in one["pictures"]:
                assert picture["drawn"] and len(picture["alt"]) > 20 and picture["width"] > 200
