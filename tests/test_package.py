"""What is true of the package as a whole: which way imports run, what is imported, and what is never done."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tinytav").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
# The floors of the package, from the ground up. A module imports only from its own floor and the floors below it.
FLOORS = [
    ["tinytav.errors", "tinytav.stable_diffusion"],
    ["tinytav.weights", "tinytav.inflation", "tinytav.memory", "tinytav.tuning", "tinytav.pipeline", "tinytav.noise",
     "tinytav.edit_friendly", "tinytav.windows", "tinytav.control", "tinytav.attention_maps", "tinytav.keep",
     "tinytav.files"],
    ["tinytav.editing", "tinytav.cli"],
    ["train", "sample"],
    ["tinytav.measure"],
    ["tinytav.toy"],
    ["tinytav.claims"],
]


def name_of(path):
    """tinytav/files/runs.py -> "tinytav.files.runs"; a package has the name of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in [*PACKAGE, *SCRIPTS]}


def imports(path):
    """The modules of ours that a file imports, anywhere in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {name: {module for module in imports(path) if module in MODULES and module != "tinytav"}
         for name, path in MODULES.items()}
FACES = {"tinytav", "tinytav.__main__"}         # they hand on names, and import from every floor


def floor_of(module):
    """The number of the floor that a module stands on."""
    for number, places in enumerate(FLOORS):
        if any(module == place or module.startswith(f"{place}.") for place in places):
            return number
    raise AssertionError(f"{module} stands on no floor")


def test_the_graph_sees_the_subfolders():
    assert "tinytav.stable_diffusion.config" in GRAPH["tinytav.stable_diffusion.unet"]
    assert {floor_of(name) for name in GRAPH.keys() - FACES} == set(range(len(FLOORS)))


@pytest.mark.parametrize("module", sorted(GRAPH.keys() - FACES))
def test_a_module_imports_from_its_own_floor_and_below(module):
    above = {other for other in GRAPH[module] if floor_of(other) > floor_of(module)}
    assert not above, f"{module} imports {above} from a floor above it"


def test_imports_have_no_circle():
    done = set(FACES)
    while ready := {name for name, needs in GRAPH.items() if name not in done and needs <= done}:
        done |= ready
    assert done == GRAPH.keys(), f"a circle among {GRAPH.keys() - done}"


def test_the_video_unet_needs_the_image_unet_and_nothing_else():
    assert GRAPH["tinytav.inflation"] == {"tinytav.errors", "tinytav.stable_diffusion.unet"}


def test_the_package_works_without_toy_and_claims():
    """The face hands on no name of theirs, so the core does not need them."""
    assert not any(module.startswith(("tinytav.toy", "tinytav.claims")) for module in imports(MODULES["tinytav"]))


def test_nothing_is_unpickled():
    for name, path in MODULES.items():
        assert not re.search(r"import pickle|\bexec\(", path.read_text()), path
        assert name == "tinytav.files.convert" or "torch.load(" not in path.read_text(), path


def test_what_converts_pickles_reads_weights_alone():
    """Every torch.load in the one file that has any says weights_only=True, itself and not through a variable."""
    nodes = ast.walk(ast.parse(MODULES["tinytav.files.convert"].read_text()))
    nodes = [node for node in nodes if isinstance(node, ast.Call)]
    calls = [node for node in nodes if ast.unparse(node.func) in ("torch.load", "load", "torch.serialization.load")]
    assert len(calls) == 1
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}
    assert settings["weights_only"] == "True" and "pickle_module" not in settings


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_only_the_projects_packages_are_imported(path):
    allowed = {"torch", "safetensors", "numpy", "PIL", "av", "tokenizers", "tqdm",
               "huggingface_hub", "tinytav"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed


def test_the_commands_are_listed_and_an_unknown_one_is_refused():
    done = subprocess.run([sys.executable, "-m", "tinytav"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "bench" in done.stdout and "claims" in done.stdout
    done = subprocess.run([sys.executable, "-m", "tinytav", "paint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no command 'paint'" in done.stderr and "Traceback" not in done.stderr
