"""The names that PLKSR and RealPLKSR are published under: the authors' repository, neosr and traiNNer."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..blocks.plk import NORM_GROUPS, Form, trained_branches
from .renaming import Layout, Reading, State, count, inverse, own_names, rename, shuffled_channels

if TYPE_CHECKING:
    from .base import RestorationNet
    from .plksr import PLKSRConfig

MIXERS = {"gelu": "channe_mixer", "mish": "channel_mixer"}  # RealPLKSR corrects the spelling of PLKSR
NORM_PLACES = {"group": "norm", "layer": "layer_norm", "none": "norm"}
STRIPS = ("mn_conv", "nm_conv", "nn_conv")
OURS, THEIRS = "body.0.large_kernel", "feats.1.lk"
NO_GROUPS = f"the number of groups of the norm: {NORM_GROUPS} is assumed"
NO_IDENTITY = "whether the large kernel was trained with an identity beside it: none is assumed"


def _names(blocks: int, last: int, activation: str, norm: str, kernels: Mapping[str, str]) -> dict[str, str]:
    """Names of our modules, and theirs; `kernels` are the convolutions within a large kernel."""
    names = {"conv_first": "feats.0", "conv_last": f"feats.{last}", "conv_end": "to_img.end_conv"}
    names |= {"upsample": "to_img", "upsample.offset": "to_img.offset", "upsample.scope": "to_img.scope"}
    mixer = MIXERS[activation]
    for i in range(blocks):
        ours, theirs = f"body.{i}", f"feats.{i + 1}"
        names |= {f"{ours}.mixer.conv1": f"{theirs}.{mixer}.0", f"{ours}.mixer.conv2": f"{theirs}.{mixer}.2"}
        names |= {f"{ours}.attention.conv": f"{theirs}.attn.f.0", f"{ours}.refine": f"{theirs}.refine"}
        names |= {f"{ours}.norm": f"{theirs}.{NORM_PLACES[norm]}"}
        names |= {f"{ours}.large_kernel.conv.{our}": f"{theirs}.lk.{their}" for our, their in kernels.items()}
    return names


def _reader(activation: str) -> Callable[[State], Reading]:
    def read(state: State) -> Reading:
        blocks = count(state, "feats.{}.refine.weight", start=1)
        # A Dropout2d without tensors stands before RealPLKSR's last convolution.
        last = blocks + 1 if f"feats.{blocks + 1}.weight" in state else blocks + 2
        norms = {"layer": "feats.1.layer_norm.weight", "group": "feats.1.norm.weight"}
        norm = next((kind for kind, key in norms.items() if key in state), "none")
        kernels, fields, assumptions = _their_large_kernel(state)
        assumptions = (NO_GROUPS, *assumptions) if norm == "group" else assumptions
        renamed = rename(state, inverse(_names(blocks, last, activation, norm, kernels)))
        return Reading(renamed, {**_sizes(renamed), **fields, "norm": norm, "activation": activation}, assumptions)

    return read


def _their_large_kernel(state: State) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """The convolutions of a large kernel by our names and theirs, what they say, and what they do not."""
    if f"{THEIRS}.conv.weight" in state:
        size = state[f"{THEIRS}.conv.weight"].shape[2]
        assumptions = (NO_IDENTITY,) if "feats.1.channe_mixer.0.weight" in state else ()
        return {"branches.0.convs.0": "conv"}, {"form": "dense", "kernel_size": size}, assumptions
    if f"{THEIRS}.mn_conv.weight" in state:
        rows, columns = state[f"{THEIRS}.mn_conv.weight"].shape[2:]
        branches = tuple(dict.fromkeys((f"{rows}x{columns}", f"{columns}x{rows}", f"{columns}x{columns}")))
        kernels = {f"branches.{j}.convs.0": name for j, name in enumerate(STRIPS)}
        return kernels, _branched("rectangular", rows, branches), ()
    sizes = [state[f"{THEIRS}.convs.{j}.weight"].shape[2] for j in range(count(state, THEIRS + ".convs.{}.weight"))]
    spans = [(size - 1) * dilation + 1 for dilation, size in enumerate(sizes, start=1)]
    order = list(range(len(sizes)))
    branches = [f"{size}x{size}@{dilation}" for dilation, size in enumerate(sizes, start=1)]
    # The whole kernel has the most taps; it comes last there and first here.
    if sizes[-1] > max(sizes[:-1], default=0):
        order, branches = [order[-1], *order[:-1]], [f"{sizes[-1]}x{sizes[-1]}", *branches[:-1]]
        spans[-1] = sizes[-1]
    kernels = {f"branches.{j}.convs.0": f"convs.{their}" for j, their in enumerate(order)}
    dilations = f"the dilations of the large kernel's branches: {', '.join(branches)} are assumed"
    return kernels, _branched("dilated", max(spans), tuple(branches)), (dilations, NO_IDENTITY)


def _branched(form: Form, kernel_size: int, branches: tuple[str, ...]) -> dict[str, Any]:
    usual = branches == trained_branches(form, kernel_size)
    return {"form": form, "kernel_size": kernel_size, "branches": () if usual else branches}


def _sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors under our names say, but for the large kernel, the norm and the activation."""
    first, last, end = state["conv_first.weight"], state["conv_last.weight"], state.get("conv_end.weight")
    mixer = state["body.0.mixer.conv1.weight"].shape[2], state["body.0.mixer.conv2.weight"].shape[2]
    if mixer != (3, 3):
        kind = {(3, 1): "CCM", (1, 3): "ICCM"}.get(mixer, "another")
        raise ValueError(f"its channel mixer is {kind}, with kernels of {mixer[0]} and {mixer[1]}: ours has 3 and 3")
    features, learned = first.shape[0], "upsample.offset.weight" in state
    if learned:  # at scale 1 nothing follows the samples
        out_channels, scale = shuffled_channels(last.shape[0], last.shape[0] if end is None else end.shape[0])
    else:
        out_channels, scale = shuffled_channels(last.shape[0], first.shape[1])
    convolved = next(value for key, value in state.items() if key.startswith(f"{OURS}.conv.")).shape[0]
    return {
        "in_channels": first.shape[1],
        "out_channels": out_channels,
        "scale": scale,
        "num_feat": features,
        "num_block": count(state, "body.{}.refine.weight"),
        "split_ratio": _split_ratio(features, convolved),
        "attention": "body.0.attention.conv.weight" in state,
        "upsampler": "dysample" if learned else "pixelshuffle",
    }


def _split_ratio(features: int, convolved: int) -> float:
    """A share of the features that leaves so many, rounded down; a quarter if that does."""
    exact = convolved / features
    candidates = (0.25, exact, (convolved + 0.5) / features)
    return next(ratio for ratio in candidates if int(features * ratio) == convolved)


def _read_own(state: State) -> Reading:
    conv, point = f"{OURS}.conv", f"{OURS}.point.weight" in state
    assumptions = ["the activation: gelu is assumed"]
    fields = {"norm": "none", "activation": "gelu"}
    if "body.0.norm.weight" in state:
        fields = {"norm": "group", "activation": "mish"}
        assumptions = [
            "the activation: mish is assumed",
            "whether the norm is of groups or of layers: group is assumed",
            NO_GROUPS,
        ]
    deployed = f"{conv}.fused.weight" in state
    kernel = state[f"{conv}.fused.weight" if deployed else f"{conv}.branches.0.convs.0.weight"]
    number = 1 if deployed else count(state, conv + ".branches.{}.convs.0.weight")
    strips = kernel.shape[2] != kernel.shape[3]
    form = "depthwise" if point else "rectangular" if strips else "dilated" if number > 1 else "dense"
    if form in ("dilated", "depthwise") and not deployed:
        assumptions += [f"the dilations of the large kernel's branches: those of the form {form!r} are assumed"]
    return Reading(state, {**_sizes(state), **fields, "form": form, "kernel_size": kernel.shape[2]}, tuple(assumptions))


def _writer(activation: str) -> Callable[["RestorationNet"], State]:
    def write(net: "RestorationNet") -> State:
        config: PLKSRConfig = net.config  # pyright: ignore[reportAssignmentType]
        real = activation == "mish"
        if config.activation != activation or (config.norm == "none") == real:
            wanted = 'activation "mish" and a norm' if real else 'activation "gelu" and no norm'
            raise ValueError(f"it has {wanted}")
        if config.upsampler != "pixelshuffle" and not real:
            raise ValueError("it upsamples by pixel shuffle alone")
        if config.in_channels != config.out_channels:
            raise ValueError("it adds the image, and so has as many channels out as in")
        state = net.state_dict()
        kernels = _our_large_kernel(state, config.form)
        if real and set(kernels.values()) != {"conv"}:
            raise ValueError("its large kernel is one convolution: call reparameterize_model first")
        last = config.num_block + (2 if real else 1)
        return rename(state, _names(config.num_block, last, activation, config.norm, kernels))

    return write


def _our_large_kernel(state: Mapping[str, Tensor], form: str) -> dict[str, str]:
    """The convolutions of our large kernel and what PLKSR calls them."""
    conv = f"{OURS}.conv"
    deployed, branches = f"{conv}.fused.weight" in state, count(state, conv + ".branches.{}.convs.0.weight")
    if form == "depthwise" or f"{conv}.fused_wide.weight" in state:
        raise ValueError("it has no depthwise kernels and no pair of strips")
    if deployed or branches == 1:
        return {"fused" if deployed else "branches.0.convs.0": "conv"}
    shapes = [tuple(state[f"{conv}.branches.{j}.convs.0.weight"].shape[2:]) for j in range(branches)]
    if form == "rectangular":
        if len(shapes) != 3 or shapes[1:] != [shapes[0][::-1], (shapes[0][1],) * 2]:
            raise ValueError("its strips are K x n, n x K and n x n, in this order")
        return {f"branches.{j}.convs.0": name for j, name in enumerate(STRIPS)}
    whole_first = shapes[0][0] > max(rows for rows, _ in shapes[1:])
    order = [*range(1, branches), 0] if whole_first else range(branches)
    return {f"branches.{our}.convs.0": f"convs.{their}" for their, our in enumerate(order)}


PLKSR_LAYOUTS = (
    Layout(
        name="plksr",
        title="PLKSR under our names",
        family="plksr",
        required=("conv_first.weight", "body.0.mixer.conv1.weight", "body.0.refine.weight", "conv_last.weight"),
        excluded=(),
        read=_read_own,
        write=own_names,
    ),
    Layout(
        name="plksr-original",
        title="PLKSR of its authors",
        family="plksr",
        required=("feats.0.weight", "feats.1.channe_mixer.0.weight", "feats.1.refine.weight"),
        excluded=(),
        read=_reader("gelu"),
        write=_writer("gelu"),
    ),
    Layout(
        name="realplksr-neosr",
        title="RealPLKSR of neosr and traiNNer",
        family="plksr",
        required=("feats.0.weight", "feats.1.channel_mixer.0.weight", "feats.1.refine.weight"),
        excluded=(),
        read=_reader("mish"),
        write=_writer("mish"),
    ),
)
