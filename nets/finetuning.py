"""Starting from weights that exist: loading what fits, and holding parts of a net still."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import Reparameterizable
from .base import RestorationNet
from .checkpoints import put_back_prefixes, read_checkpoint, unwrap
from .layouts import recognize


@dataclass(frozen=True)
class MatchReport:
    """What `load_matching` loaded, by name, and what it did not.

    Args:
        loaded: tensors of the model that have new values.
        missing: tensors of the model that the checkpoint has not.
        mismatched: tensors of another shape or type than the model's.
        unexpected: tensors of the checkpoint that the model has not.

    >>> print(MatchReport(("conv.weight",), ("conv.bias",), (), ("head.weight",)))
    1 of 2 tensors loaded
      1 missing: conv.bias
      1 unexpected: head.weight
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        wanted = len(self.loaded) + len(self.missing) + len(self.mismatched)
        rows = {"missing": self.missing, "of another shape or type": self.mismatched, "unexpected": self.unexpected}
        lines = [f"  {len(keys)} {what}: {', '.join(keys)}" for what, keys in rows.items() if keys]
        return "\n".join([f"{len(self.loaded)} of {wanted} tensors loaded", *lines])


def load_matching(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> MatchReport:
    """Load the tensors whose names and shapes fit the model, and leave the others as they are.

    A public layout of the model's family is brought under our names first. A net of another scale, for instance,
    takes all of a checkpoint but its head.

    Args:
        model: any module; a `RestorationNet` takes public layouts too.
        source: a file as `AutoModel.from_pretrained` takes it, or what such a file holds.

    Returns:
        What was loaded and what was not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or holds objects that would run code, no tensor fits, or it is of a deployed
            net and the model is in its training form, or the other way round.

    >>> from claritycore.nets import AutoConfig, AutoModel
    >>> x2, x4 = (AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=1, scale=s)) for s in (2, 4))
    >>> print(load_matching(x4, x2.state_dict()))
    40 of 42 tensors loaded
      2 missing: conv_up2.conv.weight, conv_up2.conv.bias
    """
    given = isinstance(source, Mapping)
    name = "the state" if given else str(source)
    checkpoint = unwrap(source, name) if given else read_checkpoint(source)
    state = _under_our_names(put_back_prefixes(checkpoint, model).state, model)
    _check_form(model, state, name)
    own = model.state_dict()
    shared = [key for key in own if key in state]
    loaded = [key for key in shared if _fits(own[key], state[key])]
    if not loaded:
        raise ValueError(f"of the {len(state)} tensors of {name} none fits {type(model).__name__}")
    model.load_state_dict({key: state[key] for key in loaded}, strict=False)
    return MatchReport(
        tuple(loaded),
        missing=tuple(key for key in own if key not in state),
        mismatched=tuple(key for key in shared if key not in set(loaded)),
        unexpected=tuple(key for key in state if key not in own),
    )


def freeze(model: nn.Module, *patterns: str) -> list[str]:
    """Hold parameters still: no gradient is computed for those whose names match a pattern.

    A batch norm whose weight is held normalizes by its running statistics and leaves them alone, whatever
    `model.train()` says: else a frozen part would still drift. Make the optimizer afterwards, of
    `(p for p in model.parameters() if p.requires_grad)`; `model.requires_grad_(True)`, then `train()`, releases all.

    Args:
        model: any module.
        patterns: names of parameters, in which `*` stands for anything, dots included: "body.*".

    Returns:
        The names of the parameters that these patterns match, in the model's order.

    Raises:
        ValueError: if no pattern is given, or one matches no parameter.

    >>> freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3)), "0.*", "2.bias")
    ['0.weight', '0.bias', '2.bias']
    """
    if not patterns:
        raise ValueError("freeze needs a pattern; '*' matches every parameter")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no parameter of {type(model).__name__}")
    held = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name in held:
        model.get_parameter(name).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and _is_held(module):
            module.eval()
            if _hold_statistics not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_hold_statistics)
    return held


def _under_our_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, RestorationNet):
        return state
    found = recognize(state)
    if found is None or found.reading is None or found.layout.family != model.config.model_type:
        return state
    return found.reading.state


def _check_form(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    for path, block in model.named_modules():
        if isinstance(block, Reparameterizable) and block.refuses(state, f"{path}." if path else ""):
            kind = type(model).__name__
            raise ValueError(
                f"{name} is of the training form and {kind} is deployed: load it before reparameterize_model"
                if block.deployed
                else f"{name} is of the deployed form and {kind} in its training form: call reparameterize_model("
                "model.eval(), inplace=True), load_matching, then to_training_form(model, inplace=True)"
            )


def _fits(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _is_held(norm: _BatchNorm) -> bool:
    return norm.weight is not None and not norm.weight.requires_grad


def _hold_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    if norm.training and isinstance(norm, _BatchNorm) and _is_held(norm):
        norm.eval()
