"""The two towers: CLIP's identity, the start of training, the last block, ablations, refusals."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F

from vidla import VidLA, create_model, get_tokenizer
from vidla.model import get_model_config
from vidla.weights import Checkpoint, load_checkpoint
from vidla_kernels import TokenLayout
from vidla_kernels.backends import missing

TINY = get_model_config("vidla-tiny")
CLIP_LIKE = dict(frames=1, levels=0, tube=False, patches_see_cls=True)  # the setting in which the encoder is CLIP's ViT


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def tiny(**options) -> VidLA:
    """A small model whose every weight, biases and embeddings included, is away from its tidy initial value."""
    model_cfg = copy.deepcopy(TINY)
    model_cfg["vision_cfg"].update(image_size=32, layers=3)
    model_cfg["text_cfg"].update(vocab_size=500, layers=2)
    model = VidLA(model_cfg, **{"frames": 4, "levels": 2, "tokens_per_level": 2} | options)
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter) + 0.02 * torch.randn_like(parameter))


def video_for(model: VidLA, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    size = model.visual.image_size
    return torch.randn(batch, model.layout.frames, 3, size, size, dtype=dtype)


def gradients(model: torch.nn.Module, features: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Gradients of a fixed random projection of the features, for each parameter that has one."""
    model.zero_grad()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed), dtype=features.dtype).to(features)
    (features * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Identity with CLIP


@pytest.mark.parametrize(
    "name", ["vidla-tiny", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14", "ViT-B-16-plus-240"]
)
def test_is_open_clips_model(name, seed):
    """One frame, no MST, no tubes, patches that see CLS: exactly CLIP. Sizes are the model's, layers and vocabulary fewer."""
    model_cfg = get_model_config(name)
    model_cfg["vision_cfg"]["layers"] = model_cfg["text_cfg"]["layers"] = 2
    model_cfg["text_cfg"]["vocab_size"] = 1000
    model_cfg["vision_cfg"]["image_size"] = 4 * model_cfg["vision_cfg"]["patch_size"]
    theirs = open_clip.CLIP(**copy.deepcopy(model_cfg)).eval()
    shake(theirs)
    ours = VidLA(model_cfg, **CLIP_LIKE)
    tensors = {
        key if key.startswith(("visual.", "logit")) else f"text.{key}": value for key, value in theirs.state_dict().items()
    }
    report = load_checkpoint(ours, Checkpoint("open_clip", "CLIP", tensors))
    assert set(report.new) == {"visual.temporal_embedding"}

    size = model_cfg["vision_cfg"]["image_size"]
    image, tokens = torch.randn(2, 3, size, size), torch.randint(1, 1000, (2, ours.context_length))
    with torch.no_grad():
        assert relative_error(ours.encode_video(image[:, None]), theirs.encode_image(image)) < 1e-5
        assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-5
        assert (
            relative_error(ours.encode_video(image[:, None], normalize=True), theirs.encode_image(image, normalize=True)) < 1e-5
        )
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_full_model_by_name(seed, tmp_path):
    """The same at full size, by name and path: ViT-S-32-alt, the smallest ViT open_clip has."""
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    ours = create_model("ViT-S-32-alt", tmp_path / "weights.pt", **CLIP_LIKE)
    image, tokens = torch.randn(2, 3, 224, 224), get_tokenizer("ViT-S-32-alt")(["a dog runs", "two people cook"])
    with torch.no_grad():
        assert relative_error(ours.encode_video(image[:, None]), theirs.encode_image(image)) < 1e-5
        assert relative_error(ours.encode_text(tokens), theirs.encode_text(tokens)) < 1e-5


def test_training_starts_from_clip_on_each_frame(seed):
    """Fresh tube attention and temporal embeddings, no MST: patches are what CLIP makes of their frame alone."""
    one, many = VidLA(TINY, frames=1, levels=0), VidLA(TINY, frames=5, levels=0)
    shared = {key: value for key, value in one.state_dict().items() if key != "visual.temporal_embedding"}
    assert many.load_state_dict(shared, strict=False).missing_keys == ["visual.temporal_embedding"]
    video = video_for(many, batch=1)

    def patches(model, video):
        x = model.visual.embed(video)
        for block in model.visual.transformer.resblocks[:-1]:
            x = block(x)
        return x[:, model.layout.num_summary :]

    with torch.no_grad():
        frames = patches(one, video.transpose(0, 1))  # the five frames as five videos
        torch.testing.assert_close(patches(many, video).unflatten(1, (5, -1))[0], frames)


# The start of tube attention


def test_tube_attention_starts_as_nothing(seed):
    """The same bits as without it, and yet it learns: out_proj at the first step, q, k, v and the norm from the second."""
    model = VidLA(TINY, frames=4)
    without = VidLA(TINY, frames=4, tube=False)
    without.load_state_dict({key: v for key, v in model.state_dict().items() if "tube" not in key})
    video = video_for(model)
    features = model.encode_video(video)
    assert torch.equal(features, without.encode_video(video))

    tube = [name for name, _ in model.named_parameters() if "tube" in name]
    assert len(tube) == 6 * 4  # in_proj, out_proj and norm, weight and bias, in each of four blocks
    first = gradients(model, features, seed)
    for name in tube:
        assert bool(first[name].any()) == (".out_proj." in name), name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in first:
                parameter -= 1e-3 * first[name]
    second = gradients(model, model.encode_video(video), seed)
    assert all(second[name].any() for name in tube)


def test_tube_attention_starts_from_the_spatial_one(seed):
    for block in tiny().visual.transformer.resblocks:
        block.start_tube_from_spatial()
        assert torch.equal(block.tube_attn.in_proj_weight, block.attn.in_proj_weight)
        assert torch.equal(block.tube_attn.in_proj_bias, block.attn.in_proj_bias)
        assert torch.equal(block.ln_tube.weight, block.ln_1.weight)
        assert torch.equal(block.ln_tube.bias, block.ln_1.bias)
        assert not block.tube_attn.out_proj.weight.any()
        assert not block.tube_attn.out_proj.bias.any()


# The last block and recomputation


@pytest.mark.parametrize("options", [{}, {"patches_see_cls": True}, {"joint": True}, {"levels": 0}, {"tube": False}], ids=str)
def test_last_block_needs_only_cls(options, seed):
    """Skipping queries, output projection and MLP of all other rows changes neither features nor gradients."""
    model = tiny(**options).double()
    video = video_for(model, dtype=torch.float64).requires_grad_()
    last = model.visual.transformer.resblocks[-1]
    assert [block.cls_only for block in model.visual.transformer.resblocks] == [False, False, True]

    skipped = model.encode_video(video)
    skipped_gradients = gradients(model, skipped, seed) | {"video": video.grad}
    video.grad = None
    last.cls_only = False
    full = model.encode_video(video)
    full_gradients = gradients(model, full, seed) | {"video": video.grad}

    torch.testing.assert_close(skipped, full)
    assert skipped_gradients.keys() == full_gradients.keys()
    for name, expected in full_gradients.items():
        torch.testing.assert_close(skipped_gradients[name], expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("patches_see_cls", [False, True])
@pytest.mark.parametrize("levels", [0, 3])
def test_cls_sees_everything(patches_see_cls, levels):
    """The last block gives CLS no mask, so the rule must not have one."""
    layout = TokenLayout(5, 6, levels=levels, patches_see_cls=patches_see_cls)
    assert layout.visible(torch.zeros(1, dtype=torch.long), torch.arange(layout.seq_len)).all()


def test_checkpointing_changes_only_memory(seed):
    plain = tiny()
    frugal = tiny(checkpoint_activations=True)
    frugal.load_state_dict(plain.state_dict())
    video, tokens = video_for(plain), torch.randint(1, 500, (2, 32))
    calls = []
    frugal.visual.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("video"))
    frugal.text.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("text"))

    grads = [gradients(m, m.encode_video(video) + m.encode_text(tokens), seed) for m in (plain, frugal)]
    assert sorted(calls) == ["text", "text", "video", "video"]  # once forward, once again for the backward
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-6, atol=1e-6)


# Ablations and options


def test_switches_add_and_remove_parameters(seed):
    everything = set(tiny().state_dict())
    assert everything - set(tiny(tube=False).state_dict()) == {key for key in everything if "tube" in key}
    assert everything - set(tiny(levels=0).state_dict()) == {"visual.mst_embedding"}
    assert set(tiny(joint=True, temporal_scale=3, patches_see_cls=True).state_dict()) == everything


@pytest.mark.parametrize(
    "options", [{"tube": False}, {"levels": 0}, {"joint": True}, {"patches_see_cls": True}, {"temporal_scale": 1}], ids=str
)
def test_switches_change_the_result(options, seed):
    model, other = tiny(), tiny(**options)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k in other.state_dict()})
    video = video_for(model)
    with torch.no_grad():
        assert relative_error(other.encode_video(video), model.encode_video(video)) > 1e-4


def test_joint_attention_is_attention_without_mask(seed):
    model = tiny(joint=True, tube=False)
    block = model.visual.transformer.resblocks[0]
    x = torch.randn(2, model.layout.seq_len, block.ln_1.normalized_shape[0])
    q, k, v = block.attn.qkv(block.ln_1(x)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    y = x + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), y + block.mlp(block.ln_2(y)))


def test_blocks_follow_the_paper(seed):
    """Equations 1 and 2 written out with the layout's dense masks, for one block."""
    model = tiny(backend="portable").double()
    block, layout = model.visual.transformer.resblocks[0], model.layout
    x = torch.randn(2, layout.seq_len, block.ln_1.normalized_shape[0], dtype=torch.float64)

    def masked(attn, tokens, mask):
        q, k, v = attn.qkv(tokens).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    summary, patches = x[:, : layout.num_summary], x[:, layout.num_summary :]
    z = torch.cat([summary, masked(block.tube_attn, block.ln_tube(patches), layout.tube_mask()) + patches], 1)
    z = masked(block.attn, block.ln_1(z), layout.mask()) + z
    torch.testing.assert_close(block(x), block.mlp(block.ln_2(z)) + z)


def test_tokens_are_in_the_layouts_order(seed):
    """Row by row: which embedding, which position, which patch of which frame."""
    model = tiny()
    visual, layout = model.visual, model.layout
    video = video_for(model)
    rows = visual.embed(video)
    assert rows.shape == (2, layout.seq_len, model.visual.class_embedding.numel())
    expected = [visual.class_embedding + visual.positional_embedding[0]]
    expected += list(visual.mst_embedding.flatten(0, 1))
    size = model.visual.conv1.kernel_size[0]
    for t in range(layout.frames):
        for n in range(layout.patches):
            row, column = divmod(n, visual.grid_size)
            pixels = video[1, t, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            patch = (visual.conv1.weight * pixels).sum((1, 2, 3))
            expected.append(patch + visual.positional_embedding[1 + n] + visual.temporal_embedding[t])
    torch.testing.assert_close(rows[1], visual.ln_pre(torch.stack(expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "portable", "triton"])
def test_backends_agree(backend, device, seed):
    """Features and gradients of the whole tower with each backend against the dense reference."""
    if backend != "auto" and (reason := missing(backend, device)):
        pytest.skip(reason)
    options = dict(frames=3, levels=2, tokens_per_level=1)
    model, oracle = tiny(backend=backend, **options).to(device), tiny(backend="reference", **options).to(device)
    oracle.load_state_dict(model.state_dict())
    video = video_for(model).to(device)
    features, expected = model.encode_video(video), oracle.encode_video(video)
    assert relative_error(features, expected) < 1e-5
    grads, expected_grads = gradients(model, features, seed), gradients(oracle, expected, seed)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert relative_error(grads[name], grad) < 1e-4, name


def test_strided_video_is_the_same_video(seed):
    model = tiny()
    video = video_for(model)
    strided = video.permute(0, 2, 1, 4, 3).contiguous().permute(0, 2, 1, 4, 3)
    assert not strided.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(strided), model.encode_video(video))


def test_dtypes(seed):
    """bf16 weights take fp32 video; autocast computes in bf16 on fp32 weights; both come close to fp32."""
    model = tiny()
    video, tokens = video_for(model), torch.randint(1, 500, (2, 32))
    with torch.no_grad():
        exact = model(video, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(video, tokens)
            assert model.visual.embed(video).dtype == torch.bfloat16  # what the blocks add to: half the traffic of fp32
        half = copy.deepcopy(model).bfloat16()(video, tokens)
    for features in (cast, half):
        for ours, expected in zip(features, exact, strict=True):
            assert ours.dtype == torch.bfloat16
            assert relative_error(ours.float(), expected) < 0.05


def test_forward_gives_what_the_loss_needs(seed):
    model = tiny()
    video, caption, subtitle = video_for(model), torch.randint(1, 500, (2, 32)), torch.randint(1, 500, (2, 32))
    with torch.no_grad():
        features = model(video, caption, subtitle)
        for ours, expected in zip(
            features, (model.encode_video(video), model.encode_text(caption), model.encode_text(subtitle)), strict=True
        ):
            torch.testing.assert_close(ours, expected)
        assert len(model(video)) == 1


def test_temperature(seed):
    model = tiny()
    assert VidLA(TINY).logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for scale, expected in [(20.0, 20.0), (300.0, 100.0)]:
        model.logit_scale.data.fill_(torch.tensor(scale).log())
        model.clamp_temperature()
        assert model.logit_scale.exp().item() == pytest.approx(expected, rel=1e-6)
        assert model.logit_scale.exp() <= 100


def test_cuda_kernels_for_hierarchical_attention_leave_tube_attention_to_auto():
    for plan, tube in (("triton/cuda", "auto"), ("cuda:1", "auto"), ("triton", "triton")):
        block = tiny(backend=plan).visual.transformer.resblocks[0]
        assert (block.backend, block.tube_backend) == (plan, tube)


@pytest.mark.parametrize(("compiler", "backend"), [("eager", "auto"), ("aot_eager", "auto"), ("aot_eager", "triton")])
def test_compiles_into_one_graph(compiler, backend, seed):
    model = tiny(backend=backend)
    video = video_for(model)
    compiled = torch.compile(model.visual, fullgraph=True, backend=compiler)
    features = compiled(video)  # before anything has run eagerly
    expected = model.encode_video(video)
    torch.testing.assert_close(features, expected)
    eager_gradients, compiled_gradients = gradients(model, expected, seed), gradients(model, features, seed)
    for name, grad in eager_gradients.items():
        torch.testing.assert_close(compiled_gradients[name], grad, rtol=1e-4, atol=1e-4)


def test_rebuilds_from_its_config(seed):
    model = tiny(joint=True, temporal_scale=3)
    again = VidLA(**model.config)
    again.load_state_dict(model.state_dict())
    video = video_for(model)
    with torch.no_grad():
        assert torch.equal(again.encode_video(video), model.encode_video(video))
    assert again.config == model.config


# Text


def test_text_is_causal_and_read_at_its_end(seed):
    """What follows the end token, the largest id, changes nothing; what precedes it does."""
    model = tiny()
    tokens = torch.randint(1, 400, (1, 32))
    tokens[0, 9] = 499
    after, before = tokens.clone(), tokens.clone()
    after[0, 10:] = 0
    before[0, 3] = 450
    with torch.no_grad():
        features = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(after), features)
        torch.testing.assert_close(model.encode_text(tokens[:, :12].int()), features)  # shorter than the context, int32
        assert relative_error(model.encode_text(before), features) > 1e-3
        assert torch.equal(model.encode_text(tokens, normalize=True), F.normalize(features, dim=-1))


def test_tokenizer(tmp_path):
    tokenizer = get_tokenizer("vidla-tiny")
    theirs = open_clip.get_tokenizer("ViT-B-32")
    tokens = tokenizer(["A red square moves left.", "word " * 100])
    assert tokens.shape == (2, 32)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[0], theirs("A red square moves left.")[0, :32])
    assert tokens[1].argmax() == 31  # cut, and the end token kept
    assert get_tokenizer("ViT-B-32-quickgelu")("one").shape == (1, 77)
    VidLA(TINY).save_pretrained(tmp_path)
    assert torch.equal(get_tokenizer(str(tmp_path))("one"), tokenizer("one"))


# Refusals


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RN50", "ResNet"),
        ("convnext_base", "timm_model_name"),
        ("coca_ViT-B-32", "multimodal_cfg"),
        ("ViT-B-16-SigLIP", "init_logit_bias"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("ViT-L-14-CLIPA", "vision tower"),
        ("EVA02-B-16", "timm_model_name"),
        ("ViT-Z-99", "ViT-B-32"),
        ("hf-hub:some/model", "no model is named"),
    ],
)
def test_refuses_what_is_no_plain_clip(name, words):
    with pytest.raises(ValueError, match=words):
        create_model(name)


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("vision_cfg", "patch_dropout", 0.5),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "ls_init_value", 1e-5),
        ("vision_cfg", "widht", 64),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),
    ],
)
def test_refuses_unknown_parts(tower, key, value):
    model_cfg = copy.deepcopy(TINY)
    model_cfg[tower][key] = value
    with pytest.raises(ValueError, match=key):
        VidLA(model_cfg)


def test_accepts_parts_that_ask_for_nothing():
    model_cfg = copy.deepcopy(TINY)
    model_cfg["vision_cfg"].update(patch_dropout=0.0, pool_type="tok", attentional_pool=False)
    model_cfg["text_cfg"].update(pool_type="argmax", no_causal_mask=False)
    VidLA(model_cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda video: video[:, :3], "4 frames"),
        (lambda video: video[..., :16], "32 x 32"),
        (lambda video: video[0], r"\(B, 4, 3, 32, 32\)"),
        (lambda video: video.transpose(1, 2), r"\(B, 4, 3, 32, 32\)"),
        (lambda video: video.to(torch.uint8), "floating point"),
    ],
)
def test_refuses_other_videos(change, words):
    model = tiny()
    with pytest.raises(ValueError, match=words):
        model.encode_video(change(video_for(model)))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.ones(2, 40, dtype=torch.long), "1 to 32"),
        (torch.ones(32, dtype=torch.long), "1 to 32"),
        (torch.ones(2, 32), "int64"),
    ],
)
def test_refuses_other_tokens(tokens, words):
    with pytest.raises(ValueError, match=words):
        tiny().encode_text(tokens)


@pytest.mark.parametrize("size", [30, 8, 0, 32.0])
def test_refuses_odd_image_sizes(size):
    with pytest.raises(ValueError, match="multiple of the patch size"):
        create_model("vidla-tiny", image_size=size)
