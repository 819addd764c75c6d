"""tinytav: Tune-A-Video (arXiv 2212.11565) from scratch. One clip and a sentence -> an edited clip."""
from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.inflation import VideoUNet, inflate
from tinytav.pipeline import decode, encode, gaussian, invert, last, sample
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.tuning import adamw, tune
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.stable_diffusion.checkpoint import StableDiffusion, load

__version__ = "0.1.0"
