"""The LoRA of the example: what it learns is what merging its file adds, and it changes the jacket alone."""
from dataclasses import replace
from random import Random

import numpy as np
import tiny
import torch

from tinytav.stable_diffusion.lora import merge_lora
from tinytav.toy import draw, lora_example, world
from tinytav.weights import load


def test_the_jacket_is_white_and_nothing_else_changes():
    rng = Random(0)
    scene, view = world.random_scene(rng), world.random_view(rng)
    plain, changed = draw.render(scene, view, 64), lora_example.white_jacket(scene, view, 64)
    other = replace(scene, clothes=next(colour for colour in world.ATTRIBUTES["clothes"] if colour != scene.clothes))
    jacket = (plain != draw.render(other, view, 64)).any(axis=-1)
    assert jacket.sum() > 40 and (changed[jacket] == 255).all()
    assert np.array_equal(changed[~jacket], plain[~jacket])
    captions, pictures = lora_example.draw_many(20, 32)
    assert pictures.shape == (20, 3, 32, 32) and all("wearing white clothes" in caption for caption in captions)


def test_the_file_gives_the_net_that_was_trained(tmp_path):
    folder = tiny.write_folder(tmp_path / "w")
    sd, other = load(folder), load(folder)
    captions, pictures = lora_example.draw_many(4, 32)
    loras = lora_example.train(sd, captions, pictures, minutes=0.01)
    lora_example.save(loras, tmp_path / "white.safetensors")
    assert merge_lora(other, tmp_path / "white.safetensors") == len(loras) > 8
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 24)
    with torch.no_grad():
        expected, before = sd.unet(x, t, context), load(folder).unet(x, t, context)
        assert tiny.close(other.unet(x, t, context), expected)
        assert (expected - before).abs().max() > 1e-4
