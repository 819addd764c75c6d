"""What there is to draw in the toy world, and how it is said: scenes, views, motions and captions.

A *scene* says what is in the picture, a *view* where it stands at one moment; `draw.render` needs both.  Editing a
clip means changing words of its scene and keeping its views, so the true answer to every edit can be drawn.
"""
from dataclasses import asdict, dataclass, replace
from random import Random

# Every attribute with all its values.  The values are words of the caption, the order is the caption's order.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": ("man", "woman", "panda", "robot", "rabbit", "fox", "astronaut", "superhero"),
    "clothes": ("red", "yellow", "green", "blue", "purple", "pink"),
    "hat": ("no hat", "cowboy hat", "crown"),
    "activity": ("skiing", "surfing", "running", "skateboarding"),
    "place": ("snow", "beach", "desert", "moon", "grass", "street"),
    "time": ("day", "sunset", "night"),
    "style": ("plain", "comic", "sketch"),
}
# What no caption names: for each part of a look, how many variants of it can be drawn.
LOOKS: dict[str, int] = {"fur": 3, "gear": 3, "shoes": 2, "prop": 2, "sky": 3}

# What a picture shows when its caption does not say otherwise.  Real captions are like that: nobody writes "by day".
USUAL = {"hat": "no hat", "time": "day", "style": "plain"}
USUALLY = 0.6   # share of the scenes in which such an attribute has its usual value
GIST = ("subject", "activity", "place")   # what the shortest captions name

TEMPLATES = {"subject": "a {}", "clothes": "{} clothes", "hat": "a {}", "activity": "{}", "place": "on the {}",
             "time": "at {}", "style": "{} style"}
EXCEPTIONS = {"astronaut": "an astronaut", "no hat": "no hat", "desert": "in the desert", "day": "by day"}


@dataclass(frozen=True)
class Look:
    """All the caption leaves unsaid, constant within a clip; each part counts from 0 up to its entry in LOOKS."""
    fur: int = 0     # shade of the skin, the fur, the metal or the suit
    gear: int = 0    # colour of the skis or the board
    shoes: int = 0   # colour of the shoes
    prop: int = 0    # which of the place's two kinds of prop stands along the way
    sky: int = 0     # tint of the sky


@dataclass(frozen=True)
class Scene:
    """What is in the picture: one value of each attribute, and a look."""
    subject: str
    clothes: str
    hat: str
    activity: str
    place: str
    time: str
    style: str
    look: Look = Look()


@dataclass(frozen=True)
class View:
    """Where everything stands at one moment.  With the activity it fixes the picture's whole geometry."""
    camera: float   # how far the background has passed, in spacings between two props
    x: float        # where the figure stands, in picture widths from the left
    size: float     # the figure's size; at 1 it is a little over half the picture high
    phase: float    # how far the limbs are through their cycle, in [0, 1)


@dataclass(frozen=True)
class Motion:
    """A clip's first view, and by how much each part of the view changes over the whole clip."""
    start: View
    travel: float   # change of camera; less than one spacing, so that no prop can be taken for its neighbour
    drift: float    # change of x
    growth: float   # change of size
    cycles: float   # change of phase; at most one cycle, so that no pose comes back


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's (subject, activity, place) is one of the tenth never trained on, spread over all values."""
    subject, activity, place = (ATTRIBUTES[name].index(getattr(scene, name))
                                for name in ("subject", "activity", "place"))
    return (subject + 2 * activity + 3 * place) % 10 == 5


def random_value(name: str, rng: Random) -> str:
    """A value of an attribute: uniform, but where one is usual it is drawn more often than the others."""
    usual = USUAL.get(name)
    if usual and rng.random() < USUALLY:
        return usual
    return rng.choice([value for value in ATTRIBUTES[name] if value != usual])


def random_scene(rng: Random, held_out: bool = False) -> Scene:
    """A scene of random values with a random look, among the held out ones or among the others."""
    while True:
        look = Look(**{part: rng.randrange(variants) for part, variants in LOOKS.items()})
        scene = Scene(**{name: random_value(name, rng) for name in ATTRIBUTES}, look=look)
        if is_held_out(scene) == held_out:
            return scene


def changed(scene: Scene, name: str, rng: Random) -> Scene:
    """The scene with another value of one attribute."""
    others = [value for value in ATTRIBUTES[name] if value != getattr(scene, name)]
    return replace(scene, **{name: rng.choice(others)})


def random_view(rng: Random) -> View:
    """A view with the figure near the middle, at any moment; after 16 spacings the slow skyline is back as well."""
    return View(camera=rng.uniform(0, 16), x=rng.uniform(0.4, 0.6), size=rng.uniform(1.05, 1.2), phase=rng.random())


def random_motion(rng: Random) -> Motion:
    """A motion in which the background passes visibly, the limbs move visibly and the figure drifts a little."""
    return Motion(random_view(rng), travel=rng.uniform(0.3, 0.9), drift=rng.uniform(-0.06, 0.06),
                  growth=rng.uniform(-0.05, 0.05), cycles=rng.uniform(0.5, 1))


def views(motion: Motion, frames: int) -> list[View]:
    """The views of a clip's frames, evenly spaced over [0, 1) of the motion."""
    first = motion.start
    return [View(first.camera + motion.travel * t, first.x + motion.drift * t, first.size + motion.growth * t,
                 (first.phase + motion.cycles * t) % 1) for t in (frame / frames for frame in range(frames))]


def named(scene: Scene, rng: Random) -> tuple[str, ...]:
    """Which attributes a caption names: all of them, most of them, or, every second time, little but the gist.

    Unless it names all, it leaves out most of what is usual and hardly ever leaves out what is not.  So silence about
    hat, time or style means the usual value in 98 of 100 captions, and silence about clothes means any colour.
    """
    manner = rng.random()
    if manner < 0.2:
        return tuple(ATTRIBUTES)
    short = manner < 0.7
    shares = dict.fromkeys(ATTRIBUTES, 0.3 if short else 0.8)       # how often the caption names each attribute
    shares |= dict.fromkeys(GIST, 1.0 if short else 0.8)
    shares |= {name: 0.1 if getattr(scene, name) == usual else 0.98 for name, usual in USUAL.items()}
    return tuple(name for name in ATTRIBUTES if rng.random() < shares[name]) or ("subject",)


def caption(scene: Scene, rng: Random | None = None, keep: tuple[str, ...] | None = None) -> str:
    """The scene in words: all of it, only the attributes in `keep`, or, with rng, those that a caption names.

    With rng, the word "is" is dropped now and then.
    """
    if keep is None:
        keep = tuple(ATTRIBUTES) if rng is None else named(scene, rng)
    values = {name: value for name, value in asdict(scene).items() if name in keep}
    said = {name: EXCEPTIONS.get(value) or TEMPLATES[name].format(value) for name, value in values.items()}
    if "activity" in said and (rng is None or rng.random() < 0.75):
        said["activity"] = "is " + said["activity"]
    worn = " and ".join(said[name] for name in ("clothes", "hat") if name in said)
    parts = [said.get("subject", "someone"), worn and f"wearing {worn}"]
    parts += [said.get(name) for name in ("activity", "place", "time")]
    return " ".join(filter(None, parts)) + (f", {said['style']}" if "style" in said else "")
