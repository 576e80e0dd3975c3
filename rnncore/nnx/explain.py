"""`rnncore.explain_backend` of nnx modules."""

from __future__ import annotations

from typing import Any

from flax import nnx

from rnncore.sequence import checks, choices


def explain(module: nnx.Module, *inputs: Any, **options: Any) -> choices.BackendChoices:
    """The backend of every recurrent layer in `module(*inputs, **options)`."""
    if isinstance(module, nnx.RNNCellBase):
        checks.check_cell("explain_backend", module)
    graph, state = nnx.split(module)
    names: dict[int, str] = {}

    def call(state: Any, inputs: Any, options: Any) -> Any:
        # Random draws and counters change a copy only.
        copy = nnx.merge(graph, state)
        names.update((id(part), "/".join(map(str, path))) for path, part in nnx.iter_graph(copy))
        return copy(*inputs, **options)

    found = choices.of_shapes(call, lambda layer: names.get(id(layer)) or type(layer).__name__, state, inputs, options)
    return choices.some(found, f"`explain_backend({type(module).__name__}(...), inputs)`", "nnx")


choices.explains(nnx.Module, explain)
