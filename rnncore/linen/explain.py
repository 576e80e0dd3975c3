"""`rnncore.explain_backend` of linen modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from rnncore.sequence import checks, choices


def explain(module: nn.Module, variables: Any, *inputs: Any, **options: Any) -> choices.BackendChoices:
    """The backend of every recurrent layer in `module.apply(variables, *inputs, **options)`."""
    kind = type(module).__name__
    call = f"`explain_backend({kind}(...), variables, inputs)`"
    if isinstance(module, nn.RNNCellBase):
        checks.check_cell("explain_backend", module)
    if not isinstance(variables, Mapping) or not inputs:
        raise TypeError(
            f"{call}: variables is a {type(variables).__name__} and there are {len(inputs)} inputs; expected the "
            "variables, as `module.init(key, inputs)` makes them, and the arguments of a call."
        )
    found = choices.of_shapes(
        lambda variables, inputs, options: module.apply(variables, *inputs, **options),
        lambda layer: "/".join(layer.path) or type(layer).__name__, variables, inputs, options,
    )  # fmt: skip
    return choices.some(found, call, "linen")


choices.explains(nn.Module, explain)
