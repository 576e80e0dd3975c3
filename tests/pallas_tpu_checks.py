"""The TPU kernels inside shard_map on two virtual devices; `test_pallas_tpu.py` runs it in a process of its own."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import rnncore
from rnncore.kernels import pallas_tpu
from rnncore.kernels.pallas_tpu import kernels as pallas_tpu_kernels

STEPS, FEATURES = 5, 3
CELL = rnncore.GRU(4)


def step(backend):
    """(params, xs, lengths, resets) -> loss and its gradients, the batch parted over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def loss(params, xs, lengths, resets):
        carry, ys = rnncore.unroll(CELL, params, xs, seq_lengths=lengths, resets=resets, backend=backend)
        return jax.lax.psum(jnp.sum(jnp.sin(ys)) + jnp.sum(jnp.cos(carry.h)), "data")

    specs = (P(), P("data"), P("data"), P("data"))
    return jax.jit(jax.value_and_grad(jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P()), (0, 1)))


def main():
    assert jax.device_count() == 2, jax.devices()
    keys = jax.random.split(jax.random.key(0), 3)
    xs, resets = jax.random.normal(keys[0], (4, STEPS, FEATURES)), jax.random.bernoulli(keys[1], 0.3, (4, STEPS))
    arguments = (CELL.init(keys[2], FEATURES), xs, jnp.array([STEPS, 0, 3, 2]), resets)
    pallas_tpu.missing_platform = lambda platform: None
    text = step("pallas_tpu").trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2, text
    pallas_tpu_kernels.kernels = functools.partial(pallas_tpu_kernels.kernels, True)
    jax.clear_caches()  # what was traced above is not interpreted
    got, want = (step(backend)(*arguments) for backend in ("pallas_tpu", "scan"))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
    print("ok")


if __name__ == "__main__":
    sys.exit(main())
