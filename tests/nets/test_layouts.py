"""Weights of published nets: recognised from their names and shapes, the same image, and the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from claritycore.blocks import reparameterize_model
from claritycore.nets import AutoConfig, AutoModel, CheckpointInfo, convert_state, inspect_checkpoint
from claritycore.nets.layouts import LAYOUTS, recognize
from tests.nets import published
from tests.nets.published import BASICSR_NAMES, ESRGAN, ESRGAN_NAMES, PLKSR, SPAN, OldESRGAN
from tests.strategies import normal

RRDB = {"num_feat": 8, "num_block": 1, "num_grow_ch": 4, "upsampler": "nearest+conv"}
LARGE = {"num_feat": 16, "num_block": 1, "kernel_size": 5, "scale": 2}
SPARSE = {"form": "dilated", "branches": ("5x5@1", "5x5@2"), "kernel_size": 9}

# What was published: the net, the layout that it is to be recognised as, and the fields of the config of ours.
NETS = {
    "esrgan x4": (lambda: ESRGAN(ESRGAN_NAMES), "rrdbnet-esrgan", {**RRDB, "scale": 4}),
    "esrgan x2": (
        lambda: ESRGAN(ESRGAN_NAMES, stages=1, blocks=2),
        "rrdbnet-esrgan",
        {**RRDB, "num_block": 2, "scale": 2, "unshuffle_stem": False},
    ),
    "basicsr x4": (lambda: ESRGAN(BASICSR_NAMES, growth=16), "rrdbnet-basicsr", {**RRDB, "num_grow_ch": 16}),
    "basicsr x4 grow 32": (
        lambda: ESRGAN(BASICSR_NAMES, blocks=3, growth=32),
        "rrdbnet-basicsr",
        {**RRDB, "num_block": 3, "num_grow_ch": 32},
    ),
    "basicsr x2": (lambda: ESRGAN(BASICSR_NAMES, unshuffle=2), "rrdbnet-basicsr", {**RRDB, "scale": 2}),
    "basicsr x1": (lambda: ESRGAN(BASICSR_NAMES, unshuffle=4), "rrdbnet-basicsr", {**RRDB, "scale": 1}),
    "basicsr x2 grey": (
        lambda: ESRGAN(BASICSR_NAMES, channels=1, unshuffle=2),
        "rrdbnet-basicsr",
        {**RRDB, "scale": 2, "in_channels": 1, "out_channels": 1},
    ),
    "basicsr x4 of four channels": (
        lambda: ESRGAN(BASICSR_NAMES, channels=4),
        "rrdbnet-basicsr",
        {**RRDB, "in_channels": 4, "out_channels": 4},
    ),
    "old x1": (lambda: OldESRGAN(stages=0), "rrdbnet-esrgan-old", {**RRDB, "scale": 1, "unshuffle_stem": False}),
    "old x2": (lambda: OldESRGAN(stages=1), "rrdbnet-esrgan-old", {**RRDB, "scale": 2, "unshuffle_stem": False}),
    "old x4": (lambda: OldESRGAN(blocks=2), "rrdbnet-esrgan-old", {**RRDB, "num_block": 2}),
    "old x8": (lambda: OldESRGAN(stages=3), "rrdbnet-esrgan-old", {**RRDB, "scale": 8}),
    "old x4 of four channels": (
        lambda: OldESRGAN(stages=2, channels=4, features=6),
        "rrdbnet-esrgan-old",
        {**RRDB, "num_feat": 6, "in_channels": 4, "out_channels": 4},
    ),
    "plksr x2": (lambda: PLKSR(blocks=3), "plksr-original", {**LARGE, "num_block": 3}),
    "plksr tiny x4": (
        lambda: PLKSR(attention=False, scale=4, size=13),
        "plksr-original",
        {**LARGE, "attention": False, "scale": 4, "kernel_size": 13},
    ),
    "plksr x3 half": (
        lambda: PLKSR(scale=3, split=0.5, features=12),
        "plksr-original",
        {**LARGE, "scale": 3, "split_ratio": 0.5, "num_feat": 12},
    ),
    "plksr x1 grey": (
        lambda: PLKSR(scale=1, channels=1),
        "plksr-original",
        {**LARGE, "scale": 1, "in_channels": 1, "out_channels": 1},
    ),
    "plksr x8": (lambda: PLKSR(scale=8), "plksr-original", {**LARGE, "scale": 8}),
    "plksr sparse": (lambda: PLKSR(kind="sparse"), "plksr-original", {**LARGE, **SPARSE}),
    "plksr sparse with the whole": (
        lambda: PLKSR(kind="sparse", whole=True, size=9),
        "plksr-original",
        {**LARGE, "form": "dilated", "kernel_size": 9},
    ),
    "plksr sparse that spans more than the whole": (
        lambda: PLKSR(kind="sparse", whole=True, size=9, dilated=(5,) * 4),
        "plksr-original",
        {
            **LARGE,
            "form": "dilated",
            "kernel_size": 17,
            "branches": ("9x9", "5x5@1", "5x5@2", "5x5@3", "5x5@4"),
        },
    ),
    "plksr strips": (
        lambda: PLKSR(kind="rect", size=9, blocks=2),
        "plksr-original",
        {**LARGE, "form": "rectangular", "kernel_size": 9, "num_block": 2},
    ),
    **{
        f"realplksr {norm} x{scale}{' dysample' if dysample else ''}": (
            lambda norm=norm, scale=scale, dysample=dysample: PLKSR(
                real=True, norm=norm, scale=scale, dysample=dysample, blocks=2
            ),
            "realplksr-neosr",
            {
                **{**LARGE, "num_block": 2, "activation": "mish", "norm": norm, "scale": scale},
                "upsampler": "dysample" if dysample else "pixelshuffle",
            },
        )
        for norm, scale, dysample in [
            *[("group", 4, False), ("layer", 2, False), ("group", 2, True)],
            *[("layer", 3, True), ("layer", 4, True), ("group", 1, True)],
        ]
    },
    **{
        f"span x{scale}{' deployed' if deployed else ''}": (
            lambda scale=scale, deployed=deployed: SPAN(scale=scale, deployed=deployed),
            "span-basicsr-deployed" if deployed else "span-basicsr",
            {"num_feat": 8, "scale": scale},
        )
        for scale in (1, 2, 4, 8)
        for deployed in (False, True)
    },
    **{
        f"span of {channels} channels{' deployed' if deployed else ''}": (
            lambda channels=channels, deployed=deployed: SPAN(
                channels=channels, features=6, normalize=False, deployed=deployed
            ),
            "span-basicsr-deployed" if deployed else "span-basicsr",
            {"num_feat": 6, "scale": 2, "normalize": False, "in_channels": channels, "out_channels": channels},
        )
        for channels in (1, 3, 4)
        for deployed in (False, True)
    },
}
EACH = pytest.mark.parametrize(("build", "layout", "fields"), NETS.values(), ids=NETS.keys())


def made(build) -> nn.Module:
    torch.manual_seed(0)
    net = build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def saved(net: nn.Module, path, wrapper: str = "params_ema"):
    torch.save({wrapper: net.state_dict(), "iter": 5}, path / "net.pth")
    return path / "net.pth"


def channels_of(fields) -> int:
    return fields.get("in_channels", 3)


@EACH
def test_a_published_net_is_recognised_and_gives_the_same_image(build, layout, fields, tmp_path):
    theirs = made(build)
    path = saved(theirs, tmp_path)
    info = inspect_checkpoint(path)
    ours = AutoModel.from_pretrained(path).eval()
    assert info.layout == layout
    assert info.config == ours.config == AutoConfig.from_name(LAYOUTS[layout].family, **fields)
    image = normal((2, channels_of(fields), 8, 12), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(image)
        actual = ours.double()(image)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@EACH
def test_the_way_back_gives_a_published_net_its_own_tensors(build, layout, fields, tmp_path):
    theirs = made(build)
    ours = AutoModel.from_pretrained(saved(theirs, tmp_path))
    again = convert_state(ours, layout)
    state = theirs.state_dict()
    assert set(again) == set(state)
    stale = [key for key in state if ".eval_conv." in key and layout == "span-basicsr"]
    assert all(torch.equal(again[key], state[key]) for key in state if key not in stale)
    fresh = build()
    fresh.load_state_dict(again, strict=True)
    for conv in fresh.modules():
        if isinstance(conv, published.Conv3XC):  # what the authors' code would run in eval
            conv.deployed = True
    image = normal((1, channels_of(fields), 8, 12), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.double()(image)
        actual = fresh.double().eval()(image)
    tolerance = 1e-5 if stale else 0  # fused kernels are rounded to float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# Ours, and the layouts that hold it.
OURS = {
    "rrdbnet nearest x4": ("rrdbnet", RRDB, ["rrdbnet-basicsr", "rrdbnet-esrgan", "rrdbnet-esrgan-old"]),
    "rrdbnet nearest x1": ("rrdbnet", {**RRDB, "scale": 1}, ["rrdbnet-basicsr", "rrdbnet-esrgan"]),
    "rrdbnet nearest x2": ("rrdbnet", {**RRDB, "scale": 2, "num_block": 2}, ["rrdbnet-basicsr", "rrdbnet-esrgan-old"]),
    "rrdbnet nearest x8": ("rrdbnet", {**RRDB, "scale": 8}, ["rrdbnet-basicsr", "rrdbnet-esrgan-old"]),
    **{
        f"rrdbnet plain x{scale}": (
            "rrdbnet",
            {**RRDB, "scale": scale, "unshuffle_stem": False, "in_channels": 4, "out_channels": 4},
            ["rrdbnet-basicsr", "rrdbnet-esrgan", "rrdbnet-esrgan-old"],
        )
        for scale in (1, 2)
    },
    **{
        f"rrdbnet x{scale}": ("rrdbnet", {**RRDB, "scale": scale, "upsampler": "pixelshuffle"}, ["rrdbnet"])
        for scale in (2, 3, 4, 8)
    },
    **{
        f"plksr {form}": ("plksr", {**LARGE, "form": form, "kernel_size": 17}, [*back, "plksr"])
        for form, back in {
            "dense": ["plksr-original"],
            "dilated": ["plksr-original"],
            "rectangular": ["plksr-original"],
            "depthwise": [],
        }.items()
    },
    **{
        f"realplksr x{scale} {norm} {upsampler}": (
            "realplksr",
            {**LARGE, "scale": scale, "norm": norm, "upsampler": upsampler},
            ["realplksr-neosr"],
        )
        for scale, norm, upsampler in [(1, "group", "pixelshuffle"), (3, "layer", "dysample"), (8, "group", "dysample")]
    },
    "realplksr": ("realplksr", LARGE, ["realplksr-neosr", "plksr"]),
    "span x2": ("span", {"num_feat": 6, "scale": 2}, ["span-basicsr", "span"]),
    "span x3 of one channel": (
        "span",
        {"num_feat": 6, "scale": 3, "in_channels": 1, "out_channels": 1, "normalize": False},
        ["span-basicsr"],
    ),
}
OURS_EACH = pytest.mark.parametrize(("name", "fields", "layouts"), OURS.values(), ids=OURS.keys())


def ours_of(name: str, fields) -> nn.Module:
    return made(lambda: AutoModel.from_config(AutoConfig.from_name(name, **fields)))


@OURS_EACH
def test_ours_comes_back_the_same_from_every_layout_that_holds_it(name, fields, layouts, tmp_path):
    net = ours_of(name, fields)
    for layout in layouts:
        torch.save(convert_state(net, layout), tmp_path / "net.pth")
        assert inspect_checkpoint(tmp_path / "net.pth").layout == layout
        again = AutoModel.from_pretrained(tmp_path / "net.pth")
        assert again.config == net.config
        assert set(again.state_dict()) == set(net.state_dict())
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("name", "fields", "layout"),
    [
        ("plksr", {**LARGE, "form": "dilated", "kernel_size": 9}, "plksr-original"),
        ("plksr", {**LARGE, "form": "dilated", "kernel_size": 9}, "plksr"),
        ("plksr", {**LARGE, "form": "rectangular", "kernel_size": 9}, "plksr"),
        ("plksr", {**LARGE, "form": "depthwise", "kernel_size": 9}, "plksr"),
        ("realplksr", LARGE, "realplksr-neosr"),
        ("span", {"num_feat": 6, "scale": 2}, "span-basicsr-deployed"),
        ("span", {"num_feat": 6, "scale": 2}, "span-deployed"),
    ],
)
def test_a_deployed_net_is_recognised_and_gives_the_same_image(name, fields, layout, tmp_path):
    net = reparameterize_model(ours_of(name, fields))
    torch.save(convert_state(net, layout), tmp_path / "net.pth")
    again = AutoModel.from_pretrained(tmp_path / "net.pth")
    assert inspect_checkpoint(tmp_path / "net.pth").layout == layout
    assert again.training
    image = normal((1, 3, 8, 8))
    assert torch.equal(again.eval()(image), net(image))


def test_a_deployed_net_of_ours_loads_by_what_its_file_says(tmp_path):
    net = reparameterize_model(ours_of("span", {"num_feat": 6}))
    again = AutoModel.from_pretrained(net.save_pretrained(tmp_path))
    assert list(again.state_dict()) == list(net.state_dict())
    assert torch.equal(again.eval()(normal((1, 3, 4, 4))), net(normal((1, 3, 4, 4))))


@given(key=st.sampled_from([*NETS, *OURS]), lost=st.integers(0, 10_000))
def test_no_state_is_taken_for_that_of_another_family(key, lost):
    """One layout alone takes a whole state; one that lost a tensor is taken for the same, or for none."""
    if key in NETS:
        build, layout, _ = NETS[key]
        layouts, states = [layout], [build().state_dict()]
    else:
        name, fields, layouts = OURS[key]
        states = [convert_state(ours_of(name, fields), layout) for layout in layouts]
    for layout, state in zip(layouts, states, strict=True):
        assert [known.name for known in LAYOUTS.values() if known.matches(state)] == [layout]
        state = dict(state)
        del state[list(state)[lost % len(state)]]
        found = recognize(state)
        assert found is None or found.layout.family == LAYOUTS[layout].family


@EACH
def test_a_file_that_lost_a_tensor_is_refused(build, layout, fields, tmp_path):
    state = made(build).state_dict()
    idle = ".eval_conv." if layout == "span-basicsr" else " "
    required = LAYOUTS[layout].required
    del state[next(key for key in reversed(state) if ".weight" in key and idle not in key and key not in required)]
    torch.save(state, tmp_path / "lost.pth")
    told = r"(does not fit \w+: of its tensors|does not hold together|cannot be made|is refused)"
    with pytest.raises(ValueError, match=rf"lost.pth .*{told}"):
        AutoModel.from_pretrained(tmp_path / "lost.pth")
    assert inspect_checkpoint(tmp_path / "lost.pth").refusal


def test_eval_convolutions_that_are_out_of_date_are_ignored(tmp_path):
    net = made(lambda: SPAN())
    image = normal((1, 3, 6, 6))
    expected = AutoModel.from_pretrained(saved(net, tmp_path)).eval()(image)
    for module in net.modules():
        if isinstance(module, published.Conv3XC):
            nn.init.constant_(module.eval_conv.weight, torch.nan)
    assert torch.equal(AutoModel.from_pretrained(saved(net, tmp_path)).eval()(image), expected)


@pytest.mark.parametrize(
    ("build", "clauses"),
    [
        (lambda: OldESRGAN(stages=1), ["the scale, 2 or 3, of the one stage: 2 is assumed"]),
        (
            lambda: ESRGAN(BASICSR_NAMES, unshuffle=2),
            ["whether the stem unshuffles: its 12 input channels are taken for 4 x 3, which is scale 2"],
        ),
        (lambda: ESRGAN(BASICSR_NAMES), []),
        (
            lambda: PLKSR(real=True, norm="group"),
            ["the number of groups of the norm: 4 is assumed"],
        ),
        (lambda: PLKSR(real=True, norm="layer"), []),
        (lambda: PLKSR(), ["whether the large kernel was trained with an identity beside it: none is assumed"]),
        (
            lambda: PLKSR(kind="sparse"),
            [
                "the dilations of the large kernel's branches: 5x5@1, 5x5@2 are assumed",
                "whether the large kernel was trained with an identity beside it: none is assumed",
            ],
        ),
        (lambda: SPAN(), ["what is subtracted from the image: the mean of DIV2K, and a range of 255, are assumed"]),
        (lambda: SPAN(normalize=False), []),
    ],
)
def test_what_a_layout_cannot_say_is_told(build, clauses, tmp_path):
    info = inspect_checkpoint(saved(made(build), tmp_path))
    assert list(info.assumptions) == clauses
    assert [line for line in str(info).splitlines() if line.startswith("  assumed ")] == [
        f"  assumed     {c}" for c in clauses
    ]


def test_the_caller_decides_how_many_groups_a_norm_has(tmp_path):
    theirs = made(lambda: PLKSR(real=True, norm="group"))
    for module in theirs.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 2
    image = torch.rand(1, 3, 9, 8)
    ours = AutoModel.from_pretrained(path := saved(theirs, tmp_path), norm_groups=2).eval()
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)
    assert (ours(image) - AutoModel.from_pretrained(path).eval()(image)).abs().max() > 1e-4
    assert AutoModel.from_pretrained(ours.save_pretrained(tmp_path)).config.norm_groups == 2


def test_the_caller_decides_what_a_file_cannot_say(tmp_path):
    theirs = made(lambda: OldESRGAN(stages=1, factor=3))
    path = saved(theirs, tmp_path)
    assert AutoModel.from_pretrained(path).config.scale == 2
    image = normal((1, 3, 5, 4), dtype=torch.float64)
    for given_ in ({"scale": 3}, {"config": AutoConfig.from_name("rrdbnet", **RRDB, scale=3)}):
        ours = AutoModel.from_pretrained(path, **given_).double()
        torch.testing.assert_close(ours(image), theirs.double()(image), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"give either config or its fields \(scale\), not both"):
        AutoModel.from_pretrained(path, AutoConfig.from_name("rrdbnet"), scale=3)
    with pytest.raises(ValueError, match=r"net.pth describes a net that cannot be made: .* no field 'scales'; did you"):
        AutoModel.from_pretrained(path, scales=3)


def plus(net: OldESRGAN) -> dict[str, torch.Tensor]:
    return {**net.state_dict(), "model.1.sub.0.RDB1.conv1x1.weight": torch.zeros(4, 8, 1, 1)}


def mixed(first: int, second: int) -> dict[str, torch.Tensor]:
    net = PLKSR()
    net.feats[1].channe_mixer[0], net.feats[1].channe_mixer[2] = (
        published.same(16, 32, first),
        published.same(32, 16, second),
    )
    return net.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (plus(OldESRGAN()), r"is refused: it is of ESRGAN\+, whose dense blocks have a further 1x1 convolution"),
        (mixed(3, 1), "is refused: its channel mixer is CCM, with kernels of 3 and 1: ours has 3 and 3"),
        (mixed(1, 3), "is refused: its channel mixer is ICCM, with kernels of 1 and 3: ours has 3 and 3"),
        (
            {**SPAN().state_dict(), "upsampler.0.weight": torch.zeros(7, 8, 3, 3)},
            r"is refused: 7 channels before the pixel shuffle are no square times one of \(3, 1, 4\)",
        ),
        (
            {key.replace("RDB", "Dense"): value for key, value in ESRGAN(ESRGAN_NAMES).state_dict().items()},
            "does not say which net it belongs to; .*takes its config; the nearest layout is rrdbnet-esrgan",
        ),
        (
            {"weight": torch.zeros(3)},
            "does not say which net it belongs to; from_pretrained takes its config$",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_in_a_sentence(state, message, tmp_path):
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=f"net.pth {message}"):
        AutoModel.from_pretrained(tmp_path / "net.pth")
    info = inspect_checkpoint(tmp_path / "net.pth")
    assert isinstance(info, CheckpointInfo)
    assert info.config is None
    assert "refused" in str(info)


@pytest.mark.parametrize(
    ("name", "fields", "layout", "message"),
    [
        ("rrdbnet", {}, "rrdbnet-esrgn", r"there is no layout 'rrdbnet-esrgn'; did you mean rrdbnet-esrgan\?"),
        ("rrdbnet", {}, "span-basicsr", "layout span-basicsr is one of span, not of rrdbnet"),
        (
            "rrdbnet",
            {},
            "rrdbnet-esrgan",
            r'cannot hold this RRDBNet: it holds nets with upsampler="nearest\+conv" alone',
        ),
        ("plksr", {}, "realplksr-neosr", r'it has activation "mish" and a norm'),
        ("realplksr", {}, "plksr-original", r'it has activation "gelu" and no norm'),
        ("plksr", {"upsampler": "dysample"}, "plksr-original", "it upsamples by pixel shuffle alone"),
        ("plksr", {"out_channels": 1}, "plksr-original", "it adds the image, and so has as many channels out as in"),
        ("plksr", {"form": "depthwise"}, "plksr-original", "it has no depthwise kernels and no pair of strips"),
        (
            "plksr",
            {"form": "rectangular", "branches": ("9x3", "3x3")},
            "plksr-original",
            "its strips are K x n, n x K and",
        ),
        ("realplksr", {"form": "dilated"}, "realplksr-neosr", "its large kernel is one convolution: call reparam"),
        ("span", {}, "span-basicsr-deployed", "it is of the deployed form: call reparameterize_model first"),
        ("span", {"num_block": 5}, "span-basicsr", "it has 6 blocks, not 5"),
        ("span", {"in_channels": 4}, "span-basicsr", "it normalizes images of three channels alone, not of 4"),
    ],
)
def test_a_layout_refuses_a_net_that_it_cannot_hold(name, fields, layout, message):
    small = {"rrdbnet": {"num_feat": 4, "num_block": 1}, "span": {"num_feat": 4}}.get(name, {**LARGE, "kernel_size": 9})
    net = AutoModel.from_config(AutoConfig.from_name(name, **{**small, **fields}))
    with pytest.raises(ValueError, match=message):
        convert_state(net, layout)


def test_a_deployed_span_has_no_training_form_to_write():
    net = reparameterize_model(ours_of("span", {"num_feat": 4}))
    with pytest.raises(ValueError, match="it is of the training form"):
        convert_state(net, "span-basicsr")
