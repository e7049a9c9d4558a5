"""Nets by name, and configs of a user's own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from claritycore.models import AutoConfig, AutoModel, BaseConfig, list_models, register_config, register_presets
from claritycore.nets.registry import registered_presets

# The documented ways of asking for a net, word for word.
CONFIGURATION = """
from claritycore.models import AutoConfig, AutoModel

# Default configuration
config = AutoConfig.from_name("rrdbnet", scale=4)

# Custom configuration
config = AutoConfig.from_name(
    "rrdbnet",
    scale=4,
    num_feat=64,      # Feature channels (32 for lite, 64 for full)
    num_block=23,     # RRDB blocks (6 for lite, 23 for full)
    num_grow_ch=32,   # Dense block growth channels
)

model = AutoModel.from_config(config)
"""
FULL = 'config = AutoConfig.from_name("rrdbnet", scale=4, num_feat=64, num_block=23)'
LITE = 'config = AutoConfig.from_name("rrdbnet", scale=4, num_feat=32, num_block=6)'

# A file of a user's own, outside the package.
MY_MODEL = """
from dataclasses import dataclass
from claritycore.models.base import BaseConfig
from claritycore.models.auto import register_config

@register_config("mymodel")
@dataclass
class MyModelConfig(BaseConfig):
    model_type: str = "mymodel"
    scale: int = 4
"""


def run(*snippets: str) -> dict:
    names: dict = {"__name__": "mymodel.config"}
    for snippet in snippets:
        exec(snippet, names)
    return names


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_configuration_snippet_runs():
    assert parameters(run(CONFIGURATION)["model"]) == 16_919_555


@pytest.mark.parametrize(("variant", "count"), [(FULL, 16_919_555), (LITE, 2_585_443)])
def test_the_variant_snippets_run(variant, count):
    names = run(CONFIGURATION, variant)
    assert parameters(AutoModel.from_config(names["config"])) == count


def test_a_config_from_a_users_file_is_found_by_name():
    names = run(MY_MODEL)
    assert AutoConfig.from_name("mymodel", scale=2) == names["MyModelConfig"](scale=2)
    assert "mymodel" in list_models()
    with pytest.raises(NotImplementedError, match=r"MyModelConfig does not override build\(\)"):
        AutoModel.from_config(AutoConfig.from_name("mymodel"))
    run(MY_MODEL)  # as a notebook cell that is run again


def test_a_users_net_is_built_saved_and_loaded(tmp_path):
    from claritycore.nets import RestorationNet

    @register_config("users-net", sizes={"users-net-wide": {"width": 16}})
    @dataclass
    class UsersConfig(BaseConfig):
        width: int = 8
        kernel: tuple[int, int] = (3, 1)
        nested: tuple[tuple[int, ...], ...] = ((1, 2), (3,))

        def build(self) -> nn.Module:
            return UsersNet(self)

    class UsersNet(RestorationNet):
        def __init__(self, config: UsersConfig) -> None:
            super().__init__(config)
            self.conv = nn.Conv2d(3, config.width, config.kernel)

    net = AutoModel.from_config(AutoConfig.from_name("users-net-wide"))
    assert net.conv.out_channels == 16
    again = AutoModel.from_pretrained(net.save_pretrained(tmp_path))
    assert again.config == net.config
    assert again.config.kernel == (3, 1)
    assert torch.equal(again.conv.weight, net.conv.weight)


def test_presets_are_kept_and_not_overwritten():
    config = AutoConfig.from_name("rrdbnet", scale=4)
    register_presets({"my-presetx4": (config, "settings")})
    register_presets({"my-presetx4": (config, "settings")})
    assert registered_presets()["my-presetx4"] == (config, "settings")
    registered_presets().clear()
    assert "my-presetx4" in registered_presets()
    with pytest.raises(ValueError, match=r"the preset name 'my-presetx4' is taken"):
        register_presets({"my-presetx4": (config, "other settings")})


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"there is no net 'rrdbnt'; did you mean rrdbnet"):
        AutoConfig.from_name("rrdbnt")
    with pytest.raises(ValueError, match=r"there is no net 'RRDBNet'; did you mean rrdbnet\?"):
        AutoConfig.from_name("RRDBNet")
    with pytest.raises(ValueError, match=r"there is no net 'xyz'; known are .*rrdbnet, rrdbnet-lite"):
        AutoConfig.from_name("xyz")
    with pytest.raises(ValueError, match=r"rrdbnet has no field 'num_feats'; did you mean num_feat"):
        AutoConfig.from_name("rrdbnet", num_feats=32)


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match=r"config must come from AutoConfig.from_name .*, got 'rrdbnet'"):
        AutoModel.from_config("rrdbnet")


def test_bad_registrations_raise():
    with pytest.raises(TypeError, match=r"Plain must be a dataclass that derives from BaseConfig"):

        @register_config("plain")
        class Plain:
            pass

    with pytest.raises(ValueError, match=r"the name 'rrdbnet' is taken by RRDBNetConfig"):

        @register_config("a-new-name", sizes={"rrdbnet": {}})
        @dataclass
        class OtherConfig(BaseConfig):
            pass

    assert "a-new-name" not in list_models()  # all of a registration, or nothing
    with pytest.raises(ValueError, match=r"MisnamedConfig.model_type is 'one', not 'two'"):

        @register_config("two")
        @dataclass
        class MisnamedConfig(BaseConfig):
            model_type: str = "one"
