"""One clip's way through a variant of the method to its score."""
import math
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from tinytav import pipeline
from tinytav.claims import beyond
from tinytav.claims.clips import FRAMES, said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.control import Control
from tinytav.editing import Clip
from tinytav.files.frames import to_uint8
from tinytav.inflation import inflate
from tinytav.keep import FirstFrame, Keep, Mask, free_latents
from tinytav.measure import metrics
from tinytav.noise import NOISES, Inverted
from tinytav.stable_diffusion.controlnet import load_controlnet
from tinytav.toy import skeleton, world
from tinytav.toy.world import ATTRIBUTES
from tinytav.tuning import Tuner, blend
from tinytav.weights import load

COARSE = 4          # the coarse part of a frame's noise: means over a grid of 4x4 cells
ALL_CHANGED = 0.95  # of the pixels: an edit that changes more, as a time or a style does, has no outside
APPEARANCE = ("subject", "clothes")
WANTED = ("phase", "x", *APPEARANCE)    # of pose control: what must be right in most frames for a success
TUNED = {"the paper's": lambda net: net.tuned(),
         "all": lambda net: dict(net.named_parameters()),
         # re-entrant checkpointing leaves the down blocks without gradients: 70 of Stable Diffusion's 112 tensors
         "official": lambda net: {name: p for name, p in net.tuned().items() if not name.startswith("down_blocks.")}}


class Net(NamedTuple):
    """A video net. With tuned=None, "spatial" and "frame" it is the image net: an untuned T-Attn adds nothing."""
    tuned: str | None = "the paper's"       # which tensors, a key of TUNED; None: untuned
    attention: str = "sparse-causal"
    norm: str = "clip"
    steps: float = 1                        # times the weights' own number of steps
    rate: float = 1                         # times the weights' own learning rate
    windows: str | None = None              # of FRAMES frames: averaged, or a kind of beyond.Windows; None: one window


class Variant(NamedTuple):
    """One way to edit: a net, the noise to begin with, and how to sample."""
    net: Net = Net()
    noise: str = "inverted"                 # a kind that Studio.noise knows
    guide_from: str = "empty"               # the prompt that guidance goes away from: empty, or the source's
    guidance: float = 1                     # times the weights' own
    strength: float = 1                     # of the tuning
    mask: str | None = None                 # outside it the clip is kept: "true", or "word", the edited word's own
    first: float = 0                        # the share of the steps during which the true first frame is held
    all_named: bool = False                 # the edit's prompt names everything, whatever the clip's own names
    control: float = 0                      # the scale of a ControlNet's residuals; 0: none


def coarse(noise):
    """Noise (b, 4, f, h, w) -> its mean in each cell of a grid, the same shape."""
    pictures = noise.flatten(0, 1)                                                          # (b 4) f h w
    means = F.adaptive_avg_pool2d(pictures, COARSE)
    return F.interpolate(means, size=noise.shape[3:], mode="nearest").view(noise.shape)


class ForSteps:
    """Holds what a keep holds, but only at the beginning and after the first `steps` steps."""

    def __init__(self, keep, steps):
        self.keep, self.left = keep, 1 + steps

    def __call__(self, x, noised):
        self.left -= 1
        return self.keep(x, noised) if self.left >= 0 else x


class Studio:
    """One clip, encoded, with its judges.

    settings: the weights' own, of which steps, lr, ddim_steps and guidance are used. captions: "user" or "full".
    """
    control, shown = None, {}       # a ControlNet with its hints; rows that pictures show beside the results

    def __init__(self, folder, clip, settings, captions="user", frames=FRAMES, dtype=torch.float32):
        self.sd, self.eye = load(folder, dtype=dtype), metrics.Features(Path(folder) / "clip")
        self.clip, self.settings, self.captions = clip, settings, captions
        self.schedule, self.steps = self.sd.schedule, settings["ddim_steps"]
        self.judge = self.asked = Judge(clip.motion, frames)        # asked: of the motion that the edits should show
        self.source = self.judge.draw(clip.scene)
        self.mean, self.std = pipeline.encode(self.sd.vae, self.source)
        self.prompts = [world.caption(edit.scene, keep=said(captions, (edit.name,))) for edit in clip.edits]
        self.caption = world.caption(clip.scene, keep=said(captions))
        self.empty, self.own = self.sd.encode_prompts(["", self.caption]).split(1)
        self.texts = self.eye.texts(self.prompts)
        self.tuned_net = lru_cache(maxsize=1)(self.tuned_net)       # variants that share a net follow each other

    def reference(self, name):
        """Frames (edits, f, 3, h, w) of no net, through the VAE, by name.

        They are the source, the true edit, one frame of it held still, and the true edit in the other motion.
        """
        judge = {"source": self.judge, "other motion": Judge(self.clip.other, len(self.source))}.get(name, self.asked)
        scenes = [self.clip.scene if name == "source" else edit.scene for edit in self.clip.edits]
        made = self.decode(torch.cat([self.encode(judge.draw(scene)) for scene in scenes]))
        return made[:, len(self.source) // 2, None].expand_as(made) if name == "still" else made

    def edit(self, variant, seed):
        """All edits by a variant -> frames (edits, f, 3, h, w)."""
        net = self.strong(variant.net, seed, variant.strength)
        made = self.decode(self.sample(net, self.noise(variant.noise, net, seed), variant))
        return self.pasted(made, variant.first) if variant.mask == "true" else made

    def tuned_net(self, kind, seed):
        """A Net of this clip."""
        net, count = self.untuned_net(kind, seed), len(self.source)
        other = beyond.Windows(net, count, kind.windows) if kind.windows not in (None, "averaged") else None
        if kind.tuned:
            tuner = Tuner(net, self.schedule, self.mean, self.std, self.own, kind.rate * self.settings["lr"], seed,
                          TUNED[kind.tuned](net))
            if other:
                tuner.places = other.places
            pipeline.last(tuner.run(round(kind.steps * self.settings["steps"])))
        return other or net

    def untuned_net(self, kind, seed):
        torch.manual_seed(seed)
        count = FRAMES if kind.windows else len(self.source)
        return inflate(deepcopy(self.sd.unet), count, kind.attention, kind.norm)

    def strong(self, kind, seed, strength):
        """The tuned net with so much of its tuning."""
        tuned = self.tuned_net(kind, seed)
        if strength == 1 or not kind.tuned:
            return tuned
        net = self.untuned_net(kind, seed)
        blend(TUNED[kind.tuned](net), dict(tuned.named_parameters()), strength)
        return net

    def noise(self, kind, net, seed=33):
        """What sampling begins with: a Noise, made. Its x is (1, 4, f, h, w), or one for each edit."""
        if kind not in NOISES:
            return Inverted(self.steps, x=self.tried(kind, net, seed))
        clip = Clip(self.mean, self.std, self.own, self.empty)
        return NOISES[kind](self.steps, seed, way={0: self.mean}).make(net, self.schedule, self.mean.shape, clip)

    def tried(self, kind, net, seed):
        """Noise of a kind that is no option of sample.py, (1, 4, f, h, w), or one for each edit."""
        if kind == "source caption":
            return self.invert(net, self.mean, self.own)
        if kind == "fixed point":
            return pipeline.last(beyond.fixed_point(net, self.schedule, self.mean, self.empty, self.steps))
        source = self.invert(net, self.mean, self.empty)
        true = torch.cat([self.invert(net, self.encode(x), self.empty) for x in self.true_edits()])
        return {"true edit": true, "coarse of the true edit": coarse(true) + source - coarse(source),
                "fine of the true edit": true - coarse(true) + coarse(source)}[kind]

    def true_edits(self):
        """Drawings of the true edits, (edits, f, 3, h, w)."""
        return torch.stack([self.asked.draw(edit.scene) for edit in self.clip.edits])

    def invert(self, net, latents, context):
        return pipeline.last(pipeline.invert(net, self.schedule, latents, context, self.steps))

    def wanted(self, all_named=False):
        """The contexts of the edits' prompts, (edits, m, d)."""
        full = [world.caption(edit.scene) for edit in self.clip.edits]
        return self.sd.encode_prompts(full if all_named else self.prompts)

    def sample(self, net, noise, variant=Variant()):
        """The edits from a Noise: latents (edits, 4, f, h, w)."""
        wanted = self.wanted(variant.all_named)
        away = (self.own if variant.guide_from == "source" else self.empty).expand_as(wanted)
        guidance = variant.guidance * self.settings["guidance"]
        if variant.control:
            self.control.scale = variant.control
        control = self.control if variant.control else None

        def sampled(some, keeps):
            return pipeline.last(noise.sample(net, self.schedule, wanted[some], away[some], guidance, control, keeps))
        if variant.mask != "word":
            return sampled(slice(None), self.keeps(variant, noise.count))
        parts = []
        for i, (edit, prompt) in enumerate(zip(self.clip.edits, self.prompts)):     # one at a time: each has its word
            keep = Keep(word=getattr(edit.scene, edit.name), clip=self.mean)
            with keep.during(net, self.sd.tokenizer, prompt) as keeps:
                parts.append(sampled(slice(i, i + 1), keeps))
        return torch.cat(parts)

    def keeps(self, variant, steps):
        """What is held while all edits are sampled: outside the true masks the clip, and the true first frames."""
        keeps = []
        if variant.mask == "true":
            keeps.append(Mask(self.mean, free_latents(self.changed(), self.sd.multiple)[:, None]))
        if variant.first:
            first = torch.cat([self.encode(x[:1]) for x in self.true_edits()])
            keeps.append(ForSteps(FirstFrame(first), round(variant.first * steps)))
        return keeps

    def pasted(self, made, first):
        """Edits with the clip's own pixels outside the true masks, as keep.Keep.paste. first: is frame 1 given?"""
        pixels = self.changed()
        pixels[:, 0] |= first > 0
        return torch.where(pixels[:, :, None], made, self.decode(self.mean))

    def changed(self):
        """Where the true edits differ from the source: (edits, f, h, w) bool."""
        return (self.true_edits() != self.source).any(2)

    def encode(self, x):
        return pipeline.encode(self.sd.vae, x)[0]

    def decode(self, latents):
        return torch.stack([pipeline.decode(self.sd.vae, z[None]) for z in latents])

    def score(self, results):
        """What judge and CLIP say of the clip's edits (edits, f, 3, h, w): a dict of numbers for each."""
        scores = [self.score_one(*each) for each in zip(results, self.clip.edits, self.texts)]
        return [score | dict(outside=self.outside(x, changed))
                for score, x, changed in zip(scores, results, self.changed())]

    def outside(self, x, changed):
        """PSNR where the true edit is the source; NaN where the edit changes nearly everything."""
        return metrics.psnr_outside(x, self.source, changed) if changed.float().mean() < ALL_CHANGED else math.nan

    def score_one(self, x, edit, text):
        shares = self.asked.answers(x, edit.scene, said(self.captions, (edit.name,)))
        features = self.eye.images(x)
        return shares | dict(
            name=edit.name, held_out=world.is_held_out(edit.scene), edited=shares[edit.name],
            kept=sum(shares[name] for name in ATTRIBUTES if name != edit.name) / (len(ATTRIBUTES) - 1),
            motion=sum(shares[part] for part in MOTIONS) / len(MOTIONS),
            success=all(shares[name] > 0.5 for name in (edit.name, *MOTIONS, "moves")),      # in most of the frames
            all_pairs=metrics.consistency_all_pairs(features), neighbours=metrics.consistency_neighbours(features),
            text=metrics.textual_alignment(features, text))


class Posing(Studio):
    """Pose control: asks a tuned net for the same scene in the clip's `other` motion, which only stick figures show.

    The judge says whether limbs and position are those of the other motion, and whether the appearance is the clip's.
    """

    def __init__(self, folder, clip, settings, captions="user", frames=FRAMES):
        super().__init__(folder, clip, settings, captions, frames)
        self.asked = Judge(clip.other, frames)
        hints = skeleton.hint(skeleton.clip(clip.scene.activity, clip.other, frames, self.source.shape[-1]))
        self.control = Control(load_controlnet(Path(folder) / "controlnet"), hints)
        self.shown = {"stick figures": to_uint8(2 * hints - 1).permute(0, 3, 1, 2)}

    def score_one(self, x, edit, text):
        shares = self.asked.answers(x, edit.scene, said(self.captions))
        others = [shares[name] for name in ATTRIBUTES if name not in APPEARANCE]
        return shares | dict(rest=sum(others) / len(others), success=all(shares[name] > 0.5 for name in WANTED))
