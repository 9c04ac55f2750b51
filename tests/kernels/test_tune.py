"""Tuning without a GPU: an invented clock, interpreted kernels, a file in a temporary folder."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from vidla_kernels import TokenLayout, backends, tiles, triton_tube, tube_attention, tune, tuned
from vidla_kernels.tiles import Tile

CPU = torch.device("cpu")
HERE = {"gpu": "Imagined 9000", "capability": "9.0", "torch": "1", "triton": "2", "vidla": "3", "kernels": "abc"}
SMALL = tune.Case("tube", torch.float16, T=3, N=2, H=1, D=32, B=1)
KEY = "tube_forward half D=32 T<=16"
SHIPPED = Tile(64, 64, 4)  # of tube_forward in half precision on the architecture that the interpreter takes


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine on which tuning is possible, with a cache of its own."""
    if "triton" not in backends.available_backends("cpu"):
        pytest.skip(backends.missing("triton", CPU))
    monkeypatch.setenv("VIDLA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    tuned.forget()
    yield
    tuned.forget()


class Clock:
    """Seconds by the tile that is forced for KEY: what `do_bench` would measure if tiles had these speeds."""

    def __init__(self, factors: dict[Tile, float]) -> None:
        self.factors = factors

    def __call__(self, call) -> float:
        factor = self.factors.get(tiles._trial.forced.get(KEY), 1.0) if tiles._trial else 1.0
        return 1e-3 * (factor.pop(0) if isinstance(factor, list) else factor)


def run(factors: dict, cases=(SMALL,)) -> tuple[dict[str, tune.Result], list[str]]:
    said = []
    results = tune.tune([list(cases)], CPU, Clock(factors), said.append, size=1 << 20)
    return {result.key: result for result in results}, said


def in_use(T: int = 3, dtype=torch.float16) -> Tile:
    return tiles.holding("tube_forward", CPU, dtype, 32, T)


def test_a_faster_tile_is_kept_and_used(seed):
    assert in_use() == SHIPPED
    results, said = run({Tile(32, 32, 2): 0.7, Tile(32, 32, 4): 0.9, Tile(64, 64, 8): 0.99})
    assert results[KEY].best == Tile(32, 32, 2)
    assert results[KEY].ratio == pytest.approx(0.7)
    assert in_use() == Tile(32, 32, 2)
    assert in_use(T=16, dtype=torch.bfloat16) == Tile(32, 32, 2), "the same class of T, the same kind of dtype"
    assert in_use(T=17) == in_use(T=64) == SHIPPED, "another class of T"
    assert tiles.holding("tube_forward", CPU, torch.float32, 32, 3) != Tile(32, 32, 2)
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tube.common, "launch", lambda *args, **options: launched.append(options["ROWS"]))
        tube_attention(torch.zeros(1, 6, 3, 1, 32, dtype=torch.float16), TokenLayout(3, 2), backend="triton")
    assert launched == [32]
    assert any("-30.0%" in line for line in tune.table(results.values()).splitlines() if line.startswith(KEY))
    assert any("of a copy of its bytes" in line for line in said)
    entry = json.loads(tuned.path().read_text())["entries"][0]
    assert entry["machine"] == HERE
    assert tiles.Tile(**entry["tiles"][KEY]) == tiles.Tile(32, 32, 2)


@pytest.mark.parametrize("factor", [0.985, [0.5, 1.0]], ids=["by less than 2 %", "once, not twice"])
def test_a_tile_that_hardly_wins_is_not_kept(factor, seed):
    results, _ = run({Tile(32, 32, 2): factor})
    assert not results[KEY].wins
    assert json.loads(tuned.path().read_text())["entries"][0]["tiles"] == {}


def test_what_was_kept_goes_when_the_shipped_tile_wins(seed):
    run({Tile(32, 32, 2): 0.7})
    run({})
    tuned.forget()
    assert in_use() == SHIPPED


def test_one_tile_serves_every_shape_of_its_class(seed):
    """Timed at two shapes; a candidate counts by both."""
    other = tune.Case("tube", torch.float16, T=5, N=3, H=1, D=32, B=1)
    results, said = run({Tile(32, 32, 2): [0.5, 0.9, 0.5, 0.9]}, cases=(SMALL, other))
    assert results[KEY].ratio == pytest.approx((0.5 * 0.9) ** 0.5)
    assert sum("shipped" in line for line in said) == 4


def test_candidates_that_cannot_serve_are_named_and_skipped(monkeypatch, seed):
    broken, spilling, wrong = Tile(24, 24, 4), Tile(32, 32, 2), Tile(32, 32, 4)
    monkeypatch.setitem(tiles._CANDIDATES, ("tube_forward", "half"), (broken, spilling, wrong))
    forward = triton_tube.forward

    def spoilt(qkv, layout, scale):
        out = forward(qkv, layout, scale)
        forced = tiles._trial.forced.values() if tiles._trial else ()
        if spilling in forced:
            tiles.launched(type("Compiled", (), {"n_spills": 7}))
        if wrong in forced:
            out[0, 1] += 0.5
        return out

    monkeypatch.setattr(triton_tube, "forward", spoilt)
    results, said = run({broken: 0.1, spilling: 0.1, wrong: 0.1})
    assert not results[KEY].wins
    for tile, why in (
        (broken, "skipped, "),
        (spilling, "skipped, 7 registers spill"),
        (wrong, "skipped, its result is another"),
    ):
        assert any(tune.describe(tile) + ": " + why in line for line in said), (tile, said)


def test_agreement_sees_one_wrong_row_and_allows_rounding(seed):
    want = torch.randn(2, 500, 3, 2, 64).to(torch.bfloat16)
    want[:, :100] *= 1e-3
    rounded = (want.float() * (1 + torch.randn(want.shape) * 2**-9)).to(torch.bfloat16)
    assert tune.agrees(rounded, want)
    for value in (float("nan"), 0.0):
        row = rounded.clone()
        row[1, 300, 1, 0] = value
        assert not tune.agrees(row, want)


def test_hierarchical_kernels_are_tuned_by_their_neighbours(seed):
    case = tune.Case("hierarchical", torch.float16, T=2, N=3, H=1, D=32, B=1)
    results, said = run({}, cases=(case,))
    assert any(key.startswith("hier_") and result.passes == "backward" for key, result in results.items())
    assert any("hier_forward" in line and "1.000 of the time" in line for line in said)
    compared = backends.missing("cuda", torch.device("cpu")) is None  # emulated, where there is a g++
    assert any(("float16 backward: triton" if compared else "backend cuda is not compared") in line for line in said)


@pytest.mark.parametrize("part", HERE)
def test_an_entry_of_another_machine_is_never_used(part, monkeypatch, seed):
    run({Tile(32, 32, 2): 0.7})
    monkeypatch.setattr(tuned, "machine", lambda device: HERE | {part: "another"})
    tuned.forget()
    with warnings.catch_warnings(action="error"):
        assert in_use() == SHIPPED
    (line,) = [line for line in tune.show(CPU).splitlines() if "passed over" in line]
    assert f"measured with {part} {HERE[part]}, here another" in line
    run({Tile(32, 32, 4): 0.7})
    assert in_use() == Tile(32, 32, 4)
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    tuned.forget()
    assert in_use() == Tile(32, 32, 2), "each machine keeps its own entry"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no JSON"),
        ("[1, 2]", "format is 'list'"),
        ('{"format": 99, "entries": []}', "format is 99, this version reads 1"),
        ('{"format": 1, "entries": [{"machine": 3}]}', "an entry is not"),
        ("\x00\xff", "no JSON"),
    ],
)
def test_a_broken_file_is_passed_over_with_a_warning(content, complaint, seed):
    tuned.path().write_text(content)
    with pytest.warns(UserWarning, match=rf"tuned.json is passed over.*{complaint}.*--clear"):
        assert in_use() == SHIPPED
    with warnings.catch_warnings(action="error"):
        assert in_use() == SHIPPED, "one warning, not one a launch"
    assert complaint in tune.show(CPU)
    run({Tile(32, 32, 2): 0.7})  # tuning replaces it
    assert in_use() == Tile(32, 32, 2)


@pytest.mark.parametrize("tile", [{"rows": "many"}, {"rows": 0, "keys": 32, "warps": 4}, {"threads": 3}, 7])
def test_a_broken_tile_is_passed_over_with_a_warning(tile):
    tuned.write([{"machine": HERE, "measured": {}, "tiles": {KEY: tile}, "backends": {}}])
    with pytest.warns(UserWarning, match="not a tile, the shipped one is used"):
        assert in_use() == SHIPPED


def test_a_tile_too_small_for_its_class_is_not_used():
    tuned.write([{"machine": HERE, "measured": {}, "tiles": {KEY: {"rows": 8, "keys": 8, "warps": 4}}, "backends": {}}])
    assert in_use(T=12) == SHIPPED


def test_auto_takes_the_kernels_that_were_faster(monkeypatch):
    def choice(N: int = 49, dtype: torch.dtype = torch.float16, op: str = "hierarchical") -> str:
        tuned.forget()
        return backends.choose("auto", backends.Case(CPU, dtype, 64, TokenLayout(12, N), op))

    def prefer(**kernels: str) -> None:
        preferred = {tuned.backend_key("hierarchical", name, "half", 64, 49): kernel for name, kernel in kernels.items()}
        tuned.write([{"machine": HERE, "measured": {}, "tiles": {}, "backends": preferred}])

    assert choice() == "portable"
    prefer(forward="triton", backward="triton")
    assert choice() == choice(N=64) == choice(dtype=torch.bfloat16) == "triton"
    assert choice(N=65) == choice(dtype=torch.float32) == choice(op="tube") == "portable"
    prefer(forward="no-such-backend", backward="reference")
    assert choice() == "portable"
    prefer(forward=7, backward=None)
    assert choice() == "portable"

    # Not both passes alike, and tilings by number: of those only what serves the N at hand.
    if backends.missing("cuda", CPU):
        return
    first = next(name for name in backends.NAMES if name in backends.available_backends(CPU) and name in backends.KERNELS)
    monkeypatch.setattr(backends.cuda_binding, "serves", lambda name, variant, *rest: rest[-1].patches == 49)
    prefer(backward="cuda:2")
    assert choice() == f"{first}/cuda:2"
    assert choice(N=64) == "portable"
    prefer(forward="cuda:1", backward="cuda:1")  # tiling 1 of either list
    assert choice() == "cuda:1/cuda:1"


def test_the_faster_backend_is_found_and_must_agree(monkeypatch, seed):
    case = tune.Case("hierarchical", torch.float32, T=2, N=3, H=1, D=32, B=1)
    said = []
    speeds = {"triton": [1.0], "portable": [0.9], "reference": [0.5]}
    wrong = set()

    class Timed(tune.Attention):
        def passes(self, plan="triton"):
            calls = super().passes(plan)
            named = {}
            for name, call in calls.items():
                named[name] = (lambda call=call: call() * 2) if plan in wrong else (lambda call=call: call())
                named[name].plan = plan
            return named

    def measure(call):
        times = speeds[call.plan]
        return times.pop(0) if len(times) > 1 else times[0]

    tuner = tune.Tuner([], CPU, measure, said.append)
    for name in tune.PASSES:
        assert tuner.backend(Timed(case, CPU), name, ("triton", "portable"))[0] == "portable"
        assert tuner.backend(Timed(case, CPU), name, ("portable", "triton"))[0] == "portable"
        speeds["portable"] = [0.9, 1.0]  # not so when timed again
        assert tuner.backend(Timed(case, CPU), name, ("triton", "portable"))[0] == "triton"
        speeds["portable"] = [0.9]
        wrong.add("reference")
        assert tuner.backend(Timed(case, CPU), name, ("portable", "reference"))[0] == "portable"
        assert f"{name}: reference skipped" in said[-1]


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, *_ in tiles.TABLE}))
def test_candidates_are_legal(kernel):
    for name, arch, kind, D in tiles.TABLE:
        if name != kernel:
            continue
        for shipped in tiles.TABLE[name, arch, kind, D]:
            ends = [f" T<={end}" for end in tiles.CLASSES if end <= shipped.rows] if "packed" in _form(kernel) else [""]
            for end in ends:
                for tile in tiles.candidates(f"{kernel} {kind} D={D}{end}", shipped):
                    assert tile != shipped
                    assert tile.warps in (1, 2, 4, 8)
                    assert 1 <= tile.stages <= 4
                    if end:
                        assert tile.rows == tile.keys >= int(end[4:])
                        assert tile.rows & (tile.rows - 1) == 0


def _form(kernel: str) -> str:
    return "packed" if kernel in ("tube_forward", "tube_backward") else "walking"


def test_shapes_of_the_command_line():
    assert tune.parse_shape("B/16") == ("B/16", (12, 196, 12, 64, 32))
    assert tune.parse_shape("16,49,12,80,4") == ("", (16, 49, 12, 80, 4))
    for text in ("B/8", "1,2,3", "1,2,3,64,0", "a,b,c,d,e", "12,49,12,72,4"):
        with pytest.raises(tune.argparse.ArgumentTypeError, match=r"nor T,N,H,D,B|head dimension 72"):
            tune.parse_shape(text)


def test_show_and_clear(capsys, seed):
    assert tune.main(["--show"]) == 0
    assert "nothing measured yet" in capsys.readouterr().out
    run({Tile(32, 32, 2): 0.7})
    assert "Imagined 9000" in tune.show(CPU)
    assert "in use here" in tune.show(CPU)
    assert tune.main(["--clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not tuned.path().exists()
    assert tune.main(["--clear"]) == 0


def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VIDLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.path() == tmp_path / "xdg" / "vidla" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.path() == tmp_path / ".cache" / "vidla" / "tuned.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "vidla_kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "tuning measures on an NVIDIA GPU, and torch sees none here\n"


def test_importing_reads_no_file(tmp_path):
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import vidla_kernels, vidla_kernels.triton_tube
assert any(name.endswith("tiles.py") or "tiles." in name for name in opened), "the hook must see what is opened"
print(sum("tuned.json" in name for name in opened))
"""
    (tmp_path / "tuned.json").write_text("no JSON")
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
