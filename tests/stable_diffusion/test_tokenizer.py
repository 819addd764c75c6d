"""The tokenizer's ways in; equality with transformers' on plain text stands in test_reference.py.

The ids of learned tokens were computed by transformers 5.24 (CLIPTokenizer.from_pretrained) from folders as made here.
"""
import json
import shutil

import pytest
import tiny

from tinytav.errors import InputError
from tinytav.stable_diffusion.tokenizer import BEGIN, END, Tokenizer

PLAIN = tiny.DATA / "tokenizer"
PROMPTS = ["a <cat-toy> man", "a <Cat-Toy> <STYLE> <style>", "the<cat-toy>man", "<cat-toy>_1 <cat-toy>", "a man"]


def token(content, **more):
    """A token as tokenizer_config.json describes it."""
    return dict(content=content, lstrip=False, rstrip=False, single_word=False, normalized=True, special=False) | more


def folder(place, **files):
    """The plain tokenizer in a new folder, with further or other JSON files."""
    shutil.copytree(PLAIN, place)
    for name, d in files.items():
        (place / f"{name}.json").write_text(json.dumps(d))
    return place


def whole(place, added=(), pairs=" ".join):
    """The plain tokenizer as transformers 5 saves it: tokenizer.json alone, beside the settings."""
    folder(place)
    lines = (place / "merges.txt").read_text().splitlines()[1:]
    model = dict(type="BPE", vocab=json.loads((place / "vocab.json").read_text()), unk_token=END,
                 end_of_word_suffix="</w>", merges=[pairs(line.split()) for line in lines if line])
    (place / "vocab.json").unlink(), (place / "merges.txt").unlink()
    (place / "tokenizer.json").write_text(json.dumps(dict(
        truncation=dict(max_length=3), padding=dict(strategy=dict(Fixed=9)), model=model,
        added_tokens=[token(BEGIN, id=648), token(END, id=649, normalized=False, special=True), *added])))
    return place


def words(tokenizer, prompts=PROMPTS):
    """The ids of each prompt without begin, end and padding."""
    return [[i for i in row if i not in (tokenizer.begin, tokenizer.end)] for row in tokenizer(prompts).tolist()]


@pytest.mark.parametrize("pairs", [" ".join, list])
def test_tokenizer_json_alone_gives_the_same_ids(tmp_path, pairs):
    expected = Tokenizer.from_folder(PLAIN)(PROMPTS)
    place = whole(tmp_path / "a", pairs=pairs)
    assert Tokenizer.from_folder(place)(PROMPTS).equal(expected)
    assert Tokenizer.from_folder(place / "tokenizer.json")(PROMPTS).equal(expected)     # as hub:NAME fetches it


def test_vocab_json_and_merges_txt_come_before_tokenizer_json(tmp_path):
    place = folder(tmp_path / "a", tokenizer=dict(model=dict(vocab={}, merges=[]), added_tokens=[]))
    assert Tokenizer.from_folder(place)(PROMPTS).equal(Tokenizer.from_folder(PLAIN)(PROMPTS))


def test_settings_beside_tokenizer_json_are_read(tmp_path):
    place = whole(tmp_path / "a")
    (place / "tokenizer_config.json").write_text(json.dumps(dict(model_max_length=20, pad_token="!")))
    rows = Tokenizer.from_folder(place)(["a man"])
    vocabulary = json.loads((PLAIN / "vocab.json").read_text())
    assert rows.shape == (1, 20) and rows[0, -1] == vocabulary["!"]
    (place / "special_tokens_map.json").write_text(json.dumps(dict(pad_token="a")))         # has the last word
    assert Tokenizer.from_folder(place)(["a man"])[0, -1] == vocabulary["a"]


TOY, STYLE = 650, 651
NAMES = {"<cat-toy>": TOY, "<style>": STYLE}
SPECIAL = token("<style>", normalized=False, special=True)
DECODER = {str(TOY): token("<cat-toy>"), str(STYLE): SPECIAL}


@pytest.mark.parametrize("make", [
    lambda place: folder(place, added_tokens=NAMES, special_tokens_map=dict(additional_special_tokens=["<style>"])),
    lambda place: folder(place, added_tokens=NAMES,
                         special_tokens_map=dict(additional_special_tokens=[token("<style>")])),
    lambda place: folder(place, tokenizer_config=dict(added_tokens_decoder=DECODER)),
    lambda place: folder(place, tokenizer_config=dict(added_tokens_decoder=DECODER), added_tokens={"<other>": 650}),
    lambda place: whole(place, [token("<cat-toy>", id=TOY), SPECIAL | dict(id=STYLE)])])
def test_learned_tokens_are_used_as_transformers_uses_them(tmp_path, make):
    """A token that is not special is found whatever its case, a special one as it is spelt; both within words too."""
    tokenizer = Tokenizer.from_folder(make(tmp_path / "a"))
    (a, man), = words(Tokenizer.from_folder(PLAIN), ["a man"])
    the, = words(Tokenizer.from_folder(PLAIN), ["the"])
    rows = words(tokenizer)
    assert rows[0] == [a, TOY, man] and rows[2] == [*the, TOY, man] and rows[4] == [a, man]
    assert rows[1][:2] == [a, TOY] and rows[1][-1] == STYLE and rows[1].count(STYLE) == 1
    assert tokenizer.size == 652


def test_a_token_of_several_vectors_takes_as_many_places(tmp_path):
    """As diffusers' maybe_convert_prompt has it, for tokens of the folder and for added ones."""
    in_folder = Tokenizer.from_folder(folder(tmp_path / "a", added_tokens={"<cat-toy>": 650, "<cat-toy>_1": 651}))
    added = Tokenizer.from_folder(PLAIN)
    added.add("<cat-toy>", 2)
    (a, man), = words(added, ["a man"])
    for tokenizer in (in_folder, added):
        assert words(tokenizer, ["a <cat-toy> man"]) == [[a, 650, 651, man]]
        assert words(tokenizer, ["a <cat-toy>_1 man"]) == [[a, 651, man]]
    assert added.size == 652 and added.words == ["<cat-toy>"]


def test_a_prompt_is_cut_at_the_right_word_when_a_token_takes_several_places():
    tokenizer = Tokenizer.from_folder(PLAIN)
    tokenizer.add("<cat-toy>", 70)
    with pytest.warns(UserWarning, match="has 77 tokens, 75 are used: it is cut before 'man skiing"):
        rows = tokenizer(["a a a a a <cat-toy> man skiing"])
    assert rows.shape == (1, 77) and rows[0, -1] == tokenizer.end


def test_a_token_that_is_there_is_not_added_again():
    tokenizer = Tokenizer.from_folder(PLAIN)
    tokenizer.add("<cat-toy>", 2)
    for name in ("<cat-toy>", "<cat-toy>_1", "!", END):
        with pytest.raises(InputError, match=f"has a token {name!r} already".replace("|", r"\|")):
            tokenizer.add(name, 1)


@pytest.mark.parametrize("files, message", [
    (dict(added_tokens={"<cat-toy>": 700}), "'<cat-toy>' has the id 700, which leaves a gap"),
    (dict(added_tokens={"<cat-toy>": "x"}), "leaves a gap"),
    (dict(added_tokens=[5]), "holds a list, not a JSON object"),
    (dict(tokenizer_config=dict(added_tokens_decoder={"650": 5})), "cannot be read"),
    (dict(tokenizer_config=dict(model_max_length=2)), "is not CLIP's")])
def test_files_that_cannot_be_right_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(folder(tmp_path / "a", **files))


@pytest.mark.parametrize("d", [{"model": {}}, {"model": {"vocab": {"a": 0}, "merges": []}}, {"model": 5}])
def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, d):
    (tmp_path / "tokenizer.json").write_text(json.dumps(d))
    with pytest.raises(InputError, match="cannot be read|not CLIP's"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_folder_is_told_what_it_lacks(tmp_path):
    with pytest.raises(InputError, match="No vocab.json in .*tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
