"""The tuning loop's promises; a whole official run stands in test_reference.py."""
import pytest
import torch
from tiny import UNET, filled

from tinytav import tuning
from tinytav.errors import InputError
from tinytav.inflation import inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.tuning import Tuner


def setting(dtype=torch.float32):
    """A net of 3 frames, the mean of a clip's latents and a context; always the same."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    unet = filled(UNet(UNetConfig.from_json(UNET))).to(dtype)
    net = filled(inflate(unet, 3))
    mean = torch.randn(1, 4, 3, 8, 8, generator=generator)
    context = torch.randn(1, 7, 24, generator=generator)
    return net, mean, context


def make_tuner(lr=1e-2, seed=7, dtype=torch.float32):
    net, mean, context = setting(dtype)
    return Tuner(net, Schedule(), mean, 0.1 * mean.abs(), context, lr, seed)


def test_a_steps_randomness_is_a_function_of_seed_and_step():
    shape = (1, 4, 3, 8, 8)
    posterior, noise, t = tuning.draw(33, 5, shape, 1000)
    torch.randn(100)
    again = tuning.draw(33, 5, shape, 1000)
    assert torch.equal(posterior, again[0]) and torch.equal(noise, again[1]) and t == again[2]
    for seed, k in ((33, 6), (34, 5)):
        assert not torch.equal(posterior, tuning.draw(seed, k, shape, 1000)[0])
    assert not torch.equal(tuning.draw(33, 6, (1,), 1000)[0], tuning.draw(34, 5, (1,), 1000)[0])
    assert not torch.equal(posterior, noise)


def test_resuming_equals_not_having_stopped():
    states = []
    for stops in ((6,), (2, 6)):
        tuner = make_tuner()
        for stop in stops:
            while len(tuner.losses) < stop:
                tuner.step()
            state = {name: tensor.clone() for name, tensor in tuner.state_dict().items()}
            tuner = make_tuner()
            tuner.load_state_dict(state)
        states.append(state)
    assert states[0]["losses"].shape == (6,)
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


def test_a_state_of_another_net_is_refused():
    tuner = make_tuner()
    tuner.step()
    state = tuner.state_dict()
    name = next(name for name in state if name.startswith("tuned."))
    for spoilt in (state | {name: state[name][:1]}, {k: v for k, v in state.items() if k != name}, {}):
        with pytest.raises(InputError, match="does not fit"):
            make_tuner().load_state_dict(spoilt)


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_spoils_the_weights(spoilt):
    tuner = make_tuner()
    before = {name: p.detach().clone() for name, p in tuner.parameters.items()}
    if spoilt == "gradient":
        next(iter(tuner.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
    else:
        tuner.mean = tuner.mean * float("nan")
    with pytest.raises(InputError, match="step 1.*--lr"):
        tuner.step()
    assert all(torch.equal(p, before[name]) for name, p in tuner.parameters.items())
    assert tuner.losses == []


def test_an_overflow_in_fp16_halves_the_scale_and_makes_the_same_step(monkeypatch):
    """Gradients overflow above a scale of 1000. The result is that of a run which began below it, and is resumable."""
    def run(first_scale, stops):
        monkeypatch.setattr(tuning, "FP16_SCALE", first_scale)
        tuner = make_tuner(lr=1e-3, dtype=torch.float16)
        for stop in stops:
            for p in tuner.parameters.values():
                p.register_hook(lambda gradient, tuner=tuner: gradient * (float("inf") if tuner.scale > 1000 else 1))
            while len(tuner.losses) < stop:
                tuner.step()
            state = {name: tensor.clone() for name, tensor in tuner.state_dict().items()}
            tuner = make_tuner(lr=1e-3, dtype=torch.float16)
            tuner.load_state_dict(state)
            assert tuner.scale == state["scale"]
        return state
    begun_low, overflowed, resumed = run(512., [4]), run(65536., [4]), run(65536., [1, 4])
    assert begun_low["scale"] == overflowed["scale"] == resumed["scale"] == 512
    for name in begun_low:
        assert torch.equal(begun_low[name], overflowed[name]), name
        assert torch.equal(overflowed[name], resumed[name]), name


def test_the_scale_of_fp16_is_taken_out_of_the_gradients_again():
    gradients = []
    for scale in (1., 256.):
        tuner = make_tuner(dtype=torch.float16)
        tuner.net.conv_out.weight *= 0.01           # gradients so small that clipping does not hide their scale
        tuner.scale = scale
        assert tuner.backward(tuner.loss())
        gradients.append(torch.cat([p.grad.flatten() for p in tuner.parameters.values()]))
    assert gradients[0].norm() < 0.5
    torch.testing.assert_close(gradients[1].norm(), gradients[0].norm(), rtol=0.05, atol=0)


def test_the_state_of_a_float32_run_leaves_fp16_its_scale():
    tuner = make_tuner()
    tuner.step()
    half = make_tuner(dtype=torch.float16)
    half.load_state_dict(tuner.state_dict())
    assert half.scale == tuning.FP16_SCALE


def test_in_fp16_a_net_that_overflows_at_every_scale_ends_with_a_sentence():
    tuner = make_tuner(dtype=torch.float16)
    next(iter(tuner.parameters.values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(InputError, match="--precision fp32"):
        tuner.step()
    assert tuner.scale == 1


def test_strength_is_the_share_of_the_change_that_a_net_takes():
    before = {name: p.clone() for name, p in setting()[0].tuned().items()}
    tuned = {name: p + torch.randn_like(p) for name, p in before.items()}
    for strength in (0, 0.5, 1, 1.5):
        net = setting()[0]
        tuning.blend(net.tuned(), tuned, strength)
        for name, p in net.tuned().items():
            exact = {0: before, 1: tuned}.get(strength)
            wanted = exact[name] if exact else before[name] + strength * (tuned[name] - before[name])
            torch.testing.assert_close(p, wanted, **(dict(rtol=0, atol=0) if exact else {}))


def test_tuning_is_the_official_recipe():
    """Three steps against a plain loop: a draw of the posterior, other noise, clipped gradients, AdamW's constants."""
    (net, mean, context), (plain, *_) = setting(), setting()
    for same in (net, plain):
        same.conv_out.weight *= 20              # gradients large enough to be clipped
    for _ in tuning.tune(net, Schedule(), mean, 0.5 + mean.abs(), context, steps=3, lr=1e-2, seed=7):
        pass
    parameters = [p.requires_grad_() for p in plain.tuned().values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for k in range(3):
        posterior, noise, t = tuning.draw(7, k, mean.shape, 1000)
        abar = Schedule().abar_table[t]
        x0 = mean + (0.5 + mean.abs()) * posterior
        answer = plain(abar.sqrt() * x0 + (1 - abar).sqrt() * noise, torch.tensor([t]), context)
        optimizer.zero_grad()
        (answer - noise).square().mean().backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 1.0) > 1          # or clipping would not be seen
        optimizer.step()
    for name, p in plain.tuned().items():
        torch.testing.assert_close(net.tuned()[name], p, atol=5e-6, rtol=1e-5)     # AdamW divides by small numbers
