"""Pose control: a ControlNet says, by one hint a frame, where things stand in a clip. No extra training is needed.

The paper shows it (section 5, applications); the official code never had it. ControlNet: Zhang et al., arXiv
2302.05543.
"""
import torch

from tinytav import pipeline
from tinytav.files.frames import read_at
from tinytav.stable_diffusion.controlnet import check_fits, load_controlnet
from tinytav.stable_diffusion.precision import autocast


class Control:
    """A ControlNet and a clip's hints, one a frame. Pass it to pipeline.sample or editing.sample_clip.

    The ControlNet keeps its image weights. It sees each frame by itself, without the others. hints (f, 3, H, W), RGB in
    [0, 1]; H and W are those of the clip's frames. scale: by which the residuals are multiplied. path, hint: where
    ControlNet and hints came from, for an edit's record.
    """

    @torch.no_grad()
    def __init__(self, controlnet, hints, scale=1.0, path=None, hint=None):
        self.controlnet, self.hints, self.scale, self.path, self.hint = controlnet, hints, scale, path, hint
        with autocast(controlnet):
            parts = [controlnet.embed_hint(part) for part in pipeline.chunks(hints, hints[0, 0].numel())]
        self.embedded = torch.cat(parts)                                    # f c h w, the same at every step

    @torch.no_grad()
    def residuals(self, x, t, context, place=slice(None)):
        """For latents x (b, 4, f, h, w), t (b,), context (b, m, d): what VideoUNet adds, (b f) c h w each.

        place: which of the hints belong to the frames of x, if x is a window of the clip.
        """
        frames = x.shape[2]
        pictures = x.transpose(1, 2).flatten(0, 1)                          # (b f) 4 h w
        t = t.repeat_interleave(frames)
        context = context.repeat_interleave(frames, dim=0)
        embedded = self.embedded[place].repeat(len(x), 1, 1, 1)
        with autocast(self.controlnet):
            residuals = self.controlnet(pictures, t, context, embedded)
        return [self.scale * residual for residual in residuals]


def load_control(sd, path, hint, shape, scale=1.0):
    """A ControlNet from disk, and the hints of a clip whose latents have this shape -> Control.

    path: a ControlNet's folder or single file. hint: a video, a GIF or a folder of pictures, one for each frame; they
    are resized and cropped as a clip is. Raises InputError if they do not fit `sd` or the clip.
    """
    controlnet = load_controlnet(path, sd.device, sd.dtype)
    check_fits(controlnet.cfg, sd.unet.cfg, sd.multiple)
    _, _, count, height, width = shape
    sides = height * sd.multiple, width * sd.multiple
    hints = (read_at(hint, {count: range(count)}, *sides, sd.multiple) + 1) / 2
    return Control(controlnet, hints.to(sd.device), scale, str(path), str(hint))
