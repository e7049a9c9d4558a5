"""Files of weights: they say what they are, and bad ones are refused in a sentence."""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from claritycore.nets import (
    AutoConfig,
    AutoModel,
    BaseConfig,
    RestorationNet,
    RRDBNet,
    RRDBNetConfig,
    inspect_checkpoint,
    load_matching,
    register_config,
)
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


def test_a_file_that_does_not_fit_is_refused_before_its_net_is_made(tmp_path, monkeypatch):
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

    monkeypatch.setattr(checkpoints_module.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"no space left"):
        net.save_pretrained(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


def test_plain_files_of_known_nets_need_no_config(net, tmp_path):
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    for name in ("plain.safetensors", "plain.pth"):
        for config in (None, net.config):
            loaded = AutoModel.from_pretrained(tmp_path / name, config)
            assert loaded.config == net.config
            assert same_weights(loaded, net)


@dataclass
class StrangerConfig(BaseConfig):
    """A net of someone's own: no layout knows its names, or another net has them too."""

    like_rrdbnet: bool = False

    def build(self) -> "Stranger":
        return Stranger(self)


class Stranger(RestorationNet):
    def __init__(self, config: StrangerConfig) -> None:
        super().__init__(config)
        self.body = RRDBNet(RRDBNetConfig(scale=2, **SMALL)) if config.like_rrdbnet else nn.Conv2d(1, 1, 3)
        if config.like_rrdbnet:
            for name, module in list(self.body.named_children()):
                self.add_module(name, module)

    def forward(self, image):
        return image


@pytest.mark.parametrize("like_rrdbnet", [False, True])
def test_plain_files_of_other_nets_need_a_config(like_rrdbnet, tmp_path):
    config = register_config("stranger")(StrangerConfig)(like_rrdbnet)
    net = config.build()
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    if not like_rrdbnet:
        with pytest.raises(
            ValueError,
            match=r"plain.pth does not say which net it belongs to; from_pretrained takes its config",
        ):
            AutoModel.from_pretrained(tmp_path / "plain.pth")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "plain.pth", config), net)


def prefixed(state, *prefixes: str):
    return {"".join(prefixes) + key: value for key, value in state.items()}


WRAPPERS = ["params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_weights_are_found_beside_what_a_training_loop_keeps(net, wrapper, tmp_path):
    beside = {"iter": 400_000, "epoch": 3.0, "arch": "RRDBNet", "best": None, "optimizer": {"state": {}, "lr": [0.1]}}
    torch.save({**beside, wrapper: {**net.state_dict(), "step": 5}}, tmp_path / "wrapped.pth")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "wrapped.pth"), net)
    assert inspect_checkpoint(tmp_path / "wrapped.pth").wrapping == (wrapper,)


def test_averaged_weights_are_preferred(net, tmp_path):
    plain = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    for averaged in ("params_ema", "params-ema"):
        torch.save({"params": plain, averaged: net.state_dict(), "state_dict": plain}, tmp_path / "both.pth")
        assert same_weights(AutoModel.from_pretrained(tmp_path / "both.pth"), net)
    torch.save({"params_ema": None, "params": net.state_dict()}, tmp_path / "none.pth")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "none.pth"), net)


@pytest.mark.parametrize(
    "prefixes",
    [
        *[("module.",), ("netG.",), ("_orig_mod.",), ("generator.",), ("model.",), ("net.",)],
        *[("_orig_mod.", "module."), ("module.",) * 2, ("model.", "net.", "_orig_mod.")],
    ],
)
def test_prefixes_of_all_names_are_taken_off(net, prefixes, tmp_path):
    torch.save({"model": {"state_dict": prefixed(net.state_dict(), *prefixes)}}, tmp_path / "prefixed.pth")
    save_file(prefixed(net.state_dict(), *prefixes), tmp_path / "prefixed.safetensors")
    for name, wrapping in (("prefixed.pth", ("model", "state_dict", *prefixes)), ("prefixed.safetensors", prefixes)):
        assert same_weights(AutoModel.from_pretrained(tmp_path / name), net)
        assert inspect_checkpoint(tmp_path / name).wrapping == wrapping
    some = {**prefixed(net.state_dict(), *prefixes), "encoder.weight": torch.zeros(1)}
    torch.save(some, tmp_path / "some.pth")
    with pytest.raises(ValueError, match=r"some.pth does not say which net it belongs to"):
        AutoModel.from_pretrained(tmp_path / "some.pth")


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("module.", {"n_averaged": torch.tensor(7)}),  # torch.optim.swa_utils.AveragedModel
        ("generator.", {"discriminator.conv.weight": torch.zeros(4, 3, 3, 3)}),
        ("netG.", {"netD.conv.weight": torch.zeros(4, 3, 3, 3)}),
    ],
)
def test_what_lies_beside_a_net_is_left_out(net, prefix, beside, tmp_path):
    torch.save({"state_dict": {**beside, **prefixed(net.state_dict(), prefix)}}, tmp_path / "beside.pth")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "beside.pth"), net)
    other = RRDBNetConfig(**SMALL).build()
    assert len(load_matching(other, tmp_path / "beside.pth").loaded) == len(net.state_dict())


def test_a_model_that_has_an_opponent_of_its_own_gets_it(tmp_path):
    def both():
        return nn.ModuleDict({"generator": nn.Conv2d(3, 3, 3), "discriminator": nn.Conv2d(3, 1, 3)})

    torch.save({"state_dict": (given := both()).state_dict()}, tmp_path / "gan.pth")
    assert len(load_matching(taken := both(), tmp_path / "gan.pth").loaded) == 4
    assert same_weights(taken, given)


def test_a_pickle_of_another_protocol_is_refused_without_a_warning_before(net, tmp_path, recwarn):
    torch.save(net.state_dict(), tmp_path / "four.pth", pickle_protocol=4)
    with pytest.raises(ValueError, match=r"four.pth is refused"):
        AutoModel.from_pretrained(tmp_path / "four.pth")
    assert not recwarn.list


def test_a_file_that_may_not_be_read_says_so(net, tmp_path, monkeypatch):
    path = net.save_pretrained(tmp_path / "locked.safetensors")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"locked.safetensors cannot be read: Permission denied"):
        AutoModel.from_pretrained(path)


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ValueError, match=r"pipe.pth is no regular file"):
        AutoModel.from_pretrained(tmp_path / "pipe.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_float32(net, dtype, tmp_path):
    torch.save({"params": net.to(dtype).state_dict()}, tmp_path / "half.pth")
    loaded = AutoModel.from_pretrained(tmp_path / "half.pth")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same_weights(loaded, net.float())
    assert str(dtype).removeprefix("torch.") in str(inspect_checkpoint(tmp_path / "half.pth"))


def test_parameters_that_still_want_gradients_load(net, tmp_path):
    torch.save(dict(net.named_parameters()), tmp_path / "parameters.pth")
    assert same_weights(AutoModel.from_pretrained(tmp_path / "parameters.pth"), net)


def test_weights_that_are_no_numbers_of_the_net_are_refused(net, tmp_path):
    torch.save({key: value.to(torch.int8) for key, value in net.state_dict().items()}, tmp_path / "quantised.pth")
    with pytest.raises(
        ValueError, match=r"quantised.pth does not fit RRDBNet: of its tensors \d+ of no floating-point"
    ):
        AutoModel.from_pretrained(tmp_path / "quantised.pth")


class Holder(RestorationNet):
    """A net whose every name starts with what is taken off names elsewhere."""

    def __init__(self, config: "HolderConfig") -> None:
        super().__init__(config)
        self.generator = nn.Conv2d(1, 1, 3)

    def forward(self, image):
        return self.generator(image)


@dataclass
class HolderConfig(BaseConfig):
    def build(self) -> Holder:
        return Holder(self)


def test_a_net_whose_own_names_have_such_a_prefix_loads(tmp_path):
    net = register_config("holder")(HolderConfig)().build()
    torch.save({"params": prefixed(net.state_dict(), "module.")}, tmp_path / "parallel.pth")
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    for name in ("plain.pth", "parallel.pth"):
        assert same_weights(AutoModel.from_pretrained(tmp_path / name, net.config), net)
    other = net.config.build()
    assert len(load_matching(other, tmp_path / "plain.pth").loaded) == 2
    assert same_weights(other, net)
    assert same_weights(AutoModel.from_pretrained(net.save_pretrained(tmp_path)), net)


def test_tensors_that_are_no_plain_ones_are_refused(net, tmp_path):
    state = net.state_dict()
    torch.save({**state, "conv_first.weight": torch.zeros(1).expand(9999, 9999, 3, 3)}, tmp_path / "liar.pth")
    with pytest.raises(ValueError, match=r"liar.pth is refused: one of its tensors claims to be larger than the whole"):
        AutoModel.from_pretrained(tmp_path / "liar.pth")
    for name, value in (("sparse", torch.ones(4).to_sparse()), ("meta", torch.ones(4, device="meta"))):
        torch.save({**state, "conv_first.bias": value}, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=rf"{name}.pth must hold a plain mapping of names to tensors"):
            AutoModel.from_pretrained(tmp_path / f"{name}.pth")


def test_mappings_without_end_are_refused(net, tmp_path):
    endless: dict = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    deep = net.state_dict()
    for _ in range(9):
        deep = {"model": deep}
    torch.save(deep, tmp_path / "deep.pth")
    for name in ("endless.pth", "deep.pth"):
        with pytest.raises(ValueError, match=rf"{name} must hold a plain mapping of names to tensors"):
            AutoModel.from_pretrained(tmp_path / name)


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
    torch.save({"weights_of_mine": net.state_dict(), "iter": 5}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=r"wrapped.pth must hold .*; its weights may be under 'weights_of_mine'"):
        AutoModel.from_pretrained(tmp_path / "wrapped.pth", net.config)
    torch.save({"params": {**net.state_dict(), "history": [1, 2]}}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"more.pth must hold a plain mapping of names to tensors"):
        AutoModel.from_pretrained(tmp_path / "more.pth")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pth")
    with pytest.raises(ValueError, match=r"numbered.pth must hold a plain mapping of names to tensors"):
        AutoModel.from_pretrained(tmp_path / "numbered.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"program.pt is refused: it is a TorchScript program"):
        AutoModel.from_pretrained(tmp_path / "program.pt")


def test_the_object_that_is_refused_is_named(tmp_path):
    torch.save({"params": {"weight": torch.zeros(1)}, "loss": np.float64(0.5)}, tmp_path / "numpy.pth")
    with pytest.raises(ValueError, match=r"numpy.pth is refused: it holds more than tensors \(numpy\..*scalar\)"):
        inspect_checkpoint(tmp_path / "numpy.pth")


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("span", {"num_block": 10**8, "num_feat": 1}, "more than 1100 parameters, for 1 tensors"),
        ("rrdbnet", {"num_feat": 10**12}, "Storage size"),
        ("span", {"num_feat": 10**30}, ""),
        ("plksr", {"num_feat": 10**12}, "Storage size"),
        ("plksr", {"kernel_size": 10**15 + 1, "form": "dilated"}, "kernel_size must be at most 1023"),
        ("plksr", {"branches": ["1x1-" * 10**4 + "1x1"]}, "more than 1100 parameters"),
    ],
)
def test_a_small_file_that_describes_a_huge_net_is_refused_at_once(model_type, fields, reason, tmp_path):
    checkpoint = checkpoints_module.Checkpoint({"a": torch.zeros(1)}, model_type, fields)
    path = checkpoints_module.write_checkpoint(tmp_path / "huge.safetensors", checkpoint)
    with pytest.raises(
        ValueError, match=f"huge.safetensors describes a net that cannot be made: .*{reason}"
    ) as refused:
        AutoModel.from_pretrained(path)
    assert "\n" not in str(refused.value)
    assert inspect_checkpoint(path).refusal == str(refused.value)
    AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=60))  # the limit is gone


def test_equal_nets_give_equal_files(net, tmp_path):
    """In every process: the library that writes them has an order of its own in each."""
    net.save_pretrained(tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == ["claritycore", "format"]
    assert checkpoints_module._in_order(data) == data
    assert same_weights(AutoModel.from_pretrained(tmp_path / "net.safetensors"), net)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints_module.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*weights\.bin"):
        checkpoints_module.write_whole(tmp_path / "weights.bin", b"1")
