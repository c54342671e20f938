"""The state of a training, and how it is saved and found again, on one process or several."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lib.utils.checkpoints import load_checkpoint, save_checkpoint, set_aside
from lib.utils.validation import BelowOne, Integer, NonNegative, Positive, PositiveInt


@dataclass(frozen=True)
class Settings:
    """The numbers and names that decide a training: checked before it begins and part of its checkpoint's key."""

    epochs: PositiveInt
    batch_size: PositiveInt
    lr: Positive
    optimizer: Literal["adam", "adamw", "sgd"]
    momentum: BelowOne
    weight_decay: NonNegative
    schedule: Literal["constant", "cosine", "step"]
    warmup: BelowOne
    clip: NonNegative
    ema: BelowOne
    patience: PositiveInt | None
    seed: Integer
    precision: Literal["no", "fp16", "bf16"]


@dataclass
class Trained:
    """What `train` returns: one dict of numbers per epoch, the last weights, and the best ones by validation."""

    history: list[dict[str, float]] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1
    best_score: float = -math.inf


@dataclass
class TrainingState:
    """Everything that changes from step to step, and so everything that a checkpoint holds."""

    model: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    batches: torch.Generator
    noise: torch.Generator
    others: list[torch.Generator]  # that the model and the functions of the training draw from
    result: Trained = field(default_factory=Trained)
    epoch: int = 0

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and saved: the averaged one if there is one."""
        return self.average.module if self.average else self.model


def _global_states(device: torch.device) -> list[Tensor]:
    """Return the states of the global generators that layers such as dropout draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def save_state(path: Path, key: str, state: TrainingState, processes: PartialState) -> None:
    """Write the whole state of a training; `key` says to which it belongs; every process has its own random states."""
    own = {"layers": _global_states(torch.device(str(processes.device))), "noise": state.noise.get_state()}
    own["others"] = [generator.get_state() for generator in state.others]
    ranks = gather_object([own])
    if processes.is_main_process:
        saved: dict[str, Any] = {"key": key, "epoch": state.epoch, "result": vars(state.result), "ranks": ranks}
        saved |= {name: getattr(state, name).state_dict() for name in ("model", "opt", "scaler")}
        saved |= {"average": state.average.state_dict() if state.average else {}}
        save_checkpoint(path, saved | {"batches": state.batches.get_state()})


def find_state(path: Path, key: str) -> dict[str, Any] | None:
    """Return what was saved for a training, None if nothing was; another one's file gets its key as a suffix."""
    saved, own = load_checkpoint(path), path.with_name(f"{path.name}.{key}")
    if saved and saved.get("key") == key:
        return saved
    if saved:
        set_aside(path, str(saved.get("key", "broken")), "it belongs to another training")
    if own.exists():
        os.replace(own, path)
    return load_checkpoint(path)


def restore_state(saved: dict[str, Any], state: TrainingState, processes: PartialState) -> None:
    """Bring `state` and the global generators to where a checkpoint left them."""
    own = saved["ranks"][processes.process_index]
    for name in ("model", "opt", "scaler"):
        getattr(state, name).load_state_dict(saved[name])
    if state.average:
        state.average.load_state_dict(saved["average"])
    state.batches.set_state(saved["batches"])
    for generator, before in zip([state.noise, *state.others], [own["noise"], *own["others"]], strict=True):
        generator.set_state(before)
    torch.set_rng_state(own["layers"][0])
    if len(own["layers"]) > 1:
        torch.cuda.set_rng_state(own["layers"][1], torch.device(str(processes.device)))
    state.result, state.epoch = Trained(**saved["result"]), saved["epoch"]
