"""Pre-trains a small Stable Diffusion on the toy world: CLIP, then the VAE, then the U-Net.

    python -m tinytav pretrain clip --steps 600 --out my-toy
    python -m tinytav pretrain vae --steps 25000 --out my-toy
    python -m tinytav pretrain unet --steps 2500 --out my-toy

Each stage draws its pictures first. Then it trains, and writes its part of the folder in the form in which Stable
Diffusion is published, twenty times on its way. The networks' sizes and the tokenizer are the shipped toy's, or those
of the --from folder. `--from my-toy` begins a new training with the weights that a stage wrote, also if it was killed.
"""
import argparse
import itertools
import json
import math
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from tinytav import cli
from tinytav.files import frames
from tinytav.stable_diffusion.checkpoint import MODELS, build, read_component, read_json
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.precision import cpu_has_bf16
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.toy import draw, world
from tinytav.weights import TOY

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Of each stage: the highest learning rate, the batch, the weight decay of matrices and kernels, and what updates these.
# From 2,400 pictures in batches of 4, a new VAE reached 19.8 dB by Muon, and 16.8 dB by AdamW.
RECIPES = dict(clip=(1e-3, 256, 0.1, "AdamW"), vae=(1.5e-3, 4, 0.0, "Muon"),
               unet=(1.3e-3, 96, 0.01, "Muon"))
SILENT = 0.1        # the share of captions that say nothing, for classifier-free guidance


# ---- Files and pictures --------------------------------------------------------------------------

def new(args, Model, Config, part, **settings):
    """An untrained model, by a part's config.json."""
    return Model(Config.from_json(read_json(args.source / part / "config.json") | settings))


def copy(folder, part, out):
    """Copies what a part of a Stable Diffusion has beside its weights: config.json, or the tokenizer's files."""
    (out / part).mkdir(parents=True, exist_ok=True)
    for path in (folder / part).iterdir():
        if path.suffix in (".json", ".txt"):
            (out / part / path.name).write_bytes(path.read_bytes())


def write(args, file, tensors):
    """Writes a part's weights {name: tensor} to `file` in --out, in half precision, and config.json beside it."""
    copy(args.source, Path(file).parent, args.out)
    tensors = {name: x.half().contiguous().cpu() for name, x in tensors.items()}
    save_file(tensors, args.out / file, metadata=dict(format="pt"))


def finished(args, name):
    """A model that an earlier stage wrote: "unet", "vae" or "text_encoder"."""
    Model, Config = MODELS[name]
    return build(Model, *read_component(args.out / name, Config)).to(args.device)


def imagine(seed, count):
    """`count` random scenes, each with a random view of it; the same for the same seed."""
    chances = [Random(f"{seed}/{i}") for i in range(count)]
    return [(world.random_scene(rng), world.random_view(rng)) for rng in chances]


def draw_many(imagined):
    """The pictures of scenes and views, (count, SIZE, SIZE, 3) uint8."""
    picture = np.dtype((np.uint8, (draw.SIZE, draw.SIZE, 3)))
    return torch.from_numpy(np.fromiter(itertools.starmap(draw.render, imagined), picture, len(imagined)))


def noise_like(x, generator):
    return torch.randn(x.shape, device=x.device, generator=generator)


def mistaken(scene, names, rng):
    """The scene with one of the named attributes changed: often the activity, which shows in the fewest pixels."""
    name = "activity" if "activity" in names and rng.random() < 0.7 else rng.choice(names)
    return world.changed(scene, name, rng)


# ---- The stages ----------------------------------------------------------------------------------

def half(device):
    """The context of a forward pass: bf16, unless the CPU would have to emulate it, which is slower than float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_has_bf16())


def rate(share):
    """The learning rate's factor after a share of the steps: it rises to 1 over the first 3 %, and falls to zero."""
    return min(1, share / 0.03) * (1 + math.cos(math.pi * share)) / 2


def optimizers_of(args, vectors, matrices):
    """AdamW for vectors; for matrices AdamW or Muon (torch.optim.Muon, scaled as in arXiv 2502.16982)."""
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.98), fused=True)
    other = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw") if args.optimizer == "Muon" else adamw
    return adamw(vectors, weight_decay=0.0), other(matrices, weight_decay=args.decay)


def train(args, model, file, loss_of, written=lambda: None):
    """Trains a model, with --from beginning with the weights in `file` there. Writes `file` in --out.

    loss_of: (indices of pictures, Random, torch.Generator) -> loss. Its randomness is a function of seed, stage and
    step. written: called each time that the weights are written.
    """
    if args.start:
        model.load_state_dict(load_file(args.start / file))
    parameters = list(model.to(args.device).parameters())
    kernels = [p for p in parameters if p.ndim > 1]
    matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in kernels]         # Muon wants (out, in*h*w)
    optimizers, losses = optimizers_of(args, [p for p in parameters if p.ndim < 2], matrices), []
    for step in (bar := trange(args.steps, desc=args.stage, unit="step")):
        rng = Random(f"{args.seed}/{args.stage}/{step}")
        generator = torch.Generator(args.device).manual_seed(rng.getrandbits(32))
        chosen = torch.tensor([rng.randrange(args.pictures) for _ in range(args.batch)])
        with half(args.device):
            loss = loss_of(chosen, rng, generator)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for kernel, matrix in zip(kernels, matrices):
            matrix.grad = kernel.grad.view_as(matrix)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate((step + 1) / (args.steps + 1))
            optimizer.step()
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
        if (args.steps - step - 1) % max(1, args.steps // 20) == 0:
            write(args, file, model.state_dict())
            written()


def initialise_clip(model):
    """Normals that keep the towers' activations near one: initialize_parameters of the code of arXiv 2103.00020."""
    residual = (2 * model.cfg.text_config.num_hidden_layers) ** -0.5
    for name, p in model.named_parameters():
        if p.ndim > 1:
            std = 0.02 if "embedding" in name else p.shape[1] ** -0.5
            nn.init.normal_(p, std=std * residual if name.endswith(("out_proj.weight", "fc2.weight")) else std)
        elif name.endswith("proj.bias") or "mlp" in name:
            nn.init.zeros_(p)


def train_clip(args):
    """Each picture finds its caption in the batch, and the reverse. Radford et al., arXiv 2103.00020, figure 3.

    Among the captions stands one more for each picture, wrong in one attribute: Yuksekgonul et al., arXiv 2210.01936.
    """
    tokenizer = Tokenizer.from_folder(args.source / "tokenizer")
    imagined = imagine(args.seed, args.pictures)
    scenes, pictures = [scene for scene, _ in imagined], draw_many(imagined)
    model = new(args, CLIP, CLIPConfig, "clip")
    initialise_clip(model)

    def loss_of(chosen, rng, generator):
        names = [world.named(scenes[i], rng) for i in chosen]
        right = [world.caption(scenes[i], rng, keep) for i, keep in zip(chosen, names)]
        wrong = [world.caption(mistaken(scenes[i], keep, rng), rng, keep) for i, keep in zip(chosen, names)]
        x = frames.to_tensor(pictures[chosen].to(args.device))
        logits = model(x, tokenizer(right + wrong).to(args.device)).float()
        truth = torch.arange(len(chosen), device=args.device)
        model.logit_scale.data.clamp_(max=math.log(100))
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits[:, :len(chosen)].T, truth)) / 2

    def written():
        copy(args.source, "tokenizer", args.out)
        tower = {name: x for name, x in model.state_dict().items() if name.startswith("text_model.")}
        write(args, "text_encoder/model.safetensors", tower)

    train(args, model, "clip/model.safetensors", loss_of, written)


def difference(x, y):
    """How far pictures y (n, 3, h, w) are from x: absolute error, squared error, and error of the edges."""
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()         # makes outlines crisp
    return error.abs().mean() + 3 * error.square().mean() + 0.5 * edges


def train_vae(args):
    """Pictures go through a code of nearly normal numbers and back. Rombach et al., arXiv 2112.10752, section 3.1."""
    pictures = draw_many(imagine(args.seed, args.pictures))
    model = new(args, VAE, VAEConfig, "vae", scaling_factor=1.0)

    def loss_of(chosen, rng, generator):
        x = frames.to_tensor(pictures[chosen].to(args.device))
        mean, std = (z.float() for z in model.encode(x))
        y = model.decode(mean + std * noise_like(std, generator)).float()
        kl = (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean() / 2
        return difference(x, y) + 3e-4 * kl

    def written():
        mean, std = encode_all(model, pictures[:1024], args.device)
        scale = float(1 / (mean.var() + (std ** 2).mean()).sqrt())      # of draws from the posterior
        file = args.out / "vae/config.json"
        file.write_text(json.dumps(read_json(file) | dict(scaling_factor=round(scale, 5)), indent=2) + "\n")

    train(args, model, f"vae/{WEIGHTS}", loss_of, written)


@torch.no_grad()
def encode_all(vae, pictures, device):
    """The mean and the std of every picture's latents, (n, 4, 16, 16) each."""
    with half(device):
        parts = [vae.encode(frames.to_tensor(part.to(device))) for part in pictures.split(32)]
    return [torch.cat(part).float().contiguous() for part in zip(*parts)]


def train_unet(args):
    """Learns to name the noise in noisy latents, given the caption. Rombach et al., arXiv 2112.10752, equation 3."""
    imagined = imagine(args.seed, args.pictures)
    tokenizer, encoder = Tokenizer.from_folder(args.out / "tokenizer"), finished(args, "text_encoder")
    mean, std = encode_all(finished(args, "vae"), draw_many(imagined), args.device)
    schedule = Schedule.from_json(read_json(TOY / "scheduler/scheduler_config.json"))
    model = new(args, UNet, UNetConfig, "unet")
    for name, p in model.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
            nn.init.zeros_(p)       # every residual branch begins as nothing

    def loss_of(chosen, rng, generator):
        captions = ["" if rng.random() < SILENT else world.caption(imagined[i][0], rng) for i in chosen]
        with torch.no_grad():
            context = encoder(tokenizer(captions).to(args.device))
        x0 = mean[chosen] + std[chosen] * noise_like(std[chosen], generator)
        noise = noise_like(x0, generator)
        t = torch.randint(schedule.num_train_timesteps, chosen.shape, device=args.device, generator=generator)
        return F.mse_loss(model(schedule.add_noise(x0, noise, t), t, context).float(), noise)

    train(args, model, f"unet/{WEIGHTS}", loss_of)
    copy(TOY, "scheduler", args.out)
    copy(TOY, ".", args.out)        # model_index.json, and what the shipped toy's defaults are and what it knows


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    count, better = cli.number(int, 1), "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("stage", choices=RECIPES, help="unet needs clip and vae in --out")
    p.add_argument("--steps", type=count, required=True, help="how many updates to make")
    p.add_argument("--out", type=Path, required=True, help="the folder that all stages write to")
    p.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="finished weights to train further")
    p.add_argument("--pictures", type=count, default=60000, help="how many to draw and train on (default: 60000)")
    p.add_argument("--batch", type=count, help="pictures a step; else the stage's own number")
    p.add_argument("--lr", type=float, help="highest learning rate; else the stage's own")
    p.add_argument("--seed", type=int, default=0, help="same seed, same pictures and same randomness (default: 0)")
    p.add_argument("--device", default=better, help="cpu or cuda; else the better one there is")
    args = p.parse_args(argv)
    lr, batch, args.decay, args.optimizer = RECIPES[args.stage]
    args.lr, args.batch, args.source = args.lr or lr, args.batch or batch, args.start or TOY
    if not hasattr(torch.optim, args.optimizer):
        p.error(f"the stage {args.stage} needs torch 2.9 or later, which has {args.optimizer}")
    return args


def main(argv=None):
    args = arguments(argv)
    stage = dict(clip=train_clip, vae=train_vae, unet=train_unet)[args.stage]
    torch.manual_seed(args.seed)
    # At these sizes a CPU trains a U-Net a third faster with attention as plain matrix products in bfloat16.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        stage(args)
