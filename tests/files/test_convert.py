"""Pickled checkpoints become safetensors; no code in them runs."""
import os
import re
import zipfile

import pytest
import tiny
import torch
from hardening.warm import warm
from safetensors import safe_open
from safetensors.torch import load_file

from tinytav.errors import InputError
from tinytav.files.convert import convert_file, convert_folder, safe_name
from tinytav.weights import load


def convert(source, target, status=0):
    """python -m tinytav convert, as a process of its own that may write nowhere but beside `target`."""
    done = warm()(target.parent, "tinytav/__main__.py", "convert", source, target)
    assert done.status == status and "Traceback" not in done.err and not done.broken, done.out + done.err + done.broken
    return done


class Command:
    """Pickled, it is an order to make the file at `path` when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def weights():
    return {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in (
        ("a.weight", torch.float32), ("half", torch.float16), ("b", torch.bfloat16), ("c", torch.int64),
        ("d", torch.bool), ("e", torch.float8_e4m3fn), ("f", torch.float64))}


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
@pytest.mark.parametrize("containers", [[], ["state_dict"], ["model"], ["state_dict", "model"]])
def test_every_tensor_keeps_its_name_value_and_dtype(tmp_path, suffix, containers):
    content = weights()
    for name in containers:
        content = {name: content, "epoch": 5, "optimizer": {}}
    torch.save(content, tmp_path / f"in.{suffix}")
    convert_file(tmp_path / f"in.{suffix}", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == weights().keys()
    for name, tensor in weights().items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name].double(), tensor.double())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}                          # which transformers wants to see


def test_the_older_format_of_torch_is_converted_too(tmp_path):
    tensors = {name: z for name, z in weights().items() if name != "e"}     # it is older than float8
    torch.save({"state_dict": tensors}, tmp_path / "in.ckpt", _use_new_zipfile_serialization=False)
    assert "6 tensors" in convert_file(tmp_path / "in.ckpt", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(found[name].dtype is z.dtype and torch.equal(found[name].double(), z.double())
               for name, z in tensors.items())


def test_shared_views_and_transposed_tensors_are_written_whole(tmp_path):
    whole = torch.randn(6, 4)
    tensors = {"whole": whole, "same": whole, "rows": whole[2:4], "columns": whole[:, 1], "turned": whole.T,
               "none": whole[:0], "own": torch.randn(3, 2).T, "parameter": torch.nn.Parameter(whole),
               "scalar": torch.tensor(2.)}
    torch.save(tensors, tmp_path / "in.pt")
    convert_file(tmp_path / "in.pt", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_is_no_tensor_is_named(tmp_path):
    torch.save(weights() | {"epoch": 5, "note": "x"}, tmp_path / "in.pt")
    done = convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert "7 tensors" in done.out and "left out, because they are no tensors: epoch, note" in done.out


def test_code_in_a_pickle_does_not_run_and_is_named(tmp_path):
    torch.save({"a": torch.ones(2), "b": Command(tmp_path / "pwned")}, tmp_path / "in.ckpt")
    done = convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", status=2)
    assert f"asks for '{os.system.__module__}.system'" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"in.ckpt"}
    torch.load(tmp_path / "in.ckpt", weights_only=False)                    # the trap is a real one
    assert (tmp_path / "pwned").exists()


def test_a_bare_pickle_does_not_run_either(tmp_path):
    (tmp_path / "in.ckpt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    done = convert(tmp_path / "in.ckpt", tmp_path / "out.safetensors", status=2)
    assert "asks for 'os.system'" in done.err or "asks for 'posix.system'" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"in.ckpt"}


def a_class(path):
    torch.save({"model": torch.nn.Linear(2, 2)}, path)


def a_class_in_an_old_protocol(path):
    """torch's list of what a pickle asks for does not see it; its reader does."""
    archive(path, b"cbuiltins\neval\n(S'1'\ntR.")


def a_name_that_writes_on_the_terminal(path):
    archive(path, b"\x80\x02cbuiltins\ne\x1b[1mval\n)R.")


def archive(path, pickle):
    """A file as torch.save writes it, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", data)


def an_older_format_with_a_class(path):
    torch.save({"model": torch.nn.Linear(2, 2)}, path, _use_new_zipfile_serialization=False)


def compressed(path):
    """A file of torch.save, packed again: 200 bytes of it unpack to a megabyte."""
    torch.save({"a": torch.zeros(250_000)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    assert path.stat().st_size < 10_000


def many_views_of_one(path):
    whole = torch.zeros(10_000)
    torch.save({f"{i}": whole[i:] for i in range(200)}, path)
    assert path.stat().st_size < 100_000


def a_name_that_safetensors_keeps(path):
    torch.save({"__metadata__": torch.ones(2)}, path)


def a_name_that_is_no_utf8(path):
    torch.save({"\udcff": torch.ones(2)}, path)


def torn(path):
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-100])


def torn_within(path):
    """A zip that is whole, of which the pickle is not."""
    torch.save(weights(), path)
    data = path.read_bytes()
    assert b"\x80\x02}q\x00" in data
    path.write_bytes(data.replace(b"\x80\x02}q\x00", b"\x80\x02RRR"))


def a_program(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def sparse(path):
    torch.save({"a": torch.eye(3).to_sparse()}, path)


def repeated(path):
    torch.save({"a": torch.ones(1).expand(10 ** 6)}, path)


def numbered(path):
    torch.save({5: torch.ones(1)}, path)


def on_no_device(path):
    torch.save({"a": torch.ones(2, device="meta")}, path)


def complex_numbers(path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path)


def a_circle(path):
    circle = {}
    circle["model"] = circle
    torch.save(circle, path)


def a_list(path):
    torch.save([torch.ones(2)], path)


def an_optimiser(path):
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.}]}, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, message", [
    (a_class_in_an_old_protocol, "asks for 'eval'"),
    (a_name_that_writes_on_the_terminal, r"\\x1b"),
    (a_class, "asks for 'torch.nn.modules.linear.Linear'"),
    (an_older_format_with_a_class, "asks for 'torch.nn.modules.linear.Linear'"),
    (compressed, "is compressed, which torch.save never does"),
    (many_views_of_one, "would give .* more than 4 times its size"),
    (a_name_that_safetensors_keeps, "'__metadata__' is the name of a tensor, and none"),
    (a_name_that_is_no_utf8, r"'.udcff' is the name of a tensor, and none"),
    (torn, "cannot be read as a checkpoint"), (torn_within, "cannot be read as a checkpoint"),
    (a_program, "it is damaged, or holds more than weights"), (sparse, "'a' is a tensor of a kind"),
    (repeated, "'a' is a tensor of a kind"), (numbered, "5 is the name of a tensor, and none"),
    (on_no_device, "'a' is a tensor of a kind"), (complex_numbers, "'a' is .*complex64"),
    (a_list, "holds no named tensors"), (an_optimiser, "holds no named tensors"), (a_circle, "holds no named tensors")])
def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path, make, message):
    make(tmp_path / "in.pt")
    with pytest.raises(InputError, match=f"in.pt.*{message}"):
        convert_file(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt"}


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    a_list(tmp_path / "a.pt"), (tmp_path / "b.txt").write_text("x"), (tmp_path / "empty").mkdir()
    for source, target, message in (
            ("none.pt", "o.safetensors", "No such file"), ("b.txt", "o.safetensors", "none of .ckpt"),
            ("a.pt", "b.txt", "is there already"),
            ("a.pt", "o.bin", "not the name of a .safetensors"), ("empty", "o", "holds no .ckpt")):
        done = convert(tmp_path / source, tmp_path / target, status=2)
        assert message in done.err, done.err
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "b.txt", "empty"}


# ---- folders -------------------------------------------------------------------------------------

def pickled_folder(folder):
    """The tiny Stable Diffusion as old diffusers wrote it, with transformers' name in it."""
    tiny.write_folder(folder)
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "pytorch_model")):
        file, = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), folder / part / f"{name}.bin")
        file.unlink()
    return folder


def test_a_folder_is_converted_file_by_file_and_loads(tmp_path):
    expected = load(tiny.write_folder(tmp_path / "w"))
    folder = pickled_folder(tmp_path / "old")
    an_optimiser(folder / "optimizer.bin")
    (folder / "random_states_0.pkl").write_bytes(b"\x80\x04"), (folder / "x.gif").write_bytes(b"GIF")
    done = convert(folder, tmp_path / "new")
    assert "left out" in done.out and "optimizer.bin holds no named tensors" in done.out
    suffixes = {path.suffix for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".txt", ".safetensors", ".gif"}
    sd = load(tmp_path / "new")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(sd, part).state_dict(), getattr(expected, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in tmp_path.iterdir()} == {"w", "old", "new"}


def test_one_bad_file_in_a_folder_does_not_stop_the_others(tmp_path):
    folder = pickled_folder(tmp_path / "old")
    a_class(folder / "a.ckpt"), torn(folder / "vae/z.pt"), (folder / "vae/y.bin").write_bytes(b"")
    done = convert(folder, tmp_path / "new")
    assert re.search("left out: .*a.ckpt asks for 'torch.nn.modules.linear.Linear'", done.out)
    assert re.search("left out: .*z.pt cannot be read", done.out) and re.search("left out: .*y.bin cannot", done.out)
    assert load(tmp_path / "new") and not (tmp_path / "new/a.safetensors").exists()


def test_a_folder_of_which_nothing_can_be_converted_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    a_class(tmp_path / "old/a.pt"), a_class(tmp_path / "old/b.pt")
    assert "b.pt asks for 'torch.nn.modules.linear.Linear'" in convert(tmp_path / "old", tmp_path / "new", status=2).err
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def test_a_pickle_beside_its_safetensors_is_left_out(tmp_path):
    folder = tiny.write_folder(tmp_path / "old")
    a_class(folder / "unet/diffusion_pytorch_model.bin"), a_class(folder / "text_encoder/pytorch_model.bin")
    lines = list(convert_folder(folder, tmp_path / "new"))
    assert len(lines) == 2 and all("lies beside it" in line for line in lines) and load(tmp_path / "new")


def test_of_two_files_that_would_become_one_the_second_is_left_out(tmp_path):
    (tmp_path / "old").mkdir()
    torch.save(weights(), tmp_path / "old/a.pt"), torch.save(weights(), tmp_path / "old/a.ckpt")
    lines = list(convert_folder(tmp_path / "old", tmp_path / "new"))
    assert "left out: " in lines[1] and "a.pt and another file would both become a.safetensors" in lines[1]


@pytest.mark.parametrize("old, new", [
    ("pytorch_model.bin", "model.safetensors"), ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
    ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"), ("v1-5.ckpt", "v1-5.safetensors")])
def test_the_names_are_those_that_are_looked_for(old, new):
    assert safe_name(old) == new
