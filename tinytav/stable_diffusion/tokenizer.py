"""CLIP's tokenizer: a prompt -> its 77 token ids.

Byte-pair encoding of lower-cased text (Radford et al., arXiv 2103.00020, section 2.4), as transformers' CLIPTokenizer
does it; the merging itself is the `tokenizers` library's.
"""
import json
import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers

from tinytav.errors import InputError

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """`bpe`: a tokenizers.Tokenizer. Rows are `length` ids, filled with `pad`."""

    def __init__(self, bpe, pad=END, length=77):
        if not (isinstance(length, int) and length > 2 and isinstance(pad, str)):
            raise InputError(f"A tokenizer of model_max_length {length!r} and pad_token {pad!r} is not CLIP's.")
        self.bpe, self.length = bpe, length
        self.begin, self.end, self.pad = (self._id(token) for token in (BEGIN, END, pad))
        self.size = 1 + max(bpe.get_vocab().values())
        bpe.add_special_tokens([BEGIN, END, pad])       # never split, also where a prompt holds one: SD 2 pads with "!"

    def _id(self, token):
        if (i := self.bpe.token_to_id(token)) is None:
            raise InputError(f"The tokenizer's vocabulary has no {token!r}; it is not CLIP's.")
        return i

    @classmethod
    def from_folder(cls, folder, pad=END):
        """Reads vocab.json and merges.txt, and padding and length where the other JSON files tell them."""
        folder = Path(folder)
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(f"No {name} in {folder}. A CLIP tokenizer is a folder with vocab.json and merges.txt.")
        try:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
            bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>"))
            settings = {}
            for name in ("tokenizer_config.json", "special_tokens_map.json"):       # the second has the last word
                if (folder / name).is_file():
                    settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            pad = settings.get("pad_token", pad)
            pad = pad["content"] if isinstance(pad, dict) else pad
            length = settings.get("model_max_length", 77)
        except Exception as error:      # the library raises plain Exception for a vocabulary that merges do not fit
            raise InputError(f"The tokenizer in {folder} cannot be read: {error}") from None
        bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return cls(bpe, pad, length)

    @classmethod
    def from_hub(cls, name, pad=END):
        """Downloads a tokenizer.json. The only network access in the package; made when the user asks for it."""
        try:
            bpe = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:      # offline, no such repository, a proxy's answer: all plain Exceptions
            raise InputError(f"The tokenizer {name} cannot be downloaded ({error}). Name a folder that holds vocab.json "
                             "and merges.txt with --tokenizer, or put them beside the checkpoint.") from None
        bpe.no_padding(), bpe.no_truncation()
        return cls(bpe, pad)

    def __call__(self, prompts):
        """A list of n prompts -> ids (n, length): begin, words, end, padding. Warns of a prompt that is cut."""
        return torch.tensor([self._row(prompt) for prompt in prompts])

    def _row(self, prompt):
        try:
            words = self.bpe.encode(prompt, add_special_tokens=False)
        except TypeError:
            raise InputError(f"The prompt {prompt!r} holds bytes that are not UTF-8.") from None
        room = self.length - 2
        if len(words.ids) > room:
            warnings.warn(f"The prompt has {len(words.ids)} tokens, {room} are used: "
                          f"it is cut before {prompt[words.offsets[room][0]:][:40]!r}.")
        ids = [self.begin, *words.ids[:room], self.end]
        return ids + [self.pad] * (self.length - len(ids))
