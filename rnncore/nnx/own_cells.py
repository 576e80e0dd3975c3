"""Cells that Flax does not have: functional cells as modules, with their parameters under the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from rnncore import cells
from rnncore import flax_modules as modules
from rnncore._types import Array, Initializer
from rnncore.layers.entries import entry_shapes, fitting_entries, from_entries, to_entries
from rnncore.nnx import initial


class OwnCell(initial.Cell):
    """What these cells share: one step, and the parameters, drawn as the functional cell draws them.

    Attributes:
      core: the functional cell.
    """

    kind: ClassVar[type[cells.Cell]]
    """The class of the functional cell."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        recurrent_kernel_init: Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        carry_init: Initializer | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ):
        if recurrent_kernel_init is not None:
            options["recurrent_init"] = recurrent_kernel_init
        known = [f.name for f in dataclasses.fields(self.kind) if f.name != "hidden_size"]
        for name in options:
            if name not in known:
                taken = ", ".join(n if n != "recurrent_init" else "recurrent_kernel_init" for n in known)
                raise TypeError(f"`{type(self).__name__}({name}=...)`: there is no such option; it has {taken}.")
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.core: Any = self.kind(hidden_features, **options)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.carry_init = carry_init
        self.rngs = nnx.data(None)
        said = {"input_kernel": kernel_metadata, "recurrent_kernel": recurrent_kernel_metadata, "bias": bias_metadata}
        for name, value in to_entries(self.core.init(rngs.params(), in_features, param_dtype)).items():
            setattr(self, name, nnx.Param(value, **said.get(name, {})))

    def entries(self) -> dict[str, Any]:
        """The parameters by their names."""
        return {name: getattr(self, name) for name in entry_shapes(self.core, self.in_features)}

    def functional_params(self, inputs: Any = None) -> Any:
        """The functional parameters, in the dtype in which the cell computes for these inputs."""
        params = from_entries(self.core, {name: param[...] for name, param in self.entries().items()})
        dtype = dtypes.canonicalize_dtype(inputs, *jax.tree.leaves(params), dtype=self.dtype)
        return jax.tree.map(lambda a: a.astype(dtype), params)

    def take(self, params: Any) -> None:
        """Replaces the parameters by functional ones; a bias that is None becomes zeros."""
        call = f"from_functional({type(self).__name__}, params)"
        for name, value in fitting_entries(call, self.core, params, self.in_features).items():
            param = getattr(self, name)
            param[...] = value.astype(param[...].dtype)

    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """One step.

        Args:
          carry: a tuple of the fields of the functional cell's carry, or h alone; arrays (*batch, H).
          inputs: (*batch, D).

        Returns:
          (new carry, outputs).
        """
        params = self.functional_params(inputs)
        zs = self.core.project(params, jnp.asarray(inputs, params.input_kernel.dtype))
        new, y = self.core.step(params, modules.to_core(self.core, carry), zs)
        return modules.from_core(new), y

    def carry_sizes(self) -> tuple[int, ...]:
        return tuple(a.shape[-1] for a in jax.eval_shape(self.core.initial_carry))


class SLSTMCell(OwnCell):
    """sLSTM, the LSTM with exponential gates: `rnncore.SLSTM`.  Carry (c, n, m, h), output h.

    Args:
      in_features, hidden_features: D and H.
      recurrence: the structure of the recurrent kernel, `rnncore.Heads(4)` in the paper; dense by default.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of the arrays `input_kernel` (D, 4, H),
        `recurrent_kernel` (None: the structure's own) and `bias` (4, H).
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in `LSTMCell`.

    Example:
      >>> import jax.numpy as jnp, rnncore
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.SLSTMCell(3, 8, recurrence=rnncore.Heads(2), rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape, layer.cell.recurrent_kernel.shape
      ((2, 5, 8), (2, 4, 4, 4))

    Source: see `rnncore.SLSTM`, whose arrays these are.
    """

    kind: ClassVar[type[cells.Cell]] = cells.SLSTM


class LSTMPCell(OwnCell):
    """LSTM with a projection: `rnncore.LSTMP`.  Carry (c (*batch, H), h (*batch, P)), output h.

    Args:
      in_features, hidden_features: D and H.
      projection_size: P, the size of h.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      All others: as in `SLSTMCell`, which has a recurrence besides; `projection` (H, P) is drawn by kernel_init.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.LSTMPCell(3, 8, projection_size=3, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 3)

    Source: see `rnncore.LSTMP`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LSTMP


class LayerNormLSTMCell(OwnCell):
    """LSTM with layer normalization: `rnncore.LayerNormLSTM`.  Carry (c, h), output h.

    Args:
      in_features, hidden_features: D and H.
      epsilon: added to the variance.
      forget_bias: added to b_f once, at initialisation.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      All others: as in `SLSTMCell`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.LayerNormLSTMCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.LayerNormLSTM`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LayerNormLSTM


class LayerNormGRUCell(LayerNormLSTMCell):
    """GRU with layer normalization: `rnncore.LayerNormGRU`.  Carry h, output h.

    Args:
      in_features, hidden_features: D and H.
      forget_bias: added to b_z once, at initialisation.
      All others: as in `LayerNormLSTMCell`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.LayerNormGRUCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.LayerNormGRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.LayerNormGRU


class MinGRUCell(OwnCell):
    """Minimal GRU, whose gates see the inputs alone: `rnncore.MinGRU`.  Carry h, output h.

    Args:
      in_features, hidden_features: D and H.
      positive: keep the states positive.
      All others: as in `SLSTMCell`; recurrence is `rnncore.Unconnected()` by default.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.MinGRUCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.MinGRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.MinGRU


class MinLSTMCell(MinGRUCell):
    """Minimal LSTM, whose gates see the inputs alone: `rnncore.MinLSTM`.  Carry h, output h.

    Args:
      in_features, hidden_features: D and H.
      All others: as in `MinGRUCell`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.MinLSTMCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.MinLSTM`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.MinLSTM


class RGLRUCell(OwnCell):
    """Real-gated linear recurrent unit: `rnncore.RGLRU`.  Carry h, output h.

    Args:
      in_features, hidden_features: D and H.
      scale: c.
      All others: as in `MinGRUCell`; `units_decay` (H,) starts as in the paper.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.RGLRUCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.RGLRU`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.RGLRU


class QRNNCell(OwnCell):
    """Quasi-recurrent cell over windows of the inputs: `rnncore.QRNN`.  Carry (c, h), or h of pooling "f"; output h.

    Args:
      in_features, hidden_features: D and H.
      pooling: "f", "fo" or "ifo".
      activation_fn: in place of tanh.
      All others: as in `MinGRUCell`.

    Example:
      >>> import jax.numpy as jnp, rnncore
      >>> from rnncore import nnx
      >>> layer, xs = nnx.RNN(nnx.QRNNCell(6, 4, rngs=nnx.Rngs(0))), jnp.ones((2, 5, 3))
      >>> layer(rnncore.windows(xs, 2)).shape
      (2, 5, 4)

    Source: see `rnncore.QRNN` and `rnncore.windows`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.QRNN


class LeakyCell(OwnCell):
    """Leaky network of continuous time: `rnncore.Leaky`.  Carry h, output h.

    Args:
      in_features, hidden_features: D and H.
      dt, tau, learn_tau: as in `rnncore.Leaky`; learned ones are `units_log_tau` (H,).
      activation_fn: in place of tanh.
      All others: as in `SLSTMCell`.

    Example:
      >>> import jax.numpy as jnp, rnncore
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.LeakyCell(3, 4, recurrence=rnncore.Dale((1, 1, 1, -1)), rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)

    Source: see `rnncore.Leaky`.
    """

    kind: ClassVar[type[cells.Cell]] = cells.Leaky


CELLS: tuple[type[OwnCell], ...] = (
    SLSTMCell, LSTMPCell, LayerNormLSTMCell, LayerNormGRUCell, MinGRUCell, MinLSTMCell, RGLRUCell, QRNNCell, LeakyCell,
)  # fmt: skip
