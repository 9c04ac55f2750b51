"""Classification: gradients of the head and the video tower alone, accuracy, labels, and whole runs of the trainer."""

import dataclasses as dc
import math
import re
from pathlib import Path

import pytest
import torch

from vidla import classification, create_model
from vidla.digits import MOTIONS
from vidla.loader import Batch
from vidla.model import VidLA
from vidla.shards import ShardError, ShardSet, ShardWriter

from .test_train import NO_AUTOCAST, numbers, random_batch, tiny_model
from .train_runs import Workshop

CLASSES = len(MOTIONS)


def gradients(model: VidLA, batch: Batch, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = classification.backward(model, batch, micro_batch, NO_AUTOCAST)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batches_give_the_large_batchs_gradients(micro_batch: int, tmp_path: Path, seed: int):
    model = tiny_model(tmp_path, classes=3).double()
    torch.nn.init.normal_(model.head.weight)
    classification.freeze_texts(model)
    batch = random_batch(8)
    batch.video = batch.video.double()
    loss, whole = gradients(model, batch, 8)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(model.classify(batch.video), batch.label).item(), rel=1e-12)
    part_loss, parts = gradients(model, batch, micro_batch)
    assert part_loss == pytest.approx(loss, rel=1e-10)
    assert set(whole) == {name for name in model.state_dict() if name.startswith(("visual.", "head."))}
    size = torch.cat([g.flatten() for g in whole.values()]).norm()
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-10 * size, name
        assert gradient.norm() > 0, name


def test_bf16_encodes_but_the_head_and_the_loss_are_fp32(tmp_path: Path, seed: int):
    model, batch = tiny_model(tmp_path, classes=3), random_batch(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_video(batch.video).dtype == torch.bfloat16
        assert model.classify(batch.video).dtype == torch.float32
    loss = classification.backward(model, batch, 8, torch.autocast("cpu", torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(3))  # the head starts at zero


def test_accuracy_counts_ties_against_the_model(tmp_path: Path):
    model, batch = tiny_model(tmp_path, classes=7), random_batch(4)
    logits = torch.tensor(
        [[9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0.5], [3, 3, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, torch.nan]]
    )
    batch.label = torch.tensor([0, 1, 1, 6])  # ranks 1, 5, 2 (a tie), 7
    model.classify = lambda video: logits
    assert classification.evaluate(model, [batch]) == {"top1": 0.25, "top5": 0.75, "chance": 1 / 7}
    assert model.training


def test_the_head_is_new_where_the_weights_have_none_and_comes_back_where_they_have(tmp_path: Path, seed: int):
    name = str(tmp_path / "tiny.json")
    tiny_model(tmp_path).save_pretrained(tmp_path / "plain")
    model = create_model(name, tmp_path / "plain", frames=4, classes=3)
    assert model.load_report.new == {"head.weight": "zeros", "head.bias": "zeros"}
    assert not model.head.weight.any()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "headed")
    video = random_batch(2).video
    assert torch.equal(VidLA.from_pretrained(tmp_path / "headed").classify(video), model.eval().classify(video))
    with pytest.raises(ValueError, match=r"the head is for other classes\. Create the model with classes=3"):
        create_model(name, tmp_path / "headed", frames=4, classes=5)
    with pytest.raises(ValueError, match="It has a head: create the model with classes=3"):
        create_model(name, tmp_path / "headed", frames=4)
    with pytest.raises(ValueError, match="no head"):
        tiny_model(tmp_path).classify(video)


# ---- Runs ----------------------------------------------------------------------------------------------------------


def relabel(source: Path, target: Path, **changes: object) -> Path:
    """The clips of `source`, each with the motion of its first digit as label, or with what `changes` says of its key."""
    clips = ShardSet(source)
    with ShardWriter(target) as writer:
        for i, meta in enumerate(clips):
            label = list(MOTIONS).index(meta.extra["events"][0][1])
            extra = {"label": changes.get(meta.key.replace("-", "_"), label)}
            writer.write(dc.replace(meta, caption=None, extra=extra), clips.frames(i, range(len(meta.times))))
    return target


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("classes"))
    relabel(made.folder / "train", made.folder / "labelled")
    return made


def options(shop: Workshop) -> list[str]:
    """The training clips are the held-out ones too: the run is to learn them by heart."""
    data = str(shop.folder / "labelled")
    chosen = ["--model.classes", str(CLASSES), "--data.train", data, "--data.test", data, "--data.sampling", "dense"]
    return [*chosen, "--steps", "100", "--optim.lr", "3e-3", "--run.save-every", "50"]


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> list[dict]:
    said = shop.run("whole", *options(shop))
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"final: step=100 loss={number} top1={number} top5={number} chance={1 / CLASSES:.4f}", said.strip().splitlines()[-1]
    )
    return shop.log("whole")


def test_a_run_learns(shop: Workshop, whole: list[dict]):
    assert whole[0]["loss"] == pytest.approx(math.log(CLASSES))
    assert sum(record["loss"] for record in whole[-10:]) / 10 < 0.8 * math.log(CLASSES)
    assert 3 / CLASSES < whole[-1]["top1"] <= whole[-1]["top5"] <= 1
    middle, end = (shop.folder / "whole" / "checkpoints" / f"step-{step:08d}" for step in (50, 100))
    before, after = (VidLA.from_pretrained(folder).state_dict() for folder in (middle, end))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if name.startswith(("text.", "logit_scale"))}


def test_dense_sampling_shows_other_frames(shop: Workshop, whole: list[dict]):
    shop.run("segments", *options(shop), "--data.sampling", "segment", "--steps", "1")
    (first,) = shop.log("segments")
    assert first["keys_hash"] == whole[0]["keys_hash"]
    assert first["grad_norm"] != whole[0]["grad_norm"]


def test_a_stopped_run_is_the_same_run(shop: Workshop, whole: list[dict]):
    run = shop.start("stopped", *options(shop))
    shop.wait_for_line("stopped", 3, run)
    run.process.terminate()
    assert run.wait() == 143, run.said()
    shop.run("stopped", *options(shop))
    assert numbers(shop.log("stopped")) == numbers(whole)


def test_two_ranks_are_the_same_run(shop: Workshop, whole: list[dict]):
    shop.run_on_ranks(2, "ranks", *options(shop), "--run.micro-batch", "3", "--resume", "never")
    log = shop.log("ranks")
    assert [r["keys_hash"] for r in log] == [r["keys_hash"] for r in whole]
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in log[:8]] == pytest.approx([r[name] for r in whole[:8]], rel=1e-4), name


@pytest.mark.parametrize("label", [CLASSES, -1, 1.0, True, "left", None])
def test_a_bad_label_is_named_before_the_first_step(shop: Workshop, tmp_path: Path, label: object):
    key = ShardSet(shop.folder / "test").keys[2]
    folder = relabel(shop.folder / "test", tmp_path / "bad", **{key.replace("-", "_"): label})
    words = (
        rf"shard-000000\.tar, clip '{key}': 'label' in field 'extra' is {label!r}; legal: an integer from 0 to {CLASSES - 1}"
    )
    with pytest.raises(ShardError, match=words):
        ShardSet(folder).check_labels(CLASSES)
    if label is None:  # whole runs with clips that have a bad label and none
        assert re.search(words, shop.run("bad", *options(shop), "--data.test", str(folder), code=2))
        said = shop.run("bad", *options(shop), "--data.train", str(shop.folder / "train"), code=2)
        assert "'label' in field 'extra' is missing; legal" in said
        assert not (shop.folder / "bad").exists()
