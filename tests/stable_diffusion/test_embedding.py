"""Textual inversion: each kind of file gives the word and the vectors that diffusers takes from it."""
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tinytav.errors import InputError
from tinytav.files.convert import convert_file
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.weights import load

WIDTH = 24
VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


def by_hand(word_vectors, prompt_ids):
    """The context that the text encoder gives where the first prompt ids are as told and some rows are the vectors."""
    table = "text_model.embeddings.token_embedding.weight"
    tensors = tiny.filled(TextEncoder(TextEncoderConfig.from_json(tiny.TEXT))).state_dict()
    tensors[table] = torch.cat([tensors[table], word_vectors])
    model = TextEncoder(TextEncoderConfig.from_json(tiny.TEXT | dict(vocab_size=len(tensors[table]))))
    model.load_state_dict(tensors)
    with torch.no_grad():
        return model(prompt_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("embedding") / "w")


@pytest.mark.parametrize("name, tensors, word, count", [
    ("a", {"<cat>": VECTORS[0]}, "<cat>", 1), ("a", {"<cat>": VECTORS[:1]}, "<cat>", 1),
    ("a", {"<cat>": VECTORS}, "<cat>", 3), ("my-cat", {"emb_params": VECTORS.half()}, "my-cat", 3)])
def test_a_word_stands_for_its_vectors(folder, tmp_path, name, tensors, word, count):
    file = tmp_path / f"{name}.safetensors"
    save_file(tensors, file)
    sd, plain = load(folder, embedding=[file]), load(folder)
    (begin, a, man, end), = (row[:4].tolist() for row in plain.tokenizer(["a man"]))
    ids = torch.tensor([[begin, a, *range(650, 650 + count), man, end]])
    ids = torch.cat([ids, torch.full((1, 77 - ids.shape[1]), end)], dim=1)
    assert sd.tokenizer([f"a {word} man"]).equal(ids)
    vectors = next(iter(tensors.values())).float().view(-1, WIDTH)
    torch.testing.assert_close(sd.encode_prompts([f"a {word} man"]), by_hand(vectors, ids), atol=1e-6, rtol=0)
    assert torch.equal(sd.encode_prompts(["a man"]), plain.encode_prompts(["a man"]))
    assert sd.fingerprint != plain.fingerprint and sd.source["embedding"] == (str(file),)
    assert plain.source["embedding"] is None


def test_every_number_of_an_embedding_counts_in_the_fingerprint(folder, tmp_path):
    """Of the weights only some numbers do: the table of Stable Diffusion is far larger than its last row."""
    marks = set()
    for change in range(4):
        vectors = torch.zeros(75, WIDTH)
        vectors[change, change] = 1e-3
        save_file({"<cat>": vectors}, tmp_path / "a.safetensors")
        marks.add(load(folder, embedding=[tmp_path / "a.safetensors"]).fingerprint)
    assert len(marks) == 4


def test_several_embeddings_are_added_one_after_another(folder, tmp_path):
    save_file({"<cat>": VECTORS[:2]}, tmp_path / "a.safetensors")
    save_file({"<dog>": VECTORS[2]}, tmp_path / "b.safetensors")
    sd = load(folder, embedding=[tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert sd.tokenizer(["<dog> <cat>"])[0, 1:4].tolist() == [652, 650, 651]
    assert sd.tokenizer.words == ["<cat>", "<dog>"]
    table = sd.text_encoder.text_model.embeddings.token_embedding.weight
    assert torch.equal(table[650:], VECTORS)


@pytest.mark.parametrize("content, word", [
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "cat-style", "step": 5}, "cat-style"),
    ({"string_to_param": {"*": VECTORS}, "name": None}, "old"), ({"<cat>": VECTORS[0]}, "<cat>")])
def test_a_pickled_embedding_is_converted_and_keeps_its_word(folder, tmp_path, content, word):
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(InputError, match="old.pt is not a .safetensors file.*tinytav convert"):
        load(folder, embedding=[tmp_path / "old.pt"])
    convert_file(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert list(load_file(tmp_path / "new.safetensors")) == [word]
    sd = load(folder, embedding=[tmp_path / "new.safetensors"])
    assert sd.tokenizer.words == [word] and sd.tokenizer([word])[0, 1] == 650


@pytest.mark.parametrize("tensors, message", [
    ({"clip_l": VECTORS, "clip_g": torch.ones(1, 1280)}, "is an embedding for SDXL"),
    ({"a": VECTORS, "b": VECTORS + 1}, "holds 2 tensors, not one"),
    ({"<cat>": torch.ones(2, 3, WIDTH)}, "not finite vectors"), ({"<cat>": torch.ones(0, WIDTH)}, "not finite vectors"),
    ({"<cat>": torch.ones(2, WIDTH) / 0}, "not finite vectors"), ({" ": VECTORS}, "does not name its word"),
    ({"<cat>": torch.ones(2, WIDTH, dtype=torch.int32)}, "not finite vectors"),
    ({"<cat>": torch.ones(1, 1024)}, "is 1024 wide, the text encoder 24"), ({"!": VECTORS}, "has a token '!' already")])
def test_what_is_no_embedding_for_the_model_is_refused(folder, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        load(folder, embedding=[tmp_path / "a.safetensors"])


def test_learned_tokens_without_their_names_are_refused(tmp_path):
    """A text encoder with more rows than the tokenizer knows tokens: a prompt could never reach them."""
    folder = tiny.write_folder(tmp_path / "w")
    file = folder / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["text_model.embeddings.token_embedding.weight"] = torch.ones(651, WIDTH)
    save_file(tensors, file)
    tiny.save_json(folder / "text_encoder/config.json", tiny.TEXT | dict(vocab_size=651))
    with pytest.raises(InputError, match="knows 650 tokens .* 651 and 77: .*Learned tokens stand in the tokenizer's"):
        load(folder)
    tiny.save_json(folder / "tokenizer/added_tokens.json", {"<cat>": 650})
    assert load(folder).tokenizer(["a <cat>"])[0, 2] == 650
