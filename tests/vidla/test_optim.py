"""Parameter groups and the learning rate."""

import itertools
import math

import pytest
import torch
from torch import nn

import vidla.optim
from vidla.config import Optim
from vidla.model import create_model
from vidla.optim import create_optimizer, learning_rate, parameter_groups


def test_rate_climbs_then_follows_a_cosine_to_the_floor():
    optim = Optim(lr=2e-5, lr_end=4e-8, warmup=0.01)
    rates = [learning_rate(step, 1000, optim) for step in range(1000)]
    assert rates[:10] == pytest.approx([2e-5 * (k + 1) / 10 for k in range(10)])
    assert rates[10] == 2e-5
    assert rates[-1] == pytest.approx(4e-8, rel=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[10 + 330] == pytest.approx(4e-8 + (2e-5 - 4e-8) * (1 + math.cos(math.pi * 330 / 989)) / 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.9])
def test_short_runs_have_a_rate(steps: int, warmup: float):
    optim = Optim(lr=1e-3, lr_end=1e-5, warmup=warmup)
    assert all(1e-5 <= learning_rate(step, steps, optim) <= 1e-3 for step in range(steps))


@pytest.mark.parametrize("name", ["vidla-tiny", "ViT-B-32-quickgelu"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: str):
    with torch.device("meta"):
        model = create_model(name)
    decay, no_decay = (set(group["names"]) for group in parameter_groups(model, Optim()))
    names = dict(model.named_parameters())
    assert not decay & no_decay
    assert decay | no_decay == set(names)
    assert decay == {
        n
        for n, p in names.items()
        if n.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "conv1.weight"))
        or n in ("visual.proj", "text.text_projection")
    }
    # Every kind that docs/decisions.md, 10 exempts is there.
    for part in ("bias", "ln_1.weight", "class_embedding", "mst_embedding", "temporal_embedding", "token_embedding"):
        assert any(part in n for n in no_decay), part
    assert "logit_scale" in no_decay
    groups = create_optimizer(model, Optim(weight_decay=0.3)).param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {"decay": 0.3, "no_decay": 0.0}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_decay_all():
    with torch.device("meta"):
        model = create_model("vidla-tiny")
    groups = create_optimizer(model, Optim(decay="all")).param_groups
    assert [group["name"] for group in groups] == ["decay"]
    assert len(groups[0]["params"]) == len(list(model.parameters()))


def test_a_vector_that_no_rule_names_is_refused():
    model = nn.Module()
    model.gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"gain \(3,\).*NO_DECAY"):
        parameter_groups(model, Optim())


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert [group["names"] for group in parameter_groups(model, Optim())] == [[], ["bias"]]


def test_update_is_adamw_in_closed_form():
    """First step of AdamW: the decayed weight minus the rate times the gradient's sign, nearly."""
    model = nn.Linear(4, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = create_optimizer(model, Optim(weight_decay=0.5, eps=1e-6))
    vidla.optim.set_learning_rate(optimizer, 0.1)
    model.weight.grad = torch.randn(3, 4)
    optimizer.step()
    g = model.weight.grad
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-6))
