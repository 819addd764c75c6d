"""The model card's numbers: drawings are seen right, and the pictures shown have the captions written beside them."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tinytav.files import frames
from tinytav.measure import metrics
from tinytav.toy import card, world
from tinytav.weights import load

TOY = Path(__file__).parents[2] / "weights/toy"


@pytest.fixture(scope="module")
def eye():
    return metrics.Features(TOY / "clip")


def test_accuracy_is_the_share_of_pictures_that_show_what_the_scene_says(eye):
    scenes, x = card.renders(24, "accuracy")
    assert card.accuracy(eye, "place", scenes, x) >= 0.9
    places = world.ATTRIBUTES["place"]
    wrong = [replace(scene, place=places[places.index(scene.place) - 1]) for scene in scenes]
    assert card.accuracy(eye, "place", wrong, x) <= 0.1


def test_retrieval_finds_each_drawing_by_its_caption_and_no_other(eye):
    scenes, x = card.renders(16, "retrieval")
    assert card.retrieval(eye, scenes, x, among=8) >= 0.8
    assert card.retrieval(eye, scenes, x.roll(1, 0), among=8) <= 0.2


def test_each_caption_gets_a_picture_by_the_weights_own_settings(monkeypatch):
    asked = []

    def sampled(net, schedule, noise, context, empty, steps, guidance):
        asked.append((len(noise), len(context), steps, guidance))
        assert torch.equal(empty[0], sd.encode_prompts([""])[0]) and empty.shape == context.shape
        yield noise
    sd = load(TOY)
    monkeypatch.setattr(card.pipeline, "sample", sampled)
    scenes, _ = card.renders(27, "samples")
    assert card.sample(sd, scenes).shape == (27, 3, 128, 128)
    assert asked == [(25, 25, 25, 3), (2, 2, 25, 3)]


def test_the_card_has_all_numbers_and_shows_two_rows_of_held_out_scenes(tmp_path, monkeypatch):
    """In place of the U-Net's samples are pictures whose brightness says which one they are."""
    drawn = []

    def sample(sd, scenes):
        levels = torch.linspace(-1, 1, len(scenes))[:, None, None, None].expand(-1, 3, 8, 8)
        drawn.append((scenes, levels))
        return levels

    monkeypatch.setattr(card, "sample", sample)
    monkeypatch.setattr(card, "accuracy", lambda eye, name, scenes, x: len(scenes))
    monkeypatch.setattr(sys, "argv", ["card", "--weights", str(TOY), "--pictures", "64", "--samples", "100",
                                      "--out", str(tmp_path)])
    card.main()
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found["vae_psnr"] > 20 and found["clip_retrieval"] > 0.8
    assert set(found["unet"].values()) == {100} and set(found["unet_held_out"].values()) == {25}
    scenes, levels = drawn[0]
    assert [world.is_held_out(scene) for scene in scenes] == [i < 25 for i in range(100)]
    captions = (tmp_path / "samples.txt").read_text().splitlines()
    assert captions == [world.caption(scene) for scene in scenes[9:49]]             # 16 held out, 24 others
    grid = Image.open(tmp_path / "samples.png")
    shown = [grid.getpixel((8 * (i % 8), 8 * (i // 8)))[0] for i in range(40)]
    assert shown == [frames.to_uint8(levels[i:i + 1])[0, 0, 0, 0].item() for i in range(9, 49)]
