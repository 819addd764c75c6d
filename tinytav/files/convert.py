"""Pickled checkpoints -> safetensors: python -m tinytav convert IN OUT.

A pickle is a program: whoever opens it runs what its author wrote. Here torch's restricted reader alone opens it, which
knows tensors and plain containers, and refuses everything else before it is called. No other file of the project
opens pickles.
"""
import argparse
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from tinytav.errors import InputError
from tinytav.files.atomic import replace_tensors
from tinytav.stable_diffusion.checkpoint import PICKLED, some

CONTAINERS = ("state_dict", "model")        # under these names trainers keep the weights, beside other things
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
LARGER = 4      # a file may give so many times its own size: names may share a tensor, and each gets one of its own


# ---- one file ------------------------------------------------------------------------------------

def convert_file(source, target):
    """A pickled file -> a safetensors file of the same tensors in their dtype. Returns a line that says what it holds.

    Raises InputError, and writes nothing, for a file that cannot be read without running code; it names what the file
    asks for. The same for one that holds no named tensors.
    """
    tensors, left_out = named_tensors(unpickle(source), source)
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > LARGER * source.stat().st_size:
        raise InputError(f"{source} would give {size / 1e9:.1f} GB, more than {LARGER} times its size: many names "
                         "share one tensor. It is refused.")
    tensors = without_sharing(tensors)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_tensors(target, tensors, metadata={"format": "pt"})
    line = f"{source} -> {target.name}: {len(tensors)} tensors, {size / 1e6:,.1f} MB"
    return line + (f"; left out, because they are no tensors: {some(left_out)}" if left_out else "")


def unpickle(path):
    """What a pickled file holds. Raises InputError if that takes more than tensors and plain containers."""
    try:
        zipped = zipfile.is_zipfile(path)               # so since torch 1.6; an older file has no table to map
        if zipped:
            refuse_compressed(path)
        return torch.load(str(path), weights_only=True, mmap=zipped, map_location="cpu")
    except (InputError, MemoryError):
        raise
    except Exception as error:              # a damaged file can fail anywhere in torch's reader
        if asked := re.findall(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{path} asks for {asked[0]!r}. Opening it could run code, so it is refused: look for the "
                             "same model as .safetensors.") from None
        raise InputError(f"{path} cannot be read as a checkpoint: it is damaged, or holds more than weights. Fetch it "
                         "again, or look for the same model as .safetensors.") from None


def refuse_compressed(path):
    """Raises InputError for a zip file whose content is larger than itself."""
    with zipfile.ZipFile(path) as file:
        if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
            raise InputError(f"{path} is compressed, which torch.save never does. It is refused.")


def named_tensors(content, path):
    """{name: tensor} of what a file holds, and the names of what else stands among them. Raises InputError."""
    content = learned_word(out_of_containers(content), path)
    if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{path} holds no named tensors, so there is nothing to convert.")
    tensors, left_out = {}, []
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            left_out.append(name if isinstance(name, str) else f"a {type(name).__name__}")
        elif not isinstance(name, str) or name == "__metadata__" or name.encode(errors="replace").decode() != name:
            raise InputError(f"{path}: {name!r} is the name of a tensor, and none that safetensors can hold.")
        elif not is_plain(value):
            raise InputError(f"{path}: {name!r} is a tensor of a kind that safetensors cannot hold ({value.dtype}, "
                             f"{value.layout}).")
        else:
            tensors[name] = value.detach()
    return tensors, left_out


def out_of_containers(content):
    """What lies within {"state_dict": {...}} and its like, however deep."""
    for _ in range(10):                     # deeper is a circle
        for name in CONTAINERS:
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
    return content


def learned_word(content, path):
    """The web UI's file of a learned word, {"string_to_param": {"*": vectors}, "name": word} -> {word: vectors}."""
    vectors = content.get("string_to_param") if isinstance(content, dict) else None
    if not isinstance(vectors, dict) or len(vectors) != 1:
        return content                      # of another kind
    return {content.get("name") or path.stem: next(iter(vectors.values()))}


def is_plain(tensor):
    """Is it a dense array of numbers in memory? A tensor larger than its storage would take memory that no file has."""
    return tensor.layout is torch.strided and tensor.dtype in DTYPES and tensor.device.type == "cpu" \
        and not tensor.is_nested and tensor.nbytes <= tensor.untyped_storage().nbytes()


def without_sharing(tensors):
    """The tensors, contiguous, each with memory of its own: safetensors has no way to say that two names share it."""
    seen, out = set(), {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage)
        out[name] = tensor
    return out


# ---- a folder, file by file ----------------------------------------------------------------------

def convert_folder(source, target):
    """A folder -> a new folder: pickled files converted, others copied. Yields a line for each that is not just copied.

    A pickle that holds no weights or cannot be read is left out, and so is one whose safetensors lies beside it. Raises
    InputError, and leaves no folder behind, if no pickle is converted.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file())
    if not any(file.suffix in PICKLED for file in files):
        raise InputError(f"{source} holds no {', '.join(PICKLED)}: there is nothing to convert.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    refused = None
    try:
        for file in files:
            folder = part / file.relative_to(source).parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                line = take_over(file, folder)
            except InputError as error:
                refused, line = error, f"left out: {error}"
            if line:
                yield line
        if refused and not any(part.rglob("*.safetensors")):
            raise refused
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def take_over(file, folder):
    """Converts or copies one file into `folder`. Returns what is worth saying of it. Raises InputError."""
    if file.suffix not in PICKLED:
        if file.suffix != ".pkl":           # the state of a training, which is a pickle too
            shutil.copyfile(file, folder / file.name)
    elif file.with_name(safe_name(file.name)).exists():
        return f"left out: {file}, because {safe_name(file.name)} lies beside it"
    elif (folder / safe_name(file.name)).exists():
        raise InputError(f"{file} and another file would both become {safe_name(file.name)}: convert them one by one.")
    else:
        return convert_file(file, folder / safe_name(file.name))


def safe_name(name):
    """pytorch_model.bin -> model.safetensors, as transformers calls it; other files keep their stem."""
    stem = Path(name).stem
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


# ---- the command ---------------------------------------------------------------------------------

def check(source, target):
    """Raises InputError unless there is something to convert, and a free place for the result."""
    if not source.exists():
        raise InputError(f"No such file or folder: {source}.")
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} is there already, and is not overwritten: name another place.")
    if source.is_file() and source.suffix not in PICKLED:
        raise InputError(f"{source} is none of {', '.join(PICKLED)}: there is nothing to convert.")
    if source.is_file() and target.suffix != ".safetensors":
        raise InputError(f"{target} is not the name of a .safetensors file.")


def main():
    p = argparse.ArgumentParser(description="Turn pickled checkpoints into safetensors, without running code in them.")
    p.add_argument("source", metavar="IN", type=Path, help=f"a file ({', '.join(PICKLED)}), or a folder of such files")
    p.add_argument("target", metavar="OUT", type=Path, help="a new .safetensors file, or a new folder")
    args = p.parse_args()
    check(args.source, args.target)
    if args.source.is_file():
        print(convert_file(args.source, args.target))
    else:
        for line in convert_folder(args.source, args.target):
            print(line)
    return 0
