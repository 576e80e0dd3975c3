"""Where does my model's gradient go?  From `pip install` to a report, on a model trained here.

    pip install -e ".[examples]"
    python examples/tutorial.py                     # a few minutes on two CPU cores; writes tutorial.html
    python examples/tutorial.py --steps 30 --out short

The parts between `# %%` lines are cells: VS Code, Spyder, PyCharm, and Jupyter with jupytext run them one by one and
show what they print.
"""

# %% [markdown]
# ## 1. A model and a task
# An ordinary Flax model: a recurrent layer reads scikit-learn's handwritten digits pixel by pixel, in 64 steps, a
# second one reads its outputs, and a dense layer names the digit after the last step.  So the first pixel has to be
# remembered for 64 steps.

# %%
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from tqdm import tqdm

from rnncore import analysis, linen

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--steps", type=int, default=600, help="training steps")
parser.add_argument("--hidden", type=int, default=32, help="units of each layer")
parser.add_argument("--out", default="tutorial", help="writes OUT.html and OUT.jsonl")
options, _ = parser.parse_known_args()  # a notebook adds arguments of its own

images, digits = load_digits(return_X_y=True)
images, digits = jnp.asarray(images[:, :, None] / 16, jnp.float32), jnp.asarray(digits)
train_x, train_y, test_x, test_y = images[:1437], digits[:1437], images[1437:], digits[1437:]


class Reader(linen.Module):
    """The digit after the last pixel."""

    @linen.compact
    def __call__(self, xs):
        xs = linen.RNN(linen.LSTMCell(options.hidden), name="pixels")(xs)
        xs = linen.RNN(linen.GRUCell(options.hidden), name="strokes")(xs)
        return linen.Dense(10, name="head")(xs[:, -1])


def loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


model = Reader()
variables = model.init(jax.random.key(0), train_x[:1])

# %% [markdown]
# ## 2. The gradient of the untrained model
# One call with the model, its variables, a batch and the loss.  `report` finds the recurrent layers, runs the model
# once forward and once backward, and lists its findings; `print` shows the same sentences as the page.

# %%
held_out = (test_x[:16], test_y[:16])
before = analysis.report(model, variables, held_out, loss)
print(before)

# %% [markdown]
# ## 3. Training, with a monitor
# Every so many steps, the monitor records retention, gate saturation and the leading Lyapunov exponents as one line of
# JSON.  It is cheap enough to leave on.

# %%
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
moments = optimizer.init(variables)


@jax.jit
def update(variables, moments, batch):
    value, gradient = jax.value_and_grad(lambda variables: loss(model.apply(variables, batch[0]), batch))(variables)
    updates, moments = optimizer.update(gradient, moments, variables)
    return optax.apply_updates(variables, updates), moments, value


monitor = analysis.Monitor(f"{options.out}.jsonl", every=max(options.steps // 6, 1), lags=(1, 10, 32, 63))
draw = np.random.default_rng(0)
with tqdm(range(options.steps + 1), desc="training", dynamic_ncols=True) as bar:
    for step in bar:
        cell, weights = linen.functional(linen.LSTMCell(options.hidden), variables["params"]["LSTMCell_0"])
        monitor(step, cell, weights, test_x)
        if step < options.steps:
            rows = draw.integers(0, len(train_x), 64)
            variables, moments, value = update(variables, moments, (train_x[rows], train_y[rows]))
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value:.3f}")
right = jnp.mean(jnp.argmax(jnp.asarray(model.apply(variables, test_x)), -1) == test_y)
print(f"{100 * right:.1f} % of {len(test_x)} held-out digits classified correctly")
for record in monitor.records:
    (layer,) = record["layers"]
    kept = "  ".join(f"10^{log:6.2f} at {lag}" for lag, log in layer["log10_retention"].items())
    print(f"step {record['step']:>4}: {kept}   forget gates above 0.9: {layer['gates']['f']['right']:.0%}")

# %% [markdown]
# ## 4. The gradient of the trained model, compared with the untrained one
# To learn the task, the model has to learn to keep the gradient.  The page compares both, layer by layer.

# %%
after = analysis.report(model, variables, held_out, loss, title="Two layers that read digits pixel by pixel")
print(after)
page = after.save(f"{options.out}.html", before=before)

# %% [markdown]
# ## 5. A closer look at one layer
# Every layer of a report holds its functional cell, parameters and trajectory, for everything else in
# `rnncore.analysis`.

# %%
layer = after.layers["pixels"].layer
for name, share in (after.layers["pixels"].shares or {}).items():
    print(f"{name:>10}: {share:6.1%} of the step Jacobian")
assert layer.inputs is not None
window = int(jnp.median(analysis.effective_window(layer.inputs)))
print(f"90 % of the squared gradient at the pixels lies in the last {window} of 64 (median of 16 images)")
print(f"wrote {page} and {options.out}.jsonl")
