"""Sums and means over the tokens of all processes that train together."""

import torch
from torch import Tensor, distributed


def over_processes(sums: Tensor) -> Tensor:
    """Add up what each process has; one that trains alone keeps it as it is. No gradients pass.

    >>> over_processes(torch.ones(2))
    tensor([1., 1.])
    """
    if not _several():
        return sums.detach()
    sums = sums.detach().clone()
    distributed.all_reduce(sums)
    return sums


def token_mean(values: Tensor) -> Tensor:
    """Mean over the first axis, and over the tokens of all processes; 0 where there are none.

    The gradient is that of the own tokens, scaled so that the mean of the processes' gradients, which is what
    DistributedDataParallel takes, is the gradient of the mean over all tokens, however many each has.

    >>> token_mean(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([2., 3.])
    """
    total = values.sum(0)
    count = values.new_full((1,), values.shape[0])
    if not _several():
        return total / count.clamp(min=1).view(())
    everywhere = over_processes(torch.cat([total.reshape(-1), count]))
    mean = everywhere[:-1].view(total.shape) / everywhere[-1].clamp(min=1)
    own = total * (distributed.get_world_size() / everywhere[-1].clamp(min=1))
    return own + (mean - own).detach()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
