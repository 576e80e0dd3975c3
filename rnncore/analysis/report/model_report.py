"""The report of a whole model: where the gradient of its loss goes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.gradients.over_time import gradients_over_time
from rnncore.analysis.report.findings import findings, warnings
from rnncore.analysis.report.measured import LayerReport, measure
from rnncore.analysis.run.model import Call, RecurrentLayer, record, recorder_of
from rnncore.analysis.run.trajectory import Trajectory, check_takes, check_trajectory

HEADER = (
    "layer", "cell", "n", "T", "sequences", "90 % within (steps)", "half gone after (steps)", "decay (ln per step)",
    "log10 left at T", "largest exponent",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The result of `report`: prints its findings and saves a page.

    Fields:
      title: of the page.
      value: the loss; None for a single run.
      layers: a `LayerReport` for every recurrent layer and direction, by name.
      left_out: why other layers could not be analysed, by name.
    """

    title: str
    value: float | None
    layers: dict[str, LayerReport]
    left_out: dict[str, str]

    @property
    def findings(self) -> list[str]:
        """Three to six sentences computed from the numbers, with their uncertainty."""
        return findings(list(self.layers.values()))

    @property
    def warnings(self) -> list[str]:
        """Cases in which a number means little."""
        return warnings(list(self.layers.values())) + [
            f"{name}: left out, {why}" for name, why in self.left_out.items()
        ]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A header and a row for each layer."""
        return [HEADER, *(_row(one) for one in self.layers.values())]

    def __str__(self) -> str:
        rows = self.table
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts = [
            self.title if self.value is None else f"{self.title}, loss {self.value:.4g}",
            *(f"- {text}" for text in self.findings),
        ]
        parts += [f"! {text}" for text in self.warnings]
        return "\n".join([*parts, "", *lines])

    __repr__ = __str__

    def save(self, path: str | Path, *, before: Report | None = None) -> Path:
        """Writes a self-contained HTML file: findings, pictures, tables, and how everything was computed.

        Args:
          path: must end in .html.
          before: another report of the same layers, such as that of the untrained model, to show beside this one.

        Returns:
          The path.

        Raises:
          ValueError: another ending; no layer in common with `before`.
          ImportError: matplotlib is not installed.
        """
        from rnncore.analysis.plots.report_page import save

        return save(self, path, before)


def report(
    model: Any,
    *arguments: Any,
    call: Call | None = None,
    rngs: Any = None,
    title: str | None = None,
    dense_up_to: int = 256,
    exponents: int = 4,
    progress: Callable[[list[str]], Iterable[str]] | None = None,
) -> Report:
    """Where the gradient of the loss of a whole Flax model goes, layer by layer.

    The model runs forward and backward once, with zeros added to every state and input of every recurrent layer, so
    dL/ds_t and dL/dx_t are exact.  Everything else is computed from the trajectory of each layer.

    Args:
      model: a flax.linen or flax.nnx model with recurrent layers of rnncore or Flax, however nested, shared or
        stacked, in one direction or both; cells of your own under `RNN` too.
      arguments: (variables, batch, loss) for a linen model, (batch, loss) for an nnx model.  loss: (outputs, batch)
        to one number.
      call: (model, batch) to outputs, such as `lambda model, batch: model(batch["tokens"], train=False)`; by default
        `model(inputs)`, where the inputs are the batch itself or the first entry of a tuple or list.
      rngs: passed to `apply` of a linen model.
      title: of the page; by default the name of the model's class.
      dense_up_to: the largest size n of a state for measurements that take n^3 operations per step.
      exponents: how many leading Lyapunov exponents; 0 for none.
      progress: a wrapper for the list of layers, such as `tqdm.tqdm`.

    Returns:
      `Report`; `print` it, or `.save("page.html")`.

    Raises:
      ValueError: arguments that do not fit, a loss that is not one number, a model without recurrent layers, numbers
        that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import analysis, linen as nn
      >>> model, xs = nn.Sequential([nn.LSTM(8), nn.Dense(1)]), jax.random.normal(jax.random.key(1), (4, 20, 3))
      >>> variables = model.init(jax.random.key(0), xs)
      >>> found = analysis.report(model, variables, xs, lambda outputs, xs: jnp.mean(outputs[:, -1] ** 2))
      >>> list(found.layers), found.layers["layers_0/forward_0"].layer.states.h.shape
      (['layers_0/forward_0'], (4, 21, 8))

    Source: backpropagation through time; see `retention_curve`, `lyapunov_exponents` and `path_shares` for theirs.
    """
    if not arguments:
        raise ValueError(
            "`report(model)`: expected (model, variables, batch, loss), or (model, batch, loss) for an nnx model."
        )
    *arguments_, loss = arguments
    if not callable(loss):
        raise ValueError(
            f"`report(..., loss=<{type(loss).__name__}>)`: expected the loss last, a function (outputs, batch) to one "
            "number."
        )
    check_takes("report", loss, "(outputs, batch)")
    recorder, batch = recorder_of("report", model, tuple(arguments_), call, rngs)

    def of_outputs(outputs: Any) -> Array:
        return loss(outputs, batch)

    found = record("report", recorder, of_outputs)
    names = list(found.layers)
    layers = {
        name: measure(found.layers[name], dense_up_to, exponents)
        for name in (names if progress is None else progress(names))
    }
    return Report(title or type(model).__name__, float(np.asarray(found.value)), layers, found.left_out)


def of_trajectory(
    traj: Trajectory, adjoint: Any = None, *, title: str | None = None, dense_up_to: int = 256, exponents: int = 4
) -> Report:
    """The report of a single run; see `plots.report_trajectory`."""
    check_trajectory("report_trajectory", traj)
    name, given = type(traj.cell).__name__, traj.narrow or jax.tree.leaves(traj.carries)[0].dtype.name
    layer = RecurrentLayer(name, traj.cell, traj.params, traj, False, given)
    if adjoint is not None:

        def loss(carry: Any, _: Any) -> Array:
            """Linear, with the adjoint for its gradient."""
            parts = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), adjoint, carry))
            return sum(parts, start=jnp.zeros(()))

        first = jax.tree.map(lambda a: jax.lax.index_in_dim(a, 0, len(traj.batch_shape), keepdims=False), traj.carries)
        found = gradients_over_time(
            loss, traj.cell, traj.params, traj.xs, first, seq_lengths=traj.lengths, resets=traj.resets,
            reset_carry=traj.reset_carry,
        )  # fmt: skip
        layer = layer._replace(states=found.states, inputs=found.inputs)
    return Report(title or name, None, {name: measure(layer, dense_up_to, exponents)}, {})


def _row(one: LayerReport) -> tuple[str, ...]:
    run = one.layer.run
    left = one.retention and float(one.retention.mean_log()[-1]) / math.log(10)
    leading = "-"
    if one.exponents is not None:
        leading = f"{float(np.mean(np.asarray(one.exponents.exponents)[..., 0])):.3g}"
    return (
        one.name, type(one.layer.cell).__name__, str(one.n), str(one.steps), str(math.prod(run.batch_shape)),
        str(one.reach or "-"), str(one.half_life or "-"), str(one.rate or "-"),
        "-" if left is None else f"{left:.3g}", leading,
    )  # fmt: skip
