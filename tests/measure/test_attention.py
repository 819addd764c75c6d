"""Attention maps are the softmax that the model computes, of the rows asked for, and taking them changes nothing."""

import numpy as np
import pytest
import tiny
import torch
from hardening.warm import warm
from torch.nn import functional as F

from tinytav import editing, pipeline
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.runs import Run
from tinytav.inflation import ClipCrossAttention, SparseCausalAttention, VideoUNet
from tinytav.measure import attention
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNetConfig
from tinytav.weights import load

FRAMES, HEIGHT, WIDTH = 4, 6, 8


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def net():
    return tiny.filled(VideoUNet(UNetConfig.from_json(tiny.UNET), FRAMES)).requires_grad_(False)


def inputs(batch=2):
    context = random(batch, 7, 768)[..., :tiny.UNET["cross_attention_dim"]]
    return random(batch, 4, FRAMES, HEIGHT, WIDTH), torch.tensor([500] * batch), context


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


@pytest.mark.parametrize("frame, seen", [(0, [0]), (1, [0]), (3, [0, 2])])
def test_a_pixels_maps_are_of_the_frames_it_looks_at_and_hold_all_its_attention(frame, seen):
    look = attention.PixelMaps(FRAMES, frame, 0.3, 0.7, HEIGHT, WIDTH)
    with attention.watched(model := net(), SparseCausalAttention, look):
        model(*inputs(1))
    maps = look.mean.value()
    assert look.seen == seen and maps.shape == (len(seen), HEIGHT, WIDTH)
    assert maps.mean((1, 2)).sum().item() == pytest.approx(1, abs=0.02)     # bilinear enlargement keeps the mean nearly


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_values_weighted_by_a_pixels_maps_are_what_the_attention_gives_it(frame):
    """With one head, the mean over heads is the head's own map, and the model's fused call must agree with it."""
    module = tiny.filled(SparseCausalAttention(FRAMES, 16, 1))
    x = random(FRAMES, HEIGHT * WIDTH, 16)
    look = attention.PixelMaps(FRAMES, frame, 0.5, 0.25, HEIGHT, WIDTH)
    look(module, x)
    shares = look.mean.value().flatten(1) / (HEIGHT * WIDTH)                # (frames, pixels)
    wanted = module.to_out[0]((shares[..., None] * module.to_v(x[look.seen])).sum((0, 1)))
    torch.testing.assert_close(wanted, module(x)[frame, 3 * WIDTH + 2])


@pytest.mark.parametrize("kind, look", [
    (ClipCrossAttention, attention.WordMaps(FRAMES, [1], HEIGHT, WIDTH)),
    (SparseCausalAttention, attention.PixelMaps(FRAMES, 2, 0.5, 0.5, HEIGHT, WIDTH))])
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
    ("a  panda\tis skiing", "panda", ["panda"]), ("a man's dog", "man", ["man"]),
    ("a man is skiing", "is skiing", ["is", "skiing"])])
def test_a_words_tokens_are_found_and_no_others(prompt, word, spans):
    encoding = TOKENIZER.bpe.encode(prompt, add_special_tokens=False)
    texts = [prompt[slice(*encoding.offsets[i - 1])] for i in attention.word_positions(TOKENIZER, prompt, word)]
    assert "".join(texts).replace(" ", "") == "".join(spans).replace(" ", "")


@pytest.mark.parametrize("prompt, word", [("a man", "woman"), ("a woman", "man"), ("a man", ""), ("a man", " "),
                                          ("dog " * 80 + "cat", "cat")])
def test_a_word_that_is_not_in_the_prompt_is_refused(prompt, word):
    with pytest.raises(InputError, match="does not hold the word"):
        attention.word_positions(TOKENIZER, prompt, word)


def brightest(picture):
    """Where a picture (h, w, 3) is brightest, as parts of its height and width, rounded to the cells of a 2 x 3 map."""
    y, x = np.unravel_index(picture.astype(int).sum(-1).argmax(), picture.shape[:2])
    return int(2 * y / picture.shape[0]), int(3 * x / picture.shape[1])


def cell(i):
    """A map (2, 3) that is large in one cell, another one for each i below 6."""
    heat = torch.zeros(2, 3)
    heat[i % 2, i % 3] = 1 + i
    return heat


def test_a_picture_is_bright_where_the_map_is():
    heat = np.zeros((4, 4))
    heat[1, 2] = 1
    picture = attention.heated(np.full((80, 80, 3), 128, np.uint8), heat).astype(float)
    y, x = np.unravel_index(picture.sum(-1).argmax(), (80, 80))
    assert 20 <= y < 40 and 40 <= x < 60
    assert np.ptp(picture[70, 10]) == 0 and np.ptp(picture[30, 50]) > 50    # grey where there is none, else coloured


def test_a_words_rows_show_each_frame_above_its_own_map():
    x = random(10, 3, 16, 24).clamp(-1, 1) / 4 - 0.75                       # so dark that the maps are brighter
    maps = torch.stack([cell(i) / (1 + i) * (5 + i) for i in range(10)])
    rows = attention.word_rows(x, maps, "man")
    assert [text for text, _ in rows] == ["the sample", "attention to 'man'"] * 2
    labels = [[f"frame {n}" for n in part] for part in ((1, 2, 4, 5), (6, 7, 9, 10))]
    assert [[label for _, label in row] for _, row in rows] == [labels[0], labels[0], labels[1], labels[1]]
    for (_, samples), (_, watched) in (rows[:2], rows[2:]):
        for (sample, label), (heated, _) in zip(samples, watched):
            i = int(label.split()[1]) - 1
            assert (sample == frames.enlarged(x)[i]).all() and brightest(heated) == (i % 2, i % 3)
            assert (heated == attention.heated(sample, (maps / maps.max())[i].numpy())).all()           # one scale


def test_a_pixels_row_shows_its_frame_first_and_then_what_it_looks_at_with_the_shares():
    x = random(6, 3, 16, 24).clamp(-1, 1) / 4 - 0.75
    maps = torch.stack([cell(4), cell(0)])
    row = attention.pixel_row(x, 5, (0.25, 0.75), [0, 4], maps)
    assert [label for _, label in row] == [
        "frame 6: the pixel", "frame 1: 83 % of its attention", "frame 5: 17 % of its attention"]
    assert [brightest(picture) for picture, _ in row[1:]] == [(0, 1), (0, 0)]
    pictures = frames.enlarged(x)
    for i, one, (picture, _) in zip((0, 4), maps / maps.max(), row[1:]):
        assert (picture == attention.heated(pictures[i], one)).all()                                    # one scale
    assert ring(row[0][0], pictures[5]) == pytest.approx((0.25, 0.75), abs=0.01)


def ring(picture, plain):
    """The middle of what differs between two pictures, as parts of height and width: (y, x)."""
    differs = np.argwhere((picture != plain).any(-1))
    assert len(differs) < picture.shape[0] * picture.shape[1] / 20
    return (differs.min(0) + differs.max(0) + 1) / 2 / picture.shape[:2]


def test_a_sheet_has_a_row_below_another_and_the_texts_above_their_pictures():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255)]]
    rows = [(f"row {i}", [(np.full((50, 80, 3), colour, np.uint8), "label") for colour in row])
            for i, row in enumerate(colours)]
    sheet = np.asarray(attention.sheet(rows))
    down = 2 * attention.LABEL + 50 + 8
    assert sheet.shape == (2 * down - 8, 164, 3)
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            top = i * down + 2 * attention.LABEL
            assert (sheet[top:top + 50, j * 84:j * 84 + 80] == colour).all()
            assert (sheet[top - attention.LABEL:top, j * 84:j * 84 + 80] < 128).any()                   # its label
        assert (sheet[i * down:i * down + attention.LABEL, :80] < 128).any()                            # the row's text
    assert (sheet[down:, 84:] == 255).all()


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(place):
    """The finished run has one sample."""
    done = warm()(place, "sample.py", "--prompt", "a panda is skiing", limit=300)
    assert done.status == 0, done.err
    return place


def call(place, *args, status=0):
    done = warm()(place, "tinytav/__main__.py", "attention", *args, limit=300)
    assert done.status == status and "Traceback" not in done.err, done.out + done.err
    return done


def drawn(place, monkeypatch, *args):
    """What the command draws: (rows, x, maps)."""
    seen = {}

    def pixel_row(x, frame, at, frames, maps):
        seen.update(maps=maps, x=x)
        return made_of_pixel(x, frame, at, frames, maps)

    def word_rows(x, maps, word):
        seen.update(maps=maps, x=x)
        return made_of_word(x, maps, word)

    def sheet(rows):
        seen["rows"] = rows
        return made_of_rows(rows)
    made_of_pixel, made_of_word, made_of_rows = attention.pixel_row, attention.word_rows, attention.sheet
    with monkeypatch.context() as patch:
        for function in (pixel_row, word_rows, sheet):
            patch.setattr(attention, function.__name__, function)
        patch.chdir(place)
        patch.setattr("sys.argv", ["attention", "runs/clip", *map(str, args)])
        assert attention.main() == 0
    return seen["rows"], seen["x"], seen["maps"]


def test_the_pixel_and_the_frame_that_are_named_are_shown(place, monkeypatch):
    [(text, row)], x, _ = drawn(place, monkeypatch, "--pixel", 100, 30, "--frame", 2)
    assert text == "after tuning" and [label.split(":")[0] for _, label in row] == ["frame 2", "frame 1"]
    height, width = frames.enlarged(x[:1]).shape[1:3]
    middle = ring(row[0][0], frames.enlarged(x)[1])
    assert middle == pytest.approx((30.5 / height, 100.5 / width), abs=0.01)
    [(text, row)], *_ = drawn(place, monkeypatch, "--pixel", 100, 30)
    assert [label.split(":")[0] for _, label in row] == ["frame 3", "frame 1", "frame 2"]


def test_a_pixels_maps_are_those_of_the_net_on_the_noised_clip(place, monkeypatch):
    _, _, maps = drawn(place, monkeypatch, "--pixel", 100, 30, "--frame", 3)
    monkeypatch.chdir(place)
    session = editing.open_run(load("w"), Run.open("runs/clip"))
    clip, steps = session.clip, session.run.settings.ddim_steps
    height, width = frames.enlarged(pipeline.decode(session.sd.vae, clip.mean)[:1]).shape[1:3]
    look = attention.PixelMaps(3, 2, 30.5 / height, 100.5 / width, *clip.mean.shape[3:])
    noise = pipeline.gaussian(clip.mean.shape, session.run.settings.seed)
    with torch.no_grad(), attention.watched(session.net, SparseCausalAttention, look):
        for t, _ in session.sd.schedule.pairs(steps):
            pipeline.predict(session.net, session.sd.schedule.add_noise(clip.mean, noise, t), t, clip.context)
    assert torch.equal(look.mean.value(), maps)


def test_a_word_is_watched_in_the_newest_sample_that_holds_it(place, monkeypatch):
    rows, x, maps = drawn(place, monkeypatch, "--word", "panda")
    assert [text for text, _ in rows] == ["the sample", "attention to 'panda'"]
    sample = frames.read_all(place / "runs/clip/a-panda-is-skiing.mp4")
    assert (F.interpolate(x, sample.shape[2:]) - sample).abs().mean() < 0.1
    _, other, _ = drawn(place, monkeypatch, "--word", "man")
    assert not torch.equal(other, x)
    _, _, named = drawn(place, monkeypatch, "--word", "panda", "--prompt", "a panda")
    assert not torch.equal(named, maps)


def test_the_command_draws_pictures_that_the_page_shows_and_changes_no_other_file(place, monkeypatch):
    run = place / "runs/clip"
    before = {file: file.read_bytes() for file in run.iterdir()
              if file.name != "index.html" and ".attention." not in file.name}
    done = call(place, "runs/clip", "--word", "panda")
    assert "prompt: a panda is skiing" in done.out and done.out.splitlines()[-1] == "page: runs/clip/index.html"
    drawn(place, monkeypatch, "--pixel", 100, 30)
    names = {"a-panda-is-skiing.panda", "pixel-100-30-frame-3"}
    assert names <= {file.name.removesuffix(".attention.png") for file in run.glob("*.attention.png")}
    page = (run / "index.html").read_text()
    assert all(f'src="{name}.attention.png"' in page for name in names) and "--pixel 100 30 --frame 3" in page
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("args, message", [
    (("--word", "dragon"), "does not hold the word 'dragon'"), (("--pixel", 4000, 3), "has 3 frames of"),
    (("--pixel", 3, 3, "--frame", 9), "of frame 9 is not in it"), ((), "required"),
    (("--word", "man", "--frame", 1), "--frame belongs to --pixel"),
    (("--pixel", 3, 3, "--prompt", "a"), "--prompt belongs to --word"),
    (("--pixel", 3, 3, "--seed", 5), "unrecognized arguments: --seed 5")])
def test_what_cannot_be_shown_is_refused(place, args, message):
    assert message in call(place, "runs/clip", *args, status=2).err


def test_a_pixel_of_a_run_with_other_attention_is_refused(place):
    done = warm()(place, "train.py", "clip.mp4", "a man", "--weights", "w", "--attention", "full", "--out", "full",
                  limit=300)
    assert done.status == 0, done.err
    assert "tuned with full attention" in call(place, "full/clip", "--pixel", 3, 3, status=2).err


def test_a_run_in_windows_is_refused(place):
    done = warm()(place, "train.py", "clip.mp4", "a man", "--weights", "w", "--frames", 4, "--out", "long", limit=300)
    assert done.status == 0, done.err
    assert "windows of 3 frames" in call(place, "long/clip", "--word", "man", status=2).err
