"""The trainer: a step's gradients, and whole runs that are killed, stopped, resumed, spread over ranks."""

import dataclasses as dc
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vidla import train
from vidla.config import Config, UsageError
from vidla.loader import Batch
from vidla.model import create_model

from .train_runs import TINY, Workshop

NO_AUTOCAST = torch.autocast("cpu", enabled=False)


# ---- A step --------------------------------------------------------------------------------------------------------


def write_tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny.json")


def tiny_model(tmp_path: Path, **options):
    model = create_model(write_tiny(tmp_path), frames=4, **options)
    for block in model.visual.transformer.resblocks:
        torch.nn.init.normal_(block.tube_attn.out_proj.weight, std=0.1)  # at its start of zero, q, k and v get no gradient
    return model


def random_batch(size: int) -> Batch:
    texts = torch.randint(1, 49000, (2, size, 12))
    texts[:, :, 7] = 49407  # the end token
    has = torch.rand(2, size) < 0.7
    has[:, :2] = True
    has[:, 3:6] = False  # a micro-batch of three without any text
    keys = [f"k{i}" for i in range(size)]
    source = torch.tensor([0, 1, 1, *range(2, size - 1)])
    return Batch(torch.randn(size, 4, 3, 32, 32), *texts, *has, source, torch.arange(size), torch.arange(size) % 3, keys)


def gradients(model, batch: Batch, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = train.backward(model, batch, micro_batch, NO_AUTOCAST)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_micro_batches_give_the_large_batchs_gradients(micro_batch: int, dtype: torch.dtype, tmp_path: Path, seed: int):
    model = tiny_model(tmp_path).to(dtype)
    batch = random_batch(8)
    batch.video = batch.video.to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    loss, whole = gradients(model, batch, 8)
    part_loss, parts = gradients(model, batch, micro_batch)
    assert part_loss == pytest.approx(loss, rel=tolerance)
    size = torch.cat([g.flatten() for g in whole.values()]).norm()
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= tolerance * size, name
        assert gradient.norm() > 0, name


def test_bf16_encodes_in_bf16_and_keeps_the_rest_in_fp32(tmp_path: Path, seed: int):
    """Also that autocast's cache of weights from the pass without a graph does not reach the pass with one."""
    model, batch = tiny_model(tmp_path), random_batch(8)
    exact, bf16 = gradients(model, batch, 8)[1], torch.autocast("cpu", torch.bfloat16)
    seen = []
    model.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    model.zero_grad(set_to_none=True)
    loss = train.backward(model, batch, 3, bf16)
    assert set(seen) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert all(feature.dtype == torch.float32 for feature in train.encode(model, batch, bf16))
    size = torch.cat([g.flatten() for g in exact.values()]).norm()
    for name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert (p.grad - exact[name]).norm() < 0.05 * size, name
        assert p.grad.norm() > 0, name


def test_only_texts_that_exist_are_encoded(tmp_path: Path, seed: int):
    model, batch = tiny_model(tmp_path), random_batch(8)
    rows = []
    model.text.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    _, caption, subtitle = train.encode(model, batch, NO_AUTOCAST)
    assert rows == [int(batch.has_caption.sum() + batch.has_subtitle.sum())]
    for features, tokens, has in ((caption, batch.caption, batch.has_caption), (subtitle, batch.subtitle, batch.has_subtitle)):
        torch.testing.assert_close(features[has], model.encode_text(tokens[has]))
        assert not features[~has].any()


def test_flops_are_the_closed_form_of_the_products(tmp_path: Path):
    """Without MST tokens and tube attention the video tower is a ViT on each frame beside one CLS, whose products are known."""
    model = create_model(write_tiny(tmp_path), frames=4, levels=0, tube=False)
    d, E, T, N, L = 32, 16, 4, 2**2, 12
    S = 1 + T * N
    embed = T * N * d * 3 * 16**2
    first = S * 12 * d * d + 2 * d * (T * N * N + S)  # 12 d^2: q, k, v, out and the MLP; patches see their frame, CLS all
    last = S * 2 * d * d + 10 * d * d + 2 * d * S  # k and v of all, the rest of CLS only
    text = L * 12 * d * d + 2 * d * L * L
    assert train.forward_flops(model) == 2 * (embed + first + last + d * E + 2 * (text + d * E))


def test_batch_must_be_shared_evenly():
    assert train.share_of_batch(64, 4) == 16
    with pytest.raises(UsageError, match=r"--data.batch-size 64 .* 3 processes"):
        train.share_of_batch(64, 3)


# ---- Runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> list[dict]:
    """The log of a run that nothing disturbs."""
    said = shop.run("whole")
    last = said.strip().splitlines()[-1]
    number = r"\d+\.\d+"
    form = rf"final: step=8 loss={number} t2v_R@1={number} v2t_R@1={number} chance=0\.1667"
    assert re.fullmatch(form, last), said
    return shop.log("whole")


NUMBERS = ("step", "loss", "grad_norm", "lr", "logit_scale", "keys_hash")


def numbers(log: list[dict]) -> list[tuple]:
    return [tuple(record[name] for name in NUMBERS) for record in log]


def test_log_of_a_run(shop: Workshop, whole: list[dict]):
    assert [record["step"] for record in whole] == list(range(1, 9))
    for record in whole:
        assert set(NUMBERS) | {"clips_per_s", "data_wait", "tflops_per_s"} <= set(record)
        assert 0 <= record["data_wait"] <= 1
    assert whole[-1]["lr"] == pytest.approx(1e-5)
    assert "t2v_R@1" in whole[-1]
    assert len({record["keys_hash"] for record in whole}) == 8
    assert sorted(p.name for p in (shop.folder / "whole" / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert list((shop.folder / "whole" / "tensorboard").iterdir())


def test_keys_hash_is_of_the_global_batch_in_order(shop: Workshop, whole: list[dict]):
    from vidla.sampling import global_batch
    from vidla.shards import ShardSet

    keys = ShardSet(shop.folder / "train").keys
    for step, record in enumerate(whole):
        assert record["keys_hash"] == train.keys_hash([keys[i] for _, i in global_batch(0, step, 8, len(keys))])


def test_a_finished_run_only_says_its_result_again(shop: Workshop, whole: list[dict]):
    before = (shop.folder / "whole" / "log.jsonl").read_text()
    said = shop.run("whole")
    assert "nothing is left to train" in said
    assert said.strip().splitlines()[-1].startswith(f"final: step=8 loss={whole[-1]['loss']:.4f} ")
    assert (shop.folder / "whole" / "log.jsonl").read_text() == before


def test_config_toml_repeats_the_run(shop: Workshop, whole: list[dict]):
    """From the written recipe, with a loader process and smaller micro-batches: the same clips, and losses up to rounding."""
    again = ["--recipe", str(shop.folder / "whole" / "config.toml"), "--data.workers", "1", "--run.micro-batch", "3"]
    shop.run("again", *again)
    log = shop.log("again")
    assert [r["keys_hash"] for r in log] == [r["keys_hash"] for r in whole]
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in whole], rel=1e-5)


def test_another_run_can_be_the_start(shop: Workshop, whole: list[dict]):
    """The output of a run stands for its newest checkpoint."""
    shop.run("tuned", "--model.pretrained", str(shop.folder / "whole"), "--steps", "1", "--optim.lr", "1e-5")
    (first,) = shop.log("tuned")
    assert first["keys_hash"] == whole[0]["keys_hash"]
    assert first["loss"] < whole[0]["loss"]  # it has seen these clips


def test_killed_at_random_moments_it_is_the_same_run(shop: Workshop, whole: list[dict], seed: int):
    dice = random.Random(seed)
    for attempt in range(6):
        line = dice.randint(0, 7)
        run = shop.start("killed", "--run.save-every", "1")
        shop.wait_for_line("killed", line, run)
        time.sleep(dice.uniform(0, 0.3))
        run.kill()
        log = [json.loads(text) for text in _whole_lines(shop.folder / "killed" / "log.jsonl")]
        print(f"attempt {attempt}: killed with {len(log)} lines in the log")
        assert [record["step"] for record in log] == list(range(1, len(log) + 1))
    shop.run("killed", "--run.save-every", "3")
    assert numbers(shop.log("killed")) == numbers(whole)  # bit for bit: JSON keeps every digit


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(shop: Workshop, whole: list[dict], number: signal.Signals):
    """To the whole process group, as a terminal or a scheduler sends it: loader processes must not die of it."""
    output = number.name
    run = shop.start(output, "--run.save-every", "1000", "--data.workers", "1", "--steps", "400")
    shop.wait_for_line(output, 2, run)
    os.killpg(run.process.pid, number)
    code, log = run.wait(), shop.log(output)
    assert code == 128 + number, run.said()
    assert 2 <= len(log) < 400
    assert [p.name for p in (shop.folder / output / "checkpoints").iterdir()] == [f"step-{len(log):08d}"]
    assert f"stopped by {number.name} after step {len(log)}" in run.said()


def test_a_stopped_run_is_the_same_run(shop: Workshop, whole: list[dict]):
    run = shop.start("stopped", "--run.save-every", "1000")
    shop.wait_for_line("stopped", 2, run)
    run.process.terminate()
    assert run.wait() == 143, run.said()
    shop.run("stopped")
    assert numbers(shop.log("stopped")) == numbers(whole)


def test_not_finite_stops_with_the_keys_and_keeps_the_checkpoint(shop: Workshop):
    said = shop.run("nan", "--optim.lr", "1e30", "--optim.warmup", "0", "--run.save-every", "1", code=1)
    error = said.strip().splitlines()[-1]
    step = len(shop.log("nan")) + 1
    assert error.startswith("vidla.train: loss ")
    assert f"at step {step}" in error
    written = json.loads((shop.folder / "nan" / f"not-finite-step-{step}.json").read_text())
    assert len(written["keys"]) == 8
    assert all(key in error for key in written["keys"])
    assert (shop.folder / "nan" / "checkpoints" / f"step-{step - 1:08d}").is_dir()


def test_weights_that_are_not_finite_are_never_saved(shop: Workshop):
    said = shop.run("overflow", "--optim.lr", "1e39", "--optim.warmup", "0", "--run.save-every", "1", code=1)
    assert "weights that are not finite" in said.strip().splitlines()[-1]
    assert not list((shop.folder / "overflow").glob("checkpoints/step-*"))


def test_resume_refuses_another_run_and_names_the_option(shop: Workshop, whole: list[dict]):
    for option, value, was in (("--seed", "1", "seed was 0, is 1"), ("--optim.lr", "2e-3", "optim.lr was 0.0003, is 0.002")):
        said = shop.run("whole", option, value, code=2)
        assert was in said
    said = shop.run("whole", "--data.train", str(shop.folder / "test"), code=2)
    assert "data.train's content" in said
    assert numbers(shop.log("whole")) == numbers(whole)


def test_resume_never_moves_the_earlier_run_and_a_path_continues_it_elsewhere(shop: Workshop, whole: list[dict]):
    shop.run("twice", "--steps", "2")
    first = (shop.folder / "twice" / "log.jsonl").read_text()
    shop.run("twice", "--steps", "1", "--resume", "never")
    assert (shop.folder / "twice" / "previous-1" / "log.jsonl").read_text() == first
    assert len(shop.log("twice")) == 1
    checkpoint = shop.folder / "whole" / "checkpoints" / "step-00000006"
    shop.run("twice", "--resume", str(checkpoint))
    assert numbers(shop.log("twice")) == numbers(whole)[6:]
    assert (shop.folder / "twice" / "previous-2" / "log.jsonl").exists()
    assert "no such folder" in shop.run("twice", "--resume", "nowhere", code=2)


def test_going_back_leaves_no_newer_checkpoint_behind(tmp_path: Path):
    """Else --resume auto would jump ahead of the log to a checkpoint of the past that was left."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (4, 8, 12):
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    config = dc.replace(Config(), output=str(tmp_path / "run"), resume=str(checkpoints / "step-00000008"))
    train.prepare_output(config, checkpoints / "step-00000008")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000008"]
    assert (tmp_path / "run" / "previous-1" / "step-00000012").is_dir()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.train", "/nowhere"], "/nowhere"),
        (["--model.name", "ViT-Z-99"], "ViT-Z-99"),
        (["--model.levels", "-1"], "levels"),
        (["--model.backend", "cuda"], "backend 'cuda' cannot run this"),
        (["--optim.lr", "inf"], "--optim.lr must be a finite number"),
        (["--model.pretrained", "/nowhere.safetensors"], "/nowhere.safetensors"),
    ],
)
def test_usage_errors_of_the_library_are_one_line(shop: Workshop, options: list[str], expected: str):
    said = shop.run("refused", *options, code=2).strip()
    errors = [line for line in said.splitlines() if line.startswith("vidla.train: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in said


def test_two_ranks_are_the_same_run(shop: Workshop, whole: list[dict]):
    """Also with micro-batches in each rank; and what two ranks have begun, one ends."""
    shop.run_on_ranks(2, "ranks", "--run.micro-batch", "3")
    log = shop.log("ranks")
    assert [r["keys_hash"] for r in log] == [r["keys_hash"] for r in whole]
    for name, tolerance in (("loss", 1e-5), ("logit_scale", 1e-5), ("grad_norm", 1e-4)):
        assert [r[name] for r in log] == pytest.approx([r[name] for r in whole], rel=tolerance), name
    checkpoint = shop.folder / "ranks" / "checkpoints" / "step-00000006"
    shop.run("one rank", "--resume", str(checkpoint))
    assert [r["loss"] for r in shop.log("one rank")] == pytest.approx([r["loss"] for r in whole[6:]], rel=1e-5)


def test_torchrun(shop: Workshop, whole: list[dict]):
    """The real command, once, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vidla.train"]
    command += ["--recipe", str(shop.recipe), "--output", str(shop.folder / "torchrun")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("final: step=8 ")
    assert [r["loss"] for r in shop.log("torchrun")] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
