"""A training step of the vision tower (forward, backward, AdamW), with clips a second.

On a GPU ViT-B-16 and ViT-B-32 with 32 clips and ViT-L-14 with 8, in bfloat16 autocast; on a CPU the default recipe's tower
in float32, 16 clips. The tower is ours in every row, its two attentions are the row's. Peers, compiled, are the whole tower
compiled. The floor is the time of the tower's matrix products, without attention's own, at the matmul rate of the same run.

Before a row is timed its features may err twice as much as the reference's do in the same precision, from the same weights
and clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vidla import VidLA, create_model, video
from vidla_kernels import TokenLayout, available_backends

from . import peers
from .conftest import BENCH, Bench, record, recorded_time
from .measure import Candidate

GPU = {"ViT-B-16": (12, 32), "ViT-B-32": (12, 32), "ViT-L-14": (12, 8)}  # name -> (frames, clips)
CPU = {"vidla-tiny": (8, 16)}
PAIRS = {  # tube and hierarchical attention of a peer's tower
    "dense mask SDPA": (partial(peers.dense, op="tube"), partial(peers.dense, op="hierarchical")),
    "permute and per-frame SDPA": (peers.permute_sdpa, peers.per_frame),
    "einsum and per-frame SDPA": (peers.einsum, peers.per_frame),
    "einsum and FlexAttention": (peers.einsum, partial(peers.flex, op="hierarchical", block=128)),
}


def rows(device: torch.device) -> dict[str, dict]:
    """Name -> how its tower is made."""
    found = {}
    for backend in available_backends(device):
        if backend != "reference" and (device.type == "cuda" or backend == "portable"):
            found[f"{backend}"] = {"backend": backend, "ours": True}
    found["auto, compiled"] = {"backend": "auto", "ours": True, "compile": True}
    for name, pair in PAIRS.items():
        found[name] = {"backend": "portable", "pair": pair}
    found["einsum and per-frame SDPA, compiled"] = {"backend": "portable", "pair": PAIRS["einsum and per-frame SDPA"]}
    found["einsum and per-frame SDPA, compiled"]["compile"] = True
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    bench = metafunc.config.stash[BENCH]
    models = GPU if bench.device.type == "cuda" else CPU
    metafunc.parametrize(("model", "name"), [(model, name) for model in models for name in rows(bench.device)])


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # by a row that fails at the gate
@pytest.mark.benchmark(timer=recorded_time)
def test_vision_tower_step(benchmark, bench: Bench, selected: list[str], model: str, name: str):
    benchmark.group = f"training step of the vision tower, {model}"
    record(benchmark, measure(bench, model, selected)[name])


class Tower:
    """One row: the model, its optimiser, and its attentions while it runs."""

    def __init__(self, model: str, frames: int, device: torch.device, how: dict) -> None:
        self.device = device
        self.model = create_tower(model, frames, how["backend"], device)
        tube, hierarchical = how.get("pair") or (None, None)
        if how.get("compile") and hierarchical is peers.per_frame:
            hierarchical = peers.per_frame_of(self.model.layout, device)  # its mask is made here, and not in the graph
        # Made once: compiled code is looked up by the functions that it was made from.
        self.pair = tuple(partial(_as_ours, function) for function in (tube, hierarchical) if function)
        self.encode = torch.compile(self.model.encode_video) if how.get("compile") else self.model.encode_video
        self.optimizer = torch.optim.AdamW(self.model.visual.parameters(), lr=1e-5, fused=True)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        with attention(self.pair), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.encode(clips)

    def step(self, clips: torch.Tensor) -> None:
        with attention(self.pair):
            self.features(clips).float().square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def create_tower(name: str, frames: int, backend: str, device: torch.device) -> VidLA:
    """The same weights for every row."""
    torch.manual_seed(0)
    model = create_model(name, frames=frames, backend=backend)
    for block in model.visual.transformer.resblocks:  # at its start of zero, tube attention would not reach the features
        torch.nn.init.normal_(block.tube_attn.out_proj.weight, std=block.tube_attn.out_proj.in_features**-0.5)
    return model.to(device)


@contextmanager
def attention(pair: tuple[Callable, ...]) -> Iterator[None]:
    """The tower's two attentions replaced by a peer's; by nothing where `pair` is empty."""
    names = ("tube_attention", "hierarchical_attention")
    ours = [getattr(video, name) for name in names]
    for name, function in zip(names, pair, strict=False):
        setattr(video, name, function)
    try:
        yield
    finally:
        for name, function in zip(names, ours, strict=True):
            setattr(video, name, function)


def _as_ours(function: Callable, qkv: torch.Tensor, layout: TokenLayout, *, backend: str) -> torch.Tensor:
    return function(qkv, layout)


def measure(bench: Bench, model: str, names: list[str]) -> dict:
    if model in bench.outcomes:
        return bench.outcomes[model]
    frames, clips = (GPU | CPU)[model]
    if bench.toy:
        clips = 2
    reference = create_tower(model, frames, "reference", bench.device)
    size = reference.visual.image_size
    batch = torch.randn(clips, frames, 3, size, size, device=bench.device)
    flops = 3 * clips * forward_flops(model, frames)  # a backward has twice the forward's products
    truth, allowed = truth_and_error(reference, batch[:2], bench.device)
    del reference

    def candidate(name: str, how: dict) -> Candidate:
        if how.get("compile") and bench.device.type == "cpu":
            return Candidate(name, None, ours=how.get("ours", False), absent="compiling a tower takes minutes on a CPU")
        if name == "einsum and FlexAttention" and bench.device.type == "cpu":
            return Candidate(name, None, absent="no backward on a CPU")
        towers: list[Tower] = []

        def tower() -> Tower:
            if not towers:
                towers.append(Tower(model, frames, bench.device, how))
            return towers[0]

        def wrong() -> str | None:
            with torch.no_grad():
                error = (tower().features(batch[:2]).double() - truth).norm() / truth.norm()
            if not error <= allowed:
                return f"its features err by {error:.1e}; twice the reference's own error is {allowed:.1e}"
            tower().step(batch)  # compiles, and makes the optimiser's state
            return None

        return Candidate(name, lambda: tower().step(batch), wrong, how.get("ours", False))

    candidates = [candidate(name, how) for name, how in rows(bench.device).items() if name in names]
    shape = {"name": f"{model} T={frames}", "B": clips, "dtype": "bfloat16" if bench.device.type == "cuda" else "float32"}
    floor = None if bench.gate_only else flops / bench.rates.matmul
    of = {"group": "step", "op": "step", "passes": "fwd+bwd", "shape": shape, "clips": clips}
    try:
        return bench.table(model, candidates, floor_seconds=floor, **of)
    finally:
        peers.forget()


def truth_and_error(reference: VidLA, clips: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, float]:
    """The features in float64 (float32 on a GPU), and how much a row may err: twice the reference, plus one rounding."""
    with torch.no_grad():
        if device.type == "cuda":
            with torch.autocast("cuda", torch.bfloat16):
                got, eps = reference.encode_video(clips).double(), torch.finfo(torch.bfloat16).eps
            truth = reference.encode_video(clips).double()
        else:
            got, eps = reference.encode_video(clips).double(), torch.finfo(torch.float32).eps
            truth = reference.double().encode_video(clips.double())
    return truth, 2 * ((got - truth).norm() / truth.norm()).item() + eps


def forward_flops(model: str, frames: int) -> int:
    """Operations in the matrix products of encoding one clip, without those of attention itself."""
    with torch.device("meta"), torch.no_grad():
        tower = create_model(model, frames=frames, backend="portable")
        size = tower.visual.image_size
        with FlopCounterMode(display=False) as counter, attention((_nothing, _nothing)):
            tower.encode_video(torch.zeros(1, frames, 3, size, size))
    return counter.get_total_flops()


def _nothing(qkv: torch.Tensor, layout: TokenLayout, *, backend: str) -> torch.Tensor:
    return qkv[:, :, 0]
