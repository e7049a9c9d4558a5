"""Every example in a docstring of the package, in README.md, CONTRIBUTING.md and docs/ runs and prints what it says."""

import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import claritycore

ROOT = Path(claritycore.__file__).parent
PACKAGES = [folder.parent.name for folder in sorted(ROOT.glob("*/__init__.py"))]
MODULES = [
    name
    for package in PACKAGES
    for _, name, _ in pkgutil.walk_packages([str(ROOT / package)], f"claritycore.{package}.")
    if not name.rpartition(".")[2].startswith("fused")
]
NAMES = {"torch": torch, "nn": nn, "dataclass": dataclass}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    module = pytest.importorskip(name) if name == "claritycore.deploy.onnx_ops" else importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs=NAMES)
    assert failed == 0


PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL)
# Those of a page in docs/ go on from each other.
EXAMPLES += [
    "".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)) for page in ROOT.glob("docs/*.md")
]
EXAMPLES = [example for example in EXAMPLES if example]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_pages(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(example, {"__name__": "page"}, "page", "page", 0)
    assert test.examples, "an example has no >>> line"
    assert doctest.DocTestRunner().run(test).failed == 0
