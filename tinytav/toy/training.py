"""The training loop that all stages of pretrain.py share: optimisers, moving average, checkpoint."""
import json
import math
from functools import partial
from multiprocessing.pool import ThreadPool
from random import Random
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from tinytav.errors import InputError
from tinytav.files import atomic
from tinytav.stable_diffusion.precision import cpu_has_bf16

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")       # of AdamW, and of Muon
FREE = ("device", "threads", "work")                               # options that may change when a stage goes on


class Recipe(NamedTuple):
    lr: float
    batch: int
    decay: float        # weight decay, of matrices only
    muon: bool = False  # Muon in place of AdamW updates matrices and kernels


# The VAE learns more from each picture in small batches. With AdamW they diverged in bf16, with Muon they did not.
# The U-Net's loss fell a little faster with Muon too. Its batch is larger: one update by Muon costs as much as 12
# samples.
RECIPES = dict(
    clip=Recipe(1e-3, 256, 0.1),
    vae=Recipe(1.5e-3, 4, 0.0, muon=True),
    unet=Recipe(1.3e-3, 96, 0.01, muon=True),
    control=Recipe(8e-4, 32, 0.01))


def half(device):
    """The context of a forward pass: bf16, unless the CPU would have to emulate it, which is slower than float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_has_bf16())


def choose_optimizers(parameters, recipe, lr):
    """{name: (the optimizer that updates it, the tensor it updates)} for parameters {name: tensor}.

    AdamW updates vectors, without weight decay. Matrices and kernels get AdamW or, with recipe.muon, Muon
    (torch.optim.Muon, scaled as in arXiv 2502.16982). Muon takes matrices only. So it gets a view of each kernel
    (out, in, h, w) as (out, in*h*w).
    """
    vectors = {name: p for name, p in parameters.items() if p.ndim < 2}
    matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
    adamw = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), fused=True)
    of_vectors = adamw(vectors.values(), weight_decay=0.0)
    if recipe.muon:
        matrices = {name: nn.Parameter(p.detach().view(len(p), -1)) for name, p in matrices.items()}
        of_matrices = torch.optim.Muon(
            matrices.values(), lr=lr, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
    else:
        of_matrices = adamw(matrices.values(), weight_decay=recipe.decay)
    parts = ((of_vectors, vectors), (of_matrices, matrices))
    return {name: (optimizer, p) for optimizer, part in parts for name, p in part.items()}


class Training:
    """One stage's training: the weights, their moving average and the optimisers, all kept in a checkpoint."""

    def __init__(self, args, model):
        recipe = RECIPES[args.stage]
        self.args, self.model, self.lr, self.batch = args, model, args.lr or recipe.lr, args.batch or recipe.batch
        self.options = {name: str(value) for name, value in vars(args).items() if name not in FREE}
        self.parameters = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updated = choose_optimizers(self.parameters, recipe, self.lr)
        self.optimizers = list(dict.fromkeys(optimizer for optimizer, _ in self.updated.values()))
        self.file = args.work / f"{args.stage}.safetensors"
        self.pool = ThreadPool(args.threads)
        self.steps = 0
        if self.file.exists():
            self.resume()

    def save(self):
        tensors = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average/{name}": x for name, x in self.average.items()}
        for name, (optimizer, p) in self.updated.items():
            tensors |= {f"{key}/{name}": x for key, x in optimizer.state[p].items()}
        metadata = dict(steps=str(self.steps), options=json.dumps(self.options))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(self.file, lambda file: save_file(tensors, file, metadata))

    def resume(self):
        """Goes on from the checkpoint. Raises InputError if it was made with other options."""
        with safe_open(self.file, "pt") as file:
            saved = file.metadata()
        old = json.loads(saved.get("options", "{}"))
        if other := [name for name, value in self.options.items() if old.get(name) != value]:
            raise InputError(f"{self.file} belongs to a training with other options ({', '.join(other)}). "
                             "Give the same options to go on with it. Delete the file to begin anew.")
        self.steps = int(saved["steps"])
        tensors = load_file(self.file, device=self.args.device)
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"model/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, (optimizer, p) in self.updated.items():
            optimizer.state[p] = {key: tensors[f"{key}/{name}"] for key in STATE if f"{key}/{name}" in tensors}
        print(f"{self.args.stage}: goes on after {self.steps} steps")

    def gradients(self, loss_of, part):
        """A part of the batch -> its loss and gradients. Its randomness is a function of seed, stage, step and part."""
        rng = Random(f"{self.args.seed}/{self.args.stage}/{self.steps}/{part}")
        generator = torch.Generator(self.args.device).manual_seed(rng.getrandbits(32))
        chosen = torch.tensor([rng.randrange(self.args.pictures) for _ in range(self.batch // self.args.threads)])
        with half(self.args.device):
            loss = loss_of(chosen, rng, generator)
        return loss.detach(), torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)

    def step(self, loss_of):
        """One update; returns the loss. Threads share the batch: small convolutions use cores better that way."""
        share = (self.steps + 1) / (self.args.steps + 1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1, share / 0.03) * (1 + math.cos(math.pi * share)) / 2
        losses, gradients = zip(*self.pool.map(partial(self.gradients, loss_of), range(self.args.threads)))
        for p, *parts in zip(self.parameters.values(), *gradients):
            p.grad = None if parts[0] is None else torch.stack(parts).mean(0)
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for name, (_, p) in self.updated.items():
            gradient = self.parameters[name].grad
            p.grad = None if gradient is None else gradient.view_as(p)
        for optimizer in self.optimizers:
            optimizer.step()
        weight = 1 - min(0.999, (1 + self.steps) / (10 + self.steps))       # the average spans the last tenth
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], weight)
        self.steps += 1
        return torch.stack(losses).mean().item()

    def train(self, loss_of):
        """Takes the steps that are left and saves twenty times; returns the averaged weights {name: tensor}.

        loss_of: (indices of pictures, Random, torch.Generator) -> loss.
        """
        total, losses = self.args.steps, []
        with tqdm(total=total, initial=self.steps, desc=self.args.stage, unit="step") as bar:
            while self.steps < total:
                losses = [*losses[-99:], self.step(loss_of)]
                bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
                bar.update()
                if self.steps % max(1, total // 20) == 0:
                    self.save()
        return self.model.state_dict() | self.average
