"""Test clips whose true edits are known, and one clip's way through a variant of the method to its score."""
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from tinytav import edit_friendly, pipeline
from tinytav.claims import beyond
from tinytav.claims.judge import MOTIONS, Judge
from tinytav.inflation import inflate
from tinytav.measure import metrics
from tinytav.measure.attention import word_positions
from tinytav.toy import world
from tinytav.toy.world import ATTRIBUTES, GIST, Motion, Scene
from tinytav.tuning import Tuner
from tinytav.weights import load

FRAMES = 8
TUNED = {"the paper's": lambda net: net.tuned(),
         "all": lambda net: dict(net.named_parameters()),
         # re-entrant checkpointing leaves the down blocks without gradients: 70 of Stable Diffusion's 112 tensors
         "official": lambda net: {name: p for name, p in net.tuned().items() if not name.startswith("down_blocks.")}}


class Net(NamedTuple):
    """A video net, tuned or not. With tuned=None, "spatial" and "frame" it is the image net: an untuned T-Attn adds nothing."""
    tuned: str | None = "the paper's"       # which tensors, a key of TUNED
    attention: str = "sparse-causal"
    norm: str = "clip"
    steps: float = 1                        # times the weights' own number of steps
    rate: float = 1                         # times the weights' own learning rate


class Variant(NamedTuple):
    """One way to edit: a net, the noise to begin with, and how to sample."""
    net: Net = Net()
    noise: str = "inverted"                 # or random (another in every frame), source caption, fixed point, edit-friendly
    guide_from: str = "empty"               # the prompt that guidance goes away from: empty, or the source's
    blend: bool = False                     # outside the edited word's attention keep the inverted clip


class Edit(NamedTuple):
    name: str           # the attribute that is edited
    scene: Scene        # the true answer


class KnownClip(NamedTuple):
    scene: Scene
    motion: Motion
    edits: list[Edit]


def change(scene, name, rng):
    return Edit(name, replace(scene, **{name: rng.choice([v for v in ATTRIBUTES[name] if v != getattr(scene, name)])}))


def make_clip(kind, i):
    """Clip i of a kind ("test" or "choice"). In every third the subject and place edits were never seen in training."""
    rng = Random(f"{kind}/{i}")
    motion = world.random_motion(rng)
    drift = rng.choice((-0.16, 0.16))       # so that a figure that stays where it is can be detected
    motion = replace(motion, drift=drift, start=replace(motion.start, x=0.5 - drift / 2))
    names = ("subject", "place", ("clothes", "hat")[i % 2], ("time", "style")[i // 2 % 2])
    while True:
        scene = world.random_scene(rng)
        edits = [change(scene, name, rng) for name in names]
        if [world.is_held_out(edit.scene) for edit in edits[:2]] == [i % 3 == 2] * 2:
            return KnownClip(scene, motion, edits)


def said(captions, edited=()):
    """The attributes that a caption names. "user": the gist, and what is edited. "full": all of them."""
    return tuple(name for name in ATTRIBUTES if captions == "full" or name in (*GIST, *edited))


class Studio:
    """One clip, encoded, with its judge. `settings`: steps, lr, ddim_steps, guidance. captions: "user" or "full"."""

    def __init__(self, folder, clip, settings, captions="user", dtype=torch.float32):
        self.sd, self.clip, self.settings, self.captions = load(folder, dtype=dtype), clip, settings, captions
        self.judge, self.eye = Judge(clip.motion, FRAMES), metrics.Features(Path(folder) / "clip")
        self.source = self.judge.draw(clip.scene)
        self.mean, self.std = pipeline.encode(self.sd.vae, self.source)
        own = world.caption(clip.scene, keep=said(captions))
        self.prompts = [world.caption(edit.scene, keep=said(captions, (edit.name,))) for edit in clip.edits]
        self.empty, self.own, *wanted = self.sd.encode_prompts(["", own, *self.prompts]).split(1)
        self.wanted = torch.cat(wanted)
        self.texts = self.eye.texts(self.prompts)
        self.tuned_net = lru_cache(maxsize=1)(self.tuned_net)       # variants that share a net follow each other

    def through_vae(self, x):
        """Frames (f, 3, h, w), encoded and decoded: what an edit that is right would look like."""
        return pipeline.decode(self.sd.vae, pipeline.encode(self.sd.vae, x)[0])

    def tune(self, net, tuned, lr, seed, steps):
        """Yields (steps done, loss)."""
        tuner = Tuner(net, self.sd.schedule, self.mean, self.std, self.own, lr, seed, TUNED[tuned](net))
        for step in range(1, steps + 1):
            yield step, tuner.step()

    def inflated(self, attention="sparse-causal", norm="clip", seed=33):
        torch.manual_seed(seed)
        return inflate(deepcopy(self.sd.unet), FRAMES, attention, norm)

    def tuned_net(self, kind, seed):
        """A Net of this clip."""
        net = self.inflated(kind.attention, kind.norm, seed)
        if kind.tuned:
            steps, lr = round(kind.steps * self.settings["steps"]), kind.rate * self.settings["lr"]
            pipeline.last(self.tune(net, kind.tuned, lr, seed, steps))
        return net

    def edit(self, variant, seed):
        """All edits by a variant -> frames (edits, f, 3, h, w)."""
        net = self.tuned_net(variant.net, seed)
        if variant.noise == "edit-friendly":
            return self.decode(self.edit_friendly(net, seed))
        if variant.blend:
            return self.decode(self.blended(net))
        return self.sample(net, self.noise(variant.noise, net, seed), self.settings["guidance"], variant.guide_from)

    def edit_friendly(self, net, seed):
        """The edits by edit-friendly noise: latents (edits, 4, f, h, w)."""
        inverted = list(edit_friendly.invert(net, self.sd.schedule, self.mean, self.own, self.settings["ddim_steps"], seed))
        return pipeline.last(edit_friendly.sample(net, self.sd.schedule, inverted, self.wanted,
                                                  self.empty.expand_as(self.wanted), self.settings["guidance"]))

    def blended(self, net):
        """The edits, blended with the inverted clip: latents (edits, 4, f, h, w)."""
        inversion = pipeline.invert(net, self.sd.schedule, self.mean, self.empty, self.settings["ddim_steps"])
        trajectory, made = [self.mean, *inversion], []
        for edit, prompt, context in zip(self.clip.edits, self.prompts, self.wanted):
            words = word_positions(self.sd.tokenizer, prompt, getattr(edit.scene, edit.name))
            made.append(beyond.blended(net, self.sd.schedule, trajectory, context[None], self.empty, words,
                                       self.settings["guidance"]))
        return torch.cat(made)

    def noise(self, kind, net, seed):
        """What sampling begins with, (1, 4, f, h, w)."""
        if kind == "random":
            return pipeline.gaussian(self.mean.shape, seed)
        if kind == "source caption":
            return self.invert(net, self.own)
        if kind == "fixed point":
            return pipeline.last(beyond.fixed_point(net, self.sd.schedule, self.mean, self.empty, self.settings["ddim_steps"]))
        return self.invert(net, self.empty)

    def invert(self, net, context):
        return pipeline.last(pipeline.invert(net, self.sd.schedule, self.mean, context, self.settings["ddim_steps"]))

    def sample(self, net, noise, guidance, guide_from="empty"):
        """The edits from one noise (1, 4, f, h, w) -> frames (edits, f, 3, h, w)."""
        away = self.own if guide_from == "source" else self.empty
        count = len(self.wanted)
        return self.decode(pipeline.last(pipeline.sample(
            net, self.sd.schedule, noise.expand(count, -1, -1, -1, -1), self.wanted, away.expand_as(self.wanted),
            self.settings["ddim_steps"], guidance)))

    def decode(self, latents):
        return torch.stack([pipeline.decode(self.sd.vae, z[None]) for z in latents])

    def score(self, results):
        """What judge and CLIP say of the clip's edits (edits, f, 3, h, w): a dict of numbers for each."""
        return [self.score_one(*each) for each in zip(results, self.clip.edits, self.texts)]

    def score_one(self, x, edit, text):
        shares = self.judge.answers(x, edit.scene, said(self.captions, (edit.name,)))
        features = self.eye.images(x)
        return shares | dict(
            name=edit.name, held_out=world.is_held_out(edit.scene), edited=shares[edit.name],
            kept=sum(shares[name] for name in ATTRIBUTES if name != edit.name) / (len(ATTRIBUTES) - 1),
            motion=sum(shares[part] for part in MOTIONS) / len(MOTIONS),
            success=all(shares[name] > 0.5 for name in (edit.name, *MOTIONS, "moves")),      # in most of the frames
            all_pairs=metrics.consistency_all_pairs(features), neighbours=metrics.consistency_neighbours(features),
            text=metrics.textual_alignment(features, text))
