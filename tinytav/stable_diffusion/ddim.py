"""The diffusion process and DDIM: abar, the forward process, the pairs of timesteps, one move used in both directions.

Song et al., arXiv 2010.02502. "abar" is the cumulative product of the alphas; that paper calls it alpha.
"""
from dataclasses import dataclass

import torch

from tinytav.errors import InputError
from tinytav.stable_diffusion.config import Config

OFFSET = 1      # Stable Diffusion's `steps_offset`: timesteps are 1, 21, 41, ...


@dataclass(frozen=True)
class Schedule(Config):
    """The betas and the prediction type of scheduler/scheduler_config.json. The defaults are Stable Diffusion's.

    The file's other settings (spacing, offset, clipping, solver) describe its author's sampler. The sampler here is our
    own, so they are not read.
    """
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"

    ONLY = dict(beta_schedule=("scaled_linear",), trained_betas=(None,), rescale_betas_zero_snr=(False,),
                prediction_type=("epsilon", "v_prediction"))

    def __post_init__(self):
        betas = torch.linspace(self.beta_start ** 0.5, self.beta_end ** 0.5, self.num_train_timesteps) ** 2
        object.__setattr__(self, "abar_table", torch.cumprod(1 - betas, dim=0))

    def abar(self, t):
        """abar at timestep t. Below 0 it is abar[0], as with set_alpha_to_one=False in diffusers.

        An int gives a scalar tensor on the CPU, which mixes with tensors on any device. Timesteps (b,) give (b,) on
        their own device.
        """
        if isinstance(t, int):
            return self.abar_table[max(t, 0)]
        return self.abar_table.to(t.device)[t.clamp(min=0)]

    def add_noise(self, x0, noise, t):
        """A draw from q(x_t | x_0), equation 4: x0 and noise (b, ...), t an int or (b,)."""
        abar = self._beside(x0, t)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def target(self, x0, noise, t):
        """What the net is trained to predict at t: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x0.

        v: Salimans and Ho, arXiv 2202.00512, appendix D.
        """
        if self.prediction_type == "epsilon":
            return noise
        abar = self._beside(x0, t)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0

    def epsilon(self, output, x, abar):
        """The net's prediction for x, which stands at abar, as noise. Inference needs no more of v-prediction."""
        if self.prediction_type == "epsilon":
            return output
        return abar.sqrt() * output + (1 - abar).sqrt() * x

    def pairs(self, steps):
        """Sampling's moves [(t, t_next)], t falling: (981, 961), ..., (1, -19) for 50. Inversion walks them backwards.

        This is diffusers' "leading" spacing: sampling begins at (steps - 1) * (1000 // steps) + 1. That is 981 for 50
        steps and 961 for 25, but 667 for 334 and 1 for a single step. In both directions the net is evaluated at t, the
        noisier end (official util.py, next_step). Raises InputError for a number of steps that the timesteps do not
        allow.
        """
        if not 1 <= steps < self.num_train_timesteps:
            raise InputError(f"{steps} DDIM steps cannot be made of {self.num_train_timesteps} timesteps: "
                             f"use 1 to {self.num_train_timesteps - 1}.")
        stride = self.num_train_timesteps // steps
        return [(i * stride + OFFSET, (i - 1) * stride + OFFSET) for i in reversed(range(steps))]

    def _beside(self, x, t):
        """abar at t in a shape that multiplies x (b, ...)."""
        abar = self.abar(t)
        return abar.view(-1, *[1] * (x.ndim - 1)) if abar.ndim else abar


def move(x, eps, abar_from, abar_to):
    """The deterministic DDIM step, equation 12 with sigma 0: x at abar_from -> x at abar_to, in either direction."""
    x0 = (x - (1 - abar_from).sqrt() * eps) / abar_from.sqrt()
    return abar_to.sqrt() * x0 + (1 - abar_to).sqrt() * eps
