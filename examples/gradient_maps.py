"""How far back the gradient of one loss term reaches in a vanilla RNN and in an LSTM.

One picture shows the size of dL/dh_t at every step and unit, for L = w h_T with a random w and inputs from N(0, 1).
Neither network is trained: they have PyTorch's default weights, except for the LSTM's forget bias.  A second picture
shows what every step adds to the gradient of the weights.  The table has the LSTM's gate gradients as sums over steps,
and how they differ from jax.grad.

    python examples/gradient_maps.py                # seconds; writes gradient_maps.png and gradient_maps_bars.png
"""

import argparse
from pathlib import Path

import _claims
import jax
import matplotlib.pyplot as plt

from rnncore import analysis
from rnncore.analysis import plots

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--hidden", type=int, default=48, help="units")
parser.add_argument("--steps", type=int, default=128, help="steps of the sequence")
parser.add_argument("--out", default="gradient_maps", help="writes OUT.png and OUT_bars.png")


def main(argv: list[str] | None = None) -> None:
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    xs = _claims.inputs(jax.random.key(1), options.steps, 16, 1.0)
    readout = jax.random.normal(jax.random.key(2), (options.hidden,), _claims.FLOAT)
    networks = {"vanilla RNN": _claims.torch("RNN"), "LSTM, forget bias 3": _claims.torch("LSTM", 3.0)}
    found = {}
    for name, build in networks.items():
        cell, params = build(options.hidden, 16, jax.random.key(0))
        problem = (lambda carry, outputs: carry.h @ readout, cell, params, xs)
        found[name] = analysis.gradients_over_time(*problem)
    print(analysis.gate_table(*problem))

    figure = plots.gradient_maps({name: gradients.states.h[1:] for name, gradients in found.items()})
    figure.savefig(Path(f"{options.out}.png"), dpi=150)
    figure, panels = plt.subplots(2, figsize=(9.0, 5.2), layout="constrained")
    for ax, (name, gradients) in zip(panels, found.items(), strict=True):
        plots.weight_gradient_bars(gradients.parameters, ax=ax).set_title(name, loc="right", fontsize="medium")
    figure.savefig(Path(f"{options.out}_bars.png"), dpi=150)
    plt.close("all")
    print(f"wrote {options.out}.png and {options.out}_bars.png")


if __name__ == "__main__":
    main()
