"""Where does my model's gradient go?  From `pip install` to an answer, on a model trained in front of you.

    pip install "rnncore[examples]"
    python examples/tutorial.py                     # a minute or two on two CPU cores; writes tutorial.html
    python examples/tutorial.py --steps 30 --out short

The parts between `# %%` lines are cells: editors that know them (VS Code, Spyder, PyCharm, Jupyter by way of
jupytext) run them one by one and show what they print.
"""

# %% [markdown]
# ## 1. A model and a task
# An ordinary Flax model: a recurrent layer reads scikit-learn's handwritten digits pixel by pixel, 64 steps, and a
# dense layer names the digit after the last one.  What stood in the first pixel has to survive 64 steps.

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
parser.add_argument("--hidden", type=int, default=32, help="units of the LSTM")
parser.add_argument("--out", default="tutorial", help="writes OUT.html and OUT.jsonl")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

images, digits = load_digits(return_X_y=True)
images, digits = jnp.asarray(images[:, :, None] / 16, jnp.float32), jnp.asarray(digits)
train_x, train_y, test_x, test_y = images[:1437], digits[:1437], images[1437:], digits[1437:]


class Reader(linen.Module):
    """The digit after the last pixel."""

    @linen.compact
    def __call__(self, xs):
        (_, h), _ = linen.RNN(linen.LSTMCell(options.hidden), return_carry=True, name="rnn")(xs)
        return linen.Dense(10, name="head")(h)


model = Reader()
params = model.init(jax.random.key(0), train_x[:1])["params"]
print({name: jax.tree.map(jnp.shape, leaves) for name, leaves in params.items()})

# %% [markdown]
# ## 2. The gradient of the untrained model
# `functional` turns the Flax cell and its parameters into the functional cell that the analysis takes.  A trajectory
# keeps every state and gate of a run; `retention_curve` says how much of a gradient survives k steps back.
# Three answers to "how much", which are three different questions:
#
# - `rms`, path "state": the exact derivative of the last state by an earlier one, over all directions;
# - `adjoint`: the same for the one direction that counts, the gradient of your loss;
# - path "direct": the product of forget gates alone, which textbooks show.  It is not the gradient.


# %%
def run_of(params, xs):
    """The trajectory of the model's recurrent cell."""
    cell, weights = linen.functional(linen.LSTMCell(options.hidden), params["LSTMCell_0"])
    return analysis.trajectory(cell, weights, xs)


def adjoint_of(params, run, ys):
    """The gradient of each sequence's loss in its last state."""

    def loss(last):
        logits = last.h @ params["head"]["kernel"] + params["head"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ys).sum()

    return jax.grad(loss)(run.last)


def curves_of(params, xs, ys):
    """Retention by its three readings."""
    run = run_of(params, xs)
    return {
        "state, rms": analysis.retention_curve(run, kind="rms"),
        "this loss": analysis.retention_curve(run, kind="adjoint", adjoint=adjoint_of(params, run, ys)),
        "forget gates alone": analysis.retention_curve(run, kind="rms", path="direct"),
    }


def show(curves):
    for name, curve in curves.items():
        logs = np.mean(np.asarray(curve.log10), axis=0)
        print(f"{name:>20}: " + "  ".join(f"10^{logs[k]:6.2f} at {k}" for k in (1, 10, 32, 63)))


before = curves_of(params, test_x[:8], test_y[:8])
show(before)

# %% [markdown]
# An untrained LSTM of Flax starts with a forget bias of 0: its gradient all but vanishes over the image.
#
# ## 3. Training, with a monitor
# The monitor takes a record every so many steps: retention, gate saturation, leading Lyapunov exponents, one JSON line
# each, cheap enough to leave on.

# %%
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
moments = optimizer.init(params)


@jax.jit
def update(params, moments, xs, ys):
    def loss(params):
        logits = model.apply({"params": params}, xs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ys).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, value


@jax.jit
def accuracy(params):
    return jnp.mean(jnp.argmax(model.apply({"params": params}, test_x), -1) == test_y)


monitor = analysis.Monitor(f"{options.out}.jsonl", every=max(options.steps // 6, 1), lags=(1, 10, 32, 63))
draw = np.random.default_rng(0)
with tqdm(range(options.steps + 1), desc="training", dynamic_ncols=True) as bar:
    for step in bar:
        monitor(step, *linen.functional(linen.LSTMCell(options.hidden), params["LSTMCell_0"]), test_x)
        if step < options.steps:
            rows = draw.integers(0, len(train_x), 64)
            params, moments, loss = update(params, moments, train_x[rows], train_y[rows])
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss:.3f}")
print(f"{100 * accuracy(params):.1f} % of {len(test_x)} held-out digits read rightly")
for record in monitor.records:
    (layer,) = record["layers"]
    kept = "  ".join(f"10^{log:6.2f} at {lag}" for lag, log in layer["log10_retention"].items())
    print(f"step {record['step']:>4}: {kept}   forget gates above 0.9: {layer['gates']['f']['right']:.0%}")

# %% [markdown]
# ## 4. The gradient of the trained model
# The same three curves.  Learning the task was learning to keep the gradient.

# %%
after = curves_of(params, test_x[:8], test_y[:8])
show(after)
for name, curve in after.items():
    fit = curve.fit()
    print(f"{name:>20}: decays as {fit.model}, half-life {fit.half_life:.1f} steps")

# %% [markdown]
# ## 5. Which way does it go?
# Inside a step the gradient of the cell state has several ways back: straight through the forget gate, or around
# through h and one of the gates.  Shares of the paths add up to 1.

# %%
run = run_of(params, test_x[:8])
shares = analysis.path_shares(analysis.gate_paths(run))
for name, share in shares.items():
    print(f"{name:>10}: {float(jnp.mean(share)):6.1%} of the step Jacobian")

# %% [markdown]
# ## 6. Which pixels does this decision hang on?
# The gradient of the loss in every input, from one backward pass, and how many of the last steps hold 90 % of it.

# %%
one = test_x[0]
cell, weights = run.cell, run.params


def loss_of_one(carry, ys):
    del ys
    logits = carry.h @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, test_y[0])


saliency = analysis.input_gradients(loss_of_one, cell, weights, one)
print(f"90 % of the squared gradient lies in the last {int(analysis.effective_window(saliency))} of 64 pixels")

# %% [markdown]
# ## 7. Is the dynamics stable?
# The largest Lyapunov exponents along the inputs: per step, below 0 for a network that forgets.

# %%
exponents = analysis.lyapunov_exponents(run, 4, burn_in=16)
print("largest exponents per step:", *(f"{e:.3f}" for e in np.mean(np.asarray(exponents.exponents), 0)))

# %% [markdown]
# ## 8. All of it on one page

# %%
from rnncore.analysis import plots  # noqa: E402

page = plots.report_trajectory(
    run, f"{options.out}.html", adjoint_of(params, run, test_y[:8]), title="An LSTM that reads digits pixel by pixel",
    progress=lambda names: tqdm(names, desc="figures", dynamic_ncols=True),
)  # fmt: skip
print(f"wrote {page} and {options.out}.jsonl")
