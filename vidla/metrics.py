"""Retrieval metrics and dual softmax, on a (texts, videos) matrix of similarities.

A rank is 1 plus the number of *wrong* candidates that are at least as similar as the right one. So ties count against the
model, and a model that gives every pair the same similarity comes last instead of first. Texts of the same video are never
wrong for it, even if they tie (data sets repeat captions).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24  # similarities compared at a time


def retrieval_metrics(similarity: Tensor, text_to_video: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, median and mean rank, from text to video and back (the paper's retrieval tables).

    Text to video: each text is a query, every video a candidate, also one without a text. Video to text: each video with a
    text is a query, every text a candidate, and the best ranked of the video's texts counts (MSVD, VATEX). Candidates are
    texts, not videos' sets of texts: with several texts a video this is the stricter of the two protocols in use.

    Args:
        similarity: (texts, videos), floating point; more is more similar.
        text_to_video: (texts,) integer, the index of the video that each text describes.

    Returns:
        "t2v_R@1", "t2v_R@5", "t2v_R@10" (fractions of the queries), "t2v_MdR" (median; the mean of the middle two when the
        count is even), "t2v_MnR" (mean), both from 1, and the same with "v2t_".

    Raises:
        ValueError: a wrong shape or dtype, an index out of range, or NaN similarities.
    """
    _check_similarity(similarity)
    texts, videos = similarity.shape
    if text_to_video.shape != (texts,) or text_to_video.dtype.is_floating_point or text_to_video.dtype == torch.bool:
        given = f"{tuple(text_to_video.shape)} {text_to_video.dtype}"
        raise ValueError(f"text_to_video is {given}: expected an integer for each text, ({texts},)")
    similarity, owner = similarity.detach(), text_to_video.to(similarity.device, torch.int64)
    if owner.min() < 0 or owner.max() >= videos:
        raise ValueError(f"text_to_video has values in [{owner.min()}, {owner.max()}]: videos are 0 to {videos - 1}")

    right = similarity.gather(1, owner[:, None])  # (texts, 1)
    best = similarity.new_full((videos,), -torch.inf).scatter_reduce_(0, owner, right[:, 0], "amax")
    t2v = torch.ones(texts, dtype=torch.int64, device=similarity.device)
    v2t = torch.ones(videos, dtype=torch.int64, device=similarity.device)
    video = torch.arange(videos, device=similarity.device)
    step = max(1, BLOCK // videos)
    for start in range(0, texts, step):
        rows = slice(start, start + step)
        block, wrong = similarity[rows], owner[rows, None] != video
        t2v[rows] += ((block >= right[rows]) & wrong).sum(1)
        v2t += ((block >= best) & wrong).sum(0)
    return _summary("t2v_", t2v) | _summary("v2t_", v2t[owner.unique()])


def dual_softmax(similarity: Tensor, temperature: float = 100.0, dim: int = 0) -> Tensor:
    """Similarities times their softmax over the *queries*: a video that suits every text is worth less to each.

    Transductive: it sees all queries of the test set at once, so results with it are reported apart (the paper's tables
    mark them with *).

    Args:
        similarity: (texts, videos), floating point, finite.
        temperature: multiplies the similarities in the softmax, as CLIP's logit scale does.
        dim: 0 to retrieve videos by text (softmax over texts), 1 to retrieve texts by video.

    Returns:
        (texts, videos), float32 (float64 for float64): half precision would turn small products into ties.

    Raises:
        ValueError: a wrong shape, dtype or dim, or similarities that are not finite.
    """
    _check_similarity(similarity)
    if dim not in (0, 1, -1, -2):
        raise ValueError(f"dim is {dim}: expected 0 (softmax over texts) or 1 (over videos)")
    if not similarity.isfinite().all():
        raise ValueError("similarity has infinite values: dual softmax needs finite ones")
    similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    return similarity * (similarity * temperature).softmax(dim)


def _summary(prefix: str, ranks: Tensor) -> dict[str, float]:
    ranks = ranks.double().sort().values
    n = len(ranks)
    values = {f"R@{k}": (ranks <= k).double().mean() for k in (1, 5, 10)}
    values |= {"MdR": (ranks[(n - 1) // 2] + ranks[n // 2]) / 2, "MnR": ranks.mean()}
    return {prefix + name: value.item() for name, value in values.items()}


def _check_similarity(similarity: Tensor) -> None:
    if similarity.ndim != 2 or 0 in similarity.shape or not similarity.is_floating_point():
        given = f"{tuple(similarity.shape)} {similarity.dtype}"
        raise ValueError(f"similarity is {given}: expected (texts, videos), both at least 1, floating point")
    if similarity.isnan().any():
        raise ValueError("similarity has NaN values: they have no rank; look for a broken feature or a zero norm")
