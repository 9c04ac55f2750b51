"""Where a run tells how it goes: log.jsonl (every step), TensorBoard, and a bar on a terminal or plain lines elsewhere.

Rank 0 alone holds a RunLog. log.jsonl has one object for each step, in order, each flushed when the step is done; what
a resumed run will do again is cut off first, so no step is there twice. Fields: docs/training.md.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

TENSORBOARD = ("loss", "grad_norm", "lr", "logit_scale", "clips_per_s", "data_wait", "tflops_per_s", "top1", "top5")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole records of a log; a line torn by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def cut_log(path: Path, step: int) -> None:
    """Leave the records up to `step`, in one rename."""
    kept = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
    shorter = path.with_name(f".{path.name}.shorter")
    shorter.write_text("".join(kept))
    os.replace(shorter, path)


class RunLog:
    """The log of one run.

    Args:
        folder: the run's output.
        start: updates already done; later records of an earlier process are cut.
        steps: updates of the whole run.
        every: steps between two plain lines.
    """

    def __init__(self, folder: Path, start: int, steps: int, every: int, stream: TextIO = sys.stdout) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps, self.every, self.stream = steps, every, stream
        self.began, self.start = time.monotonic(), start
        cut_log(folder / "log.jsonl", start)
        self.file = (folder / "log.jsonl").open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.bar = None
        if stream.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=steps, completed=start)
            self.bar.start()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.board.close()
        self.file.close()

    def say(self, sentence: str) -> None:
        """A line for whoever watches."""
        if self.bar is not None:
            self.bar.console.print(sentence, highlight=False, markup=False)
        else:
            print(sentence, file=self.stream, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """One step's record, to all places."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        step = record["step"]
        for name, value in record.items():
            if name in TENSORBOARD or "R@" in name or "MdR" in name or "MnR" in name:
                self.board.add_scalar(name, value, step)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self._line(record))
        elif step % self.every == 0 or step in (1, self.steps):
            left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {self._line(record)}  {left:.0f} s left")

    @staticmethod
    def _line(r: dict[str, Any]) -> str:
        return (
            f"loss {r['loss']:.4f}  scale {r['logit_scale']:.1f}  norm {r['grad_norm']:.2f}  lr {r['lr']:.2e}  "
            f"{r['clips_per_s']:.1f} clips/s  data {r['data_wait']:.0%}  {r['tflops_per_s']:.2f} TFLOP/s"
        )
