"""How the toy world is drawn: a scene seen from a view, as flat shapes on a ground.

Lengths are in *units*, of which the picture has 64 x 64 whatever its pixels; x goes right, y goes down.  All places
and sizes are functions of the view and the activity; the rest of the scene only says what is drawn there, so two
scenes that differ by an edit match everywhere but in what was edited.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, exp, pi, sin
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tinytav.toy import shapes
from tinytav.toy.shapes import Colour, Shapes
from tinytav.toy.world import Scene, View

Point = tuple[float, float]

SIZE = 128         # pixels along a picture's side
OVERSAMPLING = 3   # pixels drawn per pixel of the picture, per side
SPACING = 36       # units between two props: one can hide behind the figure, never all
TILE = 48          # units after which the skyline repeats
CONTOUR = 0.4      # units around the near arm and leg, in every style
HORIZON = 46       # y of the line where the ground begins, in the picture's middle
# Each style's outlines: their width in units, and their colour.
OUTLINES = {"plain": (0, shapes.DARK), "comic": (0.9, shapes.BLACK), "sketch": (0.4, (74, 70, 92))}


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

    def draw(self, parts: Shapes) -> None:
        for method, *arguments in parts:
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


# ---- Geometry: functions of view and activity alone ----------------------------------------------

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
    elbow: float    # how far the elbows stand back from the middle of the arm
    knee: float     # how far the knees stand forward

    def arm(self, i: int) -> tuple[Point, Point, Point]:
        """Shoulder, elbow and hand."""
        (x, y), shoulder = self.hands[i], (self.neck[0], self.neck[1] + 2)
        return shoulder, ((shoulder[0] + x) / 2 - self.elbow, (shoulder[1] + y) / 2), (x, y)

    def leg(self, i: int) -> tuple[Point, Point, Point]:
        """Hip, knee and ankle."""
        x, y = self.feet[i][0], self.feet[i][1] - 1
        return self.hip, ((self.hip[0] + x) / 2 + self.knee, (self.hip[1] + y) / 2), (x, y)


def pose(activity: str, phase: float) -> Pose:
    """The figure's pose at a phase of its cycle; it faces right."""
    s, c = sin(2 * pi * phase), cos(2 * pi * phase)
    match activity:
        case "skiing":          # crouched, the poles swinging in turn
            return Pose((-5, -9 + s), (2, -19 + s), (5, -27 + s),
                        ((12 + 3 * s, -13 + 3 * c), (10 - 3 * s, -12 - 3 * c)), ((0, -2), (2, 0)), elbow=2, knee=5)
        case "surfing":         # arms and feet wide apart
            return Pose((0, -11 + s), (0, -21.5 + s), (1, -29.5 + s), ((15, -22 - 5 * s), (-15, -22 + 5 * s)),
                        ((8, -4), (-8, -4)), elbow=0, knee=0)
        case "running":         # a long stride, the arms against the legs
            bob = -2 * abs(c)
            return Pose((-1, -12 + bob), (3, -22 + bob), (5, -30 + bob),
                        ((4 + 10 * s, -16 - 2 * s + bob), (4 - 10 * s, -16 + 2 * s + bob)),
                        ((-13 * s, -1 - 6 * max(0, -c)), (13 * s, -1 - 6 * max(0, c))), elbow=4, knee=3)
        case "skateboarding":   # one foot on the board, the other pushing the ground behind it
            return Pose((1, -15), (3, -24), (5, -31.5), ((13, -20 + 3 * s), (-9, -17 - 3 * s)),
                        ((5, -8.5), (-10 + 5 * c, -1 - 3 * max(0, s))), elbow=3, knee=4)


def standing(b: Brush, activity: str, view: View) -> Brush:
    """The brush with its origin where the figure stands, and with the figure's size and tilt."""
    tilt = 0.1 * sin(2 * pi * view.phase) if activity == "surfing" else slope(activity)
    return b.at(64 * view.x, ground(activity, 64 * view.x) + 12, view.size, tilt)


# ---- Scenery -------------------------------------------------------------------------------------

def lit(scene: Scene, strength: float) -> Callable[[Colour], Colour]:
    """How light of this strength (0: none) and the style change a colour. A sketch is washed out on its paper."""
    glow, share = shapes.LIGHT[scene.time]
    paper = 0.42 if scene.style == "sketch" else 0
    return lambda colour: mix(mix(colour, glow, strength * share), shapes.PAPER, paper)


def sky(image: Image.Image, scene: Scene) -> None:
    """Fills the picture with the sky's gradient; a comic has it in flat bands."""
    top, bottom = shapes.SKIES[scene.time][scene.look.sky]
    if scene.place == "moon":   # there is no air: black space shines through
        top, bottom = mix(top, shapes.BLACK, 0.8), mix(bottom, shapes.BLACK, 0.6)
    top, bottom = map(lit(scene, 0), (top, bottom))
    t = np.linspace(0, 64 / HORIZON, image.height).clip(0, 1)[:, None, None]
    if scene.style == "comic":
        t = np.floor(t * 4) / 4
    column = np.array(top) * (1 - t) + np.array(bottom) * t
    image.paste(Image.fromarray(column.astype(np.uint8)).resize(image.size))


def scenery(b: Brush, scene: Scene, view: View) -> None:
    """Everything behind the figure but the sky's colour, from far to near."""
    place, activity = shapes.PLACES[scene.place], scene.activity
    b = replace(b, light=lit(scene, 0))
    if scene.time == "night" or scene.place == "moon":
        stars = Random(5)
        b.draw(("dot", shapes.CREAM, stars.uniform(1, 63), stars.uniform(1, 36), 0.6) for _ in range(24))
    b.draw(shapes.EARTH if scene.place == "moon" else ())
    b.draw(shapes.SUN[scene.time])
    b = replace(b, light=lit(scene, 1))
    for x in passing(view.camera, TILE, speed=0.25):
        b.at(x, ground(activity, 64) + 2).draw(place.far)
    b.polygon(place.ground, *((x, ground(activity, x)) for x in (-2, 66)), (66, 66), (-2, 66))
    for x in passing(view.camera):
        b.at(x, ground(activity, x) + 3).draw(place.props[scene.look.prop])
        between = x - SPACING / 2
        b.at(between, ground(activity, between) + 15, tilt=slope(activity)).draw(place.mark)
    if activity == "surfing":
        wave(b, view)
    if activity == "running":
        track(b, view)
    for x in passing(view.camera):
        between = x - SPACING / 2
        b.at(between, ground(activity, between) + 8).draw(shapes.BESIDE[activity])


def wave(b: Brush, view: View) -> None:
    """A swell that breaks behind the surfer."""
    left = 64 * view.x - 29 * view.size
    crest = [(x, 54 - 26 * exp(-((x - left) / 11) ** 2) + 1.2 * sin(x / 5 + 2 * pi * view.phase))
             for x in range(-2, 69, 2)]
    b.polygon(shapes.WATER, *crest, (68, 66), (-2, 66))
    b.line(shapes.WHITE, 1.6, *crest)
    b.draw(("dot", shapes.WHITE, x, y, 2.8) for x, y in crest if abs(x - left) < 13)
    for x in passing(view.camera):
        b.line(shapes.FOAM, 1.4, (x - 5, 62), (x + 5, 62))


def track(b: Brush, view: View) -> None:
    """A running track with white lines, and a cross line at every prop."""
    top, foot = HORIZON + 6, HORIZON + 16
    b.polygon(shapes.TRACK, (-2, top), (66, top), (66, foot), (-2, foot))
    for y in (top, foot):
        b.line(shapes.WHITE, 1, (-3, y), (67, y))
    for x in passing(view.camera):
        b.line(shapes.WHITE, 1.2, (x - 16, top), (x - 20, foot))


# ---- Figures -------------------------------------------------------------------------------------

def figure(b: Brush, scene: Scene, phase: float) -> None:
    """The subject with its clothes, hat and gear, on the brush's origin."""
    body, joints, cloth = shapes.BODIES[scene.subject], pose(scene.activity, phase), shapes.CLOTHES[scene.clothes]
    own = {"fur": body.furs[scene.look.fur], "gear": shapes.GEAR[scene.look.gear]}
    near = replace(b, light=lambda colour: b.light(own.get(colour, colour)))
    far = replace(b, light=lambda colour: b.light(mix(own.get(colour, colour), shapes.BLACK, 0.25)))
    limbs = replace(near, edge=max(b.edge, CONTOUR * b.unit))    # sets the near limbs off from what is behind them
    near.draw(shapes.BOARDS[scene.activity])
    near.at(*joints.hip).draw(body.back)
    arm(far, scene.activity, joints.arm(0), body.arms, cloth)
    for brush, (hip, knee, (x, y)) in ((far, joints.leg(0)), (limbs, joints.leg(1))):
        brush.line(body.legs, 4.6, hip, knee, (x, y))
        brush.line(shapes.SHOES[scene.look.shoes], 3.2, (x - 0.5, y + 1), (x + 2.8, y + 1))
        if scene.activity == "skateboarding":
            brush.disc(shapes.STEEL, *knee, 2.6)       # a knee pad
    (x0, y0), (x1, y1) = joints.hip, joints.neck
    near.polygon(cloth, (x0 - 7, y0 + 2), (x1 - 6, y1), (x1 + 6, y1), (x0 + 7, y0 + 2))
    if scene.activity == "running":
        near.at((x0 + x1) / 2 + 1, (y0 + y1) / 2 + 1.6).draw(shapes.NUMBER)
    near.at(*joints.head).draw(body.head + shapes.HATS[scene.hat])
    arm(limbs, scene.activity, joints.arm(1), body.arms, cloth)


def arm(b: Brush, activity: str, joints: tuple[Point, Point, Point], skin: Colour | str, cloth: Colour) -> None:
    """An arm in a short sleeve, holding a pole if it skis."""
    shoulder, elbow, (x, y) = joints
    b.line(skin, 3.8, *joints)
    b.line(cloth, 5.6, shoulder, elbow)
    b.disc(skin, x, y, 2.3)
    if activity == "skiing":
        b.line(shapes.STEEL, 1.3, (x + 1, y - 3), (x - 10, 1))
        b.dot(shapes.STEEL, x - 8.5, -1, 2, 1)


def render(scene: Scene, view: View, size: int = SIZE) -> np.ndarray:
    """The picture of a scene from a view: (size, size, 3) uint8."""
    image = Image.new("RGB", (size * OVERSAMPLING, size * OVERSAMPLING))
    unit = image.width / 64
    edge, ink = OUTLINES[scene.style]
    b = Brush(ImageDraw.Draw(image), unit, edge * unit, ink)
    sky(image, scene)
    scenery(b, scene, view)
    # A rim sets the figure off from any backdrop: the whole figure in one colour, a little fatter, beneath it.
    rim = shapes.PALE if scene.time == "night" or scene.place == "moon" else shapes.DARK
    halo = replace(b, edge=(edge + 0.6) * unit, ink=rim, light=lambda _: rim)
    for brush in (halo, replace(b, light=lit(scene, 0.5))):
        figure(standing(brush, scene.activity, view), scene, view.phase)
    picture = np.asarray(image.reduce(OVERSAMPLING), dtype=np.float32)
    if scene.style == "comic":      # has stronger colours
        grey = picture.mean(axis=2, keepdims=True)
        picture = grey + 1.35 * (picture - grey)
    return picture.clip(0, 255).astype(np.uint8)
