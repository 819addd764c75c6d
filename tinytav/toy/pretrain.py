"""Pre-trains a small Stable Diffusion on the toy world: CLIP, then the VAE, the U-Net, and a ControlNet for it.

    python -m tinytav pretrain clip --steps 600 --out my-toy
    python -m tinytav pretrain vae --steps 25000 --out my-toy
    python -m tinytav pretrain unet --steps 2500 --out my-toy
    python -m tinytav pretrain control --steps 3000 --out my-toy

Each stage draws its pictures first. Then it trains, and writes its part of the folder in the form in which Stable
Diffusion is published. A stage that was killed goes on from its checkpoint when the same command is given again. The
learning rate falls to zero over the steps.
"""
import argparse
import json
import math
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinytav import cli
from tinytav.files import frames
from tinytav.stable_diffusion.checkpoint import MODELS, build, read_component
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.controlnet import ControlNet, ControlNetConfig
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.tokenizer import BEGIN, END, WORDS, Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.toy import draw, skeleton, world
from tinytav.toy.training import RECIPES, Training, half

SIZE = draw.SIZE    # pixels along a picture's side
LENGTH = 32         # tokens in a prompt
TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, projection_dim=128,
             hidden_act="quick_gelu", layer_norm_eps=1e-5, attention_dropout=0.0)
TEXT_JSON = dict(model_type="clip_text_model", **TOWER, max_position_embeddings=LENGTH)
VISION_JSON = dict(model_type="clip_vision_model", **TOWER, image_size=SIZE, patch_size=16, num_channels=3)
VAE_JSON = dict(
    _class_name="AutoencoderKL", act_fn="silu", block_out_channels=[16, 32, 64, 96],
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, in_channels=3, out_channels=3,
    latent_channels=4, layers_per_block=1, norm_num_groups=8, sample_size=SIZE, scaling_factor=1.0)
UNET_JSON = dict(
    _class_name="UNet2DConditionModel", act_fn="silu", attention_head_dim=[2, 4, 5], block_out_channels=[64, 128, 160],
    center_input_sample=False, cross_attention_dim=128, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], in_channels=4, layers_per_block=1,
    mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32, out_channels=4, sample_size=SIZE // 8,
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])
UNET_ONLY = ("_class_name", "center_input_sample", "out_channels", "sample_size", "up_block_types")
CONTROL_JSON = {name: value for name, value in UNET_JSON.items() if name not in UNET_ONLY} | dict(
    _class_name="ControlNetModel", conditioning_channels=3, controlnet_conditioning_channel_order="rgb",
    conditioning_embedding_out_channels=VAE_JSON["block_out_channels"],     # hints come down as pictures do
    global_pool_conditions=False)
SCHEDULER_JSON = dict(
    _class_name="DDIMScheduler", beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, clip_sample=False,
    num_train_timesteps=1000, prediction_type="epsilon", set_alpha_to_one=False, steps_offset=1,
    timestep_spacing="leading", trained_betas=None)
INDEX_JSON = dict(
    _class_name="StableDiffusionPipeline", feature_extractor=[None, None], requires_safety_checker=False,
    safety_checker=[None, None], scheduler=["diffusers", "DDIMScheduler"], tokenizer=["transformers", "CLIPTokenizer"],
    text_encoder=["transformers", "CLIPTextModel"], unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"])
PREPROCESSOR_JSON = dict(       # pictures in [-1, 1], as the VAE has them
    feature_extractor_type="CLIPFeatureExtractor", crop_size=SIZE, size=SIZE, do_center_crop=True, do_normalize=True,
    do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIGURE = 8          # how much more the ControlNet's loss counts at the stick figure


# ---- Files ---------------------------------------------------------------------------------------

def text(data):
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def put(folder, files):
    """`files`: {name: text}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def write(file, config, tensors):
    """Half-precision weights, and config.json beside them."""
    put(file.parent, {"config.json": text(config)})
    save_file({key: x.half().contiguous().cpu() for key, x in tensors.items()}, file, metadata=dict(format="pt"))


def finished(args, name):
    """A model that an earlier stage wrote: "unet", "vae" or "text_encoder"."""
    Model, Config = MODELS[name]
    return build(Model, *read_component(args.out / name, Config)).to(args.device)


def build_tokenizer():
    """Learns byte-pair merges until each of the world's words is one token; CLIP's files, {name: text}."""
    rng = Random(0)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(5000)]
    bpe = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True)
    bpe.train_from_iterator(captions, trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    special = dict(bos_token=BEGIN, eos_token=END, unk_token=END, pad_token=END)
    settings = special | dict(tokenizer_class="CLIPTokenizer", model_max_length=LENGTH, do_lower_case=True,
                              add_prefix_space=False, errors="replace")
    return {"vocab.json": text({token: i for i, token in enumerate(dict.fromkeys(tokens))}),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n",
            "special_tokens_map.json": text(special), "tokenizer_config.json": text(settings)}


# ---- Pictures ------------------------------------------------------------------------------------

def imagine(seed, count):
    """`count` random scenes, each with a random view of it; the same for the same seed."""
    chances = [Random(f"{seed}/{i}") for i in range(count)]
    return [(world.random_scene(rng), world.random_view(rng)) for rng in chances]


def render(imagined):
    return draw.render(*imagined, SIZE)


def draw_many(imagined):
    """The pictures of scenes and views, (count, SIZE, SIZE, 3) uint8, drawn by all cores."""
    pictures = np.empty((len(imagined), SIZE, SIZE, 3), np.uint8)
    with Pool() as pool:
        for i, picture in enumerate(pool.imap(render, imagined, chunksize=64)):
            pictures[i] = picture
    return torch.from_numpy(pictures)


def pixels(pictures, device):
    """(n, h, w, 3) uint8 -> (n, 3, h, w) in [-1, 1]."""
    return frames.to_tensor(pictures.to(device))


def noise_like(x, generator):
    return torch.randn(x.shape, device=x.device, generator=generator)


def mistaken(scene, names, rng):
    """The scene with one of the named attributes changed: often the activity, which shows in the fewest pixels."""
    name = "activity" if "activity" in names and rng.random() < 0.7 else rng.choice(names)
    others = [value for value in world.ATTRIBUTES[name] if value != getattr(scene, name)]
    return replace(scene, **{name: rng.choice(others)})


# ---- The stages ----------------------------------------------------------------------------------

def initialise_clip(model):
    """Normals that keep the towers' activations near one: initialize_parameters of the code of arXiv 2103.00020."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            inner = 0.02 if "embedding" in name else p.shape[1] ** -0.5
            writes_to_stream = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(p, std=inner * (2 * TOWER["num_hidden_layers"]) ** -0.5 if writes_to_stream else inner)
        elif name.endswith("proj.bias") or "mlp" in name:
            nn.init.zeros_(p)


def clip_config(tokenizer):
    ids = dict(bos_token_id=tokenizer.begin, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    text = TEXT_JSON | ids | dict(vocab_size=tokenizer.end + 1)
    return dict(model_type="clip", architectures=["CLIPModel"], projection_dim=TOWER["projection_dim"],
                logit_scale_init_value=2.6592, text_config=text, vision_config=VISION_JSON)


def train_clip(args):
    """Each picture finds its caption in the batch, and the reverse. Radford et al., arXiv 2103.00020, figure 3.

    Among the captions stands one more for each picture, wrong in one attribute: Yuksekgonul et al., arXiv 2210.01936.
    """
    files = {path.name: path.read_text(encoding="utf-8") for path in (args.start / "tokenizer").iterdir()
             } if args.start else build_tokenizer()
    put(args.out / "tokenizer", files)
    put(args.out / "clip", files | {"preprocessor_config.json": text(PREPROCESSOR_JSON)})
    tokenizer = Tokenizer.from_folder(args.out / "tokenizer")
    config = clip_config(tokenizer)
    imagined = imagine(args.seed, args.pictures)
    scenes, pictures = [scene for scene, _ in imagined], draw_many(imagined)
    model = CLIP(CLIPConfig.from_json(config))
    initialise_clip(model)
    model.text_model.requires_grad_(not args.keep)

    def loss_of(chosen, rng, generator):
        names = [world.named(scenes[i], rng) for i in chosen]
        right = [world.caption(scenes[i], rng, keep) for i, keep in zip(chosen, names)]
        wrong = [world.caption(mistaken(scenes[i], keep, rng), rng, keep) for i, keep in zip(chosen, names)]
        logits = model(pixels(pictures[chosen], args.device), tokenizer(right + wrong).to(args.device)).float()
        truth = torch.arange(len(chosen), device=args.device)
        model.logit_scale.data.clamp_(max=math.log(100))
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits[:, :len(chosen)].T, truth)) / 2

    weights = train(args, model, "clip/model.safetensors", loss_of)
    write(args.out / "clip/model.safetensors", config, weights)
    tower = {name: x for name, x in weights.items() if name.startswith("text_model.")}
    config = config["text_config"] | dict(architectures=["CLIPTextModel"])
    write(args.out / "text_encoder/model.safetensors", config, tower)


def difference(x, y):
    """How far pictures y (n, 3, h, w) are from x: absolute error, squared error, and error of the edges."""
    error = y - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()         # makes outlines crisp
    return error.abs().mean() + 3 * error.square().mean() + 0.5 * edges


def train_vae(args):
    """Pictures go through a code of nearly normal numbers and back. Rombach et al., arXiv 2112.10752, section 3.1."""
    pictures = draw_many(imagine(args.seed, args.pictures))
    model = VAE(VAEConfig.from_json(VAE_JSON))
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(not args.keep)

    def loss_of(chosen, rng, generator):
        x = pixels(pictures[chosen], args.device)
        mean, std = (z.float() for z in model.encode(x))
        y = model.decode(mean + std * noise_like(std, generator)).float()
        kl = (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean() / 2
        return difference(x, y) + 3e-4 * kl

    weights = train(args, model, f"vae/{WEIGHTS}", loss_of)
    if args.keep:
        config = json.loads((args.start / "vae/config.json").read_text())
    else:
        model.load_state_dict(weights)
        mean, std = encode_all(model, pictures[:1024], args.device)
        scale = float(1 / (mean.var() + (std ** 2).mean()).sqrt())      # of draws from the posterior
        config = VAE_JSON | dict(scaling_factor=round(scale, 5))
    write(args.out / "vae" / WEIGHTS, config, weights)


@torch.no_grad()
def encode_all(vae, pictures, device):
    """The mean and the std of every picture's latents, (n, 4, 16, 16) each."""
    parts = []
    for part in pictures.split(32):
        with half(device):
            mean, std = vae.encode(pixels(part, device))
        parts.append((mean.float(), std.float()))
    return [torch.cat(part).contiguous() for part in zip(*parts)]


def captioned_noise(args, imagined, empty):
    """What U-Net and ControlNet learn from: a function (indices, rng, generator) -> noisy latents, t, context, noise.

    empty: the share of captions that say nothing.
    """
    tokenizer, encoder = Tokenizer.from_folder(args.out / "tokenizer"), finished(args, "text_encoder")
    mean, std = encode_all(finished(args, "vae"), draw_many(imagined), args.device)
    schedule = Schedule.from_json(SCHEDULER_JSON)

    def make(chosen, rng, generator):
        captions = ["" if rng.random() < empty else world.caption(imagined[i][0], rng) for i in chosen]
        with torch.no_grad():
            context = encoder(tokenizer(captions).to(args.device))
        x0 = mean[chosen] + std[chosen] * noise_like(std[chosen], generator)
        noise = noise_like(x0, generator)
        t = torch.randint(schedule.num_train_timesteps, chosen.shape, device=args.device, generator=generator)
        return schedule.add_noise(x0, noise, t), t, context, noise

    return make


def train_unet(args):
    """Learns to name the noise in noisy latents, given the caption. Rombach et al., arXiv 2112.10752, equation 3."""
    make = captioned_noise(args, imagine(args.seed, args.pictures), empty=0.1)
    model = UNet(UNetConfig.from_json(UNET_JSON))
    for name, p in model.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight", "conv_out.weight")):
            nn.init.zeros_(p)       # every residual branch begins as nothing

    def loss_of(chosen, rng, generator):
        noisy, t, context, noise = make(chosen, rng, generator)
        return F.mse_loss(model(noisy, t, context).float(), noise)

    weights = train(args, model, f"unet/{WEIGHTS}", loss_of)
    write(args.out / "unet" / WEIGHTS, UNET_JSON, weights)
    put(args.out / "scheduler", {"scheduler_config.json": text(SCHEDULER_JSON)})
    put(args.out, {"model_index.json": text(INDEX_JSON)})


def begin_as_unet(control, unet):
    """The way down and the middle begin as the U-Net's, the 1x1 convolutions as zero: arXiv 2302.05543, section 3.1.

    So at first the residuals are zero, and the U-Net draws as it does without them. The hint's convolutions keep the
    size of what goes through them (arXiv 1502.01852). With torch's own start hardly anything comes through seven.
    """
    control.load_state_dict({name: p for name, p in unet.state_dict().items() if name in control.state_dict()},
                            strict=False)
    hint = control.controlnet_cond_embedding
    for convolution in (hint.conv_in, *hint.blocks, hint.conv_out):
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
    for convolution in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)


def around(hints, size):
    """1 where a hint (n, 3, h, w) has a stick, and one latent around it, 0 elsewhere: (n, 1, *size)."""
    sticks = F.adaptive_max_pool2d(hints.amax(1, keepdim=True), size)
    return (F.max_pool2d(sticks, 3, stride=1, padding=1) > 0).float()


def train_control(args):
    """Learns what a stick figure says, beside the frozen U-Net. Zhang et al., arXiv 2302.05543, equation 5.

    Every other caption is empty (section 3.3): then the stick figure alone gives the pose. The loss counts more where
    the stick figure is, because limbs are a small part of the picture.
    """
    unet, imagined = finished(args, "unet"), imagine(args.seed, args.pictures)
    make = captioned_noise(args, imagined, empty=0.5)
    model = ControlNet(ControlNetConfig.from_json(CONTROL_JSON))
    begin_as_unet(model, unet)

    def loss_of(chosen, rng, generator):
        noisy, t, context, noise = make(chosen, rng, generator)
        figures = [skeleton.skeleton(scene.activity, view, SIZE) for scene, view in (imagined[i] for i in chosen)]
        hints = skeleton.hint(np.stack(figures)).to(args.device)
        error = unet(noisy, t, context, model(noisy, t, context, hints)).float() - noise
        weight = 1 + FIGURE * around(hints, noise.shape[2:])
        return (weight * error ** 2).mean() / weight.mean()

    weights = train(args, model, f"controlnet/{WEIGHTS}", loss_of)
    write(args.out / "controlnet" / WEIGHTS, CONTROL_JSON, weights)


def train(args, model, file, loss_of):
    """Trains a new model, or with --from goes on with the finished weights in `file` there; returns the weights."""
    if args.start:
        model.load_state_dict(load_file(args.start / file))
    return Training(args, model.to(args.device)).train(loss_of)


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    count, better = cli.number(int, 1), "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("stage", choices=RECIPES, help="unet needs clip and vae in --out, and control needs unet too")
    p.add_argument("--steps", type=count, required=True, help="how many updates to make")
    p.add_argument("--out", type=Path, required=True, help="the folder that all stages write to")
    p.add_argument("--from", type=Path, dest="start", metavar="FOLDER", help="finished weights to train further")
    p.add_argument("--keep", action="store_true", help="freeze what a U-Net needs: clip's text tower, vae's encoder")
    p.add_argument("--pictures", type=count, default=60000, help="how many to draw and train on (default: 60000)")
    p.add_argument("--batch", type=count, help="pictures a step; else the stage's own number")
    p.add_argument("--lr", type=float, help="highest learning rate; else the stage's own")
    p.add_argument("--threads", type=count, default=1, help="share a batch; each uses OMP_NUM_THREADS cores")
    p.add_argument("--seed", type=int, default=0, help="same seed, same pictures and same randomness (default: 0)")
    p.add_argument("--device", default=better, help="cpu or cuda; else the better one there is")
    p.add_argument("--work", type=Path, default=Path(".pretrain"), help="where the checkpoint stays meanwhile")
    args = p.parse_args(argv)
    recipe = RECIPES[args.stage]
    batch = args.batch or recipe.batch
    if args.keep and not (args.start and args.stage in ("clip", "vae")):
        p.error("--keep is for clip and vae, and needs --from")
    if batch % args.threads:
        p.error(f"--threads {args.threads} cannot share a batch of {batch} equally: choose another number of either")
    if recipe.muon and not hasattr(torch.optim, "Muon"):
        p.error(f"the stage {args.stage} needs torch 2.9 or later, which has Muon; this is torch {torch.__version__}")
    return args


def main(argv=None):
    args = arguments(argv)
    torch.manual_seed(args.seed)
    stage = dict(clip=train_clip, vae=train_vae, unet=train_unet, control=train_control)[args.stage]
    # At these sizes a CPU trains a U-Net a third faster with attention as plain matrix products in bfloat16.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        stage(args)
    (args.work / f"{args.stage}.safetensors").unlink()
