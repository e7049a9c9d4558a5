"""The comparison of nets: what is trained and measured, and that a run is taken up where it stands."""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import claritycore
from claritycore.nets import PLKSRConfig, list_models, registry
from claritycore.training import TrainingInterrupted
from claritycore.training.interruption import Interruption

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import comparison, trained  # noqa: E402

SMALL = PLKSRConfig(scale=1, num_feat=8, num_block=1, kernel_size=5)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two small nets, trained for two steps and measured, and the folder of it all."""
    place = tmp_path_factory.mktemp("comparison")
    (place / "images").mkdir()
    comparison.photographs(place / "images")
    files = ["--data", str(place / "images"), "--validation", str(place / "images")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_NETS", dict(registry._NETS))
        patch.setattr(
            comparison, "TABLES", {"nets": {"small": SMALL, "dn cnn": comparison.DnCNNConfig(num_feat=4, depth=3)}}
        )
        patch.setattr(torch, "set_num_threads", lambda number: None)
        folders = ["--runs", str(place / "runs"), "--csv", str(place / "results")]
        comparison.main(["nets", *files, *folders, "--steps", "2"])
    return place


def test_its_rows_say_what_each_net_costs_and_makes(compared):
    (path,) = (compared / "results").glob("*.csv")
    small, dncnn = trained.read(path, trained.Row)
    assert (small.net, dncnn.net) == ("small", "dn cnn")
    assert path.with_suffix(".png").stat().st_size > 1000
    # DnCNN deployed or not: three convolutions of 3x3, whose channels are 3, 4, 4 and 3.
    assert dncnn.macs == 9 * (3 * 4 + 4 * 4 + 4 * 3) * 256**2
    assert dncnn.parameters == 9 * (3 * 4 + 4 * 4 + 4 * 3) + 4 + 2 * 4 + 3
    for row in (small, dncnn):
        assert (row.steps, row.batch_size, row.images, row.recipe) == (2, 8, 4, "noise25")
        assert row.seconds > 0
        # The mean square error is about that of low frequencies and that of high ones.
        assert max(row.lf_psnr, row.hf_psnr) > row.psnr > 5
    assert small.input_psnr == dncnn.input_psnr
    assert (small.lr, dncnn.lr) == (2e-3, 5e-4)


def test_a_run_that_is_done_is_taken_and_another_is_refused(compared):
    state = trained.read_state(compared / "runs" / "nets-small")
    assert state.step == 2
    weights = compared / "runs" / "nets-small" / "model.safetensors"
    before = weights.read_bytes()
    net = trained.trained("nets-small", SMALL, replace(state.settings, data="moved"))
    assert net.config == SMALL
    assert weights.read_bytes() == before
    with pytest.raises(ValueError, match="is a run of another net or other settings"):
        trained.trained("nets-small", SMALL, replace(state.settings, steps=3))


def test_a_run_that_was_interrupted_goes_on(compared, monkeypatch):
    state = trained.read_state(compared / "runs" / "nets-small")
    whole = {key: value.clone() for key, value in state.net.items()}
    settings = replace(state.settings, name="nets-again", save_every=1)
    held = property(lambda self: signal.SIGINT, lambda self, number: None)  # as if Ctrl-C came in the first step
    monkeypatch.setattr(Interruption, "number", held, raising=False)
    with pytest.raises(TrainingInterrupted):
        trained.trained("nets-again", SMALL, settings)
    monkeypatch.undo()
    assert trained.read_state(compared / "runs" / "nets-again").step == 1
    trained.trained("nets-again", SMALL, settings)
    for key, value in trained.read_state(compared / "runs" / "nets-again").net.items():
        assert torch.equal(value, whole[key])


def test_experts_that_are_left_out_are_not_counted():
    from tests.small_nets import small_harmonic

    torch.manual_seed(0)
    net = small_harmonic(scale=1, bypass=0.5).eval()
    flat, rough = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert trained._macs(net, flat) < trained._macs(net, rough)


def test_the_yardstick_is_known_to_the_comparison_alone(compared):
    assert "dncnn" not in list_models()


def test_every_table_is_of_nets_of_about_equal_size_or_of_one_with_parts_changed():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in c.build().parameters()) for name, c in comparison.TABLES["nets"].items()}
    assert max(sizes.values()) < 1.25 * min(sizes.values())
    for table in ("harmonic", "swin-unet"):
        first, *others = comparison.TABLES[table].values()
        assert len({first, *others}) == 1 + len(others)
        assert {type(config) for config in others} == {type(first)}
