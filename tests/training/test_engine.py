"""What a run stands on: checkpointing saves memory in every net."""

import pytest
import torch

from claritycore.nets import AutoConfig, AutoModel, list_models
from claritycore.training.engine import checkpoint_blocks

U_NETS = ("swin-unet", "hersr", "harmonic", "rsfmoe")
# The sizes of a U-Net differ in numbers alone.
NAMES = [name for name in list_models() if not name.startswith(U_NETS) or name.endswith("tiny")]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_keeps_fewer_activations(name):
    sizes = {} if name.startswith(U_NETS) else {"num_feat": 8, "num_block": 2}
    sizes |= {"num_grow_ch": 4} if "rrdb" in name else {}
    net = AutoModel.from_config(AutoConfig.from_name(name, scale=2, **sizes)).train()

    def kept() -> int:
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            image = net(torch.rand(1, 3, 32, 32))
        image.sum().backward()
        return sum(held.values())

    whole = kept()
    checkpoint_blocks(net)
    assert kept() < 0.6 * whole
