"""How a net is trained: the flags of `claritycore train`, besides those of the net."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..blocks.checks import check_choice, check_positive

Schedule = Literal["cosine", "multistep", "constant"]
Optimizer = Literal["adam", "adamw"]
Strategy = Literal["auto", "ddp", "fsdp"]

# A training patch is 64 pixels of the net's input, whatever the scale.
INPUT_PATCH = 64


@dataclass(frozen=True)
class TrainingSettings:
    """How a net is trained.

    Args:
        data: folder of clean images, with its sub-folders, but for those whose names have lr or lq as a word, or valid,
            validation, val or test: of DIV2K, DIV2K_train_HR is taken.
        degraded: folder of their degraded versions under the same names; without it `recipe` makes them.
        validation: folder of clean images to validate on, each decoded once at the start; sub-folders whose names have
            lr, lq, train or training as a word are left out. Without it there is no validation.
        recipe: how clean images are degraded.
        validation_recipes: how they are for validation; by default as for training.
        start: weights to start from, a file or the name of a shipped one; what does not fit starts fresh.
        freeze: names of parameters that stay as they are, with * for any letters, as in body.0.*
        name: of the run; its files go to `runs`/`name`.
        runs: folder of all runs.
        steps: optimiser steps.
        batch_size: samples of a step, over all processes and micro-batches.
        patch_size: side of a crop in clean pixels; by default 64 times the largest scale of the net.
        shrink: crops are taken larger and made smaller by a factor drawn between this and 1, as for a net that shall
            serve pictures sharper than those it learns from; 1 takes them as they are, and must be for pairs.
        lr: learning rate at its highest.
        loss: terms and their weights, as in l1 or l1+0.1*fft.
        optimizer: adam or adamw.
        beta2: its averaging of squared gradients.
        weight_decay: of adamw.
        schedule: cosine falls to `min_lr`, multistep multiplies by `gamma` at each milestone, constant stays.
        warmup: steps over which the learning rate rises from zero first.
        min_lr: learning rate at the end of cosine.
        milestones: shares of the steps at which multistep falls.
        gamma: by how much it falls there.
        amp: compute in bfloat16 where the device is made for it, in float16 on other CUDA cards.
        ema: keep an exponential moving average of the weights, which is then validated and saved.
        ema_decay: of that average.
        clip: largest norm of the gradient.
        accumulate: micro-batches of a step.
        checkpointing: compute the activations of blocks anew in the backward pass instead of keeping them.
        compile: pass the net through torch.compile.
        seed: of the start weights, the order of the samples, their crops and what degrades them.
        workers: processes that decode images; by default one for each core but one, at most 8; none with two or fewer.
        device: auto, cpu, cuda or mps.
        devices: processes on this machine.
        nodes: machines.
        strategy: auto, ddp, or fsdp, which shares the weights out among the processes too.
        validate_every: steps between validations.
        save_every: steps between checkpoints.
        log_every: steps between lines of the log.
        pictures: how many validation pictures are written each time, degraded, restored and original side by side.
        skip_unusable: leave out images that cannot be read or are too small, instead of refusing the folder.

    Raises:
        ValueError: if a number is out of its range, or a choice is none of those named.

    >>> TrainingSettings(steps=100, schedule="constant").lr_at(50)
    0.0002
    """

    data: str = "datasets/DIV2K"
    degraded: str | None = None
    validation: str | None = None
    recipe: str = "clean"
    validation_recipes: tuple[str, ...] = ()
    start: str | None = None
    freeze: tuple[str, ...] = ()
    name: str | None = None
    runs: str = "runs"
    steps: int = 400_000
    batch_size: int = 16
    patch_size: int | None = None
    shrink: float = 1.0
    lr: float = 2e-4
    loss: str = "l1"
    optimizer: Optimizer = "adam"
    beta2: float = 0.99
    weight_decay: float = 0.0
    schedule: Schedule = "multistep"
    warmup: int = 0
    min_lr: float = 1e-7
    milestones: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    gamma: float = 0.5
    amp: bool = True
    ema: bool = False
    ema_decay: float = 0.999
    clip: float | None = None
    accumulate: int = 1
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Strategy = "auto"
    validate_every: int = 5_000
    save_every: int = 1_000
    log_every: int = 100
    pictures: int = 2
    skip_unusable: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "devices", "nodes", "validate_every", "save_every", "log_every")
        check_positive(**{name: getattr(self, name) for name in counts})
        if self.patch_size is not None:
            check_positive(patch_size=self.patch_size)
        for name, kind in {"optimizer": Optimizer, "schedule": Schedule, "strategy": Strategy}.items():
            check_choice(name, getattr(self, name), get_args(kind))
        for name in ("lr", "gamma", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("warmup", "min_lr", "weight_decay", "pictures", "seed", "workers"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.shrink <= 1 or (self.degraded is not None and self.shrink < 1):
            raise ValueError(f"shrink must be in (0, 1], and 1 for pairs, got {self.shrink}")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones must be shares of the steps, in (0, 1), got {self.milestones}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0; it follows from the step alone."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.schedule == "cosine":
            return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
        if self.schedule == "multistep":
            return self.lr * self.gamma ** sum(step >= milestone * self.steps for milestone in self.milestones)
        return self.lr
