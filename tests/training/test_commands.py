"""The verbs that train and measure: the documented commands start, files override, and bad input is one line."""

import json
import subprocess
import sys

import pytest
import torch

from claritycore.cli import main
from claritycore.images import Picture, read_image, write_image
from claritycore.nets import AutoModel
from claritycore.training import preset_names, read_state

SMALL = ["--num-feat", "8", "--num-block", "1", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--no-amp"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

U_NETS = {
    "swin-unet": "--embed-dim 8 --depths 1 1 --head-dim 4 --refinement 0",
    "hersr": "--widths 4 8 --depths 1 --head-dim 4 --norm-groups 2",
    "harmonic": "--embed-dim 8 --depths 1 1 --head-dim 4 --refinement 0",
    "rsfmoe": "--embed-dim 8 --depths 1 --head-dim 8 --window-size 4 --moe-window 4 --kernel-size 5",
}


def options_of(name: str) -> list[str]:
    patch = {"x1": 16, "x2": 16, "x3": 24, "x4": 32, "x8": 32}[name[-2:]]
    for family, sizes in U_NETS.items():
        if family in name:
            return [*sizes.split(), *SMALL[4:], "--patch-size", str(patch)]
    kernel = ["--kernel-size", "5"] if "plksr" in name else []
    return [*SMALL, *kernel, "--patch-size", str(patch)]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_starts(name, photos, tmp_path, capsys):
    assert main([name, "--data", str(photos), "--runs", str(tmp_path), "--steps", "2", *options_of(name)]) == 0
    assert "model.safetensors: 2 steps done" in capsys.readouterr().out
    state = read_state(tmp_path / name)
    assert state.step == 2
    assert state.config.scale == int(name[-1])


def test_a_preset_trains_the_head_of_an_early_exit_too(photos, tmp_path):
    place = ["--data", str(photos), "--runs", str(tmp_path), "--steps", "4", "--log-every", "1", "--lr", "1e-2"]
    assert main(["rsfmoex1", "--early-exit", "--loss", "l1", *place, *options_of("rsfmoex1")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rsfmoex1" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    for line in lines:
        aux = sum(value for name, value in line.items() if name.startswith("exit.") or ".texture." in name)
        assert line["loss"] == pytest.approx(line["l1"] + aux, rel=1e-4)
    assert lines[0]["exit.early"] == 0  # a net that adds nothing to the image needs no decoder
    assert lines[-1]["exit.early"] > 0
    assert all(line["exit.confidence"] > 0 for line in lines)
    state = read_state(tmp_path / "rsfmoex1")
    torch.manual_seed(state.settings.seed)
    fresh = AutoModel.from_config(state.config).state_dict()
    (head,) = [name for name in fresh if name.startswith("bottleneck") and name.endswith("linear.bias")]
    assert not torch.equal(state.net[head], fresh[head])


def test_the_documented_commands_start(photos, tmp_path):
    small = ["--num-feat", "8", "--num-block", "1", "--patch-size", "32", "--workers", "0", "--device", "cpu"]
    place = ["--data", str(photos), "--runs", str(tmp_path)]
    assert main(["rrdbnetx4", "--batch-size", "8", "--steps", "1", "--ema", *small, *place]) == 0
    assert read_state(tmp_path / "rrdbnetx4").average is not None
    custom = (
        "train --model rrdbnet --scale 4 --num-feat 8 --num-block 1 --batch-size 16 --steps 1 --lr 2e-4 --loss l1 --amp"
    )
    assert main([*custom.split(), "--name", "my_experiment", *small[4:], *place]) == 0
    settings = read_state(tmp_path / "my_experiment").settings
    assert (settings.batch_size, settings.lr, settings.loss, settings.amp) == (16, 2e-4, "l1", True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rrdbnetx2", "rrdbnet-litex2", "plksrx2", "plksr-tinyx2", "realplksrx4", "spanx2"])
def test_each_family_trains(name, photos, tmp_path):
    run = [
        "--data",
        str(photos),
        "--runs",
        str(tmp_path),
        "--steps",
        "200",
        "--lr",
        "2e-3",
        "--log-every",
        "1",
        "--clip",
        "1",
    ]
    assert main([name, *options_of(name), "--recipe", "clean", *run]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert AutoModel.from_pretrained(tmp_path / name / "model.safetensors").config.num_feat == 8


def test_a_file_gives_the_flags_and_flags_win(photos, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'model = "span"\nscale = 2\nnum-feat = 8\nnum-block = 1\ndata = "{photos}"\nlr = 1e-3\n'
    )
    common = ["--runs", str(tmp_path), "--steps", "1", "--patch-size", "16", "--device", "cpu", "--lr", "5e-4"]
    assert main(["train", "--config", str(tmp_path / "run.toml"), *common]) == 0
    state = read_state(tmp_path / "spanx2")
    assert (state.config.num_feat, state.settings.lr, state.settings.data) == (8, 5e-4, str(photos))


def test_the_folder_of_a_run_is_a_checkpoint(photos, tmp_path, capsys):
    run = ["--data", str(photos), "--runs", str(tmp_path), "--steps", "1", *options_of("spanx2")]
    assert main(["spanx2", *run]) == 0
    folder, device = str(tmp_path / "spanx2"), ["--device", "cpu"]
    assert main(["restore", "-i", str(photos / "0.png"), "-o", str(tmp_path / "a.png"), "-m", folder, *device]) == 0
    assert main(["evaluate", "--model", folder, "--data", str(photos), *device]) == 0
    assert main(["spanx2", *run, "--name", "second", "--start", folder]) == 0
    assert main(["info", folder]) == 0
    assert "num_feat=8" in capsys.readouterr().out
    assert AutoModel.from_pretrained(folder).config == read_state(folder).config


def test_evaluate_prints_a_table_and_writes_it(photos, tmp_path, capsys):
    recipes = ["--recipes", "clean", "noise25"]
    csv = ["--csv", str(tmp_path / "table.csv"), "--max-images", "2", "--device", "cpu"]
    assert main(["evaluate", "--model", "claritycore-x4", "--data", str(photos), *recipes, *csv]) == 0
    printed = capsys.readouterr().out
    assert printed.count("mean of 2") == 2
    assert "noise25" in (tmp_path / "table.csv").read_text()
    assert main(["evaluate", "--model", "claritycore-x4", "--data", str(photos), *recipes, *csv]) == 2
    assert "exists" in capsys.readouterr().err


def test_degrade_writes_pictures_and_what_was_drawn(photos, tmp_path):
    command = ["degrade", "-i", str(photos), "-o", str(tmp_path / "out"), "--recipe", "joint", "--scale", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    assert read_image(tmp_path / "out" / "0.png").pixels.shape == (1, 3, 24, 28)
    lines = (tmp_path / "out" / "degradations.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert main([*command, "--device", "cpu"]) == 2


def test_restore_takes_the_shipped_net(photos, tmp_path, capsys):
    command = ["restore", "-i", str(photos / "0.png"), "-o"]
    for scale, option in ((4, []), (2, ["--scale", "2"]), (1, ["--scale", "1"])):
        assert main([*command, str(tmp_path / f"x{scale}.png"), *option, "--device", "cpu"]) == 0
        assert read_image(tmp_path / f"x{scale}.png").pixels.shape == (1, 3, 48 * scale, 56 * scale)
    assert main([*command, str(tmp_path / "x3.png"), "--scale", "3"]) == 2
    assert "no weights for scale 3 are shipped, only for 1, 2, 4: give --model CHECKPOINT" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "named.png"), "--model", "claritycore-x5"]) == 2
    assert (
        "there is no checkpoint claritycore-x5; shipped are claritycore-joint-x1, claritycore-joint-x2, claritycore-x4"
        in capsys.readouterr().err
    )


def test_the_shipped_net_beats_bicubic_by_far():
    from skimage import data

    from claritycore.deploy import restore_picture
    from claritycore.images import imresize, psnr
    from claritycore.training import degrade

    photograph = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    small = degrade(photograph, "clean", [0], scale=4).image
    restored = restore_picture(AutoModel.from_pretrained("claritycore-x4").eval(), Picture(small)).pixels
    bicubic = imresize(small, 4, intermediate="float")
    figures = [psnr(image, photograph, crop_border=4, y_channel=True).item() for image in (bicubic, restored)]
    assert figures[1] > figures[0] + 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rrdbnetx4"], "there is no folder datasets/DIV2K: give --data FOLDER"),
        (["train"], "give --model NAME"),
        (["train", "--model", "rrdbnte"], "there is no net 'rrdbnte'; did you mean rrdbnet?"),
        (["rrdbnetx5"], "there is no verb 'rrdbnetx5'; did you mean rrdbnetx"),
        (["train", "--model", "span", "--lr", "-1"], "lr must be positive and finite, got -1.0"),
        (["train", "--model", "span", "--batch-sise", "3"], "--batch-size"),
        (["train", "--model", "span", "--recipe", "cleen"], "there is no recipe 'cleen'; did you mean clean?"),
        (["train", "--model", "span", "--config", "nowhere.toml"], "there is no file nowhere.toml"),
        (["resume", "nowhere"], "there is no checkpoint nowhere/last.ckpt: nothing to resume"),
        (["resume"], "give the folder of a run"),
        (["evaluate", "--model", "claritycore-x4", "--data", "nowhere"], "there is no folder nowhere"),
        (["evaluate", "--model", "claritycore-x4", "--data", ".", "--recipes", "nois25"], "did you mean noise25?"),
        (["degrade", "-i", "nowhere.png", "-o", "x.png"], "nowhere.png"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_one_corrupt_image_among_good_ones(photos, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:3]:
        write_image(folder / path.name, read_image(path))
    (folder / "bad.png").write_bytes(b"nothing")
    command = ["spanx2", "--data", str(folder), "--runs", str(tmp_path), "--steps", "1", *options_of("spanx2")]
    assert main(command) == 2
    assert "1 of 4 images" in capsys.readouterr().err
    assert main([*command, "--skip-unusable"]) == 0


def test_resume_takes_the_checkpoint_of_a_run_too(photos, tmp_path):
    place = ["--data", str(photos), "--runs", str(tmp_path), "--steps", "1"]
    assert main(["spanx2", *place, *options_of("spanx2")]) == 0
    assert main(["resume", str(tmp_path / "spanx2" / "last.ckpt"), "--steps", "2"]) == 0
    assert read_state(tmp_path / "spanx2").step == 2


def test_a_reader_that_has_enough_ends_it_quietly():
    command = f"set -o pipefail; {sys.executable} -m claritycore list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("blocks\n", "")
    assert done.returncode in (0, 141)
