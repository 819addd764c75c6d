"""The training loop that all stages of pretrain.py share: optimisers, moving average, clock, checkpoint."""
import math
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from random import Random
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tinytav.stable_diffusion.precision import cpu_has_bf16

STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")       # of AdamW, and of Muon


class Recipe(NamedTuple):
    lr: float
    batch: int
    decay: float        # weight decay, of matrices only
    muon: bool = False  # matrices and kernels are updated by Muon in place of AdamW


# The VAE learns more from each picture in small batches. With AdamW they diverged in bf16, with Muon they did not.
# The U-Net's loss fell a little faster with Muon too. Its batch is larger: an update by Muon takes as long as 12 samples.
RECIPES = dict(clip=Recipe(1e-3, 256, 0.1), vae=Recipe(1.5e-3, 4, 0.0, muon=True), unet=Recipe(1.3e-3, 96, 0.01, muon=True),
               control=Recipe(8e-4, 32, 0.01))


def half(device):
    """The context of a forward pass: bf16, unless the CPU would have to emulate it, which is slower than float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_has_bf16())


def choose_optimizers(parameters, recipe, lr):
    """{name: (the optimizer that updates it, the tensor it updates)} for parameters {name: tensor}.

    With recipe.muon, Muon (torch.optim.Muon, scaled as in arXiv 2502.16982) updates matrices and kernels, and AdamW the
    rest. Muon takes matrices only. So it gets a view of each kernel (out, in, h, w) as (out, in*h*w).
    """
    vectors = {name: p for name, p in parameters.items() if p.ndim < 2}
    matrices = {name: p for name, p in parameters.items() if p.ndim > 1}
    if recipe.muon:
        matrices = {name: nn.Parameter(p.detach().view(len(p), -1)) for name, p in matrices.items()}
        adam = torch.optim.AdamW(vectors.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        muon = torch.optim.Muon(matrices.values(), lr=lr, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
        return {name: (adam, p) for name, p in vectors.items()} | {name: (muon, p) for name, p in matrices.items()}
    groups = [dict(params=list(matrices.values()), weight_decay=recipe.decay),
              dict(params=list(vectors.values()), weight_decay=0.0)]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    return {name: (adam, p) for name, p in parameters.items()}


class Run:
    """One stage's training: the weights, their moving average, the optimiser, and the clock, all in a checkpoint."""

    def __init__(self, args, model):
        recipe = RECIPES[args.stage]
        self.args, self.model, self.lr, self.batch = args, model, args.lr or recipe.lr, args.batch or recipe.batch
        self.parameters = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.updated = choose_optimizers(self.parameters, recipe, self.lr)
        self.optimizers = list(dict.fromkeys(optimizer for optimizer, _ in self.updated.values()))
        self.file = args.work / f"{args.stage}.safetensors"
        self.pool = ThreadPool(args.threads)
        self.steps, self.elapsed = 0, 0.0       # elapsed: seconds of training
        if self.file.exists():
            self.resume()

    def save(self):
        """Written beside and renamed, so that a run killed in the middle of it leaves the checkpoint before whole."""
        tensors = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average/{name}": x for name, x in self.average.items()}
        for name, (optimizer, p) in self.updated.items():
            tensors |= {f"{key}/{name}": x for key, x in optimizer.state[p].items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".new")
        save_file(tensors, beside, metadata=dict(steps=str(self.steps), elapsed=str(self.elapsed)))
        beside.replace(self.file)

    def resume(self):
        tensors = load_file(self.file, device=self.args.device)
        with safe_open(self.file, "pt") as file:
            self.steps, self.elapsed = int(file.metadata()["steps"]), float(file.metadata()["elapsed"])
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"model/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
        for name, (optimizer, p) in self.updated.items():
            optimizer.state[p] = {key: tensors[f"{key}/{name}"] for key in STATE if f"{key}/{name}" in tensors}
        print(f"{self.args.stage}: goes on after {self.steps * self.batch} samples, {self.elapsed:.0f} s", flush=True)

    def gradients(self, loss_of, part):
        """A part of the batch -> its loss and gradients. Its chance comes from the seed, the step and the part alone."""
        rng = Random(f"{self.args.seed}/{self.args.stage}/{self.steps}/{part}")
        generator = torch.Generator(self.args.device).manual_seed(rng.getrandbits(32))
        chosen = torch.tensor([rng.randrange(self.args.pictures) for _ in range(self.batch // self.args.threads)])
        with half(self.args.device):
            loss = loss_of(chosen, rng, generator)
        return loss.detach(), torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)

    def step(self, loss_of, share):
        """One update, by as many threads as were asked for: small convolutions use cores better that way."""
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
        weight = 1 - min(0.999, (1 + self.steps) / (10 + self.steps))       # the average spans the last tenth of the steps
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], weight)
        self.steps += 1
        return torch.stack(losses).mean()

    def train(self, loss_of):
        """Updates until the time is up; returns the averaged weights. `loss_of`: (indices, rng, generator) -> loss."""
        budget, first, started, losses = 60 * self.args.minutes, self.steps, time.time() - self.elapsed, []
        printed, saved, resumed = self.elapsed, self.elapsed, self.elapsed
        while self.elapsed < budget:
            losses.append(self.step(loss_of, self.elapsed / budget))
            self.elapsed = time.time() - started
            if self.elapsed - printed > 5 or self.elapsed >= budget:
                pace = (self.steps - first) * self.batch / (self.elapsed - resumed)
                print(f"{self.args.stage}: {self.steps * self.batch} samples, {pace:.1f} a second, "
                      f"loss {torch.stack(losses).mean():.4f}, {max(0, budget - self.elapsed):.0f} s left", flush=True)
                printed, losses = self.elapsed, []
            if self.elapsed - saved > min(90, budget / 10):
                self.save()
                saved = self.elapsed
        return self.model.state_dict() | self.average
