"""The command line: what each verb prints, and one clear line with status 2 after bad input."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from claritycore import __version__
from claritycore.cli import BLOCKS, VERBS, main
from claritycore.nets import RRDBNet, RRDBNetConfig, convert_state


def refused(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_without_a_verb_the_verbs_are_listed(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(f"  {verb} " in printed for verb in VERBS)


def test_list(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in [*BLOCKS, "rrdbnet", "rrdbnet-lite", "plksr", "span"])
    assert "16.92 M parameters" in printed
    assert re.search(r"^weights\n  claritycore-x4 +A \w+ for x4, 0\.33 M parameters\.$", printed, re.MULTILINE)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert f"claritycore  {__version__}" in capsys.readouterr().out


# What takes a module, bands, tokens or a style is made in Python.
MADE_IN_PYTHON = (
    *("ConvAttention", "CrossAttention2d", "FreqFuse", "FrequencyCrossAttention", "MoE2d", "ModulatedConv2d"),
    *("ModulatedNoiseConv2d", "SwinBlock", "TextureHead"),
)


@pytest.mark.parametrize("name", [*BLOCKS, "rrdbnet-lite", "plksr-tiny", "span"])
def test_summary_takes_every_block_and_net(name, capsys):
    status = main(["summary", name])
    out, error = capsys.readouterr()
    if name in MADE_IN_PYTHON:
        assert (status, error) == (
            2,
            f"claritycore: {name} takes more than numbers and maps: build it in Python, for deploy.summarize\n",
        )
    else:
        assert status == 0
        assert "receptive radius" in out


def test_summary_takes_the_fields_of_a_config_and_the_arguments_of_a_block(capsys):
    main(["summary", "rrdbnet", "--scale", "2", "--num-block", "1", "--height", "20", "--width", "30"])
    assert "(1, 3, 20, 30) -> (1, 3, 40, 60)" in capsys.readouterr().out
    main(["summary", "PixelShuffleUp", "--in-channels", "8", "--scale-factor", "3"])
    assert "(1, 8, 64, 64) -> (1, 8, 192, 192)" in capsys.readouterr().out


def test_summary_of_the_form_that_is_shipped(capsys):
    main(["summary", "span", "--deployed"])
    assert "426,288" in capsys.readouterr().out
    main(["summary", "SPAB"])
    main(["summary", "SPAB", "--deployed"])
    trained, deployed = (
        int(line.split()[2].replace(",", "")) for line in capsys.readouterr().out.split("\n") if "total" in line
    )
    assert deployed < trained


def test_nets_are_reported_at_an_output_of_1280_by_720(capsys):
    main(["summary", "rrdbnet-lite", "--scale", "4", "--num-block", "1"])
    assert "(1, 3, 180, 320) -> (1, 3, 720, 1280)" in capsys.readouterr().out


def test_unknown_names_are_answered_with_the_nearest(capsys):
    assert refused(capsys, "sumary") == "claritycore: there is no verb 'sumary'; did you mean summary?\n"
    expected = "claritycore: there is no block or net 'LayerNorm'; did you mean LayerNorm2d?\n"
    assert refused(capsys, "summary", "LayerNorm") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary", "rrdbnet", "--scale", "5"], "claritycore: scale must be one of 1, 2, 3, 4, 8, got 5; see"),
        (["summary", "rrdbnet", "--scale", "x"], "Error parsing --scale: invalid literal"),
        (["summary", "rrdbnet", "--num-fea", "5"], "Perhaps you meant: --num-feat"),
        (["summary", "RRDB", "--channels", "0"], "claritycore: channels must be an integer of at least 1, got 0; see"),
        (["summary", "RRDB", "--height", "0"], "claritycore: --height must be at least 1, got 0"),
        (["list", "--all"], "claritycore: Unrecognized options: --all; see claritycore list --help"),
    ],
)
def test_bad_options_are_told_in_one_line(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_info_says_what_a_file_is(tmp_path, capsys):
    net = RRDBNet(RRDBNetConfig(num_feat=4, num_block=1, num_grow_ch=2, upsampler="nearest+conv"))
    torch.save({"params_ema": convert_state(net, "rrdbnet-esrgan"), "iter": 5}, tmp_path / "net.pth")
    assert main(["info", str(tmp_path / "net.pth")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        str(tmp_path / "net.pth"),
        "  layout      RRDBNet of ESRGAN and BSRGAN (rrdbnet-esrgan), found under params_ema",
        "  net         rrdbnet",
    ]
    assert "scale=4, num_feat=4" in printed[3]
    assert printed[4] == "  weights     3,659 in 42 tensors, float32"
    main(["info", str(net.save_pretrained(tmp_path))])
    assert "  layout      of this package\n" in capsys.readouterr().out
    torch.save({"somewhere.weight": torch.zeros(3)}, tmp_path / "net.pth")
    assert main(["info", str(tmp_path / "net.pth")]) == 0
    printed = capsys.readouterr().out
    assert "of no known layout\n" in printed
    assert "  refused     " in printed


class Bomb:
    """An object whose unpickling would run a command."""

    def __reduce__(self):
        return os.system, ("false",)


def test_info_refuses_what_is_no_checkpoint_in_one_line(tmp_path, capsys):
    net = RRDBNet(RRDBNetConfig(num_feat=4, num_block=1))
    whole = net.save_pretrained(tmp_path / "whole.safetensors").read_bytes()
    torch.save(net.state_dict(), tmp_path / "whole.pth")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    torch.save({"weight": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-200])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("hello, this is a letter\n")
    (tmp_path / "text.safetensors").write_text("hello, this is a letter\n")
    (tmp_path / "letter.txt").write_text("hello")
    (tmp_path / "picture.pth").write_bytes((tmp_path / "picture.png").read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.pth").mkdir()
    damaged = ["cut.safetensors", "cut.pth", "empty.safetensors", "empty.pth", "text.pth", "text.safetensors"]
    expected = {
        **dict.fromkeys([*damaged, "picture.pth"], "is damaged or no "),
        **dict.fromkeys(["letter.txt", "picture.png"], "must end in .safetensors, .pth, .pt or .ckpt"),
        **dict.fromkeys(["folder", "folder.pth", "nowhere.pth"], "there is no checkpoint "),
        "bomb.pth": "is refused: it holds more than tensors (posix.system)",
    }
    for name, message in expected.items():
        told = refused(capsys, "info", str(tmp_path / name))
        assert message in told
        assert name in told
    assert "CHECKPOINT" in refused(capsys, "info")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb, capsys):
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert VERBS[verb].__doc__.split(":")[0].rstrip(".") in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_runs_as_a_module_without_a_traceback():
    run = subprocess.run([sys.executable, "-m", "claritycore", "nonsense"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("claritycore: there is no verb 'nonsense'")
