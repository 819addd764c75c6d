"""DDIM's two directions, and the tuning loop's promises."""
import pytest
import torch

from tiny import UNET, filled
from tinytav.stable_diffusion import ddim
from tinytav import pipeline, tuning
from tinytav.files import runs
from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.inflation import inflate
from tinytav.stable_diffusion.unet import UNet, UNetConfig

PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def setting(seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = filled(inflate(filled(UNet(UNetConfig.from_json(UNET))), 3))
    return net, torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator).split(1)


@pytest.mark.parametrize("steps", [1, 4, 50, 999])
def test_sampling_undoes_inversion_where_the_noise_is_the_same(steps):
    schedule, x0 = Schedule(), torch.randn(1, 4, 2, 4, 4, dtype=torch.double)
    x, noises = x0, torch.randn(steps, *x0.shape, dtype=torch.double)
    pairs = schedule.pairs(steps)
    for up in (True, False):
        for i, (t, t_next) in reversed(list(enumerate(pairs))) if up else enumerate(pairs):
            noisy, clean = (schedule.abar(torch.tensor([s])).double() for s in (t, t_next))
            x = ddim.move(x, noises[i], clean, noisy) if up else ddim.move(x, noises[i], noisy, clean)
        assert up == bool((x - x0).abs().max() > 0.01)
    torch.testing.assert_close(x, x0)


@PREDICTIONS
@torch.no_grad()
def test_with_a_real_net_reconstruction_improves_with_steps(prediction):
    net, x0, (empty, _) = setting()
    net.conv_out.weight *= 0.2          # filled weights make a rougher function than a trained net is
    errors = []
    for steps in (5, 20, 80):
        x_T = pipeline.last(pipeline.invert(net, Schedule(prediction_type=prediction), x0, empty, steps))
        x = pipeline.last(pipeline.sample(net, Schedule(prediction_type=prediction), x_T, empty, empty, steps, 1))
        errors.append((x - x0).square().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05 * x0.square().mean()


def test_the_walk_visits_the_official_timesteps():
    assert Schedule().pairs(50)[:2] == [(981, 961), (961, 941)] and Schedule().pairs(50)[-1] == (1, -19)
    assert Schedule().abar(torch.tensor([-19])) == Schedule().abar_table[0]
    assert Schedule.from_json(dict(steps_offset=0)).pairs(50) == Schedule().pairs(50)      # an old config


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match="steps"):
        Schedule().pairs(steps)


@PREDICTIONS
def test_target_and_epsilon_are_inverse_to_each_other(prediction):
    schedule, t = Schedule(prediction_type=prediction), torch.tensor([700])
    x0, noise = torch.randn(2, 1, 4, 2, 4, 4).unbind()
    x = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.epsilon(schedule.target(x0, noise, t), x, schedule.abar(t)), noise,
                               atol=1e-5, rtol=0)


def test_guidance_mixes_the_two_answers():
    net, x, (empty, context) = setting()
    schedule = Schedule()

    def one_step(guidance):
        return pipeline.last(pipeline.sample(net, schedule, x, context, empty, 1, guidance))
    difference = one_step(1) - one_step(0)
    torch.testing.assert_close(one_step(5), one_step(0) + 5 * difference, atol=1e-3, rtol=1e-3)


def test_a_steps_randomness_is_a_function_of_seed_and_step():
    first = tuning.draw(33, 5, (1, 4, 3, 8, 8), 1000)
    torch.randn(100)
    assert all(torch.equal(a, b) for a, b in zip(first, tuning.draw(33, 5, (1, 4, 3, 8, 8), 1000)))
    for seed, k in ((33, 6), (34, 5)):
        assert not torch.equal(first[0], tuning.draw(seed, k, (1, 4, 3, 8, 8), 1000)[0])
    assert not torch.equal(tuning.draw(33, 6, (1,), 1000)[0], tuning.draw(34, 5, (1,), 1000)[0])
    assert not torch.equal(first[0], first[1])


def test_resuming_equals_not_having_stopped():
    results = []
    for stops in ((6,), (2, 6)):
        net, mean, (context, _) = setting()
        optimizer, losses = tuning.adamw(net.tuned(), lr=1e-2), []
        for stop in stops:
            losses += [loss for _, loss in tuning.tune(net, optimizer, Schedule(), mean, 0.1 * mean.abs(), context, 7,
                                                       len(losses), stop)]
            state = {name: z.clone() for name, z in runs.state_dict(net, optimizer, losses).items()}
            net, *_ = setting()
            optimizer = tuning.adamw(net.tuned(), lr=1e-2)
            losses = runs.load_state_dict(net, optimizer, state)
        results.append(state)
    assert results[0]["step"] == 6
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_spoils_the_weights(spoilt):
    net, mean, (context, _) = setting()
    optimizer = tuning.adamw(net.tuned(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in net.tuned().items()}
    if spoilt == "gradient":
        next(iter(net.tuned().values())).register_hook(lambda gradient: gradient * float("nan"))
    else:
        mean = mean * float("nan")
    with pytest.raises(InputError, match="step 1.*--lr"):
        list(tuning.tune(net, optimizer, Schedule(), mean, torch.ones_like(mean), context, steps=2))
    assert all(torch.equal(p, before[name]) for name, p in net.tuned().items())


def test_tuning_is_the_official_recipe():
    """Three steps against a plain loop: a draw of the posterior, other noise, clipped gradients, AdamW's constants."""
    (net, mean, (context, _)), (plain, *_) = setting(), setting()
    for same in (net, plain):
        same.conv_out.weight *= 20              # gradients large enough to be clipped
    for _ in tuning.tune(net, tuning.adamw(net.tuned(), lr=1e-2), Schedule(), mean, 0.5 + mean.abs(), context, seed=7, steps=3):
        pass
    parameters = [p.requires_grad_() for p in plain.tuned().values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for k in range(3):
        posterior, noise, t = tuning.draw(7, k, mean.shape, 1000)
        abar = Schedule().abar_table[t]
        x0 = mean + (0.5 + mean.abs()) * posterior
        loss = (plain(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t, context) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 1          # or clipping would not be seen
        optimizer.step()
    for name, p in plain.tuned().items():
        torch.testing.assert_close(net.tuned()[name], p, atol=1e-6, rtol=1e-5)
