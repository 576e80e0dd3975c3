"""Cells of a user's own with dropout, sown values and batch statistics, in RNN of rnncore.linen."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as theirs
import jax
import jax.numpy as jnp
import pytest
from linen_cases import LENGTHS, B, D, H, T, close, f32, normal, projected, same_bits, some_variables

from rnncore import linen as ours


class Around(theirs.RNNCellBase):
    """A cell with something around a cell of either library."""

    library: Any

    @theirs.nowrap
    def initialize_carry(self, rng: Any, input_shape: Any) -> Any:
        return jnp.zeros((*input_shape[:-1], H), f32)

    @property
    def num_feature_axes(self) -> int:
        return 1


class Dropping(Around):
    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        inputs = theirs.Dropout(0.5, deterministic=False)(inputs)
        return self.library.GRUCell(H)(carry, inputs)


class Sowing(Around):
    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        self.sow("intermediates", "seen", inputs.sum(-1))
        carry, y = self.library.MGUCell(H)(carry, inputs)
        self.sow("intermediates", "made", y)
        return carry, y


class Normalising(Around):
    @theirs.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        inputs = theirs.BatchNorm(use_running_average=False, momentum=0.5)(inputs)
        return self.library.SimpleCell(H)(carry, inputs)


def drops_by_inheritance(nn: Any) -> Any:
    """A subclass of the library's own cell with the same name, so that trees and keys agree."""

    class LSTMCell(nn.LSTMCell):  # type: ignore[misc]
        @theirs.compact
        def __call__(self, carry: Any, inputs: Any) -> Any:
            return super().__call__(carry, theirs.Dropout(0.5, deterministic=False)(inputs))

    return LSTMCell(H)


RNGS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}


def with_gradients_and_variables(layer: Any, variables: Any, xs: jax.Array, mutable: Any, **options: Any) -> Any:
    @jax.jit
    def run(params: Any, xs: jax.Array) -> Any:
        def loss(params: Any, xs: jax.Array) -> Any:
            out = layer.apply(variables | {"params": params}, xs, rngs=RNGS, mutable=mutable, **options)
            return projected(out), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, xs)

    return run(variables["params"], xs)


@pytest.mark.slow
@pytest.mark.parametrize("cell,each_step", [(Dropping, True), (Dropping, False), (drops_by_inheritance, True)])
def test_dropout_in_a_cell(cell: Any, each_step: bool, unrolled: list) -> None:
    """split_rngs True: a new mask at every step; False: the same one, as variational dropout wants it."""
    xs = jnp.broadcast_to(normal(1, (B, 1, D), f32), (B, T, D))
    splits = {"params": False, "dropout": each_step}
    mine, flaxen = (nn.RNN(cell(nn), split_rngs=splits, return_carry=True) for nn in (ours, theirs))
    variables = flaxen.init(RNGS, xs)
    same_bits(mine.init(RNGS, xs), variables)
    args = some_variables(flaxen, xs), xs, False
    got, want = (with_gradients_and_variables(m, *args, seq_lengths=LENGTHS[:B]) for m in (mine, flaxen))
    close(got, want, 1e-5)
    assert not unrolled
    to_inputs = got[0][1] != 0
    assert bool((to_inputs[1:, :3] == to_inputs[1:, :1]).all()) == (not each_step)


def test_dropout_in_a_cell_wants_to_be_told_of_its_keys() -> None:
    """By default Flax hands no dropout key to the steps: init falls back to the parameters', apply fails; so ours."""
    xs = normal(1, (B, T, D), f32)
    for nn in (ours, theirs):
        layer = nn.RNN(Dropping(nn))
        variables = layer.init(jax.random.key(1), xs)
        with pytest.raises(flax.errors.InvalidRngError):
            layer.apply(variables, xs, rngs={"dropout": RNGS["dropout"]})


@pytest.mark.slow
def test_sown_values_want_variable_axes() -> None:
    """Stacked over time with them, and silently none without, as in Flax."""
    xs = normal(1, (B, T, D), f32)
    variables = some_variables(theirs.RNN(Sowing(theirs)), xs)
    for axes in ({"intermediates": 0}, {"intermediates": 1}, {}):
        mine, flaxen = (nn.RNN(Sowing(nn), variable_axes=axes) for nn in (ours, theirs))
        params = {"params": variables["params"]}
        got, want = (with_gradients_and_variables(m, params, xs, ["intermediates"]) for m in (mine, flaxen))
        close(got, want, 1e-5)
        sown = got[1][1].get("intermediates", {})
        assert bool(sown) == bool(axes)
        if axes:
            shape = (T, B) if axes["intermediates"] == 0 else (B, T)
            assert sown["cell"]["seen"][0].shape == shape


@pytest.mark.slow
def test_batch_statistics_are_carried() -> None:
    """Flax can apply but not initialise such a layer; there `variable_broadcast` does it."""
    xs = 1 + 2 * normal(1, (4, T, D), f32)
    mine, flaxen = (nn.RNN(Normalising(nn), variable_carry="batch_stats") for nn in (ours, theirs))
    with pytest.raises(TypeError, match="carry"):
        jax.eval_shape(flaxen.init, jax.random.key(0), xs)
    both = ("params", "batch_stats")
    variables = flaxen.clone(variable_carry=False, variable_broadcast=both).init(jax.random.key(0), xs)
    same_bits(mine.init(jax.random.key(0), xs), variables)
    got, want = (with_gradients_and_variables(m, variables, xs, ["batch_stats"]) for m in (mine, flaxen))
    close(got, want, 2e-5)
    mean = got[1][1]["batch_stats"]["cell"]["BatchNorm_0"]["mean"]
    expected = jnp.zeros(D)
    for t in range(T):
        expected = 0.5 * expected + 0.5 * xs[:, t].mean(0)
    close(mean, expected.astype(f32), 1e-6)


def test_fields_for_collections_leave_known_cells_on_the_fast_way(unrolled: list) -> None:
    """All the fields above at once: a cell without such collections is none the wiser."""
    xs = normal(1, (B, T, D), f32)
    fields: dict[str, Any] = dict(variable_axes={"intermediates": 0}, variable_carry="batch_stats", unroll=T)
    fields |= dict(split_rngs={"params": False, "dropout": True})
    mine, flaxen = (nn.RNN(nn.GRUCell(H), **fields) for nn in (ours, theirs))
    variables = mine.init(jax.random.key(0), xs)
    got, want = (
        with_gradients_and_variables(m, variables, xs, ["intermediates", "batch_stats"]) for m in (mine, flaxen)
    )
    close(got, want, 1e-5)
    assert len(unrolled) == 2
