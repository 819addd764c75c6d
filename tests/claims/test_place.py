"""The experiment on changes of place: each noise is what its name says."""
from pathlib import Path

import pytest
import torch

from tinytav.claims import place
from tinytav.claims.experiment import make_clip
from tinytav.weights import load

TOY = Path(__file__).parents[2] / "weights/toy"
QUICK = dict(steps=1, lr=1e-4, ddim_steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def settings():
    return vars(load(TOY).defaults) | QUICK


def test_the_coarse_part_is_the_mean_of_each_cell():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 3, 16, 16)
    torch.testing.assert_close(place.coarse(a)[0, 1, 2, 4:8, 8:12], a[0, 1, 2, 4:8, 8:12].mean().expand(4, 4))
    exchanged = place.coarse(a) + b - place.coarse(b)
    torch.testing.assert_close(place.coarse(exchanged), place.coarse(a))


def test_each_mixed_noise_has_the_parts_that_its_name_says(settings):
    changing = place.Changing(TOY, make_clip("test", 0), settings)
    net = changing.studio.inflated()
    source, true, a, b = (changing.mixed(name, net) for name in (
        "source's noise", "true edit's noise", "coarse of the true edit, fine of the source",
        "fine of the true edit, coarse of the source"))
    torch.testing.assert_close(source, changing.studio.invert(net, changing.studio.empty))
    torch.testing.assert_close(place.coarse(a), place.coarse(true))
    torch.testing.assert_close(a - place.coarse(a), source - place.coarse(source))
    torch.testing.assert_close(place.coarse(b), place.coarse(source))
    torch.testing.assert_close(b - place.coarse(b), true - place.coarse(true))


def test_each_noise_gives_another_clip_and_the_first_is_the_methods_own(settings):
    changing = place.Changing(TOY, make_clip("test", 0), settings)
    made = {name: changing.make(name) for name in place.VARIANTS}
    names = list(made)
    for i, name in enumerate(names):
        assert made[name].shape == changing.reference("source").shape
        assert not any(torch.equal(made[name], made[other]) for other in names[:i])
    torch.testing.assert_close(made["source's noise"], changing.studio.edit(place.METHOD, place.SEED))


def test_an_edit_that_changes_nothing_has_the_sources_noise(settings):
    clip = make_clip("test", 0)
    same = [edit._replace(scene=clip.scene) for edit in clip.edits if edit.name == "place"]
    changing = place.Changing(TOY, clip._replace(edits=same), settings)
    names = [name for name in place.VARIANTS if "all named" not in name]
    first, *others = [changing.make(name) for name in names]
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-3, rtol=0)
