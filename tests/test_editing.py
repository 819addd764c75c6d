"""The level that scripts and notebooks use: read a clip, tune on it, edit it."""
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import tinytav
from tinytav import editing
from tinytav.errors import InputError
from tinytav.weights import load

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sd(tmp_path):
    return load(tiny.write_folder(tmp_path / "w"))


def test_a_clip_is_encoded_once_with_its_caption(sd, tmp_path):
    clip = editing.read_clip(sd, tiny.write_clip(tmp_path / "clip.mp4"), "a man is skiing", stride=1)
    assert clip.mean.shape == clip.std.shape == (1, 4, 3, 16, 19) and clip.frames == 3     # 32 x 38 of 40 x 48 pixels
    assert clip.indices == (0, 1, 2) and clip.total == 6 and clip.fps == 12
    assert torch.equal(torch.cat([clip.context, clip.empty]), sd.encode_prompts(["a man is skiing", ""]))


def test_latents_that_are_not_finite_are_refused(sd, tmp_path):
    sd.vae.encoder.conv_in.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        editing.read_clip(sd, tiny.write_clip(tmp_path / "clip.mp4"), "a man")


def test_progress_sees_every_step(sd, tmp_path):
    seen = []

    def progress(steps, total, name):
        for i, step in enumerate(steps, 1):
            seen.append((name, i, total))
            yield step
    clip = editing.read_clip(sd, tiny.write_clip(tmp_path / "clip.mp4"), "a man")
    net = editing.tune_on(sd, clip, steps=2, progress=progress)
    x = editing.edit(sd, net, clip, "a panda", progress=progress)
    assert x.shape == (3, 3, 32, 38) and x.abs().max() <= 1
    assert seen == [("tuning", 1, 2), ("tuning", 2, 2), *(("inverting", i, 3) for i in (1, 2, 3)),
                    *(("a panda", i, 3) for i in (1, 2, 3))]


def test_the_lines_that_readme_prints_make_an_edited_clip(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    code = next(block for block in blocks if "tune_on" in block)
    folder = tiny.write_folder(tmp_path / "weights/toy")
    tiny.write_clip(folder / "skiing.mp4")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    sd = load(folder)
    clip = editing.read_clip(sd, folder / "skiing.mp4", "a man is skiing on the snow")
    panda = editing.edit(sd, editing.tune_on(sd, clip), clip, "a panda is skiing on the snow")
    written = tinytav.files.frames.pictures(tmp_path / "panda.mp4")
    assert len(written) == 3
    shown = tinytav.files.frames.enlarged(panda)
    assert np.abs(np.stack(written).astype(int) - shown).mean() < 8          # what H.264 loses


def test_nothing_is_a_number_too(sd, tmp_path):
    """0 steps are 0 steps, not the weights' default."""
    clip = editing.read_clip(sd, tiny.write_clip(tmp_path / "clip.mp4"), "a man")
    untuned, net = editing.new_net(sd, 3), editing.tune_on(sd, clip, steps=0)
    assert all(torch.equal(p, net.tuned()[name]) for name, p in untuned.tuned().items())


def test_a_new_net_leaves_the_callers_random_numbers_alone(sd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    editing.new_net(sd, 3, seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_a_clip_of_another_length_is_refused(sd, tmp_path):
    clip = editing.read_clip(sd, tiny.write_clip(tmp_path / "clip.mp4"), "a man", frames=2)
    with pytest.raises(InputError, match="clips of 3 frames, and the clip has 2"):
        editing.edit(sd, editing.new_net(sd, 3), clip, "a panda")


def test_frames_that_are_not_finite_are_refused(sd):
    """The VAE's decoder may overflow where the latents do not."""
    sd.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        editing.sample_clip(sd, editing.new_net(sd, 3), torch.randn(1, 4, 3, 8, 8), "a panda")
