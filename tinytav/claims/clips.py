"""Clips whose true edits are known, and what a caption names of them."""
from dataclasses import replace
from random import Random
from typing import NamedTuple

from tinytav.toy import world
from tinytav.toy.world import ATTRIBUTES, GIST, Motion, Scene

FRAMES = 8


class KnownEdit(NamedTuple):
    name: str           # the attribute that is edited
    scene: Scene        # the true answer


class KnownClip(NamedTuple):
    scene: Scene
    motion: Motion
    edits: list[KnownEdit]
    other: Motion       # of the next clip


def clip_motion(rng):
    """A motion whose figure drifts far, so that a figure that stays where it is can be detected."""
    motion, drift = world.random_motion(rng), rng.choice((-0.16, 0.16))
    return replace(motion, drift=drift, start=replace(motion.start, x=0.5 - drift / 2))


def make_clip(kind, i):
    """Clip i of a kind: a word, so that each study has clips of its own.

    In every third clip the subject and place edits were never seen in training.
    """
    rng = Random(f"{kind}/{i}")
    motion, other = clip_motion(rng), clip_motion(Random(f"{kind}/{i + 1}"))
    names = ("subject", "place", ("clothes", "hat")[i % 2], ("time", "style")[i // 2 % 2])
    while True:
        scene = world.random_scene(rng)
        edits = [KnownEdit(name, world.changed(scene, name, rng)) for name in names]
        if [world.is_held_out(edit.scene) for edit in edits[:2]] == [i % 3 == 2] * 2:
            return KnownClip(scene, motion, edits, other)


def longer(clip, frames):
    """The clip in so many frames. From frame to frame limbs and background move as in one of FRAMES frames.

    The figure drifts and grows as far as there, but over the whole clip: it would leave the picture.
    """
    motion, factor = clip.motion, frames / FRAMES
    return clip._replace(motion=replace(motion, travel=factor * motion.travel, cycles=factor * motion.cycles))


def said(captions, edited=()):
    """The attributes that a caption names. "user": the gist, and what is edited. "full": all of them."""
    return tuple(name for name in ATTRIBUTES if captions == "full" or name in (*GIST, *edited))
