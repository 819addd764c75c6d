"""Broken and hostile prompts, flags, folders of runs, places for results, and streams."""
import json
import os
import stat
import struct

from hardening.broken import EITHER, ERROR, MODULE, OK, Case, kind, sample, sample_run, train
from hardening.broken_clips import pictures
from hardening.broken_weights import (
    WRONG,
    header_and_data,
    lora_tensors,
    some_tensors,
    spoil_json,
    spoil_tensors,
    write_header,
)
from safetensors.torch import save_file

# ---- prompts and flags ---------------------------------------------------------------------------

PROMPTS = [
    "", " ", "\t\n", "word " * 10_000, "w" * 20_000, "🐼⛷️👨‍👩‍👧‍👦" * 20,
    "\x01\x02\x1b[31mred\x7f", "\x9b31m", "../../etc/x",
    "/etc/passwd", "..", ".",
    "a/b\\c:d*e?f", "con", "nul.txt", "<|endoftext|> <|startoftext|>", "\u202egnp.exe", "\u0301" * 500,
    "漢字" * 100, "𐍈" * 200, "\udcff\udcfe bytes", "--", "-x", "$(touch pwned)", "`touch pwned`", "%s%n{0}",
    "line\nbreak\r\nline", "source", "run", "index", "loss", "preview-1", "\ufeffbom", "\uffff", "İSTANBUL ß ﬁ",
    "e\u0301" * 90, "\\", "'; drop", "~", "*", "=cmd|' /c calc'!a1", "</script><script>alert(1)</script>", "a'b\"c`d$e"]
RANGES = [(1, 32), (32, 127), (0x80, 0x250), (0x300, 0x370), (0x4e00, 0x9fff), (0x1f300, 0x1faff), (0x10330, 0x1034a)]


def some_prompt(rng):
    if rng.random() < 0.5:
        return rng.choice(PROMPTS)
    return "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.choice([1, 10, 300])))


def due(prompts, empty=OK):
    """What may come of these prompts."""
    if "\udcff" in "".join(prompts):
        return ERROR
    if any(prompt.startswith("-") for prompt in prompts):
        return EITHER                   # they may be taken for flags
    return empty if any(not prompt.strip() for prompt in prompts) else OK


@kind(EITHER)
def prompt_to_tune_on(rng, place):
    prompt = some_prompt(rng)
    return train("clip.mp4", prompt), due([prompt], empty=ERROR)


@kind(EITHER)
def prompts_to_sample(rng, place):
    prompts = [some_prompt(rng) for _ in range(2)]
    return ["sample.py", "--run", "runs/done", "--prompt", *prompts], due(prompts)


@kind(EITHER)
def negative_prompt(rng, place):
    prompt = some_prompt(rng)
    return sample_run("--negative", prompt), due([prompt])


@kind(EITHER)
def clip_with_a_strange_name(rng, place):
    name = some_prompt(rng).replace("/", "_")[:50].replace("\0", "_") or "x"
    path = place / f"{name}.mp4"
    (place / "clip.mp4").rename(path)
    return train(f"./{path.name}")


NUMBERS = ["-1", "0", "1", "3", "8", "10000", "1000000", "1e9", "nan", "inf", "-inf", "x", "", "1e-45", "1e38",
           "9" * 30, "0x10", "１６"]


@kind(EITHER)
def what_is_kept(rng, place):
    """Masks and first frames of any size and number, and files that are none of them."""
    flag = rng.choice(["--mask", "--first-frame"])
    sizes = [rng.choice([(32, 32), (40, 32), (1, 1), (3, 900)]) for _ in range(rng.choice([1, 2, 3, 4]))]
    folder = pictures(place, sizes, mode=rng.choice(["RGB", "L", "RGBA", "1", "I;16"]))
    found = rng.choice([folder, next(folder.iterdir()), place / "w/model_index.json", place / "none", place / "w"])
    return sample_run(flag, found, "--noise", rng.choice(["inverted", "edit-friendly", "random"]))


@kind(EITHER)
def word_of_a_mask(rng, place):
    return sample_run(f"--mask-word={some_prompt(rng)}")


@kind(EITHER)
def flags_out_of_bounds(rng, place):
    if rng.random() < 0.5:
        flag = rng.choice(["--size", "--frames", "--window", "--start", "--stride", "--lr", "--seed"])
        return train("clip.mp4", "a man", f"{flag}={rng.choice(NUMBERS)}", "--steps", "1")
    flag = rng.choice(["--size", "--frames", "--steps", "--guidance", "--seed", "--strength"])
    return sample(f"{flag}={rng.choice(NUMBERS)}")          # the last of two values counts


@kind(ERROR)
def steps_beyond_reason(rng, place):
    return train("clip.mp4", "a man", "--steps", rng.choice(["100000000", "4294967295", "9" * 30]))


# ---- runs ----------------------------------------------------------------------------------------

def use_run(rng, name):
    if name == "half":
        return ["train.py", "--resume", "runs/half"]
    return sample_run(*rng.choice([[], ["--noise", "random"], ["--noise", "edit-friendly"], ["--steps", "2"]]))


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@kind(EITHER)
def run_json_edited(rng, place):
    name = rng.choice(["half", "done"])
    file = place / f"runs/{name}/run.json"
    before = json.loads(file.read_text())
    spoil_json(rng, file)
    try:                                                    # more steps are no error: only not tried here
        d = json.loads(file.read_text())
        long = {key: before[key] for key in ("steps", "ddim_steps") if type(d.get(key)) is int and d[key] > 100}
    except (ValueError, AttributeError, RecursionError):
        return use_run(rng, name)
    change_json(file, **long) if long else None
    return use_run(rng, name)


@kind(EITHER)
def run_of_many_steps(rng, place):
    """A run that says it has taken them: its page has a chart of the losses."""
    change_json(place / "runs/done/run.json", steps=rng.choice([100_000, 100_000_000, 2 ** 32, 2 ** 40]))
    if rng.random() < 0.5:
        (place / "runs/done/loss.csv").write_text("step,loss\n" + "".join(f"{i},0.1\n" for i in range(200_000)))
    return use_run(rng, "done")


@kind(EITHER)
def run_with_broken_tensors(rng, place):
    name = rng.choice(["half", "done"])
    files = sorted((place / f"runs/{name}").glob("*.safetensors"))
    spoil_tensors(rng, rng.choice(files))
    return use_run(rng, name)


@kind(EITHER)
def run_with_a_missing_file(rng, place):
    name = rng.choice(["half", "done"])
    rng.choice(sorted(f for f in (place / f"runs/{name}").iterdir() if f.is_file())).unlink()
    return use_run(rng, name)


@kind(EITHER)
def run_with_links_for_files(rng, place):
    """A link that dangles, that leads round in a circle, or to a file that nobody may touch."""
    name = rng.choice(["half", "done"])
    file = rng.choice(sorted(f for f in (place / f"runs/{name}").iterdir() if f.is_file()))
    file.unlink()
    file.symlink_to(rng.choice(["nothing", file.name, "../../precious.txt", "../../clip.mp4", "..", "/dev/null"]))
    return use_run(rng, name)


@kind(ERROR)
def run_of_other_weights(rng, place):
    name = rng.choice(["half", "done"])
    file = some_tensors(rng, place)
    header, values = header_and_data(file)
    low, high = next(v["data_offsets"] for v in header.values() if "data_offsets" in v)
    write_header(file, header, values[:low] + struct.pack("<f", rng.random()) * ((high - low) // 4) + values[high:])
    return use_run(rng, name)


@kind(EITHER)
def run_json_with_another_lora(rng, place):
    name = rng.choice(["half", "done"])
    save_file(lora_tensors(), place / "l.safetensors")
    entry = dict(file=rng.choice(["l.safetensors", "none", "", "w", "../../etc/x", "hub:a/b"]),
                 scale=rng.choice([1, 0.5, 0]), fingerprint=rng.choice(["", "0" * 16]))
    if rng.random() < 0.5:
        entry[rng.choice(sorted(entry))] = rng.choice(WRONG)
    lora = rng.choice([[entry], [entry] * 3, [[entry]], entry, "l.safetensors", 5, [], [None]])
    change_json(place / f"runs/{name}/run.json", lora=lora)
    return use_run(rng, name), EITHER if lora == [] else ERROR


@kind(ERROR)
def run_json_that_asks_for_the_network(rng, place):
    """A stranger's run must not connect, whatever it says."""
    name, key = rng.choice(["half", "done"]), rng.choice(["tokenizer", "weights", "tokenizer"])
    value = rng.choice(["hub:openai/clip-vit-large-patch14", "hub:a/b", "http://127.0.0.1:9/x", "//127.0.0.1/x"])
    change_json(place / f"runs/{name}/run.json", **{key: value})
    return use_run(rng, name)


@kind(EITHER)
def run_with_broken_notes(rng, place):
    """Files that only the page reads, and what the weights say they know."""
    run = place / "runs/done"
    deep = b'{"prompt":' * 50_000
    name, texts = rng.choice([
        ("loss.csv", [b"\xff\xfe\xe9", b"", b"step,loss\n", b"step,loss\n1,nan\n2,inf\n", b"step,loss\n1,1e400\nx,y\n",
                      b"step,loss\n" + b"9" * 500 + b",1\n", b"a" * 200_000 + b",1\n", b"step,loss\n1,\0\n", b'"' * 9]),
        ("metrics.json", [b"1" + b"0" * 400, b'{"a": 1e999}', b"[]", b"{", b'{"samples": 5}', deep, b"\xe9",
                          b'[{"a": null}]']),
        ("x.sample.json", [deep, b"[]", b"null", b'{"prompt": 5}', b'{"prompt": "x", "settings": []}', b"\xe9", b"",
                           b"{}", b'{"prompt": "x", "settings": {"guidance": 1' + b"0" * 400 + b'}, "command": {}}']),
        ("knows.txt", [b"a man\xe9\n", b"\0" * 1000, b"\xff\xfe", b"a\x1b[31mb\n", b"word " * 100_000])])
    text = rng.choice(texts)
    (place / "w" / name if name == "knows.txt" else run / name).write_bytes(text)
    if name.startswith("x."):
        (run / "x.mp4").write_bytes((run / "source.mp4").read_bytes())
    return use_run(rng, "done")


# ---- places for results --------------------------------------------------------------------------

ROW = "clip.mp4,a man,a dog"            # of a set to evaluate


@kind(EITHER)
def place_for_results_that_holds_files(rng, place):
    """What lies there stays: files of other programs with the names of ours."""
    made = place / "out"
    made.mkdir()
    command, names = rng.choice([
        (sample_run("--out", "out"), ["index.html", "a-man.mp4", "a-man.png", "a-man.sample.json"]),
        (sample(), ["index.html", "a-man.mp4", "a-man.gif"]),
        (train("clip.mp4"), ["clip", "clip/run.json", "index.html"]),
        (evaluate(place, ROW), ["results.csv", "index.html", "settings.json", "clip/source.mp4", "clip/loss.csv",
                                "clip/tuned.safetensors", "clip/run.json"]),
        ([MODULE, "convert", "w", "out"], ["unet/config.json", "model_index.json"])])
    for name in sorted(rng.sample(names, rng.randint(1, len(names))), reverse=True):      # clip/run.json before clip
        if name != "clip":
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text("mine")
        elif not (made / name).exists():
            rng.choice([(made / name).mkdir, (made / name).touch, lambda: (made / "clip").symlink_to("nothing")])()
    return command


@kind(EITHER)
def place_for_results_that_is_none(rng, place):
    made = place / "out"
    rng.choice([lambda: made.write_text("mine"), lambda: made.symlink_to("nothing"), lambda: made.symlink_to("out"),
                lambda: made.symlink_to("w"), lambda: made.symlink_to("precious.txt")])()
    return rng.choice([train("clip.mp4"), sample(), sample_run("--out", "out"), evaluate(place, ROW)])


@kind(OK)
def names_that_a_shell_would_read(rng, place):
    """The commands that are suggested must be quoted."""
    name = rng.choice(["a; touch pwned #", "a b", "$(touch pwned)", "`touch pwned`", "a'b", 'a"b', "a&b", "-x", "a|b",
                       "*", "a\nb", "~", "é", "\x1b[31m"])
    out = f"out/{name}"
    return rng.choice([["train.py", "clip.mp4", "a man", "--weights", "w", "--out", out], sample("--out", out)])


# ---- evaluation ----------------------------------------------------------------------------------

def evaluate(place, *rows, head="clip,caption,object"):
    (place / "set.csv").write_text("\n".join([head, *rows]) + "\n")
    return [MODULE, "evaluate", "set.csv", "--weights", "w", "--clip", "judge", "--out", "out"]


@kind(EITHER)
def set_with_odd_rows(rng, place):
    row = rng.choice([
        f"{ROW}\n{ROW}", f"none.mp4,a man,a dog\n{ROW}", "clip.mp4,a man,=1+1", "clip.mp4,@SUM(A1),-2", "../x.mp4,a,b",
        "clip.mp4,a man,\x1b[31m", "precious.txt,a man,a dog", ",,", ",a man,x", "clip.mp4,,a dog", "clip.mp4,a man,",
        "clip.mp4", "clip.mp4,a man,a dog,more,and more", '"clip.mp4,a man', "w,a,b",
        "clip.mp4,a man," + "word " * 40_000, "clip.mp4,a man,\0", "/dev/zero,a man,a dog", "http://127.0.0.1:9/a.mp4,a,b"])
    return evaluate(place, row)


@kind(EITHER)
def set_that_is_none(rng, place):
    heads = ["clip,caption", "a,b,c", "clip,clip,clip", "", "caption,clip,x"]
    argv = evaluate(place, ROW, head=rng.choice(heads))
    way = rng.randrange(4)
    if way == 0:
        (place / "set.csv").write_bytes(rng.choice([
            b"", b"\xff\xfe", b"clip,caption,x\nclip.mp4,\xe9,y\n", rng.randbytes(300), b"\0" * 50, b'"' * 200_000]))
    elif way == 1:
        argv[2] = rng.choice(["none.csv", "w", "clip.mp4", "", "/dev/null", "a" * 300])
    elif way == 2:
        spoil_json(rng, rng.choice([place / "judge/config.json", place / "judge/preprocessor_config.json"]))
    return argv


# ---- what is no file -----------------------------------------------------------------------------

def pipe_or_socket(rng, path):
    os.mknod(path, rng.choice([stat.S_IFIFO, stat.S_IFSOCK]) | 0o600)


@kind(ERROR)
def path_that_names_no_file(rng, place):
    """Nothing, a folder, a pipe, a device. Whoever opens a pipe waits for its writer."""
    pipe_or_socket(rng, place / "pipe")
    path = rng.choice([".", "..", "/", "", "runs", "runs/..", "none/..", *["pipe"] * 4, "/dev/zero", "/dev/tty",
                       "/dev/stdin", "/dev/null"])
    judged = evaluate(place, ROW)
    return rng.choice([
        *(train("clip.mp4", "a man", flag, path) for flag in ("--lora", "--vae", "--tokenizer", "--embedding")),
        train(path), train("clip.mp4", "a man", "--weights", path), sample_run("--lora", path),
        sample("--lora", f"{path}:1"), sample("--control", path, "--hint", "clip.mp4"),
        ["sample.py", "--prompt", "a man", "--run", path], ["train.py", "--resume", path],
        [MODULE, "metrics", path, "--clip", "judge"], [MODULE, "metrics", "runs/done", "--clip", path],
        [MODULE, "attention", path, "--word", "man"], [MODULE, "convert", "pipe", "out"],
        [*judged[:2], path, *judged[3:]], [*judged, "--clip", path]])


@kind(EITHER)
def pipe_in_the_place_of_a_file(rng, place):
    """A pipe, or a link to a device, where the project looks for files of its own."""
    run, metrics = rng.choice(["half", "done"]), [MODULE, "metrics", "runs/done", "--clip", "judge"]
    part, argv = rng.choice([("w", train("clip.mp4")), (f"runs/{run}", use_run(rng, run)), ("in", train("in")),
                             ("judge", evaluate(place, ROW)), ("judge", metrics)])
    pictures(place, [(32, 32)] * 3)
    files = sorted(path for path in (place / part).rglob("*") if path.is_file() and path.name != "defaults.json")
    file = rng.choice(files)
    file.unlink()
    rng.choice([lambda: pipe_or_socket(rng, file), lambda: file.symlink_to("/dev/zero")])()
    return argv


# ---- how the process is started ------------------------------------------------------------------

@kind(EITHER)
def output_that_nobody_reads(rng, place):
    """A closed stream (`>&-`), a pipe whose reader has ended (`| head -1`), a full device."""
    names = rng.choice([["out"], ["err"], ["out", "err"]])
    streams = {name: rng.choice(["closed", "broken", "full"]) for name in names}
    argv = rng.choice([train("clip.mp4"), sample(), sample_run(), train("none.mp4")])
    return Case(argv, EITHER, dict(streams=streams))


@kind(OK)
def umask(rng, place):
    """Files are as readable as the umask says, those of libraries too."""
    argv = rng.choice([train("clip.mp4"), sample(), sample_run(), ["train.py", "--resume", "runs/half"],
                       evaluate(place, ROW)])
    return Case(argv, OK, dict(umask=rng.choice([0o000, 0o002, 0o022, 0o027, 0o077])))
