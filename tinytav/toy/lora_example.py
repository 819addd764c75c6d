"""Trains a LoRA on the toy: python -m tinytav lora-example --minutes 10 --out white.safetensors.

The toy knows no white clothes. This LoRA, on the projections of all attentions, teaches it what "white clothes" are.
"""
import argparse
import time
from dataclasses import replace
from random import Random

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tinytav import cli, pipeline
from tinytav.files import frames
from tinytav.toy import draw, world
from tinytav.weights import load

RANK, BATCH, LR = 8, 8, 1e-3


class LowRank(nn.Module):
    """weight -> weight + up @ down; up begins at zero. Hu et al., arXiv 2106.09685, section 4.1, with alpha = rank."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) / RANK)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight):
        return weight + self.up @ self.down


def white_jacket(scene, view, size):
    """A picture (size, size, 3), uint8, with white where a jacket of another colour would change it."""
    picture = draw.render(scene, view, size)
    other = replace(scene, clothes="blue" if scene.clothes != "blue" else "yellow")
    jacket = (picture != draw.render(other, view, size)).any(axis=-1)
    picture[jacket] = 255
    return picture


def draw_many(count, size):
    """`count` captions that name white clothes, and their pictures (count, 3, size, size) in [-1, 1]."""
    rng = Random("white")
    scenes = [world.random_scene(rng) for _ in range(count)]
    pictures = np.stack([white_jacket(scene, world.random_view(rng), size) for scene in scenes])
    named = [(*world.named(scene, rng), "clothes") for scene in scenes]
    captions = [world.caption(replace(scene, clothes="white"), keep=keep) for scene, keep in zip(scenes, named)]
    return captions, frames.to_tensor(pictures)


def train(sd, captions, pictures, minutes):
    """Adds a LoRA to the attentions of sd.unet and trains it with the U-Net's own loss. Returns {layer: LowRank}."""
    mean, std = (z[0].transpose(0, 1) for z in pipeline.encode(sd.vae, pictures))      # (count, 4, h, w) each
    contexts = sd.encode_prompts(captions)
    layers = {name: module for name, module in sd.unet.named_modules() if ".attn" in name and isinstance(module, nn.Linear)}
    loras = {name: LowRank(module.weight) for name, module in layers.items()}
    for name, module in layers.items():
        parametrize.register_parametrization(module, "weight", loras[name])
    optimizer = torch.optim.AdamW([p for one in loras.values() for p in one.parameters()], lr=LR, weight_decay=0)
    end, losses = time.time() + 60 * minutes, []
    while not losses or time.time() < end:
        chosen, t = torch.randint(len(pictures), (BATCH,)), torch.randint(sd.schedule.num_train_timesteps, (BATCH,))
        x0 = mean[chosen] + std[chosen] * torch.randn_like(std[chosen])
        noise = torch.randn_like(x0)
        output = sd.unet(sd.schedule.add_noise(x0, noise, t), t, contexts[chosen])
        loss = F.mse_loss(output, sd.schedule.target(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{len(losses)} steps of {BATCH} pictures, loss {np.mean(losses[:100]):.4f} at first, {np.mean(losses[-100:]):.4f} now")
    return loras


def save(loras, path):
    """Writes a LoRA in kohya's spelling."""
    tensors = {}
    for name, one in loras.items():
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": one.down.detach(), f"{stem}.lora_up.weight": one.up.detach(),
                    f"{stem}.alpha": torch.tensor(float(RANK))}
    save_file(tensors, path)


def main():
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--weights", default="weights/toy")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--out", default="white.safetensors")
    args = p.parse_args()
    torch.manual_seed(0)
    sd = load(args.weights)
    save(train(sd, *draw_many(1000, sd.defaults.size), args.minutes), args.out)
    return 0


if __name__ == "__main__":
    cli.run(main)
