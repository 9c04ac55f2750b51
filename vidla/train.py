"""Train VidLA: `torchrun -m vidla.train`, or `python -m vidla.train` for one process. See --help and docs/training.md.

The file reads top to bottom: what a step does (`backward`), the run (`train`), what it needs before it can start, and how
it ends. Every rank runs the same loop; the global batch, its order and its loss do not depend on their number. The state
of a run is its weights, its optimiser and one number, the step (vidla/checkpoint.py).
"""

from __future__ import annotations

import dataclasses as dc
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, UsageError, identity, load, to_toml

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .distributed import Ranks
    from .loader import Batch
    from .model import VidLA
    from .shards import ShardSet


class RunError(Exception):
    """The run cannot go on; the message says why and what to do. Exit code 1."""


# ---- A step --------------------------------------------------------------------------------------------------------


def encode(model: Any, batch: Batch, autocast: torch.autocast) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, E) of video, caption and subtitle, fp32 at least. Only texts that exist are encoded; the others are zero
    rows, which the loss leaves out (docs/decisions.md, 8)."""
    import torch

    texts, has = torch.cat([batch.caption, batch.subtitle]), torch.cat([batch.has_caption, batch.has_subtitle])
    rows = has.nonzero().flatten()
    if not len(rows):
        rows = rows.new_zeros(1)  # every rank must give the text tower a gradient, here of zeros: DDP waits for it
    with autocast:
        video, encoded = model(batch.video, texts[rows])
    video, encoded = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (video, encoded))
    caption, subtitle = encoded.new_zeros(len(texts), encoded.shape[1]).index_copy(0, rows, encoded).chunk(2)
    return video, caption, subtitle


def backward(model: Any, batch: Batch, micro_batch: int, autocast: torch.autocast) -> Tensor:
    """Add the gradient of the loss over the global batch to the parameters' and return that loss.

    Args:
        model: a VidLA, alone or in DistributedDataParallel.
        batch: this rank's share, on the model's device.
        micro_batch: most clips encoded at once. Where the share is larger, a contrastive loss cannot be summed over parts:
            features of all parts are computed without a graph, the loss gives their gradients, and each part is encoded
            again to carry its own gradients on to the weights. Same gradients as at once, for one more forward.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from .loss import contrastive_loss

    bare = model.module if isinstance(model, DistributedDataParallel) else model
    texts = dict(has_caption=batch.has_caption, has_subtitle=batch.has_subtitle, source=batch.source)
    if len(batch.keys) <= micro_batch:
        loss = contrastive_loss(*encode(model, batch, autocast), bare.logit_scale.exp(), **texts)
        loss.backward()
        return loss.detach()

    parts = [slice(start, start + micro_batch) for start in range(0, len(batch.keys), micro_batch)]
    with torch.no_grad():
        features = zip(*(encode(bare, rows_of(batch, part), autocast) for part in parts), strict=True)
        features = [torch.cat(feature) for feature in features]
    leaves = [feature.requires_grad_() for feature in (*features, bare.logit_scale.detach().clone())]
    loss = contrastive_loss(*leaves[:3], leaves[3].exp(), **texts)
    loss.backward()
    for part in parts:
        last = part is parts[-1]
        with nullcontext() if bare is model or last else model.no_sync():  # DDP averages once, after the last part
            outputs = [*encode(model, rows_of(batch, part), autocast)]
            gradients = [leaf.grad[part] for leaf in leaves[:3]]
            if last:
                outputs, gradients = [*outputs, bare.logit_scale], [*gradients, leaves[3].grad]
            torch.autograd.backward(outputs, gradients)
    return loss.detach()


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A part of a batch."""
    return dc.replace(batch, **{field.name: getattr(batch, field.name)[rows] for field in dc.fields(batch)})


# ---- The run -------------------------------------------------------------------------------------------------------


def train(config: Config, ranks: Ranks) -> int:
    """The whole run; returns the exit code (0, or 128 + the number of the signal that stopped it)."""
    import torch

    from . import checkpoint, classification, retrieval
    from .loader import ClipLoader
    from .model import create_model
    from .optim import create_optimizer, learning_rate, set_learning_rate
    from .progress import RunLog
    from .tokenizer import get_tokenizer

    device, output = ranks.device, Path(config.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file: give a folder")
    train_set, test_set = open_data(config, ranks)
    steps = config.steps or math.ceil(config.epochs * len(train_set) / config.data.batch_size)
    share = share_of_batch(config.data.batch_size, ranks.world_size)
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    torch.manual_seed(config.seed)
    with usage_errors():
        layout = {name: value for name, value in dc.asdict(config.model).items() if name not in ("name", "pretrained")}
        bare = create_model(config.model.name, starting_weights(config.model.pretrained), **layout).to(device)
        tokenizer = get_tokenizer(config.model.name)
    check_backend(config, bare, device, torch.bfloat16 if bf16 else torch.float32)
    add_gradient, evaluate = backward, retrieval.evaluate
    if config.model.classes:
        add_gradient, evaluate = classification.backward, classification.evaluate
        classification.freeze_texts(bare)
    optimizer = create_optimizer(bare, config.optim)
    who = identity(config) | {"data.train's content": train_set.fingerprint, "data.test's content": test_set.fingerprint}
    resumed = checkpoint_to_resume(config)
    start, record = checkpoint.load(resumed, bare, optimizer, who) if resumed else (0, {})
    with ranks.main_first():
        prepare_output(config, resumed)
    model = torch.nn.parallel.DistributedDataParallel(bare) if ranks.world_size > 1 else bare

    clips = dict(frames=config.model.frames, image_size=bare.visual.image_size, workers=config.data.workers, device=device)
    clips |= dict(stride=config.data.stride if config.data.sampling == "dense" else None)
    augment = dict(crop_scales=config.data.crop_scales, flip=config.data.flip, seed=config.seed, start=start)
    whose = dict(rank=ranks.rank, world_size=ranks.world_size)
    loader = ClipLoader(train_set, tokenizer, train=True, batch_size=share, **clips, **augment, **whose)
    held_out = ClipLoader(test_set, tokenizer, train=False, batch_size=min(share, 64), **clips)
    batches = iter(loader)
    flops = 3 * config.data.batch_size * forward_flops(bare)  # backward: twice the forward's products
    log = RunLog(output, start, steps, config.run.log_every) if ranks.is_main else None
    stop = Stop()
    with log or nullcontext(), stop:
        if log:
            (output / "config.toml").write_text(to_toml(config))
            log.say(introduction(config, ranks, bare, train_set, steps, start, resumed))

        for step in range(start, steps):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            rate = learning_rate(step, steps, config.optim)
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
            loss = add_gradient(model, batch, config.run.micro_batch or share, autocast)
            norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), config.optim.clip)
            loss, norm, scale = torch.stack([loss, norm, bare.logit_scale.detach().exp()]).tolist()  # waits for the GPU
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise RunError(not_finite(loss, norm, step + 1, loader.global_keys(step), output, ranks))
            optimizer.step()
            bare.clamp_temperature()
            seconds = time.perf_counter() - began

            done, stopped = step + 1, stop.on_any_rank(device)
            last = done == steps
            record = {
                "step": done,
                "loss": loss,
                "grad_norm": norm,
                "lr": rate,
                "logit_scale": scale,
                "clips_per_s": config.data.batch_size / seconds,
                "data_wait": waited / seconds,
                "tflops_per_s": flops / seconds / 1e12,
            }
            if log:
                record["keys_hash"] = keys_hash(loader.global_keys(step))
                evaluates = last or (config.run.eval_every and done % config.run.eval_every == 0 and not stopped)
                saves = last or stopped or done % config.run.save_every == 0
                if (evaluates or saves) and (bad := not_finite_weights(bare)):
                    raise RunError(bad)
                if evaluates:
                    record |= evaluate(bare, held_out, autocast)
                log.step(record)
                if saves:
                    checkpoint.save(output / "checkpoints", done, bare, optimizer, who, record, config.run.keep)
            if stopped and not last:
                if log:
                    log.say(f"stopped by {signal.Signals(stopped).name} after step {done}: the same command goes on from here")
                return 128 + stopped

    if ranks.is_main and not config.model.classes:
        print(
            f"final: step={record['step']} loss={record['loss']:.4f} t2v_R@1={record['t2v_R@1']:.4f} "
            f"v2t_R@1={record['v2t_R@1']:.4f} chance={record['chance']:.4f}",
            flush=True,
        )
    elif ranks.is_main:
        print(
            f"final: step={record['step']} loss={record['loss']:.4f} top1={record['top1']:.4f} "
            f"top5={record['top5']:.4f} chance={record['chance']:.4f}",
            flush=True,
        )
    ranks.barrier()  # the others wait for the evaluation, or torchrun would take their leaving for a failure
    return 0


# ---- Before it can start -------------------------------------------------------------------------------------------


def open_data(config: Config, ranks: Ranks) -> tuple[ShardSet, ShardSet]:
    """The training and the held-out clips; 'digits' is generated first where it is not there yet."""
    from .digits import make_default
    from .shards import ShardSet

    folders = [config.data.train, config.data.test]
    if "digits" in folders:
        with ranks.main_first():
            digits = make_default()
        folders = [str(made) if name == "digits" else name for name, made in zip(folders, digits, strict=True)]
    with usage_errors():
        train_set, test_set = (ShardSet(folder) for folder in folders)
        if config.model.classes:
            for clips in (train_set, test_set):
                clips.check_labels(config.model.classes)
        elif not test_set.has_caption.any():
            raise UsageError(f"{folders[1]}: no held-out clip has a caption: retrieval needs them; give another --data.test")
    return train_set, test_set


def starting_weights(pretrained: str) -> str | None:
    """What create_model takes: a run's folder stands for its newest checkpoint, an empty text for random weights."""
    from .checkpoint import latest

    return str(latest(Path(pretrained) / "checkpoints") or pretrained) if pretrained else None


def share_of_batch(batch_size: int, world_size: int) -> int:
    """Clips of a global batch on each rank."""
    if batch_size % world_size:
        raise UsageError(f"--data.batch-size {batch_size} cannot be shared by {world_size} processes: give a multiple of them")
    return batch_size // world_size


def check_backend(config: Config, model: VidLA, device: torch.device, dtype: torch.dtype) -> None:
    """UsageError where the attention backend asked for cannot serve this model here; better now than in the first step."""
    from vidla_kernels.backends import Case, choose

    attention = model.visual.transformer.resblocks[0].attn
    try:
        head_dim = attention.out_proj.in_features // attention.heads
        choose(config.model.backend, Case(device, dtype, head_dim, model.layout, "hierarchical"))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--model.backend {config.model.backend}: {error}") from None


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that --resume asks for, or None to start afresh."""
    from .checkpoint import latest

    if config.resume == "never":
        return None
    if config.resume == "auto":
        return latest(Path(config.output) / "checkpoints")
    path = Path(config.resume)
    if not path.is_dir():
        raise UsageError(f"--resume {config.resume}: no such folder; give auto, never, or the path of a checkpoint")
    return latest(path / "checkpoints") or latest(path) or path


def prepare_output(config: Config, resumed: Path | None) -> None:
    """Make the output folder. What an earlier run left there is never overwritten: a fresh start, or one from another
    run's checkpoint, moves it to OUTPUT/previous-N; going back to an older checkpoint moves the newer ones there."""
    output = Path(config.output)
    another = resumed is not None and resumed.resolve().parent != (output / "checkpoints").resolve()
    if config.resume == "never" or another:
        set_aside(output, [output / name for name in ("checkpoints", "log.jsonl", "config.toml", "tensorboard")])
    elif resumed is not None:  # its successors belong to a past that this run leaves; --resume auto must not find them
        set_aside(output, [path for path in resumed.resolve().parent.glob("step-*") if path.name > resumed.name])
    output.mkdir(parents=True, exist_ok=True)


def set_aside(output: Path, paths: list[Path]) -> None:
    """Move those of an earlier run's files that exist to OUTPUT/previous-N, N the first that is free."""
    earlier = [path for path in paths if path.exists()]
    if earlier:
        number = 1
        while (folder := output / f"previous-{number}").exists():
            number += 1
        folder.mkdir()
        for path in earlier:
            os.rename(path, folder / path.name)


def forward_flops(model: VidLA) -> float:
    """Floating-point operations of encoding one clip and its two texts, counted on a copy without storage. An estimate:
    matrix products only, the attention's as the portable backend does it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        copy = type(model)(**{**model.config, "backend": "portable"})
        size, frames = copy.visual.image_size, copy.layout.frames
        video, texts = torch.zeros(1, frames, 3, size, size), torch.zeros(2, copy.context_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            copy.encode_video(video)
            if copy.head is None:  # classification encodes no text
                copy.encode_text(texts)
    return float(counter.get_total_flops())


def introduction(
    config: Config, ranks: Ranks, model: VidLA, train_set: ShardSet, steps: int, start: int, resumed: Path | None
) -> str:
    """What is about to happen, in two lines."""
    parameters = sum(p.numel() for p in model.parameters())
    begins = f"resumes {resumed} after step {start}" if resumed else "starts afresh"
    if start == steps:
        begins += ", which is the last: nothing is left to train (--steps, --output or --resume never for another run)"
    return (
        f"{config.recipe}: {config.model.name}, {parameters / 1e6:.1f} M parameters, {len(train_set)} clips, {steps} steps of "
        f"{config.data.batch_size} clips on {ranks.world_size} x {ranks.device.type}\n{config.output}: {begins}"
    )


# ---- Odds and ends of a run ----------------------------------------------------------------------------------------


def keys_hash(keys: list[str]) -> str:
    """16 hexadecimal digits of the SHA-256 of the keys, each ended by a newline."""
    import hashlib

    return hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()[:16]


def not_finite_weights(model: VidLA) -> str:
    """What to say of weights that an update has made infinite or NaN, although its gradient was finite; '' if all are fine."""
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    return f"the update left {len(bad)} tensors of weights that are not finite ({bad[0]}, ...): lower --optim.lr" if bad else ""


def not_finite(loss: float, norm: float, step: int, keys: list[str], output: Path, ranks: Ranks) -> str:
    """What to say of a step without a finite loss or gradient; its sample keys are also left in a file."""
    path = output / f"not-finite-step-{step}.json"
    if ranks.is_main:
        path.write_text(json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}))
    few = ", ".join(keys[:64]) + (f" and {len(keys) - 64} more" if len(keys) > 64 else "")
    return (
        f"loss {loss}, gradient norm {norm} at step {step}: stopped before the update; what checkpoints there are, are good; "
        f"lower --optim.lr, or look at the batch, in {path}: {few}"
    )


class Stop:
    """SIGTERM and SIGINT (Ctrl-C) let the step finish; a second one of the same kind acts at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Stop:
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def on_any_rank(self, device: torch.device) -> int:
        """The signal that any rank has got, 0 for none; the same on all, so that they stop after the same step."""
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return self.number
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number.item())


class usage_errors:
    """What the library refuses while a run is set up is the user's choice: ValueError and a missing file become UsageError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, (ValueError, FileNotFoundError)):
            raise UsageError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """The command: returns the exit code and says errors on stderr, in one line."""
    try:
        config = load(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        return complain(error, 2)

    # CPU threads that wait for each other sleep instead of spinning. Read when torch is loaded. Beside two busy processes
    # on 2 cores the default recipe runs at 84 clips/s so, at 30 with spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from . import distributed
    from .shards import ShardError

    try:
        ranks = distributed.setup()
    except (ValueError, RuntimeError) as error:  # torchrun's variables, or more processes than GPUs
        return complain(error, 2)
    try:
        return train(config, ranks)
    except UsageError as error:
        return complain(error, 2, ranks)
    except torch.OutOfMemoryError as error:
        now = config.run.micro_batch or "the whole share of a process"
        return complain(f"out of GPU memory: lower --run.micro-batch (now {now}). {error}", 1)
    except distributed.MainFailed:  # rank 0 has said why
        return 1
    except RunError as error:
        return complain(error, 1, ranks)
    except ShardError as error:  # of one rank alone; behind a loader process its sentence ends a traceback
        return complain(str(error).strip().splitlines()[-1], 1)
    except OSError as error:
        return complain(error, 1)
    except KeyboardInterrupt:  # before the first step; later Stop sees to it
        return complain("interrupted before there was anything to save", 128 + signal.SIGINT)
    finally:
        distributed.teardown()


def complain(error: object, code: int, ranks: Ranks | None = None) -> int:
    """One line on stderr, from rank 0 where all ranks have the same to say. Returns `code`."""
    if ranks is None or ranks.is_main:
        print("vidla.train: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
