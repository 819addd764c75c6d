"""tinytav: Tune-A-Video (arXiv 2212.11565) from scratch. One clip and a sentence -> an edited clip."""
from .config import InputError
from .ddim import Schedule
from .inflation import VideoUNet, inflate
from .pipeline import decode, encode, gaussian, invert, last, sample
from .text_encoder import TextEncoder, TextEncoderConfig
from .tuning import adamw, tune
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig
from .weights import StableDiffusion, load

__version__ = "0.1.0"
