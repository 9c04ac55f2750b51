"""Configuration: defaults < recipe < command line, and refusals that say what is legal."""

import dataclasses as dc
import subprocess
import sys
from pathlib import Path

import pytest

from vidla import config
from vidla.config import Config, UsageError, differences, identity, load, merge, recipe_names, to_toml


def refused(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_wins_over_recipe_wins_over_defaults(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("steps = 7\n[optim]\nlr = 1\nclip = 2.5\n[data]\ncrop_scales = [1, 0.5]\n")
    got = load(["--recipe", str(recipe), "--optim.clip", "3", "--model.tube", "False", "--data.crop-scales", "1.0"])
    assert (got.steps, got.optim.lr, got.optim.clip, got.model.tube) == (7, 1.0, 3.0, False)
    assert got.data.crop_scales == (1.0,)
    assert got.optim.betas == Config().optim.betas
    assert got.output == "runs/mine"
    assert type(got.optim.lr) is float


@pytest.mark.parametrize("name", recipe_names())
def test_written_recipe_repeats_the_run(name: str, tmp_path: Path):
    first = load(["--recipe", name, "--seed", "5", "--output", "x"])
    again = tmp_path / "config.toml"
    again.write_text(to_toml(first))
    second = load(["--recipe", str(again), "--output", "x"])
    assert dc.replace(second, recipe=first.recipe) == first


def test_steps_and_epochs():
    assert (load(["--recipe", "pretrain-b32"]).epochs, load(["--recipe", "pretrain-b32"]).steps) == (3.0, 0)
    shorter = load(["--recipe", "pretrain-b32", "--steps", "5"])
    assert (shorter.epochs, shorter.steps) == (0.0, 5)
    longer = load(["--epochs", "2"])
    assert (longer.epochs, longer.steps) == (2.0, 0)
    assert "not both" in refused("--steps", "3", "--epochs", "2")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stpes", "4"], "did you mean --steps?"),
        (["--lr", "1"], "did you mean --optim.lr?"),
        (["--optim.lrr=3"], "did you mean --optim.lr?"),
        (["--steps", "many"], "--steps"),
        (["--steps"], "--steps"),
        (["--run.precision", "half"], "'bf16'"),
        (["--recipe", "pretrain-b23"], "did you mean pretrain-b32?"),
        (["--recipe", "absent.toml"], "no such file"),
        (["20"], "--name VALUE"),
        (["--steps", "-1"], "negative"),
        (["--steps", "0"], "--steps N"),
        (["--seed", "-1"], "--seed"),
        (["--data.batch-size", "1"], "--data.batch-size"),
        (["--data.crop-scales", "1.5"], "--data.crop-scales"),
        (["--data.sampling", "thin"], "'dense'"),
        (["--data.stride", "2"], "--data.sampling dense"),
        (["--data.stride", "0"], "--data.stride"),
        (["--model.classes", "1"], "--model.classes"),
        (["--optim.lr-end", "1"], "--optim.lr-end"),
        (["--optim.lr", "nan"], "--optim.lr"),
        (["--run.keep", "0"], "--run.keep"),
    ],
)
def test_command_line_refusals(argv: list[str], expected: str):
    assert expected in refused(*argv)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("stesp = 3", "did you mean steps?"),
        ("[optim]\nweight_deacy = 3", "did you mean optim.weight_decay?"),
        ("[optim]\nlr = 'fast'", "must be a number, not 'fast'"),
        ("steps = true", "must be an integer, not True"),
        ("steps = 1.5", "must be an integer"),
        ("[model]\ntube = 1", "must be true or false"),
        ("[model]\nname = 1", "must be a text"),
        ("[optim]\nbetas = [0.9]", "must have 2 numbers"),
        ("[data]\ncrop_scales = 1.0", "must be a list"),
        ("[optim]\ndecay = 'some'", "'matrices', 'all'"),
        ("optim = 3", "write [optim]"),
        ("output = 'x'", "belongs on the command line"),
        ("steps = 3\nepochs = 2", "not both"),
        ("steps = ", "not TOML"),
    ],
)
def test_recipe_refusals(toml: str, expected: str, tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    message = refused("--recipe", str(path))
    assert expected in message
    assert str(path) in message


def test_identity_leaves_out_what_cannot_change_the_numbers():
    base = load([])
    performance = ["--data.workers", "3", "--run.micro-batch", "2", "--run.save-every", "9", "--data.train", "elsewhere"]
    assert identity(load(performance)) == identity(base)
    for option, name in (("--seed", "seed"), ("--optim.warmup", "optim.warmup"), ("--model.frames", "model.frames")):
        changed = identity(load([option, "0" if option == "--optim.warmup" else "3"]))
        assert [line.split(" was ")[0] for line in differences(identity(base), changed)] == [name]


@pytest.mark.parametrize(
    ("name", "steps"),
    # 440 x factor, paper appendix A.2
    [
        ("msrvtt-b32", 1100),
        ("didemo-b32", 1100),
        ("activitynet-b32", 880),
        ("msvd-b32", 440),
        ("vatex-b32", 2640),
        ("msrvtt-b16", 1760),
        ("didemo-b16", 660),
        ("activitynet-b16", 880),
        ("msvd-b16", 440),
        ("vatex-b16", 2640),
    ],
)
def test_retrieval_recipes_hold_the_papers_numbers(name: str, steps: int):
    c = load(["--recipe", f"finetune-retrieval-{name}"])
    b16 = name.endswith("b16")
    assert (c.steps, c.data.batch_size, c.model.frames, c.optim.weight_decay) == (steps, 196 if b16 else 128, 32, 0.2)
    assert (c.optim.lr, c.optim.lr_end, c.data.crop_scales, c.data.flip) == (1e-5, 1e-6, (), False)
    assert c.model.name == ("ViT-B-16-quickgelu" if b16 else "ViT-B-32-quickgelu")


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "classes"),
    # paper, appendix A.3
    [("k400-b32", 100, 512, 400), ("k400-b16", 75, 512, 400), ("ssv2-b32", 40, 1024, 174), ("ssv2-b16", 40, 512, 174)],
)
def test_classification_recipes_hold_the_papers_numbers(name: str, epochs: int, batch: int, classes: int):
    c = load(["--recipe", f"finetune-classification-{name}"])
    assert (c.epochs, c.data.batch_size, c.model.frames, c.model.classes) == (epochs, batch, 16, classes)
    assert c.data.sampling == ("dense" if name.startswith("k400") else "segment")
    assert c.data.flip == name.startswith("k400")
    assert c.model.name == ("ViT-B-16-quickgelu" if name.endswith("b16") else "ViT-B-32-quickgelu")


@pytest.mark.parametrize(("name", "model"), [("b32", "ViT-B-32"), ("b16", "ViT-B-16"), ("l14", "ViT-L-14")])
def test_pretraining_recipes_hold_the_papers_numbers(name: str, model: str):
    c = load(["--recipe", f"pretrain-{name}"])
    assert (c.model.name, c.model.pretrained, c.model.frames) == (f"{model}-quickgelu", "openai", 12)
    assert (c.model.levels, c.model.tokens_per_level, c.model.temporal_scale) == (3, 4, 2)
    assert (c.optim.lr, c.optim.lr_end, c.optim.betas, c.optim.weight_decay) == (2e-5, 4e-8, (0.9, 0.999), 0.02)
    assert (c.optim.clip, c.optim.warmup, c.optim.eps, c.epochs, c.data.batch_size) == (10.0, 0.01, 1e-6, 3.0, 4096)
    assert (c.data.crop_scales, c.data.flip) == ((1.0, 0.8), True)


def test_merge_leaves_the_defaults_alone():
    base = Config()
    merge(base, {"optim": {"lr": 3}}, "here")
    assert base == Config()


def test_help_teaches_without_torch():
    """--help is instant because nothing heavy is imported before the options are parsed."""
    code = (
        "import sys, runpy\nsys.argv = ['train', '--help']\n"
        "try: runpy.run_module('vidla.train', run_name='__main__')\n"
        "except SystemExit as stop: print('heavy:', 'torch' in sys.modules, 'code:', stop.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "heavy: False code: 0" in done.stdout
    assert "torchrun -m vidla.train" in done.stdout
    for option in config._options(Config()):
        assert option in done.stdout
