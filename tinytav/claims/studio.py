"""One clip's way through a variant of the method to its score."""
import math
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from tinytav import pipeline
from tinytav.claims.clips import FRAMES, said
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.editing import Clip
from tinytav.inflation import inflate
from tinytav.keep import FirstFrame, Keep, Mask, free_latents
from tinytav.measure import metrics
from tinytav.noise import NOISES
from tinytav.toy import world
from tinytav.toy.world import ATTRIBUTES
from tinytav.tuning import Tuner, blend
from tinytav.weights import load

SEED = 33           # one, because the clips carry the variance
ALL_CHANGED = 0.95  # of the pixels: an edit that changes more, as a time or a style does, has no outside


class Net(NamedTuple):
    """A video net. With tuned=None, "spatial" and "frame" it is the image net: an untuned T-Attn adds nothing."""
    tuned: str | None = "the paper's"       # which tensors: "the paper's" or "all"; None: untuned
    attention: str = "sparse-causal"
    norm: str = "clip"
    rate: float = 1                         # times the weights' own learning rate


class Variant(NamedTuple):
    """One way to edit: a net, the noise to begin with, and how to sample."""
    net: Net = Net()
    noise: str = "inverted"                 # a key of noise.NOISES
    strength: float = 1                     # of the tuning
    mask: str | None = None                 # outside it the clip is kept: "true", or "word", the edited word's own
    first: float = 0                        # the share of the steps during which the true first frame is held


def tensors(net, kind):
    """The parameters {name: parameter} of a video net that a Net tunes."""
    return dict(net.named_parameters()) if kind.tuned == "all" else net.tuned()


class ForSteps:
    """Holds what a keep holds, but only at the beginning and after the first `steps` steps."""

    def __init__(self, keep, steps):
        self.keep, self.left = keep, 1 + steps

    def __call__(self, x, noised):
        self.left -= 1
        return self.keep(x, noised) if self.left >= 0 else x


class Studio:
    """One clip, encoded, with its judge.

    settings: the weights' own, of which steps, lr, ddim_steps and guidance are used. captions: "user" or "full".
    """

    def __init__(self, folder, clip, settings, captions="user", frames=FRAMES, dtype=torch.float32):
        self.sd, self.eye = load(folder, dtype=dtype), metrics.Features(Path(folder) / "clip")
        self.clip, self.settings, self.captions = clip, settings, captions
        self.judge = Judge(clip.motion, frames)
        self.source = self.judge.draw(clip.scene)
        # Not editing.encode_clip: it makes latents contiguous, which would change the last bits of scores.json.
        mean, std = pipeline.encode(self.sd.vae, self.source)
        own, empty = self.sd.encode_prompts([world.caption(clip.scene, keep=said(captions)), ""]).split(1)
        self.encoded = Clip(mean, std, own, empty)
        self.prompts = [world.caption(edit.scene, keep=said(captions, (edit.name,))) for edit in clip.edits]
        self.wanted = self.sd.encode_prompts(self.prompts)          # (edits, m, d)
        self.texts = self.eye.texts(self.prompts)
        self.tuned_net = lru_cache(maxsize=1)(self.tuned_net)       # variants that share a net follow each other

    def reference(self, name):
        """Frames (edits, f, 3, h, w) of no net, through the VAE, by name.

        They are the source, the true edit, one frame of it held still, and the true edit in the other motion.
        """
        judge = Judge(self.clip.other, len(self.source)) if name == "other motion" else self.judge
        scenes = [self.clip.scene if name == "source" else edit.scene for edit in self.clip.edits]
        made = self.decode(torch.cat([self.encode(judge.draw(scene)) for scene in scenes]))
        return made[:, len(self.source) // 2, None].expand_as(made) if name == "still" else made

    def edit(self, variant):
        """All edits by a variant -> frames (edits, f, 3, h, w)."""
        net = self.net(variant.net, variant.strength)
        made = self.decode(self.sample(net, self.noise(variant.noise, net), variant))
        return self.pasted(made, variant.first) if variant.mask == "true" else made

    def untuned_net(self, kind):
        """The video net of a Net before it is tuned. It sees a clip of more than FRAMES frames in windows."""
        torch.manual_seed(SEED)
        return inflate(deepcopy(self.sd.unet), min(FRAMES, len(self.source)), kind.attention, kind.norm)

    def tuned_net(self, kind):
        """The video net of a Net, tuned on this clip."""
        net = self.untuned_net(kind)
        if kind.tuned:
            mean, std, own = self.encoded.mean, self.encoded.std, self.encoded.context
            lr = kind.rate * self.settings["lr"]
            tuner = Tuner(net, self.sd.schedule, mean, std, own, lr, SEED, tensors(net, kind))
            pipeline.last(tuner.run(self.settings["steps"]))
        return net

    def net(self, kind, strength):
        """The tuned net with so much of its tuning."""
        tuned = self.tuned_net(kind)
        if strength == 1:
            return tuned
        net = self.untuned_net(kind)
        blend(tensors(net, kind), tensors(tuned, kind), strength)
        return net

    def noise(self, kind, net):
        """What sampling begins with: a Noise, made."""
        mean = self.encoded.mean
        noise = NOISES[kind](self.settings["ddim_steps"], SEED, way={0: mean})
        return noise.make(net, self.sd.schedule, mean.shape, self.encoded)

    def sample(self, net, noise, variant):
        """The edits from a Noise: latents (edits, 4, f, h, w)."""
        def sampled(context, keeps):
            return pipeline.last(noise.sample(net, self.sd.schedule, context, self.encoded.empty.expand_as(context),
                                              self.settings["guidance"], keeps=keeps))
        if variant.mask != "word":
            return sampled(self.wanted, self.keeps(variant, noise.count))
        parts = []
        for edit, prompt, context in zip(self.clip.edits, self.prompts, self.wanted.split(1)):      # each has its word
            keep = Keep(word=getattr(edit.scene, edit.name), clip=self.encoded.mean)
            with keep.during(net, self.sd.tokenizer, prompt) as keeps:
                parts.append(sampled(context, keeps))
        return torch.cat(parts)

    def keeps(self, variant, steps):
        """What is held while all edits are sampled: outside the true masks the clip, and the true first frames."""
        keeps = []
        if variant.mask == "true":
            keeps.append(Mask(self.encoded.mean, free_latents(self.changed(), self.sd.multiple)[:, None]))
        if variant.first:
            first = torch.cat([self.encode(x[:1]) for x in self.true_edits()])
            keeps.append(ForSteps(FirstFrame(first), round(variant.first * steps)))
        return keeps

    def pasted(self, made, first):
        """Edits with the clip's own pixels outside the true masks, as keep.Keep.paste. first: is frame 1 given?"""
        pixels = self.changed()
        pixels[:, 0] |= first > 0
        return torch.where(pixels[:, :, None], made, self.decode(self.encoded.mean))

    def true_edits(self):
        """Drawings of the true edits, (edits, f, 3, h, w)."""
        return torch.stack([self.judge.draw(edit.scene) for edit in self.clip.edits])

    def changed(self):
        """Where the true edits differ from the source: (edits, f, h, w) bool."""
        return (self.true_edits() != self.source).any(2)

    def encode(self, x):
        return pipeline.encode(self.sd.vae, x)[0]

    def decode(self, latents):
        return torch.stack([pipeline.decode(self.sd.vae, z[None]) for z in latents])

    def score(self, results):
        """What judge and CLIP say of the clip's edits (edits, f, 3, h, w): a dict of numbers for each."""
        return [self.score_one(*each) for each in zip(results, self.clip.edits, self.texts, self.changed())]

    def score_one(self, x, edit, text, changed):
        shares = self.judge.answers(x, edit.scene, said(self.captions, (edit.name,)))
        features = self.eye.images(x)
        return shares | dict(
            name=edit.name, held_out=world.is_held_out(edit.scene), edited=shares[edit.name],
            kept=sum(shares[name] for name in ATTRIBUTES if name != edit.name) / (len(ATTRIBUTES) - 1),
            motion=sum(shares[part] for part in MOTIONS) / len(MOTIONS),
            success=all(shares[name] > 0.5 for name in (edit.name, *MOTIONS, "moves")),      # in most of the frames
            all_pairs=metrics.consistency_all_pairs(features), neighbours=metrics.consistency_neighbours(features),
            text=metrics.textual_alignment(features, text), outside=self.outside(x, changed))

    def outside(self, x, changed):
        """PSNR where the true edit is the source; NaN where the edit changes nearly everything."""
        return metrics.psnr_outside(x, self.source, changed) if changed.float().mean() < ALL_CHANGED else math.nan
