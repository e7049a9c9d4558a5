"""Changing form: in place, on copies, through containers and walkers, with files and averages; and what is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from claritycore.blocks import (
    LayerNorm2d,
    PLKBlock,
    Reparameterizable,
    ReparameterizationReport,
    RepConv2d,
    reparameterize_model,
    to_training_form,
    verify_reparameterization,
)
from claritycore.nets import SPAN, SPANConfig
from tests.contracts import CONTRACTS
from tests.strategies import normal

FUSING = {name: contract for name, contract in CONTRACTS.items() if contract.fuses}
BRANCHES = ("5x5", "3x3@2", "1x1", "identity", "1x1-3x3", "average", "laplacian")


def rep_blocks(model: nn.Module) -> list[Reparameterizable]:
    return [module for module in model.modules() if isinstance(module, Reparameterizable)]


@pytest.fixture
def model() -> nn.Module:
    """Two blocks with batch norms that have seen data, in a container."""
    torch.manual_seed(0)
    model = nn.Sequential(
        RepConv2d(4, kernel_size=5, branches=BRANCHES, norm="branch"),
        nn.ReLU(),
        RepConv2d(4, kernel_size=5, groups=4, branches=BRANCHES, norm="sum"),
    )
    for seed in range(3):
        model(normal((2, 4, 9, 9), seed=seed))
    return model.eval()


def test_contracts_say_which_blocks_fuse():
    for name, contract in CONTRACTS.items():
        assert contract.fuses == bool(rep_blocks(contract.make(contract.channels[-1]))), name


@pytest.mark.parametrize("contract", FUSING.values(), ids=FUSING.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=str)
def test_every_block_computes_the_same_when_deployed(contract, dtype, tolerance):
    c = contract.channels[-1]
    block = contract.make(c, dtype=dtype).eval()
    deployed = reparameterize_model(block)
    assert all(not part.deployed for part in rep_blocks(block))
    assert all(part.deployed for part in rep_blocks(deployed))
    for height, width in [(9, 14), (1, 1), (2, 31)]:
        x = normal((2, c, height, width), dtype=dtype)
        expected = block(x)
        torch.testing.assert_close(deployed(x), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("contract", FUSING.values(), ids=FUSING.keys())
def test_a_deployed_block_exports_without_fusing_differentiates_and_mutates_nothing(contract):
    c = contract.channels[-1]
    trained = contract.make(c).eval()
    block = reparameterize_model(trained)
    x = normal((2, c, 8, 11)).requires_grad_()
    before = x.detach().clone()
    block(x).square().mean().backward()
    assert torch.equal(x, before)
    for name, tensor in [("input", x), *block.named_parameters()]:
        assert (tensor.grad != 0).any(), name
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(block, (before,), dynamic_shapes=(sizes,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    convolutions = [name for name in called if "conv" in name]
    kept = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == len(kept)
    # No arithmetic on parameters alone: what is multiplied, added, padded or composed has come from the input.
    weights = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    arithmetic = ("mul", "add", "sub", "div", "pad", "conv", "matmul", "einsum", "sum", "rsqrt", "copy")
    for node in program.graph.nodes:
        if node.op == "call_function" and any(word in str(node.target) for word in arithmetic):
            assert not {source.name for source in node.all_input_nodes} <= weights, node


def test_deploying_changes_the_model_in_place_or_a_copy_that_shares_nothing(model):
    x = normal((1, 4, 7, 8))
    expected = model(x)
    first, second = reparameterize_model(model), reparameterize_model(model)
    assert torch.equal(model(x), expected)
    for fused in (first, second):
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5)
    storages = [{p.data_ptr() for p in m.parameters()} for m in (model, first, second)]
    assert len(set.union(*storages)) == sum(map(len, storages))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    torch.testing.assert_close(second(x), expected, rtol=0, atol=1e-5)
    assert reparameterize_model(model, inplace=True) is model
    assert all(block.deployed for block in rep_blocks(model))
    assert torch.equal(model(x), second(x))


def test_the_root_itself_is_fused():
    block = RepConv2d(4, branches=("3x3", "1x1"))
    assert reparameterize_model(block).deployed
    assert not block.deployed


def test_deploying_twice_is_deploying_once(model):
    reparameterize_model(model, inplace=True)
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    reparameterize_model(model, inplace=True)
    model[0].switch_to_deploy()
    for key, value in model.state_dict().items():
        assert (value.data_ptr(), True) == (before[key][0], torch.equal(value, before[key][1]))
    untrained = RepConv2d(4)
    names = list(untrained.state_dict())
    untrained.to_training_form()
    assert list(untrained.state_dict()) == names


def test_nothing_changes_form_by_itself(model):
    x = normal((1, 4, 7, 8))
    for mode in (True, False, True, False):
        model.train(mode)(x)
        assert not any(block.deployed for block in rep_blocks(model))


@pytest.mark.parametrize("norm", ["branch", "sum"])
def test_batch_norm_in_train_mode_is_refused_and_nothing_is_half_done(norm):
    model = nn.Sequential(RepConv2d(4), RepConv2d(4, norm=norm))
    with pytest.raises(RuntimeError, match=r"RepConv2d cannot fuse its batch norm .*call eval\(\) first"):
        reparameterize_model(model, inplace=True)
    assert not any(block.deployed for block in rep_blocks(model))
    with pytest.raises(RuntimeError, match=r"takes the statistics of the batch: call eval\(\) first"):
        model[1].switch_to_deploy()
    model.eval()
    model[1].to_training_form()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    with pytest.raises(RuntimeError, match="it keeps no running statistics"):
        reparameterize_model(model)


def test_without_batch_norm_the_mode_does_not_matter():
    block = RepConv2d(4).train()
    block.switch_to_deploy()
    assert block.training
    assert block.fused.training


def test_state_dicts_of_either_form_load_into_that_form_only(model):
    deployed = reparameterize_model(model)
    x = normal((1, 4, 7, 8))
    assert not set(model.state_dict()) & set(deployed.state_dict())
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    fused = reparameterize_model(fresh)
    fresh.load_state_dict(model.state_dict())
    fused.load_state_dict(deployed.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(fused(x), deployed(x))
    with pytest.raises(
        RuntimeError, match=r"0 is in its training form and the checkpoint is of the deployed form: call"
    ):
        fresh.load_state_dict(deployed.state_dict())
    with pytest.raises(RuntimeError, match=r"0 is deployed and the checkpoint is of its training form: load it into"):
        fused.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"RepConv2d is deployed and the checkpoint"):
        fused[0].load_state_dict(model[0].state_dict())


@pytest.mark.parametrize("deployed", [False, True])
def test_a_mix_up_of_a_net_of_many_blocks_is_one_line(deployed):
    trained = nn.Sequential(*(RepConv2d(4, branches=("3x3", "1x1")) for _ in range(8))).eval()
    net, other = (reparameterize_model(trained), trained) if deployed else (trained, reparameterize_model(trained))
    with pytest.raises(RuntimeError, match=r"^0 is (deployed|in its training form) and the checkpoint") as refused:
        net.load_state_dict(other.state_dict())
    assert "\n" not in str(refused.value)


def test_an_empty_state_dict_is_no_mix_up():
    assert RepConv2d(4).load_state_dict({}, strict=False).unexpected_keys == []


def test_the_walker_of_timm_finds_the_blocks(model):
    """timm's reparameterize_model: for each child the first of fuse, reparameterize and switch_to_deploy, downwards."""

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if hasattr(child, "fuse"):
                setattr(module, name, child.fuse())
            elif hasattr(child, "reparameterize"):
                child.reparameterize()
            elif hasattr(child, "switch_to_deploy"):
                child.switch_to_deploy()
            walk(child)

    net = SPAN(SPANConfig(num_feat=6, num_block=2)).eval()
    for module, x in [(model, normal((1, 4, 7, 8))), (net, normal((1, 3, 7, 8)))]:
        expected = module(x)
        walk(module)
        assert all(block.deployed for block in rep_blocks(module))
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_averages_are_fused_from_the_average(model):
    model.double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    with torch.no_grad():
        for _ in range(3):
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            average.update_parameters(model)
    average.eval()
    x = normal((1, 4, 7, 8), dtype=torch.float64)
    expected = average(x)
    torch.testing.assert_close(reparameterize_model(average)(x), expected, rtol=0, atol=1e-11)
    assert not any(block.deployed for block in rep_blocks(average))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_form(model, twin):
    x = normal((1, 4, 7, 8))
    deployed = reparameterize_model(model)
    assert torch.equal(twin(deployed)(x), deployed(x))
    again = twin(deployed)
    again[0].to_training_form()
    assert deployed[0].deployed
    assert not again[0].deployed


def test_frozen_blocks_stay_frozen_and_dtype_and_mode_are_kept():
    block = RepConv2d(4).to(torch.bfloat16).requires_grad_(False).eval()
    block.switch_to_deploy()
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert block.fused.weight.dtype == torch.bfloat16
    assert not block.fused.training
    block.to_training_form()
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in block.parameters())


def test_works_on_meta_and_draws_no_random_numbers():
    with torch.device("meta"):
        block = RepConv2d(4, kernel_size=5, branches=BRANCHES)
    block.switch_to_deploy()
    assert block.fused.weight.is_meta
    block.to_training_form()
    assert all(parameter.is_meta for parameter in block.parameters())
    block = RepConv2d(4)
    state = torch.get_rng_state()
    block.switch_to_deploy()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_measures_each_block_and_the_model(model):
    x = normal((1, 4, 7, 8))
    report = verify_reparameterization(model, x)
    assert isinstance(report, ReparameterizationReport)
    assert [(block.name, block.kind) for block in report.blocks] == [("0", "RepConv2d"), ("2", "RepConv2d")]
    assert 0 < report.relative_error < 5e-6
    assert all(0 < block.relative_error < 5e-6 for block in report.blocks)
    assert report.blocks[0].parameters[1] == 4 * 4 * 25 + 4
    assert report.blocks[1].parameters[1] == 4 * 25 + 4
    assert report.blocks[0].macs[1] == 4 * 4 * 25 * 7 * 8
    assert report.blocks[1].macs[1] == 4 * 25 * 7 * 8
    assert report.macs[0] > report.macs[1]
    for form, whole in enumerate((model, reparameterize_model(model.eval()))):
        assert report.parameters[form] == sum(parameter.numel() for parameter in whole.parameters())
    assert "whole model" in str(report)
    assert not any(block.deployed for block in rep_blocks(model))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_report_counts_what_lies_between_the_blocks():
    report = verify_reparameterization(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), RepConv2d(4)), normal((1, 4, 7, 8)))
    assert [whole - block for whole, block in zip(report.parameters, report.blocks[0].parameters, strict=True)] == [
        148
    ] * 2
    assert [whole - block for whole, block in zip(report.macs, report.blocks[0].macs, strict=True)] == [144 * 56] * 2
    assert str(report.parameters[1]) in str(report).splitlines()[-1]


def test_a_model_comes_back_into_its_training_form_in_place_or_as_a_copy(model):
    x = normal((1, 4, 7, 8))
    deployed = reparameterize_model(model.eval())
    y = deployed(x)
    trained = to_training_form(deployed)
    assert all(block.deployed for block in rep_blocks(deployed))
    assert to_training_form(deployed, inplace=True) is deployed
    for back in (trained, deployed):
        assert {name: value.shape for name, value in back.state_dict().items()} == {
            name: value.shape for name, value in model.state_dict().items()
        }
        torch.testing.assert_close(back(x), y, rtol=0, atol=5e-6 * y.abs().max().item())
    assert not any(block.deployed for block in rep_blocks(deployed))


def test_a_model_without_a_way_back_stays_deployed():
    blocks = [RepConv2d(4, branches=branches) for branches in (("3x3",), ("sobel-x",))]
    model = reparameterize_model(nn.Sequential(*blocks).eval())
    with pytest.raises(ValueError, match=r"none of the branches sobel-x can hold a whole 3x3 kernel"):
        to_training_form(model, inplace=True)
    assert all(block.deployed for block in rep_blocks(model))


def test_what_is_fused_in_inference_mode_can_be_differentiated(model):
    with torch.inference_mode():
        deployed = reparameterize_model(model.eval())
        model[0].switch_to_deploy()
    for fused in (deployed, model):
        fused(normal((1, 4, 7, 8))).sum().backward()


def test_the_report_finds_a_block_that_fuses_wrongly():
    class Wrong(Reparameterizable):
        def __init__(self):
            super().__init__()
            self.first, self.second = LayerNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.fused(x) if self.deployed else self.second(self.first(x))

        def fused_modules(self):
            return {"fused": copy.deepcopy(self.second)}

    report = verify_reparameterization(nn.Sequential(RepConv2d(4), Wrong()), normal((1, 4, 7, 8)))
    assert report.blocks[0].relative_error < 5e-6
    assert report.blocks[1].relative_error > 1e-2
    with pytest.raises(NotImplementedError, match=r"Wrong does not override training_modules\(\)"):
        _deployed(Wrong()).to_training_form()


def _deployed(block: Reparameterizable) -> Reparameterizable:
    block.switch_to_deploy()
    return block


def test_there_must_be_something_to_compare_and_a_rule_to_fuse_by():
    with pytest.raises(ValueError, match="Conv2d has no block in its training form: there is nothing to compare"):
        verify_reparameterization(nn.Conv2d(4, 4, 1), normal((1, 4, 7, 8)))
    with pytest.raises(NotImplementedError, match=r"Reparameterizable does not override fused_modules\(\)"):
        Reparameterizable().switch_to_deploy()


def test_no_kernel_that_can_hold_the_whole_means_no_way_back():
    block = _deployed(RepConv2d(4, kernel_size=5, branches=("3x3@2", "1x1")))
    with pytest.raises(ValueError, match=r"none of the branches 3x3@2, 1x1 can hold a whole 5x5 kernel"):
        block.to_training_form()
    assert block.deployed


def test_a_deployed_block_is_smaller():
    block = PLKBlock(16, kernel_size=9, form="dilated")
    counts = [sum(parameter.numel() for parameter in b.parameters()) for b in (block, reparameterize_model(block))]
    assert counts[1] == counts[0] - 2 * (16 * 25 + 4)
