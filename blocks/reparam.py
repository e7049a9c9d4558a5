"""Blocks that are trained in one form and shipped in a smaller one: how they change, and the proof that nothing did."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ..kernels.flops import kernel_flops


class Reparameterizable(nn.Module):
    """Base of blocks whose training form equals a smaller deployed form.

    A subclass says what the two forms are made of: `fused_modules` and `training_modules` return the children of the
    form that is asked for, by name, computed from those of the other. The two share no name: so a state dict tells
    which form it is of, and one of the wrong form is refused. Nothing changes form by itself, in `forward` or `train`.

    >>> class Twice(Reparameterizable):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    ...     def forward(self, x):
    ...         return self.fused(x) if self.deployed else self.first(x) + self.second(x)
    ...     def fused_modules(self):
    ...         fused = nn.Linear(2, 2, bias=False)
    ...         fused.weight.data = self.first.weight.data + self.second.weight.data
    ...         return {"fused": fused}
    >>> block = Twice()
    >>> block.switch_to_deploy()
    >>> list(block.state_dict())
    ['fused.weight']
    """

    deployed = False

    def fused_modules(self) -> dict[str, nn.Module]:
        """Make the children of the deployed form from those of the training form.

        Raises:
            NotImplementedError: if the subclass does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override fused_modules()")

    def training_modules(self) -> dict[str, nn.Module]:
        """Make children of the training form that compute what the deployed form does.

        Raises:
            NotImplementedError: if the subclass does not say how.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override training_modules()")

    @torch.inference_mode(False)  # of inference tensors no backward could ever come
    def switch_to_deploy(self) -> None:
        """Replace the children by those of the deployed form, in place; nothing happens if they are there already.

        Raises:
            RuntimeError: if a batch norm is in train mode: what it computes depends on the batch.
        """
        if not self.deployed:
            _refuse_batch_statistics(self)
            self._exchange(self.fused_modules(), deployed=True)

    @torch.inference_mode(False)
    def to_training_form(self) -> None:
        """Replace the children by those of the training form, computing the same: a start for fine-tuning.

        The same in eval mode: where the training form has batch norms, train mode takes the statistics of the batch.

        Raises:
            ValueError: if no branch of the training form can hold the fused kernel.
        """
        if self.deployed:
            self._exchange(self.training_modules(), deployed=False)

    @torch.no_grad()
    def _exchange(self, modules: dict[str, nn.Module], *, deployed: bool) -> None:
        old = next(self.parameters())
        learns = any(parameter.requires_grad for parameter in self.parameters())
        for name in list(self._modules):
            delattr(self, name)
        for name, module in modules.items():
            # Fused in float64, rounded here, once.
            self.add_module(name, module.to(old.device, old.dtype).requires_grad_(learns).train(self.training))
        self.deployed = deployed

    def refuses(self, state_dict: Mapping[str, Any], prefix: str = "") -> bool:
        """Whether a state dict, in which the names of this block start with `prefix`, is of its other form."""
        given = {key[len(prefix) :].partition(".")[0] for key in state_dict if key.startswith(prefix)}
        return bool(given) and not given & set(self._modules)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.refuses(state_dict, prefix):
            # Said at once: else every further block of the net would say the same, and torch list all of their tensors.
            block = prefix.rstrip(".") or type(self).__name__
            raise RuntimeError(
                f"{block} is deployed and the checkpoint is of its training form: load it into the training form, then "
                "call reparameterize_model"
                if self.deployed
                else f"{block} is in its training form and the checkpoint is of the deployed form: call "
                "reparameterize_model(model.eval(), inplace=True) before loading, to_training_form(model) to train on"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


@torch.inference_mode(False)
def reparameterize_model(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Bring every `Reparameterizable` of a model into its deployed form, the model itself included.

    Of a model with an exponential moving average, fuse the average: the average of fused weights is another.

    Args:
        model: in eval mode, at least its batch norms.
        inplace: change the model itself; else a copy that shares nothing with it.

    Returns:
        The model in its deployed form.

    Raises:
        RuntimeError: if a batch norm within such a block is in train mode; the model is then as it was.

    >>> from claritycore.blocks import RepConv2d
    >>> model = nn.Sequential(RepConv2d(8, branches=("3x3", "1x1", "identity")), nn.ReLU())
    >>> reparameterize_model(model)[0].fused
    SameConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    for _, block in _blocks(model):
        if not block.deployed:
            _refuse_batch_statistics(block)
    model = model if inplace else copy.deepcopy(model)
    for _, block in list(_blocks(model)):
        block.switch_to_deploy()
    return model


@torch.inference_mode(False)
def to_training_form(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Bring every `Reparameterizable` of a model back into its training form: the way back of `reparameterize_model`.

    In eval mode the model computes the same; see `Reparameterizable.to_training_form`.

    Args:
        model: of which any blocks may be deployed.
        inplace: change the model itself; else a copy that shares nothing with it.

    Returns:
        The model in its training form.

    Raises:
        ValueError: if no branch of a block's training form can hold its fused kernel; the model is then as it was.

    >>> from claritycore.blocks import RepConv2d
    >>> deployed = reparameterize_model(nn.Sequential(RepConv2d(8, branches=("3x3", "1x1")), nn.ReLU()))
    >>> to_training_form(deployed)[0].branch_names
    ('3x3', '1x1')
    """
    made = copy.deepcopy(model)
    for _, block in list(_blocks(made)):
        block.to_training_form()
    if not inplace:
        return made
    for _, block in list(_blocks(model)):
        block.to_training_form()
    return model


@dataclass(frozen=True)
class FusedBlock:
    """One block in both forms, given the same input."""

    name: str
    kind: str
    max_error: float
    relative_error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]


@dataclass(frozen=True)
class ReparameterizationReport:
    """What deploying a model changes.

    Args:
        blocks: for each `Reparameterizable`, in order of use: the largest difference of its outputs, the same relative
            to the largest output, and parameters and multiply-adds of the training and of the deployed form.
        max_error: largest difference of the whole model's outputs.
        relative_error: the same, relative to the largest output.
        parameters: of the whole model, in its training and in its deployed form.
        macs: multiply-adds of the whole model, in both.

    >>> ReparameterizationReport((), 0.0, 0.0).blocks
    ()
    """

    blocks: tuple[FusedBlock, ...]
    max_error: float
    relative_error: float
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        rows = [("block", "class", "max error", "relative", "parameters", "MACs")]
        for b in self.blocks:
            rows.append((b.name, b.kind, f"{b.max_error:.1e}", f"{b.relative_error:.1e}", *_change(b)))
        rows.append(("whole model", "", f"{self.max_error:.1e}", f"{self.relative_error:.1e}", *_change(self)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@torch.no_grad()
def verify_reparameterization(model: nn.Module, x: Tensor) -> ReparameterizationReport:
    """Run a model in both forms on the same input and say how far they are apart. The model stays as it is.

    Args:
        model: a module that takes one tensor. A copy in eval mode is compared.
        x: the input.

    Raises:
        ValueError: if no block of the model is in its training form.

    >>> from claritycore.blocks import RepConv2d
    >>> report = verify_reparameterization(RepConv2d(8, branches=("3x3", "1x1")), torch.randn(1, 8, 9, 9))
    >>> report.relative_error < 1e-6, report.macs
    (True, (51840, 46656))
    """
    trained = copy.deepcopy(model).eval()
    names = [name for name, block in _blocks(trained) if not block.deployed]
    if not names:
        raise ValueError(f"{type(model).__name__} has no block in its training form: there is nothing to compare")
    deployed = reparameterize_model(trained)
    parameters = count_parameters(trained), count_parameters(deployed)
    macs = _macs(trained, (x,)), _macs(deployed, (x,))
    found: list[FusedBlock] = []

    def compare(name: str, before: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        after = deployed.get_submodule(name)
        errors = _errors(after(*inputs), output)
        counts = count_parameters(before), count_parameters(after)
        macs = _macs(before, inputs), _macs(after, inputs)
        found.append(FusedBlock(name or "(root)", type(before).__name__, *errors, counts, macs))

    for name in names:
        trained.get_submodule(name).register_forward_hook(
            lambda block, inputs, output, name=name: compare(name, block, inputs, output)
        )
    errors = _errors(deployed(x), trained(x))
    return ReparameterizationReport(tuple(found), *errors, parameters, macs)


def _blocks(model: nn.Module) -> Iterator[tuple[str, Reparameterizable]]:
    return ((name, block) for name, block in model.named_modules() if isinstance(block, Reparameterizable))


def _refuse_batch_statistics(block: nn.Module) -> None:
    for name, norm in block.named_modules():
        if isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None):
            raise RuntimeError(
                f"{type(block).__name__} cannot fuse its batch norm {name!r}, which takes the statistics of the batch: "
                + ("call eval() first" if norm.running_mean is not None else "it keeps no running statistics")
            )


def _errors(actual: Any, expected: Any) -> tuple[float, float]:
    pairs = [(a.double(), e.double()) for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True)]
    error = max((a - e).abs().max().item() for a, e in pairs)
    largest = max(e.abs().max().item() for _, e in pairs)
    return error, error / largest if largest else error


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module learns.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())


def _macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, where that is installed

    twin = copy.deepcopy(module).to("meta")
    for part in twin.modules():
        part._forward_hooks.clear()
    with FlopCounterMode(display=False, custom_mapping=kernel_flops()) as counter:
        twin(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() // 2


def _change(counted: FusedBlock | ReparameterizationReport) -> tuple[str, str]:
    (before, after), (macs, fused_macs) = counted.parameters, counted.macs
    return f"{before:,} -> {after:,}", f"{macs / 1e6:,.2f} -> {fused_macs / 1e6:,.2f} M"
