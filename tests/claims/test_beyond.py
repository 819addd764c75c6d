"""The variants beyond the paper, on a small random net."""
import pytest
import torch
from tiny import UNET, filled

from tinytav import pipeline
from tinytav.claims import beyond
from tinytav.inflation import inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig


@pytest.fixture(scope="module")
def parts():
    """A video net of 3 frames, a clip's latents, and two contexts."""
    torch.manual_seed(0)
    config = UNetConfig.from_json(UNET)
    net = inflate(filled(UNet(config)), 3)
    own, empty = torch.randn(2, 1, 5, config.cross_attention_dim)
    return net, Schedule(), torch.randn(1, 4, 3, 8, 8), own, empty


def distance(x, y):
    return (x - y).square().mean().sqrt().item()


def test_fixed_point_inversion_is_taken_back_more_exactly_than_plain_inversion(parts):
    net, schedule, latents, own, _ = parts
    errors, steps = {}, 50               # in small steps the iteration converges
    for name, walk in (("plain", pipeline.invert), ("fixed point", beyond.fixed_point)):
        noise = pipeline.last(walk(net, schedule, latents, own, steps))
        back = pipeline.last(pipeline.sample(net, schedule, noise, own, own, steps, guidance=1))
        errors[name] = distance(back, latents)
    assert errors["fixed point"] < errors["plain"] / 3


@torch.no_grad()
def test_windows_that_are_not_averaged_or_lack_the_first_frame(parts):
    net, _, _, own, _ = parts
    x, t = torch.randn(1, 4, 6, 8, 8), torch.tensor([500])
    plain, loose = (beyond.Windows(net, 6, kind) for kind in ("not averaged", "no first frame"))
    assert plain.places == [[0, 1, 2], [0, 3, 4], [0, 4, 5]]
    assert loose.places == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    a, b, c = (net(x[:, :, place], t, own)[0].unbind(1) for place in plain.places)
    torch.testing.assert_close(plain(x, t, own)[0], torch.stack([*a, b[1], b[2], c[2]], dim=1))
    a, b, c, d = (net(x[:, :, place], t, own)[0].unbind(1) for place in loose.places)
    means = [a[0], (a[1] + b[0]) / 2, (a[2] + b[1] + c[0]) / 3, (b[2] + c[1] + d[0]) / 3, (c[2] + d[1]) / 2, d[2]]
    torch.testing.assert_close(loose(x, t, own)[0], torch.stack(means, dim=1))
    assert torch.equal(pipeline.predict(loose, x, 500, own), loose(x, t, own))
    assert beyond.Windows(net, 8, "not averaged").places[-1] == [0, 6, 7]
    assert len(beyond.Windows(net, 7, "not averaged").places) == 3
