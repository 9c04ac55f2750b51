"""Retrieval metrics and dual softmax against slow readings of their definitions."""

import math

import numpy as np
import pytest
import torch

from vidla import metrics
from vidla.metrics import dual_softmax, retrieval_metrics

pytestmark = pytest.mark.usefixtures("seed")


def by_hand(similarity, owner):
    """Ranks by counting one candidate at a time."""
    texts, videos = similarity.shape
    t2v = [1 + sum(similarity[i, v] >= similarity[i, owner[i]] for v in range(videos) if v != owner[i]) for i in range(texts)]
    v2t = []
    for v in sorted(set(owner)):
        of_others = [similarity[i, v] for i in range(texts) if owner[i] != v]
        v2t.append(min(1 + sum(o >= similarity[i, v] for o in of_others) for i in range(texts) if owner[i] == v))
    result = {}
    for name, ranks in (("t2v", np.array(t2v)), ("v2t", np.array(v2t))):
        result |= {f"{name}_R@{k}": float(np.mean(ranks <= k)) for k in (1, 5, 10)}
        result |= {f"{name}_MdR": float(np.median(ranks)), f"{name}_MnR": float(np.mean(ranks))}
    return result


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [1, 50, 2**24])
def test_random_cases_with_several_texts_a_video(monkeypatch, ties, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    for texts, videos in ((1, 1), (7, 7), (30, 8), (21, 40)):  # with more videos than texts some have none
        similarity = torch.randn(texts, videos)
        if ties:
            similarity = similarity.round()
        owner = torch.randint(videos, (texts,))
        ours = retrieval_metrics(similarity, owner)
        assert ours == pytest.approx(by_hand(similarity.numpy(), owner.tolist()), abs=1e-12)
        assert all(type(value) is float for value in ours.values())


def test_a_case_on_paper():
    #                             video 0    1    2 (has no text)
    similarity = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8], [0.5, 0.6, 0.4]])
    found = retrieval_metrics(similarity, torch.tensor([0, 0, 1]))
    # text 0 finds video 0 first; text 1 last (0.3 and 0.8 beat 0.2); text 2 finds video 1 first: ranks 1, 3, 1
    # video 0: its better text, 0.9, is first; video 1: 0.6 is first
    third = 2 / 3
    t2v = {"t2v_R@1": third, "t2v_R@5": 1.0, "t2v_R@10": 1.0, "t2v_MdR": 1.0, "t2v_MnR": 5 / 3}
    v2t = {"v2t_R@1": 1.0, "v2t_R@5": 1.0, "v2t_R@10": 1.0, "v2t_MdR": 1.0, "v2t_MnR": 1.0}
    assert found == pytest.approx(t2v | v2t)


def test_a_model_that_cannot_tell_anything_apart_comes_last():
    found = retrieval_metrics(torch.zeros(20, 20), torch.arange(20))
    assert (found["t2v_R@1"], found["t2v_R@10"], found["t2v_MdR"], found["v2t_MnR"]) == (0, 0, 20, 20)


def test_a_repeated_caption_does_not_hurt_its_own_video():
    similarity = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.7]])
    assert retrieval_metrics(similarity, torch.tensor([0, 0, 1]))["v2t_MnR"] == 1


def test_a_video_without_texts_is_no_query_but_a_candidate():
    similarity = torch.tensor([[0.5, 0.9]])
    found = retrieval_metrics(similarity, torch.tensor([0]))
    assert (found["t2v_MnR"], found["v2t_MnR"]) == (2, 1)


def test_half_precision_and_gradients_do_not_disturb():
    similarity = torch.eye(12, dtype=torch.bfloat16).requires_grad_()
    assert retrieval_metrics(similarity, torch.arange(12, dtype=torch.int32))["t2v_R@1"] == 1


@pytest.mark.parametrize(
    ("similarity", "owner", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"similarity is \(3,\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "both at least 1"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "floating point"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "NaN"),
        (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), r"text_to_video is \(3,\)"),
        (torch.zeros(2, 2), torch.zeros(2), "expected an integer"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"values in \[0, 2\]: videos are 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), r"values in \[-1, 0\]"),
    ],
)
def test_wrong_arguments_are_named(similarity, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(similarity, owner)


@pytest.mark.parametrize("dim", [0, 1])
def test_dual_softmax_by_hand(dim):
    similarity = torch.randn(5, 4, dtype=torch.float64)
    ours = dual_softmax(similarity, temperature=3.0, dim=dim)
    for i in range(5):
        for j in range(4):
            line = similarity[:, j] if dim == 0 else similarity[i]
            prior = math.exp(3 * similarity[i, j]) / sum(math.exp(3 * x) for x in line)
            assert ours[i, j].item() == pytest.approx(similarity[i, j].item() * prior, rel=1e-9)


def test_dual_softmax_takes_a_hub_away_from_the_texts_it_does_not_belong_to():
    # Every text likes video 0 best. Only text 0 likes it more than the others do.
    similarity = torch.tensor([[0.9, 0.1, 0.1], [0.8, 0.7, 0.1], [0.8, 0.1, 0.7]])
    owner = torch.arange(3)
    assert retrieval_metrics(similarity, owner)["t2v_R@1"] == pytest.approx(1 / 3)
    assert retrieval_metrics(dual_softmax(similarity), owner)["t2v_R@1"] == 1


def test_dual_softmax_dtypes_and_refusals():
    assert dual_softmax(torch.randn(3, 2, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="dim is 2"):
        dual_softmax(torch.zeros(2, 2), dim=2)
    with pytest.raises(ValueError, match="infinite"):
        dual_softmax(torch.full((2, 2), math.inf))
    with pytest.raises(ValueError, match="NaN"):
        dual_softmax(torch.full((2, 2), math.nan))
