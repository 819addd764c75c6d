"""Ways to begin and to sample that are not in the paper. They were tried and are no options.

They work on latents (1, 4, f, h, w) of one clip, and take contexts (b, m, d) as pipeline.py does.
"""
import torch

from tinytav import pipeline, windows
from tinytav.stable_diffusion.ddim import move

ROUNDS = 3              # of fixed-point inversion, for each step


class Windows:
    """A net of a few frames as one of `frames`, by windows that are not windows.py's. It goes where a VideoUNet goes.

    kind: "not averaged", where windows follow each other and each frame is predicted by one of them; or "no first
    frame", where a window is consecutive frames alone.
    """

    def __init__(self, net, frames, kind):
        self.net, self.frames, self.attention, self.averaged = net, frames, net.attention, kind != "not averaged"
        length = net.frames - (not self.averaged)
        stride = (net.frames - 1) // 2 if self.averaged else length
        starts = [*range(not self.averaged, frames - length, stride), frames - length]
        anchor = [] if self.averaged else [0]
        self.places = [anchor + list(range(start, start + length)) for start in starts]

    def parameters(self):
        return self.net.parameters()

    def __call__(self, x, t, context, residuals=None):
        if self.averaged:
            return windows.average(lambda part, place: self.net(part, t, context), x, self.places)
        output = torch.empty_like(x)
        for place in reversed(self.places):             # where two windows hold a frame, the earlier one predicts it
            output[:, :, place] = self.net(x[:, :, place], t, context).to(x.dtype)
        return output


@torch.no_grad()
def fixed_point(net, schedule, latents, context, steps):
    """DDIM inversion that sampling without guidance takes back almost exactly: yields latents as pipeline.invert does.

    Sampling predicts the noise at the noisier end of a step. Plain inversion predicts it from the cleaner end's
    latents. Here the noisier end is found by iteration, x = move(start, eps(x)): Pan et al., arXiv 2309.04907.
    """
    x = latents
    for t, t_next in reversed(schedule.pairs(steps)):
        start = x
        for _ in range(ROUNDS):
            output = pipeline.predict(net, x, t, context)
            eps = schedule.epsilon(output, x, schedule.abar(t))
            x = move(start, eps, schedule.abar(t_next), schedule.abar(t))
        yield x
