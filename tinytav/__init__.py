"""tinytav: Tune-A-Video (arXiv 2212.11565) from scratch. One clip and a sentence -> an edited clip.

The names below are the library. inflation.py, tuning.py and pipeline.py hold the paper.
"""
import signal
import sys

if sys.argv[:1] == ["-m"]:      # python -m tinytav: Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from tinytav.control import Control, load_control
from tinytav.editing import Clip, Edit, Session, begin, new_net, open_run, resume, sample_clip, untuned
from tinytav.errors import InputError
from tinytav.files.frames import write_gif, write_mp4, write_strip
from tinytav.inflation import VideoUNet, inflate
from tinytav.noise import NOISES, EditFriendly, Inverted, Noise, Random, Shared
from tinytav.pipeline import decode, encode, gaussian, invert, last, sample
from tinytav.stable_diffusion.controlnet import ControlNet, ControlNetConfig, load_controlnet
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.lora import merge_lora
from tinytav.stable_diffusion.text_encoder import TextEncoder, TextEncoderConfig
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner, tune
from tinytav.weights import StableDiffusion, load

__version__ = "0.2.0"
