"""Writing a file whole or not at all."""
import contextlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from tinytav.errors import InputError


def replace(path, write):
    """Calls write(temporary file), then renames that file to `path`.

    A reader finds the old file or the new one, never a part of it, also when the process is killed or the power fails.
    The temporary file lies in a folder of its own beside `path`, so that whatever a library leaves there is found and
    removed.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")             # no two processes write into one
    folder.mkdir(exist_ok=True)
    try:
        temporary = folder / path.name
        write(str(temporary))
        os.chmod(temporary, 0o666 & ~umask())                               # some libraries write for the owner alone
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_text(path, text):
    """Writes a text file, UTF-8, as `replace` does."""
    replace(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


def replace_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as safetensors, as `replace` does. Raises InputError if they cannot be written."""
    try:
        replace(path, lambda file: save_file(tensors, file, metadata))
    except SafetensorError as error:
        raise InputError(f"{path} cannot be written: {error}") from None


def clear(folder):
    """Removes what a killed `replace` left in the folder. Only for who holds its lock."""
    for left in Path(folder).glob(".*.*.part"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)


def flush(path):
    """Waits until a file, or a folder's list of names, is on the disk. Some systems do not do this for folders."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def umask():
    """The permissions that new files of this process do not get."""
    mask = os.umask(0o77)
    os.umask(mask)
    return mask
