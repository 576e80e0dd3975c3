"""Writes golden/{keras,haiku,equinox}.npz: what two bidirectional layers of these libraries compute.

  python tests/make_golden_layers.py keras       # or haiku, equinox: whichever is installed

Weights are drawn by NumPy; in float64, Keras in float32, because its SimpleRNN runs in no other.  Names: "kind/xs",
"kind/outputs", and the weights under the library's own names.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_enable_x64", "keras" not in sys.argv)
GOLDEN = pathlib.Path(__file__).parent / "golden"
B, T, D, H, L = 2, 5, 3, 4, 2


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(B, T, D))


def keras(rng: np.random.Generator) -> dict[str, np.ndarray]:
    import keras

    layers = keras.layers
    kinds: dict[str, Any] = {
        "lstm": lambda: layers.LSTM(H, return_sequences=True),
        "gru": lambda: layers.GRU(H, return_sequences=True),
        "gru_reset_before": lambda: layers.GRU(H, return_sequences=True, reset_after=False),
        "rnn": lambda: layers.SimpleRNN(H, return_sequences=True),
    }
    made = {}
    for kind, make in kinds.items():
        ys = made[f"{kind}/xs"] = inputs(rng).astype(np.float32)
        for level in range(L):
            layer = layers.Bidirectional(make())
            layer.build(ys.shape)
            layer.set_weights([rng.normal(0, 0.6, w.shape) for w in layer.get_weights()])
            made |= {f"{kind}/{level}/{n}": np.asarray(w) for n, w in enumerate(layer.get_weights())}
            ys = np.asarray(layer(ys))
        made[f"{kind}/outputs"] = ys
    return made


def haiku(rng: np.random.Generator) -> dict[str, np.ndarray]:
    import haiku as hk

    made = {}
    for kind, make in {"lstm": hk.LSTM, "gru": hk.GRU, "rnn": hk.VanillaRNN}.items():

        def run(xs: Any, make: Any = make) -> Any:
            ys = jnp.moveaxis(xs, 1, 0)
            for _ in range(L):
                ways = []
                for reverse in (False, True):
                    core = make(H)
                    ways.append(hk.dynamic_unroll(core, ys, core.initial_state(B), reverse=reverse)[0])
                ys = jnp.concatenate(ways, -1)
            return jnp.moveaxis(ys, 0, 1)

        model, xs = hk.without_apply_rng(hk.transform(run)), inputs(rng)
        params = model.init(jax.random.key(0), jnp.asarray(xs))
        params = {m: {k: rng.normal(0, 0.6, a.shape) for k, a in entry.items()} for m, entry in params.items()}
        made |= {f"{kind}/{m}:{k}": a for m, entry in params.items() for k, a in entry.items()}
        made |= {f"{kind}/xs": xs, f"{kind}/outputs": np.asarray(model.apply(params, jnp.asarray(xs)))}
    return made


def equinox(rng: np.random.Generator) -> dict[str, np.ndarray]:
    import equinox as eqx

    made = {}
    for kind, make in {"lstm": eqx.nn.LSTMCell, "gru": eqx.nn.GRUCell}.items():
        xs = inputs(rng)
        ys = jnp.asarray(xs)
        for level in range(L):
            ways = []
            for way in range(2):
                cell = make(ys.shape[-1], H, key=jax.random.key(0))
                cell = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.6, a.shape)), cell)
                for name in ("weight_ih", "weight_hh", "bias", *(["bias_n"] if kind == "gru" else [])):
                    made[f"{kind}/{2 * level + way}/{name}"] = np.asarray(getattr(cell, name))

                def one(xs: Any, cell: Any = cell, way: int = way) -> Any:
                    def step(state: Any, x: Any) -> Any:
                        state = cell(x, state)
                        return state, state[0] if kind == "lstm" else state  # noqa: B023

                    zeros = jnp.zeros(H)
                    return jax.lax.scan(step, (zeros, zeros) if kind == "lstm" else zeros, xs, reverse=bool(way))[1]  # noqa: B023

                ways.append(jax.vmap(one)(ys))
            ys = jnp.concatenate(ways, -1)
        made |= {f"{kind}/xs": xs, f"{kind}/outputs": np.asarray(ys)}
    return made


if __name__ == "__main__":
    for library in sys.argv[1:]:
        path = GOLDEN / f"{library}.npz"
        np.savez_compressed(path, **globals()[library](np.random.default_rng(0)))
        print(f"{path.name}: {path.stat().st_size} bytes, {library} {sys.modules[library].__version__}")
