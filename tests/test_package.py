"""What is true of the package as a whole."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "tinytav").rglob("*.py"))
READING = "tokenizer text_encoder vae unet inflation ddim tuning pipeline".split()


def imports(path):
    """Modules of ours that a file imports, by dotted name below tinytav."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 1 or module.startswith("tinytav"):
                module = module.removeprefix("tinytav").strip(".")
                yield from [module] if module else (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("tinytav.") for alias in node.names if alias.name.startswith("tinytav."))


GRAPH = {path.stem: set(imports(path)) for path in (ROOT / "tinytav").glob("*.py") if path.stem != "__init__"}


def test_imports_have_no_circle():
    done = set()
    while ready := {name for name, needs in GRAPH.items() if name not in done and needs & GRAPH.keys() <= done}:
        done |= ready
    assert done == GRAPH.keys(), f"a circle among {GRAPH.keys() - done}"


def test_the_leaves_import_only_config():
    for name in ("tokenizer", "text_encoder", "vae", "unet", "ddim", "frames"):
        assert GRAPH[name] == {"config"}, name
    assert GRAPH["inflation"] == {"config", "unet"}


def test_nothing_outside_toy_imports_toy():
    for path in (*PACKAGE, ROOT / "train.py", ROOT / "sample.py"):
        if "toy" not in path.parts:
            assert not any("toy" in name.split(".") for name in imports(path)), path


def test_nothing_is_unpickled():
    for path in (*PACKAGE, ROOT / "train.py", ROOT / "sample.py"):
        assert not re.search(r"torch\.load\(|import pickle|\bexec\(", path.read_text()), path


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_only_the_projects_packages_are_imported(path):
    allowed = {"torch", "safetensors", "numpy", "PIL", "av", "tokenizers", "tqdm", "tinytav"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        assert {name.split(".")[0] for name in names} <= allowed


def test_importing_the_models_needs_no_video_library():
    code = "import sys, tinytav, tinytav.toy; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_functions_are_short_and_the_reading_files_are_an_evening():
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"
    assert sum(len((ROOT / f"tinytav/{name}.py").read_text().splitlines()) for name in READING) < 1000
