"""The training loop that all stages of pretrain.py share: AdamW, learning rate, checkpoint."""
import json
import math
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from tinytav.errors import InputError
from tinytav.files import atomic
from tinytav.stable_diffusion.checkpoint import read_header
from tinytav.stable_diffusion.precision import cpu_has_bf16

STATE = ("step", "exp_avg", "exp_avg_sq")       # of AdamW
FREE = ("device", "out")                        # options that may change when a stage goes on


def half(device):
    """The context of a forward pass: bf16, unless the CPU would have to emulate it, which is slower than float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or cpu_has_bf16())


def checkpoint(args):
    """The file of a training that is not finished."""
    return args.out / f"{args.stage}.unfinished.safetensors"


class Training:
    """One stage's training. A checkpoint keeps the weights and AdamW's state."""

    def __init__(self, args, model):
        self.args, self.model, self.steps = args, model, 0
        self.options = {name: str(value) for name, value in vars(args).items() if name not in FREE}
        self.parameters = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        groups = [dict(params=vectors, weight_decay=0.0), dict(params=matrices, weight_decay=args.decay)]
        self.optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.98), fused=True)
        self.file = checkpoint(args)
        if self.file.exists():
            self.resume()

    def save(self):
        tensors = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}/{name}": x for key, x in self.optimizer.state[p].items()}
        metadata = dict(steps=str(self.steps), options=json.dumps(self.options))
        atomic.replace(self.file, lambda file: save_file(tensors, file, metadata))

    def resume(self):
        """Goes on from the checkpoint. Raises InputError if it was made with other options."""
        _, saved = read_header(self.file)
        old = json.loads(saved["options"])
        if other := [name for name, value in self.options.items() if old.get(name) != value]:
            raise InputError(f"{self.file} belongs to a training with other options ({', '.join(other)}). "
                             "Give the same options to go on with it. Delete the file to begin anew.")
        self.steps, tensors = int(saved["steps"]), load_file(self.file, device=self.args.device)
        for name, p in self.parameters.items():
            p.data.copy_(tensors[f"weights/{name}"])
            self.optimizer.state[p] = {key: tensors[f"{key}/{name}"] for key in STATE}
        print(f"{self.args.stage}: goes on after {self.steps} steps")

    def step(self, loss_of):
        """One update; returns the loss. Its randomness is a function of seed, stage and step."""
        rng = Random(f"{self.args.seed}/{self.args.stage}/{self.steps}")
        generator = torch.Generator(self.args.device).manual_seed(rng.getrandbits(32))
        chosen = torch.tensor([rng.randrange(self.args.pictures) for _ in range(self.args.batch)])
        with half(self.args.device):
            loss = loss_of(chosen, rng, generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        share = (self.steps + 1) / (self.args.steps + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * min(1, share / 0.03) * (1 + math.cos(math.pi * share)) / 2
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def train(self, loss_of):
        """Takes the steps that are left and saves twenty times; returns the weights {name: tensor}.

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
        return self.model.state_dict()
