"""The tour: every cell runs, prints today what the notebook keeps, and shows the source as it is. tour.py runs it."""
import base64
import io
import json
import os
import re
from dataclasses import replace

import pytest
import torch
import tour
from PIL import Image

from tinytav.claims.tour import Referee, play, rows
from tinytav.toy.examples import CLIPS, MOTION

CELLS = json.loads(tour.TOUR.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
AGAIN = "The tour is behind the code. Read the text around this cell, then make its outputs anew: python tests/tour.py"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """{id of a cell: what it prints}, with a twentieth of the steps."""
    here = os.getcwd()
    yield {cell["id"]: words for cell, words, _ in tour.run(CELLS, tmp_path_factory.mktemp("tour"), faster=20)}
    os.chdir(here)


def shape(words):
    """What does not depend on the number of steps: the words without the numbers, and without what falls most."""
    words = re.sub(r"(?<=falls most: )[a-z ]+", "", words)
    return re.sub(r"[-+]?\d[\d.]*(e-\d+)?", "#", words).split()


@pytest.mark.parametrize("cell", CODE, ids=[cell["id"] for cell in CODE])
def test_a_cell_prints_what_the_tour_keeps(cell, printed):
    kept, now = tour.kept(CELLS)[cell["id"]], printed[cell["id"]]
    assert shape(now) == shape(kept), AGAIN


@pytest.mark.parametrize("cell", [cell for cell in CODE if "getsource" in tour.text(cell)], ids=lambda cell: cell["id"])
def test_the_source_is_todays(cell, printed):
    assert printed[cell["id"]] == tour.kept(CELLS)[cell["id"]], AGAIN


def test_the_first_cell_is_readmes_block():
    blocks = re.findall(r"```python\n(.*?)```", (tour.ROOT / "README.md").read_text(), flags=re.DOTALL)
    wanted = next(block for block in blocks if "tinytav.begin" in block)
    code = re.sub(r",\s+steps=STEPS, ddim_steps=DDIM\)", ")", tour.text(CODE[0]))
    assert wanted.strip().replace("\n\n", "\n") in code.replace("\n\n", "\n")


def test_the_notebook_is_small_and_holds_pictures_but_no_answer():
    assert tour.TOUR.stat().st_size < 3e6
    shown = [output["data"]["image/png"] for cell in CODE for output in cell["outputs"] if "data" in output]
    frames = [Image.open(io.BytesIO(base64.b64decode(picture))).n_frames for picture in shown]
    assert len(shown) > 8 and set(frames) == {1, 8}
    answers = tour.exercises(CELLS)
    assert len(answers) == 4 and not any(cell["outputs"] for cell in CODE if cell["id"] in answers)
    for cell in answers.values():
        assert tour.text(cell).startswith("<details><summary>") and tour.text(cell).endswith("</details>")


def test_its_links_lead_somewhere():
    words = "".join(tour.text(cell) for cell in CELLS if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\((.*?)\)", words) if not link.startswith("https://")]
    assert links and all((tour.TOUR.parent / link).is_file() for link in links)


# ---- What it shows and asks with -----------------------------------------------------------------

GREYS = torch.arange(8) / 4 - 1         # of the frames of a clip


def grey(values):
    """A clip of one-coloured frames (f, 3, 128, 128)."""
    return values.view(-1, 1, 1, 1).expand(-1, 3, 128, 128)


def seen(picture, x, y):
    """The grey at a place of a picture, in [-1, 1]."""
    return picture.convert("L").getpixel((x, y)) / 127.5 - 1


def test_rows_show_the_first_and_the_last_frame_and_two_between_below_each_title():
    picture = rows({"up": grey(GREYS), "down": grey(GREYS.flip(0))})
    height = picture.height // 2
    for top, values in ((0, GREYS), (height, GREYS.flip(0))):
        for column, frame in enumerate((0, 2, 5, 7)):
            assert abs(seen(picture, 131 * column + 64, top + height - 64) - values[frame]) < 0.01
        title = picture.crop((0, top, picture.width, top + height - 128))
        assert title.getextrema() == ((0, 255),) * 3                    # black letters on white


def test_a_played_clip_has_its_frames_in_order_beside_the_other():
    picture = Image.open(io.BytesIO(play({"up": grey(GREYS), "down": grey(GREYS.flip(0))})._repr_png_()))
    assert picture.n_frames == 8 and picture.info["loop"] == 0 and picture.info["duration"] == 125
    for frame in range(8):
        picture.seek(frame)
        assert abs(seen(picture, 128, picture.height - 64) - GREYS[frame]) < 0.03
        assert abs(seen(picture, 259 + 128, picture.height - 64) - GREYS[7 - frame]) < 0.03


@pytest.fixture(scope="module")
def referee():
    scene = replace(CLIPS["skiing"], place="desert")
    return Referee(MOTION, scene, "place"), scene


def test_the_referee_asks_what_its_questions_say(referee):
    referee, scene = referee
    def shares(**other):
        return list(referee.shares(referee.draw(replace(scene, **other))).values())
    assert shares() == [100, 100, 100, 100]
    assert shares(place="snow") == [0, 100, 100, 100]
    assert shares(clothes="blue", hat="crown") == [100, 50, 100, 100]
    turns = referee.draw(scene).clone()
    turns[::2] = referee.draw(replace(scene, clothes="blue"))[::2]
    edited, kept, agreement, motion = referee.shares(turns).values()
    assert (edited, kept, motion) == (100, 87.5, 100) and 93 < agreement < 96          # clothes are one of nine parts
    still = referee.draw(scene)[:1].expand(8, -1, -1, -1)
    assert referee.shares(still)["motion"] < 50


@pytest.mark.parametrize("change, answer", [({}, "nothing"), (dict(hat="crown"), "unsaid kept"),
                                            (dict(place="moon"), "edit right")])
def test_the_referee_answers_what_falls_most(referee, change, answer, capsys):
    referee, scene = referee
    referee.answer("motion", referee.draw(scene), referee.draw(replace(scene, **change)))
    assert capsys.readouterr().out.endswith(f"\nWhat falls most: {answer}. You guessed: motion.\n")
    with pytest.raises(ValueError, match="'speed' is no guess"):
        referee.answer("speed", referee.draw(scene), referee.draw(scene))
