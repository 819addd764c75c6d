"""The method works on the weights that lie here: an edit moves towards its prompt and keeps the clip's motion."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinytav.toy.examples import CLIPS, MOTION
from tinytav.toy.experiment import Clip, Edit, Studio, Variant
from tinytav.toy.judge import MOTIONS

SCENE = CLIPS["skiing"]
EDITS = [Edit("subject", replace(SCENE, subject="panda")), Edit("place", replace(SCENE, place="beach"))]


@pytest.fixture(scope="module")
def studio():
    settings = dict(steps=40, lr=1e-3, ddim_steps=20, guidance=4.)
    return Studio(Path(__file__).parents[2] / "weights/toy", Clip(SCENE, MOTION, EDITS), settings)


def test_an_edit_moves_towards_its_prompt_and_keeps_the_motion(studio):
    source = studio.score(torch.stack([studio.source] * len(EDITS)))
    for before, after in zip(source, studio.score(studio.edit(Variant(), seed=33))):
        assert before["edited"] < 0.2 and after["edited"] > 0.6
        assert after["text"] > before["text"] + 5
        assert all(after[part] > 0.6 for part in MOTIONS), after


def test_without_inversion_the_motion_is_lost(studio):
    scores = studio.score(studio.edit(Variant(inverted=False), seed=33))
    assert sum(score[part] for score in scores for part in MOTIONS) / (len(scores) * len(MOTIONS)) < 0.6
