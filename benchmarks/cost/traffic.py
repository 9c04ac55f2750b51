"""Bytes, products and exponentials of the kernels, counted while Triton's interpreter runs them.

Every load and store is seen, lanes that are masked off are not counted. The host functions run at the real shape, so they
choose what they would choose on a GPU, but programs of different (batch, head) do the same: only those of the first pair are
interpreted, and all counts are for that pair. Values play no part: the counts of bfloat16, which the interpreter multiplies
wrongly, are those of float16.

`count` is the context manager behind it; `counted` runs it in a process of its own. For kernels in CUDA C++, whose
emulation counts for itself, `from_emulation` makes the same rows of the emulation's report.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .cases import Case, in_other_process


@dataclass
class Work:
    """What one launch did. Bytes asked for (`read`, `written`), the different ones among them by tensor, the summary tokens'
    keys and values read again after the first time (part of `read`), multiply-adds, exponentials."""

    kernel: str
    direction: str
    read: int = 0
    written: int = 0
    distinct_read: dict[str, int] = field(default_factory=dict)
    distinct_written: dict[str, int] = field(default_factory=dict)
    summary_again: int = 0
    macs: int = 0
    exponentials: int = 0

    @property
    def asked(self) -> int:
        return self.read + self.written

    @property
    def distinct(self) -> int:
        """What must cross DRAM once if L2 catches everything that the launch reads again."""
        return sum(self.distinct_read.values()) + sum(self.distinct_written.values())


class _Tensor:
    """How often each element of a tensor argument was read and written."""

    def __init__(self, name: str, tensor) -> None:
        self.name, self.size = name, tensor.element_size()
        self.start = tensor.data_ptr()  # a tensor may be given twice, under two names: the first one counts
        self.end = self.start + self.size * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
        self.reads, self.writes = (np.zeros((self.end - self.start) // self.size, np.int32) for _ in range(2))
        self.touched = 0  # elements beyond this one were not touched

    def distinct(self, counts: np.ndarray) -> int:
        return int(np.count_nonzero(counts[: self.touched])) * self.size


class _Counter:
    def __init__(self) -> None:
        self.launches: list[tuple[Work, list[_Tensor]]] = []

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        work, tensors = self.launches[-1]
        addresses = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        addresses = addresses[np.broadcast_to(mask, addresses.shape).astype(bool)]
        left = addresses.size  # one access may go to several tensors: partial results beside final ones
        for tensor in tensors:
            mine = addresses[(addresses >= tensor.start) & (addresses < tensor.end)]
            if mine.size:
                at = (mine.astype(np.int64) - tensor.start) // tensor.size
                tensor.touched = max(tensor.touched, int(at.max()) + 1)
                np.add.at(tensor.reads if kind == "read" else tensor.writes, at, 1)
                setattr(work, kind, getattr(work, kind) + at.size * tensor.size)
                left -= mine.size
        if left:
            raise ValueError(f"{work.kernel} touches memory that belongs to none of its tensors")


@contextmanager
def count(share: int = 1) -> Iterator[list[tuple[Work, list[_Tensor]]]]:
    """Count what kernels that are interpreted inside of this context do: a list that gets an entry a launch.

    Args:
        share: interpret the first of so many equal parts of each grid only.

    Raises:
        RuntimeError: this process compiles kernels (TRITON_INTERPRET was not set when Triton was imported).
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton compiles in this process; set TRITON_INTERPRET=1 before the kernels are imported")
    counter, builder, executor = _Counter(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_dot")}
    originals |= {name: getattr(builder, name) for name in ("create_exp2", "create_exp")}
    prepare, restore = executor._init_args_hst, executor._restore_args_dev

    def load(self, ptrs, mask, *args, **kwargs):
        counter.touch("read", ptrs.data, mask.data)
        return originals["create_masked_load"](self, ptrs, mask, *args, **kwargs)

    def store(self, ptrs, value, mask, *args, **kwargs):
        counter.touch("written", ptrs.data, mask.data)
        return originals["create_masked_store"](self, ptrs, value, mask, *args, **kwargs)

    def dot(self, a, b, *args, **kwargs):
        counter.launches[-1][0].macs += a.data.size * b.data.shape[-1]
        return originals["create_dot"](self, a, b, *args, **kwargs)

    def exponential(name):
        def run(self, arg):
            counter.launches[-1][0].exponentials += arg.data.size
            return originals[name](self, arg)

        return run

    def launch(self, args, kwargs):
        host = prepare(self, args, kwargs)
        named = {**dict(zip(self.arg_names, host[0], strict=False)), **host[1]}
        tensors = {t.data_ptr(): _Tensor(name, t) for name, t in reversed(named.items()) if hasattr(t, "data_ptr")}
        counter.launches.append((Work(self.fn.__name__, ""), list(tensors.values())))
        if self.grid[0] % share:
            raise ValueError(f"{self.fn.__name__}: {self.grid[0]} programs are not {share} equal parts")
        self.grid = (self.grid[0] // share, *self.grid[1:])
        return host

    patches = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}
    patches |= {name: exponential(name) for name in ("create_exp2", "create_exp")}
    try:
        for name, function in patches.items():
            setattr(builder, name, function)
        executor._init_args_hst = launch
        executor._restore_args_dev = lambda *args: None  # on a CPU it would copy tensors onto themselves
        yield counter.launches
    finally:
        for name, function in originals.items():
            setattr(builder, name, function)
        executor._init_args_hst, executor._restore_args_dev = prepare, restore


def count_case(case: Case) -> list[Work]:
    """The launches of one (batch, head) of a case, forward then backward, in their order.

    Raises:
        ValueError: the programs at the front of the grids are not those of one (batch, head).
    """
    from vidla_kernels import tiles

    tiles.DEFAULT_ARCH = case.arch
    rows = []
    for direction, call in case.host_calls("cpu", "float32" if case.dtype == "float32" else "float16"):
        with count(case.B * case.H) as launches:
            call()
        for work, tensors in launches:
            work.direction = direction
            for t in tensors:
                if n := t.distinct(t.reads):
                    work.distinct_read[t.name] = n
                if n := t.distinct(t.writes):
                    work.distinct_written[t.name] = n
                if t.name == "p_qkv" and case.op == "hierarchical":
                    keys = t.reads.reshape(case.tokens, 3, case.H, case.D)[: case.layout.num_summary, 1:]
                    work.summary_again += int(np.maximum(keys - 1, 0).sum()) * t.size
            rows.append(work)
        name, units = ("p_out", 1) if direction == "fwd" else ("p_dqkv", 3)
        written = sum(work.distinct_written.get(name, 0) for work in rows if work.direction == direction)
        if written != units * case.floor_bytes("fwd", 1) // 4:
            raise ValueError(f"{case}, {direction}: {written} bytes of one head's result were written; a grid's order changed?")
    return rows


def counted(cases: Sequence[Case]) -> list[list[Work]]:
    """`count_case` of each case, in a process that interprets."""
    return [[Work(**row) for row in rows] for rows in in_other_process("benchmarks.cost.traffic", cases, interpret=True)]


def from_emulation(report: dict, case: Case, direction: str) -> list[Work]:
    """The same of a kernel in CUDA C++, from the emulation's report of a call with `case.B` and `case.H`.

    Per (batch, head). The report knows the bytes of a kernel, and the different bytes of a tensor over all kernels of the
    call, which here stand with the kernel that moves most.
    """
    heads = case.B * case.H
    rows = [
        Work(
            name,
            direction,
            read=k["global_read"] // heads,
            written=k["global_written"] // heads,
            macs=k["mma"] * 16 * 8 * 16 // heads,
            exponentials=k["exp2"] // heads,
        )
        for name, k in report["kernels"].items()
    ]
    most = max(rows, key=lambda work: work.asked)
    for name, b in report["buffers"].items():
        if b["distinct_read"]:
            most.distinct_read[name] = b["distinct_read"] // heads
        if b["distinct_written"]:
            most.distinct_written[name] = b["distinct_written"] // heads
    if case.op == "hierarchical":
        layout = case.layout
        keys = 2 * (layout.num_summary - layout.first_key_of_patches) * case.D * 2
        most.summary_again = min((layout.frames - 1) * keys, sum(w.read for w in rows) - sum(most.distinct_read.values()))
    return rows


def main() -> None:
    cases = [Case(**case) for case in json.load(sys.stdin)["cases"]]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        json.dump([[dataclasses.asdict(work) for work in works] for works in pool.map(count_case, cases)], sys.stdout)


if __name__ == "__main__":
    main()
