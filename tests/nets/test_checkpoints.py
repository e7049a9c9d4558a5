"""Files of weights: they say what they are, and bad ones are refused in a sentence."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from claritycore.nets import AutoConfig, AutoModel, RestorationNet, RRDBNet, RRDBNetConfig
from claritycore.nets import checkpoints as checkpoints_module

SMALL = {"num_feat": 4, "num_block": 1, "num_grow_ch": 2}


@pytest.fixture
def net() -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(RRDBNetConfig(scale=2, **SMALL))


def same_weights(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_a_file_says_what_it_is(net, tmp_path):
    path = net.save_pretrained(tmp_path / "net.safetensors")
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["claritycore"])
    assert described["model_type"] == "rrdbnet"
    assert described["config"]["scale"] == 2
    assert "model_type" not in described["config"]


def test_a_folder_takes_the_usual_name(net, tmp_path):
    path = net.save_pretrained(tmp_path / "folder")
    assert path == tmp_path / "folder" / "model.safetensors"
    assert same_weights(AutoModel.from_pretrained(tmp_path / "folder"), net)


def test_half_precision_and_channels_last_come_back_as_float32(net, tmp_path):
    half = net.to(torch.bfloat16, memory_format=torch.channels_last)
    loaded = AutoModel.from_pretrained(half.save_pretrained(tmp_path))
    assert same_weights(loaded, net.float())


@pytest.mark.parametrize("name", ["net.pth", "net.bin"])
def test_other_suffixes_are_not_written(net, tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must end in .safetensors, or be a folder"):
        net.save_pretrained(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_is_refused_before_its_net_is_made(net, tmp_path, monkeypatch):
    description = json.dumps({"model_type": "rrdbnet", "config": {"num_feat": 2048}})
    save_file({"conv_first.bias": torch.zeros(1)}, tmp_path / "liar.safetensors", metadata={"claritycore": description})
    made = []
    build = RRDBNetConfig.build
    monkeypatch.setattr(RRDBNetConfig, "build", lambda config: made.append(build(config)) or made[-1])
    with pytest.raises(ValueError, match=r"liar.safetensors does not fit RRDBNet"):
        AutoModel.from_pretrained(tmp_path / "liar.safetensors")
    assert {parameter.device.type for made_net in made for parameter in made_net.parameters()} == {"meta"}


@pytest.mark.parametrize("fields", [{"num_feat": "64"}, {"scale": 5}, {"width": 3}, {"num_block": None}])
def test_a_description_of_no_net_is_refused(tmp_path, fields):
    description = json.dumps({"model_type": "rrdbnet", "config": fields})
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata={"claritycore": description})
    with pytest.raises(
        ValueError, match=rf"odd.safetensors describes a net that cannot be made: .*{next(iter(fields))}"
    ):
        AutoModel.from_pretrained(tmp_path / "odd.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_litter(net, tmp_path, monkeypatch):
    path = net.save_pretrained(tmp_path / "net.safetensors")
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints_module, "save_file", full_disk)
    with pytest.raises(OSError, match=r"no space left"):
        net.save_pretrained(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_plain_files_need_a_config(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} does not say which net it belongs to; give its config"):
            AutoModel.from_pretrained(tmp_path / name)
        assert same_weights(AutoModel.from_pretrained(tmp_path / name, net.config), net)


def test_a_checkpoint_of_another_net_is_refused(net, tmp_path):
    class OtherNet(RestorationNet):
        pass

    path = net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a checkpoint of RRDBNet, not of OtherNet"):
        OtherNet.from_pretrained(path)
    other = AutoConfig.from_name("rrdbnet", scale=4, **SMALL)
    with pytest.raises(
        ValueError, match=r"does not fit RRDBNet: of its tensors 2 missing \(first conv_up2.conv.weight"
    ):
        AutoModel.from_pretrained(path, other)
    wide = AutoConfig.from_name("rrdbnet", scale=2, **{**SMALL, "num_feat": 5})
    with pytest.raises(ValueError, match=r"of another shape \(first conv_first.weight\)"):
        AutoModel.from_pretrained(path, wide)


def test_a_checkpoint_of_another_family_is_refused(net, tmp_path):
    path = tmp_path / "other.safetensors"
    description = json.dumps({"model_type": "someone-elses", "config": {}})
    save_file(net.state_dict(), path, metadata={"claritycore": description})
    with pytest.raises(ValueError, match=r"is a checkpoint of someone-elses, not of rrdbnet"):
        AutoModel.from_pretrained(path, net.config)
    with pytest.raises(ValueError, match=r"there is no net 'someone-elses'"):
        AutoModel.from_pretrained(path)


@pytest.mark.parametrize("description", ["{", "[]", '{"config": {}}', '{"model_type": "rrdbnet", "config": 3}'])
def test_an_unreadable_description_is_refused(net, tmp_path, description):
    save_file(net.state_dict(), tmp_path / "odd.safetensors", metadata={"claritycore": description})
    with pytest.raises(ValueError, match=r"odd.safetensors describes itself unreadably"):
        AutoModel.from_pretrained(tmp_path / "odd.safetensors")


def test_damaged_files_are_refused(net, tmp_path):
    whole = net.save_pretrained(tmp_path / "whole.safetensors").read_bytes()
    torch.save(net.state_dict(), tmp_path / "whole.pth")
    pickled = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.safetensors is damaged or no safetensors file"):
            AutoModel.from_pretrained(tmp_path / "cut.safetensors")
    for size in (0, 5, 100, len(pickled) - 100):
        (tmp_path / "cut.pth").write_bytes(pickled[:size])
        with pytest.raises(ValueError, match=r"cut.pth is (damaged or no torch checkpoint|refused)"):
            AutoModel.from_pretrained(tmp_path / "cut.pth", net.config)


class Bomb:
    """An object whose unpickling would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_that_wants_to_run_code_is_refused(net, tmp_path, save):
    target = tmp_path / "it-ran"
    save({"conv_first.weight": Bomb(target)}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb.pth is refused: it holds more than tensors"):
        AutoModel.from_pretrained(tmp_path / "bomb.pth", net.config)
    assert not target.exists()


def test_other_files_are_refused(net, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nowhere.safetensors"):
        AutoModel.from_pretrained(tmp_path / "nowhere.safetensors")
    (tmp_path / "net.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"net.txt must end in .safetensors, .pth, .pt or .ckpt"):
        AutoModel.from_pretrained(tmp_path / "net.txt")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth must hold a plain mapping of names to tensors"):
        AutoModel.from_pretrained(tmp_path / "list.pth", net.config)
    torch.save({"params_ema": net.state_dict(), "iter": 5}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=r"wrapped.pth must hold .*; its weights may be under 'params_ema'"):
        AutoModel.from_pretrained(tmp_path / "wrapped.pth", net.config)
