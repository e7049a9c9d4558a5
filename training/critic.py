"""The discriminators that adversarial losses are judged by, and their own steps."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .adversarial import AdversarialLoss
from .losses import WeightedLoss
from .settings import TrainingSettings

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Critic:
    """Trains the discriminators of a loss beside the net; without adversarial terms it does nothing.

    Every process has all discriminators and averages their gradients itself: as parts of a loss they are called with
    and without gradients in one step, which DDP does not take.

    Args:
        loss: of the run.
        settings: the learning rate and its schedule are those of the net.
        fabric: the processes.
    """

    def __init__(self, loss: WeightedLoss, settings: TrainingSettings, fabric: "Fabric") -> None:
        self.terms, self.settings, self.fabric = loss.adversarial, settings, fabric
        self.discriminators = [cast(AdversarialLoss, term.loss).discriminator for term in self.terms]
        self.parameters = [p for discriminator in self.discriminators for p in discriminator.parameters()]
        self.optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            self.optimizer = torch.optim.Adam(self.parameters, lr=settings.lr, betas=(0.9, settings.beta2))
        # Fabric's scaling of float16 follows the net: once that has stepped, it is not what the gradients here had.
        scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        self.scaler = torch.amp.GradScaler(fabric.device.type, enabled=scaled)

    def begin(self, step: int) -> None:
        """Forget the gradients of the step before."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr_at(step)
            self.optimizer.zero_grad()

    def look(self, restored: Tensor, clean: Tensor, step: int) -> dict[str, Tensor]:
        """Learn from a micro-batch to tell restored images from clean ones; return the losses by name."""
        values: dict[str, Tensor] = {}
        for term in self.terms:
            if term.factor(step) == 0:
                continue
            with self.fabric.autocast():
                loss = cast(AdversarialLoss, term.loss).discriminator_loss(restored, clean)
            self.scaler.scale(loss / self.settings.accumulate).backward()
            values[f"{term.name}_discriminator"] = loss.detach()
        return values

    def step(self) -> None:
        """Change the discriminators, where they have learned anything."""
        learned = [parameter for parameter in self.parameters if parameter.grad is not None]
        if self.optimizer is None or not learned:
            return
        if self.fabric.world_size > 1:
            for parameter in learned:
                gradient = cast(Tensor, parameter.grad)
                parameter.grad = cast(Tensor, self.fabric.all_reduce(gradient, reduce_op="mean"))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any] | None:
        if self.optimizer is None:
            return None
        states = [discriminator.state_dict() for discriminator in self.discriminators]
        return {"discriminators": states, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None or self.optimizer is None:
            return
        for discriminator, saved in zip(self.discriminators, state["discriminators"], strict=True):
            discriminator.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
