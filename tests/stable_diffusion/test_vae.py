"""The autoencoder beside the reference; equality stands in test_reference.py."""
import math

import pytest
import tiny
import torch

from tinytav.stable_diffusion.vae import VAE, VAEConfig


@pytest.mark.parametrize("logvar, std", [(100., math.exp(10)), (-100., math.exp(-15)), (2., math.exp(1))])
def test_the_posteriors_log_variance_is_kept_from_minus_30_to_20(logvar, std):
    vae = VAE(VAEConfig.from_json(tiny.VAE)).requires_grad_(False)
    vae.quant_conv.weight.zero_(), vae.quant_conv.bias.fill_(logvar)
    _, found = vae.encode(torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(found, torch.full_like(found, 0.18215 * std))
