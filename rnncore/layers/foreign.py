"""Cells of other libraries, and your own, from a function that computes one step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell, named

NAMES: dict[int, tuple[str, ...]] = {1: ("h",), 2: ("c", "h")}
"""Default names of the arrays of a carry."""


@dataclasses.dataclass(frozen=True)
class ForeignCell(Cell):
    """What `foreign_cell` makes: a cell that is a function of one step, differentiated as it stands."""

    step_fn: Callable[..., Any]
    names: tuple[str, ...]
    output_name: str
    shapes: tuple[tuple[tuple[int, ...], Any], ...]
    structure: Any
    gates_fn: Callable[..., Any] | None
    batched: bool
    features: tuple[int, ...]
    weights: tuple[tuple[tuple[int, ...], Any], ...]
    weights_structure: Any

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> PyTree:
        """Zeros in the shapes of the parameters that were given: only the cell's own library draws them."""
        del key, input_size, dtype
        return jax.tree.unflatten(self.weights_structure, [jnp.zeros(shape, own) for shape, own in self.weights])

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = None) -> Any:
        """Zeros of the shapes of the carry that was given."""
        del dtype
        return self.named_carry([jnp.zeros((*batch_shape, *shape), own) for shape, own in self.shapes])

    def project(self, params: PyTree, xs: Array) -> Array:
        """The inputs themselves: what of the step needs no carry is not known."""
        del params
        return xs

    def update(self, params: PyTree, carry: Any, z: Array) -> tuple[Any, PyTree]:
        """One step: (carry, x) to (new carry, gates by name); "output" among them where y is not part of the carry."""
        lead = z.shape[:-1]
        flat = jax.tree.map(lambda a, s: a.reshape(-1, *s[0]), tuple(carry), self.shapes, is_leaf=_is_array)
        x = z.reshape(math.prod(lead), *self.features)

        def step(carry: Any, x: Array) -> Any:
            given = jax.tree.unflatten(self.structure, carry)
            new, y = self.step_fn(params, given, x)
            if jax.tree.structure(new) != self.structure:
                raise ValueError(
                    f"`foreign_cell(step)`: the step made a carry of structure {jax.tree.structure(new)} of one of "
                    f"{self.structure}; expected the same."
                )
            gates = {} if self.gates_fn is None else dict(self.gates_fn(params, given, x))
            leaves = tuple(jax.tree.leaves(new))
            # Where it is part of the state, a change of the state changes it too.
            return leaves, gates if y is leaves[self.place] else gates | {"output": y}

        new, gates = (step if self.batched else jax.vmap(step))(flat, x)

        def back(a: Array) -> Array:
            return a.reshape(*lead, *a.shape[1:])

        return self.named_carry([back(a).astype(c.dtype) for a, c in zip(new, carry, strict=True)]), jax.tree.map(
            back, gates
        )

    def output(self, carry: Any) -> Array:
        """The array of the carry that the output is; where it is none of them, `gates["output"]` holds it."""
        last = carry[self.place]
        return last.reshape(*last.shape[: last.ndim - len(self.shapes[self.place][0])], self.hidden_size)

    @property
    def place(self) -> int:
        """Where the output stands in the carry."""
        return self.names.index(self.output_name)

    def named_carry(self, leaves: Sequence[Array]) -> Any:
        return named("Carry", self.names)(*leaves)


def _is_array(a: Any) -> bool:
    return hasattr(a, "dtype")


def foreign_cell(
    step: Callable[[PyTree, Any, Array], tuple[Any, Array]],
    params: PyTree,
    carry: PyTree,
    *,
    names: Sequence[str] | None = None,
    output: str | None = None,
    gates: Callable[[PyTree, Any, Array], Mapping[str, Array]] | None = None,
    batched: bool = True,
    features: Sequence[int] | None = None,
) -> ForeignCell:
    """A cell of any library as one that `rnncore.unroll` and the analysis take.

    s_t, y_t = step(params, s_{t-1}, x_t)

    Its Jacobians come from `jax.vjp` of the step, and it runs through plain autodiff of a scan.

    Args:
      step: (params, carry, x) to (new carry, y), pure.
      params: any pytree of arrays.  Of these and the carry only structure, shapes and dtypes are read.
      carry: the carry of one sequence, without batch axes, any pytree of arrays.
      names: what to call its arrays, in the order of `jax.tree.leaves`; by default h, or c and h, or s0, s1, ...
        "c" and "h" mean cell state and output to the analysis.
      output: the name of the one that the step returns as y too, where it does; the last by default.
      gates: (params, carry, x) to the values of the gates by name, for what needs names of gates: shares by gate do
        not, `gate_statistics` does.
      batched: whether the step takes arrays with one batch axis in front; False for one sequence at a time, as
        Equinox cells do.
      features: shape of one input where it is not one axis; its axes are merged in the inputs of a run.

    Returns:
      The cell; its parameters are those of the step.

    Raises:
      ValueError: names that are not as many as there are arrays, or not all different.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> def step(u, h, x):
      ...     h = jnp.tanh(x + h @ u)
      ...     return h, h
      >>> params = 0.5 * jnp.eye(3)
      >>> cell = rnncore.foreign_cell(step, params, jnp.zeros(3))
      >>> carry, ys = rnncore.unroll(cell, params, jnp.ones((2, 5, 3)))
      >>> ys.shape, carry._fields
      ((2, 5, 3), ('h',))
    """
    leaves, structure = jax.tree.flatten(carry)
    weights, weights_structure = jax.tree.flatten(params)
    shapes, own = (tuple((tuple(jnp.shape(a)), jnp.result_type(a)) for a in part) for part in (leaves, weights))
    chosen = tuple(names or NAMES.get(len(leaves), tuple(f"s{i}" for i in range(len(leaves)))))
    if len(chosen) != len(leaves) or len(set(chosen)) != len(chosen) or not leaves:
        raise ValueError(
            f"`foreign_cell(names={names!r})`: the carry has {len(leaves)} arrays; expected as many names, "
            "all different."
        )
    output = chosen[-1] if output is None else output
    if output not in chosen:
        raise ValueError(f"`foreign_cell(output={output!r})`: expected one of {', '.join(map(repr, chosen))}.")
    size, axes = math.prod(shapes[chosen.index(output)][0]), tuple(features or (-1,))
    return ForeignCell(size, step, chosen, output, shapes, structure, gates, batched, axes, own, weights_structure)
