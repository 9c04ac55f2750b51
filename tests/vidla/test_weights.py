"""Weights from elsewhere: sources, activation, names, interpolation, refusals, the report."""

import copy
import json

import open_clip
import open_clip.pretrained
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import vidla.model
from vidla import VidLA, create_model
from vidla.weights import load_checkpoint, read_checkpoint

CLIP_LIKE = dict(frames=1, levels=0, tube=False, patches_see_cls=True)
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 300, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(autouse=True)
def _small_model(tmp_path, monkeypatch, seed):
    """Two model names, "small" and "small-quickgelu", for `create_model`, as if the package shipped them."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(SMALL))
    (folder / "small-quickgelu.json").write_text(json.dumps(SMALL | {"quick_gelu": True}))
    monkeypatch.setattr(vidla.model, "_CONFIGS", folder)


def open_clip_model(quick_gelu: bool = False) -> open_clip.CLIP:
    model = open_clip.CLIP(**copy.deepcopy(SMALL), quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def assert_same_features(ours: VidLA, theirs: open_clip.CLIP) -> None:
    image, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 300, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_video(image[:, None]), theirs.encode_image(image), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale, theirs.logit_scale.reshape(()))


class OpenAI(nn.Module):
    """What OpenAI's archives hold beside the parameters: three integers as buffers, and the causal mask."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.visual, self.transformer, self.token_embedding, self.ln_final = (
            clip.visual,
            clip.transformer,
            clip.token_embedding,
            clip.ln_final,
        )
        self.positional_embedding, self.text_projection, self.logit_scale = (
            clip.positional_embedding,
            clip.text_projection,
            clip.logit_scale,
        )
        for name, value in [("input_resolution", 32), ("context_length", 16), ("vocab_size", 300)]:
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("attn_mask", clip.attn_mask)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.visual(image)


def save_archive(model: open_clip.CLIP, path) -> None:
    torch.jit.trace(OpenAI(model), torch.randn(1, 3, 32, 32), check_trace=False).save(path)


# Sources


@pytest.mark.parametrize("form", ["safetensors", "state dict", "training checkpoint", "custom text", "(1,) logit_scale"])
def test_reads_open_clips_files(form, tmp_path):
    theirs = open_clip_model()
    state, path = theirs.state_dict(), tmp_path / "weights.pt"
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif form == "training checkpoint":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    elif form == "custom text":
        torch.save(open_clip.CustomTextCLIP(**copy.deepcopy(SMALL)).state_dict(), path)
        theirs = open_clip.CustomTextCLIP(**copy.deepcopy(SMALL)).eval()
        theirs.load_state_dict(torch.load(path, weights_only=True))
    else:
        if form == "(1,) logit_scale":
            state["logit_scale"] = state["logit_scale"].reshape(1)
        torch.save(state, path)
    ours = create_model("small", path, **CLIP_LIKE)
    assert_same_features(ours, theirs)
    assert len(ours.load_report.loaded) == len(ours.state_dict()) - 1  # all but the temporal embedding
    assert "does not say its activation" in str(ours.load_report)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")  # of making the archive
def test_openais_archive_is_always_quickgelu(tmp_path, caplog):
    """Whatever the model's name says, and with a remark; the archive's buffers are no weights; fp16 becomes fp32."""
    theirs = open_clip_model(quick_gelu=True)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.half().float()  # values that fp16 holds exactly
    save_archive(theirs, tmp_path / "small.pt")
    with caplog.at_level("INFO", logger="vidla"):
        ours = create_model("small", tmp_path / "small.pt", **CLIP_LIKE)
    assert "QuickGELU, so the model has it, although the config 'small' says GELU" in caplog.text
    assert ours.config["model_cfg"]["quick_gelu"] is True
    assert ours.load_report.kind == "OpenAI"
    assert_same_features(ours, theirs)
    named_right = create_model("small-quickgelu", tmp_path / "small.pt", **CLIP_LIKE)
    assert not named_right.load_report.notes

    half = {key: value.half() for key, value in theirs.state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    ours = create_model("small-quickgelu", tmp_path / "half.pt", **CLIP_LIKE)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    assert_same_features(ours, theirs)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("name", ["small", "small-quickgelu"])
def test_a_tag_knows_its_activation(name, quick_gelu, tmp_path, monkeypatch):
    """open_clip's own lookup and download; 'file' is its way to point at a local one."""
    theirs = open_clip_model(quick_gelu)
    torch.save(theirs.state_dict(), tmp_path / "downloaded.bin")
    tag = {"file": str(tmp_path / "downloaded.bin"), "quick_gelu": quick_gelu}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"some_tag": tag})
    ours = create_model(name, "some_tag", **CLIP_LIKE)
    assert_same_features(ours, theirs)
    assert bool(ours.load_report.notes) == (quick_gelu != ("quickgelu" in name))
    with pytest.raises(ValueError, match="some_tag"):
        create_model(name, "another_tag")


def test_open_clips_config_beside_the_file_knows_too(tmp_path):
    theirs = open_clip_model(quick_gelu=True)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL | {"quick_gelu": True}}))
    assert_same_features(create_model("small", tmp_path / "open_clip_model.safetensors", **CLIP_LIKE), theirs)


class Trap:
    def __reduce__(self):
        return (exec, ("import os; os.environ['VIDLA_TRAP'] = 'sprung'",))


def test_a_file_cannot_run_code(tmp_path, monkeypatch):
    import os

    monkeypatch.delenv("VIDLA_TRAP", raising=False)
    torch.save({"visual.conv1.weight": torch.ones(2), "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="nothing is unpickled"):
        create_model("small", tmp_path / "trap.pt")
    assert "VIDLA_TRAP" not in os.environ


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_refuses_broken_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"cannot be read as weights.*it must be"):
        create_model("small", tmp_path / name)


def test_refuses_files_without_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no state dict"):
        create_model("small", tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="folder without"):
        create_model("small", tmp_path)
    with pytest.raises(ValueError, match="neither a path that exists nor a tag"):
        create_model("small", tmp_path / "absent.pt")


# VidLA's own


def test_round_trip(tmp_path):
    """save_pretrained and back, by from_pretrained and by create_model: the same bits and the same options."""
    options = dict(frames=3, levels=2, tokens_per_level=1, temporal_scale=3, patches_see_cls=True)
    model = VidLA(SMALL | {"quick_gelu": True}, **options, checkpoint_activations=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "saved")
    video, tokens = torch.randn(2, 3, 3, 32, 32), torch.randint(1, 300, (2, 16))
    for again in (
        VidLA.from_pretrained(tmp_path / "saved"),
        create_model("small", tmp_path / "saved", **options),
        create_model("small-quickgelu", tmp_path / "saved" / "model.safetensors", **options),
    ):
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
        with torch.no_grad():
            for ours, expected in zip(again(video, tokens), model(video, tokens), strict=True):
                assert torch.equal(ours, expected)
        assert again.config == model.config | {"checkpoint_activations": False}  # how to compute is not saved
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["temporal_scale"] == 3
    assert again.load_report.kind == "VidLA"


def test_reads_a_bare_state_dict_of_vidla(tmp_path):
    model = VidLA(SMALL)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    again = create_model("small", tmp_path / "bare.pt")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_frames_are_interpolated_linearly_in_time(tmp_path):
    """Frame t of T stands at (t + 1/2) / T of the clip. A course that is linear in time stays on its line."""
    model = VidLA(SMALL, frames=12)
    slope, start = torch.randn(64), torch.randn(64)
    middle = (torch.arange(12) + 0.5) / 12
    model.visual.temporal_embedding.data = start + slope * middle[:, None]
    model.save_pretrained(tmp_path)
    for frames in (32, 5):
        again = VidLA.from_pretrained(tmp_path, frames=frames)
        times = ((torch.arange(frames) + 0.5) / frames).clamp(middle[0], middle[-1])  # held still beyond the outer frames
        torch.testing.assert_close(again.visual.temporal_embedding.data, start + slope * times[:, None])
        assert again.config["frames"] == frames
        assert again.load_report.interpolated == {"visual.temporal_embedding": f"12 to {frames} frames, linear"}
        assert again.encode_video(torch.randn(1, frames, 3, 32, 32)).shape == (1, 32)
    one = VidLA.from_pretrained(tmp_path, frames=1)
    torch.testing.assert_close(one.visual.temporal_embedding[0], start + slope / 2)


@pytest.mark.parametrize("image_size", [16, 48, 64])
def test_other_resolution_as_open_clip_does_it(image_size, tmp_path):
    theirs = open_clip_model()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = create_model("small", tmp_path / "weights.pt", image_size=image_size, **CLIP_LIKE)
    resized = copy.deepcopy(SMALL)
    resized["vision_cfg"]["image_size"] = image_size
    theirs = open_clip.CLIP(**resized).eval()
    open_clip.load_checkpoint(theirs, str(tmp_path / "weights.pt"))
    image = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_video(image[:, None]), theirs.encode_image(image), rtol=1e-4, atol=1e-5)
    assert f"4 x 4 to {image_size // 8} x {image_size // 8} patches" in str(ours.load_report)
    ours.save_pretrained(tmp_path / "saved")
    assert VidLA.from_pretrained(tmp_path / "saved", image_size=32).visual.image_size == 32


def test_a_changed_rule_is_remarked(tmp_path):
    VidLA(SMALL, frames=4).save_pretrained(tmp_path)
    report = str(VidLA.from_pretrained(tmp_path, temporal_scale=3, patches_see_cls=True).load_report)
    assert "trained with temporal_scale=2, this model has 3" in report
    assert "trained with patches_see_cls=False, this model has True" in report


# What CLIP does not have


def test_tube_attention_starts_from_the_checkpoint(tmp_path):
    """Not from the random weights the model was built with; and the report tells what is new."""
    theirs = open_clip_model()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = create_model("small", tmp_path / "weights.pt", frames=4, levels=2)
    for block, clip in zip(ours.visual.transformer.resblocks, theirs.visual.transformer.resblocks, strict=True):
        assert torch.equal(block.tube_attn.in_proj_weight, clip.attn.in_proj_weight)
        assert torch.equal(block.tube_attn.in_proj_bias, clip.attn.in_proj_bias)
        assert torch.equal(block.ln_tube.weight, clip.ln_1.weight)
        assert torch.equal(block.ln_tube.bias, clip.ln_1.bias)
        assert not block.tube_attn.out_proj.weight.any()
        assert not block.tube_attn.out_proj.bias.any()
    assert not ours.visual.temporal_embedding.any()
    std = ours.visual.mst_embedding.std().item()
    assert std == pytest.approx(64**-0.5, rel=0.3)  # 512 draws
    report = ours.load_report
    assert set(report.new) | set(report.loaded) == set(ours.state_dict())
    assert len(report.new) == 2 + 6 * 2
    text = str(report)
    assert "visual.mst_embedding: random normal, std d^-0.5" in text
    assert "visual.temporal_embedding" in text
    assert "copied from the same block's spatial attention" in text


# Weights that do not fit


def test_missing_and_unexpected_weights(tmp_path, caplog):
    state = open_clip_model().state_dict()
    del state["visual.proj"]
    state["visual.extra"] = torch.ones(3)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"1 are missing \(visual.proj\); 1 are not the model's \(visual.extra\)"):
        create_model("small", tmp_path / "weights.pt")
    report = create_model("small", tmp_path / "weights.pt", strict=False).load_report
    assert report.missing == ["visual.proj"]
    assert report.unexpected == ["visual.extra"]
    assert "not in the checkpoint, so still random: visual.proj" in caplog.text
    assert "not in the model, so ignored: visual.extra" in caplog.text


def test_a_failed_load_changes_nothing(tmp_path):
    state = open_clip_model().state_dict()
    state["ln_final.weight"] = torch.ones(65)
    torch.save(state, tmp_path / "weights.pt")
    model = VidLA(SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"text.ln_final.weight is \(65,\)"):
        load_checkpoint(model, read_checkpoint(tmp_path / "weights.pt"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_number_of_mst_is_refused_with_the_way_out(tmp_path):
    VidLA(SMALL, levels=2, tokens_per_level=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="levels=2, tokens_per_level=3"):
        create_model("small", tmp_path)
    create_model("small", tmp_path, levels=2, tokens_per_level=3)
    with pytest.raises(ValueError, match="tokens_per_level=3"):
        VidLA.from_pretrained(tmp_path, tokens_per_level=4)


@pytest.mark.parametrize(
    ("saved", "asked"), [({"tube": False}, {}), ({}, {"tube": False}), ({"levels": 0}, {}), ({}, {"levels": 0})]
)
def test_other_parts_are_refused_with_the_way_out(saved, asked, tmp_path):
    VidLA(SMALL, **saved).save_pretrained(tmp_path)
    was = {"tube": True, "levels": 3} | saved
    with pytest.raises(ValueError, match=f"tube={was['tube']}, levels={was['levels']}: create the model so"):
        create_model("small", tmp_path, **asked)
    assert create_model("small", tmp_path, **asked, strict=False).load_report.source == str(tmp_path)


def test_another_activation_is_refused_where_it_cannot_follow(tmp_path):
    VidLA(SMALL | {"quick_gelu": True}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with QuickGELU"):
        load_checkpoint(VidLA(SMALL), read_checkpoint(tmp_path))


def test_what_is_written_is_safetensors_with_the_config(tmp_path):
    model = VidLA(SMALL, frames=2)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert read_checkpoint(tmp_path).config["frames"] == 2
    assert F.mse_loss(read_checkpoint(tmp_path).tensors["visual.proj"], model.visual.proj) == 0
