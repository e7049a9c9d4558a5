"""Starting from weights that exist: what fits is loaded and told, what is frozen stays, statistics included."""

import copy
import io

import pytest
import torch
from torch import nn

from claritycore.blocks import RepConv2d, reparameterize_model, to_training_form
from claritycore.nets import AutoConfig, AutoModel, MatchReport, convert_state, freeze, load_matching
from tests.strategies import normal

SMALL = {"num_feat": 4, "num_block": 2, "num_grow_ch": 2}


def rrdbnet(seed: int = 0, **fields):
    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.from_name("rrdbnet", **{**SMALL, **fields}))


def test_a_net_of_another_scale_takes_all_but_its_head():
    source, model = rrdbnet(scale=4), rrdbnet(seed=1, scale=3)
    before = copy.deepcopy(model.state_dict())
    report = load_matching(model, source.state_dict())
    state, given = model.state_dict(), source.state_dict()
    head = ("conv_up1.conv.weight", "conv_up1.conv.bias")
    assert report.mismatched == head
    assert report.missing == ()
    assert report.unexpected == ("conv_up2.conv.weight", "conv_up2.conv.bias")
    assert set(report.loaded) == set(state) - set(head)
    assert all(torch.equal(state[key], given[key]) for key in report.loaded)
    assert all(torch.equal(state[key], before[key]) for key in head)
    assert str(report).splitlines() == [
        f"{len(state) - 2} of {len(state)} tensors loaded",
        "  2 of another shape or type: conv_up1.conv.weight, conv_up1.conv.bias",
        "  2 unexpected: conv_up2.conv.weight, conv_up2.conv.bias",
    ]


def test_fewer_blocks_take_what_they_have():
    report = load_matching(rrdbnet(num_block=3), rrdbnet(seed=1, num_block=2).state_dict())
    assert {name.split(".")[1] for name in report.missing} == {"2"}
    assert report.mismatched == report.unexpected == ()


@pytest.mark.parametrize("layout", ["rrdbnet-basicsr", "rrdbnet-esrgan", "rrdbnet-esrgan-old"])
def test_public_layouts_are_brought_under_our_names(layout, tmp_path):
    source, model = rrdbnet(upsampler="nearest+conv"), rrdbnet(seed=1, upsampler="nearest+conv")
    content = {"params_ema": convert_state(source, layout), "iter": 5}
    torch.save(content, tmp_path / "net.pth")
    for given in (tmp_path / "net.pth", str(tmp_path / "net.pth"), content, convert_state(source, layout)):
        model = rrdbnet(seed=1, upsampler="nearest+conv")
        assert len(load_matching(model, given).loaded) == len(source.state_dict())
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_any_module_takes_what_fits():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.ones(5), "1.num_batches_tracked": torch.ones(())}
    report = load_matching(model, {f"module.{key}": value for key, value in state.items()})
    assert report == MatchReport(
        loaded=("0.weight",),
        missing=("1.weight", "1.bias", "1.running_mean", "1.running_var"),
        mismatched=("0.bias", "1.num_batches_tracked"),
        unexpected=(),
    )
    assert torch.equal(model[0].weight, torch.ones(4, 3, 3, 3))


def test_a_state_of_the_other_form_is_refused_and_nothing_changes():
    trained, deployed = (nn.ModuleDict({"a": RepConv2d(2), "b": nn.Conv2d(2, 2, 1)}) for _ in range(2))
    reparameterize_model(deployed, inplace=True)
    before = copy.deepcopy((trained.state_dict(), deployed.state_dict()))
    with pytest.raises(
        ValueError, match=r"the state is of the training form and ModuleDict is deployed: load it before"
    ):
        load_matching(deployed, trained.state_dict())
    with pytest.raises(ValueError, match=r"the state is of the deployed form and .* then to_training_form\(model"):
        load_matching(trained, deployed.state_dict())
    for model, state in zip((trained, deployed), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert load_matching(deployed, {"b.weight": torch.ones(2, 2, 1, 1)}).loaded == ("b.weight",)


def test_a_deployed_file_is_the_start_of_finetuning_at_another_scale(tmp_path):
    x2, x4 = (AutoModel.from_config(AutoConfig.from_name("span", num_feat=8, scale=s)).eval() for s in (2, 4))
    torch.save({"params": convert_state(reparameterize_model(x2), "span-basicsr-deployed")}, tmp_path / "span.pth")
    with pytest.raises(ValueError, match=r"span.pth is of the deployed form and SPAN in its training form"):
        load_matching(x4, tmp_path / "span.pth")
    reparameterize_model(x4, inplace=True)
    assert set(load_matching(x4, tmp_path / "span.pth").mismatched) == {"conv_last.weight", "conv_last.bias"}
    to_training_form(x4, inplace=True)
    assert x4.state_dict().keys() == x2.state_dict().keys()
    image = torch.rand(1, 3, 9, 8)
    torch.testing.assert_close(x4.features(image), x2.features(image), rtol=0, atol=1e-4)


def test_nothing_that_fits_is_refused_and_nothing_changes():
    model = rrdbnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"of the 1 tensors of the state none fits RRDBNet"):
        load_matching(model, {"conv_first.weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint nowhere.pth"):
        load_matching(model, "nowhere.pth")
    with pytest.raises(ValueError, match=r"the state must hold a plain mapping of names to tensors"):
        load_matching(model, {})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_frozen_parameters_stay_and_the_others_learn():
    model = rrdbnet(scale=2)
    names = freeze(model, "conv_first.*", "body.1.*")
    assert names == [name for name, _ in model.named_parameters() if name.startswith(("conv_first.", "body.1."))]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(normal((1, 3, 4, 4))).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in names), name


def with_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()


def test_the_statistics_of_a_frozen_norm_stay_whatever_the_mode():
    model = with_norms()
    freeze(model, "0.*", "1.*")
    freeze(model, "1.weight")
    assert len(model[1]._forward_pre_hooks) == 1
    for _ in range(2):
        model.train()
        before = copy.deepcopy(model.state_dict())
        model(3 + normal((2, 3, 8, 8)))
        for name, value in model.state_dict().items():
            if "running" in name:
                assert torch.equal(value, before[name]) == name.startswith("1."), name
    x = 3 + normal((2, 3, 8, 8))
    first = model[1](model[0](x))
    expected = (model[0](x) - model[1].running_mean[:, None, None]) / (model[1].running_var + 1e-5).sqrt()[
        :, None, None
    ]
    torch.testing.assert_close(first, expected)


def test_a_net_with_a_frozen_norm_is_copied_saved_compiled_and_released():
    model = with_norms()
    freeze(model, "1.*")
    twin = copy.deepcopy(model).train()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False).train()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend="aot_eager")
    for other in (twin, loaded, compiled):
        held = next(value for name, value in other.named_buffers() if name.endswith("1.running_mean"))
        before = held.clone()
        other(3 + normal((2, 3, 8, 8)))
        assert torch.equal(held, before)
    model.requires_grad_(True).train()
    before = model[1].running_mean.clone()
    model(3 + normal((2, 3, 8, 8)))
    assert not torch.equal(model[1].running_mean, before)


def test_patterns_that_match_nothing_raise_and_nothing_is_frozen():
    model = rrdbnet(scale=2)
    with pytest.raises(ValueError, match=r"pattern 'boddy\.\*' matches no parameter of RRDBNet"):
        freeze(model, "conv_first.*", "boddy.*")
    with pytest.raises(ValueError, match=r"freeze needs a pattern; '\*' matches every parameter"):
        freeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(freeze(model, "*")) == len(list(model.parameters()))
