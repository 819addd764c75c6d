"""Stable Diffusion from the Hugging Face hub: the files that are read, and no others; only when the user asks for it.

What was fetched once lies in the hub client's own cache, and is not fetched again.
"""
import os
import re
from pathlib import Path

from tinytav.errors import InputError

PREFIX = "hub:"
PARTS = ("unet", "vae", "text_encoder")
SETTINGS = re.compile(r"model_index\.json|scheduler/scheduler_config\.json|(unet|vae|text_encoder)/config\.json|"
                      r"tokenizer/(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json|"
                      r"tokenizer/merges\.txt")
SHARD = r"(-\d+-of-\d+)?"
WEIGHTS = re.compile(rf"({'|'.join(PARTS)})/(diffusion_pytorch_model|model)({SHARD}(\.fp16)?{SHARD}\.safetensors|"
                     r"\.safetensors\.index(\.fp16)?\.json)")


def is_name(text):
    """Does this name something on the hub, such as hub:stable-diffusion-v1-5/stable-diffusion-v1-5?"""
    return str(text).startswith(PREFIX)


def folder(name, half=False, connect=True):
    """hub:OWNER/NAME -> the folder in the hub's cache that holds its Stable Diffusion.

    half: fetch the fp16 files where there are such. connect: False looks in the cache alone. Raises InputError.
    """
    def fetch(api, repo):
        names = [file.rfilename for file in api.model_info(repo).siblings]
        for file in needed(names, half, name):
            found = api.hf_hub_download(repo, file)
        return Path(found.removesuffix(file))
    return _ask(name, "--weights", fetch) if connect else _in_cache(name, "--weights", "model_index.json").parent


def tokenizer_file(name, connect=True):
    """hub:OWNER/NAME -> its tokenizer.json in the hub's cache. Raises InputError."""
    def fetch(api, repo):
        return Path(api.hf_hub_download(repo, "tokenizer.json"))
    return _ask(name, "--tokenizer", fetch) if connect else _in_cache(name, "--tokenizer", "tokenizer.json")


def needed(names, half, where):
    """Which of a repository's files are read. Raises InputError where a part has no safetensors."""
    weights = []
    for part in PARTS:
        found = [name for name in names if WEIGHTS.fullmatch(name) and name.startswith(f"{part}/")]
        if not found:
            raise InputError(f"{where} has no .safetensors for its {part}: choose another repository.")
        fp16 = [name for name in found if ".fp16" in name]
        full = [name for name in found if ".fp16" not in name]
        weights += (fp16 or full) if half else (full or fp16)
    return [name for name in names if SETTINGS.fullmatch(name)] + weights


def _in_cache(name, flag, file):
    """Where a file lies in the hub's cache. The client's other functions connect, even where they need not."""
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(name.removeprefix(PREFIX), file)
    except ValueError:                  # not the name of a repository
        found = None
    if not isinstance(found, str):
        raise InputError(f"{name} is not here, and a run does not fetch it: name it with {flag} to download it.")
    return Path(found)


def _ask(name, flag, fetch):
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return fetch(huggingface_hub.HfApi(os.environ.get("HF_ENDPOINT")), name.removeprefix(PREFIX))
    except InputError:
        raise
    except Exception as error:          # offline, no such repository, a proxy's answer: of many classes
        raise InputError(f"{name} cannot be downloaded ({str(error).strip().splitlines()[0]}). Name a folder on this "
                         f"machine with {flag}.") from None
