"""Runs the cells of tinytav/tour.ipynb in order, without Jupyter.

    python tests/tour.py        # runs the tour in full, and keeps in the notebook what it prints and shows

What an exercise prints is kept in the folded answer below it, because readers shall guess first.
"""
import ast
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "tinytav/tour.ipynb"
ANSWER = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)


def text(cell):
    return "".join(cell["source"])


def exercises(cells):
    """{id of an exercise: the cell below it, which holds the answer}."""
    return {cell["id"]: below for cell, below in zip(cells, cells[1:]) if cell["metadata"].get("tags") == ["exercise"]}


def run(cells, place, faster=1):
    """Runs the code cells in the folder `place`, and yields each with what it prints and the PNG that it shows.

    faster: what the steps are divided by.
    """
    os.symlink(ROOT / "weights", place / "weights")
    os.chdir(place)
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = re.sub("^FASTER = 1 ", f"FASTER = {faster} ", text(cell), flags=re.MULTILINE)
            with redirect_stdout(io.StringIO()) as printed:
                shown = execute(code, cell["id"], names)
            yield cell, printed.getvalue(), shown._repr_png_() if hasattr(shown, "_repr_png_") else None


def execute(code, name, names):
    """Executes a cell. Returns the value of its last line if this is an expression, as Jupyter does."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), name, "eval"), names)


def kept(cells):
    """{id of a code cell: what it printed when the tour was kept}."""
    printed = {cell["id"]: "".join("".join(output.get("text", "")) for output in cell["outputs"])
               for cell in cells if cell["cell_type"] == "code"}
    return printed | {name: ANSWER.search(text(below))[0] for name, below in exercises(cells).items()}


def keep(place):
    notebook = json.loads(TOUR.read_text())
    answers = exercises(notebook["cells"])
    for count, (cell, printed, picture) in enumerate(run(notebook["cells"], place), start=1):
        print(f"{cell['id']} [{time.process_time():.0f} s of CPU]\n{printed}", file=sys.stderr)
        cell["execution_count"], cell["outputs"] = count, []
        if cell["id"] in answers:
            below = answers[cell["id"]]
            below["source"] = ANSWER.sub(lambda _: printed, text(below)).splitlines(keepends=True)
        elif printed:
            cell["outputs"].append(dict(output_type="stream", name="stdout", text=printed.splitlines(keepends=True)))
        if picture:
            data = {"image/png": base64.b64encode(picture).decode()}
            cell["outputs"].append(dict(output_type="display_data", metadata={}, data=data))
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        keep(Path(folder))
