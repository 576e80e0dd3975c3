"""Cells without gates: the simple cell of flax.nnx, and IndRNN in its style."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from rnncore import initializers
from rnncore._types import Array, Initializer
from rnncore.nnx import initial


class SimpleCell(initial.Cell, nnx.SimpleCell):
    """Elman network: `rnncore.Elman` with the state of `flax.nnx.SimpleCell`.

    h' = tanh(W_i x + b_i + W_h h),  with `residual` tanh(W_i x + b_i + W_h h + h);  carry h, output h'

    dense_i.kernel (D, H) and dense_i.bias (H,), dense_h.kernel (H, H).

    Args:
      dtype: dtype of the products; float32 by default as in flax.nnx, whose other cells have None:
        promoted from inputs and parameters.
      residual: adds h before the activation.
      recurrent_kernel_init: initialiser of dense_h.kernel; orthogonal by default, in half precision
        too, where Flax's fails.
      in_features, hidden_features, param_dtype, carry_init, activation_fn, kernel_init, bias_init,
        promote_dtype, keep_rngs, rngs, kernel_metadata, recurrent_kernel_metadata, bias_metadata: as in
        `LSTMCell`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.SimpleCell(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).dtype
      dtype(bfloat16)

    Source: see `rnncore.Elman`.  In flax.nnx.RNN this cell fails with a `dtype` other than the
    carry's; in `rnncore.nnx.RNN` it runs, with a carry of the initial carry's dtype.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        kernel_init: Initializer = initializers.lecun_normal,
        recurrent_kernel_init: Initializer = initial.orthogonal,
        **options: Any,
    ):
        options |= {"kernel_init": kernel_init, "recurrent_kernel_init": recurrent_kernel_init}
        super().__init__(in_features, hidden_features, **options)


class IndRNNCell(initial.Cell):
    """Independently recurrent network: `rnncore.IndRNN` in the style of flax.nnx, which has none.

    h' = relu(W_i x + b_i + u * h),   carry h, output h'

    dense_i.kernel (D, H) and dense_i.bias (H,), u (H,): every unit sees only itself.

    Args:
      in_features: D.
      hidden_features: H.
      activation_fn: in place of relu.
      kernel_init, recurrent_init, bias_init: initialisers of W_i, u (uniform in 0 to 1) and b_i.
      dtype, param_dtype, carry_init, promote_dtype, rngs, kernel_metadata, recurrent_kernel_metadata,
        bias_metadata: as in `LSTMCell`; the recurrent metadata are u's.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer = nnx.RNN(nnx.IndRNNCell(3, 4, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 5, 3))).shape, layer.cell.u.shape
      ((2, 5, 4), (4,))

    Source: see `rnncore.IndRNN`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        activation_fn: Callable[..., Any] = jax.nn.relu,
        kernel_init: Initializer = initializers.lecun_normal,
        recurrent_init: Initializer = initializers.unit_interval,
        bias_init: Initializer = nnx.initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: Any = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        recurrent_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.activation_fn = activation_fn
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self.carry_init = carry_init
        self.rngs = nnx.data(None)
        self.dense_i = nnx.Linear(
            in_features, hidden_features, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype,
            param_dtype=param_dtype, promote_dtype=promote_dtype, rngs=rngs, kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )  # fmt: skip
        self.u = nnx.Param(recurrent_init(rngs.params(), (hidden_features,), param_dtype), **recurrent_kernel_metadata)

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """One step.

        Args:
          carry: h (*batch, H).
          inputs: (*batch, D).

        Returns:
          (new h, output), both (*batch, H).
        """
        h, u = self.promote_dtype((carry, self.u[...]), dtype=self.dtype)
        new = self.activation_fn(self.dense_i(inputs) + u * h)
        return new, new
