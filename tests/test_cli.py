"""The command line: what each verb prints, and one clear line with status 2 after bad input."""

import contextlib
import subprocess
import sys

import pytest

from claritycore import __version__, blocks
from claritycore.cli import VERBS, main


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
    assert all(f"  {name} " in printed for name in [*blocks.__all__, "rrdbnet", "rrdbnet-lite"])
    assert "16.92 M parameters" in printed


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert f"claritycore  {__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*blocks.__all__, "rrdbnet-lite"])
def test_summary_takes_every_block_and_net(name, capsys):
    assert main(["summary", name]) == 0
    assert "receptive radius" in capsys.readouterr().out


def test_summary_takes_the_fields_of_a_config_and_the_arguments_of_a_block(capsys):
    main(["summary", "rrdbnet", "--scale", "2", "--num-block", "1", "--height", "20", "--width", "30"])
    assert "(1, 3, 20, 30) -> (1, 3, 40, 60)" in capsys.readouterr().out
    main(["summary", "PixelShuffleUp", "--in-channels", "8", "--scale-factor", "3"])
    assert "(1, 8, 64, 64) -> (1, 8, 192, 192)" in capsys.readouterr().out


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
