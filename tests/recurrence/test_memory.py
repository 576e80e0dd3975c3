"""What the memory options save, read from the compiled step."""

import jax
import jax.numpy as jnp
import pytest

import rnncore

BATCH, STEPS, SIZE = 8, 512, 32
CELLS = {
    # Cell, R arrays that its derivative depends on, F fields of its carry.
    "lstm": (rnncore.LSTM(SIZE), 5, 2),
    "gru": (rnncore.GRU(SIZE), 4, 1),
    "mgu": (rnncore.MGU(SIZE), 3, 1),
    "elman": (rnncore.Elman(SIZE), 1, 1),
}


def temporaries(cell=CELLS["lstm"][0], **options):
    """Temporary bytes of a gradient step, in arrays of T x B x H."""
    params = cell.init(jax.random.key(0), SIZE, jnp.float32)
    xs = jnp.ones((BATCH, STEPS, SIZE), jnp.float32)
    step = jax.jit(jax.grad(lambda p, xs: jnp.sum(rnncore.unroll(cell, p, xs, **options)[1]), (0, 1)))
    return step.lower(params, xs).compile().memory_analysis().temp_size_in_bytes / (4 * STEPS * BATCH * SIZE)


@pytest.mark.sample(1)
@pytest.mark.parametrize("every", [16, 64])
@pytest.mark.parametrize("name", CELLS)
def test_the_reverse_rule_takes_what_the_docstring_says(name, every):
    cell, kept, fields = CELLS[name]
    gates, share = len(cell.gates), every / STEPS
    formula = {
        "nothing": 1 + kept + 5 * gates * share,
        "gates": fields + (5 * gates + kept) * share,
        "chunk": 1 + fields / every + (5 * gates + kept) * share,
    }
    weights = 4 * gates * SIZE / (STEPS * BATCH)  # kernels, transposed and summed; they do not grow with T
    for recompute, arrays in formula.items():
        options = {"checkpoint_every": every, "recompute": recompute}
        measured = temporaries(cell, **options)
        # The gradient of the outputs, here ones everywhere, is one array more.
        assert 0.6 * arrays < measured < arrays + 1 + weights, (recompute, measured, arrays)


def test_half_precision_halves_what_is_kept():
    options = {"checkpoint_every": 16}
    full = temporaries(**options)
    half = temporaries(**options, residual_dtype=jnp.bfloat16)
    assert full - half == pytest.approx(2.5, abs=0.2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("recompute", ["gates", "chunk"])
def test_recomputing_saves_without_a_chunk_length_too(recompute):
    assert temporaries(recompute=recompute) < 0.5 * temporaries()
