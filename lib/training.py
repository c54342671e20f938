"""The one training loop of the project: any loss, resumable, seeded per purpose, on CPU, one GPU or several.

A loss is a function `loss(model, *batch, generator, epoch) -> (scalar, logs)`, where `batch` holds one slice of each
training tensor and `logs` maps names to numbers. Teachers are bound with `functools.partial` before they come here.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.utils.code_hash import fingerprint
from lib.utils.device import use_gpu
from lib.utils.files import atomic_path
from lib.utils.precision import PRECISIONS, autocast_forward
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


class Settings(NamedTuple):
    """The numbers and names that decide a training: checked before it begins and part of its checkpoint's key."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    schedule: str
    warmup: float
    clip: float
    ema: float
    seed: int
    precision: str


@dataclass
class TrainingState:
    """Everything that changes from step to step, and so everything that a checkpoint holds."""

    model: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    batches: torch.Generator
    noise: torch.Generator
    result: Trained = field(default_factory=Trained)
    epoch: int = 0

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and saved: the averaged one if there is one."""
        return self.average.module if self.average else self.model


def hard_label_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator, epoch: int
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the mean cross-entropy on hard labels, the plain loss.

    Args:
        model: the classifier, which returns logits (n, k).
        x: images (n, c, h, w), in [0, 1].
        y: class numbers (n,).
        generator, epoch: not used.

    Returns:
        The loss, and no logs.
    """
    return F.cross_entropy(model(x), y), {}


def learning_rate(done: float, lr: float, schedule: str = "cosine", warmup: float = 0.0) -> float:
    """Compute the learning rate of one step.

    Args:
        done: share of all steps that are over, in [0, 1).
        lr: the rate that the schedule begins with.
        schedule: a key of `SCHEDULES`.
        warmup: share of all steps over which the rate first rises linearly from 0.

    Returns:
        The rate.
    """
    if done < warmup:
        return lr * (done / warmup)
    return lr * SCHEDULES[schedule](done)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build `sgd` (Nesterov), `adam` or `adamw` over the trainable weights, fused where torch has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.momentum > 0, **shared)
    return (torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam)(parameters, **shared)


def _check_training(model: nn.Module, tensors: tuple[Tensor, ...], settings: Settings) -> None:
    """Refuse, before any work, what could only fail later: the ValueError names the value and the valid ones."""
    choices = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}
    for name, valid in choices.items():
        if getattr(settings, name) not in valid:
            raise ValueError(f"expected {name} to be one of {', '.join(valid)}, got {getattr(settings, name)!r}")
    for name in ("epochs", "batch_size", "lr"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"expected {name} above 0, got {getattr(settings, name)}")
    if not 0 <= settings.ema < 1:
        raise ValueError(f"expected ema in [0, 1), 0 for no averaging, got {settings.ema}")
    if not tensors or len({len(t) for t in tensors}) != 1 or not len(tensors[0]):
        raise ValueError(f"expected training tensors of one length above 0, got lengths {[len(t) for t in tensors]}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("expected a model with trainable parameters, got none: was it frozen as a teacher?")


def _update_weights(state: TrainingState, value: Tensor, rate: float, clip: float) -> None:
    """Take one optimizer step down the gradient of `value`, then update the averaged weights."""
    for group in state.opt.param_groups:
        group["lr"] = rate
    state.opt.zero_grad()
    state.scaler.scale(value).backward()
    if clip:
        state.scaler.unscale_(state.opt)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip)
    state.scaler.step(state.opt)
    state.scaler.update()
    if state.average:
        state.average.update_parameters(state.model)


def _run_epoch(
    state: TrainingState,
    net: nn.Module,
    loss: TrainingLoss,
    tensors: tuple[Tensor, ...],
    augment: Callable[..., Tensor] | None,
    settings: Settings,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Train for one epoch; return its number, its last learning rate and the means over images of loss and logs."""
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = torch.randperm(len(tensors[0]), generator=state.batches).split(settings.batch_size)
    totals: dict[str, Any] = {}
    steps, rate, seen = len(batches), settings.lr, 0
    net.train()
    with autocast_forward(state.model, accelerator.device, settings.precision):
        for step, batch in enumerate(batches):
            index = batch[rank::world].to(accelerator.device)
            x, *others = (t[index] for t in tensors)
            if augment is not None:
                x = augment(x, generator=state.noise)
            done = (state.epoch * steps + step) / (settings.epochs * steps)
            rate = learning_rate(done, settings.lr, settings.schedule, settings.warmup)
            value, logs = loss(net, x, *others, generator=state.noise, epoch=state.epoch)
            _update_weights(state, value, rate, settings.clip)
            for k, v in {"loss": value, **logs}.items():
                totals[k] = totals.get(k, 0.0) + torch.as_tensor(v).detach().float() * len(index)
            seen += len(index)
    return {"epoch": state.epoch, "lr": rate, **{k: (v / seen).item() for k, v in totals.items()}}


def _save_checkpoint(path: Path, key: str, state: TrainingState) -> None:
    """Write the whole state of a training, atomically; `key` says to which training it belongs."""
    saved: dict[str, Any] = {"key": key, "epoch": state.epoch, "result": vars(state.result)}
    saved |= {name: getattr(state, name).state_dict() for name in ("model", "opt", "scaler")}
    saved |= {"average": state.average.state_dict() if state.average else {}, "layers": torch.get_rng_state()}
    saved |= {"batches": state.batches.get_state(), "noise": state.noise.get_state()}
    with atomic_path(path) as part:
        torch.save(saved, part)


def _load_checkpoint(path: Path, key: str, state: TrainingState) -> None:
    """Bring `state` and the global generator to where a checkpoint of this `key` left them; ignore any other file."""
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
    if saved.get("key") != key:
        return
    for name in ("model", "opt", "scaler"):
        getattr(state, name).load_state_dict(saved[name])
    if state.average:
        state.average.load_state_dict(saved["average"])
    state.batches.set_state(saved["batches"])
    state.noise.set_state(saved["noise"])
    torch.set_rng_state(saved["layers"])
    state.result, state.epoch = Trained(**saved["result"]), saved["epoch"]


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
    """Train `model` in place; it ends with the best weights if `validate` is given, else the last, in eval mode.

    The global random state is left as it was.

    Args:
        model: the network; moved to the GPU where there is one.
        loss: `loss(model, *batch, generator, epoch) -> (scalar, logs)`.
        tensors: training data of equal length, sliced alike into batches.
        epochs: passes over the data.
        batch_size: examples per step, over all processes together.
        lr: learning rate, which follows `schedule` step by step.
        optimizer: "adam", "adamw" or "sgd" (Nesterov).
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: "constant", "cosine" or "step" (a tenth after 1/2 and after 3/4 of the steps).
        warmup: share of the steps over which the rate rises from 0.
        clip: largest norm of the gradient; 0: not clipped.
        ema: decay in [0, 1) of averaged weights, which then are validated and returned; 0: none.
        augment: `augment(x, generator=)` changes the first tensor of each batch.
        validate: `validate(model) -> float`, higher is better; called in eval mode and float32 after each epoch.
        patience: epochs without a better score after which training ends.
        seed: of batches, noise and dropout; initial weights are the caller's.
        precision: of the forward passes of this call, "no" (float32), "fp16" (with a scaled loss) or "bf16".
        checkpoint: file written after each epoch; the same call with the same code goes on there, on a CPU bit for bit.
        progress: show a bar.
        name: of the bar, and in messages.

    Returns:
        The history (`epoch`, `lr`, mean `loss`, logs and `score` of each epoch), last and best weights.

    Raises:
        ValueError: if a setting is unusable, tensors differ in length or the model has nothing to train.
        FloatingPointError: if the mean loss of an epoch is not finite.

    Examples:
        Train with a loss of one's own:

        >>> _ = torch.manual_seed(0)
        >>> x, model = torch.linspace(0, 1, 8)[:, None], torch.nn.Linear(1, 1)
        >>> def squared_error(model, x, *, generator, epoch):
        ...     return (model(x) - (2 * x + 1)).square().mean(), {}
        >>> result = train(model, squared_error, (x,), epochs=200, lr=0.1, progress=False)
        >>> bool(result.history[-1]["loss"] < 1e-3)
        True
    """
    settings = Settings(
        epochs, batch_size, lr, optimizer, momentum, weight_decay, schedule, warmup, clip, ema, seed, precision
    )
    _check_training(model, tensors, settings)
    accelerator = Accelerator(mixed_precision="no", cpu=not use_gpu())  # its precision would be the whole process's
    device, rank = accelerator.device, accelerator.process_index
    model.to(device)
    state = TrainingState(
        model,
        make_optimizer(model, settings),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None,
        seeded_generator(seed, "batches"),
        seeded_generator(seed, f"loss/{rank}", device),
    )
    net = accelerator.prepare(model)
    tensors = tuple(t.to(device) for t in tensors)
    facts = (name, settings, len(tensors[0]), accelerator.num_processes, [tuple(p.shape) for p in model.parameters()])
    key = fingerprint(*facts) if checkpoint else ""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, f"layers/{rank}"))  # dropout draws from the global generator
        if checkpoint:
            _load_checkpoint(Path(checkpoint), key, state)
        result = state.result
        bar = tqdm(total=epochs, initial=state.epoch, desc=name, unit="epoch", disable=not progress or rank > 0)
        while state.epoch < epochs:
            if patience is not None and validate and state.epoch - 1 - result.best_epoch >= patience:
                break
            row = _run_epoch(state, net, loss, tensors, augment, settings, accelerator)
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"{name}: expected a finite loss, got {row['loss']} in epoch {state.epoch}: lower lr or set clip"
                )
            if validate:
                row["score"] = float(validate(state.validated.eval()))
                if row["score"] > result.best_score:
                    result.best_score, result.best_epoch = row["score"], state.epoch
                    result.best = deepcopy(state.validated.state_dict())
            result.history.append(row)
            state.epoch += 1
            if checkpoint and accelerator.is_main_process:
                _save_checkpoint(Path(checkpoint), key, state)
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in ("loss", "score")})
        bar.close()
    result.last = deepcopy(state.validated.state_dict())
    model.eval().load_state_dict(result.best or result.last)
    return result
