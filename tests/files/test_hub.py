"""hub:OWNER/NAME: exactly the needed files are fetched, and only when asked; from a small server on this machine."""
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tinytav import cli
from tinytav.errors import InputError
from tinytav.files.hub import needed
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.weights import load

ROOT = tiny.DATA.parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Serves the folder `root` as the hub's repository a/b, and notes in `asked` which paths were asked for."""

    def __init__(self, root):
        self.root, self.asked = root, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                server.asked.append(self.path)
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/a/b"):
                    names = [str(file.relative_to(root)) for file in sorted(root.rglob("*")) if file.is_file()]
                    siblings = [dict(rfilename=name) for name in names]
                    data = json.dumps(dict(id="a/b", sha=COMMIT, siblings=siblings)).encode()
                elif path.startswith("/a/b/resolve/") and (root / path.split("/", 5)[5]).is_file():
                    data = (root / path.split("/", 5)[5]).read_bytes()
                else:
                    return self.send_error(404)
                self.send_response(200)
                for name, value in {"Content-Length": len(data), "ETag": f'"{hash(path) & 0xffffffff:x}"',
                                    "X-Repo-Commit": COMMIT, "Content-Type": "application/json"}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if body:
                    self.wfile.write(data)
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def fetched(self):
        """The files of which anything was asked for."""
        return {path.split("/", 5)[5] for path in self.asked if path.startswith("/a/b/resolve/")}


@pytest.fixture
def hub(tmp_path):
    """A server with a Stable Diffusion in full and half precision, and with files that nobody needs."""
    root = tiny.write_folder(tmp_path / "hub")
    for part in ("unet", "vae", "text_encoder"):
        file, = (root / part).glob("*.safetensors")
        save_file({name: z.half() for name, z in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        (root / part / file.with_suffix(".bin").name).write_bytes(b"x")
        (root / part / f"{file.stem}.non_ema.safetensors").write_bytes(b"x")
    (root / "v1-5-pruned.safetensors").write_bytes(b"x"), (root / "README.md").write_text("x")
    (root / "safety_checker").mkdir(), (root / "safety_checker/model.safetensors").write_bytes(b"x")
    server = Server(root)
    yield server
    server.http.shutdown()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """The hub's client in this process asks that server and has a cache of its own. Returns what was asked for."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.http.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


SETTINGS = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"}
FULL = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors"}
FP16 = {name.replace(".safetensors", ".fp16.safetensors") for name in FULL}


def test_the_command_fetches_what_it_reads_and_nothing_else(hub, tmp_path):
    """As a user does it, with HF_ENDPOINT for the server's address."""
    environment = dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{hub.http.server_port}",
                       HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
    environment.pop("HF_HUB_OFFLINE", None), environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, ROOT / "sample.py", "--weights", "hub:a/b", "--prompt", "a dog", "--frames", "1",
               "--size", "32", "--steps", "2", "--precision", "fp32"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.fetched == SETTINGS | FULL and "weights: hub:a/b" in done.stdout


def test_fp16_files_are_fetched_and_read_where_fp16_runs(client):
    half = load("hub:a/b", dtype=torch.float16)
    assert client.fetched == SETTINGS | FP16
    full = load("hub:a/b")
    assert client.fetched == SETTINGS | FP16 | FULL
    # both lie in the cache now: each precision reads its own
    assert load("hub:a/b", dtype=torch.float16).fingerprint == half.fingerprint != full.fingerprint
    assert load("hub:a/b").fingerprint == full.fingerprint == load(client.root).fingerprint
    assert full.source["weights"] == "hub:a/b"


def flags(**given):
    """The flags of the commands, as parsed."""
    return SimpleNamespace(**dict.fromkeys(cli.SOURCE) | dict(device="cpu", precision="fp32") | given)


def test_a_run_never_connects_by_itself(client):
    run = dict(weights="hub:a/b", tokenizer=None)
    with pytest.raises(InputError, match="hub:a/b is not here, and a run does not fetch it: name it with --weights"):
        cli.load_weights(flags(), run)
    assert client.asked == []
    cli.load_weights(flags(weights="hub:a/b"), run)             # the user asks for it
    assert client.fetched == SETTINGS | FULL
    client.asked.clear()
    assert cli.load_weights(flags(), run).source["weights"] == "hub:a/b"
    with pytest.raises(InputError, match="hub:a/b is not here.*--tokenizer"):
        cli.load_weights(flags(weights="hub:a/b"), run | dict(tokenizer="hub:a/b"))
    with pytest.raises(InputError, match="hub:.. is not here"):
        cli.load_weights(flags(), run | dict(weights="hub:.."))
    assert client.asked == []


def test_a_tokenizer_of_the_hub_gives_the_same_ids_as_its_folder(client):
    local = Tokenizer.from_folder(tiny.DATA / "tokenizer")
    local.bpe.enable_padding(length=9), local.bpe.enable_truncation(3)          # which are ours to do
    local.bpe.save(str(client.root / "tokenizer.json"))
    sd = load(client.root, tokenizer="hub:a/b")
    assert client.fetched == {"tokenizer.json"} and sd.source["tokenizer"] == "hub:a/b"
    file, = Path(constants.HF_HUB_CACHE).glob("models--a--b/snapshots/*/tokenizer.json")
    file.with_name("tokenizer_config.json").write_text('{"model_max_length": 5}')    # as another program fetched it
    sd = load(client.root, tokenizer="hub:a/b")
    prompts = ["a man is skiing on the snow", ""]
    assert sd.tokenizer(prompts).equal(Tokenizer.from_folder(tiny.DATA / "tokenizer")(prompts))


def test_what_cannot_be_fetched_is_named_with_what_to_do(client):
    for name in ("hub:a/c", "hub:", "hub:a/b/c"):
        with pytest.raises(InputError, match=f"{name} cannot be downloaded .*--weights"):
            load(name)
    with pytest.raises(InputError, match="hub:a/b cannot be downloaded .*--tokenizer"):
        load(client.root, tokenizer="hub:a/b")                  # it has no tokenizer.json


def test_what_a_repository_lacks_is_said_in_its_own_words(client, monkeypatch):
    def nothing(names, half, where):
        raise InputError(f"{where} has no .safetensors")
    monkeypatch.setattr("tinytav.files.hub.needed", nothing)
    with pytest.raises(InputError, match="^hub:a/b has no .safetensors$"):
        load("hub:a/b")


@pytest.mark.parametrize("half", [False, True])
def test_what_is_needed_of_a_repository(half):
    stem = "unet/diffusion_pytorch_model"
    unet = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors",
            f"{stem}.safetensors.index.json"]
    fp16 = [f"{stem}.fp16-00001-of-00001.safetensors", f"{stem}.safetensors.index.fp16.json"]
    rest = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.fp16.safetensors",
            "tokenizer/tokenizer.json"]
    other = ["vae/model.bin", "a.safetensors", "unet/flax_model.msgpack", f"{stem}.non_ema.safetensors",
             "safety_checker/model.safetensors", "tokenizer/README.md"]
    assert set(needed([*unet, *fp16, *rest, *other], half, "it")) == {*(fp16 if half else unet), *rest}
    with pytest.raises(InputError, match="it has no .safetensors for its vae"):
        needed([*unet, *other], half, "it")


def test_only_hub_names_are_asked_for(client):
    load(client.root)
    assert client.asked == []
