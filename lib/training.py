"""The one training loop of the project: any loss, resumable, seeded per purpose, on CPU, one GPU or several.

A loss is a function `loss(model, *batch, generator, epoch) -> (scalar, logs)`, where `batch` holds one slice of each
training tensor and `logs` maps names to numbers. Teachers are bound with `functools.partial` before they come here.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.data import check_images
from lib.utils.code_hash import core_hash
from lib.utils.content_hash import content_hash
from lib.utils.device import use_gpu
from lib.utils.files import check_writable
from lib.utils.precision import autocast_forward
from lib.utils.progress import tqdm
from lib.utils.references import reachable
from lib.utils.seeds import derive_seed, seeded_generator
from lib.utils.training_state import Settings, Trained, TrainingState, find_state, restore_state, save_state
from lib.utils.validation import Number, check_settings, check_value

TrainingLoss = Callable[..., tuple[Tensor, dict[str, Any]]]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # divided by 10 twice, as Rice et al. 2020 do
}


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

    Raises:
        ValueError: for labels that are no classes.
    """
    z = model(x)
    if y.dtype != torch.int64 or (epoch == 0 and not 0 <= y.min() <= y.max() < z.shape[1]):
        raise ValueError(
            f"expected labels of type int64 in [0, {z.shape[1] - 1}], got {y.dtype} in [{y.min():g}, {y.max():g}]"
        )
    return F.cross_entropy(z, y), {}


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


def _check_training(model: nn.Module, functions: dict[str, Any], tensors: Any, settings: Settings) -> None:
    """Refuse, before any work, what could only fail later: the ValueError names the value and what is expected."""
    for name, function in functions.items():
        if not callable(function) and (name == "loss" or function is not None):
            raise ValueError(f"expected {name} to be a function, got {type(function).__name__}")
    if settings.patience and functions["validate"] is None:
        raise ValueError(f"expected validate with patience, got patience {settings.patience} alone: give both")
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) and t.ndim for t in tensors):
        raise ValueError(f"expected a tuple of training tensors, got {type(tensors).__name__}: write (images, labels)")
    if not tensors or len({len(t) for t in tensors}) != 1 or not len(tensors[0]):
        raise ValueError(f"expected training tensors of one length above 0, got lengths {[len(t) for t in tensors]}")
    if tensors[0].ndim == 4:
        check_images(tensors[0])
    for number, tensor in enumerate(tensors):
        if not tensor.isfinite().all():
            raise ValueError(f"expected finite numbers, got NaN or infinity in training tensor {number}")
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


def _loss_value(answer: Any, name: str) -> tuple[Tensor, dict[str, Any]]:
    """Return a loss and its logs after checking them; ValueError for what cannot be minimised or logged."""
    value, logs = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, None)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected loss to return (a scalar tensor, a dict of logs), got {got}")
    if not isinstance(logs, dict):
        raise ValueError(f"{name}: expected loss to return (a scalar tensor, a dict of logs), got no dict")
    if not value.requires_grad:
        raise ValueError(
            f"{name}: expected a loss with a gradient, got none: is it computed under no_grad or detached?"
        )
    return value, logs


def _run_epoch(
    state: TrainingState,
    net: nn.Module,
    loss: TrainingLoss,
    tensors: tuple[Tensor, ...],
    augment: Callable[..., Tensor] | None,
    settings: Settings,
    processes: PartialState,
    name: str,
) -> dict[str, float]:
    """Train for one epoch; return its number, its last learning rate and the means over images of loss and logs."""
    rank, world, device = processes.process_index, processes.num_processes, torch.device(str(processes.device))
    batches = torch.randperm(len(tensors[0]), generator=state.batches).split(settings.batch_size)
    totals: dict[str, Any] = {}
    steps, rate, seen = len(batches), settings.lr, 0
    net.train()
    with autocast_forward(state.model, device, settings.precision):
        for step, batch in enumerate(batches):
            index = batch[rank::world].to(device)
            x, *others = (t[index] for t in tensors)
            if augment is not None:
                x = augment(x, generator=state.noise)
            done = (state.epoch * steps + step) / (settings.epochs * steps)
            rate = learning_rate(done, settings.lr, settings.schedule, settings.warmup)
            value, logs = _loss_value(loss(net, x, *others, generator=state.noise, epoch=state.epoch), name)
            _update_weights(state, value, rate, settings.clip)
            for k, v in {"loss": value, **logs}.items():
                totals[k] = totals.get(k, 0.0) + torch.as_tensor(v).detach().float() * len(index)
            seen += len(index)
    row = {"epoch": state.epoch, "lr": rate, **{k: (v / seen).item() for k, v in totals.items()}}
    weights = all(p.isfinite().all() for p in state.model.parameters())
    if not (math.isfinite(row["loss"]) and weights):
        got = "weights that are not" if math.isfinite(row["loss"]) else row["loss"]
        raise FloatingPointError(
            f"{name}: expected a finite loss, got {got} in epoch {state.epoch}: lower lr or set clip"
        )
    return row


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
        checkpoint: file written after each epoch; the same call goes on there, on a CPU bit for bit: the same initial
            weights, loss with all that is bound to it, tensors, functions, settings and code. A broken file or that of
            another training is renamed, with a line on stderr; the other training finds its own again.
        progress: show a bar.
        name: of the bar, and in messages.

    Returns:
        The history (`epoch`, `lr`, mean `loss`, logs and `score` of each epoch), last and best weights.

    Raises:
        ValueError: if a setting is unusable, tensors differ in length, images are outside [0, 1], the model has nothing
            to train, `loss` returns no scalar with a gradient or `validate` no finite number.
        Unhashable: a TypeError, with `checkpoint`, if what decides the training cannot be hashed.
        FloatingPointError: if the mean loss of an epoch or a weight after it is not finite.

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
    values = dict(epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum, seed=seed)
    values |= dict(weight_decay=weight_decay, schedule=schedule, warmup=warmup, clip=clip, ema=ema, patience=patience)
    settings = Settings(**check_settings(Settings, values | dict(precision=precision)))
    functions = {"loss": loss, "augment": augment, "validate": validate}
    _check_training(model, functions, tensors, settings)
    processes = PartialState(cpu=not use_gpu())
    device, rank = torch.device(str(processes.device)), processes.process_index
    path, key = Path(checkpoint) if checkpoint else None, ""
    if path:
        check_writable(path)
        facts = {
            "model": model,
            "tensors": tensors,
            **functions,
            "settings": vars(settings),
            "torch": torch.__version__,
        }
        facts |= {"processes": processes.num_processes, "device": device.type, "code": core_hash()}
        key = content_hash(facts, "training", sharing=True)[:32]
    model.to(device)
    state = TrainingState(
        model,
        make_optimizer(model, settings),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None,
        seeded_generator(seed, "batches"),
        seeded_generator(seed, f"loss/{rank}", device),
        [g for g in reachable([model, *functions.values()]) if isinstance(g, torch.Generator)] if path else [],
    )
    net = DistributedDataParallel(model) if processes.num_processes > 1 else model
    tensors = tuple(t.to(device) for t in tensors)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autocast(device.type, enabled=False),  # of the caller: `precision` is this call's
    ):
        torch.manual_seed(derive_seed(seed, f"layers/{rank}"))  # dropout draws from the global generator
        if path:
            with processes.main_process_first():
                saved = find_state(path, key)
            if saved:
                restore_state(saved, state, processes)
        result = state.result
        bar = tqdm(total=epochs, initial=state.epoch, desc=name, unit="epoch", disable=not progress or rank > 0)
        while state.epoch < epochs:
            if patience is not None and validate and state.epoch - 1 - result.best_epoch >= patience:
                break
            row = _run_epoch(state, net, loss, tensors, augment, settings, processes, name)
            if validate:
                row["score"] = check_value(f"{name}: validate's score", validate(state.validated.eval()), Number)
                if row["score"] > result.best_score:
                    result.best_score, result.best_epoch = row["score"], state.epoch
                    result.best = deepcopy(state.validated.state_dict())
            result.history.append(row)
            state.epoch += 1
            if path:
                save_state(path, key, state, processes)
            bar.update()
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k in ("loss", "score")})
        bar.close()
    result.last = deepcopy(state.validated.state_dict())
    model.eval().load_state_dict(result.best or result.last)
    return result
