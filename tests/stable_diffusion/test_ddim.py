"""The diffusion process and DDIM's two directions; equality with diffusers stands in test_reference.py."""
import pytest
import torch

from tinytav.errors import InputError
from tinytav.stable_diffusion import ddim
from tinytav.stable_diffusion.ddim import Schedule


@pytest.mark.parametrize("steps", [1, 4, 50, 999])
def test_sampling_undoes_inversion_where_the_noise_is_the_same(steps):
    schedule, x0 = Schedule(), torch.randn(1, 4, 2, 4, 4, dtype=torch.double)
    noises = torch.randn(steps, *x0.shape, dtype=torch.double)
    pairs = schedule.pairs(steps)
    x = x0
    for i in reversed(range(steps)):
        t, t_next = pairs[i]
        x = ddim.move(x, noises[i], schedule.abar(t_next).double(), schedule.abar(t).double())
    assert (x - x0).abs().max() > 0.01
    for i in range(steps):
        t, t_next = pairs[i]
        x = ddim.move(x, noises[i], schedule.abar(t).double(), schedule.abar(t_next).double())
    torch.testing.assert_close(x, x0)


def test_the_walk_visits_the_official_timesteps():
    assert Schedule().pairs(50)[:2] == [(981, 961), (961, 941)] and Schedule().pairs(50)[-1] == (1, -19)
    assert Schedule().abar(-19) == Schedule().abar_table[0]


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match="steps"):
        Schedule().pairs(steps)


@pytest.mark.parametrize("settings", [
    dict(timestep_spacing="trailing"), dict(set_alpha_to_one=True), dict(clip_sample=True), dict(thresholding=True),
    dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"), dict(steps_offset=0),
    dict(_class_name="EulerDiscreteScheduler", use_karras_sigmas=True)])
def test_the_settings_of_another_sampler_change_nothing(settings):
    assert Schedule.from_json(settings) == Schedule()
    assert Schedule.from_json(settings).pairs(50) == Schedule().pairs(50)


@pytest.mark.parametrize("settings, name", [
    (dict(beta_schedule="linear"), "beta_schedule"), (dict(trained_betas=[0.1, 0.2]), "trained_betas"),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr"), (dict(prediction_type="sample"), "prediction_type")])
def test_other_betas_and_predictions_are_refused_by_name(settings, name):
    with pytest.raises(InputError, match=name):
        Schedule.from_json(settings)


def test_other_values_of_the_betas_are_followed():
    assert Schedule.from_json(dict(beta_end=0.02)).abar(999) < Schedule().abar(999)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_target_and_epsilon_are_inverse_to_each_other(prediction):
    schedule = Schedule(prediction_type=prediction)
    x0, noise = torch.randn(2, 1, 4, 2, 4, 4).unbind()
    x = schedule.add_noise(x0, noise, 700)
    eps = schedule.epsilon(schedule.target(x0, noise, 700), x, schedule.abar(700))
    torch.testing.assert_close(eps, noise, atol=1e-5, rtol=0)


def test_one_timestep_and_a_batch_of_timesteps_mean_the_same():
    schedule = Schedule()
    x0, noise = torch.randn(2, 2, 4, 2, 4, 4).unbind()
    both = schedule.add_noise(x0, noise, torch.tensor([3, 801]))
    for i, t in enumerate((3, 801)):
        assert torch.equal(both[i], schedule.add_noise(x0[i], noise[i], t))
