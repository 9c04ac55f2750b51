"""What the kernels are meant to reach, beside what a run reached.

On a GPU: times the floor at B=32, H=12, D=64, U-V-r 3-4-2, T=12 in bfloat16, and for A100 within 10 % of the same. On a CPU:
how many times faster than what a user would write, and memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shapes import PASSES

if TYPE_CHECKING:
    from .results import Results

FLOOR = {  # (op, tower, passes) -> times the floor, at most
    ("tube", "B/16", "fwd"): 1.05,
    ("tube", "B/16", "fwd+bwd"): 1.05,
    ("tube", "B/32", "fwd"): 1.15,
    ("tube", "B/32", "fwd+bwd"): 1.15,
    ("hierarchical", "B/16", "fwd"): 1.15,
    ("hierarchical", "B/32", "fwd"): 1.30,
    ("hierarchical", "B/16", "fwd+bwd"): 1.30,
    ("hierarchical", "B/32", "fwd+bwd"): 1.50,
}
A100 = 1.1  # of those

BY_HAND = ("per-frame SDPA", "per-frame SDPA, a loop")
FASTER = [  # forward and backward on a CPU: (op, tower, peers of which the fastest counts, times faster)
    ("hierarchical", "B/16", ("dense mask SDPA",), 6.0),
    ("hierarchical", "B/32", ("dense mask SDPA",), 3.5),
    ("hierarchical", "B/16", BY_HAND, 1.0),
    ("hierarchical", "B/32", BY_HAND, 1.0),
    ("hierarchical", "B/16", ("per-frame SDPA, compiled",), None),  # None: for information
    ("hierarchical", "B/32", ("per-frame SDPA, compiled",), None),
    ("tube", "B/16", ("permute + SDPA",), 1.8),
    ("tube", "B/32", ("permute + SDPA",), 1.8),
    ("tube", "B/16", ("einsum, compiled",), None),
    ("tube", "B/32", ("einsum, compiled",), None),
]
MEMORY = 2.0  # all that lives at the peak, over inputs, output and gradients together


def goals(results: Results) -> list[dict]:
    """Each goal of this kind of device as {what, measured, by, sign, goal, met}; measured is None without a figure, met
    without a figure or a goal.

    On a GPU measured is that of our fastest backend, which `by` names; on a CPU that of the one which `auto` takes.
    """
    device = results.machine.get("device", {})
    if not any(row["shape"]["name"].endswith("T=12") for row in results.rows if row["group"] == "attention"):
        return []
    return _on_gpu(results, device) if device.get("kind") == "cuda" else _on_cpu(results)


def _on_gpu(results: Results, device: dict) -> list[dict]:
    ease = A100 if device.get("capability") == "8.0" else 1.0
    held = []
    for (op, tower, passes), most in FLOOR.items():
        ours = [row for row in _rows(results, op, tower, passes) if row["ours"]]
        row = min(ours, key=lambda row: row["x_floor"], default=None)
        what = f"{op}, {PASSES[passes]}, {tower}: times the floor"
        held.append(_goal(what, row and row["x_floor"], "<=", round(most * ease, 3), row and row["name"]))
    return held


def _on_cpu(results: Results) -> list[dict]:
    held = []
    for op, tower, peers, least in FASTER:
        rows = _rows(results, op, tower, "fwd+bwd")
        ours = _auto(rows)
        times = [row["us"]["median"] for row in rows if row["name"] in peers]
        measured = min(times) / ours["us"]["median"] if ours and times else None
        beside = " by hand" if peers is BY_HAND else ""
        held.append(_goal(f"{op}, {tower}: times faster than {peers[0]}{beside}", measured, ">=", least))
    for op in ("tube", "hierarchical"):
        for tower in ("B/16", "B/32"):
            row = _auto(_rows(results, op, tower, "fwd+bwd"))
            held.append(_goal(f"{op}, {tower}: memory over all tensors", row and row["x_tensors"], "<=", MEMORY))
    return held


def _goal(what: str, measured: float | None, sign: str, goal: float | None, by: str | None = None) -> dict:
    met = None if measured is None or goal is None else bool(measured >= goal if sign == ">=" else measured <= goal)
    return {"what": what, "measured": measured and round(measured, 3), "by": by, "sign": sign, "goal": goal, "met": met}


def _rows(results: Results, op: str, tower: str, passes: str) -> list[dict]:
    of = {"group": "attention", "op": op, "passes": passes, "status": "timed"}
    rows = [row for row in results.rows if all(row[key] == value for key, value in of.items()) and row.get("us")]
    return [row for row in rows if row["shape"]["name"] == f"{tower} T=12"]


def _auto(rows: list[dict]) -> dict | None:
    return next((row for row in rows if row["name"].endswith("(auto)")), None)
