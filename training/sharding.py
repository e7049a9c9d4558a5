"""Weights shared out among processes (FSDP), and the whole of them for files."""

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

# torch's own modules for this take a second to import: they come in where weights are shared out, and not before.
if TYPE_CHECKING:
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
    from torch.distributed.checkpoint.state_dict import StateDictOptions


def sharded_strategy(processes: int) -> "ModelParallelStrategy":
    """Fabric's strategy for `fully_shard`: each process keeps its share of every weight, gradient and average."""
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    # By default all processes of a machine would see the same batch, each with a part of the net.
    return ModelParallelStrategy(
        parallelize_fn=_shard,
        data_parallel_size=processes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def shard_like(net: nn.Module, mesh: Any) -> nn.Module:
    """Share out a net's weights, block by block, so that one block at a time is whole."""
    from torch.distributed.fsdp import fully_shard

    for block in getattr(net, "body", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def whole_state(net: nn.Module) -> dict[str, Any]:
    """Gather the state dict of a net; all processes must ask for it together."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(net, options=_whole())


def whole_optimizer_state(net: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Gather the state dict of an optimiser; all processes must ask for it together."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(net, optimizer, options=_whole())


def take_up_optimizer(net: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Share out the state that `whole_optimizer_state` gave."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(net, optimizer, state, options=_whole())


def _whole() -> "StateDictOptions":
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True)


def _shard(net: nn.Module, mesh: Any) -> nn.Module:
    return shard_like(net, mesh["data_parallel"])
