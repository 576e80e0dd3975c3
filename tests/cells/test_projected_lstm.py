"""LSTMP against torch.nn.LSTM(proj_size=...), and what it runs as."""

from __future__ import annotations

from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rnncore
from rnncore.kernels import cpp

B, T, D, H, P = 3, 5, 4, 6, 2
CELL = rnncore.LSTMP(H, projection_size=P)


@pytest.mark.slow
def test_is_torchs_with_lengths_both_directions_and_layers():
    """Outputs, last states, and gradients of weights, inputs, h_0 and c_0; there and back."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    options = {"num_layers": 2, "bidirectional": True}
    module = torch.nn.LSTM(D, H, proj_size=P, batch_first=True, dtype=torch.float64, **options)
    stack = rnncore.Stack(CELL, **options)
    params = rnncore.from_torch(stack, module.state_dict())
    assert params.layers[1][0].input_kernel.shape == (2 * P, 4, H)
    xs, lengths = rng.normal(size=(B, T, D)), np.array([2, T, 1])
    start = [rng.normal(size=(4, B, n)) for n in (P, H)]  # h, c of layers and directions
    weights = [rng.normal(size=(B, T, 2 * P)), rng.normal(size=(4, B, P)), rng.normal(size=(4, B, H))]
    inside = np.arange(T)[:, None] < lengths[:, None, None]

    given = [torch.tensor(a, requires_grad=True) for a in (xs, *start)]
    packed = torch.nn.utils.rnn.pack_padded_sequence(given[0], torch.tensor(lengths), True, enforce_sorted=False)
    ys, last = module(packed, tuple(given[1:]))
    ys = torch.nn.utils.rnn.pad_packed_sequence(ys, True, total_length=T)[0]
    total = sum((torch.tensor(w) * a).sum() for w, a in zip(weights, (ys, *last), strict=True))
    want = torch.autograd.grad(total, [*module.parameters(), *given])
    names = [name for name, _ in module.named_parameters()]

    @jax.jit
    def run(params: Any, xs: Any, h: Any, c: Any) -> Any:
        carry = tuple(tuple(rnncore.LSTMCarry(c[n], h[n]) for n in (2 * m, 2 * m + 1)) for m in range(2))
        carry, ys = rnncore.unroll_stack(stack, params, xs, initial_carry=carry, seq_lengths=lengths)
        ends = [way for layer in carry for way in layer]
        last = jnp.stack([end.h for end in ends]), jnp.stack([end.c for end in ends])
        return jnp.where(inside, ys, 0), *last

    results, back = jax.vjp(run, params, *map(jnp.asarray, (xs, *start)))
    cases.assert_close(results, [a.detach().numpy() for a in (ys, *last)], cases.FLOAT64)
    of_params, *of_inputs = back(tuple(map(jnp.asarray, weights)))
    ours = rnncore.to_torch(stack, of_params)
    for name, gradient in zip(names, want, strict=False):
        if not name.startswith("bias_hh"):  # of either bias the gradient is that of their sum
            cases.assert_close(ours[name], gradient.numpy(), cases.FLOAT64)
    cases.assert_close(of_inputs, [a.numpy() for a in want[-3:]], cases.FLOAT64)
    module.load_state_dict({k: torch.tensor(v) for k, v in rnncore.to_torch(stack, params).items()})
    again = module(torch.tensor(xs))[0].detach().numpy()
    cases.assert_close(rnncore.unroll_stack(stack, params, jnp.asarray(xs))[1], again, cases.FLOAT64)


def problem(**options: Any) -> tuple[cases.Case, cases.Problem]:
    case = cases.BY_ID["lstmp"]
    return case, cases.draw(case, (3,), **options)


@pytest.mark.sample(2)
@pytest.mark.parametrize("reverse", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}], ids=str)
def test_states_start_with_the_projected_h(reverse: Any):
    case, drawn = problem(resets=True)
    options = {"return_states": True, "include_initial": True, **reverse}
    got, want = (cases.runner(case, name, **options)(*drawn) for name in ("scan", "autodiff"))
    cases.assert_close(got, want, cases.FLOAT64)


def test_zoneout_of_c_and_of_h():
    """That of c runs in every loop; the projected h is no state of those, so that its zoneout is left to autodiff."""
    case, drawn = problem()
    of_c, of_h = rnncore.LSTMCarry(0.3, None), rnncore.LSTMCarry(None, 0.3)
    got, want = (cases.runner(case, name, zoneout=of_c)(*drawn) for name in ("scan", "autodiff"))
    cases.assert_close(got, want, cases.FLOAT64)
    assert rnncore.explain_backend(case.cell, drawn.params, drawn.xs, zoneout=of_h).name == "autodiff"
    with pytest.raises(NotImplementedError, match="LSTMP is not a PointwiseCell"):
        cases.runner(case, "scan", zoneout=of_h)(*drawn)


@pytest.mark.slow
@pytest.mark.skipif(cpp.missing_compiler("cpu") is not None, reason="no C++ compiler")
def test_runs_in_the_compiled_loop():
    case, drawn = problem(lengths=True, resets=True, dtype=jnp.float32)
    got, want = (cases.pull(cases.runner(case, name), drawn)[:2] for name in ("cpp", "scan"))
    cases.assert_close(got, want, 1e-5)


def test_a_projection_that_is_none():
    for size in (0, H):
        with pytest.raises(ValueError, match=f"projection_size={size}.*fewer than hidden_size"):
            rnncore.LSTMP(H, projection_size=size)
