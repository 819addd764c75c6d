"""What an edit keeps: masks and a given first frame, on a small net and by the command."""
import json
import shlex
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_scripts import call

from tinytav import attention_maps, editing, keep, pipeline
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.runs import Run
from tinytav.inflation import ClipCrossAttention
from tinytav.noise import NOISES
from tinytav.weights import load


@pytest.fixture(scope="module")
def session(place):
    """The finished run of 3 frames of 38x32 pixels. A latent is 2x2 pixels."""
    sd = load(place / "w")
    return editing.open_run(sd, Run.open(place / "runs/clip"))


def write_mask(path, *pictures, size=(38, 32)):
    """A mask, white in the columns that each picture's slice names: one picture, or a folder of them."""
    made = []
    for columns in pictures:
        pixels = np.zeros((size[1], size[0]), np.uint8)
        pixels[:, columns] = 255
        made.append(Image.fromarray(pixels))
    if len(made) == 1:
        made[0].save(path)
        return path
    path.mkdir()
    for i, picture in enumerate(made):
        picture.save(path / f"{i}.png")
    return path


NOTHING, ALL, LEFT = slice(0, 0), slice(None), slice(0, 10)


# ---- What is held --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NOISES)
def test_a_white_mask_changes_no_bit_and_a_black_one_gives_the_source(session, tmp_path, name):
    usual = session.edit("a dog", session.make_noise(name), out=tmp_path).frames
    for columns, wanted in ((ALL, usual), (NOTHING, pipeline.decode(session.sd.vae, session.clip.mean))):
        kept = session.keep(write_mask(tmp_path / "mask.png", columns))
        edit = session.edit("a dog", session.make_noise(name, way=True), keep=kept, out=tmp_path)
        assert torch.equal(edit.frames, wanted) and not torch.equal(usual, pipeline.decode(
            session.sd.vae, session.clip.mean))


@pytest.mark.parametrize("name", NOISES)
def test_outside_the_mask_latents_follow_the_clip_at_every_step(session, tmp_path, name):
    noise, kept = session.make_noise(name, way=True), session.keep(write_mask(tmp_path / "mask.png", LEFT))
    sd, clip, context = session.sd, session.clip, session.sd.encode_prompts(["a dog"])
    with kept.during(session.net, sd.tokenizer, "a dog") as keeps:
        walk = list(noise.sample(session.net, sd.schedule, context, clip.empty, 2., None, keeps))
    unkept = pipeline.last(noise.sample(session.net, sd.schedule, context, clip.empty, 2.))
    way = {"inverted": lambda: [*pipeline.invert(session.net, sd.schedule, clip.mean, clip.empty, 3)][-2::-1],
           "edit-friendly": lambda: [step.x for step in noise.x[1:]],
           }.get(name, lambda: [sd.schedule.add_noise(clip.mean, noise.x, t) for _, t in sd.schedule.pairs(3)[:-1]])()
    for x, source in zip(walk, [*way, clip.mean], strict=True):
        assert torch.equal(x[..., 5:], source[..., 5:])
        assert (x[..., :5] - source[..., :5]).abs().max() > 1e-3
    assert not torch.equal(x[..., :5], unkept[..., :5])                 # what is kept is seen by the rest


def test_where_a_word_draws_no_attention_the_clip_is_kept(session, monkeypatch):
    noise, sd, left, seen = session.make_noise(way=True), session.sd, torch.zeros(3, 16, 19, dtype=torch.bool), []
    left[..., :5] = True
    monkeypatch.setattr(keep, "large", lambda maps: seen.append(maps) or left)
    context, empty = sd.encode_prompts(["a dog", ""]).split(1)
    with session.keep(mask_word="dog").during(session.net, sd.tokenizer, "a dog") as keeps:
        walk = list(noise.sample(session.net, sd.schedule, context, empty, 2., None, keeps))
    way = [noise.way[t] for _, t in sd.schedule.pairs(3)[:-1]]
    for x, source in zip(walk, [*way, session.clip.mean], strict=True):
        assert torch.equal(x[..., 5:], source[..., 5:]) and not torch.equal(x[..., :5], source[..., :5])
    assert not any(module._forward_pre_hooks for module in session.net.modules())
    maps = attention_maps.WordMaps(3, attention_maps.word_positions(sd.tokenizer, "a dog", "dog"), 16, 19)
    with attention_maps.watched(session.net, ClipCrossAttention, maps):
        next(iter(pipeline.sample(session.net, sd.schedule, noise.x, context, empty, 3, 2.)))
    assert len(seen) == 3
    torch.testing.assert_close(seen[0], maps.mean.value())              # after the first step


def test_a_words_mask_is_where_attention_is_large_and_one_latent_around():
    maps = torch.zeros(2, 5, 5)
    maps[0, 2, 2], maps[0, 0, 4] = 1, 0.2
    maps[1, 0, 0] = 1e-3                # each frame by its own maximum
    found = keep.large(maps)
    assert found[0].sum() == 9 and found[0, 1:4, 1:4].all()
    assert found[1].sum() == 4 and found[1, :2, :2].all()


@pytest.mark.parametrize("name", NOISES)
def test_the_first_frame_is_the_picture_with_the_clips_noise_at_every_step(session, tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 38, 3), dtype=np.uint8)
    frames.write_picture(tmp_path / "first.png", pixels)
    noise, kept = session.make_noise(name, way=True), session.keep(first_frame=tmp_path / "first.png")
    sd, clip, context = session.sd, session.clip, session.sd.encode_prompts(["a dog"])
    latents, _ = pipeline.encode(sd.vae, frames.read_all(tmp_path / "first.png"))
    seen = []
    with kept.during(session.net, sd.tokenizer, "a dog") as keeps:
        hook = session.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0][-1:]))
        x = pipeline.last(noise.sample(session.net, sd.schedule, context, clip.empty, 2., None, keeps))
        hook.remove()
    assert torch.equal(x[:, :, :1], latents)
    for z, (t, _) in zip(seen, sd.schedule.pairs(3)[-len(seen):], strict=True):
        source = noise.way[t] if noise.needs_clip else sd.schedule.add_noise(clip.mean, noise.x, t)
        wanted = source[:, :, :1] + sd.schedule.abar(t).sqrt() * (latents - clip.mean[:, :, :1])
        torch.testing.assert_close(z[:, :, :1], wanted, atol=1e-4, rtol=1e-4)
    usual = pipeline.last(noise.sample(session.net, sd.schedule, context, clip.empty, 2.))
    assert (x[:, :, 1:] - usual[:, :, 1:]).abs().max() > 1e-3           # the other frames look at it


def test_the_first_frame_comes_after_the_mask(session, tmp_path):
    frames.write_picture(tmp_path / "first.png", np.full((32, 38, 3), 200, np.uint8))
    kept = session.keep(write_mask(tmp_path / "mask.png", NOTHING), first_frame=tmp_path / "first.png")
    edit = session.edit("a dog", keep=kept, out=tmp_path)
    latents, _ = pipeline.encode(session.sd.vae, frames.read_all(tmp_path / "first.png"))
    wanted = torch.cat([latents, session.clip.mean[:, :, 1:]], 2)
    assert torch.equal(edit.frames, pipeline.decode(session.sd.vae, wanted))
    assert edit.file.name == "a-dog-kept.mp4"


def test_outside_a_mask_each_pixel_is_the_clips(session, tmp_path):
    odd = slice(3, 8)               # a latent is 2 pixels wide, so the mask ends within one
    frames.write_picture(tmp_path / "first.png", np.full((32, 38, 3), 200, np.uint8))
    source = pipeline.decode(session.sd.vae, session.clip.mean)
    path = write_mask(tmp_path / "mask.png", odd)
    edit = session.edit("a dog", keep=session.keep(path), out=tmp_path).frames
    outside = torch.ones(38, dtype=torch.bool)
    outside[odd] = False
    assert torch.equal(edit[..., outside], source[..., outside]) and (edit != source)[..., odd].float().mean() > 0.9
    edit = session.edit("a dog", keep=session.keep(path, first_frame=tmp_path / "first.png"), out=tmp_path).frames
    assert torch.equal(edit[1:, ..., outside], source[1:, ..., outside])
    assert not torch.equal(edit[0, ..., outside], source[0, ..., outside])      # it is the given one, whole


def test_a_mask_and_a_word_keep_what_either_of_them_keeps(session, tmp_path):
    kept = session.keep(write_mask(tmp_path / "mask.png", slice(8, 38)), mask_word="dog")
    with kept.during(session.net, session.sd.tokenizer, "a dog") as (mask, word):
        assert isinstance(mask, keep.Mask) and isinstance(word, keep.WordMask)
        assert mask.free[:, :, 4:].all() and not mask.free[:, :, :4].any()


def test_what_keeps_something_is_true():
    latents = torch.zeros(1, 4, 1, 2, 2)
    mask, first = keep.Mask(latents, latents > 0), keep.FirstFrame(latents)
    assert all([keep.Keep(mask=mask), keep.Keep(word="dog"), keep.Keep(first=first)]) and not keep.Keep()


def test_a_noise_that_does_not_know_its_way_is_refused(session, tmp_path):
    kept = session.keep(write_mask(tmp_path / "mask.png", LEFT))
    with pytest.raises(InputError, match="way=True"):
        session.edit("a dog", session.make_noise("inverted"), keep=kept, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- Files ---------------------------------------------------------------------------------------

def test_a_latent_may_change_if_any_of_its_pixels_may(session, tmp_path):
    pixels = keep.read_mask(write_mask(tmp_path / "mask.png", slice(4, 7)), session.run.settings, 32, 38, 2)
    assert pixels.shape == (3, 32, 38) and pixels[:, :, 4:7].all() and pixels.sum() == 3 * 32 * 3
    free = keep.free_latents(pixels, 2)
    assert free.shape == (3, 16, 19) and free[:, :, 2:4].all() and free.sum() == 3 * 16 * 2


def test_grey_is_white_from_the_half_on(session, tmp_path):
    pixels = np.full((32, 38), 127, np.uint8)
    pixels[:, 10:] = 128
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    found = keep.read_mask(tmp_path / "mask.png", session.run.settings, 32, 38, 2)
    assert not found[:, :, :10].any() and found[:, :, 10:].all()


def test_a_mask_has_one_picture_or_the_runs_frames_or_those_of_the_whole_clip(session, tmp_path):
    """The run has the frames 0, 2 and 4 of 6."""
    parts = [slice(2 * i, 2 * i + 2) for i in range(6)]
    of_run, of_clip = write_mask(tmp_path / "run", *parts[:3]), write_mask(tmp_path / "clip", *parts)
    for path, shown in ((of_run, (0, 1, 2)), (of_clip, (0, 2, 4))):
        found = keep.read_mask(path, session.run.settings, 32, 38, 2)
        assert [found[i, 0].nonzero().flatten().tolist() for i in range(3)] == [[2 * n, 2 * n + 1] for n in shown]
    video = torch.full((6, 3, 40, 48), -1.)
    for i in range(6):
        video[i, :, :, 8 * i:8 * i + 8] = 1
    frames.write_mp4(tmp_path / "mask.mp4", video, 12)                  # as large as the clip itself, before its crop
    found = keep.read_mask(tmp_path / "mask.mp4", session.run.settings, 32, 38, 2).float().mean(1)
    middles = [(found[i] * torch.arange(38)).sum() / found[i].sum() for i in range(3)]
    assert [round(float(middle) * 48 / 38) for middle in middles] == pytest.approx([3, 19, 35], abs=1)


def test_a_run_that_does_not_know_its_frames_in_the_clip_takes_no_mask_of_the_whole_clip(session, tmp_path):
    settings = replace(session.run.settings, indices=None)
    with pytest.raises(InputError, match="is 6, and must be 1 or 3"):
        keep.read_mask(write_mask(tmp_path / "mask", *[LEFT] * 6), settings, 32, 38, 2)


@pytest.mark.parametrize("count", [2, 5, 7])
def test_a_mask_of_another_number_of_frames_is_refused(session, tmp_path, count):
    with pytest.raises(InputError, match=f"The number of frames in .*mask is {count}, and must be 1 or 3 or 6"):
        keep.read_mask(write_mask(tmp_path / "mask", *[LEFT] * count), session.run.settings, 32, 38, 2)


# ---- The command ---------------------------------------------------------------------------------

def sample(place, *args, status=0):
    return call(place, "sample.py", "--run", "runs/clip", "--prompt", "a dog", *args, status=status)


def test_each_option_changes_the_edit_and_its_command_makes_it_again(place):
    write_mask(place / "left.png", LEFT)
    write_mask(place / "white.png", ALL)
    frames.write_picture(place / "first.png", np.full((32, 38, 3), 200, np.uint8))
    sample(place, "--out", "keep")
    usual = (place / "keep/a-dog.gif").read_bytes()
    sample(place, "--mask", "white.png", "--out", "keep")
    assert (place / "keep/a-dog-kept.gif").read_bytes() == usual
    options = {"mask": "left.png", "mask_word": "dog", "first_frame": "first.png"}
    for number, (name, value) in enumerate(options.items(), 2):
        sample(place, f"--{name.replace('_', '-')}", value, "--out", "keep")
        told = json.loads((place / f"keep/a-dog-kept-{number}.sample.json").read_text())
        assert told["settings"][name] == value and not told["settings"].keys() & (options.keys() - {name})
        if name != "mask_word":
            assert told["settings"][f"{name}_fingerprint"] == frames.fingerprint(place / value)
        made = (place / f"keep/a-dog-kept-{number}.gif").read_bytes()
        assert made != usual or name == "mask_word"                     # this net looks for the word everywhere
        _, script, *words = shlex.split(told["command"])
        shutil.rmtree(place / "again", ignore_errors=True)
        call(place, script, *words, "--out", "again")
        assert (place / "again/a-dog-kept.gif").read_bytes() == made


def test_without_a_run_a_first_frame_begins_a_clip_of_random_noise(place):
    frames.write_picture(place / "square.png", np.full((24, 24, 3), 200, np.uint8))
    for flags in ([], ["--first-frame", "square.png"]):
        call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--frames", 2, "--size", 24, *flags,
             "--out", "begun")
    free, begun = (frames.read_all(place / f"begun/{name}.mp4") for name in ("a-dog", "a-dog-kept"))
    assert not torch.equal(free[1], begun[1])


@pytest.mark.parametrize("args, message", [
    (["--mask", "absent.png"], "No such file: absent.png"),
    (["--mask", "w"], "w has 0 frames"),
    (["--mask", "w/model_index.json"], "cannot be read as a video"),
    (["--mask", "long"], "The number of frames in long is 4, and must be 1 or 3 or 6"),
    (["--mask", "wide.png"], "wide.png is 64x32 pixels where the clip to be sampled is 38x32"),
    (["--mask", "left.png", "--mask-word", "dog"], "not allowed with"),
    (["--mask-word", "cat"], "'a dog' does not hold the word 'cat'"),
    (["--mask-word", "dog", "--prompt", "a cat"], "'a cat' does not hold the word 'dog'"),
    (["--mask", "left.png", "--noise", "random", "--frames", 2], "Outside a mask the run's clip is kept"),
    (["--mask-word", "dog", "--noise", "random", "--size", 24], "Outside a mask the run's clip is kept"),
    (["--first-frame", "long"], "The number of frames in long is 4, and must be 1"),
    (["--first-frame", "wide.png"], "is 64x32 pixels where the clip to be sampled is 38x32"),
    (["--first-frame", "absent.png"], "No such file: absent.png")])
def test_what_does_not_fit_is_an_error_before_anything_is_sampled(place, args, message):
    if not (place / "long").exists():
        write_mask(place / "long", *[LEFT] * 4)
        write_mask(place / "wide.png", LEFT, size=(64, 32))
        write_mask(place / "left.png", LEFT)
    done = sample(place, *args, "--out", "wrong", status=2)
    assert message in done.err and "Traceback" not in done.err and "inverting" not in done.err
    assert not (place / "wrong").exists()


def test_a_mask_without_a_run_is_refused(place):
    write_mask(place / "left.png", LEFT)
    done = call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--mask", "left.png", "--out", "wrong",
                status=2)
    assert "name a run with --run" in done.err and not (place / "wrong").exists()


@pytest.mark.parametrize("broken", [4, 1])
def test_a_damaged_mask_is_refused(session, tmp_path, broken):
    """One frame of six cannot be decoded. The run needs the frames 0, 2 and 4: this one, or one that comes after it."""
    path = tiny.write_clip(tmp_path / "mask.mp4", frames=6, size=(48, 40))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux() if packet.size][broken]
        place, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[place:place + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(InputError, match="mask.mp4 is damaged: some of its frames cannot be decoded"):
        keep.read_mask(path, session.run.settings, 32, 38, 2)


def test_a_clip_in_windows_is_kept_by_a_file_and_not_by_a_word(place):
    write_mask(place / "black.png", NOTHING)
    call(place, "train.py", "clip.mp4", "a man", "--weights", "w", "--frames", 4, "--out", "long")
    sample = ["sample.py", "--run", "long/clip", "--prompt", "a dog", "--out", "kept"]
    call(place, *sample, "--mask", "black.png")
    strip = np.asarray(Image.open(place / "kept/a-dog-kept.png"))
    assert (strip[:len(strip) // 2] == strip[len(strip) // 2:]).all()               # the source, above the edit
    assert "windows of 3 frames" in call(place, *sample, "--mask-word", "dog", status=2).err
