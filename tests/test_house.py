"""The rules of the house, read off the files: what every kernel, block and net must have, and must not."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn

import claritycore
from claritycore import blocks, deploy, images, kernels, nets, training
from tests.contracts import CONTRACTS
from tests.small_nets import NETS

ROOT = Path(claritycore.__file__).parent
ROOMS = ("blocks", "deploy", "images", "kernels", "models", "nets", "training")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))])
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in SOURCES}
# What compares trained nets, or writes down what others measured, times no part of its own.
TIMES_NOTHING = ("comparison", "dncnn", "readme", "restoration", "trained")
BENCHMARK_TEXT = "\n".join(
    file.read_text() for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in TIMES_NOTHING
)
README = (ROOT / "README.md").read_text()
PAGES = [file for file in sorted(ROOT.rglob("*.md")) if not {".venv", ".pytest_cache"} & set(file.parts)]

KERNEL_FOLDERS = [file.parent for file in sorted((ROOT / "kernels").glob("*/__init__.py"))]
KERNEL_FILES = {"__init__.py", "op.py", "reference.py"}
FURTHER_KERNEL_FILES = re.compile(r"(fallback|fused|op|operands)(_\w+)?\.py")

# Public names that no benchmark times, each with the reason.
WITHOUT_BENCHMARK = {
    **dict.fromkeys(["read_image", "write_image", "Picture"], "the time is that of Pillow, imagecodecs and tifffile"),
    **dict.fromkeys(
        ["convert_state", "freeze", "inspect_checkpoint", "load_matching", "load_estimator", "save_estimator"],
        "reads or renames, once",
    ),
    "convert_block_state": "renames, once",
    "ConvAttention": "the time is that of its attention and of two convolutions",
    **dict.fromkeys(["BlockSource", "CheckpointInfo", "MatchReport"], "only tells what was found"),
    **dict.fromkeys(["AutoConfig", "AutoModel", "BaseConfig", "RestorationNet", "UNetConfig"], "makes things once"),
    **dict.fromkeys(["list_models", "register_config", "register_presets", "Kernel"], "looks a name up"),
    **dict.fromkeys(
        ["Aux", "Context", "DegradationEstimate", "RestorationOutput", "RouteResult", "Summary"],
        "only holds what others computed",
    ),
    **dict.fromkeys(["Conditioned", "Stage"], "the time is that of the blocks"),
    **dict.fromkeys(["degradation_targets", "supervise"], "a few sums over the numbers of a batch"),
    **dict.fromkeys(["train_estimator", "evaluate_estimator"], "the time is that of the estimator and of degrade"),
    **dict.fromkeys(
        ["BiasBalance", "EntropyLoss", "ImportanceBalance", "RouterNoise", "RouterPolicy", "SwitchBalance", "ZLoss"],
        "a few sums over the probabilities of a router",
    ),
    **dict.fromkeys(["Temperature", "WarmUp"], "a division, and a number that is looked at"),
    **dict.fromkeys(
        ["ArtifactExpert", "ConvExpert", "DeblurExpert", "DenoiseExpert", "Expert", "TextureExpert"],
        "the time is that of a few convolutions",
    ),
    **dict.fromkeys(["AttentionExpert", "FrequencyExpert"], "the time is that of window_attention, and of products"),
    **dict.fromkeys(["Reparameterizable", "ReparameterizationReport"], "computes nothing in a forward pass"),
    "to_training_form": "runs once, before training goes on",
    "verify_reparameterization": "runs once, and times nothing itself",
    **dict.fromkeys(["restore_files", "restore_picture"], "the time is that of restore_tiled, and of files"),
    **dict.fromkeys(["RestoreOptions", "RestoreReport"], "only says what is asked for, and what was done"),
    "SelfEnsemble": "eight calls of the net",
    **dict.fromkeys(["export", "ExportReport"], "the time is that of torch's exporters, and of the net"),
    **dict.fromkeys(["diagnose", "flop_formulas", "fvcore_handles"], "tells, and computes nothing"),
    **dict.fromkeys(["selective_scan_reference", "selective_scan_2d_reference"], 'timed as backend="reference"'),
    **dict.fromkeys(
        ["depthwise_conv2d_reference", "expert_mlp_reference", "route_top_k_reference"],
        'timed as backend="reference"',
    ),
    **dict.fromkeys(["Degraded", "Evaluation", "Preset", "Recipe", "TrainingSettings"], "only holds what is known"),
    **dict.fromkeys(["find_preset", "find_recipe", "list_recipes", "preset_names"], "looks a name up"),
    **dict.fromkeys(["register_recipe", "read_state", "TrainingStopped", "TrainingInterrupted"], "happens once a run"),
    **dict.fromkeys(["VGGLoss", "LPIPSLoss", "Inception"], "the time is that of the network's convolutions"),
    **dict.fromkeys(["AdversarialLoss", "UNetDiscriminator"], "the time is that of the discriminator's convolutions"),
    **dict.fromkeys(["LossTerm", "WeightedLoss"], "only adds up what others compute"),
    **dict.fromkeys(["evaluate"], "the time is that of the net, and of what degrades and decodes images"),
    **dict.fromkeys(["ImageFolder", "TrainingSamples"], "the time is that of decoding, once an image"),
    "rgb_to_y": "three products a pixel, timed within psnr and ssim",
}

# What the rooms may import besides the standard library and their own kind; triton is for kernels/*/fused*.py alone.
ALLOWED = {
    "kernels": {"torch", "einops", "numpy"},
    "blocks": {"torch", "einops", "numpy"},
    "nets": {"torch", "einops", "numpy", "safetensors"},
    "models": set(),
    "deploy": {"torch", "onnxscript"},  # the second in onnx_ops.py, which is imported where a net becomes ONNX
    "images": {"torch", "numpy", "PIL", "imagecodecs", "tifffile"},
    "training": {"torch", "numpy", "einops", "lightning"},
}


def is_module(item: object) -> bool:
    return inspect.isclass(item) and issubclass(item, nn.Module)


BLOCKS = {
    name: getattr(blocks, name)
    for name in blocks.__all__
    if is_module(getattr(blocks, name)) and getattr(blocks, name) not in (blocks.Reparameterizable, blocks.Expert)
}
NET_CLASSES = {
    name: getattr(nets, name)
    for name in nets.__all__
    if is_module(getattr(nets, name)) and name not in ("RestorationNet", "UNet", "Conditioned", "Stage")
}
PUBLIC = {
    f"{room.__name__.removeprefix('claritycore.')}.{name}": getattr(room, name)
    for room in (blocks, deploy, images, kernels, nets, training)
    for name in room.__all__
    if inspect.isclass(getattr(room, name)) or inspect.isfunction(getattr(room, name))
}


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def used_of_the_package(tree: ast.AST) -> set[str]:
    """What a test imports from a module of the package, or reads off a room: `nets.SPAN`."""
    nodes = list(ast.walk(tree))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in froms if (node.module or "").startswith("claritycore") for alias in node.names}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    return names | {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in ROOMS}


TEST_FILES = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if file.name != "test_house.py"]
TESTED = {name for file in TEST_FILES for name in used_of_the_package(ast.parse(file.read_text()))}


def docstring_lines(function: ast.FunctionDef) -> int:
    """A contract may be longer than the code that keeps it."""
    return len((ast.get_docstring(function, clean=False) or "").splitlines())


def is_jit(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


# What every public name has


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring_that_starts_with_a_sentence(name):
    assert (PUBLIC[name].__doc__ or "").strip().partition("\n\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_documents_itself(name):
    block = BLOCKS[name]
    for section in ("Shape:", "Args:", "Raises:", "Source:", f">>> {name}("):
        assert section in block.__doc__, f"the docstring has no {section}"
    for argument in inspect.signature(block).parameters:
        assert re.search(rf"^ +{argument}\b.*:", block.__doc__, re.MULTILINE), f"the docstring is silent on {argument}"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_keeps_the_form(name):
    block = BLOCKS[name]
    arguments = list(inspect.signature(block).parameters.values())
    assert len(arguments) <= 8
    assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in arguments[2:])
    assert len(inspect.getsource(block.forward).splitlines()) <= 25


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_a_contract_row(name):
    assert name in CONTRACTS


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_a_readme_row_a_test_and_a_benchmark(name):
    item, name = PUBLIC[name], name.rpartition(".")[2]
    assert ">>> " in item.__doc__ or name.endswith("_reference"), "its docstring has no example"
    assert re.search(rf"^\|.*`{name}`", README, re.MULTILINE), "README.md has no row for it"
    assert name in TESTED, "no test imports it"
    assert name in WITHOUT_BENCHMARK or re.search(rf"\b{name}\b", BENCHMARK_TEXT), "no benchmark names it"


@pytest.mark.parametrize("name", NET_CLASSES)
def test_a_net_documents_itself_and_keeps_the_form(name):
    net = NET_CLASSES[name]
    for section in ("Shape:", "Args:", "Raises:", "Source:", f">>> {name}("):
        assert section in net.__doc__, f"the docstring has no {section}"
    assert len(inspect.getsource(net.forward).splitlines()) <= 20
    assert any(key.startswith(name) for key in NETS), "no property test builds it"


@pytest.mark.parametrize("name", [name for name in TREES if Path(name).parts[0] == "nets"])
def test_a_part_of_a_net_states_its_shapes(name):
    public = [node for node in TREES[name].body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
    parts = [node for node in public if {"forward"} & {getattr(item, "name", "") for item in node.body}]
    assert all("Shape:" in (ast.get_docstring(part) or "") for part in parts)


@pytest.mark.parametrize("name", nets.list_models())
def test_a_registered_net_has_a_readme_row(name):
    assert f"`{name}`" in README


def test_every_allowance_is_needed():
    assert set(WITHOUT_BENCHMARK) <= {name.rpartition(".")[2] for name in PUBLIC}
    assert not [name for name in WITHOUT_BENCHMARK if re.search(rf"\b{name}\b", BENCHMARK_TEXT)]
    assert {name.partition(" ")[0] for name in CONTRACTS} == set(BLOCKS)


@pytest.mark.parametrize("folder", KERNEL_FOLDERS, ids=lambda folder: folder.name)
def test_a_kernel_folder_has_the_usual_files(folder):
    files = {file.name for file in folder.glob("*.py")}
    assert files >= KERNEL_FILES
    assert all(FURTHER_KERNEL_FILES.fullmatch(name) for name in files - KERNEL_FILES)
    assert len((folder / "reference.py").read_text().splitlines()) <= 60
    assert [kernel for kernel in kernels.KERNELS if kernel.name == folder.name], "kernels.KERNELS has no such kernel"


# What every file keeps


@pytest.mark.parametrize("name", TREES)
def test_a_file_keeps_the_form(name):
    tree = TREES[name]
    fused = Path(name).name.startswith("fused")
    assert len((ROOT / name).read_text().splitlines()) < (400 if fused else 300)
    for function in functions(tree):
        length = function.end_lineno - function.lineno + 1 - docstring_lines(function)
        assert length < (120 if fused and is_jit(function) else 60), f"{function.name} has {length} lines"
        if function.name == "forward":
            every = [*function.args.args[1:], *function.args.kwonlyargs]
            assert all([function.returns, *(a.annotation for a in every)]), "forward is not fully typed"
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "package code asserts"
    assert not re.search(r"utils|common|helpers|misc", Path(name).stem)
    text = (ROOT / name).read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert "torch.compiler.disable" not in text
    assert "weights_only=False" not in text


@pytest.mark.parametrize(("folder", "longest"), [("tests", 500), ("benchmarks", 300), ("examples", 300)])
def test_what_stands_beside_the_package_keeps_its_length(folder, longest):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert not {file for file, length in lengths.items() if length >= longest}


@pytest.mark.parametrize("name", TREES)
def test_a_file_imports_only_what_its_room_may(name):
    room = Path(name).parts[0]
    outside = imported(TREES[name]) - set(sys.stdlib_module_names)
    assert "claritycore" not in outside, "use a relative import"
    if room in ALLOWED:
        fused = room == "kernels" and Path(name).name.startswith("fused")
        assert outside <= ALLOWED[room] | ({"triton"} if fused else set())
    else:
        assert "triton" not in outside


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_of_a_page_has_a_header(page):
    lines = ["", *page.read_text().splitlines(), ""]
    starts = [i for i in range(1, len(lines)) if lines[i].startswith("|") and not lines[i - 1].startswith("|")]
    headless = [lines[i] for i in starts if not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", lines[i + 1])]
    assert not headless, "a blank line cuts these rows off their table"


def test_the_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inits = [file.parent.relative_to(ROOT) for file in ROOT.rglob("__init__.py") if ".venv" not in file.parts]
    assert sorted(listed) == sorted(".".join(["claritycore", *folder.parts]) for folder in inits)
    assert {file.parent.name for file in ROOT.glob("*/__init__.py")} == set(ROOMS)
    folders = {file.parent.relative_to(ROOT) for file in SOURCES}
    assert folders == {Path(), *map(Path, ROOMS), *(folder.relative_to(ROOT) for folder in KERNEL_FOLDERS)}


def test_importing_the_command_line_leaves_the_slow_parts_of_torch_alone():
    code = "import sys, claritycore.cli; print(*{'torch.distributed.checkpoint', 'torch._inductor'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_torchs_compiler_is_not_loaded_to_make_nets_and_to_run_one():
    code = """
import sys, torch
from claritycore.blocks import reparameterize_model
from claritycore.nets import AutoConfig, AutoModel, list_models

with torch.device("meta"):
    for name in list_models():
        AutoConfig.from_name(name).build()
for name in ("claritycore-x4", "claritycore-joint-x1", "claritycore-joint-x2"):
    net = reparameterize_model(AutoModel.from_pretrained(name).eval())
    with torch.no_grad():
        net(torch.rand(1, 3, 16, 16))
net = AutoModel.from_config(AutoConfig.from_name("harmonic-tiny"))
net(torch.rand(1, 3, 16, 16)).sum().backward()
print(*{"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"} & {*sys.modules})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_importing_blocks_and_kernels_loads_torch_and_nothing_else():
    def loaded(module: str) -> set[str]:
        code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
        return set(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        )

    assert loaded("claritycore.blocks, claritycore.kernels") - loaded("torch") <= {
        "claritycore",
        *sys.stdlib_module_names,
    }


@pytest.mark.parametrize("module", ["claritycore.blocks", "claritycore.nets", "claritycore.cli"])
def test_imports_without_what_is_optional(module):
    blocked = ["triton", "torchvision", "fvcore", "matplotlib", "skimage", "scipy", "cv2"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {module}"
    subprocess.run([sys.executable, "-c", code], check=True)
