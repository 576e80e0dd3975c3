"""Flax cells: parameters and names; the equations are those of the functional cells.

A step computes in `dtype` as Flax does: the products in `dtype` (None: promoted from inputs and
parameters), the carry in its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from rnncore import _arguments, initializers
from rnncore import flax_modules as modules
from rnncore._types import Array, Initializer
from rnncore.linen import trees

_ORTHOGONAL = inspect.unwrap(nn.initializers.orthogonal()).__code__


def _drawable(init: Initializer, dtype: Any) -> Initializer:
    """The initialiser; an orthogonal one in half precision draws float32 and rounds.

    There is no QR in half precision, so Flax's cells fail there.  Wrappers as of `nn.with_partitioning` stay.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    if wide == dtype or getattr(inspect.unwrap(init), "__code__", None) is not _ORTHOGONAL:
        return init

    def rounded(key: Array, shape: Sequence[int], dtype: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype), init(key, shape, wide))

    return rounded


class _Gate(nn.Module):
    """The weights of one side of one gate, created in the order in which `nn.Dense` creates its own."""

    features: int
    use_bias: bool
    param_dtype: Any
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, inputs: Array) -> dict[str, Array]:
        shape = (jnp.shape(inputs)[-1], self.features)
        weights = {"kernel": self.param("kernel", self.kernel_init, shape, self.param_dtype)}
        if self.use_bias:
            weights["bias"] = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return weights


class Cell(nn.RNNCellBase):
    """Base class: one step through the functional cell that `tree` describes."""

    tree: ClassVar[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _arguments.check_size(type(self).__name__, "features", getattr(self, "features"))  # noqa: B009
        modules.check_dtypes(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: Any, inputs: Array) -> tuple[Any, Array]:
        """One step.

        Args:
          carry: a tuple of the fields of the functional cell's carry, such as (c, h), or h alone; arrays (*batch, H).
          inputs: (*batch, D).

        Returns:
          (new carry, outputs).
        """
        h = jax.tree.leaves(carry)[-1]
        core, params = self.tree.assemble(self, self._weights(inputs, h), inputs, h)
        zs = core.project(params, jnp.asarray(inputs, params.input_kernel.dtype))
        new, y = core.step(params, modules.to_core(core, carry), zs)
        return modules.from_core(new), y

    @nn.nowrap
    def _weights(self, inputs: Array, h: Array) -> dict[str, Any]:
        """The parameters, by the names of `tree`."""
        weights, biased = {}, self.tree.biased(self)
        for name in self.tree.names:
            seen, init = (inputs, self.kernel_init) if name in self.tree.inputs else (h, self.recurrent_kernel_init)
            weights[name] = _Gate(
                h.shape[-1], name in biased, self.param_dtype, _drawable(init, self.param_dtype),
                self._bias_init(name), name=name,
            )(seen)  # fmt: skip
        return weights

    @nn.nowrap
    def _bias_init(self, name: str) -> Initializer:
        """The initialiser of the bias of this name in `tree`."""
        del name
        return self.bias_init

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> Any:
        """The carry before the first step.

        Args:
          rng: key for `carry_init`.
          input_shape: (*batch, D), the shape of one step's input.
        """
        return self.carry_init(rng, (*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """Number of trailing axes of an input that are not batch axes: 1."""
        return 1


class _GatedCell(Cell):
    """The fields that LSTMs and the GRU have, in Flax's order."""

    features: int
    gate_fn: Callable[..., Any] = nn.sigmoid
    activation_fn: Callable[..., Any] = nn.tanh
    kernel_init: Initializer = initializers.lecun_normal
    recurrent_kernel_init: Initializer = initializers.orthogonal
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = nn.initializers.zeros_init()


class LSTMCell(_GatedCell):
    """Long short-term memory: `rnncore.LSTM` with the parameters of `flax.linen.LSTMCell`.

    i = sigmoid(W_ii x + W_hi h + b_hi),  f, o likewise,  g = tanh(W_ig x + W_hg h + b_hg)
    c' = f c + i g,   h' = o tanh(c'),   carry (c, h), output h'

    Args:
      features: H.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of W_i*, W_h* and b_h*.
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of c and h.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> cell = nn.LSTMCell(features=4)
      >>> carry = cell.initialize_carry(jax.random.key(0), (2, 3))
      >>> variables = cell.init(jax.random.key(1), carry, jnp.ones((2, 3)))
      >>> (c, h), y = cell.apply(variables, carry, jnp.ones((2, 3)))
      >>> y.shape, sorted(variables["params"])
      ((2, 4), ['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io'])

    Source: see `rnncore.LSTM`.  Tree, initial values and results are those of flax.linen; its
    results differ in rounding only.
    """

    tree: ClassVar[trees.Tree] = trees.LSTM_TREE

    @nn.nowrap
    def initialize_carry(self, rng: Array, input_shape: tuple[int, ...]) -> tuple[Array, Array]:
        """(c, h) before the first step.

        Args:
          rng: key for `carry_init`, split in two: c, then h.
          input_shape: (*batch, D), the shape of one step's input.
        """
        c_key, h_key = jax.random.split(rng)
        shape = (*input_shape[:-1], self.features)
        return self.carry_init(c_key, shape, self.param_dtype), self.carry_init(h_key, shape, self.param_dtype)


class OptimizedLSTMCell(LSTMCell):
    """The same cell as `LSTMCell` under Flax's other name, which appears in the paths of a checkpoint.

    In Flax this one multiplies all gates at once; here both do.  Equation and Source: see `LSTMCell`.

    Args:
      features, gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init, dtype, param_dtype, carry_init:
        as in `LSTMCell`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.OptimizedLSTMCell(features=4))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 4)
    """


class GRUCell(_GatedCell):
    """Gated recurrent unit: `rnncore.GRU` with the parameters of `flax.linen.GRUCell`.

    r = sigmoid(W_ir x + b_ir + W_hr h),   z = sigmoid(W_iz x + b_iz + W_hz h)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)),   h' = (1 - z) n + z h,   carry h, output h'

    Args:
      features: H.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of W_i*, W_h* and all b.
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of h.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.GRUCell(features=4), return_carry=True)
      >>> (h, ys), _ = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))
      >>> h.shape, ys.shape
      ((2, 4), (2, 5, 4))

    Source: see `rnncore.GRU`.  flax.nnx.GRUCell has no b_hn and cannot take these parameters.
    """

    tree: ClassVar[trees.Tree] = trees.GRU_TREE


class MGUCell(Cell):
    """Minimal gated unit: `rnncore.MGU` with the parameters of `flax.linen.MGUCell`.

    f = sigmoid(W_if x + b_if + W_hf h)
    n = tanh(W_in x + b_in + f (W_hn h + b_hn))     (reset_gate=False: f and b_hn left out)
    h' = (1 - f) n + f h,   carry h, output h'

    Args:
      features: H.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      kernel_init, recurrent_kernel_init: initialisers of W_i* and W_h*.
      forget_bias_init: initialiser of b_if; ones by default.
      activation_bias_init: initialiser of b_in and b_hn.
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of h.
      reset_gate: whether f also gates the recurrent part of n.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.MGUCell(features=4, reset_gate=False))
      >>> ys, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))
      >>> ys.shape, sorted(variables["params"]["cell"]), sorted(variables["params"]["cell"]["hn"])
      ((2, 5, 4), ['hf', 'hn', 'if', 'in'], ['kernel'])

    Source: see `rnncore.MGU`.  flax.nnx has no such cell.
    """

    features: int
    gate_fn: Callable[..., Any] = nn.sigmoid
    activation_fn: Callable[..., Any] = nn.tanh
    kernel_init: Initializer = initializers.lecun_normal
    recurrent_kernel_init: Initializer = initializers.orthogonal
    forget_bias_init: Initializer = nn.initializers.ones_init()
    activation_bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = nn.initializers.zeros_init()
    reset_gate: bool = True

    tree: ClassVar[trees.Tree] = trees.MGU_TREE

    @nn.nowrap
    def _bias_init(self, name: str) -> Initializer:
        return self.forget_bias_init if name == "if" else self.activation_bias_init


class SimpleCell(Cell):
    """Elman network: `rnncore.Elman` with the parameters of `flax.linen.SimpleCell`.

    h' = tanh(W_i x + b_i + W_h h),  with `residual` tanh(W_i x + b_i + W_h h + h);  carry h, output h'

    Args:
      features: H.
      activation_fn: in place of tanh.
      kernel_init, recurrent_kernel_init, bias_init: initialisers of W_i, W_h and b_i.
      dtype: dtype of the products; None promotes inputs and parameters.
      param_dtype: dtype of the parameters and of the initial carry.
      carry_init: initialiser of h.
      residual: adds h before the activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.RNN(nn.SimpleCell(features=4, dtype=jnp.bfloat16))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].dtype
      dtype(bfloat16)

    Source: see `rnncore.Elman`.  In flax.linen.RNN this cell fails with a `dtype` below the
    parameters'; in `rnncore.linen.RNN` it runs, with a carry of the initial carry's dtype.
    """

    features: int
    activation_fn: Callable[..., Any] = nn.tanh
    kernel_init: Initializer = initializers.lecun_normal
    recurrent_kernel_init: Initializer = initializers.orthogonal
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    carry_init: Initializer = nn.initializers.zeros_init()
    residual: bool = False

    tree: ClassVar[trees.Tree] = trees.SIMPLE_TREE
