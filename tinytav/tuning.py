"""Tuning on one clip: the loss and the loop. Paper section 3.3, official train_tuneavideo.py.

Step k's randomness is a function of (seed, k), so a resumed run needs no saved random state.
"""
import torch
from torch.nn import functional as F

from tinytav.stable_diffusion.config import InputError

FP16_SCALE = 4096.      # keeps fp16's gradients off its subnormal numbers; constant, so that it need not be resumed


def adamw(tuned, lr):
    """The official optimiser over net.tuned(), whose 112 tensors from now on require gradients. They stay float32."""
    parameters = [p.requires_grad_() for p in tuned.values()]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


def draw(seed, k, shape, timesteps):
    """Step k's randomness, on the CPU: posterior noise and diffusion noise of `shape`, and a timestep (1,)."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + k) % 2 ** 32)     # it uses 32 bits of its seed
    t = torch.randint(timesteps, (1,), generator=generator)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), t


def denoising_loss(net, schedule, x0, noise, t, context):
    """E || noise - net(x_t, t, context) ||^2 (paper equation 1), or of v. x0, noise (b, 4, f, h, w), t (b,)."""
    output = net(schedule.add_noise(x0, noise, t), t, context)
    return F.mse_loss(output.float(), schedule.target(x0, noise, t))


def tune(net, optimizer, schedule, mean, std, context, seed=33, first=0, steps=500):
    """Yields (steps done, loss) after each of steps first+1..steps. Changes the optimiser's parameters of `net`.

    mean, std (1, 4, f, h, w) of the clip's latents, context (1, m, d) of its caption. Raises InputError when the loss
    or its gradient is not finite; the parameters are then those of the step before. `first` steps are done already.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k in range(first, steps):
        *noises, t = (z.to(mean.device) for z in draw(seed, k, mean.shape, schedule.num_train_timesteps))
        x0 = mean + std * noises[0]
        loss = denoising_loss(net, schedule, x0, noises[1], t, context)
        scale = FP16_SCALE if net.conv_in.weight.dtype is torch.float16 else 1.
        (scale * loss).backward()
        for p in parameters:
            p.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not (loss.isfinite() and norm.isfinite()):
            raise InputError(f"The loss is {loss.item()} and its gradient's norm {norm.item()} at step {k + 1}: the "
                             "learning rate is too high, or the weights overflow at this precision. Try a smaller --lr, "
                             "or --precision fp32.")
        optimizer.step()
        optimizer.zero_grad()
        yield k + 1, loss.item()
