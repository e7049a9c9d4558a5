"""The command line: what each verb prints, and one clear line with status 2 after bad input."""

import contextlib
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image

from claritycore import __version__, deploy
from claritycore.cli import BLOCKS, VERBS, main
from claritycore.cli_files import ExportFlags
from claritycore.nets import AutoConfig, AutoModel, RRDBNet, RRDBNetConfig, convert_state
from tests.small_nets import small_swin_unet


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
    assert re.search(r"^  joint +blur, downsample, noise, jpeg$", printed, re.MULTILINE)
    assert ":math:" not in printed
    shipped = {
        "claritycore-joint-x1": "Removes noise from photographs at their size, .*: RSFMoENet, 0.46 M",
        "claritycore-joint-x2": "Enlarges by 2 and removes noise: RSFMoENet, 0.46 M",
        "claritycore-x4": "Bicubic super-resolution by 4: PLKSR, 0.94 M",
    }
    assert all(re.search(rf"^  {name} +{what} parameters\.$", printed, re.MULTILINE) for name, what in shipped.items())


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


def test_summary_of_weights_is_that_of_their_net(capsys, tmp_path):
    main(["summary", "claritycore-x4"])
    shipped = capsys.readouterr().out
    net = AutoModel.from_pretrained("claritycore-x4")
    assert f"{sum(parameter.numel() for parameter in net.parameters()):,}" in shipped
    main(["summary", str(net.save_pretrained(tmp_path))])
    assert capsys.readouterr().out == shipped
    assert "did you mean claritycore-x4?" in refused(capsys, "summary", "claritycore-x5")


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


def test_export_writes_a_line_per_fact_and_info_reads_it(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    net = RRDBNet(RRDBNetConfig(num_feat=4, num_block=1, num_grow_ch=2, scale=2))
    net.save_pretrained(tmp_path)
    for name, layout in (("net.onnx", "ONNX"), ("net.pt2", "a program of torch.export")):
        options = ["--size", "10", "12", "--dtype", "float16"]
        assert main(["export", "--model", str(tmp_path), "-o", str(tmp_path / name), *options]) == 0
        out, error = capsys.readouterr()
        lines = out.splitlines()
        assert error == ""
        assert lines[0] == str(tmp_path / name)
        assert "  dynamic     batch 1 and up, height 1 and up, width 1 and up" in lines
        assert sum(line.startswith("  checked ") for line in lines) == 3
        assert main(["info", str(tmp_path / name)]) == 0
        told = capsys.readouterr().out.splitlines()
        assert f"  layout            {layout}" in told
        for fact in ("net               RRDBNet", "scale             2", "dtype             float16"):
            assert f"  {fact}" in told
    assert main(["export", "-m", str(tmp_path), "-o", str(tmp_path / "fused.safetensors"), "--static"]) == 0
    capsys.readouterr()
    assert f"{tmp_path / 'net.pt2'} exists" in refused(
        capsys, "export", "-m", str(tmp_path), "-o", str(tmp_path / "net.pt2")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("-m claritycore-x4 -o net.xyz", "net.xyz must end in .onnx, .pt2"),
        ("-m claritycore-x4 -o net.onnx --size 0 5", "height must be an integer of at least 1, got 0"),
        ("-m claritycore-x4 -o net.onnx --dtype bfloat16", "dtype must be float32 or float16 for ONNX"),
        ("-m claritycore-x4 -o net.onnx --dtype int8", "dtype"),
        ("-m nowhere.pth -o net.onnx", "there is no checkpoint nowhere.pth"),
        ("-m plksrr -o net.onnx", "there is no checkpoint plksrr; shipped are"),
        ("-m plksr-tiny --scale 5 -o net.onnx", "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ("-m claritycore-x4 --scale 2 -o net.onnx", "--scale must be 4, by which claritycore-x4 enlarges, got 2"),
        ("-m claritycore-x4", "-o FILE"),
    ],
)
def test_export_refuses_bad_input_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "export", *options.split())
    assert list(tmp_path.iterdir()) == []


def test_export_takes_the_name_of_a_net_and_says_that_it_is_not_trained(tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    assert main(["export", "-m", "swin-unet-tiny", "--scale", "3", "-o", str(path), "--size", "8", "8"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"{path}\n")
    assert error == "swin-unet-tiny is a net, not a file of one: its weights are fresh, for timing alone\n"
    assert AutoModel.from_pretrained(path).config == AutoConfig.from_name("swin-unet-tiny", scale=3)


def test_of_a_net_of_several_scales_one_is_exported_or_restores(tmp_path, capsys):
    net = small_swin_unet(scale=2, scales=(2, 4))
    net.save_pretrained(tmp_path / "both.safetensors")
    for scale in (2, 4):
        path = tmp_path / f"x{scale}.safetensors"
        places = ["-m", str(tmp_path / "both.safetensors"), "-o", str(path), "--size", "8", "8"]
        assert main(["export", *places, "--scale", str(scale)]) == 0
        assert AutoModel.from_pretrained(path).config == replace(net.config, scale=scale)
    Image.new("RGB", (6, 5)).save(tmp_path / "in.png")
    places = ["-i", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]
    assert main(["restore", *places, "-m", str(tmp_path / "both.safetensors"), "--scale", "4"]) == 0
    with Image.open(tmp_path / "out.png") as restored:
        assert restored.size == (24, 20)
    capsys.readouterr()


def test_export_names_the_extra_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    told = refused(capsys, "export", "-m", "claritycore-x4", "-o", str(tmp_path / "net.onnx"))
    assert told == "claritycore: ONNX needs onnxruntime, which is missing: pip install 'claritycore[export]'\n"


def test_info_says_when_an_exported_file_is_of_another_program_or_damaged(tmp_path, capsys):
    for name in ("cut.onnx", "cut.pt2"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        assert f"{name} is damaged" in refused(capsys, "info", str(tmp_path / name))
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), tmp_path / "theirs.pt2")
    assert main(["info", str(tmp_path / "theirs.pt2")]) == 0
    assert "of another program: it does not say which net it is" in capsys.readouterr().out


def test_the_flags_of_export_are_the_keywords_of_the_function():
    keywords = list(inspect.signature(deploy.export).parameters.values())[2:]
    assert {field.name: field.default for field in fields(ExportFlags)} == {key.name: key.default for key in keywords}


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
