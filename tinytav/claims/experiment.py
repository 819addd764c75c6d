"""Test clips whose true edits are known, and one clip's way through a variant of the method to its score."""
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from tinytav import pipeline
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.inflation import inflate
from tinytav.measure import metrics
from tinytav.stable_diffusion import checkpoint
from tinytav.toy import world
from tinytav.toy.world import ATTRIBUTES, Motion, Scene
from tinytav.tuning import Tuner

FRAMES = 8
TUNED = {"the paper's": lambda net: net.tuned(),
         "all": lambda net: dict(net.named_parameters()),
         # re-entrant checkpointing leaves the down blocks without gradients: 70 of Stable Diffusion's 112 tensors
         "official": lambda net: {name: p for name, p in net.tuned().items() if not name.startswith("down_blocks.")}}


class Variant(NamedTuple):
    """One way to edit. Untuned, spatial and normed per frame it is the image net: T-Attn begins as nothing."""
    tuned: str | None = "the paper's"       # which tensors, a key of TUNED
    attention: str = "sparse-causal"
    norm: str = "clip"
    inverted: bool = True                   # or begun with noise of its own in every frame


class Edit(NamedTuple):
    name: str           # the attribute that is edited
    scene: Scene        # the true answer


class Clip(NamedTuple):
    scene: Scene
    motion: Motion
    edits: list[Edit]


def change(scene, name, rng):
    return Edit(name, replace(scene, **{name: rng.choice([v for v in ATTRIBUTES[name] if v != getattr(scene, name)])}))


def make_clip(kind, i):
    """Clip i of a kind ("test" or "choice"). In every third the object and place edits were never seen in training."""
    rng = Random(f"{kind}/{i}")
    motion = world.random_motion(rng)
    drift = rng.choice((-0.16, 0.16))       # so that a figure that stays where it is can be told
    motion = replace(motion, drift=drift, start=replace(motion.start, x=0.5 - drift / 2))
    names = ("subject", "place", ("clothes", "hat")[i % 2], ("time", "style")[i // 2 % 2])
    while True:
        scene = world.random_scene(rng)
        edits = [change(scene, name, rng) for name in names]
        if [world.is_held_out(edit.scene) for edit in edits[:2]] == [i % 3 == 2] * 2:
            return Clip(scene, motion, edits)


class Studio:
    """One clip, encoded, with its judge. `settings`: steps, lr, ddim_steps, guidance."""

    def __init__(self, folder, clip, settings, dtype=torch.float32):
        self.sd, self.clip, self.settings = checkpoint.load(folder, dtype=dtype), clip, settings
        self.judge, self.eye = Judge(self.sd.vae, clip.motion, FRAMES), metrics.Features(Path(folder) / "clip")
        self.source = self.judge.draw(clip.scene)[0]
        self.mean, self.std = pipeline.encode(self.sd.vae, self.source)
        captions = [world.caption(scene) for scene in (clip.scene, *(edit.scene for edit in clip.edits))]
        self.empty, self.own, *self.wanted = self.sd.encode_prompts(["", *captions]).split(1)
        self.texts = self.eye.texts(captions[1:])
        self.tuned_net = lru_cache(maxsize=1)(self.tuned_net)       # variants that share a net follow each other

    def tune(self, net, tuned, lr, seed, steps):
        """Yields (steps done, loss)."""
        tuner = Tuner(net, self.sd.schedule, self.mean, self.std, self.own, lr, seed, TUNED[tuned](net))
        for step in range(1, steps + 1):
            yield step, tuner.step()

    def inflated(self, attention="sparse-causal", norm="clip", seed=33):
        torch.manual_seed(seed)
        return inflate(deepcopy(self.sd.unet), FRAMES, attention, norm)

    def tuned_net(self, tuned, attention, norm, seed):
        net = self.inflated(attention, norm, seed)
        if tuned:
            pipeline.last(self.tune(net, tuned, self.settings["lr"], seed, self.settings["steps"]))
        return net

    def edit(self, variant, seed):
        """All edits by a variant -> frames (edits, f, 3, h, w)."""
        net = self.tuned_net(*variant[:3], seed)
        noise = self.invert(net) if variant.inverted else pipeline.gaussian(self.mean.shape, seed)
        return self.sample(net, noise, self.settings["guidance"])

    def invert(self, net):
        return pipeline.last(pipeline.invert(net, self.sd.schedule, self.mean, self.empty, self.settings["ddim_steps"]))

    def sample(self, net, noise, guidance):
        context = torch.cat(self.wanted)
        latents = pipeline.last(pipeline.sample(
            net, self.sd.schedule, noise.expand(len(context), -1, -1, -1, -1), context, self.empty.expand_as(context),
            self.settings["ddim_steps"], guidance))
        return torch.stack([pipeline.decode(self.sd.vae, z[None]) for z in latents])

    def score(self, results):
        """What judge and CLIP say of the clip's edits (edits, f, 3, h, w): a dict of numbers for each."""
        return [self.score_one(*each) for each in zip(results, self.clip.edits, self.texts)]

    def score_one(self, x, edit, text):
        shares, features = self.judge.answers(x, edit.scene), self.eye.images(x)
        return shares | dict(
            name=edit.name, held_out=world.is_held_out(edit.scene), edited=shares[edit.name],
            kept=sum(shares[name] for name in ATTRIBUTES if name != edit.name) / (len(ATTRIBUTES) - 1),
            success=all(shares[name] > 0.5 for name in (edit.name, *MOTIONS, "moves")),      # in most of the frames
            all_pairs=metrics.consistency_all_pairs(features), neighbours=metrics.consistency_neighbours(features),
            text=metrics.textual_alignment(features, text))
