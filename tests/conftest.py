"""Settings that hold for every test."""

import os

# Eight virtual devices for the sharding tests; must be set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_threefry_partitionable", True)
