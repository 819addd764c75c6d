"""What tinytav/tour.ipynb shows and asks with: rows of frames (claims draw them, too), clips that move, and a referee.

A notebook shows what has a `_repr_png_`, as PIL's pictures have. So nothing here needs Jupyter.
"""
import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinytav.claims.clips import said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.files.frames import enlarged, strip_columns, to_uint8
from tinytav.toy.world import ATTRIBUTES

COLUMNS = 4                     # frames in a row
LETTERS, LINE = 15, 20          # pixels: of letters, and from one line of them to the next
WIDTH, GAP = 384, 3             # pixels: of all clips that play side by side, at least; between two pictures
FPS = 8
QUESTIONS = ("edit right", "unsaid kept", "agreement", "motion")
LEAST = 5                       # per cent: a smaller fall says nothing


def titled(title, picture, lines=1):
    """A picture (h, w, 3) uint8 below a title that has room for so many lines -> (h', w, 3) uint8."""
    head = Image.new("RGB", (picture.shape[1], LINE * lines + 4), "white")
    text = "\n".join(wrapped(title, picture.shape[1]))
    ImageDraw.Draw(head).multiline_text((2, 0), text, "black", ImageFont.load_default(LETTERS))
    return np.concatenate([np.asarray(head), picture])


def wrapped(title, width):
    return textwrap.wrap(title, width // 8)


def in_a_row(pictures):
    """Pictures (n, h, w, 3) uint8 -> one picture, with white between them."""
    return np.concatenate(list(np.pad(pictures, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)), axis=1)


def rows(clips):
    """{title: frames (f, 3, h, w)}, all of one shape -> a PIL picture: four frames of each clip below its title."""
    strips = [in_a_row(to_uint8(x[strip_columns(len(x), COLUMNS)]).numpy()) for x in clips.values()]
    return Image.fromarray(np.concatenate([titled(*row) for row in zip(clips, strips)]))


def play(clips):
    """{title: frames (f, 3, h, w)}, all of one shape -> the clips side by side, each below its title, as a Moving."""
    shown = [enlarged(x, WIDTH // len(clips)) for x in clips.values()]
    lines = max(len(wrapped(title, shown[0].shape[2])) for title in clips)
    return Moving([in_a_row([titled(title, x[i], lines) for title, x in zip(clips, shown)])
                   for i in range(len(shown[0]))])


class Moving:
    """Pictures (h, w, 3) uint8 that a browser plays, as an animated PNG."""

    def __init__(self, pictures):
        # One palette of 256 colours for all of them makes the file four times smaller.
        palette = Image.fromarray(np.concatenate(pictures)).quantize(kmeans=1)
        self.first, *self.rest = [Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)
                                  for picture in pictures]

    def _repr_png_(self):
        file = io.BytesIO()
        self.first.save(file, "PNG", save_all=True, append_images=self.rest, duration=1000 / FPS, loop=0)
        return file.getvalue()


class Referee:
    """Compares edits of one clip with the truth, by the judge. scene: the true edit. edited: the changed attribute."""

    def __init__(self, motion, scene, edited, frames=8):
        self.drawings, self.scene, self.edited = Judge(motion, frames), scene, edited
        self.said = said("user", (edited,))

    def draw(self, scene):
        """A scene in the clip's motion: frames (f, 3, h, w) in [-1, 1]."""
        return self.drawings.draw(scene)

    def shares(self, x):
        """Frames (f, 3, h, w) -> {question: per cent of the frames}, as claims/README.md defines them."""
        answers = self.drawings.answers(x, self.scene, self.said)
        unsaid = [answers[name] for name in ATTRIBUTES if name not in self.said]
        return {"edit right": 100 * answers[self.edited], "unsaid kept": 100 * np.mean(unsaid),
                "agreement": 100 * answers["agreement"], "motion": 100 * np.mean([answers[part] for part in MOTIONS])}

    def judge(self, clips):
        """{name: frames} -> {name: shares}. Prints them."""
        found = {name: self.shares(x) for name, x in clips.items()}
        print(f"{'% of the frames':22}" + "".join(f"{question:>12}" for question in QUESTIONS))
        for name, shares in found.items():
            print(f"{name:22}" + "".join(f"{share:12.0f}" for share in shares.values()))
        return found

    def answer(self, guess, before, after):
        """Which share falls most from the clip `before` to the clip `after`? Prints both, and how the guess did.

        Raises ValueError for a guess that is neither one of QUESTIONS nor "nothing".
        """
        if guess not in (*QUESTIONS, "nothing"):
            raise ValueError(f"{guess!r} is no guess: write {', '.join(QUESTIONS)} or nothing.")
        before, after = self.judge({"before": before, "after": after}).values()
        falls = {question: before[question] - after[question] for question in QUESTIONS}
        most = max(falls, key=falls.get)
        if falls[most] < LEAST:
            most = "nothing"
        print(f"What falls most: {most}. You guessed: {guess}.")
