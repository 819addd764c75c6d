"""Attention maps are the softmax that the model computes, of the rows asked for, and taking them changes nothing."""
import functools

import numpy as np
import pytest
import tiny
import torch
from hardening.warm import Warm
from torch.nn import functional as F

from tinytav.errors import InputError
from tinytav.inflation import ATTENTIONS, ClipCrossAttention, SparseCausalAttention, VideoUNet
from tinytav.measure import attention
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNetConfig

FRAMES, HEIGHT, WIDTH = 4, 6, 8
warm = functools.cache(Warm)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def net(kind="sparse-causal"):
    return tiny.filled(VideoUNet(UNetConfig.from_json(tiny.UNET), FRAMES, kind)).requires_grad_(False)


def inputs(batch=2):
    return random(batch, 4, FRAMES, HEIGHT, WIDTH), torch.tensor([500] * batch), random(batch, 7, 768)[..., :tiny.UNET["cross_attention_dim"]]


def test_probabilities_are_what_the_fused_call_multiplies_values_by():
    module = SparseCausalAttention(FRAMES, 16, 4)
    q, k = random(5, 16), random(9, 16)
    heads = [z.unflatten(-1, (4, -1)).transpose(0, 1) for z in (q, k)]
    values = torch.eye(9).expand(4, -1, -1)                                 # so that the outputs are the probabilities
    wanted = F.scaled_dot_product_attention(*heads, values).mean(0)
    torch.testing.assert_close(attention.probabilities(module, q, k), wanted)


def test_a_words_maps_of_all_tokens_add_up_to_one_everywhere():
    model, maps = net(), []
    for positions in ([0], [1, 2], [3, 4, 5, 6], list(range(7))):
        look = attention.WordMaps(FRAMES, positions, HEIGHT, WIDTH)
        with attention.watched(model, ClipCrossAttention, look):
            model(*inputs())
        maps.append(look.mean.value())
    assert maps[0].shape == (FRAMES, HEIGHT, WIDTH) and maps[0].std() > 1e-4
    torch.testing.assert_close(maps[0] + maps[1] + maps[2], maps[3])
    torch.testing.assert_close(maps[3], torch.ones(FRAMES, HEIGHT, WIDTH))


def test_a_words_maps_are_of_the_prompt_and_not_of_the_empty_one():
    model, (x, t, context) = net(), inputs()

    def maps(*given):
        look = attention.WordMaps(FRAMES, [2], HEIGHT, WIDTH)
        with attention.watched(model, ClipCrossAttention, look):
            model(*given)
        return look.mean.value()
    torch.testing.assert_close(maps(x, t, context), maps(x[1:], t[1:], context[1:]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind, frame, seen", [
    ("sparse-causal", 0, [0]), ("sparse-causal", 1, [0]), ("sparse-causal", 3, [0, 2]), ("first", 2, [0]), ("spatial", 2, [2]),
    ("causal", 2, [0, 1, 2]), ("full", 1, [0, 1, 2, 3])])
def test_a_pixels_maps_are_of_the_frames_it_looks_at_and_hold_all_its_attention(kind, frame, seen):
    look = attention.PixelMaps(kind, FRAMES, frame, 0.3, 0.7, HEIGHT, WIDTH)
    with attention.watched(model := net(kind), ATTENTIONS[kind], look):
        model(*inputs(1))
    maps = look.mean.value()
    assert look.seen == seen and maps.shape == (len(seen), HEIGHT, WIDTH)
    assert maps.mean((1, 2)).sum().item() == pytest.approx(1, abs=0.02)     # bilinear enlargement keeps the mean nearly


@pytest.mark.parametrize("frame", [0, 1, 3])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_values_weighted_by_a_pixels_maps_are_what_the_attention_gives_it(kind, frame):
    """With one head, the mean over heads is the head's own map, and the model's fused call must agree with it."""
    module = tiny.filled(ATTENTIONS[kind](FRAMES, 16, 1))
    x = random(FRAMES, HEIGHT * WIDTH, 16)
    look = attention.PixelMaps(kind, FRAMES, frame, 0.5, 0.25, HEIGHT, WIDTH)
    look(module, x)
    shares = look.mean.value().flatten(1) / (HEIGHT * WIDTH)                # (frames, pixels)
    wanted = module.to_out[0]((shares[..., None] * module.to_v(x[look.seen])).sum((0, 1)))
    torch.testing.assert_close(wanted, module(x)[frame, 3 * WIDTH + 2])


@pytest.mark.parametrize("kind, look", [
    (ClipCrossAttention, attention.WordMaps(FRAMES, [1], HEIGHT, WIDTH)),
    (SparseCausalAttention, attention.PixelMaps("sparse-causal", FRAMES, 2, 0.5, 0.5, HEIGHT, WIDTH))])
def test_watching_changes_no_bit_and_leaves_nothing_behind(kind, look):
    model = net()
    before = model(*inputs())
    with attention.watched(model, kind, look):
        during = model(*inputs())
    assert look.mean.count > 0 and torch.equal(before, during) and torch.equal(before, model(*inputs()))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nothing_is_left_behind_where_looking_fails():
    model = net()

    def fail(*inputs):
        raise InputError("no")
    with pytest.raises(InputError), attention.watched(model, ClipCrossAttention, fail):
        model(*inputs())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("n, size", [(48, (6, 8)), (12, (3, 4)), (4, (2, 2)), (1, (1, 1))])
def test_a_layers_grid_is_the_latents_halved_rounding_up(n, size):
    assert attention.grid(n, 6, 8) == size


TOKENIZER = Tokenizer.from_folder(tiny.DATA / "tokenizer")


@pytest.mark.parametrize("prompt, word, spans", [
    ("a man is skiing", "man", ["man"]), ("a man is a Man, no woman", "man", ["man", "Man"]),
    ("a  panda\tis skiing", "panda", ["panda"]), ("a man's dog", "man", ["man"]), ("a man is skiing", "is skiing", ["is", "skiing"])])
def test_a_words_tokens_are_found_and_no_others(prompt, word, spans):
    encoding = TOKENIZER.bpe.encode(prompt, add_special_tokens=False)
    texts = [prompt[slice(*encoding.offsets[i - 1])] for i in attention.word_positions(TOKENIZER, prompt, word)]
    assert "".join(texts).replace(" ", "") == "".join(spans).replace(" ", "")


@pytest.mark.parametrize("prompt, word", [("a man", "woman"), ("a woman", "man"), ("a man", ""), ("a man", " "), ("dog " * 80 + "cat", "cat")])
def test_a_word_that_is_not_in_the_prompt_is_refused(prompt, word):
    with pytest.raises(InputError, match="does not hold the word"):
        attention.word_positions(TOKENIZER, prompt, word)


def test_a_picture_is_bright_where_the_map_is():
    heat = np.zeros((4, 4))
    heat[1, 2] = 1
    picture = attention.heated(np.full((80, 80, 3), 128, np.uint8), heat).astype(float)
    brightest = np.unravel_index(picture.sum(-1).argmax(), (80, 80))
    assert 20 <= brightest[0] < 40 and 40 <= brightest[1] < 60
    assert np.ptp(picture[70, 10]) == 0 and np.ptp(picture[30, 50]) > 50    # grey where there is none, coloured where it is


def test_pictures_have_a_row_for_each_part_and_a_column_for_each_frame():
    x = random(10, 3, 16, 24).clamp(-1, 1)
    word = attention.word_picture(x, random(10, 2, 3).abs(), "man")
    width = 4 * 300 + 3 * 4
    assert word.size[0] == width and 4 * 200 < word.size[1] < 4 * 260
    pixel = attention.pixel_picture(x, 9, (0.5, 0.5), [0, 8], [("before", random(2, 2, 3).abs()), ("after", random(2, 2, 3).abs())])
    assert pixel.size[0] == 3 * 300 + 2 * 4 and 2 * 200 < pixel.size[1] < 2 * 260


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with weights and a finished run that has one sample."""
    place = tmp_path_factory.mktemp("place")
    tiny.write_folder(place / "w")
    tiny.write_clip(place / "clip.mp4")
    for args in (("train.py", "clip.mp4", "a man is skiing", "--weights", "w"), ("sample.py", "--prompt", "a panda is skiing")):
        done = warm()(place, *args, limit=300)
        assert done.status == 0, done.err
    return place


def call(place, *args, status=0):
    done = warm()(place, "tinytav/__main__.py", "attention", *args, limit=300)
    assert done.status == status and "Traceback" not in done.err, done.out + done.err
    return done


def test_the_command_draws_pictures_that_the_page_shows_and_changes_no_other_file(place):
    run = place / "runs/clip"
    before = {file: file.read_bytes() for file in run.iterdir() if file.name != "index.html"}
    done = call(place, "runs/clip", "--word", "panda")
    assert "prompt: a panda is skiing" in done.out and done.out.splitlines()[-1] == "page: runs/clip/index.html"
    call(place, "runs/clip", "--word", "man")                               # in the run's own prompt
    call(place, "runs/clip", "--pixel", 100, 30)
    call(place, "runs/clip", "--pixel", 100, 30, "--frame", 1)
    names = {"a-panda-is-skiing.panda", "a-man-is-skiing.man", "pixel-100-30-frame-3", "pixel-100-30-frame-1"}
    assert {file.name.removesuffix(".attention.png") for file in run.glob("*.attention.png")} == names
    page = (run / "index.html").read_text()
    assert all(f'src="{name}.attention.png"' in page for name in names) and "--pixel 100 30 --frame 3" in page
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("args, message", [
    (("--word", "dragon"), "does not hold the word 'dragon'"), (("--pixel", 4000, 3), "has 3 frames of"),
    (("--pixel", 3, 3, "--frame", 9), "of frame 9 is not in it"), ((), "required")])
def test_what_cannot_be_shown_is_refused(place, args, message):
    assert message in call(place, "runs/clip", *args, status=2).err
