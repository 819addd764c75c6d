"""How the toy world is drawn: a scene seen from a view, as flat shapes on a ground.

Lengths are in *units*, of which the picture has 64 x 64 whatever its pixels; x goes right, y goes down.  All places
and sizes are functions of the view and the activity; the rest of the scene only says what is drawn there, so two
scenes that differ by an edit match everywhere but in what was edited.
"""
from dataclasses import dataclass, replace
from math import cos, exp, pi, sin
from random import Random
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tinytav.toy.shapes import (
    BLACK,
    BOARDS,
    BODIES,
    CLOTHES,
    CREAM,
    DARK,
    EARTH,
    GEAR,
    HATS,
    LIGHT,
    PALE,
    PLACES,
    SHOES,
    SKIES,
    SUN,
    WHITE,
    Colour,
    Shapes,
)
from tinytav.toy.world import Motion, Scene, View, views

Point = tuple[float, float]

OVERSAMPLING = 3   # pixels drawn per pixel of the picture, per side
SPACING = 36       # units between two props: one can hide behind the figure, never all
TILE = 48          # units after which the skyline repeats
HORIZON = 46       # y of the line where the ground begins, in the picture's middle


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour a with a share of colour b in it."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))


@dataclass(frozen=True)
class Brush:
    """Draws shapes in units around an origin, with outlines, in colours seen in some light."""
    canvas: ImageDraw.ImageDraw
    unit: float                                       # pixels per unit
    edge: float                                       # width of the outlines in pixels, 0 for none
    ink: Colour                                       # colour of the outlines
    light: Callable[[Colour | str], Colour] = lambda colour: colour   # how a colour looks in the scene's light
    origin: Point = (0, 0)                            # in pixels
    tilt: float = 0.0                                 # how much y grows along x, as on a slope

    def at(self, x: float, y: float, size: float = 1, tilt: float = 0) -> "Brush":
        """The same brush with its origin at (x, y) and larger or tilted units."""
        return replace(self, origin=self.pixel(x, y), unit=self.unit * size, tilt=self.tilt + tilt)

    def pixel(self, x: float, y: float) -> Point:
        return self.origin[0] + x * self.unit, self.origin[1] + (y + x * self.tilt) * self.unit

    def draw(self, shapes: Shapes) -> None:
        for method, *arguments in shapes:
            getattr(self, method)(*arguments)

    def polygon(self, colour: Colour, *points: Point) -> None:
        corners = [self.pixel(*point) for point in points]
        if self.edge:   # twice the edge: its inner half is painted over
            self.canvas.line(corners + corners[:2], self.ink, round(2 * self.edge), "curve")
        self.patch(colour, *points)

    def patch(self, colour: Colour, *points: Point) -> None:
        """A polygon without outline, for small features and for what goes on beyond its tile."""
        self.canvas.polygon([self.pixel(*point) for point in points], self.light(colour))

    def line(self, colour: Colour, width: float, *points: Point) -> None:
        """A bent line with round ends; width in units."""
        corners = [self.pixel(*point) for point in points]
        for fill, w in ((self.ink, width * self.unit + 2 * self.edge), (self.light(colour), width * self.unit)):
            self.canvas.line(corners, fill, round(w), "curve")
            for x, y in (corners[0], corners[-1]):
                self.canvas.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill)

    def disc(self, colour: Colour, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """A disc, or an ellipse with half axes rx and ry."""
        grown = self.edge / self.unit
        replace(self, light=lambda _: self.ink).dot(colour, x, y, rx + grown, (ry or rx) + grown)
        self.dot(colour, x, y, rx, ry)

    def dot(self, colour: Colour, x: float, y: float, rx: float, ry: float | None = None) -> None:
        """A disc without outline, for small features."""
        x, y = self.pixel(x, y)
        rx, ry = rx * self.unit, (ry or rx) * self.unit
        self.canvas.ellipse((x - rx, y - ry, x + rx, y + ry), self.light(colour))


# ---- Geometry: functions of view and activity alone --------------------------------------------------------------

def slope(activity: str) -> float:
    """How much the ground falls per unit of x: skiing goes downhill, everything else on the flat."""
    return 0.16 if activity == "skiing" else 0.0


def ground(activity: str, x: float) -> float:
    """y of the line where the ground begins."""
    return HORIZON + slope(activity) * (x - 32)


def passing(camera: float, spacing: float = SPACING, speed: float = 1) -> list[float]:
    """The x of all things that stand `spacing` apart and pass at `speed` times the speed of the props."""
    offset = camera * SPACING * speed % spacing
    return [k * spacing - offset for k in range(int(64 / spacing) + 3)]


class Pose(NamedTuple):
    """The figure's joints in units at size 1, from the point it stands on; of two limbs the far one comes first."""
    hip: Point
    neck: Point
    head: Point
    hands: tuple[Point, Point]
    feet: tuple[Point, Point]
    elbow: float    # how far the elbows stand back
    knee: float     # how far the knees stand forward


def pose(activity: str, phase: float) -> Pose:
    """The figure's pose at a phase of its cycle; it faces right."""
    s, c = sin(2 * pi * phase), cos(2 * pi * phase)
    match activity:
        case "skiing":          # crouched, the poles swinging in turn
            return Pose((-4, -9 + s), (1, -20 + s), (4, -28 + s), ((11 + 2 * s, -14 + 3 * c), (9 - 2 * s, -13 - 3 * c)),
                        ((0, -1), (2, 0)), elbow=2, knee=4)
        case "surfing":         # arms and feet wide apart
            return Pose((0, -9 + s), (0, -20 + s), (1, -28 + s), ((14, -21 - 4 * s), (-14, -21 + 4 * s)),
                        ((7, -2), (-7, -2)), elbow=0, knee=0)
        case "running":         # a long stride, the arms against the legs
            bob = -2 * abs(c)
            return Pose((-1, -11 + bob), (2, -21 + bob), (4, -29 + bob),
                        ((3 + 9 * s, -15 - 2 * s + bob), (3 - 9 * s, -15 + 2 * s + bob)),
                        ((-10 * s, -1 - 4 * max(0, -c)), (10 * s, -1 - 4 * max(0, c))), elbow=4, knee=3)
        case "skateboarding":   # one foot on the board, the other pushing the ground behind it
            return Pose((0, -12), (2, -22), (4, -29.5), ((12, -17 + 3 * s), (-8, -13 - 3 * s)),
                        ((4, -5), (-9 + 4 * c, -1 - 2 * max(0, s))), elbow=3, knee=3)


def standing(b: Brush, activity: str, view: View) -> Brush:
    """The brush with its origin where the figure stands, and with the figure's size and tilt."""
    tilt = 0.1 * sin(2 * pi * view.phase) if activity == "surfing" else slope(activity)
    return b.at(64 * view.x, ground(activity, 64 * view.x) + 12, view.size, tilt)


# ---- Scenery -----------------------------------------------------------------------------------------------------

def sky(image: Image.Image, scene: Scene) -> None:
    """Fills the picture with the sky's gradient; a comic has it in flat bands."""
    top, bottom = SKIES[scene.time][scene.look.sky]
    if scene.place == "moon":   # there is no air: black space shines through
        top, bottom = mix(top, BLACK, 0.8), mix(bottom, BLACK, 0.6)
    t = np.linspace(0, 64 / HORIZON, image.height).clip(0, 1)[:, None, None]
    if scene.style == "comic":
        t = np.floor(t * 4) / 4
    column = np.array(top) * (1 - t) + np.array(bottom) * t
    image.paste(Image.fromarray(column.astype(np.uint8)).resize(image.size))


def scenery(b: Brush, scene: Scene, view: View) -> None:
    """Everything behind the figure but the sky's colour, from far to near."""
    place, activity = PLACES[scene.place], scene.activity
    if scene.time == "night" or scene.place == "moon":
        stars = Random(5)
        b.draw(("dot", CREAM, stars.uniform(1, 63), stars.uniform(1, 36), 0.6) for _ in range(24))
    b.draw(EARTH if scene.place == "moon" else ())
    b.draw(SUN[scene.time])
    b = replace(b, light=lambda colour: mix(colour, *LIGHT[scene.time]))
    for x in passing(view.camera, TILE, speed=0.25):
        b.at(x, ground(activity, 64) + 2).draw(place.far)
    b.polygon(place.ground, *((x, ground(activity, x)) for x in (-2, 66)), (66, 66), (-2, 66))
    for x in passing(view.camera):
        b.at(x, ground(activity, x) + 3).draw(place.props[scene.look.prop])
        b.at(x - SPACING / 2, ground(activity, x - SPACING / 2) + 15, tilt=slope(activity)).draw(place.mark)
    if activity == "surfing":
        wave(b, view)


def wave(b: Brush, view: View) -> None:
    """A swell that breaks behind the surfer."""
    left = 64 * view.x - 30 * view.size
    crest = [(x, 54 - 22 * exp(-((x - left) / 11) ** 2) + 1.2 * sin(x / 5 + 2 * pi * view.phase))
             for x in range(-2, 69, 2)]
    b.polygon((36, 146, 214), *crest, (68, 66), (-2, 66))
    b.line(WHITE, 1.6, *crest)
    b.draw(("dot", WHITE, x, y, 2.6) for x, y in crest if abs(x - left) < 13)
    for x in passing(view.camera):
        b.line((130, 206, 240), 1.4, (x - 5, 61), (x + 5, 61))


# ---- Figures -----------------------------------------------------------------------------------------------------

def figure(b: Brush, scene: Scene, phase: float) -> None:
    """The subject with its clothes, hat and gear, on the brush's origin."""
    body, joints = BODIES[scene.subject], pose(scene.activity, phase)
    own = {"fur": body.furs[scene.look.fur], "gear": GEAR[scene.look.gear]}
    near = replace(b, light=lambda colour: b.light(own.get(colour, colour)))
    far = replace(b, light=lambda colour: b.light(mix(own.get(colour, colour), BLACK, 0.25)))
    cloth, shoe = CLOTHES[scene.clothes], SHOES[scene.look.shoes]
    near.draw(BOARDS[scene.activity])
    near.at(*joints.hip).draw(body.back)
    arm(far, scene.activity, joints, joints.hands[0], body.arms, cloth)
    for brush, (x, y) in zip((far, near), joints.feet):
        limb(brush, body.legs, 4.6, joints.hip, (x, y - 1), joints.knee)
        brush.line(shoe, 3.2, (x - 0.5, y), (x + 2.8, y))
    (x0, y0), (x1, y1) = joints.hip, joints.neck
    near.polygon(cloth, (x0 - 7, y0 + 2), (x1 - 6, y1), (x1 + 6, y1), (x0 + 7, y0 + 2))
    near.at(*joints.head).draw(body.head + HATS[scene.hat])
    arm(near, scene.activity, joints, joints.hands[1], body.arms, cloth)


def limb(b: Brush, colour: Colour, width: float, start: Point, end: Point, bend: float) -> Point:
    """Draws an arm or a leg whose joint stands `bend` ahead of its middle; returns the joint."""
    joint = (start[0] + end[0]) / 2 + bend, (start[1] + end[1]) / 2
    b.line(colour, width, start, joint, end)
    return joint


def arm(b: Brush, activity: str, joints: Pose, hand: Point, skin: Colour, cloth: Colour) -> None:
    """An arm in a short sleeve, holding a pole if it skis."""
    shoulder = joints.neck[0], joints.neck[1] + 2
    elbow = limb(b, skin, 3.8, shoulder, hand, -joints.elbow)
    b.line(cloth, 5.6, shoulder, elbow)
    b.dot(skin, *hand, 2.3)
    if activity == "skiing":
        b.line((60, 62, 76), 1.3, (hand[0] + 1, hand[1] - 3), (hand[0] - 8, 0))


# ---- Pictures ----------------------------------------------------------------------------------------------------

def styled(picture: np.ndarray, style: str) -> np.ndarray:
    """A picture, (size, size, 3) in [0, 255], in the colours of its style."""
    if style == "comic":    # stronger colours
        grey = picture.mean(axis=2, keepdims=True)
        return grey + 1.35 * (picture - grey)
    if style == "pencil":   # strokes of colour on cream paper; 16 to the width, one to each pixel of a 4x VAE's latents
        y, x = np.indices(picture.shape[:2]) / len(picture)
        strokes = 0.86 + 0.08 * np.sin(2 * pi * 16 * (x + y))[:, :, None]
        return np.array(CREAM) * (1 - strokes * (1 - picture / 255))
    return picture


def render(scene: Scene, view: View, size: int = 64) -> np.ndarray:
    """The picture of a scene from a view: (size, size, 3) uint8."""
    image = Image.new("RGB", (size * OVERSAMPLING, size * OVERSAMPLING))
    unit = image.width / 64
    edge, ink = {"plain": (0, BLACK), "comic": (0.9, BLACK), "pencil": (0.45, (92, 88, 96))}[scene.style]
    b = Brush(ImageDraw.Draw(image), unit, edge * unit, ink)
    sky(image, scene)
    scenery(b, scene, view)
    # A rim sets the figure off from any backdrop: the whole figure in one colour, a little fatter, beneath it.
    rim = PALE if scene.time == "night" or scene.place == "moon" else DARK
    halo = replace(b, edge=(edge + 0.6) * unit, ink=rim, light=lambda _: rim)
    for brush in (halo, b):
        figure(standing(brush, scene.activity, view), scene, view.phase)
    picture = styled(np.asarray(image.reduce(OVERSAMPLING), dtype=np.float32), scene.style)
    return picture.clip(0, 255).astype(np.uint8)


def clip(scene: Scene, motion: Motion, frames: int, size: int = 64) -> np.ndarray:
    """A moving picture of a scene: (frames, size, size, 3) uint8."""
    return np.stack([render(scene, view, size) for view in views(motion, frames)])
