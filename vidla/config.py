"""What a training run is told: dataclasses, filled by defaults < recipe (TOML) < command line.

Each dataclass has two halves. Fields marked PERFORMANCE change how fast or how talkative a run is, and its
numbers by rounding at most: they may change on resume. Every other field is part of the run's identity, and
`differences` names the ones that changed. This module imports neither torch nor the model, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import difflib
import io
import math
import os
import re
import sys
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PERFORMANCE: dict[str, bool] = {"performance": True}
COMMAND_LINE_ONLY = ("recipe", "output", "resume")


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what is legal. Exit code 2."""


@dc.dataclass(frozen=True)
class Model:
    """The network. Defaults are the paper's: 12 frames, hierarchy U-V-r = 3-4-2."""

    name: str = "vidla-tiny"
    """A model name of open_clip (ViT-B-32-quickgelu) or of vidla/model_configs (vidla-tiny), or the path of a .json."""
    pretrained: str = ""
    """Starting weights: an open_clip tag, a path, or the output of a run (its newest checkpoint). Empty: random."""
    frames: int = 12
    """T, frames sampled from a clip."""
    levels: int = 3
    """U, hierarchy levels; 0 is no [MST] token."""
    tokens_per_level: int = 4
    """V, [MST] tokens in a level."""
    temporal_scale: int = 2
    """r: level u sees every r^u-th frame."""
    tube: bool = True
    """Attention of each patch over its place in every frame (paper, eq. 1)."""
    patches_see_cls: bool = False
    """Let patches attend to CLS, as the paper's equation has it and its text does not."""
    joint: bool = False
    """Every token attends to every token, instead of hierarchical attention (the paper's ablation)."""
    backend: str = dc.field(default="auto", metadata=PERFORMANCE)
    """Attention kernels: auto, one of vidla_kernels.available_backends, or forward/backward as in triton/cuda."""
    checkpoint_activations: bool = dc.field(default=False, metadata=PERFORMANCE)
    """Recompute blocks in the backward: less memory, about a third more work."""
    classes: int = 0
    """Classes of a linear head on the video embedding, trained by the clips' labels; 0: the contrastive loss with texts."""


@dc.dataclass(frozen=True)
class Data:
    """Clips and how they are cut. A batch is the global one, whatever the number of processes."""

    train: str = dc.field(default="digits", metadata=PERFORMANCE)  # its content is compared instead, see checkpoint.py
    """A folder of shards, or 'digits': moving digits, generated once in the user's cache."""
    test: str = dc.field(default="digits", metadata=PERFORMANCE)
    """Held-out clips for the evaluation: a folder of shards, or 'digits'."""
    batch_size: int = 64
    """Clips in a global batch."""
    sampling: Literal["segment", "dense"] = "segment"
    """Frames: one of each of T equal segments of the clip, or densely, every --data.stride-th within it."""
    stride: int = 1
    """Dense sampling: stored frames from one to the next."""
    crop_scales: tuple[float, ...] = (1.0, 0.8)
    """Random crops: side of the crop over the frame's short side, one drawn for each clip. Empty: the centre crop."""
    flip: bool = True
    """Mirror half of the clips."""
    workers: int = dc.field(default=1, metadata=PERFORMANCE)
    """Loader processes that decode, for each training process; 0: it decodes itself."""


@dc.dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up, then a cosine."""

    lr: float = 2e-5
    """Peak learning rate."""
    lr_end: float = 4e-8
    """Learning rate of the last step."""
    warmup: float = 0.01
    """Share of the steps in which the rate climbs from zero."""
    weight_decay: float = 0.02
    """Decay of the parameters named by --optim.decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: weight matrices only (no bias, norm, embedding, token, temperature), or all."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running averages."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    clip: float = 10.0
    """Largest norm of the whole gradient."""


@dc.dataclass(frozen=True)
class Run:
    """The machine's side of a run."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the encoders; weights and loss stay fp32. auto: bf16 on a GPU, fp32 on a CPU."""
    micro_batch: int = dc.field(default=0, metadata=PERFORMANCE)
    """Most clips a process encodes at once; gradients equal the large batch's. 0: all of its share."""
    log_every: int = dc.field(default=10, metadata=PERFORMANCE)
    """Steps between two lines of plain text (log.jsonl has every step)."""
    eval_every: int = dc.field(default=0, metadata=PERFORMANCE)
    """Steps between two evaluations; 0: only at the end."""
    save_every: int = dc.field(default=200, metadata=PERFORMANCE)
    """Steps between two checkpoints; the end is always saved."""
    keep: int = dc.field(default=2, metadata=PERFORMANCE)
    """Newest checkpoints kept."""


@dc.dataclass(frozen=True)
class Config:
    """A run of vidla.train. Set either steps or epochs."""

    recipe: str = dc.field(default="default", metadata=PERFORMANCE)
    """A recipe of this package, or the path of a TOML file."""
    output: str = dc.field(default="", metadata=PERFORMANCE)
    """Folder of the run's log.jsonl, checkpoints and config.toml. Empty: runs/RECIPE."""
    resume: str = dc.field(default="auto", metadata=PERFORMANCE)
    """auto: go on from the newest complete checkpoint in the output, if any; never: start afresh, an earlier run is
    moved to OUTPUT/previous-N; or the path of a checkpoint."""
    steps: int = 0
    """Updates of the weights."""
    epochs: float = 0.0
    """Passes over the training clips, where steps is not given."""
    seed: int = 0
    """Fixes the initial weights, the order of the clips, frames and crops."""
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    run: Run = Run()


EXAMPLES = """Train VidLA.

examples:
  torchrun -m vidla.train                                   a small real run on moving digits, minutes on two cores
  python -m vidla.train --steps 20 --output runs/try        the same, shorter
  python -m vidla.train --output runs/try --steps 20        again: goes on from the newest checkpoint
  torchrun --nproc-per-node 8 -m vidla.train --recipe pretrain-b32 --data.train SHARDS --data.test SHARDS
  torchrun --nproc-per-node 8 -m vidla.train --recipe my.toml --optim.lr 1e-5

recipes: {recipes}

exit codes: 0 finished, 2 usage error, 143 or 130 stopped by SIGTERM or Ctrl-C after saving, 1 anything else"""


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(
        p.name.removesuffix(".toml") for p in (resources.files("vidla") / "recipes").iterdir() if p.name.endswith(".toml")
    )


def load(argv: list[str]) -> Config:
    """The run that a command line asks for.

    Args: argv: the command line without the program's name.
    Raises: UsageError in one sentence; SystemExit(0) after --help.
    """
    recipe = _recipe_argument(argv)
    base = merge(Config(), _read_recipe(recipe), f"recipe {recipe}")
    if base.steps and base.epochs:
        raise UsageError(f"recipe {recipe}: set steps or epochs, not both")
    config = _command_line(argv, dc.replace(base, recipe=recipe))
    if config.steps and config.epochs:  # the command line's wins over the recipe's
        if base.epochs == config.epochs:
            config = dc.replace(config, epochs=0.0)
        elif base.steps == config.steps:
            config = dc.replace(config, steps=0)
    if not config.output:
        config = dc.replace(config, output=str(Path("runs") / Path(recipe).stem))
    _check(config)
    return config


def merge(defaults: Any, table: dict[str, Any], where: str, prefix: str = "") -> Any:
    """The dataclass `defaults` with the values of a TOML table; keys and types are checked.

    Args: where: the file, for messages; prefix: the table's own dotted name with its dot.
    Raises: UsageError naming the key, the legal names or type, and the nearest name.
    """
    fields = {f.name: f for f in dc.fields(defaults) if prefix or f.name not in COMMAND_LINE_ONLY}
    hints = typing.get_type_hints(type(defaults))
    changes = {}
    for key, value in table.items():
        if not prefix and key in COMMAND_LINE_ONLY:
            raise UsageError(f"{where}: {key!r} belongs on the command line (--{key}), not in a recipe")
        if key not in fields:
            raise UsageError(f"{where}: unknown key {prefix + key!r}; {_nearest(prefix + key, [prefix + f for f in fields])}")
        current = getattr(defaults, key)
        if dc.is_dataclass(current):
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {prefix + key!r} is a table: write [{prefix + key}]")
            changes[key] = merge(current, value, where, f"{prefix}{key}.")
        else:
            changes[key] = _typed(value, hints[key], f"{where}: {prefix + key!r}")
    return dc.replace(defaults, **changes)


def to_toml(config: Config) -> str:
    """The recipe that repeats this run: every field with its value, without the command-line-only ones."""
    import tomli_w

    table = dc.asdict(config)
    for name in COMMAND_LINE_ONLY:
        del table[name]
    del table["epochs" if config.steps else "steps"]
    return tomli_w.dumps(table)


def identity(config: Config) -> dict[str, Any]:
    """The fields that decide the run's numbers, by dotted name, as plain values (lists, not tuples)."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, field, value in _leaves(config)
        if not field.metadata.get("performance")
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences such as 'optim.lr was 0.001, is 0.002' for each name whose value differs."""
    return [
        f"{name} was {saved.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in [*saved, *(n for n in now if n not in saved)]
        if saved.get(name) != now.get(name)
    ]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dc.Field, Any]]:
    """Every option of a config: its dotted name, its field, its value."""
    for field in dc.fields(node):
        value = getattr(node, field.name)
        if dc.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def _option(name: str) -> str:
    """An option's name on the command line, from its dotted name."""
    return f"--{name.replace('_', '-')}"


def _recipe_argument(argv: list[str]) -> str:
    recipe = "default"
    for i, word in enumerate(argv):
        if word.startswith("--recipe="):
            recipe = word.removeprefix("--recipe=")
        elif word == "--recipe" and i + 1 < len(argv):
            recipe = argv[i + 1]
    return recipe


def _read_recipe(recipe: str) -> dict[str, Any]:
    names = recipe_names()
    if recipe in names:
        text = (resources.files("vidla") / "recipes" / f"{recipe}.toml").read_text()
    elif Path(recipe).is_file():
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {recipe}: cannot be read as UTF-8 text: {error}") from None
    elif recipe.endswith(".toml") or os.sep in recipe:
        raise UsageError(f"recipe {recipe}: no such file")
    else:
        raise UsageError(f"no recipe {recipe!r}; {_nearest(recipe, names)}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {recipe}: not TOML: {error}") from None


def _command_line(argv: list[str], defaults: Config) -> Config:
    import tyro

    description = EXAMPLES.format(recipes=", ".join(recipe_names()))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                Config,
                prog="python -m vidla.train",
                description=description,
                args=argv,
                default=defaults,
                return_unknown_args=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UsageError(_one_line(complaint.getvalue())) from None
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise UsageError(f"do not know what to do with {word!r}: options are --name VALUE, see --help")
        raise UsageError(f"unknown option {word}; {_nearest(word, _options(defaults))}")
    return config


def _options(config: Config) -> list[str]:
    return [_option(name) for name, *_ in _leaves(config)]


def _one_line(box: str) -> str:
    """The sentence inside tyro's framed message."""
    lines = [line.strip("│╭╰╮╯ ") for line in box.splitlines()]
    body = []
    for line in lines[1:]:
        if re.fullmatch("─+", line):
            break
        body.append(line)
    return " ".join(" ".join(body).split()) + " (see --help)"


def _nearest(name: str, legal: list[str]) -> str:
    """'did you mean X?', by the whole name or by its last part; all legal names where nothing is near."""
    close = difflib.get_close_matches(name, legal, n=1, cutoff=0.6)
    tails = {option.lstrip("-").rpartition(".")[2]: option for option in legal}
    tail = difflib.get_close_matches(name.lstrip("-").rpartition(".")[2], tails, n=1, cutoff=0.75)
    if close or tail:
        return f"did you mean {close[0] if close else tails[tail[0]]}?"
    return f"legal: {', '.join(legal)}"


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; an integer is welcome where a float is asked for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UsageError(f"{where} must be one of {', '.join(map(repr, args))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list of numbers such as [1.0, 0.8], not {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UsageError(f"{where} must have {len(args)} numbers, not {len(value)}")
        return tuple(_typed(item, args[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # not isinstance: true is no integer
        kinds = {int: "an integer", float: "a number", bool: "true or false", str: "a text in quotes"}
        raise UsageError(f"{where} must be {kinds[hint]}, not {value!r}")
    return value


def _check(config: Config) -> None:
    """Refuse values no run can have, each with the option's name."""

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UsageError(sentence)

    optim, data, run = config.optim, config.data, config.run
    for name, _, value in _leaves(config):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                need(math.isfinite(number), f"{_option(name)} must be a finite number, not {number}")
    need(not (config.steps and config.epochs), "give --steps or --epochs, not both")
    need(config.steps >= 0 and config.epochs >= 0, "--steps and --epochs must not be negative")
    need(bool(config.steps or config.epochs), "give --steps N or --epochs N: the run has no length")
    need(0 <= config.seed < 2**63, f"--seed must be from 0 to 2^63 - 1, not {config.seed}")
    need(config.model.frames >= 1, f"--model.frames must be 1 or more, not {config.model.frames}")
    need(config.model.classes != 1 and config.model.classes >= 0, "--model.classes must be 0, or 2 or more")
    need(data.stride >= 1, f"--data.stride must be 1 or more, not {data.stride}")
    need(data.stride == 1 or data.sampling == "dense", "--data.stride is for --data.sampling dense")
    need(data.batch_size >= 2, f"--data.batch-size must be 2 or more (a contrast needs two clips), not {data.batch_size}")
    need(all(0 < s <= 1 for s in data.crop_scales), f"--data.crop-scales must lie in (0, 1], not {data.crop_scales}")
    need(data.workers >= 0, f"--data.workers must be 0 or more, not {data.workers}")
    need(optim.lr > 0 and 0 <= optim.lr_end <= optim.lr, "--optim.lr must be positive and --optim.lr-end from 0 to --optim.lr")
    need(0 <= optim.warmup < 1, f"--optim.warmup is a share of the steps, from 0 to below 1, not {optim.warmup}")
    need(optim.weight_decay >= 0 and optim.eps > 0, "--optim.weight-decay must be 0 or more, and --optim.eps above 0")
    need(all(0 <= b < 1 for b in optim.betas), f"--optim.betas must lie in [0, 1), not {optim.betas}")
    need(optim.clip > 0, f"--optim.clip must be above 0, not {optim.clip}")
    need(
        run.log_every >= 1 and run.save_every >= 1 and run.keep >= 1,
        "--run.log-every, --run.save-every and --run.keep must be 1 or more",
    )
    need(run.micro_batch >= 0 and run.eval_every >= 0, "--run.micro-batch and --run.eval-every must be 0 or more")
    need(bool(data.train and data.test), "--data.train and --data.test: give a folder of shards, or 'digits'")
