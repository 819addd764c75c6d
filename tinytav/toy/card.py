"""How well the pre-trained toy sees and draws: the numbers and pictures of its model card.

    python -m tinytav card --out measured
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from tinytav import pipeline
from tinytav.files import frames
from tinytav.inflation import inflate
from tinytav.measure import metrics
from tinytav.toy import draw, world
from tinytav.weights import load


def renders(count, seed, held_out=False):
    """`count` scenes and their pictures, (count, 3, h, w) in [-1, 1]."""
    rng = Random(seed)
    scenes = [world.random_scene(rng, held_out) for _ in range(count)]
    return scenes, frames.to_tensor(np.stack([draw.render(scene, world.random_view(rng)) for scene in scenes]))


def accuracy(eye, name, scenes, x):
    """Share of pictures x (n, 3, h, w) whose nearest caption is the scene's own, among those with other values."""
    right, values = 0, world.ATTRIBUTES[name]
    for scene, picture in zip(scenes, eye.images(x)):
        captions = [world.caption(replace(scene, **{name: value})) for value in values]
        right += values[(eye.texts(captions) @ picture).argmax()] == getattr(scene, name)
    return right / len(scenes)


def retrieval(eye, scenes, x, among=64):
    """Top-1 accuracy of finding a picture's full caption among 64."""
    text, images = eye.texts(list(map(world.caption, scenes))), eye.images(x)
    right = [(images[i:i + among] @ text[i:i + among].T).argmax(1) == torch.arange(among)
             for i in range(0, len(scenes) - among + 1, among)]
    return torch.cat(right).float().mean().item()


def sample(sd, scenes):
    """One picture (n, 3, h, w) from each scene's full caption."""
    net, (empty,), pictures = inflate(sd.unet, 1), sd.encode_prompts([""]).split(1), []
    for part in (scenes[i:i + 25] for i in range(0, len(scenes), 25)):
        context = sd.encode_prompts(list(map(world.caption, part)))
        noise = pipeline.gaussian((len(part), 4, 1, 16, 16), seed=len(pictures))
        z = pipeline.last(pipeline.sample(net, sd.schedule, noise, context, empty.expand_as(context),
                                          sd.defaults.ddim_steps, sd.defaults.guidance))
        pictures += pipeline.decode(sd.vae, z.transpose(0, 2))
    return torch.stack(pictures)


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help="the toy's folder")
    p.add_argument("--pictures", type=int, default=500, help="fresh drawings that the VAE and CLIP see")
    p.add_argument("--samples", type=int, default=400, help="the U-Net's pictures, a quarter of held-out scenes")
    p.add_argument("--out", type=Path, default=Path("measured"), help="folder for the numbers and pictures")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sd, eye = load(args.weights), metrics.Features(args.weights / "clip")
    scenes, x = renders(args.pictures, "measure")
    y = pipeline.decode(sd.vae, pipeline.encode(sd.vae, x)[0])
    frames.write_strip(args.out / "reconstructions.png", x[:8], y[:8], x[8:16], y[8:16], shown=1)
    held_out = args.samples // 4
    asked = renders(held_out, "held out", held_out=True)[0] + renders(args.samples - held_out, "samples")[0]
    drawn = sample(sd, asked)
    shown = slice(max(0, held_out - 16), held_out + 24)                             # the first two rows are held out
    frames.write_strip(args.out / "samples.png", *drawn[shown].split(8), shown=1)
    (args.out / "samples.txt").write_text("".join(world.caption(scene) + "\n" for scene in asked[shown]))
    result = dict(
        vae_psnr=metrics.psnr(x, y), clip_retrieval=retrieval(eye, scenes, x),
        clip={name: accuracy(eye, name, scenes, x) for name in world.ATTRIBUTES},
        unet={name: accuracy(eye, name, asked, drawn) for name in world.ATTRIBUTES},
        unet_held_out={name: accuracy(eye, name, asked[:held_out], drawn[:held_out]) for name in world.ATTRIBUTES})
    text = json.dumps(result, indent=2)
    (args.out / "measured.json").write_text(text + "\n")
    print(text)
