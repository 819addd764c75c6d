"""How well the pre-trained toy sees and draws: the numbers and pictures of its model card.

    python -m tinytav card --out measured
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from tinytav import pipeline
from tinytav.claims.experiment import FRAMES, Net, Studio, make_clip
from tinytav.claims.judge import pixels
from tinytav.files import frames
from tinytav.inflation import inflate
from tinytav.measure import metrics
from tinytav.measure.metrics import psnr
from tinytav.toy import draw, world
from tinytav.weights import load


def renders(count, seed, held_out=False):
    """`count` scenes and their pictures, (count, 3, h, w) in [-1, 1]."""
    rng = Random(seed)
    scenes = [world.random_scene(rng, held_out) for _ in range(count)]
    return scenes, pixels([draw.render(scene, world.random_view(rng)) for scene in scenes])


@torch.no_grad()
def reconstruct(vae, x):
    return torch.cat([vae.decode(vae.encode(part)[0]).clamp(-1, 1) for part in x.split(50)])


def accuracy(eye, name, scenes, x, keep=None):
    """Share of pictures x (n, 3, h, w) whose nearest caption has the scene's own value of the attribute, all else true.

    keep: the attributes that the captions name; all without.
    """
    right = 0
    for scene, picture in zip(scenes, eye.images(x)):
        captions = [world.caption(replace(scene, **{name: value}), keep=keep) for value in world.ATTRIBUTES[name]]
        right += world.ATTRIBUTES[name][(eye.texts(captions) @ picture).argmax()] == getattr(scene, name)
    return right / len(scenes)


def retrieval(eye, scenes, x, among=64):
    """Top-1 accuracy of finding a picture's full caption among 64."""
    text, images = eye.texts(list(map(world.caption, scenes))), eye.images(x)
    parts = [(images[i:i + among] @ text[i:i + among].T).argmax(1) == torch.arange(among)
             for i in range(0, len(scenes) - among + 1, among)]
    return torch.cat(parts).float().mean().item()


def sample(sd, scenes, steps, guidance, keep=None):
    """One picture (n, 3, h, w) from each scene's caption, which names the attributes in `keep`; all without."""
    net, (empty,) = inflate(sd.unet, 1), sd.encode_prompts([""]).split(1)
    pictures = []
    for part in (scenes[i:i + 25] for i in range(0, len(scenes), 25)):
        context = sd.encode_prompts([world.caption(scene, keep=keep) for scene in part])
        noise = pipeline.gaussian((len(part), 4, 1, 16, 16), seed=len(pictures))
        z = pipeline.last(pipeline.sample(net, sd.schedule, noise, context, empty.expand_as(context), steps, guidance))
        pictures += pipeline.decode(sd.vae, z.transpose(0, 2))
    return torch.stack(pictures)


def silence(sd, eye, count, steps, guidance):
    """Captions as short as "a man is skiing on the snow": the share of samples that show what is usual."""
    rng = Random("silence")
    scenes = [replace(world.random_scene(rng), **world.USUAL) for _ in range(count)]
    x = sample(sd, scenes, steps, guidance, keep=world.GIST)
    asked = (*world.GIST, *world.USUAL)
    return {name: accuracy(eye, name, scenes, x, keep=tuple(dict.fromkeys((*world.GIST, name)))) for name in asked}


def inversion(folder, settings, tuned, clips):
    """A clip inverted and sampled again under its own caption, without guidance: PSNR, and how much x_T is like noise."""
    found = []
    for studio in (Studio(folder, make_clip("choice", i), settings) for i in range(clips)):
        net = studio.tuned_net(Net(tuned), seed=33)
        noise = studio.invert(net, studio.empty)
        latents = pipeline.last(pipeline.sample(net, studio.sd.schedule, noise, studio.own, studio.empty, settings["ddim_steps"], 1))
        between = torch.corrcoef(noise[0].transpose(0, 1).flatten(1)).fill_diagonal_(0).sum() / (FRAMES * (FRAMES - 1))
        found.append((psnr(pipeline.decode(studio.sd.vae, latents), studio.source), noise.mean(), noise.std(), between))
    return dict(zip(("psnr", "x_T mean", "x_T std", "x_T correlation between frames"), torch.tensor(found).mean(0).tolist()))


def save_grid(path, x, columns):
    """Pictures (n, 3, h, w) in [-1, 1], row by row -> PNG."""
    rows = [torch.cat(list(row), dim=2) for row in x.split(columns)]
    grid = frames.to_uint8(torch.cat(rows, dim=1)[None])[0].numpy()
    frames.write_picture(path, grid)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help=" ")
    p.add_argument("--pictures", type=int, default=500, help="fresh renders for the VAE and CLIP")
    p.add_argument("--samples", type=int, default=400, help="of the U-Net, a quarter of held-out scenes")
    p.add_argument("--short", type=int, default=100, help="samples of short captions")
    p.add_argument("--clips", type=int, default=2, help="inverted, untuned and tuned; 0 for none")
    p.add_argument("--steps", type=int, default=25, help="of DDIM")
    p.add_argument("--guidance", type=float, default=3.0, help=" ")
    p.add_argument("--out", type=Path, default=Path("measured"), help="folder for the numbers and pictures")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sd, eye = load(args.weights), metrics.Features(args.weights / "clip")
    scenes, x = renders(args.pictures, "measure")
    y = reconstruct(sd.vae, x)
    save_grid(args.out / "reconstructions.png", torch.cat([x[:8], y[:8], x[8:16], y[8:16]]), 8)
    held_out = args.samples // 4
    asked = renders(held_out, "held out", held_out=True)[0] + renders(args.samples - held_out, "samples")[0]
    drawn = sample(sd, asked, args.steps, args.guidance)
    shown = slice(max(0, held_out - 16), held_out + 24)                             # the first two rows are held out
    save_grid(args.out / "samples.png", drawn[shown], 8)
    (args.out / "samples.txt").write_text("".join(world.caption(scene) + "\n" for scene in asked[shown]))
    result = dict(
        vae_psnr=psnr(x, y), clip_retrieval=retrieval(eye, scenes, x),
        clip={name: accuracy(eye, name, scenes, x) for name in world.ATTRIBUTES},
        unet={name: accuracy(eye, name, asked, drawn) for name in world.ATTRIBUTES},
        unet_held_out={name: accuracy(eye, name, asked[:held_out], drawn[:held_out]) for name in world.ATTRIBUTES},
        unet_short=silence(sd, eye, args.short, args.steps, args.guidance))
    if args.clips:
        result |= dict(inversion_untuned=inversion(args.weights, vars(sd.defaults), None, args.clips),
                       inversion_tuned=inversion(args.weights, vars(sd.defaults), "the paper's", args.clips))
    (args.out / "measured.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
