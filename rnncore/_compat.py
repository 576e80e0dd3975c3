"""The places where JAX's API moves between the supported versions (0.10 to 0.12)."""

from __future__ import annotations

import copyreg
import re
from typing import Any

import jax
from jax import lax
from jax.extend import backend as jex_backend
from jax.extend import core as jex_core

Literal = jex_core.Literal
ClosedJaxpr = jex_core.ClosedJaxpr
jaxpr_as_fun = jex_core.jaxpr_as_fun


def varying_axes(x: Any) -> frozenset:
    """Names of the shard_map axes over which a value differs between devices."""
    return _varying(jax.typeof(x))


def _varying(aval: Any) -> frozenset:
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(manual.varying if manual is not None else aval.vma)


def is_of_one_device(aval: Any) -> bool:
    """Whether a type has no explicit mesh and does not vary over the axes of shard_map."""
    return aval.sharding.mesh.empty and not _varying(aval)


def vary_over(x: Any, axes: frozenset) -> Any:
    """The value marked as differing over `axes` (inside shard_map; elsewhere the value itself)."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def matmul_precision() -> str | None:
    """What `jax.default_matmul_precision` is set to here."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def platform_version() -> str:
    """The version string of the device's runtime in lower case, such as "cuda 13000"."""
    return str(jex_backend.get_backend().platform_version).lower()


def _xla_option(name: str) -> list[str]:
    """The values of an option of XLA, by this jaxlib's defaults and XLA_FLAGS."""
    from jax._src.lib import xla_client  # no public route exists

    # Each holds memory of the one before: a name keeps it alive.
    options = xla_client.CompileOptions()
    build = options.executable_build_options
    text = repr(build.debug_options)
    return re.findall(rf"^\s*{name}:\s*(\w+)", text, re.MULTILINE)


def command_buffer_commands() -> list[str]:
    """The kinds of operations that XLA puts into CUDA graphs."""
    return _xla_option("xla_gpu_enable_command_buffer")


def cuda_folder() -> str | None:
    """The directory that JAX uses as the CUDA toolkit."""
    try:
        from jax._src.lib import cuda_path  # no public route exists
    except ImportError:
        return None
    return cuda_path


def without_mesh() -> Any:
    """A context in which arrays are traced as on one device, whatever mesh the caller has set."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def in_32_bits() -> Any:
    """A context in which numbers without a dtype are of 32 bits, as kernels have them, whatever the caller has set."""
    return jax.enable_x64(False)


def current_trace(trace: Any) -> Any:
    """A context in which operations are given to this trace, for rules of partial evaluation."""
    from jax._src import core  # no public route exists

    return core.set_current_trace(trace)


def source_line(eqn: Any) -> str:
    """The line of user code that an equation of a jaxpr comes from; empty if unknown."""
    try:
        from jax._src import source_info_util  # no public route exists

        return source_info_util.summarize(eqn.source_info)
    except (ImportError, AttributeError):
        return ""


def result_like(shape: tuple[int, ...], dtype: Any, x: Any) -> jax.ShapeDtypeStruct:
    """What a kernel is to return: an array that differs over the devices over which `x` does."""
    described: Any = jax.ShapeDtypeStruct
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    axes = {"vma": varying_axes(x)} if manual is None else {"manual_axis_type": manual}
    return described(shape, dtype, **axes)


def runs_elsewhere(context: Any, platform: str) -> bool:
    """Whether a lowering rule, by its context, is called for `jax.export`, or for another platform than this one."""
    module = context.module_context
    platforms = {"gpu" if name in ("cuda", "rocm") else name for name in module.platforms}
    return module.lowering_parameters.for_export or platforms != {platform}


def parts(slab: Any, count: int) -> list[Any]:
    """Equal parts of the last axis, for code that JAX differentiates as it stands.

    jaxlib 0.8 to 0.10 compile the concatenation, to which a split transposes, wrongly on some CPUs under vmap in
    float64; a slice transposes to padding.  See docs/known_issues.md.
    """
    size = slab.shape[-1] // count
    if jax.__version_info__ < (0, 11):
        return [lax.slice_in_dim(slab, n * size, (n + 1) * size, axis=-1) for n in range(count)]
    return list(lax.split(slab, [size] * count, slab.ndim - 1))


def _by_name(function: Any) -> Any:
    """How JAX's functions are pickled and copied: by their names, as Python's own."""
    if str(getattr(function, "__module__", "")).partition(".")[0] == "jax" and "<" not in function.__qualname__:
        return function.__qualname__
    return function.__reduce_ex__(4)


# Jitted functions such as `jax.nn.sigmoid`: pickle looks up the function that they wrap and does not find it.
for _kind in (type(jax.nn.sigmoid), jax.custom_jvp, jax.custom_vjp):
    copyreg.pickle(_kind, _by_name)
