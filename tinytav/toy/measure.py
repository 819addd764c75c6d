"""How well the pre-trained toy sees and draws: the numbers and pictures of its model card.

    python -m tinytav.toy.measure --out measured
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from tinytav import pipeline, weights
from tinytav.image_encoder import CLIP, CLIPConfig
from tinytav.inflation import inflate
from tinytav.metrics import psnr
from tinytav.toy import draw, world


def renders(count, seed, held_out=False):
    """`count` scenes and their pictures, (count, 3, 64, 64) in [-1, 1]."""
    rng = Random(seed)
    scenes = [world.random_scene(rng, held_out) for _ in range(count)]
    pictures = np.stack([draw.render(scene, world.random_view(rng)) for scene in scenes])
    return scenes, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def reconstruct(vae, x):
    return torch.cat([vae.decode(vae.encode(part)[0]).clamp(-1, 1) for part in x.split(50)])


class Eye:
    """The toy's CLIP, asked which of an attribute's values a picture shows when all else of its caption is true."""

    def __init__(self, folder, tokenizer):
        config, tensors, where = weights.read_component(folder / "clip", CLIPConfig)
        self.clip, self.tokenizer = weights.build(CLIP, config, tensors, where), tokenizer

    @torch.no_grad()
    def accuracy(self, name, scenes, x):
        """Share of pictures x (n, 3, 64, 64) whose nearest caption has the scene's own value of the attribute."""
        right = 0
        for scene, picture in zip(scenes, self.clip.encode_image(x)):
            captions = [world.caption(replace(scene, **{name: value})) for value in world.ATTRIBUTES[name]]
            nearest = (self.clip.encode_text(self.tokenizer(captions)) @ picture).argmax()
            right += world.ATTRIBUTES[name][nearest] == getattr(scene, name)
        return right / len(scenes)

    @torch.no_grad()
    def retrieval(self, scenes, x, among=64):
        """Top-1 accuracy of finding a picture's full caption among 64."""
        text, images = self.clip.encode_text(self.tokenizer(list(map(world.caption, scenes)))), self.clip.encode_image(x)
        parts = [(images[i:i + among] @ text[i:i + among].T).argmax(1) == torch.arange(among)
                 for i in range(0, len(scenes) - among + 1, among)]
        return torch.cat(parts).float().mean().item()


def sample(sd, scenes, steps, guidance):
    """One picture (n, 3, 64, 64) from each scene's full caption."""
    net, (empty,) = inflate(sd.unet, 1), sd.encode_prompts([""]).split(1)
    pictures = []
    for part in (scenes[i:i + 25] for i in range(0, len(scenes), 25)):
        context = sd.encode_prompts(list(map(world.caption, part)))
        noise = pipeline.gaussian((len(part), 4, 1, 16, 16), seed=len(pictures))
        z = pipeline.last(pipeline.sample(net, sd.schedule, noise, context, empty.expand_as(context), steps, guidance))
        pictures += pipeline.decode(sd.vae, z.transpose(0, 2))
    return torch.stack(pictures)


def save_grid(path, x, columns):
    """Pictures (n, 3, h, w) in [-1, 1], row by row, enlarged twice -> PNG."""
    rows = [torch.cat(list(row), dim=2) for row in x.split(columns)]
    grid = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(grid.repeat(2, 0).repeat(2, 1)).save(path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=Path("weights/toy"), help=" ")
    p.add_argument("--pictures", type=int, default=500, help="fresh renders for the VAE and CLIP")
    p.add_argument("--samples", type=int, default=400, help="of the U-Net, a quarter of held-out scenes")
    p.add_argument("--steps", type=int, default=25, help="of DDIM")
    p.add_argument("--guidance", type=float, default=3.0, help=" ")
    p.add_argument("--out", type=Path, default=Path("measured"), help="folder for the numbers and pictures")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sd = weights.load(args.weights)
    eye = Eye(args.weights, sd.tokenizer)
    scenes, x = renders(args.pictures, "measure")
    y = reconstruct(sd.vae, x)
    save_grid(args.out / "reconstructions.png", torch.cat([x[:12], y[:12], x[12:24], y[12:24]]), 12)
    held_out = args.samples // 4
    asked = renders(args.samples - held_out, "samples")[0] + renders(held_out, "held out", held_out=True)[0]
    drawn = sample(sd, asked, args.steps, args.guidance)
    save_grid(args.out / "samples.png", drawn[:40], 8)
    (args.out / "samples.txt").write_text("".join(world.caption(scene) + "\n" for scene in asked[:40]))
    new = slice(len(asked) - held_out, None)
    result = dict(
        vae_psnr=psnr(x, y), clip_retrieval=eye.retrieval(scenes, x),
        clip={name: eye.accuracy(name, scenes, x) for name in world.ATTRIBUTES},
        unet={name: eye.accuracy(name, asked, drawn) for name in world.ATTRIBUTES},
        unet_held_out={name: eye.accuracy(name, asked[new], drawn[new]) for name in world.ATTRIBUTES})
    (args.out / "measured.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
