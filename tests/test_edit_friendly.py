"""Edit-friendly noise, on a small random net."""
import pytest
import tiny
import torch

from tinytav import edit_friendly, pipeline
from tinytav.inflation import inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig

STEPS = 10


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def parts(request):
    """A video net of 3 frames, a schedule, a clip's latents, and two contexts."""
    torch.manual_seed(0)
    config = UNetConfig.from_json(tiny.UNET)
    net = inflate(tiny.filled(UNet(config)), 3)
    own, other = torch.randn(2, 1, 5, config.cross_attention_dim)
    return net, Schedule(prediction_type=request.param), torch.randn(1, 4, 3, 8, 8), own, other


def edited(net, schedule, inverted, context, empty, guidance):
    return pipeline.last(edit_friendly.sample(net, schedule, inverted, context, empty, guidance))


def test_under_its_own_caption_the_clip_comes_back(parts):
    net, schedule, latents, own, other = parts
    inverted = list(edit_friendly.invert(net, schedule, latents, own, STEPS, seed=0))
    back = edited(net, schedule, inverted, own, other, 1)
    torch.testing.assert_close(back, latents, atol=1e-4, rtol=1e-4)
    assert (edited(net, schedule, inverted, other, own, 3) - latents).abs().max() > 1e-2


def test_several_prompts_at_once_give_what_each_gives_alone(parts):
    net, schedule, latents, own, other = parts
    inverted = list(edit_friendly.invert(net, schedule, latents, own, STEPS, seed=0))
    empty = torch.zeros_like(own)
    both = edited(net, schedule, inverted, torch.cat([own, other]), torch.cat([empty, empty]), 3)
    for x, context in zip(both, (own, other)):
        torch.testing.assert_close(x[None], edited(net, schedule, inverted, context, empty, 3), atol=1e-4, rtol=1e-4)


def test_the_noisiest_third_of_the_steps_is_skipped_and_the_seed_makes_the_noise(parts):
    net, schedule, latents, own, _ = parts
    first, same, other = (list(edit_friendly.invert(net, schedule, latents, own, STEPS, seed)) for seed in (0, 0, 1))
    assert len(first) == edit_friendly.count(STEPS) == 6
    assert [(step.t, step.t_next) for step in first] == schedule.pairs(STEPS)[4:]
    assert torch.equal(first[0].x, same[0].x) and torch.equal(first[-1].noise, same[-1].noise)
    assert not torch.equal(first[0].x, other[0].x)
    independent = [schedule.add_noise(latents, pipeline.gaussian(latents.shape, i), step.t)
                   for i, step in enumerate(first, STEPS - 6)]
    assert all(torch.equal(step.x, x) for step, x in zip(first, independent))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_step_is_ddpms_posterior(prediction):
    """Mean and variance of q(x_s | x_t, x_0), Ho et al., arXiv 2006.11239, equations 6 and 7; t = 501, s = 461."""
    schedule, (x0, noise) = Schedule(prediction_type=prediction), torch.randn(2, 1, 4, 3, 8, 8)
    abar, abar_s = schedule.abar(501), schedule.abar(461)
    alpha = abar / abar_s
    x = schedule.add_noise(x0, noise, 501)
    mean, std = edit_friendly.ddpm_step(schedule, x, schedule.target(x0, noise, 501), 501, 461)
    expected = (abar_s.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - abar_s) * x) / (1 - abar)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)
    assert std ** 2 == pytest.approx(((1 - abar_s) / (1 - abar) * (1 - alpha)).item())
