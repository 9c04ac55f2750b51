"""Weights from elsewhere: which file, which activation it was trained with, how its keys map to ours, what is resized.

| source | who says which activation |
|---|---|
| open_clip tag ("openai", "laion2b_s34b_b79k"), downloaded by open_clip | open_clip's list of tags |
| OpenAI's TorchScript archive (ViT-B-32.pt) | nobody, it is always QuickGELU |
| state dict or safetensors of open_clip, also {"state_dict": {"module....": ...}} | open_clip_config.json beside it, if any |
| folder of VidLA's `save_pretrained`, or its model.safetensors | the file's header, which holds the whole config |
| state dict of VidLA | nobody |

Where nobody says it, the model's name decides, and the report tells.

Nothing here unpickles: safetensors, `torch.load(weights_only=True)`, or TorchScript. Our names are CLIP's; only the text
tower's keys, which CLIP leaves at the top level, get the prefix `text.` (open_clip's `custom_text` models have it already).
"""

from __future__ import annotations

import json
import logging
import math
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

if TYPE_CHECKING:
    from .model import VidLA

log = logging.getLogger(__name__)

CONFIG_KEY = "vidla_config"  # in the header of a VidLA safetensors file: the model's config as JSON

HEAD = "head."
SPATIAL, TEMPORAL, MST = "visual.positional_embedding", "visual.temporal_embedding", "visual.mst_embedding"
ACTIVATION = {True: "QuickGELU", False: "GELU"}  # by the config's quick_gelu
_TEXT_KEYS = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # buffers of OpenAI's archives


@dataclass
class Checkpoint:
    """Weights as read, under VidLA's names.

    Attributes:
        source: what the user asked for, for messages.
        kind: "OpenAI", "CLIP" or "VidLA".
        tensors: name -> tensor, in the checkpoint's own dtypes and shapes.
        quick_gelu: the activation they were trained with; None where the file does not say, and the config decides.
        config: a VidLA checkpoint's config; None for others and for bare state dicts.
        notes: remarks for the report.
    """

    source: str
    kind: str
    tensors: dict[str, torch.Tensor]
    quick_gelu: bool | None = None
    config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class LoadReport:
    """What became of a checkpoint and of a model's weights; `str()` gives it in words.

    Attributes:
        source, kind: the checkpoint's.
        loaded: parameters copied, interpolated ones included.
        elements: numbers in them.
        interpolated: parameter -> from and to.
        new: parameter -> how it was initialised, where the checkpoint cannot have it (CLIP knows no tubes).
        missing, unexpected: parameters only in the model, only in the checkpoint; empty unless strict=False.
        notes: what else the user should know.
    """

    source: str
    kind: str
    loaded: list[str] = field(default_factory=list)
    elements: int = 0
    interpolated: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} weights ({self.elements / 1e6:.1f} M numbers) from {self.source} ({self.kind})"]
        lines += [f"  interpolated: {key}, {how}" for key, how in self.interpolated.items()]
        by_way: dict[str, list[str]] = {}
        for key, how in self.new.items():
            by_way.setdefault(how, []).append(key)
        lines += [f"  new: {_some(keys)}: {how}" for how, keys in by_way.items()]
        if self.missing:
            lines.append(f"  not in the checkpoint, so still random: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"  not in the model, so ignored: {_some(self.unexpected)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _some(keys: list[str]) -> str:
    """The first few of a list of keys, and how many more there are."""
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def read_checkpoint(pretrained: str | Path, name: str | None = None) -> Checkpoint:
    """Read weights, without a model.

    Args:
        pretrained: a path (see the module's table), or, with `name`, an open_clip tag of that model.
        name: open_clip's model name.

    Raises:
        ValueError: no such tag or path, or a file that cannot be read as weights.
    """
    path, pretrained = Path(pretrained), str(pretrained)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{pretrained} is a folder without model.safetensors, which save_pretrained writes; name a file")
    if path.is_file():
        return _read_file(path, pretrained)

    from open_clip import pretrained as zoo  # takes seconds, so only where a tag is asked for

    tag = zoo.get_pretrained_cfg(name.replace("/", "-"), pretrained) if name else {}
    if not tag:
        tags = zoo.list_pretrained_tags_by_model(name.replace("/", "-")) if name else []
        has = f"open_clip's tags for it are {', '.join(tags)}" if tags else "open_clip has no tags for it"
        raise ValueError(f"pretrained={pretrained!r} is neither a path that exists nor a tag of model {name!r}; {has}")
    checkpoint = _read_file(Path(zoo.download_pretrained(tag)), f"{name} {pretrained}")
    checkpoint.quick_gelu = tag.get("quick_gelu", False)
    return checkpoint


def _read_file(path: Path, source: str) -> Checkpoint:
    config = None
    jit = False
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {}).get(CONFIG_KEY, "null"))
                raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        elif jit := _is_torchscript(path):
            with warnings.catch_warnings():  # torch.jit is deprecated, and still the only way into these files
                warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)
                raw = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise whatever a broken file leads them to
        raise ValueError(
            f"{source} cannot be read as weights ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "it must be safetensors, a torch.save of tensors alone (nothing is unpickled), or OpenAI's TorchScript archive"
        ) from error
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        raw = raw["state_dict"]
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(value, torch.Tensor) for value in raw.values()):
        raise ValueError(f"{source} holds no state dict: it must map names to tensors, or hold such a map as 'state_dict'")
    tensors = _rename(raw)
    if jit:
        return Checkpoint(source, "OpenAI", tensors, quick_gelu=True)
    kind = "VidLA" if config or TEMPORAL in tensors else "CLIP"
    beside = path.with_name("open_clip_config.json")  # open_clip's folders on the hub have one
    says = config or (json.loads(beside.read_text()) if beside.is_file() else None)
    quick_gelu = says["model_cfg"].get("quick_gelu", False) if says else None
    return Checkpoint(source, kind, tensors, quick_gelu, config)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:  # torch.save writes zip files too, but without code
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


def _rename(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's names, with or without DDP's prefix "module.", -> ours."""
    if all(key.startswith("module.") for key in raw):
        raw = {key.removeprefix("module."): value for key, value in raw.items()}
    return {f"text.{key}" if key.startswith(_TEXT_KEYS) else key: value for key, value in raw.items() if key not in _NO_WEIGHTS}


def load_checkpoint(model: VidLA, checkpoint: Checkpoint, strict: bool = True) -> LoadReport:
    """Copy a checkpoint into a model, position embeddings interpolated to its image size and number of frames.

    Weights of a kind that CLIP does not have start as the paper says: temporal embedding zero, MST random, tube
    attention a copy of the spatial one with an output projection of zero (docs/decisions.md, 4 and 7).

    Args:
        model: the model, changed in place. Nothing is changed when this raises.
        checkpoint: from `read_checkpoint`.
        strict: missing or unexpected weights are an error, else lines of the report.

    Raises:
        ValueError: a weight that is missing, unexpected (with strict) or of another shape; or another activation.
    """
    report = LoadReport(checkpoint.source, checkpoint.kind, notes=list(checkpoint.notes))
    has = model.config["model_cfg"].get("quick_gelu", False)
    if checkpoint.quick_gelu is None:
        report.notes.append(f"the file does not say its activation; the model's name does: {ACTIVATION[has]}")
    elif checkpoint.quick_gelu != has:
        raise ValueError(
            f"{checkpoint.source} was trained with {ACTIVATION[checkpoint.quick_gelu]}; build the model with "
            f"quick_gelu={checkpoint.quick_gelu} in its config, as create_model does by itself"
        )
    for key in ("temporal_scale", "patches_see_cls", "tube", "joint"):
        if checkpoint.config and checkpoint.config[key] != model.config[key]:
            report.notes.append(f"trained with {key}={checkpoint.config[key]}, this model has {model.config[key]}")

    own = model.state_dict()  # shares the parameters' storage
    tensors = dict(checkpoint.tensors)
    if "logit_scale" in tensors:  # some of open_clip's have shape (1,)
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    _fit_spatial(tensors, model, report)
    _fit_temporal(tensors, model, report)

    missing = [key for key in own if key not in tensors]
    for key in list(missing):
        if how := _how_new(key, checkpoint.kind):
            report.new[key] = how
            missing.remove(key)
    unexpected = [key for key in tensors if key not in own]
    _check_shapes(tensors, own, checkpoint)
    if strict and (missing or unexpected):
        raise ValueError(_mismatch(checkpoint, missing, unexpected))
    report.missing, report.unexpected = missing, unexpected

    with torch.no_grad():
        for key, parameter in own.items():
            if key in tensors:
                parameter.copy_(tensors[key])
                report.loaded.append(key)
                report.elements += parameter.numel()
        if not any(".tube_attn." in key for key in tensors):
            model.visual.start_tube_from_spatial()
    if missing or unexpected:
        log.warning("%s", report)
    return report


def _how_new(key: str, kind: str) -> str | None:
    """How a weight starts that the checkpoint cannot have: VidLA's own in CLIP's, a classifier's head in both. None: it
    should have been there."""
    if key.startswith(HEAD):
        return "zeros"
    if kind == "VidLA":
        return None
    if key == TEMPORAL:
        return "zeros"
    if key == MST:
        return "random normal, std d^-0.5"
    if ".tube_attn.out_proj." in key:
        return "zeros"
    if ".tube_attn." in key or ".ln_tube." in key:
        return "copied from the same block's spatial attention"
    return None


def _fit_spatial(tensors: dict[str, torch.Tensor], model: VidLA, report: LoadReport) -> None:
    """Interpolate the patches' position embedding to the model's grid as open_clip does: bicubic, antialiased."""
    old = tensors.get(SPATIAL)
    if old is None or old.ndim != 2 or len(old) == 1 + model.layout.patches:
        return
    grid, side = math.isqrt(len(old) - 1), model.visual.grid_size
    if grid * grid != len(old) - 1:
        raise ValueError(f"{report.source}: {SPATIAL} has {len(old) - 1} patches, no square grid, so it is not resized")
    image = old[1:].float().T.unflatten(-1, (grid, grid))[None]  # (1, d, grid, grid)
    image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    tensors[SPATIAL] = torch.cat([old[:1].float(), image[0].flatten(1).T])
    report.interpolated[SPATIAL] = f"{grid} x {grid} to {side} x {side} patches, bicubic"


def _fit_temporal(tensors: dict[str, torch.Tensor], model: VidLA, report: LoadReport) -> None:
    """Interpolate the frames' position embedding to the model's T, linear in time.

    Frame t of T stands for the middle of segment t of the clip, at (t + 1/2) / T (docs/decisions.md, 9). Frames before the
    first and after the last known middle take that one's embedding.
    """
    old, frames = tensors.get(TEMPORAL), model.layout.frames
    if old is None or old.ndim != 2 or len(old) == frames:
        return
    new = F.interpolate(old.float().T[None], size=frames, mode="linear", align_corners=False)  # (1, d, T)
    tensors[TEMPORAL] = new[0].T
    report.interpolated[TEMPORAL] = f"{len(old)} to {frames} frames, linear"


def _check_shapes(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    bad = [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
    if not bad:
        return
    key = bad[0]
    shapes = f"{key} is {tuple(tensors[key].shape)} in {checkpoint.source} and {tuple(own[key].shape)} in the model"
    if bad == [MST]:
        levels, tokens = tensors[MST].shape[:2]
        raise ValueError(
            f"{shapes}: MST tokens have a meaning by level and are not resized. "
            f"Create the model with levels={levels}, tokens_per_level={tokens}"
        )
    if key.startswith(HEAD):
        raise ValueError(f"{shapes}: the head is for other classes. Create the model with classes={len(tensors[key])}")
    raise ValueError(f"{shapes} ({len(bad)} such weights): create the model by the name these weights belong to")


def _mismatch(checkpoint: Checkpoint, missing: list[str], unexpected: list[str]) -> str:
    parts = [f"the weights of {checkpoint.source} do not fit the model"]
    if missing:
        parts.append(f"{len(missing)} are missing ({_some(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are not the model's ({_some(unexpected)})")
    config = checkpoint.config
    if config and any(part in key for key in missing + unexpected for part in (".tube_attn.", MST)):
        advice = f"it was trained with tube={config['tube']}, levels={config['levels']}: create the model so"
    elif any(key.startswith(HEAD) for key in unexpected):
        advice = f"it has a head: create the model with classes={config['classes'] if config else 'N'}"
    else:
        advice = "create the model by the name these weights belong to"
    return "; ".join(parts) + f". {advice[0].upper()}{advice[1:]}, or load what fits with strict=False"
