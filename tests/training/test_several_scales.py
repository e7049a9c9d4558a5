"""A run of a net with several scales: each step trains one of them, drawn by its number."""

from collections import Counter

import pytest
import torch

from claritycore.cli import main
from claritycore.images import read_image
from claritycore.nets import AutoConfig, AutoModel
from claritycore.training.loop import train
from claritycore.training.run_files import read_state
from claritycore.training.run_images import patch_size_of, scale_of_step
from claritycore.training.settings import TrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def two_scales(**fields):
    small = {"embed_dim": 8, "depths": (1, 1), "refinement": 0, "head_dim": 4, "scale": 2, "scales": (2, 4)}
    return AutoConfig.from_name("swin-unet-tiny", **{**small, **fields})


def test_every_head_learns_and_a_resumed_run_draws_the_same(make_settings):
    config, short = two_scales(), {"batch_size": 2, "schedule": "constant"}
    whole = train(config, make_settings(name="whole", **short))
    drawn = {scale_of_step(config, make_settings(), step) for step in range(6)}
    assert drawn == {2, 4}
    fresh, learned = AutoModel.from_config(config).state_dict(), read_state(whole).net
    for scale in (2, 4):
        key = f"head.heads.x{scale}.conv.weight"
        assert torch.count_nonzero(fresh[key]) == 0
        assert torch.count_nonzero(learned[key]) > 0
    train(config, make_settings(name="parts", **{**short, "steps": 3}))
    state = read_state(whole.with_name("parts"))
    train(config, make_settings(name="parts", **short), state=state)
    resumed = read_state(whole.with_name("parts")).net
    assert all(torch.equal(value, learned[key]) for key, value in resumed.items())


def test_every_scale_comes_as_often():
    counts = Counter(scale_of_step(two_scales(scales=(2, 3, 4)), TrainingSettings(), step) for step in range(3000))
    assert set(counts) == {2, 3, 4}
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())  # five standard deviations


def test_its_crops_fit_every_scale(make_settings, photos):
    assert patch_size_of(two_scales(scales=(2, 3)), TrainingSettings()) == 192
    assert patch_size_of(two_scales(scales=(2, 3, 4)), TrainingSettings()) == 252
    with pytest.raises(ValueError, match="patch_size must be a multiple of each of the scales 2, 3, got 16"):
        train(two_scales(scales=(2, 3)), make_settings())
    with pytest.raises(ValueError, match="degraded must be left out for a net of the scales 2, 4: give --recipe"):
        train(two_scales(), make_settings(degraded=str(photos)))


def test_the_command_line_takes_the_scale_that_is_asked_for(photos, tmp_path, capsys):
    path = AutoModel.from_config(two_scales()).save_pretrained(tmp_path / "net.safetensors")
    command = ["restore", "-i", str(photos / "0.png"), "--model", str(path), "--device", "cpu", "-o"]
    for scale in (2, 4):
        assert main([*command, str(tmp_path / f"{scale}.png"), "--scale", str(scale)]) == 0
        assert read_image(tmp_path / f"{scale}.png").pixels.shape == (1, 3, 48 * scale, 56 * scale)
    assert main([*command, str(tmp_path / "own.png")]) == 0
    assert read_image(tmp_path / "own.png").pixels.shape == (1, 3, 96, 112)
    assert main([*command, str(tmp_path / "3.png"), "--scale", "3"]) == 2
    assert "scale must be 2" in capsys.readouterr().err
    evaluated = ["evaluate", "--model", str(path), "--data", str(photos), "--max-images", "1", "--device", "cpu"]
    assert main([*evaluated, "--scale", "4"]) == 0
    assert main([*evaluated, "--scale", "3"]) == 2
