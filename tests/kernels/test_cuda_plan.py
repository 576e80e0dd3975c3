"""Layouts of the CUDA kernels: pure functions of shapes and of a GPU's figures, so that no GPU is needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cuda_problems import DEVICES

import rnncore
from rnncore.kernels import kernel_body
from rnncore.kernels.cuda import Cuda, emit, launch, nvrtc
from rnncore.kernels.cuda.plan import Device, Plan, Shape, layouts, plan_of, products
from rnncore.recurrence.run import Request

GPUS = ("T4", "L4", "RTX 3090", "A100", "RTX 4090", "H100", "B200")


def shape_of(cell: Any, direction: str, rows: int, dtype: str, product: str, heads: int = 1) -> Shape:
    return Shape(
        direction, dtype, dtype, product, gates=len(cell.gates), fields=len(cell.Carry._fields),
        width=kernel_body.of(cell, (1, 1)).width, size=cell.hidden_size // heads, heads=heads, sequences=rows,
    )  # fmt: skip


def planned(device: Device, *args: Any, **options: Any) -> Plan:
    plan = plan_of(device, shape_of(*args, **options))
    assert isinstance(plan, Plan), plan
    return plan


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("gpu", GPUS)
def test_an_lstm_of_768_is_held_on_the_chip(gpu: str, direction: str):
    device = DEVICES[gpu]
    product = products("float32", None, device.capability)
    plan = planned(device, rnncore.LSTM(768), direction, 16, "float32", product)
    # 2.4 million weights are 9.4 MB; a T4 has 40 x (256 + 64) KB in all.
    assert (plan.streamed > 0) == (gpu == "T4")
    if device.capability >= 80:
        assert planned(device, rnncore.LSTM(768), direction, 16, "bfloat16", "mma").streamed == 0
    half = planned(device, rnncore.LSTM(768), direction, 16, "float16", "mma")
    assert half.streamed == 0 or gpu == "T4"


@pytest.mark.parametrize("gpu", GPUS)
def test_every_layout_keeps_to_the_limits(gpu: str):
    device = DEVICES[gpu]
    count = 0
    for size, heads, rows, dtype in (
        (64, 12, 16, "float16"),
        (100, 1, 9, "float32"),
        (100, 1, 9, "float16"),
        (1024, 1, 64, "float16"),
    ):
        cell = rnncore.GRU(size * heads, recurrence=rnncore.Heads(heads))
        for direction in ("forward", "backward"):
            shape = shape_of(cell, direction, rows, dtype, products(dtype, None, device.capability), heads)
            for plan in layouts(device, shape):
                count += 1
                assert plan.shared <= device.shared and plan.threads <= 512 and plan.step > 0
                assert plan.threads * (plan.in_registers * shape.sets * 8 + 32) <= 65536
                # Of what is exchanged somebody writes every unit: what nobody writes would be waited for.
                assert plan.blocks * plan.groups * 16 >= (size if plan.sync == "none" else shape.padded)
                assert plan.split * plan.each >= shape.depth
                assert plan.sync != "grid" or plan.grid <= device.processors
                assert plan.sync != "cluster" or device.capability in (90, 100)
                assert (plan.blocks == 1) == (plan.sync == "none")
    assert count > 100


def test_small_heads_run_alone_and_large_ones_together():
    h100 = DEVICES["H100"]
    heads = {64: 12, 256: 3, 768: 1}
    plans = {
        size: planned(h100, rnncore.LSTM(768), "forward", 16, "bfloat16", "mma", heads=n) for size, n in heads.items()
    }
    assert [plans[size].sync for size in heads] == ["none", "cluster", "grid"]
    assert all(plan.streamed == plan.in_shared == 0 for plan in plans.values())
    assert plans[64].step < plans[256].step < plans[768].step < 2.2


def test_what_is_too_much_for_the_chip_is_streamed_and_what_waits_for_too_much_is_refused():
    t4 = DEVICES["T4"]
    large = planned(t4, rnncore.LSTM(2048), "forward", 16, "float16", "mma")
    assert large.streamed > 0
    why = plan_of(t4, shape_of(rnncore.LSTM(2048), "forward", 4096, "float16", "mma"))
    assert isinstance(why, str) and "T4" in why and "fewer sequences" in why
    assert "8.0" in str(plan_of(t4, shape_of(rnncore.LSTM(64), "forward", 4, "bfloat16", "mma")))
    # Blocks that wait for nobody may be as many as there are.
    assert planned(t4, rnncore.LSTM(64), "forward", 4096, "float16", "mma").sync == "none"


def test_precision_chooses_the_product():
    assert products("bfloat16", "highest", 90) == "mma"
    assert products("float32", None, 90) == products("float32", "default", 80) == "tf32"
    assert products("float32", "highest", 90) == products("float32", "high", 120) == "3xtf32"
    assert products("float32", None, 75) == "fma"


def test_a_layout_is_part_of_the_source_and_shapes_of_the_call_are_not():
    cell = rnncore.LSTM(64)
    plan = planned(DEVICES["H100"], cell, "forward", 16, "bfloat16", "mma")
    text = emit.source(cell, plan)
    more = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, sequences=13))
    assert emit.source(cell, more) == text
    assert emit.source(cell, dataclasses.replace(plan, tiles=2)) != text


def test_chosen_where_it_was_timed_and_nowhere_else(monkeypatch: pytest.MonkeyPatch):
    """On one GPU of Hopper's kind, heads of 64 to 1024 units, up to 64 sequences, every dtype."""
    monkeypatch.setattr(nvrtc, "library", lambda: "there")
    backend = Cuda()

    def reason(gpu: Device, cell: rnncore.Cell, rows: int, dtype: str = "bfloat16", devices: int = 1) -> str | None:
        monkeypatch.setattr(launch, "device", lambda: gpu)
        request = Request(
            cell=cell, steps=8, batch_shape=(rows,), input_size=4, dtype=dtype, dtypes=frozenset({dtype}),
            precision=None, platform="gpu", devices=devices, lengths=False, resets=False, recurrent_mask=False,
            zoneout=False, return_states=False, checkpoint_every=None, recompute="nothing",
        )  # fmt: skip
        assert backend.unsupported(request) is None
        return backend.why_not_by_default(request)

    hopper, ampere = DEVICES["H100"], DEVICES["A100"]
    for dtype in ("bfloat16", "float16", "float32"):
        assert reason(hopper, rnncore.LSTM(768), 16, dtype) is None
    assert reason(hopper, rnncore.GRU(768, recurrence=rnncore.Heads(12)), 64) is None
    assert "compute capability 9.0, and this GPU has 8.0" in (reason(ampere, rnncore.LSTM(768), 16) or "")
    assert "this run has 40 and 16" in (reason(hopper, rnncore.LSTM(40), 16) or "")
    assert "this run has 100 and 16" in (reason(hopper, rnncore.LSTM(100), 16) or "")
    assert "this run has 256 and 65" in (reason(hopper, rnncore.LSTM(256), 65) or "")
    assert "sharded over devices" in (reason(hopper, rnncore.LSTM(256), 16, devices=2) or "")
