"""What lands in site-packages, from a wheel and from an editable install, whatever the checkout's folder is called."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import claritycore

pytestmark = pytest.mark.slow

ROOT = Path(claritycore.__file__).parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout in a folder that no package could be called."""
    folder = tmp_path_factory.mktemp("packaging") / "clarity-core 2"
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "__pycache__", "out", ".*_cache", "tests")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    stale = checkout / "build" / "lib" / "claritycore" / "blocks" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("raise ImportError")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", checkout / "dist", cwd=checkout)
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture
def fresh_python(tmp_path) -> Path:
    """An environment that has this one's libraries, but not claritycore."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A path file is read for paths alone: those of the other environment, editable installs among them, are not.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(python: Path, *arguments: object, cwd: Path) -> None:
    """By the pip of this environment: to unpack one into another takes ten seconds."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *arguments, cwd=cwd)


def check_install(python: Path, folders: list[Path]) -> None:
    for folder in folders:  # which Python looks for modules in first
        run(python, "-c", "import claritycore.blocks, claritycore.nets, claritycore.images", cwd=folder)
        assert "936,132" in run(python, "-m", "claritycore", "info", "claritycore-x4", cwd=folder)
    assert "rrdbnet-lite" in run(python.parent / "claritycore", "list", cwd=folders[0])
    assert "16,919,555" in run(python.parent / "claritycore", "summary", "rrdbnet", cwd=folders[0])


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"claritycore", wheel.name.split("-py3")[0] + ".dist-info"}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    modules = ("__init__.py", "__main__.py", "cli.py", "cli_files.py", "cli_training.py", "parsing.py")
    sources += [*(ROOT / name for name in (*modules, "py.typed")), *(ROOT / "weights").iterdir()]
    packed = {name.removeprefix("claritycore/") for name in names if name.startswith("claritycore/")}
    assert packed == {path.relative_to(ROOT).as_posix() for path in sources}


def test_the_wheel_works_from_anywhere(wheel, checkout, fresh_python, tmp_path):
    install(fresh_python, "--no-index", wheel, cwd=tmp_path)
    check_install(fresh_python, [tmp_path, checkout])


def test_an_editable_install_works_from_anywhere(checkout, fresh_python, tmp_path):
    install(fresh_python, "--no-build-isolation", "--editable", checkout, cwd=tmp_path)
    check_install(fresh_python, [tmp_path, checkout, checkout.parent])
    new = checkout / "blocks" / "new_block.py"
    new.write_text("NUMBER = 7\n")
    code = "from claritycore.blocks.new_block import NUMBER; print(NUMBER)"
    assert run(fresh_python, "-c", code, cwd=tmp_path).strip() == "7"
