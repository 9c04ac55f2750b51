"""Equation 3 against a slow reading of it, in float64, on one rank. Several ranks: test_loss_ranks.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vidla.loss import contrastive_loss


def by_hand(video, caption, subtitle, scale, has_caption, has_subtitle, source):
    """Equation 3, one logarithm at a time."""
    v, total = F.normalize(video, dim=1), 0.0
    for text, has in ((subtitle, has_subtitle), (caption, has_caption)):
        t, clips = F.normalize(text, dim=1), [i for i in range(len(v)) if has[i]]
        for i in clips:
            seen = [j for j in clips if j == i or source[i] < 0 or source[i] != source[j]]
            pair = torch.exp(scale * (v[i] @ t[i]))
            total = total - torch.log(pair / sum(torch.exp(scale * (v[i] @ t[j])) for j in seen)) / len(clips)
            total = total - torch.log(pair / sum(torch.exp(scale * (t[i] @ v[j])) for j in seen)) / len(clips)
    return total


pytestmark = pytest.mark.usefixtures("seed")


def draw(b=9, dim=6, dtype=torch.float64, missing=0.4, sources=4):
    features = [torch.randn(b, dim, dtype=dtype).requires_grad_() for _ in range(3)]
    scale = torch.tensor(7.3, dtype=dtype, requires_grad=True)
    options = {
        "has_caption": torch.rand(b) >= missing,
        "has_subtitle": torch.rand(b) >= missing,
        "source": torch.randint(-2, sources, (b,)),
    }
    return features, scale, options


def gradients(loss, features, scale):
    return torch.autograd.grad(loss, [*features, scale], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("chunk", [None, 1, 4, 9, 100])
def test_value_and_gradients_are_those_of_equation_3(chunk):
    features, scale, options = draw()
    gold = by_hand(*features, scale, **options)
    loss = contrastive_loss(*features, scale, **options, chunk=chunk)
    torch.testing.assert_close(loss, gold, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(3 * loss, features, scale), gradients(3 * gold, features, scale), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_without_flags_it_is_four_plain_cross_entropies():
    (v, c, s), scale, _ = draw()
    target = torch.arange(len(v))
    gold = 0
    for text in (c, s):
        logits = scale * F.normalize(v, dim=1) @ F.normalize(text, dim=1).T
        gold = gold + F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
    torch.testing.assert_close(contrastive_loss(v, c, s, scale), gold, rtol=1e-12, atol=0)


def test_gradcheck():
    features, scale, options = draw(b=5, dim=3)
    f = lambda v, c, s, scale: contrastive_loss(v, c, s, scale, **options, chunk=2)  # noqa: E731
    assert torch.autograd.gradcheck(f, (*features, scale))


def test_float32_errs_like_float32():
    features, scale, options = draw(b=40, dim=32, dtype=torch.float32)
    loss = contrastive_loss(*features, scale, **options, chunk=7)
    wide = [x.detach().double().requires_grad_() for x in features]
    wide_scale = scale.detach().double().requires_grad_()
    gold = contrastive_loss(*wide, wide_scale, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), gold, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(loss, features, scale), gradients(gold, wide, wide_scale), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32_also_under_autocast(dtype):
    features, _, options = draw(b=16, dim=32, dtype=dtype)
    scale = torch.tensor(100.0)
    gold = contrastive_loss(*[x.float() for x in features], scale, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(*features, scale, **options)
        loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, gold)
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in features)


def test_pairs_of_one_source_are_not_negatives_but_their_own_positives_stay():
    features, scale, _ = draw(b=6)
    alone = contrastive_loss(*features, scale, source=torch.full((6,), 3))
    assert alone.item() == pytest.approx(0, abs=1e-12)  # every denominator is the positive alone
    assert contrastive_loss(*features, scale, source=torch.full((6,), -1)).item() > 0.1  # -1: no known source


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_a_missing_text_may_hold_anything(junk):
    features, scale, options = draw()
    loss = contrastive_loss(*features, scale, **options)
    filled = [features[0]] + [
        torch.where(has[:, None], x, junk).detach().requires_grad_()
        for x, has in zip(features[1:], (options["has_caption"], options["has_subtitle"]), strict=True)
    ]
    other = contrastive_loss(*filled, scale, **options)
    assert torch.equal(loss, other)
    for a, b in zip(gradients(loss, features, scale), gradients(other, filled, scale), strict=True):
        assert torch.equal(a, b)


def test_terms_without_clips_are_zero():
    features, scale, _ = draw(b=4)
    none = torch.zeros(4, dtype=torch.bool)
    only = contrastive_loss(*features, scale, has_caption=none)
    every = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(only, by_hand(*features, scale, none, every, [-1] * 4))
    empty = contrastive_loss(*features, scale, has_caption=none, has_subtitle=none)
    assert empty.item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(empty, features, scale))
    one = none.clone()
    one[2] = True
    assert contrastive_loss(*features, scale, has_caption=none, has_subtitle=one).item() == 0


def test_large_scale_does_not_overflow():
    features, _, options = draw(b=8, dtype=torch.float32)
    loss = contrastive_loss(*features, 1e4, **options)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in features)


def test_what_needs_no_gradient_gets_none(monkeypatch):
    (v, c, s), scale, options = draw()
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("vidla.loss.reduce_scatter_rows", None)  # the step that only gradients need
        assert not contrastive_loss(v, c, s, scale, **options).requires_grad
    loss = contrastive_loss(v, c.detach(), s.detach(), 7.3, **options)
    gold = by_hand(v, c.detach(), s.detach(), 7.3, **options)
    torch.testing.assert_close(*(torch.autograd.grad(x, v)[0] for x in (loss, gold)), rtol=1e-11, atol=1e-12)
    one_element = torch.tensor([7.3], dtype=torch.float64, requires_grad=True)
    contrastive_loss(v, c, s, one_element, **options).backward()
    assert one_element.grad.shape == (1,)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_matrix_of_all_pairs_is_made_or_kept():
    b, dim, chunk = 128, 4, 8
    features, scale, options = draw(b, dim)
    kept = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        contrastive_loss(*features, scale, **options, chunk=chunk).backward()
    assert largest.elements == max(3 * b * dim, chunk * b)
    assert max(kept) <= 3 * b * dim
    with Largest() as largest:
        contrastive_loss(*features, scale, **options, chunk=b)
    assert largest.elements == b * b  # the probe does see a whole matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.randn(4)}, r"video features have shape \(4,\)"),
        ({"video": torch.randn(0, 3)}, "both at least 1"),
        ({"video": torch.ones(4, 3, dtype=torch.int64)}, "video features are torch.int64"),
        ({"caption": torch.randn(4, 2)}, r"caption features are \(4, 2\)"),
        ({"subtitle": torch.ones(4, 3, dtype=torch.int64)}, "subtitle features are"),
        ({"has_caption": torch.ones(4)}, r"has_caption is \(4,\) torch.float32: expected \(4,\) torch.bool"),
        ({"has_subtitle": torch.ones(3, dtype=torch.bool)}, r"has_subtitle is \(3,\)"),
        ({"source": torch.ones(4, dtype=torch.int32)}, "source is"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale has shape \(2,\)"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {name: torch.randn(4, 3) for name in ("video", "caption", "subtitle")} | {"logit_scale": 10.0}
    contrastive_loss(**good)
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**(good | change))
