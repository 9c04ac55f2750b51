"""Runs of the trainer in processes of their own, for test_train.py: killed, stopped, on two ranks.

A fork server imports torch once and each run is forked from it, so a run costs a second, not the ten of a new process.
The children are clean: the server has never computed anything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
}
RECIPE = """
steps = 8
[model]
name = "{folder}/tiny.json"
frames = 4
levels = 2
tokens_per_level = 2
[data]
train = "{folder}/train"
test = "{folder}/test"
batch_size = 8
flip = false
workers = 0
[optim]
lr = 3e-4
lr_end = 1e-5
warmup = 0.2
[run]
precision = "fp32"
save_every = 2
log_every = 2
"""
HEAVY = ["vidla.train", "vidla.loader", "vidla.model", "vidla.checkpoint", "vidla.retrieval", "vidla.progress", "vidla.digits"]
HEAVY += ["vidla.optim", "vidla.tokenizer", "torch.utils.tensorboard", "torch.utils.flop_counter", "open_clip.tokenizer"]
HEAVY += ["torch.nn.parallel", "vidla_kernels", "torch._dynamo"]  # _dynamo: imported by DDP

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([*HEAVY, __name__])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(argv: list[str], said: Path, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)  # a group of its own, which a test may signal
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    from vidla.train import main

    try:
        code = main(argv)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """One process of the trainer."""

    def __init__(self, argv: list[str], said: Path, environment: dict[str, str] | None = None) -> None:
        self.said_path, self.argv = said, argv
        self.process = _forks.Process(target=_child, args=(argv, said, environment or {}))
        self.process.start()

    def wait(self, seconds: float = 90) -> int:
        """Its exit code; negative: the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.argv} still runs after {seconds} s: {self.said()}")
        return self.process.exitcode

    def said(self) -> str:
        return self.said_path.read_text() if self.said_path.exists() else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Workshop:
    """A folder with tiny shards, a tiny model and a recipe; makes runs."""

    def __init__(self, folder: Path) -> None:
        from vidla.digits import generate

        self.folder, self.count = folder, 0
        generate(folder / "train", "train", clips=20, seed=1)
        generate(folder / "test", "test", clips=6, seed=1)
        (folder / "tiny.json").write_text(json.dumps(TINY))
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE.format(folder=folder))

    def start(self, output: str, *options: str, environment: dict[str, str] | None = None) -> Run:
        self.count += 1
        argv = ["--recipe", str(self.recipe), "--output", str(self.folder / output), *options]
        return Run(argv, self.folder / f"said-{self.count}.txt", environment)

    def run(self, output: str, *options: str, code: int = 0) -> str:
        """A run to its end, which must be `code`; what it said."""
        run = self.start(output, *options)
        found = run.wait()
        assert found == code, (found, run.said())
        return run.said()

    def run_on_ranks(self, size: int, output: str, *options: str) -> str:
        """The same on several ranks, with torchrun's variables; what rank 0 said."""
        port = str(free_port())
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        places = [{"RANK": str(r), "LOCAL_RANK": str(r)} | shared for r in range(size)]
        runs = [self.start(output, *options, environment=place) for place in places]
        codes = [run.wait() for run in runs]
        assert codes == [0] * size, [run.said() for run in runs]
        return runs[0].said()

    def log(self, output: str) -> list[dict]:
        path = self.folder / output / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def lines(self, output: str) -> int:
        path = self.folder / output / "log.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for_line(self, output: str, line: int, run: Run, seconds: float = 90) -> None:
        """Until the log has so many lines, or the run is over."""
        end = time.monotonic() + seconds
        while self.lines(output) < line and run.process.is_alive():
            if time.monotonic() > end:
                raise TimeoutError(f"no line {line} in the log after {seconds} s: {run.said()}")
            time.sleep(0.002)
