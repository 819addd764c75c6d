"""The tokenizer's ways in; equality with transformers' stands in test_reference.py."""
import pytest
import tiny
import tokenizers

from tinytav.errors import InputError
from tinytav.stable_diffusion import checkpoint
from tinytav.stable_diffusion.tokenizer import Tokenizer


def test_a_hub_tokenizer_gives_the_same_ids_as_its_folder(tmp_path, monkeypatch):
    """hub:NAME asks the tokenizers library for NAME; its tokenizer.json may pad and cut, which is ours to do."""
    prompts = ["a man is skiing on the snow", ""]
    local = Tokenizer.from_folder(tiny.DATA / "tokenizer")
    expected = local(prompts)
    local.bpe.enable_padding(length=9)
    local.bpe.enable_truncation(3)
    local.bpe.save(str(tmp_path / "tokenizer.json"))
    asked = []

    def from_pretrained(name):
        asked.append(name)
        return tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # the class is compiled, so the name that our module uses is replaced
    monkeypatch.setattr("tinytav.stable_diffusion.tokenizer.tokenizers", Library(from_pretrained))
    tokenizer = checkpoint._find_tokenizer(tmp_path, "hub:openai/clip", pad="<|endoftext|>")
    assert asked == ["openai/clip"]
    assert tokenizer(prompts).equal(expected)


class Library:
    """Stands for the tokenizers library, of which only this name is used to download."""

    def __init__(self, from_pretrained):
        self.Tokenizer = type("Tokenizer", (), {"from_pretrained": staticmethod(from_pretrained)})


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def offline(name):
        raise Exception("Connection refused")
    monkeypatch.setattr("tinytav.stable_diffusion.tokenizer.tokenizers", Library(offline))
    with pytest.raises(InputError, match="openai/clip cannot be downloaded .*refused.*--tokenizer"):
        Tokenizer.from_hub("openai/clip")
