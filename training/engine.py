"""What a run stands on: devices and precision, the optimiser, and blocks that keep no activations."""

import os
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..nets import Stage
from .settings import TrainingSettings
from .sharding import sharded_strategy

if TYPE_CHECKING:
    from lightning.fabric import Fabric

MOST_WORKERS = 8


def start_fabric(settings: TrainingSettings) -> "Fabric":
    """Make the processes of a run and settle device and precision.

    Raises:
        ImportError: if Lightning is not installed.
        ValueError: if the device cannot be used.
    """
    try:
        from lightning.fabric import Fabric
    except ImportError as error:
        raise ImportError("training needs Lightning: pip install 'claritycore[train]'") from error
    device = _device(settings.device)
    strategy = "ddp" if settings.strategy == "auto" and settings.devices * settings.nodes > 1 else settings.strategy
    if strategy == "fsdp":
        strategy = sharded_strategy(settings.devices * settings.nodes)
    fabric = Fabric(
        accelerator=device,
        devices=settings.devices,
        num_nodes=settings.nodes,
        strategy=strategy,
        precision=precision_on(device) if settings.amp else "32-true",
    )
    fabric.launch()
    return fabric


def precision_on(device: str) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """The mixed precision that a kind of device is made for, in Fabric's words; float32 where it is made for none.

    >>> precision_on("mps")
    '32-true'
    """
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # Other CPUs compute bfloat16 by emulation, many times slower than float32.
    native = device == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def make_optimizer(net: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Make the optimiser; weight decay is for weights alone, not for biases, norms and other vectors."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (0.9, settings.beta2)
    return kinds[settings.optimizer]([group for group in groups if group["params"]], lr=settings.lr, betas=betas)


def checkpoint_blocks(net: nn.Module) -> None:
    """Let each block of a net's body, or of its stages, compute its activations anew in the backward pass.

    Raises:
        ValueError: if the net has neither a `body` of blocks nor a `Stage`.
    """
    body = getattr(net, "body", None)
    blocks = list(body) if isinstance(body, nn.Sequential | nn.ModuleList) else []
    for stage in net.modules():
        if isinstance(stage, Stage):
            blocks += [block for block in stage.blocks if not isinstance(block, Stage)]
    if not blocks:
        raise ValueError(f"{type(net).__name__} has no body of blocks, so that checkpointing has nothing to save")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def number_of_workers(settings: TrainingSettings) -> int:
    """How many processes decode images: with few cores none, since one would take the time of the net's own."""
    if settings.workers is not None:
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores - 1) if cores > 2 else 0


def _device(name: str) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available.get(name, False):
        raise ValueError(
            f"device must be auto or one of {', '.join(k for k, v in available.items() if v)}, got {name!r}"
        )
    return name
