"""Both attentions, forward and forward with backward: time and peak memory of every implementation, side by side.

    pytest benchmarks/ --benchmark-only

No number on a red gate: before it is timed an implementation must agree with the reference. Times are medians; the floor
is the bytes that must move over the copy bandwidth of the same run (`floor.py`).
"""

import pytest
import torch

from .floor import floor_bytes, synchronize
from .gate import gate
from .memory import peak_bytes
from .peers import cannot, implementations
from .shapes import shapes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = [
    pytest.param(op, shape, passes, name, id=f"{op}-{shape.name}-{passes}-{name}".replace(" ", "_"))
    for op in ("tube", "hierarchical")
    for shape in shapes(DEVICE)
    for passes in ("fwd", "fwd+bwd")
    for name in implementations(op, DEVICE)
]


@pytest.mark.parametrize(("op", "shape", "passes", "name"), ROWS)
def test_attention(benchmark, op, shape, passes, name, bandwidth, table):
    if reason := cannot(name, passes, DEVICE):
        table.note(reason)
        pytest.skip(reason)
    rows = implementations(op, DEVICE)
    torch.manual_seed(0)
    qkv, grad = shape.draw(op, DEVICE)

    def call(attention=rows[name]):
        if passes == "fwd":
            with torch.no_grad():
                out = attention(qkv.detach(), shape.layout)  # FlexAttention on a CPU refuses even a leaf with a gradient
            gradient = None
        else:
            qkv.grad = None
            out = attention(qkv, shape.layout)
            out.backward(grad)
            gradient = qkv.grad
        synchronize(DEVICE)
        return out.detach(), gradient

    gate(call(), call(rows["reference"]))
    peak = peak_bytes(call, DEVICE)
    benchmark.group = f"{op} attention, {shape}, {passes}"
    benchmark.pedantic(call, rounds=7 if DEVICE.type == "cpu" else 50, warmup_rounds=1 if DEVICE.type == "cpu" else 10)
    if benchmark.stats is None:  # --benchmark-disable: the gate alone
        return
    median = benchmark.stats.stats.median
    row = {"us": median * 1e6, "peak_MiB": peak / 2**20, "x_floor": median / (floor_bytes(op, shape, passes) / bandwidth)}
    benchmark.extra_info.update(row)
    table.add(benchmark.group, name, **row)
