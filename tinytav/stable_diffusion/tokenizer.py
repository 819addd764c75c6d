"""CLIP's tokenizer: a prompt -> its 77 token ids.

Byte-pair encoding of lower-cased text (Radford et al., arXiv 2103.00020, section 2.4), as transformers' CLIPTokenizer
does it; the merging itself is the `tokenizers` library's.
"""
import itertools
import warnings
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from tinytav.errors import InputError
from tinytav.stable_diffusion.config import read_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """`bpe`: a tokenizers.Tokenizer. Rows are `length` ids, filled with `pad`."""

    def __init__(self, bpe, pad=END, length=77):
        if not (isinstance(length, int) and length > 2 and isinstance(pad, str)):
            raise InputError(f"A tokenizer of model_max_length {length!r} and pad_token {pad!r} is not CLIP's.")
        self.bpe, self.length = bpe, length
        self.begin, self.end, self.pad = (self._id(token) for token in (BEGIN, END, pad))
        self.words = []                 # those that `add` has added
        bpe.add_special_tokens([BEGIN, END, pad])       # never split, also where a prompt holds one: SD 2 pads with "!"
        self._count()

    def _id(self, token):
        if (i := self.bpe.token_to_id(token)) is None:
            raise InputError(f"The tokenizer's vocabulary has no {token!r}; it is not CLIP's.")
        return i

    def _count(self):
        self.size = 1 + max(self.bpe.get_vocab().values())
        self.vectors = vectors({token.content: i for i, token in self.bpe.get_added_tokens_decoder().items()})

    @classmethod
    def from_folder(cls, folder, pad=END):
        """Reads vocab.json and merges.txt, or tokenizer.json, which holds both and may be named itself.

        Padding, length and learned tokens are read where the folder's JSON files tell them.
        """
        folder = Path(folder)
        try:
            whole = read(folder if folder.is_file() else folder / "tokenizer.json")
            vocab, merges = vocabulary(folder, whole)
            bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>"))
            settings = read(folder / "tokenizer_config.json") | read(folder / "special_tokens_map.json")
            learned = learned_tokens(settings, read(folder / "added_tokens.json"), whole)
            add_learned(bpe, {i: token for i, token in learned.items() if token.content not in (BEGIN, END)})
            pad = settings.get("pad_token", pad)
            pad = pad["content"] if isinstance(pad, dict) else pad
            length = settings.get("model_max_length", 77)
        except InputError:
            raise
        except Exception as error:      # the library raises plain Exception for a vocabulary that merges do not fit
            raise InputError(f"The tokenizer in {folder} cannot be read: {error}") from None
        bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return cls(bpe, pad, length)

    def add(self, token, count):
        """Adds a token that stands for `count` new ids, the next after the last. Raises InputError if it is there."""
        names = [token, *(f"{token}_{number}" for number in range(1, count))]
        if taken := [name for name in names if self.bpe.token_to_id(name) is not None]:
            raise InputError(f"The tokenizer has a token {taken[0]!r} already: an embedding needs a name of its own.")
        self.bpe.add_tokens(names)
        self.words.append(token)
        self._count()

    def __call__(self, prompts):
        """A list of n prompts -> ids (n, length): begin, words, end, padding. Warns of a prompt that is cut."""
        return torch.tensor([self._row(prompt) for prompt in prompts])

    def _row(self, prompt):
        try:
            words = self.bpe.encode(prompt, add_special_tokens=False)
        except TypeError:
            raise InputError(f"The prompt {prompt!r} holds bytes that are not UTF-8.") from None
        found = [(i, start) for first, (start, _) in zip(words.ids, words.offsets)
                 for i in self.vectors.get(first, [first])]
        room = self.length - 2
        if len(found) > room:
            warnings.warn(f"The prompt has {len(found)} tokens, {room} are used: "
                          f"it is cut before {prompt[found[room][1]:][:40]!r}.")
        ids = [self.begin, *(i for i, _ in found[:room]), self.end]
        return ids + [self.pad] * (self.length - len(ids))


def read(path):
    """The JSON object in a file; of a file that is not there {}."""
    return read_json(path) if path.is_file() else {}


def vocabulary(folder, whole):
    """{token: id} and the merges, pairs of tokens: of vocab.json and merges.txt, else of the parsed tokenizer.json."""
    if whole and not (folder / "vocab.json").is_file():
        model = whole["model"]
        return model["vocab"], [tuple(pair.split() if isinstance(pair, str) else pair) for pair in model["merges"]]
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise InputError(f"No {name} in {folder}. A CLIP tokenizer is a folder with vocab.json and merges.txt, or "
                             "with tokenizer.json.")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    return read(folder / "vocab.json"), merges


def learned_tokens(settings, added, whole):
    """{id: AddedToken} of the parsed tokenizer_config.json, else of added_tokens.json and tokenizer.json.

    In that order, and with these properties, transformers takes them.
    """
    if "added_tokens_decoder" in settings:
        return {int(i): AddedToken(**token) for i, token in settings["added_tokens_decoder"].items()}
    special = [*settings.get("additional_special_tokens", []), *settings.get("extra_special_tokens", [])]
    names = {token["content"] if isinstance(token, dict) else token for token in special}
    tokens = {i: AddedToken(token, normalized=token not in names, special=token in names) for token, i in added.items()}
    return tokens | {token["id"]: AddedToken(**{name: value for name, value in token.items() if name != "id"})
                     for token in whole.get("added_tokens", [])}


def vectors(added):
    """{a token's id: the ids that take its place} for the added tokens {token: id}, as diffusers has it.

    A token that has token_1, token_2, ... beside it stands for all of them: an embedding of several vectors.
    """
    out = {}
    for token, i in added.items():
        others = itertools.takewhile(added.__contains__, (f"{token}_{number}" for number in itertools.count(1)))
        out[i] = [i, *(added[other] for other in others)]
    return out


def add_learned(bpe, tokens):
    """Adds tokens {id: AddedToken} to the vocabulary. Raises InputError where an id would not be theirs."""
    for i, token in sorted(tokens.items()):
        bpe.add_tokens([token])
        if bpe.token_to_id(token.content) != i:
            raise InputError(f"The learned token {token.content!r} has the id {i}, which leaves a gap in the "
                             "vocabulary.")
