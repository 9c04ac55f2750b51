"""The emulation catches what it is there for: the CUDA sources are broken on purpose, and each break must be noticed.

A break is noticed when the emulation raises, when values are further from float64 than check.py allows, or when a counter
differs from that of the sound kernel (a lost swizzle changes nothing but bank conflicts). Every run tests the `quick` ones,
VIDLA_ALL_BREAKS=1 all of them, in five minutes or so.
"""

import ctypes
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vidla_kernels import TokenLayout, cuda_binding, cuda_emulate

from .cases import Case, Parts, dense_runs, run
from .check import check
from .cuda_breaks import BREAKS, Break

CHOSEN = [b for b in BREAKS if b.quick or os.environ.get("VIDLA_ALL_BREAKS") == "1"]
# Ragged tiles and frames that levels skip, two clips, blocks that go on from head to head; many frames; no MST; more rows
# than some blocks have room for, and large scores; scores that outgrow all exponents; heads of other widths.
CASES = (
    Case(TokenLayout(3, 17, 2, 3, 2), batch=2, heads=3, dtype=torch.bfloat16),
    Case(TokenLayout(9, 49, 3, 1, 3), batch=2, heads=1, dtype=torch.bfloat16),
    Case(TokenLayout(2, 50, 0, patches_see_cls=True), heads=2, dtype=torch.bfloat16),
    Case(TokenLayout(2, 130, 5, 7, 2, patches_see_cls=True), heads=1, dtype=torch.bfloat16, magnitude=4.0),
    Case(TokenLayout(1, 100), heads=1, dtype=torch.bfloat16, growth=8.0),
    Case(TokenLayout(4, 49, 3, 4, 2), heads=1, head_dim=32, dtype=torch.bfloat16),
    Case(TokenLayout(5, 70, 2, 2, 3, patches_see_cls=True), heads=1, head_dim=128, dtype=torch.bfloat16),
)
# Enough rows for the backward with wgmma, and keys for its last warpgroup; the other tilings have had enough.
LARGE = Case(TokenLayout(3, 190, 2, 3, 2), heads=2, dtype=torch.bfloat16)
# The same for that of wide frames, with summary keys among the first 256 and behind them, and an odd number of tiles.
WIDE = Case(TokenLayout(3, 253, 2, 3, 2), heads=2, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None, reason="about the emulation: without a GPU, with g++"
)


class Sound(NamedTuple):
    """Inputs of one case, what they should give, and what the sound kernels count."""

    case: Case
    qkv: torch.Tensor
    grad: torch.Tensor
    gold: Parts
    dense: list[Parts]
    out: torch.Tensor
    lse: torch.Tensor
    d_qkv: torch.Tensor
    counts: dict[tuple[str, int], dict]

    def attend(self, name: str, variant: int) -> Parts:
        """One pass by the library that cuda_binding has now, the rest from the sound kernels."""
        layout, scale = self.case.layout, self.case.head_dim**-0.5
        if name == "forward":
            return Parts(cuda_binding.forward(self.qkv, layout, scale, variant)[0], self.d_qkv)
        return Parts(self.out, cuda_binding.backward(self.grad, self.qkv, self.out, self.lse, layout, scale, variant))


def variants(name: str, case: Case) -> list[int]:
    words = cuda_binding.variants(name, case.head_dim, torch.device("cpu"))
    if case in (LARGE, WIDE):
        return [variant for variant, said in words.items() if name == "backward" and "wgmma" in said]
    return [-1, *words][:-1]


@pytest.fixture(scope="module")
def sound() -> list[Sound]:
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")
        for case in (*CASES, LARGE, WIDE):
            qkv, grad = case.draw("hierarchical", torch.device("cpu"))
            gold = run("hierarchical", qkv.double(), grad.double(), case.layout, "reference")
            scale = case.head_dim**-0.5
            out, lse = cuda_binding.forward(qkv, case.layout, scale)
            d_qkv = cuda_binding.backward(grad, qkv, out, lse, case.layout, scale)
            dense = dense_runs("hierarchical", qkv, grad, case.layout)
            found.append(Sound(case, qkv, grad, gold, dense, out, lse, d_qkv, {}))
            for name in cuda_binding.PASSES:
                for variant in variants(name, case):
                    try:
                        found[-1].attend(name, variant)
                    except RuntimeError as error:  # asked for by number, a tiling may be too small for a frame
                        if "shared memory" not in str(error):
                            raise
                        continue
                    found[-1].counts[name, variant] = cuda_emulate.last_report
    return found


def sources(broken: Break) -> dict[str, str]:
    """The files of which one kernel's library is made. The broken text is in those for H100 alone, or in the others."""
    names = [path.name for path in cuda_emulate.SOURCES.iterdir() if path.suffix in (".h", ".cuh")]
    names += [f"hierarchical_{'fwd' if broken.kernel == 'forward' else 'bwd'}.cu", "library.cu"]
    return {name: (cuda_emulate.SOURCES / name).read_text() for name in names}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[Break, Path]:
    """The chosen breaks, compiled by two processes at a time. Unoptimised: compiling takes longer than running."""
    scratch = tmp_path_factory.mktemp("breaks")

    def build(number: int) -> Path:
        broken, folder = CHOSEN[number], scratch / str(number)
        folder.mkdir()
        for name, text in sources(broken).items():
            if broken.is_in(name):
                text = text.replace(broken.old, broken.new)
            (folder / name).write_text(re.sub(r"\b(dispatch|run)<fp16\b", r"\1<bf16", text))  # half as much to compile
        cuda_emulate.compile_library(folder, folder / "broken.so", ("-O0",), processes=1)
        return folder / "broken.so"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CHOSEN, pool.map(build, range(len(CHOSEN))), strict=True))


def test_every_break_has_its_place():
    """A break that no longer finds its text tests nothing."""
    for broken in BREAKS:
        mine = [text for name, text in sources(broken).items() if broken.is_in(name)]
        places = sum(text.count(broken.old) for text in mine)
        assert places == 1, f"{broken.kernel}, {broken.what}: its text stands {places} times in the sources"


@pytest.mark.parametrize("broken", CHOSEN, ids=lambda b: f"{b.kernel}-{b.what}".replace(" ", "_"))
def test_break_is_noticed(broken, sound, libraries, monkeypatch, seed):
    monkeypatch.setenv("VIDLA_EMULATE_ARCH", "90")
    library = cuda_binding.prepare(ctypes.CDLL(str(libraries[broken])), (broken.kernel,))
    monkeypatch.setattr(cuda_binding, "library", lambda _: library)
    seen: dict[str, str] = {}
    for sample in sound:
        if (sample.case is LARGE) != (broken.hopper and broken.kernel == "backward") or (sample.case is WIDE) != broken.wide:
            continue
        for variant in [v for name, v in sample.counts if name == broken.kernel]:
            try:
                ours = sample.attend(broken.kernel, variant)
            except RuntimeError as error:
                seen.setdefault("emulation", str(error).splitlines()[0])
                continue
            if cuda_emulate.last_report != sample.counts[broken.kernel, variant]:
                seen.setdefault("counters", f"{sample.case} variant {variant}")
            try:
                check(ours, sample.dense, sample.gold, sample.case.layout.num_summary, sample.case.dtype)
            except AssertionError as error:
                seen.setdefault("values", str(error).splitlines()[0])
    print(seen)
    assert seen, "nothing noticed"
    assert set(broken.seen_by.split()) <= set(seen), f"noticed only by {seen}"
