"""The two-tower model and how to create it: video and text encoders, their shared temperature, saving and loading."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import save_file
from torch import nn

from .text import TextTower
from .video import VideoTower
from .weights import ACTIVATION, CONFIG_KEY, LoadReport, load_checkpoint, read_checkpoint

log = logging.getLogger(__name__)

_CONFIGS = Path(__file__).parent / "model_configs"
_WEIGHTS_FILE = "model.safetensors"  # huggingface_hub's name for it
# CLIP's bound of exp(logit_scale), 100: the largest float32 whose exponential does not exceed it, log(100) rounded down.
_MAX_LOG_SCALE = 4.605169773101807


def get_model_config(name: str) -> dict[str, Any]:
    """A model's config in open_clip's JSON format: embed_dim, quick_gelu, vision_cfg, text_cfg.

    Args:
        name: of a config in vidla/model_configs, open_clip's model name, or the path of a .json file in that format.

    Raises:
        ValueError: nobody knows the name.
    """
    ours = Path(name) if name.endswith(".json") else _CONFIGS / f"{name}.json"
    if ours.is_file():
        return json.loads(ours.read_text())
    import open_clip  # takes seconds, so only where it is needed

    config = open_clip.get_model_config(name.replace("/", "-")) if ":" not in name else None
    if config is None:
        own = ", ".join(sorted(path.stem for path in _CONFIGS.glob("*.json")))
        plain = ", ".join(known for known in open_clip.list_models() if known.startswith("ViT-"))
        raise ValueError(f"no model is named {name!r}; this package has {own}; open_clip has, among others, {plain}")
    return config


class VidLA(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vidla",
    tags=["video-text-retrieval"],
    paper_url="https://arxiv.org/abs/2403.14870",
):
    """Video and text encoders with one embedding space (paper section 4). `create_model` is the way to make one.

    `save_pretrained(folder)` writes model.safetensors and config.json; `VidLA.from_pretrained(folder_or_hub_id)` reads
    them back, with any argument below overridden: `frames=32` interpolates the temporal position embedding.

    Args:
        model_cfg: open_clip's model config (see `get_model_config`).
        frames: T, frames of a video.
        levels: U, levels of the temporal hierarchy; 0 means no MST tokens.
        tokens_per_level: V, MST tokens in a level.
        temporal_scale: r; MST of level u look at every r**u-th frame.
        tube: each block begins with tube attention ("spatially local temporal attention").
        patches_see_cls: the paper's equation for M^PATCH instead of its text.
        backend: of the attentions: "auto", or a name from `vidla_kernels.available_backends`.
        joint: every token attends to every token, instead of hierarchical attention (ablation).
        image_size: pixels of a frame's side, instead of the config's.
        checkpoint_activations: keep only the blocks' inputs for the backward: less memory, a third more work.
        classes: of a linear head on the video embedding; 0 is no head.

    Attributes:
        visual, text: the towers.
        head: (E -> classes), starts at zero; None without classes.
        logit_scale: 0-d parameter, the logarithm of the factor on similarities (one over the paper's tau).
        layout: the video tower's `TokenLayout`.
        context_length: L, tokens of a text.
        config: the arguments, JSON-able: `VidLA(**model.config)` is the same model with new weights.
        load_report: `LoadReport` of the weights it was created from, or None.

    Raises:
        ValueError: the config asks for something other than a plain CLIP with a ViT, or sizes do not fit together.
    """

    def __init__(
        self,
        model_cfg: dict[str, Any],
        *,
        frames: int = 12,
        levels: int = 3,
        tokens_per_level: int = 4,
        temporal_scale: int = 2,
        tube: bool = True,
        patches_see_cls: bool = False,
        backend: str = "auto",
        joint: bool = False,
        image_size: int | None = None,
        checkpoint_activations: bool = False,
        classes: int = 0,
    ) -> None:
        super().__init__()
        known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}  # custom_text: how open_clip nests names
        if bad := set(model_cfg) - known:
            raise ValueError(f"the model config asks for {', '.join(sorted(bad))}, which VidLA does not have: {sorted(known)}")
        model_cfg = copy.deepcopy(model_cfg)
        if image_size is not None:
            model_cfg["vision_cfg"]["image_size"] = image_size
        self.config: dict[str, Any] = dict(
            model_cfg=model_cfg,
            frames=frames,
            levels=levels,
            tokens_per_level=tokens_per_level,
            temporal_scale=temporal_scale,
            tube=tube,
            patches_see_cls=patches_see_cls,
            backend=backend,
            joint=joint,
            checkpoint_activations=checkpoint_activations,
            classes=classes,
        )
        # What save_pretrained writes as config.json: not how a machine computes, which the next one may do otherwise.
        self._hub_mixin_config = {k: v for k, v in self.config.items() if k not in ("backend", "checkpoint_activations")}
        self.load_report: LoadReport | None = None

        embed_dim, quick_gelu = model_cfg["embed_dim"], model_cfg.get("quick_gelu", False)
        self.visual = VideoTower(
            model_cfg["vision_cfg"],
            embed_dim,
            quick_gelu,
            frames=frames,
            levels=levels,
            tokens_per_level=tokens_per_level,
            temporal_scale=temporal_scale,
            patches_see_cls=patches_see_cls,
            tube=tube,
            joint=joint,
            backend=backend,
            checkpoint_activations=checkpoint_activations,
        )
        self.text = TextTower(model_cfg["text_cfg"], embed_dim, quick_gelu, checkpoint_activations=checkpoint_activations)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.head = nn.Linear(embed_dim, classes) if classes else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.layout = self.visual.layout
        self.context_length = self.text.context_length

    def encode_video(self, video: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Video (B, T, 3, h, w), floating point and normalised with CLIP's mean and std -> (B, E); see `VideoTower`."""
        features = self.visual(video)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Tokens (B, L) from the tokenizer -> (B, E); see `TextTower`."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def classify(self, video: torch.Tensor) -> torch.Tensor:
        """Video (B, T, 3, h, w) -> logits (B, classes). Raises: ValueError where the model has no head."""
        if self.head is None:
            raise ValueError("this model has no head: create it with classes=N")
        features = self.encode_video(video)
        with torch.autocast(features.device.type, enabled=False):  # as the loss compares features: bf16 would make ties
            return self.head(features.to(self.head.weight.dtype))

    def forward(self, video: torch.Tensor, *texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of a batch for the loss: the video's, then each text's, (B, E) and not normalised.

        One call for all of them, because DDP and FSDP prepare gradients in a module's own forward. The texts (caption
        and subtitle) go through the tower as one batch, so they must be of one length. A model with a head and no text
        to encode gives the logits (B, classes) of `classify` instead.
        """
        if self.head is not None and not texts:
            return (self.classify(video),)
        encoded = self.encode_text(torch.cat(texts)).split([len(tokens) for tokens in texts]) if texts else ()
        return self.encode_video(video), *encoded

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the factor on similarities in 1 to 100, as CLIP does after every step (docs/decisions.md, 8)."""
        self.logit_scale.clamp_(0, _MAX_LOG_SCALE)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Hook of save_pretrained. The config is in the file's header too, so that the weights alone still tell it."""
        tensors = {key: tensor.contiguous() for key, tensor in self.state_dict().items()}
        metadata = {"format": "pt", CONFIG_KEY: json.dumps(self._hub_mixin_config)}
        save_file(tensors, save_directory / _WEIGHTS_FILE, metadata=metadata)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> VidLA:
        """Hook of from_pretrained: unlike the mixin's own it is strict, and interpolates position embeddings."""
        if Path(model_id).is_dir():
            path = str(Path(model_id) / _WEIGHTS_FILE)
        else:
            path = hf_hub_download(
                repo_id=model_id,
                filename=_WEIGHTS_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        model = cls(**model_kwargs)
        model.load_report = load_checkpoint(model, read_checkpoint(path), strict=strict)
        return model.to(map_location).eval()


def create_model(
    name: str,
    pretrained: str | Path | None = None,
    frames: int = 12,
    levels: int = 3,
    tokens_per_level: int = 4,
    temporal_scale: int = 2,
    tube: bool = True,
    patches_see_cls: bool = False,
    backend: str = "auto",
    *,
    joint: bool = False,
    image_size: int | None = None,
    checkpoint_activations: bool = False,
    classes: int = 0,
    strict: bool = True,
) -> VidLA:
    """Create a model, with random weights or a checkpoint's, on the CPU in float32.

    Args:
        name: open_clip's model name, such as "ViT-B-32-quickgelu", or of a config in vidla/model_configs ("vidla-tiny").
        pretrained: None, an open_clip tag ("openai", "laion2b_s34b_b79k"; it downloads), or a path: OpenAI's TorchScript
            archive, open_clip's weights, or VidLA's own file or folder. Where the checkpoint says which activation it was
            trained with, that wins over the name's (docs/decisions.md, 6). Position embeddings are interpolated to
            `image_size` and `frames`.
        frames, levels, tokens_per_level, temporal_scale, tube, patches_see_cls, backend, joint, image_size,
        checkpoint_activations, classes: as in `VidLA`.
        strict: a checkpoint that lacks a weight of the model, or has one too many, is an error. Otherwise it is a line in
            the report, and the model keeps its random weight.

    Returns:
        The model, in training mode. What came from the checkpoint and what did not is logged and kept as `load_report`.

    Raises:
        ValueError: an unknown name, tag or path, a config that is no plain CLIP's, or weights that do not fit.
    """
    model_cfg = get_model_config(name)
    checkpoint = read_checkpoint(pretrained, name) if pretrained is not None else None
    if checkpoint is not None and checkpoint.quick_gelu is not None:
        has = model_cfg.get("quick_gelu", False)
        if checkpoint.quick_gelu != has:
            checkpoint.notes.append(
                f"{checkpoint.source} was trained with {ACTIVATION[checkpoint.quick_gelu]}, so the model has it, "
                f"although the config {name!r} says {ACTIVATION[has]}"
            )
        model_cfg["quick_gelu"] = checkpoint.quick_gelu
    model = VidLA(
        model_cfg,
        frames=frames,
        levels=levels,
        tokens_per_level=tokens_per_level,
        temporal_scale=temporal_scale,
        tube=tube,
        patches_see_cls=patches_see_cls,
        backend=backend,
        joint=joint,
        image_size=image_size,
        checkpoint_activations=checkpoint_activations,
        classes=classes,
    )
    if checkpoint is not None:
        model.load_report = load_checkpoint(model, checkpoint, strict=strict)
        log.info("%s", model.load_report)
    return model
