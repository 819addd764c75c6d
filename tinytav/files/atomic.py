"""Writing a file whole or not at all."""
import os
from pathlib import Path


def replace(path, write):
    """Calls write(temporary file), then renames that file to `path`.

    A reader finds the old file or the new one, never a part of it, also when the process is killed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")          # no two processes write into one
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path, text):
    """Writes a text file, UTF-8, as `replace` does."""
    replace(path, lambda file: Path(file).write_text(text, encoding="utf-8"))
