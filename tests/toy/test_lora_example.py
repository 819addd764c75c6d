"""The LoRA of the example: what it learns is what merging its file adds, and the stripes lie on the jacket."""
from random import Random

import numpy as np
import torch

import tiny
from tinytav.stable_diffusion.checkpoint import load
from tinytav.stable_diffusion.lora import merge_lora
from tinytav.toy import draw, lora_example, world


def test_stripes_lie_on_the_jacket_alone():
    rng = Random(0)
    scene, view = world.random_scene(rng), world.random_view(rng)
    plain, striped = draw.render(scene, view, 64), lora_example.striped(scene, view, 64)
    changed = (plain != striped).any(axis=-1)
    assert 20 < changed.sum() < 64 * 64 / 4
    assert (striped[changed] == 255).all()
    rows = np.flatnonzero(changed.any(axis=1))
    assert set(rows // 4 % 2) == {0}                    # bands of a sixteenth of the picture, every second one


def test_the_file_gives_the_net_that_was_trained(tmp_path):
    folder = tiny.write_folder(tmp_path / "w")
    sd, other = load(folder), load(folder)
    captions, pictures = lora_example.draw_many(4, 32)
    loras = lora_example.train(sd, captions, pictures, minutes=0.01)
    lora_example.save(loras, tmp_path / "stripes.safetensors")
    assert merge_lora(other, tmp_path / "stripes.safetensors") == len(loras) > 8
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 24)
    with torch.no_grad():
        expected, before = sd.unet(x, t, context), load(folder).unet(x, t, context)
        assert tiny.close(other.unet(x, t, context), expected)
        assert (expected - before).abs().max() > 1e-4
