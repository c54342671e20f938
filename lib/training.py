"""The one training loop of the project: any loss, resumable, seeded per purpose, on CPU, one GPU or several.

A loss is a function `loss(model, *batch, generator, epoch) -> (scalar, logs)`, where `batch` holds one slice of each
training tensor and `logs` maps names to numbers. Teachers are bound with `functools.partial` before they come here.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.utils.code_hash import fingerprint
from lib.utils.device import use_gpu
from lib.utils.files import atomic_path
from lib.utils.progress import tqdm
from lib.utils.seeds import derive_seed, seeded_generator

TrainingLoss = Callable[..., tuple[Tensor, dict[str, Any]]]
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # divided by 10 twice, as Rice et al. 2020 do
}


@dataclass
class Trained:
    """What `train` returns: one dict of numbers per epoch, the last weights, and the best ones by validation."""

    history: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    best_score: float = -math.inf


def hard_label_loss(model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int):
    """Returns the mean cross-entropy on hard labels (`x`: images in [0, 1], `y`: class numbers), the plain loss."""
    return F.cross_entropy(model(x), y), {}


def learning_rate(done: float, lr: float, schedule: str = "cosine", warmup: float = 0.0) -> float:
    """Returns the rate when the share `done` in [0, 1) of all steps is over, after a linear `warmup` share."""
    if done < warmup:
        return lr * (done / warmup)
    return lr * SCHEDULES[schedule](done)


def shift_flip(x: Tensor, *, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Returns images shifted by up to `pad` pixels, each on its own, zeros moving in; half are mirrored if `flip`."""
    n, _, h, w = x.shape
    rows, columns = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator, device=x.device)
    rows = rows + torch.arange(h, device=x.device)
    columns = columns + torch.arange(w, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(n, device=x.device)[:, None, None]
    return F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def make_optimizer(name: str, parameters, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Returns `sgd` (Nesterov), `adam` or `adamw`, fused where torch has it."""
    parameters = list(parameters)
    if name == "sgd":
        options = {"momentum": momentum, "nesterov": momentum > 0}
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, fused=True, **options)
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def check_training(model: nn.Module, tensors: tuple[Tensor, ...], **settings: Any) -> None:
    """Refuses, before any work, settings that could only fail later: ValueError names the value and the valid ones."""
    for name, valid in (("optimizer", OPTIMIZERS), ("schedule", tuple(SCHEDULES))):
        if settings[name] not in valid:
            raise ValueError(f"{name} is {settings[name]!r}: choose one of {', '.join(valid)}")
    for name in ("epochs", "batch_size", "lr"):
        if not settings[name] > 0:
            raise ValueError(f"{name} is {settings[name]}: it must be above 0")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"ema is {settings['ema']}: a decay in [0, 1) is due, 0 for none")
    if not tensors or len({len(t) for t in tensors}) != 1 or not len(tensors[0]):
        raise ValueError(f"training tensors have {[len(t) for t in tensors]} rows: the same number above 0 is due")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: was it frozen as a teacher?")


def train(
    model: nn.Module,
    loss: TrainingLoss,
    tensors: tuple[Tensor, ...],
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: str = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: float = 0.0,
    clip: float = 0.0,
    ema: float = 0.0,
    augment: Callable[..., Tensor] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    seed: int = 0,
    precision: str = "no",
    checkpoint: Path | None = None,
    progress: bool = True,
    name: str = "train",
) -> Trained:
    """Trains `model` in place; it ends with the best weights if `validate` is given, else the last.

    `tensors`: training data of equal length, sliced alike into batches; `augment(x, generator=)` changes the first one.
    `lr` follows `schedule` step by step; `clip` > 0 bounds the gradient norm; `ema` in (0, 1) averages the weights, and
    the average is what is validated and kept. `validate(model)`: higher is better, called in eval mode after each
    epoch; `patience`: epochs without improvement after which training ends. `checkpoint`: a file written after each
    epoch, from which an interrupted call with the same settings and code goes on, bit for bit. `precision`:
    accelerate's "no", "fp16" or "bf16". The global random state is left as it was.

    Raises ValueError for unusable settings and FloatingPointError when the loss is not finite.
    """
    check_training(
        model, tensors, optimizer=optimizer, schedule=schedule, epochs=epochs, batch_size=batch_size, lr=lr, ema=ema
    )
    accelerator = Accelerator(mixed_precision=precision, cpu=not use_gpu())
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    opt = make_optimizer(optimizer, (p for p in model.parameters() if p.requires_grad), lr, momentum, weight_decay)
    model.to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    kept = average.module if average else model
    net, opt = accelerator.prepare(model, opt)
    tensors = tuple(t.to(device) for t in tensors)
    batches = seeded_generator(seed, "batches")
    noise = seeded_generator(seed, f"loss/{rank}", device)
    out = Trained()
    n, first = len(tensors[0]), 0
    per_epoch = math.ceil(n / batch_size)
    settings = (
        epochs,
        batch_size,
        lr,
        optimizer,
        momentum,
        weight_decay,
        schedule,
        warmup,
        clip,
        ema,
        seed,
        precision,
        n,
    )
    key = fingerprint(name, settings, world, [tuple(p.shape) for p in model.parameters()]) if checkpoint else ""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, f"layers/{rank}"))  # dropout draws from the global generator
        if checkpoint and Path(checkpoint).exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["key"] == key:
                model.load_state_dict(state["model"])
                opt.load_state_dict(state["opt"])
                if average:
                    average.load_state_dict(state["average"])
                batches.set_state(state["batches"])
                noise.set_state(state["noise"])
                torch.set_rng_state(state["layers"])
                out, first = Trained(**state["out"]), state["epoch"]
        bar = tqdm(total=epochs, initial=first, desc=name, unit="epoch", disable=not progress or rank > 0)
        for epoch in range(first, epochs):
            if patience is not None and validate and epoch - 1 - out.best_epoch >= patience:
                break
            net.train()
            order = torch.randperm(n, generator=batches)
            totals: dict[str, Tensor] = {}
            for step in range(per_epoch):
                rows = order[step * batch_size : (step + 1) * batch_size][rank::world].to(device)
                batch = [t[rows] for t in tensors]
                if augment is not None:
                    batch[0] = augment(batch[0], generator=noise)
                rate = learning_rate((epoch * per_epoch + step) / (epochs * per_epoch), lr, schedule, warmup)
                for group in opt.param_groups:
                    group["lr"] = rate
                value, logs = loss(net, *batch, generator=noise, epoch=epoch)
                opt.zero_grad()
                if precision == "fp16":
                    accelerator.backward(value)  # scales the loss; it looks for a package each time, so only where due
                else:
                    value.backward()
                if clip:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                opt.step()
                if average:
                    average.update_parameters(model)
                for k, v in {"loss": value, **logs}.items():
                    totals[k] = totals.get(k, 0.0) + torch.as_tensor(v).detach().float() * len(rows)
            seen = len(order[rank::world]) if world > 1 else n
            row = {"epoch": epoch, "lr": rate, **{k: (v / seen).item() for k, v in totals.items()}}
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"{name}: the loss is {row['loss']} in epoch {epoch}: lower lr ({lr}), set clip or check images"
                )
            if validate:
                kept.eval()
                row["score"] = float(validate(kept))
                if row["score"] > out.best_score:
                    out.best_score, out.best_epoch, out.best = row["score"], epoch, deepcopy(kept.state_dict())
            out.history.append(row)
            if checkpoint and accelerator.is_main_process:
                state = {"key": key, "epoch": epoch + 1, "model": model.state_dict(), "opt": opt.state_dict()}
                state |= {"average": average.state_dict() if average else {}, "out": vars(out)}
                state |= {"batches": batches.get_state(), "noise": noise.get_state(), "layers": torch.get_rng_state()}
                with atomic_path(checkpoint) as part:
                    torch.save(state, part)
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in ("loss", "score")})
        bar.close()
    out.last = deepcopy(kept.state_dict())
    model.load_state_dict(out.best or out.last)
    model.eval()
    return out
