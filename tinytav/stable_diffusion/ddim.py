"""The diffusion process and DDIM: abar, the forward process, the step pairs, one move used in both directions.

Song et al., arXiv 2010.02502. "abar" is the cumulative product of alphas, which that paper calls alpha.
"""
from dataclasses import dataclass

import torch

from tinytav.stable_diffusion.config import Config, InputError

OFFSET = 1      # Stable Diffusion's `steps_offset`: timesteps are 1, 21, 41, ...


@dataclass(frozen=True)
class Schedule(Config):
    """scheduler/scheduler_config.json. The defaults are Stable Diffusion's.

    `steps_offset` is not read: old configs say 0, and every Stable Diffusion pipeline overrides them with 1.
    """
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"

    ONLY = dict(beta_schedule=("scaled_linear",), clip_sample=(False,), prediction_type=("epsilon", "v_prediction"),
                rescale_betas_zero_snr=(False,), set_alpha_to_one=(False,), thresholding=(False,),
                timestep_spacing=("leading",), trained_betas=(None,))

    def __post_init__(self):
        betas = torch.linspace(self.beta_start ** 0.5, self.beta_end ** 0.5, self.num_train_timesteps) ** 2
        object.__setattr__(self, "abar_table", torch.cumprod(1 - betas, dim=0))

    def abar(self, t):
        """abar at timesteps t (a tensor of ints, any shape); below 0 it is abar[0] (`set_alpha_to_one` is false)."""
        return self.abar_table[t.clamp(min=0).cpu()].to(t.device)

    def add_noise(self, x0, noise, t):
        """A draw from q(x_t | x_0), equation 4: x0 and noise (b, ...), t (b,)."""
        abar = _like(self.abar(t), x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def target(self, x0, noise, t):
        """What the net is trained to answer at t: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x0."""
        if self.prediction_type == "epsilon":
            return noise
        abar = _like(self.abar(t), x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0      # arXiv 2202.00512, appendix D

    def epsilon(self, output, x, abar):
        """The net's answer for x, which stands at abar, as noise. All that inference needs to know of v-prediction."""
        if self.prediction_type == "epsilon":
            return output
        return abar.sqrt() * output + (1 - abar).sqrt() * x

    def pairs(self, steps):
        """Sampling's moves [(t, t_next)], t falling: (981, 961), ..., (1, -19) for 50. Inversion walks them backwards.

        The stride is rounded down ("leading" spacing), so where steps do not divide 1000 the walk ends short of the
        noisiest timesteps: 334 steps begin at 667. The official code evaluates the net at t, the noisier end, in both directions (util.py, next_step).
        """
        stride = self.num_train_timesteps // max(steps, 1)
        if not 1 <= steps < self.num_train_timesteps:
            raise InputError(f"{steps} DDIM steps cannot be made of {self.num_train_timesteps} timesteps: "
                             f"use 1 to {self.num_train_timesteps - 1}.")
        return [(i * stride + OFFSET, (i - 1) * stride + OFFSET) for i in reversed(range(steps))]


def move(x, eps, abar_from, abar_to):
    """The deterministic DDIM step, equation 12 with sigma 0: x at abar_from -> x at abar_to, either direction."""
    x0 = (x - (1 - abar_from).sqrt() * eps) / abar_from.sqrt()
    return abar_to.sqrt() * x0 + (1 - abar_to).sqrt() * eps


def _like(abar, x):
    return abar.view(-1, *[1] * (x.ndim - 1))
