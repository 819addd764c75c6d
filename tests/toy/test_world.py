"""The toy world keeps what the experiments rest on: edits have one true answer, and it can be read off the picture."""
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from random import Random
from zlib import crc32

import numpy as np
import pytest

from tinytav.toy import draw, world
from tinytav.toy.draw import SIZE
from tinytav.toy.world import ATTRIBUTES, GIST, LOOKS, USUAL, Scene, View, caption

REPOSITORY = Path(__file__).parents[2]
VIEW = View(camera=0.4, x=0.5, size=1.1, phase=0.2)
SCENE = Scene("man", "red", "no hat", "skiing", "snow", "day", "plain")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two pictures, in steps of 1/255."""
    return float(np.abs(a.astype(int) - b).mean())


def changed(view: View, scene: Scene, **edit) -> np.ndarray:
    """Where an edit changes the picture: (SIZE, SIZE) bool."""
    return (draw.render(scene, view) != draw.render(replace(scene, **edit), view)).any(axis=2)


# ---- Pictures ------------------------------------------------------------------------------------

def test_same_scene_and_view_give_same_pixels():
    code = ("from random import Random; from zlib import crc32; from tinytav.toy import draw, world; rng = Random(3)\n"
            "print([crc32(draw.render(world.random_scene(rng), world.random_view(rng)).tobytes()) for _ in range(8)])")
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "1"}
    elsewhere = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    rng = Random(3)
    here = [crc32(draw.render(world.random_scene(rng), world.random_view(rng)).tobytes()) for _ in range(8)]
    assert elsewhere.strip() == str(here)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_picture_has_any_size(size):
    picture = draw.render(SCENE, VIEW, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    coarse = picture.reshape(64, size // 64, 64, size // 64, 3).mean(axis=(1, 3))
    assert distance(coarse.round().astype(int), draw.render(SCENE, VIEW, 64)) < 6


def test_every_attribute_can_be_read_whatever_the_look():
    """No other value of an attribute, with this or another look, comes near the true picture."""
    least = {"subject": 1.8, "clothes": 1.5, "hat": 1.8, "activity": 3, "place": 1.8, "time": 10, "style": 10}
    rng = Random(1)
    for _ in range(18):
        scene, view = world.random_scene(rng), world.random_view(rng)
        truth = draw.render(scene, view)
        for name, values in ATTRIBUTES.items():
            for value in set(values) - {getattr(scene, name)}:
                for look in (scene.look, world.random_scene(rng).look):
                    other = replace(scene, look=look, **{name: value})
                    assert distance(truth, draw.render(other, view)) > least[name], (name, value, scene, view)


def test_every_part_of_the_look_shows():
    for part, variants in LOOKS.items():
        pictures = [draw.render(replace(SCENE, look=replace(SCENE.look, **{part: i})), VIEW) for i in range(variants)]
        assert all(distance(a, b) > 0.3 for a, b in combinations(pictures, 2)), part


def test_figure_fills_half_the_picture():
    for activity in ATTRIBUTES["activity"]:
        scene = replace(SCENE, activity=activity)
        others = [changed(VIEW, scene, subject=other) for other in ATTRIBUTES["subject"] if other != "man"]
        rows = np.flatnonzero(np.any(others, axis=(0, 2)))
        assert rows.max() - rows.min() >= SIZE / 2


def colour_at(picture: np.ndarray, activity: str, view: View, x: float, y: float) -> tuple[int, ...]:
    """The colour at a point that is given in the figure's units."""
    brush = draw.standing(draw.Brush(None, SIZE / 64, 0, (0, 0, 0)), activity, view)
    column, row = (int(value) for value in brush.pixel(x, y))
    return tuple(int(value) for value in picture[row, column])


def test_far_limbs_are_a_quarter_darker_than_near_ones():
    near, far = (44, 60, 116), (36, 48, 92)                     # a man's trousers; mixed with a quarter of (12, 12, 18)
    for phase in (0.25, 0.75):                                  # running: the legs are farthest apart
        view = replace(VIEW, phase=phase)
        picture = draw.render(replace(SCENE, activity="running"), view)
        pose = draw.pose("running", phase)
        assert all((hand[0] - 4) * foot[0] < 0 for hand, foot in zip(pose.hands, pose.feet))    # arms against legs
        seen = []
        for _, knee, ankle in (pose.leg(0), pose.leg(1)):
            seen.append(colour_at(picture, "running", view, (knee[0] + ankle[0]) / 2, (knee[1] + ankle[1]) / 2))
        assert seen == [far, near], phase


@pytest.mark.parametrize("style, jacket", [("plain", (222, 28, 36)), ("comic", (255, 4, 15))])
def test_a_comic_has_stronger_colours(style, jacket):
    """35 % farther from grey: the mean is 95.33, so 222 becomes 95.33 + 1.35 * 126.67 = 266, cut to 255."""
    pose = draw.pose("skiing", VIEW.phase)
    x, y = ((a + b) / 2 for a, b in zip(pose.hip, pose.neck))
    picture = draw.render(replace(SCENE, style=style), VIEW)
    assert colour_at(picture, "skiing", VIEW, x - 4, y + 2) == jacket


@pytest.mark.parametrize("activity", ATTRIBUTES["activity"])
def test_figure_stands_where_view_and_activity_put_it(activity):
    """A change of clothes changes the same pixels wherever, whenever and however it is drawn."""
    rng = Random(activity)
    for _ in range(3):
        view = world.random_view(rng)
        scene = replace(world.random_scene(rng), activity=activity, style="plain")
        mask = changed(view, replace(scene, clothes="red"), clothes="blue")
        for _ in range(6):
            other = replace(world.random_scene(rng), activity=activity, clothes="red")
            same = changed(view, replace(other, subject=scene.subject), clothes="blue")
            assert (mask & same).sum() > 0.85 * (mask | same).sum()
            also = changed(view, other, clothes="blue")
            assert (mask & also).sum() > 0.6 * (mask | also).sum()


@pytest.mark.parametrize("place", ATTRIBUTES["place"])
def test_props_stand_where_the_camera_puts_them(place):
    rng = Random(place)
    for activity in ATTRIBUTES["activity"]:
        view = world.random_view(rng)
        scene = replace(SCENE, activity=activity, place=place)
        rows, columns = np.nonzero(changed(view, scene, look=replace(scene.look, prop=1)))
        rows, columns = rows * 64 / SIZE, columns * 64 / SIZE    # in units
        stand = np.array(draw.passing(view.camera))
        assert len(columns) > 10
        assert np.abs(columns[:, None] + 0.5 - stand).min(axis=1).max() <= 13   # half a prop's width
        assert rows.max() <= max(draw.ground(activity, x) for x in (0, 64)) + 4


# ---- Clips ---------------------------------------------------------------------------------------

def test_no_two_frames_of_a_clip_are_alike():
    rng = Random(7)
    for activity in ATTRIBUTES["activity"] * 2:
        scene, motion = replace(world.random_scene(rng), activity=activity), world.random_motion(rng)
        frames = [draw.render(scene, view) for view in world.views(motion, 8)]
        assert all(distance(a, b) > 1 for a, b in combinations(frames, 2)), (scene, motion)


def test_motion_is_unambiguous():
    rng = Random(8)
    for _ in range(200):
        motion = world.random_motion(rng)
        assert 0 < motion.travel < 1 and 0 < motion.cycles <= 1
        views = world.views(motion, 8)
        assert views[0] == motion.start
        assert all(0 <= view.phase < 1 and 0.3 < view.x < 0.7 for view in views)
        steps = np.diff([view.camera for view in views])
        assert np.allclose(steps, motion.travel / 8)


# ---- Captions ------------------------------------------------------------------------------------

def test_full_caption_names_everything():
    assert caption(replace(SCENE, hat="cowboy hat", time="sunset", style="comic")) == (
        "a man wearing red clothes and a cowboy hat is skiing on the snow at sunset, comic style")
    assert caption(replace(SCENE, subject="astronaut", place="desert")) == (
        "an astronaut wearing red clothes and no hat is skiing in the desert by day, plain style")
    rng = Random(2)
    for _ in range(300):
        scene = world.random_scene(rng)
        words = caption(scene)
        for name, values in ATTRIBUTES.items():   # whole words: "man" is not in "woman"
            assert [v for v in values if re.search(rf"\b{v}\b", words)] == [getattr(scene, name)]


def test_different_scenes_have_different_captions():
    scenes = [Scene(*values) for values in product(*ATTRIBUTES.values())]
    assert len({caption(scene) for scene in scenes}) == len(scenes)


def test_silence_means_the_usual():
    rng, silent, unusual = Random(4), Counter(), Counter()
    for _ in range(4000):
        scene = world.random_scene(rng)
        names = world.named(scene, rng)
        for name in set(USUAL) - set(names):
            silent[name] += 1
            unusual[name] += getattr(scene, name) != USUAL[name]
    assert all(silent[name] > 1000 and unusual[name] < 0.04 * silent[name] for name in USUAL), (silent, unusual)


def test_silence_about_clothes_means_any_colour():
    rng, colours = Random(5), Counter()
    for _ in range(4000):
        scene = world.random_scene(rng)
        if "clothes" not in world.named(scene, rng):
            colours[scene.clothes] += 1
    assert set(colours) == set(ATTRIBUTES["clothes"])
    assert max(colours.values()) < 1.4 * min(colours.values())


def test_captions_are_often_as_short_as_a_users_prompt():
    rng, draws = Random(6), 4000
    named = [world.named(world.random_scene(rng), rng) for _ in range(draws)]
    assert sum(names == GIST for names in named) > 0.05 * draws
    assert sum(set(GIST) <= set(names) and len(names) <= 4 for names in named) > 0.25 * draws
    assert sum(names == tuple(ATTRIBUTES) for names in named) > 0.15 * draws
    assert all(names for names in named)


def test_random_captions_are_well_formed():
    rng, draws, dropped = Random(7), 2000, 0
    for _ in range(draws):
        scene = world.random_scene(rng)
        words = caption(scene, rng)
        assert ("someone" in words) != bool(re.search(rf"\b{scene.subject}\b", words))
        assert re.fullmatch(r"[a-z ]+(, [a-z]+ style)?", words) and "  " not in words
        dropped += scene.activity in words and " is " not in words
    assert 0.1 < dropped / draws < 0.4


def test_caption_keeps_what_it_is_asked_for():
    assert caption(SCENE, keep=("subject", "activity", "place")) == "a man is skiing on the snow"
    assert caption(SCENE, keep=("subject", "place")) == "a man on the snow"
    assert caption(SCENE, keep=("hat", "activity", "time")) == "someone wearing no hat is skiing by day"
    assert caption(SCENE, keep=()) == "someone"
    said = {caption(SCENE, Random(seed), keep=("subject", "activity", "place")) for seed in range(20)}
    assert said == {"a man is skiing on the snow", "a man skiing on the snow"}


# ---- Held out ------------------------------------------------------------------------------------

def test_a_tenth_is_held_out_over_all_values():
    names = ("subject", "activity", "place")
    triples = list(product(*(ATTRIBUTES[name] for name in names)))
    held_out = [triple for triple in triples if world.is_held_out(replace(SCENE, **dict(zip(names, triple))))]
    assert 0.08 < len(held_out) / len(triples) < 0.12
    for i, name in enumerate(names):
        share = [sum(triple[i] == value for triple in held_out) for value in ATTRIBUTES[name]]
        assert min(share) > 0 and max(share) - min(share) <= 1   # spread evenly
    for i, j in combinations(range(3), 2):   # every pair is seen in training with something else
        assert max(Counter((triple[i], triple[j]) for triple in held_out).values()) == 1


@pytest.mark.parametrize("held_out", [False, True])
def test_random_scenes_keep_to_their_side(held_out):
    rng = Random(6)
    scenes = [world.random_scene(rng, held_out) for _ in range(1500)]
    assert {world.is_held_out(scene) for scene in scenes} == {held_out}
    for name, values in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(values)
    for name, usual in USUAL.items():
        assert 0.55 < sum(getattr(scene, name) == usual for scene in scenes) / len(scenes) < 0.65
    for part, variants in LOOKS.items():
        assert {getattr(scene.look, part) for scene in scenes} == set(range(variants))
