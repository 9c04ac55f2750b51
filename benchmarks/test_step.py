"""A training step of the video tower: forward and backward of every backend, with clips a second.

On a GPU ViT-B-32 and ViT-B-16 in bfloat16 autocast, 32 clips; on a CPU the default recipe's tower in float32, 16 clips.
Before a backend is timed its features must agree with the reference's, from the same weights and clips.
"""

import pytest
import torch

from vidla import VidLA, create_model
from vidla_kernels import available_backends

from .floor import synchronize
from .gate import gate
from .memory import peak_bytes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {"ViT-B-32": 12, "ViT-B-16": 12} if DEVICE.type == "cuda" else {"vidla-tiny": 8}
CLIPS = 32 if DEVICE.type == "cuda" else 16
BACKENDS = ["reference", *(name for name in available_backends(DEVICE) if name != "reference")]


def create_tower(name: str, backend: str) -> VidLA:
    """The same weights for every backend."""
    torch.manual_seed(0)
    model = create_model(name, frames=MODELS[name], backend=backend)
    for block in model.visual.transformer.resblocks:  # at its start of zero, tube attention would not reach the features
        torch.nn.init.normal_(block.tube_attn.out_proj.weight, std=block.tube_attn.out_proj.in_features**-0.5)
    return model.to(DEVICE)


def encode(model: VidLA, video: torch.Tensor) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
        return model.encode_video(video)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_video_tower_step(benchmark, name, backend, table):
    model = create_tower(name, backend)
    size = model.visual.image_size
    video = torch.randn(CLIPS, MODELS[name], 3, size, size, device=DEVICE)

    def step():
        model.zero_grad(set_to_none=True)
        encode(model, video).float().square().mean().backward()
        synchronize(DEVICE)

    with torch.no_grad():
        gate((encode(model, video),), (encode(create_tower(name, "reference"), video),))
    step()
    peak = peak_bytes(step, DEVICE)
    benchmark.group = f"video tower step, {name} T={MODELS[name]} B={CLIPS} on {DEVICE.type}"
    benchmark.pedantic(step, rounds=5 if DEVICE.type == "cpu" else 20, warmup_rounds=1 if DEVICE.type == "cpu" else 5)
    if benchmark.stats is None:
        return
    median = benchmark.stats.stats.median
    row = {"us": median * 1e6, "peak_MiB": peak / 2**20, "clips_per_s": CLIPS / median}
    benchmark.extra_info.update(row)
    table.add(benchmark.group, backend, **row)
