"""Tuning on one clip: the paper's loss and loop. Wu et al., arXiv 2212.11565, section 3.3; official
train_tuneavideo.py.

The randomness of step k is a function of (seed, k). So a resumed run needs no saved random state, and a step can be
repeated.
"""
import torch
from torch.nn import functional as F

from tinytav import memory, windows
from tinytav.errors import InputError
from tinytav.stable_diffusion.precision import autocast

FP16_SCALE = 65536.     # at first the loss is multiplied by it, so that small gradients do not vanish in fp16


def draw(seed, k, shape, timesteps):
    """The randomness of step k, on the CPU: posterior noise and diffusion noise of `shape`, and a timestep (an int)."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + k) % 2 ** 32)     # torch uses 32 bits of a seed
    t = torch.randint(timesteps, (1,), generator=generator).item()
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), t


def denoising_loss(net, schedule, x0, noise, t, context):
    """E || noise - net(x_t, t, context) ||^2 (equation 1), or the same of v. x0, noise (b, 4, f, h, w), t an int."""
    noisy = schedule.add_noise(x0, noise, t)
    timesteps = torch.full((len(x0),), t, device=x0.device)
    with autocast(net):
        output = net(noisy, timesteps, context)
    return F.mse_loss(output.float(), schedule.target(x0, noise, t))


class Tuner:
    """The tuning of one net on one clip: AdamW over net.tuned(), and the losses of the steps that are done.

    mean, std (1, 4, f, h, w): the clip's latents. If it has more frames than the net, each step takes one of the
    windows that sampling will average. context (1, m, d): its caption's. `parameters` {name: parameter} replaces
    net.tuned() in experiments. From now on these parameters require gradients.
    """

    def __init__(self, net, schedule, mean, std, context, lr=3e-5, seed=33, parameters=None):
        self.net, self.schedule, self.mean, self.std, self.context = net, schedule, mean, std, context
        self.seed, self.places = seed, windows.places(mean.shape[2], net.frames)
        self.parameters = net.tuned() if parameters is None else parameters
        for p in self.parameters.values():
            p.requires_grad_()
        # fused: one pass over the memory. The moments are made here, so that a step's update allocates nothing.
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=(0.9, 0.999), eps=1e-8,
                                           weight_decay=1e-2, fused=True)
        self.losses = []
        for p in self.parameters.values():
            self.set_moments(p, torch.zeros_like(p), torch.zeros_like(p))
        self.scale = FP16_SCALE if net.conv_in.weight.dtype is torch.float16 else 1.

    def run(self, steps, climb=True):
        """THE loop: makes the steps that are left of `steps`, and yields (steps done, loss) after each.

        When memory runs out, blocks are computed again and the same step is made again (memory.py); not if climb is
        False. Errors as `step`'s.
        """
        for step in range(len(self.losses) + 1, steps + 1):
            yield step, memory.tried(self.net, self.step) if climb else self.step()

    def step(self):
        """Makes the next step and returns its loss.

        In fp16 a gradient may overflow. Then the loss's scale is halved and the same step is made again. Raises
        InputError if the loss is not finite, or if the gradient still is not finite at a scale of 1. The parameters
        are then unchanged.
        """
        loss = self.loss()
        while not self.backward(loss):
            if self.scale <= 1 or not loss.isfinite():
                raise InputError(f"The loss is {loss.item()} and its gradient is not finite at step "
                                 f"{len(self.losses) + 1}: the learning rate is too high, or the weights overflow at "
                                 "this precision. Try a smaller --lr, or --precision fp32.")
            self.scale /= 2
            loss = self.loss()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]

    def loss(self):
        """The loss of the next step, a function of (seed, step) and the parameters."""
        place = windows.drawn(self.places, self.seed, len(self.losses))
        mean, std, device = self.mean[:, :, place], self.std[:, :, place], self.mean.device
        posterior, noise, t = draw(self.seed, len(self.losses), mean.shape, self.schedule.num_train_timesteps)
        x0 = mean + std * posterior.to(device)
        return denoising_loss(self.net, self.schedule, x0, noise.to(device), t, self.context)

    def backward(self, loss):
        """Puts the gradients, clipped to a norm of 1, into the parameters. False, and no gradients, if not finite."""
        (self.scale * loss).backward()
        parameters = list(self.parameters.values())
        if self.scale != 1:
            for p in parameters:
                p.grad /= self.scale
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if loss.isfinite() and norm.isfinite():
            return True
        self.optimizer.zero_grad()
        return False

    def set_moments(self, p, first, second):
        """Sets AdamW's two moments of one parameter, as they are after len(self.losses) steps."""
        step = torch.tensor(float(len(self.losses)), device=p.device)
        self.optimizer.state[p] = {"step": step, "exp_avg": first.to(p.device), "exp_avg_sq": second.to(p.device)}

    def state_dict(self):
        """All that resuming needs, as flat named tensors.

        They are the tuned tensors, AdamW's moments, the losses, and fp16's scale.
        """
        state = {"losses": torch.tensor(self.losses), "scale": torch.tensor(self.scale)}
        for name, p in self.parameters.items():
            moments = self.optimizer.state[p]
            state[f"tuned.{name}"] = p.detach()
            state[f"exp_avg.{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        return state

    def load_state_dict(self, state):
        """The inverse of state_dict. Raises InputError if the state is of another net."""
        shapes = {f"{kind}.{name}": p.shape for kind in ("tuned", "exp_avg", "exp_avg_sq")
                  for name, p in self.parameters.items()}
        steps = state["losses"].numel() if "losses" in state else 0
        shapes |= {"losses": (steps,), "scale": ()}
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise InputError("state.safetensors does not fit this run's net: it cannot be resumed, only begun again.")
        self.losses = state["losses"].tolist()
        if self.scale > 1 and state["scale"] > 1:           # the state of a float32 run has no scale for fp16
            self.scale = state["scale"].item()
        for name, p in self.parameters.items():
            p.data.copy_(state[f"tuned.{name}"])
            self.set_moments(p, state[f"exp_avg.{name}"].clone(), state[f"exp_avg_sq.{name}"].clone())


def tune(net, schedule, mean, std, context, steps=500, lr=3e-5, seed=33):
    """Tunes `net` in place. Yields (steps done, loss) after each step. Arguments and errors as Tuner's."""
    yield from Tuner(net, schedule, mean, std, context, lr, seed).run(steps)


@torch.no_grad()
def blend(parameters, tuned, strength=1.):
    """Sets each parameter W0 to W0 + strength (W - W0), where W is the tensor of its name in `tuned`.

    At 0 the net stays untuned. At 1 it is the tuned net, to the last bit. Beyond 1 it has more of the clip.
    """
    for name, p in parameters.items():
        p.lerp_(tuned[name].to(p), torch.tensor(float(strength), device=p.device))
