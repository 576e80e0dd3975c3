"""Settings that hold for every test."""

import os

# The tests compile some thousand small programs and run each once or twice: without LLVM's
# optimisations that takes half the time.  What XLA itself does to a program stays as it is.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
