"""A stick figure tells the pose and nothing else, and stands where the drawn figure stands."""
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from tinytav.toy import draw, skeleton, world
from tinytav.toy.world import ATTRIBUTES, Scene, View

VIEW = View(camera=0.4, x=0.5, size=1.1, phase=0.2)


def drawn(picture):
    """Where a stick figure is, (size, size) bool."""
    return (picture > 40).any(axis=2)


def figure_only(activity, view, size):
    """Where the drawn figure is: there the picture depends on the subject, the clothes, the shoes or the fur."""
    scenes = [Scene(subject, clothes, "no hat", activity, "snow", "day", "plain", world.Look(shoes=look, fur=look))
              for subject, clothes, look in (("man", "red", 0), ("panda", "blue", 1), ("robot", "yellow", 1))]
    first, *others = [draw.render(scene, view, size) for scene in scenes]
    return np.any([(other != first).any(axis=2) for other in others], axis=0)


@pytest.mark.parametrize("activity", ATTRIBUTES["activity"])
def test_the_stick_figure_lies_within_the_figure(activity):
    rng = Random(activity)
    for _ in range(5):
        view = world.random_view(rng)
        sticks = drawn(skeleton.skeleton(activity, view, 128))
        assert sticks.sum() > 200
        assert (sticks & figure_only(activity, view, 128)).sum() > 0.85 * sticks.sum()


@pytest.mark.parametrize("part, change", [("x", 0.08), ("size", 0.1), ("phase", 0.25)])
@pytest.mark.parametrize("activity", ATTRIBUTES["activity"])
def test_it_follows_place_size_and_phase(activity, part, change):
    other = replace(VIEW, **{part: getattr(VIEW, part) + change})
    a, b = (skeleton.skeleton(activity, view, 64).astype(int) for view in (VIEW, other))
    assert np.abs(a - b).max() > 50


def test_it_does_not_see_the_background():
    other = replace(VIEW, camera=7.9)
    assert np.array_equal(skeleton.skeleton("running", VIEW, 64), skeleton.skeleton("running", other, 64))


def test_a_swap_of_near_and_far_limbs_shows():
    half_a_cycle_later = replace(VIEW, phase=VIEW.phase + 0.5)
    a, b = (skeleton.skeleton("running", view, 64).astype(int) for view in (VIEW, half_a_cycle_later))
    assert np.abs(a - b).max() > 50


@pytest.mark.parametrize("activity", ATTRIBUTES["activity"])
def test_knees_have_their_legs_colour_and_the_near_leg_is_in_front(activity):
    picture, pose = skeleton.skeleton(activity, VIEW, 128), draw.pose(activity, VIEW.phase)
    brush = draw.standing(draw.Brush(None, 2, 0, (0, 0, 0)), activity, VIEW)
    colours = []
    for _, knee, _ in (pose.leg(0), pose.leg(1)):
        column, row = brush.pixel(*knee)
        colours.append(tuple(picture[int(row), int(column)]))
    far, near = skeleton.LEGS
    assert colours[1] == near
    assert colours[0] == far or activity == "skiing"        # there the near leg covers the far one


def test_hints_are_pictures_from_0_to_1():
    motion = world.random_motion(Random(0))
    hints = skeleton.hint(skeleton.clip("surfing", motion, frames=3, size=32))
    assert hints.shape == (3, 3, 32, 32) and hints.dtype is torch.float32
    assert hints.min() >= 0 and 0.5 < hints.max() <= 1
