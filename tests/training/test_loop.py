"""Runs: they learn, go on to the bit, stop before NaN, and do not depend on how many processes share a batch."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from claritycore.images import Picture, read_image, write_image
from claritycore.nets import AutoConfig, AutoModel, BaseConfig, RestorationNet, register_config
from claritycore.training import data, loop
from claritycore.training.loop import TrainingStopped, train
from claritycore.training.run_config import read_config
from claritycore.training.run_files import read_state
from claritycore.training.settings import TrainingSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_state(a, b):
    """Two nested states are equal to the bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


def assert_same_run(first, second):
    a, b = read_state(first), read_state(second)
    for name in ("step", "net", "average", "optimizer", "critic", "best"):
        assert_same_state(getattr(a, name), getattr(b, name))


def test_a_run_learns_and_leaves_its_files(make_settings, config, photos):
    settings = make_settings(steps=40, ema=True, validation=str(photos), validate_every=20, save_every=10)
    told = []
    folder = train(replace(config, dropout=0.0), settings, tell=told.append)
    losses = [line["loss"] for line in log_of(folder) if "loss" in line]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])
    files = {"last.ckpt", "log.jsonl", "model.safetensors", "best.safetensors"}
    assert {path.name for path in folder.iterdir()} >= files
    net = AutoModel.from_pretrained(folder / "model.safetensors")
    assert net.config == replace(config, dropout=0.0)
    state = read_state(folder)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.average.items())
    assert any(not torch.equal(value, state.average[key]) for key, value in state.net.items())
    validated = [line for line in log_of(folder) if "validation_psnr" in line]
    assert [line["step"] for line in validated] == [20, 40]
    assert state.best == max(line["validation_psnr"] for line in validated)
    assert "step 20, clean: PSNR" in told[0]
    assert {path.name for path in (folder / "pictures").iterdir()} == {f"{n}_{s}.png" for n in (0, 1) for s in (20, 40)}
    assert read_image(folder / "pictures" / "0_40.png").pixels.shape == (1, 3, 48, 3 * 56)


def test_the_crops_of_a_run_are_shrunk_as_it_asks(make_settings, config):
    losses = [log_of(train(config, make_settings(name=str(s), steps=1, shrink=s)))[0]["loss"] for s in (0.5, 1.0)]
    assert losses[0] != losses[1]


def test_a_run_starts_from_weights_as_far_as_they_fit_and_holds_what_is_frozen(make_settings, config):
    first = train(config, make_settings(name="x2", steps=2))
    other = replace(config, scale=4)
    told = []
    begun = {"start": str(first / "model.safetensors"), "freeze": ("body.*",), "steps": 3}
    second = train(other, make_settings(name="x4", **begun), tell=told.append)
    assert re.match(r"\d+ of \d+ tensors loaded", told[0])
    before, after = read_state(first).net, read_state(second).net
    for key, value in after.items():
        assert torch.equal(value, before[key]) == key.startswith("body.") if value.shape == before[key].shape else True
    assert not torch.equal(after["conv_first.weight"], before["conv_first.weight"])


def test_validation_takes_several_recipes(make_settings, config, photos):
    options = {"validation": str(photos), "validation_recipes": ("clean", "noise25"), "pictures": 0, "steps": 1}
    folder = train(config, make_settings(**options))
    assert [line["recipe"] for line in log_of(folder) if "validation_psnr" in line] == ["clean", "noise25"]


def test_a_validation_that_fails_costs_no_finished_steps(make_settings, config, photos, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "evaluate", fail)
    settings = make_settings(steps=5, save_every=100, validation=str(photos), validate_every=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config, settings)
    assert read_state(Path(settings.runs) / "run").step == 3


def test_recipes_without_effect_are_told(make_settings, config):
    told = []
    train(replace(config, scale=1), make_settings(steps=1, validation_recipes=("noise25",)), tell=told.append)
    assert told == [
        "--validation-recipes has no effect: give --validation FOLDER too",
        "clean degrades nothing at scale 1: give --recipe",
    ]
    told.clear()
    train(replace(config, scale=1), make_settings(steps=1, name="noise", recipe="noise25"), tell=told.append)
    assert not told


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("fields", [{"ema": True}, {"loss": "l1+0.1*hinge(width=4)", "accumulate": 2}], ids=str)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(make_settings, config, stop, fields):
    whole = train(config, make_settings(name="whole", **fields))

    class Broken(Exception):
        pass

    def break_off(run, step):
        save(run, step)
        if step == stop:
            raise Broken

    save = loop._Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "save", break_off)
        with pytest.raises(Broken):
            train(config, make_settings(name="broken", **fields))
    folder = whole.parent / "broken"
    state = read_state(folder)
    assert state.step == stop
    train(state.config, state.settings, state=state)
    assert_same_run(whole, folder)


def test_a_run_that_goes_on_with_fewer_images_says_so(make_settings, config, photos, tmp_path):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    folder = train(config, make_settings(data=str(tmp_path), steps=2))
    (tmp_path / "3.png").unlink()
    told = []
    state = read_state(folder)
    train(state.config, replace(state.settings, steps=4), state=state, tell=told.append)
    assert "8 images were trained on, now 7: others are drawn from here on" in told


def test_micro_batches_change_nothing(make_settings, config):
    config = replace(config, dropout=0.0)
    whole, parts = (
        read_state(train(config, make_settings(name=f"a{n}", steps=10, batch_size=8, accumulate=n))) for n in (1, 4)
    )
    for key, value in whole.net.items():
        torch.testing.assert_close(parts.net[key], value, rtol=1e-4, atol=1e-6)


def test_checkpointing_gives_the_same_gradients(make_settings):
    for name in ("rrdbnet-lite", "plksr", "span"):
        sizes = {"num_feat": 8, "num_block": 2, "scale": 2} | ({"num_grow_ch": 4} if "rrdb" in name else {})
        config = AutoConfig.from_name(name, **sizes)
        states = [
            read_state(train(config, make_settings(name=f"{name}-{on}", steps=3, checkpointing=on)))
            for on in (False, True)
        ]
        assert_same_state(states[0].net, states[1].net)


def test_a_net_of_ones_own_trains(make_settings):
    class Enlarger(RestorationNet):
        def __init__(self, config):
            super().__init__(config)
            self.conv = nn.Conv2d(3, 12, 3, padding=1)

        def forward(self, image):
            return nn.functional.pixel_shuffle(self.conv(image), 2)

    @register_config("enlarger")
    @dataclass
    class EnlargerConfig(BaseConfig):
        scale: int = 2

        def build(self):
            return Enlarger(self)

    folder = train(EnlargerConfig(), make_settings(steps=3))
    assert type(AutoModel.from_pretrained(folder / "model.safetensors")) is Enlarger
    with pytest.raises(ValueError, match="Enlarger has no body of blocks"):
        train(EnlargerConfig(), make_settings(name="other", checkpointing=True))


def test_nan_stops_with_the_batch_saved_and_the_checkpoint_sound(make_settings, config, monkeypatch):
    class Poisoned(loop.WeightedLoss):
        def forward(self, restored, target, step=0):
            loss, parts = super().forward(restored, target, step)
            return (loss * float("nan") if step == 4 else loss), parts

    monkeypatch.setattr(loop, "WeightedLoss", Poisoned)
    with pytest.raises(TrainingStopped, match="step 4 gave NaN or infinity"):
        train(config, make_settings())
    run = Path(make_settings().runs) / "run"
    saved = torch.load(run / "bad_batch_step4_process0.pt", weights_only=True)
    assert saved["clean"].shape == (4, 3, 16, 16)
    assert saved["degraded"].shape == (4, 3, 8, 8)
    state = read_state(run)
    assert state.step == 4
    assert all(value.isfinite().all() for value in state.net.values())


def test_nan_in_a_gradient_alone_stops_too(make_settings, config, monkeypatch):
    class Rough(loop.WeightedLoss):
        def forward(self, restored, target, step=0):
            loss, parts = super().forward(restored, target, step)
            # Its value is 0 and its gradient NaN.
            return (loss + (restored - restored.detach()).abs().sqrt().sum() if step == 4 else loss), parts

    monkeypatch.setattr(loop, "WeightedLoss", Rough)
    for name, clip in (("free", None), ("clipped", 1.0)):
        settings = make_settings(name=name, clip=clip, save_every=4)
        with pytest.raises(TrainingStopped, match="step 4 gave NaN or infinity"):
            train(config, settings)
        state = read_state(Path(settings.runs) / name)
        assert state.step == 4
        assert all(value.isfinite().all() for value in state.net.values())


def test_an_average_that_begins_later_begins_with_the_weights_of_then(make_settings, config):
    folder = train(config, make_settings(steps=40, lr=1e-2))
    state = read_state(folder)
    train(config, replace(state.settings, ema=True, steps=41, lr=1e-6), state=state)
    after = read_state(folder)
    assert max((after.average[key] - value).abs().max() for key, value in after.net.items()) < 1e-4


def test_a_start_that_failed_leaves_its_name_free(make_settings, config):
    with pytest.raises(ValueError, match="batch_size must be a multiple"):
        train(config, make_settings(batch_size=3, accumulate=2))
    folder = train(config, make_settings(steps=1))
    (folder / "last.ckpt").unlink()  # as if killed before the first checkpoint
    train(config, make_settings(steps=2))
    assert [line["step"] for line in log_of(folder)] == [1, 2]


def test_a_run_that_is_done_is_not_resumed(make_settings, config):
    state = read_state(train(config, make_settings(steps=2)))
    with pytest.raises(ValueError, match=r"has made 2 steps already: give more by --steps"):
        train(config, state.settings, state=state)


def test_a_run_keeps_what_it_was_begun_with(make_settings, config):
    settings = make_settings(steps=1)
    folder = train(config, settings)
    assert read_config(folder / "run.toml", None, TrainingSettings()) == (config, settings)


def test_a_full_disk_leaves_the_last_good_checkpoint(make_settings, config):
    written = []

    def fsync(_):
        written.append(1)
        if len(written) > 2:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("claritycore.nets.checkpoints.os.fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            train(config, make_settings())
    folder = Path(make_settings().runs) / "run"
    assert read_state(folder).step == 2
    assert not list(folder.glob(".*"))
    train(config, read_state(folder).settings, state=read_state(folder))
    assert read_state(folder).step == 6


def test_the_start_follows_from_the_seed(make_settings, config):
    first, again, other = (
        read_state(train(config, make_settings(name=f"r{n}", steps=2, seed=seed))) for n, seed in enumerate((1, 1, 2))
    )
    assert_same_state(first.net, again.net)
    assert any(not torch.equal(value, other.net[key]) for key, value in first.net.items())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": "nowhere"}, FileNotFoundError, "there is no folder nowhere"),
        ({"recipe": "cleam"}, ValueError, r"there is no recipe 'cleam'; did you mean clean\?"),
        ({"validation_recipes": ("clena",)}, ValueError, r"there is no recipe 'clena'; did you mean clean\?"),
        ({"validation_recipes": ("clean",) * 2}, ValueError, "must name each recipe once, got clean, clean"),
        ({"loss": "l3"}, ValueError, "l3"),
        ({"loss": "l1+0.1*hinge(in_channels=1,width=4)@5"}, ValueError, "loss hinge does not fit this run: UNetDiscr"),
        ({"loss": "l1+ssim", "patch_size": 8}, ValueError, "loss ssim does not fit this run: .*8"),
        ({"patch_size": 15}, ValueError, "patch_size must be a multiple of the scale 2, got 15"),
        ({"patch_size": 64}, ValueError, r"8 of 8 images in .* cannot be used; the first: .*64 x 64 are needed"),
        ({"device": "tpu"}, ValueError, "device must be auto or one of cpu.*, got 'tpu'"),
        ({"batch_size": 3, "accumulate": 2}, ValueError, "batch_size must be a multiple of"),
    ],
)
def test_what_does_not_fit_is_told_before_the_first_step(make_settings, config, fields, error, message):
    with pytest.raises(error, match=message):
        train(config, make_settings(**fields))


def test_a_loss_that_does_not_fit_is_told_before_any_image_is_decoded(make_settings, config, monkeypatch):
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("decoded"))
    grey = replace(config, in_channels=1, out_channels=1)
    with pytest.raises(ValueError, match=r"loss hinge does not fit this run: .*C = 3.*\(1, 1, 16, 16\)"):
        train(grey, make_settings(loss="l1+0.1*hinge(width=4)"))
    with pytest.raises(ValueError, match=r"loss l1 does not fit this run: .*\(1, 3, 16, 16\) and \(1, 1, 16, 16\)"):
        train(replace(config, in_channels=1), make_settings())
    assert not Path(make_settings().runs).exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_image_that_proves_damaged_is_one_line(make_settings, config, tmp_path, photos, workers):
    image = tmp_path / "images" / "0.jpg"
    image.parent.mkdir()
    write_image(image, read_image(photos / "0.png"))
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"^.*images/0\.jpg is damaged or cut short .*again$") as refused:
        train(config, make_settings(data=str(tmp_path / "images"), workers=workers))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["2.png", "2.jpg"])
def test_a_truncated_validation_image_is_told_at_the_start_or_skipped(make_settings, config, tmp_path, photos, name):
    folder = tmp_path / "validation"
    folder.mkdir()
    for number in range(3):
        write_image(folder / f"{number}{name[1:]}", read_image(photos / f"{number}.png"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) * 3 // 4])
    validated = {"validation": str(folder), "validate_every": 1, "steps": 1, "pictures": 0}
    with pytest.raises(
        ValueError, match=rf"1 of 3 images in .*validation cannot be used; the first: .*/{name} is damaged"
    ):
        train(config, make_settings(**validated))
    assert not Path(make_settings().runs).exists()
    told = []
    train(config, make_settings(**validated, skip_unusable=True), tell=told.append)
    assert f"1 images of {folder} are left out, the first: {folder / name}" in told[0]
    assert "over 2 images" in told[1]


def test_of_a_data_set_given_whole_the_clean_training_images_are_taken(make_settings, config, tmp_path, photos):
    root, small = tmp_path / "DIV2K", read_image(photos / "0.png")
    for folder in ("DIV2K_train_HR", "DIV2K_train_LR_bicubic/X2", "DIV2K_train_LR_unknown/X4", "DIV2K_valid_HR"):
        (root / folder).mkdir(parents=True)
        write_image(root / folder / "0001.png", small)
    told = []
    train(config, make_settings(data=str(root), steps=1), tell=told.append)
    counted = f"3 images of {root} are left out by the names of their folders"
    assert told == [f"{counted}: DIV2K_train_LR_bicubic, DIV2K_train_LR_unknown, DIV2K_valid_HR"]
    told.clear()
    train(config, make_settings(name="validated", validation=str(root), steps=1), tell=told.append)
    assert f"{counted}: DIV2K_train_HR, DIV2K_train_LR_bicubic, DIV2K_train_LR_unknown" in told
    assert any("over 1 images" in line for line in told)


def test_a_run_is_not_begun_over_another(make_settings, config):
    train(config, make_settings(steps=1))
    with pytest.raises(FileExistsError, match=r"exists: give another --name, or go on by: claritycore resume"):
        train(config, make_settings(steps=1))


def test_one_corrupt_image_is_named_or_skipped(make_settings, config, tmp_path):
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        write_image(tmp_path / "images" / f"{number}.png", Picture(torch.rand(1, 3, 24, 24)))
    (tmp_path / "images" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = {"data": str(tmp_path / "images"), "steps": 2}
    with pytest.raises(ValueError, match=r"1 of 4 images in .* cannot be used; the first: .*bad.png"):
        train(config, make_settings(**data))
    told = []
    train(config, make_settings(**data, skip_unusable=True), tell=told.append)
    assert re.fullmatch(r"1 images of .*images are left out, the first: .*bad.png is (?!.*bad.png).*", told[0])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*last.ckpt: nothing to resume"):
        read_state(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last.ckpt is (damaged|refused)"):
        read_state(tmp_path)
