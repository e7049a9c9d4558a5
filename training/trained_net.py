"""A net in training, with its optimiser and its average: whole in each process, or shared out among them."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..nets import AutoModel, BaseConfig, RestorationNet, RestorationOutput, freeze, load_matching
from ..nets.base import scales_of
from .average import Average
from .engine import checkpoint_blocks, make_optimizer
from .routing import step_routers
from .run_files import RunState
from .settings import TrainingSettings
from .sharding import shard_like, take_up_optimizer, whole_optimizer_state, whole_state

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class TrainedNet:
    """What a run changes.

    Args:
        config: of the net.
        settings: of the training.
        fabric: the processes.
        state: where an interrupted run stands, if there is one.
        tell: called with a line on the weights that it starts from.
    """

    def __init__(
        self,
        config: BaseConfig,
        settings: TrainingSettings,
        fabric: "Fabric",
        state: RunState | None,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.fabric, self.sharded = config, fabric, settings.strategy == "fsdp"
        torch.manual_seed(settings.seed)
        net = AutoModel.from_config(config).train().to(fabric.device)
        # Weights that are shared out must lie contiguous.
        memory_format = torch.contiguous_format if self.sharded else torch.channels_last
        self.plain = net.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
        if settings.start and state is None:
            tell(str(load_matching(self.plain, settings.start)).splitlines()[0])
        if settings.freeze:
            freeze(self.plain, *settings.freeze)
        if state is not None:
            self.plain.load_state_dict(state.net)
        self.average = Average(self.plain, settings.ema_decay) if settings.ema else None
        if self.average is not None and state is not None and state.average is not None:
            self.average.net.load_state_dict(state.average)
        self.gives_aux = "return_aux" in inspect.signature(self.plain.forward).parameters
        if settings.checkpointing:
            checkpoint_blocks(self.plain)
        self._share_out(settings, state)

    def __call__(self, degraded: Tensor, scale: int) -> RestorationOutput:
        told = {"scale": scale} if len(scales_of(self.config)) > 1 else {}
        if self.gives_aux:
            return self.net(degraded, return_aux=True, **told)
        return RestorationOutput(self.net(degraded, **told))

    def step(self, step: int) -> None:
        """Change the weights by their gradients, and the average by the weights."""
        self.optimizer.step()
        step_routers(self.plain)
        if self.average is not None:
            self.average.update(self.plain, step)

    def states(self) -> dict[str, Any]:
        """State dicts of net, average and optimiser, whole; all processes must ask for them together."""
        average = None if self.average is None else self.average.net
        if self.sharded:
            averaged = None if average is None else whole_state(average)
            optimizer = whole_optimizer_state(self.plain, self.plain_optimizer)
            return {"net": whole_state(self.plain), "average": averaged, "optimizer": optimizer}
        averaged = None if average is None else average.state_dict()
        return {"net": self.plain.state_dict(), "average": averaged, "optimizer": self.plain_optimizer.state_dict()}

    def shipped(self) -> RestorationNet:
        """The net whose weights count, whole and in eval mode: the average where there is one.

        All processes must ask for it together.
        """
        net = self.plain if self.average is None else self.average.net
        if self.sharded:
            whole = AutoModel.from_config(self.config).to(self.fabric.device)
            whole.load_state_dict(whole_state(net))
            net = whole
        return cast(RestorationNet, net).eval()

    def _share_out(self, settings: TrainingSettings, state: RunState | None) -> None:
        net = cast(nn.Module, torch.compile(self.plain)) if settings.compile else self.plain
        if not self.sharded:
            self.plain_optimizer = make_optimizer(self.plain, settings)
            if state is not None:
                self.plain_optimizer.load_state_dict(state.optimizer)
            self.net, self.optimizer = self.fabric.setup(net, self.plain_optimizer)
            return
        self.net = self.fabric.setup_module(net)
        if self.average is not None:
            shard_like(self.average.net, cast(Any, self.fabric.strategy).device_mesh["data_parallel"])
        # Sharing out makes other parameters of the weights: the optimiser is of these.
        self.plain_optimizer = make_optimizer(self.plain, settings)
        if state is not None:
            take_up_optimizer(self.plain, self.plain_optimizer, state.optimizer)
        self.optimizer: Any = self.fabric.setup_optimizers(self.plain_optimizer)
