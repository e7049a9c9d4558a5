"""The names that RRDBNets are published under: BasicSR and Real-ESRGAN, ESRGAN, and ESRGAN's first release."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .renaming import Layout, Reading, State, count, inverse, own_names, rename

if TYPE_CHECKING:
    from .base import RestorationNet

Names = Callable[[int, int], dict[str, str]]  # from the numbers of blocks and of stages

DENSE_BLOCKS = (1, 2, 3)
CONVOLUTIONS = (1, 2, 3, 4, 5)


def _esrgan_names(blocks: int, stages: int) -> dict[str, str]:
    """Names of our modules, and what ESRGAN's repository calls them."""
    names = {"conv_first": "conv_first", "conv_body": "trunk_conv", "conv_hr": "HRconv", "conv_last": "conv_last"}
    names |= {f"conv_up{n}": f"upconv{n}" for n in range(1, stages + 1)}
    for i in range(blocks):
        names |= {
            f"body.{i}.rdb{j}.conv{k}": f"RRDB_trunk.{i}.RDB{j}.conv{k}" for j in DENSE_BLOCKS for k in CONVOLUTIONS
        }
    return names


def _old_names(blocks: int, stages: int) -> dict[str, str]:
    """Names of our modules, and their places in the one long sequence of the first release."""
    names = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    names |= {f"conv_up{n}": f"model.{3 * n}" for n in range(1, stages + 1)}
    names |= {"conv_hr": f"model.{3 * stages + 2}", "conv_last": f"model.{3 * stages + 4}"}
    for i in range(blocks):
        names |= {
            f"body.{i}.rdb{j}.conv{k}": f"model.1.sub.{i}.RDB{j}.conv{k}.0" for j in DENSE_BLOCKS for k in CONVOLUTIONS
        }
    return names


def _read_own(state: State) -> Reading:
    """A state of ours with pixel shuffles: each stage's kernel says by how much it upsamples."""
    features = state["conv_first.weight"].shape[0]
    fields = _sizes(state)
    factors = [
        math.isqrt(state[f"conv_up{n}.conv.weight"].shape[0] // features)
        for n in range(1, count(state, "conv_up{}.conv.weight", start=1) + 1)
    ]
    return Reading(state, {**fields, "scale": math.prod(factors), "upsampler": "pixelshuffle"})


def _read_nearest(state: State) -> Reading:
    """A state under our names of a net with nearest upsampling: the stem, or else the stages, say the scale."""
    _refuse_plus(state)
    fields = {**_sizes(state), "upsampler": "nearest+conv"}
    stages = count(state, "conv_up{}.weight", start=1)
    stem, out_channels = fields["in_channels"], fields["out_channels"]
    for scale, folded in ((2, 4), (1, 16)):
        if stages == 2 and stem == folded * out_channels:
            fields |= {"in_channels": out_channels, "scale": scale}
            question = f"whether the stem unshuffles: its {stem} input channels are taken for {folded} x {out_channels}"
            return Reading(state, fields, (f"{question}, which is scale {scale}",))
    fields |= {"scale": 2**stages, "unshuffle_stem": stages > 1}
    assumptions = ("the scale, 2 or 3, of the one stage: 2 is assumed",) if stages == 1 else ()
    return Reading(state, fields, assumptions)


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    first, last = state["conv_first.weight"], state["conv_last.weight"]
    return {
        "in_channels": first.shape[1],
        "out_channels": last.shape[0],
        "num_feat": first.shape[0],
        "num_block": count(state, "body.{}.rdb1.conv1.weight"),
        "num_grow_ch": state["body.0.rdb1.conv1.weight"].shape[0],
    }


def _refuse_plus(state: Mapping[str, Tensor]) -> None:
    if any(".conv1x1." in key for key in state):
        raise ValueError("it is of ESRGAN+, whose dense blocks have a further 1x1 convolution: RRDBNet has none")


def _reader(names: Names, blocks: str) -> Callable[[State], Reading]:
    def read(state: State) -> Reading:
        return _read_nearest(rename(state, inverse(names(count(state, blocks), _stages(state)))))

    return read


def _stages(state: State) -> int:
    """Number of upsampling stages in a state of either release of ESRGAN."""
    return count(state, "upconv{}.weight", start=1) or count(state, "model.{}.weight", start=3, step=3)


def _writer(names: Names) -> Callable[["RestorationNet"], State]:
    def write(net: "RestorationNet") -> State:
        state = net.state_dict()
        if "conv_up1.conv.weight" in state:
            raise ValueError('it holds nets with upsampler="nearest+conv" alone, and this one has pixel shuffles')
        blocks, stages = count(state, "body.{}.rdb1.conv1.weight"), count(state, "conv_up{}.weight", start=1)
        return rename(state, names(blocks, stages))

    return write


OURS = ("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_body.weight", "conv_last.weight")
PIXEL_SHUFFLE = "conv_up1.conv.weight"
RRDBNET_LAYOUTS = (
    Layout("rrdbnet", "RRDBNet with pixel shuffles", "rrdbnet", (*OURS, PIXEL_SHUFFLE), (), _read_own, own_names),
    Layout(
        name="rrdbnet-basicsr",
        title="RRDBNet of BasicSR and Real-ESRGAN",
        family="rrdbnet",
        required=OURS,
        excluded=(PIXEL_SHUFFLE,),
        read=_read_nearest,
        write=_writer(lambda blocks, stages: {}),
    ),
    Layout(
        name="rrdbnet-esrgan",
        title="RRDBNet of ESRGAN and BSRGAN",
        family="rrdbnet",
        required=("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "trunk_conv.weight", "conv_last.weight"),
        excluded=(),
        read=_reader(_esrgan_names, "RRDB_trunk.{}.RDB1.conv1.weight"),
        write=_writer(_esrgan_names),
    ),
    Layout(
        name="rrdbnet-esrgan-old",
        title="RRDBNet of ESRGAN's first release",
        family="rrdbnet",
        required=("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"),
        excluded=(),
        read=_reader(_old_names, "model.1.sub.{}.RDB1.conv1.0.weight"),
        write=_writer(_old_names),
    ),
)
