"""What is counted, against closed forms and another counter."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import claritycore
from claritycore.blocks import (
    RRDB,
    BicubicUp,
    PixelShuffleUp,
    ResidualDenseBlock,
    SelectiveScan2d,
    reparameterize_model,
)
from claritycore.deploy import Summary, flop_formulas, fvcore_handles, summarize
from claritycore.nets import AutoConfig, AutoModel, RRDBNet, RRDBNetConfig
from tests.small_nets import LEARNERS, NETS


def rrdb_macs(channels: int, growth: int) -> int:
    """Multiply-adds of an RRDB for one pixel."""
    inner = sum(9 * (channels + i * growth) * growth for i in range(4))
    return 3 * (inner + 9 * (channels + 4 * growth) * channels)


@pytest.mark.parametrize(
    ("block", "macs_per_pixel"),
    [
        (ResidualDenseBlock(8, growth_channels=4), rrdb_macs(8, 4) // 3),
        (RRDB(8, growth_channels=4), rrdb_macs(8, 4)),
        (PixelShuffleUp(8, 3, scale_factor=2), 9 * 8 * 12),
        (BicubicUp(2), 16 * 4 * 8),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_of_blocks(block, macs_per_pixel):
    assert summarize(block, (2, 8, 5, 7)).macs == 2 * 5 * 7 * macs_per_pixel


def test_macs_of_rrdbnet():
    summary = summarize(RRDBNet(RRDBNetConfig(scale=2, num_feat=8, num_block=2, num_grow_ch=4)), (1, 3, 10, 12))
    low = 9 * 3 * 8 + 2 * rrdb_macs(8, 4) + 9 * 8 * 8 + 9 * 8 * 32
    high = 9 * 8 * 8 + 9 * 8 * 3
    assert summary.macs == 120 * low + 480 * high
    assert summary.uncounted == {}
    assert summary.output_shape == (1, 3, 20, 24)
    assert sum(part.macs for part in summary.parts) == summary.macs
    assert sum(part.parameters for part in summary.parts) == summary.parameters


@pytest.mark.parametrize("name", LEARNERS)
def test_the_parts_of_a_net_add_up_to_the_whole(name):
    """Lists of stages too, which are never called themselves."""
    summary = summarize(LEARNERS[name](), (1, 3, 16, 16))
    # HARMONIC enlarges a map between its parts.
    assert 0.999 * summary.macs < sum(part.macs for part in summary.parts) <= summary.macs
    assert sum(part.parameters for part in summary.parts) == summary.parameters


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("swin-unet-tiny", {}),
        ("rsfmoe-tiny", {}),
        ("hersr-tiny", {}),
        ("harmonic-tiny", {}),
        ("harmonic-tiny", {"fast_path": True}),
    ],
)
def test_the_readme_says_what_the_smallest_nets_cost(name, fields):
    page = (Path(claritycore.__file__).parent / "README.md").read_text()
    row = next(line for line in page.splitlines() if re.match(rf"\| `{name}` \| [\d,]+ \| [\d.]+ G \|", line))
    parameters, macs = [cell.strip() for cell in row.split("|")[2:6]][slice(2, 4) if fields else slice(2)]
    net = AutoModel.from_config(AutoConfig.from_name(name, scale=1, **fields)).eval()
    deployed = reparameterize_model(net)
    assert f"{sum(p.numel() for p in (deployed if fields else net).parameters()):,}" == parameters
    assert f"{summarize(deployed, (1, 3, 256, 256)).macs / 1e9:.1f} G" == macs


def test_activations_are_what_convolutions_write():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert summarize(net, (1, 3, 10, 10)).activations == 12 * 100


class RunningSums(nn.Module):
    def forward(self, x):
        return x.cumsum(dim=2).softmax(dim=1)


def test_what_cannot_be_counted_is_named():
    summary = summarize(RunningSums(), (1, 1, 8, 6))
    assert summary.uncounted == {"cumsum": 1, "_softmax": 1}
    assert "not counted       cumsum x1, _softmax x1" in str(summary)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_on_a_cpu_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 2, 64, 8)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        F.scaled_dot_product_attention(x, x, x)
    assert counter.get_total_flops() == 2 * 131072
    assert summarize(Attention(), (1, 2, 64, 8)).macs == 131072


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_fvcore_counts_the_same_with_our_handles():
    fvcore = pytest.importorskip("fvcore.nn")
    for module, shape in [(Attention(), (1, 2, 64, 8)), (BicubicUp(2), (1, 3, 8, 8)), (RRDB(4), (1, 4, 6, 6))]:
        analysis = fvcore.FlopCountAnalysis(module, torch.randn(shape))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(**fvcore_handles())
        assert analysis.total() == summarize(module, shape).macs


@pytest.mark.parametrize("name", ["PLKSR", "SwinUNet", "HERSR", "HARMONIC", "RSFMoENet"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fvcore_counts_whole_nets(name):
    """All that torch's counter counts, but for products with a vector; fvcore adds norms."""
    fvcore = pytest.importorskip("fvcore.nn")
    torch.manual_seed(0)
    net = NETS[name](scale=1).eval()
    analysis = fvcore.FlopCountAnalysis(net, torch.rand(1, 3, 16, 16))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = analysis.set_op_handle(**fvcore_handles()).by_operator()
    found = sum(macs for op, macs in counted.items() if not op.endswith("_norm"))
    assert found == pytest.approx(summarize(net, (1, 3, 16, 16)).macs, rel=2e-4)


def test_it_reads_well_and_leaves_the_module_alone():
    block = RRDB(8, growth_channels=4)
    assert isinstance(summarize(block, (1, 8, 16, 16)), Summary)
    weight = block.rdb1.conv1.weight
    printed = str(summarize(block, (1, 8, 16, 16)))
    assert printed.startswith("RRDB: (1, 8, 16, 16) -> (1, 8, 16, 16)")
    assert "receptive radius  15 pixels" in printed
    assert block.rdb1.conv1.weight is weight
    assert block.training


def test_a_refused_shape_raises():
    with pytest.raises(ValueError, match=r"^RRDB takes"):
        summarize(RRDB(8), (1, 3, 4, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_scans_are_counted_by_both():
    fvcore = pytest.importorskip("fvcore.nn")
    block = SelectiveScan2d(8, d_state=4, expand=2, dt_rank=1)
    pixels, inner, scans = 5 * 7, 16, 4
    linear = pixels * (8 * 2 * inner + 9 * inner + scans * inner * (1 + 2 * 4) + scans * inner + inner * 8)
    macs = linear + 9 * scans * pixels * inner * 4 // 2
    assert summarize(block, (1, 8, 5, 7)).macs == macs
    analysis = fvcore.FlopCountAnalysis(block.eval(), torch.randn(1, 8, 5, 7))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_op = analysis.set_op_handle(**fvcore_handles()).by_operator()
    assert by_op["selective_scan_2d"] == 9 * scans * pixels * inner * 4 // 2
