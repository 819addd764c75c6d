"""What everything in the toy world looks like: nothing but tables of colours and shapes, for `draw` to place.

A shape is a method of `draw.Brush` and its arguments: ("disc", colour, x, y, rx, ry), ("polygon", colour, *points),
("line", colour, width, *points); a "dot" is a disc and a "patch" a polygon without outline.

Lengths are in units, 64 to the picture, so a unit is two pixels at the usual size; x goes right, y down.  The colours
"fur" and "gear" stand for what subject and look make of them.
"""
from typing import NamedTuple

Colour = tuple[int, int, int]
Shapes = tuple[tuple, ...]

DARK, WHITE, CREAM, BLACK, PALE = (38, 36, 48), (250, 250, 250), (246, 236, 214), (12, 12, 18), (206, 216, 255)
LAMP, ORANGE, TRUNK, WOOD = (255, 240, 170), (250, 152, 56), (130, 88, 54), (110, 70, 50)
PAPER, ROSE, PLANK, STEEL = (252, 248, 238), (232, 40, 72), (168, 142, 214), (90, 94, 108)
TRACK, WATER, FOAM = (196, 84, 62), (36, 146, 214), (130, 206, 240)

CLOTHES = {"red": (222, 28, 36), "yellow": (255, 216, 16), "green": (10, 150, 60), "blue": (20, 92, 236),
           "purple": (136, 34, 180), "pink": (255, 132, 200)}
GEAR = ((232, 74, 48), (40, 176, 190), (250, 236, 150))
SHOES = ((74, 48, 40), (226, 222, 214))

# Colours of the sky's top and foot, for each tint; then the colour of the light and its share in what it falls on.
# On the figure it falls half as strongly, so that clothes can be told apart at night.
SKIES = {
    "day": (((62, 150, 236), (206, 234, 250)), ((40, 176, 210), (222, 246, 236)), ((112, 136, 232), (232, 226, 250))),
    "sunset": (((112, 62, 140), (255, 176, 92)), ((196, 72, 96), (255, 200, 120)), ((74, 78, 150), (255, 150, 120))),
    "night": (((10, 14, 48), (50, 62, 124)), ((28, 12, 54), (84, 56, 124)), ((6, 26, 46), (34, 86, 112))),
}
LIGHT = {"day": (WHITE, 0.0), "sunset": ((206, 84, 78), 0.34), "night": ((22, 28, 84), 0.5)}
SUN = {"day": (("disc", (255, 232, 96), 54, 10, 6),),
       "sunset": (("disc", (255, 240, 150), 50, 34, 9),),
       "night": (("disc", (250, 244, 214), 54, 10, 6), ("dot", (214, 206, 186), 52, 8.5, 1.8),
                 ("dot", (214, 206, 186), 56, 12, 1.4))}
EARTH = (("disc", (56, 120, 220), 11, 12, 6), ("dot", (90, 180, 100), 9, 11, 2.6),
         ("dot", (90, 180, 100), 13, 14.5, 1.7))


def tower(x: float, height: int, colour: Colour) -> Shapes:
    windows = [("patch", LAMP, (x + 2.5, y), (x + 8.5, y), (x + 8.5, y + 2), (x + 2.5, y + 2))
               for y in range(3 - height, -4, 6)]
    return ("polygon", colour, (x, 0), (x, -height), (x + 11, -height), (x + 11, 0)), *windows


def fir(snow: bool) -> Shapes:
    green = [("polygon", (24, 104, 72), (-w, y), (0, y - 10), (w, y)) for y, w in ((-3, 8), (-9, 6.5), (-15, 5))]
    caps = [("polygon", WHITE, (-w, y), (0, y - 5), (w, y), (0, y + 1.5)) for y, w in ((-8, 4), (-14, 3.2), (-20, 2.5))]
    return ("line", TRUNK, 2.4, (0, 0), (0, -4)), *green, *(caps if snow else ())


def palm(lean: float) -> Shapes:
    leaves = [("line", (34, 146, 70), 2.6, (lean, -20), (lean + 0.6 * x, -21 + y / 2), (lean + x, -19 + y))
              for x, y in ((-7.5, 4), (-8, -2), (-4, -6), (4, -6), (8, -2), (7.5, 4))]
    return ("line", (150, 104, 60), 2.6, (0, 0), (lean / 3, -11), (lean, -20)), *leaves


def house(wall: Colour, roof: Colour, *gable: tuple[float, float]) -> Shapes:
    return (("polygon", wall, (-8, 0), (-8, -13), (8, -13), (8, 0)), ("polygon", roof, (-10, -13), *gable, (10, -13)),
            ("polygon", WOOD, (1, 0), (1, -7), (5, -7), (5, 0)),
            ("polygon", LAMP, (-6, -6), (-6, -10), (-2, -10), (-2, -6)))


def dash(colour: Colour) -> Shapes:
    return ("line", colour, 1.8, (-6, 0), (6, 0)),


class Place(NamedTuple):
    ground: Colour
    far: Shapes                     # fills 48 units of the skyline; its foot is y = 0
    props: tuple[Shapes, Shapes]    # two kinds of what stands along the way, on y = 0
    mark: Shapes                    # lies on the ground


CACTUS = tuple(("line", (52, 138, 78), *line) for line in
               ((4.6, (0, 0), (0, -21)), (3.4, (0, -8), (-6, -9), (-6, -15)), (3.4, (0, -10), (6, -11), (6, -18))))
BOULDER = (("polygon", (132, 132, 146), (-9, 0), (-8, -8), (-2, -13), (5, -10), (9, 0)),
           ("polygon", (166, 166, 178), (-8, -8), (-2, -13), (5, -10), (-1, -7)))
FLAG = ("line", (214, 214, 224), 1.2, (-3, -6), (-3, -24)), ("polygon", ORANGE, (-2.4, -24), (8, -22), (-2.4, -16))
STEM = ("line", TRUNK, 3.2, (0, 0), (0, -9))

PLACES = {
    "snow": Place((240, 246, 253), (
        ("polygon", (112, 130, 172), (-26, 0), (-4, -25), (2, -21), (6, -25), (26, 0)),
        ("polygon", WHITE, (-10, -18), (-4, -25), (2, -21), (6, -25), (11, -18), (5, -20), (0, -16), (-5, -19))),
        (fir(False), fir(True)), dash((188, 210, 236))),
    "beach": Place((246, 222, 160), (
        ("patch", (36, 122, 196), (-25, 0), (-25, -12), (25, -12), (25, 0)),
        ("polygon", WHITE, (-8, -10), (-1, -10), (-1, -23)), ("polygon", WHITE, (0, -10), (6, -10), (0, -21)),
        ("polygon", (170, 70, 50), (-9, -9), (8, -9), (5, -6), (-6, -6))),
        (palm(3), (*palm(-3), ("disc", ORANGE, -4.5, -18, 1.8), ("disc", ORANGE, -1, -17.5, 1.8))),
        dash((216, 184, 116))),
    "desert": Place((234, 178, 102), (
        ("polygon", (196, 98, 62), (-24, 0), (-16, -6), (-12, -21), (8, -21), (11, -8), (24, 0)),
        ("polygon", (168, 76, 52), (-14, -13), (-12, -21), (8, -21), (9.8, -13))),
        (CACTUS, (*CACTUS, *(("disc", (250, 120, 160), x, y, 2.4) for x, y in ((0, -23), (-6, -16), (6, -19))))),
        dash((204, 140, 72))),
    "moon": Place((166, 166, 178), (
        ("polygon", (104, 104, 118), (-24, 0), (-18, -9), (-12, -6), (-5, -16), (2, -8), (9, -12), (16, -5), (24, 0)),),
        (BOULDER, FLAG + BOULDER), (("disc", (122, 122, 136), 0, 0, 7, 2),)),
    "grass": Place((140, 206, 88), (("disc", (126, 190, 96), -12, 1, 22, 17), ("disc", (96, 168, 84), 12, 3, 18, 13)),
        ((STEM, ("disc", (34, 122, 66), 0, -16, 9, 8), ("dot", (70, 152, 80), -2, -18, 4)),
         (STEM, ("disc", (58, 140, 58), 0, -15, 6, 10), ("dot", (96, 172, 80), -1.5, -18, 2.5, 4))),
        tuple(("polygon", (84, 158, 62), (x - 2, 1), (x - 1.5, -3), (x, 0), (x + 1.5, -3), (x + 2, 1))
              for x in (-5, 0, 5))),
    "street": Place((104, 108, 120), (
        *tower(-24, 21, (126, 132, 164)), *tower(-12, 30, (158, 138, 150)), *tower(0, 17, (136, 150, 168)),
        *tower(12, 26, (118, 122, 156))),
        (house((240, 218, 184), (186, 74, 58), (0, -23)), house((190, 210, 216), (70, 92, 120), (-8, -20), (8, -20))),
        dash((248, 220, 110))),
}


def eyes(colour: Colour = DARK, size: float = 1.2) -> Shapes:
    return tuple(("dot", colour, x, 0.5, size, size * 1.25) for x in (0.6, 5))


class Body(NamedTuple):
    furs: tuple[Colour, Colour, Colour]   # a choice of shades
    head: Shapes                          # around the head's centre, with a radius of about 7.5
    arms: Colour | str = "fur"
    legs: Colour | str = "fur"
    back: Shapes = ()                     # worn or grown behind, from the hip


SKIN = ((250, 212, 180), (214, 160, 116), (128, 82, 56))
HAIR, AUBURN, LIPS, GOLD, FACE = (66, 44, 34), (186, 70, 28), (206, 50, 70), (250, 196, 40), (246, 204, 166)

BODIES = {
    "man": Body(SKIN, legs=(44, 60, 116), head=(
        ("disc", "fur", 0, 0, 7.5),
        ("polygon", HAIR, (-7.6, 2), (-7.4, -4), (-3, -8.4), (4, -8), (7.4, -3.5), (-2, -3.5), (-4, 2)), *eyes(),
        ("line", HAIR, 1.8, (0.5, 4.2), (6, 4.2)))),
    "woman": Body(SKIN, legs=(236, 222, 230), head=(
        ("polygon", AUBURN, (-8, -4), (-10, 6), (-15, 14), (-6, 13), (-3, 6), (6, -5)),
        ("disc", AUBURN, -0.8, -1.2, 8.6), ("disc", "fur", 1.4, 1, 6.4),
        ("polygon", AUBURN, (-6, 3), (-6, -5), (2, -9), (8, -3), (1, -4.6), (-3, -1)), *eyes(),
        ("line", LIPS, 1.2, (2.4, 4.6), (4.6, 4.6)))),
    "panda": Body((WHITE, (250, 236, 206), (218, 226, 240)), arms=DARK, legs=DARK, head=(
        ("disc", DARK, -6, -6.5, 3.6), ("disc", DARK, 6, -6.5, 3.6), ("disc", "fur", 0, 0, 8, 7.5),
        *eyes(size=2.4), *eyes(WHITE, 0.8), ("dot", DARK, 3, 4.6, 1.5, 1.1))),
    "robot": Body(((158, 172, 190), (196, 156, 108), (128, 162, 158)), head=(
        ("line", DARK, 1.2, (0, -6), (0, -11)), ("disc", (236, 60, 50), 0, -12, 1.9),
        ("polygon", "fur", (-7.5, -7), (7.5, -7), (7.5, 7), (-7.5, 7)),
        ("polygon", (40, 48, 66), (-4, -3.5), (8, -3.5), (8, 2.5), (-4, 2.5)), *eyes((90, 250, 240), 1.6),
        ("line", DARK, 1, (-2, 5), (5, 5)))),
    "rabbit": Body(((222, 206, 194), (184, 180, 190), (200, 166, 132)), head=(
        ("line", "fur", 5, (-4.5, -5), (-7.3, -15)), ("line", (246, 156, 170), 2, (-4.5, -7), (-7.2, -14.5)),
        ("line", "fur", 5, (3.5, -5), (4, -15)), ("line", (246, 156, 170), 2, (3.5, -7), (4, -14.5)),
        ("disc", "fur", 0, 0, 7.5), *eyes(), ("dot", (246, 130, 150), 3, 3.4, 1.3, 1),
        ("polygon", WHITE, (2, 5), (4.4, 5), (4.4, 7.4), (2, 7.4)))),
    "fox": Body(((240, 124, 36), (222, 96, 40), (236, 148, 70)), legs=(92, 48, 40), head=(
        *(("polygon", "fur", (x - 3.6, -3), (x - 0.5, -13), (x + 3.6, -4)) for x in (-5, 4.5)),
        *(("polygon", DARK, (x - 1.4, -8), (x - 0.5, -13), (x + 1, -8.5)) for x in (-5, 4.5)),
        ("polygon", "fur", (-8, -4), (-2, -7.5), (5, -6.5), (8, -2), (11, 4), (4, 7.5), (-5, 7), (-10, 4)),
        ("polygon", CREAM, (-9, 4), (-2, 2.6), (3, 5), (11, 3), (4, 7.5), (-5, 7)), *eyes(),
        ("dot", DARK, 10.4, 3.4, 1.7)),
        back=(("line", "fur", 5, (-2, 0), (-9, -3), (-12, -9)), ("line", CREAM, 4.4, (-12, -9), (-12.5, -11)))),
    "astronaut": Body((WHITE, (220, 232, 246), (248, 234, 208)), head=(
        ("disc", "fur", 0, 0, 8.6), ("disc", (36, 52, 92), 2, 0.4, 6.2, 5.4),
        ("line", (150, 200, 250), 1.5, (2.5, -2.6), (5.4, -1))),
        back=(("polygon", (150, 154, 166), (-4, -11), (-11, -10), (-11, 1), (-4, 1)),)),
    "superhero": Body(((40, 40, 96), (74, 34, 74), (52, 58, 66)), head=(
        ("disc", "fur", 0, 0, 7.5), ("polygon", FACE, (-1.5, 3), (7, 2.6), (4.6, 6.2), (0.5, 6.4)), *eyes(WHITE, 1.7),
        ("polygon", GOLD, (-3, 0), (-11, -9), (-10.5, -4), (-10, -1), (-8, 2), (-5, 3))),
        back=(("polygon", "fur", (1, -11), (-5, -10), (-16, 5), (-9, 3), (-2, 6)),)),
}
HATS = {
    "no hat": (),
    "cowboy hat": (
        ("polygon", (124, 72, 34), (-6.4, -5), (-5.6, -14), (-2, -13), (0, -12.4), (2, -13), (5.6, -14), (6.4, -5)),
        ("polygon", (60, 34, 22), (-6.4, -5), (-6.2, -7.6), (6.2, -7.6), (6.4, -5)),
        ("line", (124, 72, 34), 3, (-12, -6.4), (-7, -4.4), (7, -4.4), (12, -6.4))),
    "crown": (
        ("polygon", (255, 204, 16), (-7.8, -4), (-9, -14), (-4, -9.6), (0, -15), (4, -9.6), (9, -14), (7.8, -4)),
        *(("dot", (214, 30, 70), x, -6, 1.3) for x in (-4.2, 0, 4.2))),
}
# A race number, pinned to the chest.
NUMBER = (("patch", WHITE, (-4, -3), (4.4, -3), (4, 3), (-4.4, 3)), ("line", DARK, 1, (-2, -1.4), (-2, 1.4)),
          ("line", DARK, 1, (0.4, -1.4), (2.4, -1.4), (1, 1.4)))
# What the figure stands on.
BOARDS = {
    "skiing": tuple(("line", "gear", 2.2, (x - 18, y), (x + 14, y), (x + 17, y - 1.5), (x + 19, y - 4.5))
                    for x, y in ((-1, -0.6), (1, 2))),
    "surfing": (("polygon", "gear", (-22, -2.5), (-14, -4), (12, -4), (22, -6), (17, 0.4), (7, 2.4), (-14, 2)),
                ("line", WHITE, 1.2, (-15, -1), (14, -1.4)),
                ("polygon", DARK, (-18, 2.2), (-14, 1.8), (-17, 6))),
    "running": (),
    "skateboarding": (("line", "gear", 3, (-16, -9), (-12, -6.6), (12, -6.6), (16, -9)),
                      *(shape for x in (-8.5, 8.5)
                        for shape in (("disc", DARK, x, -2.4, 3.2), ("dot", WHITE, x, -2.4, 1.3)))),
}
# What stands beside the way because of the activity, on y = 0.
GATE = (("line", ROSE, 1.6, (-5, 0), (-5, -14)), ("line", ROSE, 1.6, (5, 0), (5, -14)),
        ("polygon", ROSE, (-5, -14), (5, -14), (5, -8), (-5, -8)))
RAMP = (("polygon", PLANK, (-13, 0), (-6, -1.4), (0, -4.4), (4, -8.6), (6, -14), (10, -14), (10, 0)),
        ("line", STEEL, 1.6, (6, -14), (10, -14)))
BESIDE = {"skiing": GATE, "surfing": (), "running": (), "skateboarding": RAMP}
