"""Pose control in the toy world: a subject learned from one clip moves as the stick figures of another motion say.

    python -m tinytav pose --out pose --processes 2
    python -m tinytav pose --out pose-full --processes 2 --captions full

A net is tuned on a clip. Then it is asked, under the clip's own caption, for the same scene in another motion. Only the
stick figures show that motion. The judge says whether limbs and position are those of the new motion, and whether the
appearance is the clip's. It looks for the figure where the figure should now be. Each noise to begin with is tried.
Writes the table pose.md, and a picture of each clip.
"""
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from tinytav import cli, pipeline
from tinytav.claims.experiment import FRAMES, Net, Studio, make_clip, said
from tinytav.claims.judge import Judge
from tinytav.claims.results import EYE, every_clip, labelled, parser, table_of, write
from tinytav.control import Control
from tinytav.files import frames
from tinytav.stable_diffusion.controlnet import load_controlnet
from tinytav.toy import skeleton, world
from tinytav.weights import load

SEED = 33
CONTROL = "controlnet/diffusion_pytorch_model.safetensors"      # in the weights' folder
SCALE = 1.5         # the toy's ControlNet follows limbs better than at 1: chosen on two clips of the kind "choice"
NOISES = ("inverted", "random", "shared")


class Variant(NamedTuple):
    """One way to ask for the other motion."""
    noise: str              # of NOISES
    tuned: bool = True
    scale: float = SCALE    # of the ControlNet's residuals; 0 for no control


# Variants that share a net follow each other.
VARIANTS = {
    "tuned, inverted noise, scale 1": Variant("inverted", scale=1),
    **{f"tuned, {noise} noise": Variant(noise) for noise in NOISES},
    **{f"no control, {noise} noise": Variant(noise, scale=0) for noise in NOISES},
    **{f"untuned, {noise} noise": Variant(noise, tuned=False) for noise in NOISES},
}
REFERENCES = ("source", "truth")                # both through the VAE; the truth is the scene drawn in the other motion
APPEARANCE = ("subject", "clothes")
# What must be right in most frames for a clip to count as a success.
WANTED = ("phase", "x", *APPEARANCE)
COLUMNS = dict(phase="limbs", x="position", subject="subject", clothes="clothes", rest="other words",
               agreement="agreement", camera="camera", success="success", psnr="PSNR")


def other_motion(motion, rng):
    """Another motion in front of the same background: limbs and size are others, the figure drifts the other way."""
    other = world.random_motion(rng)
    start = replace(other.start, camera=motion.start.camera, x=0.5 + motion.drift / 2)
    return replace(other, start=start, travel=motion.travel, drift=-motion.drift)


class Posing:
    """A clip, encoded, and the other motion: its hints and its judge. `settings`: steps, lr, ddim_steps, guidance."""

    def __init__(self, folder, clip, motion, settings, captions="user"):
        self.studio, self.settings, self.scene = Studio(folder, clip, settings, captions), settings, clip.scene
        self.judge = Judge(motion, FRAMES)
        size = self.studio.source.shape[-1]
        hints = skeleton.hint(skeleton.clip(clip.scene.activity, motion, FRAMES, size))
        self.control = Control(load_controlnet(Path(folder) / "controlnet"), hints)

    def noise(self, kind, net):
        """What sampling begins with, (1, 4, f, h, w)."""
        shape = self.studio.mean.shape
        if kind == "inverted":
            return self.studio.invert(net, self.studio.empty)
        if kind == "shared":
            return pipeline.gaussian((1, 4, 1, *shape[3:]), SEED).expand(shape)
        return pipeline.gaussian(shape, SEED)

    def make(self, variant):
        """The scene in the other motion, by a variant -> frames (1, f, 3, h, w)."""
        studio = self.studio
        net = studio.tuned_net(Net("the paper's" if variant.tuned else None), SEED)
        self.control.scale = variant.scale
        latents = pipeline.last(pipeline.sample(
            net, studio.sd.schedule, self.noise(variant.noise, net), studio.own, studio.empty,
            self.settings["ddim_steps"], self.settings["guidance"], self.control if variant.scale else None))
        return pipeline.decode(studio.sd.vae, latents)[None]

    def reference(self, name):
        judge = self.studio.judge if name == "source" else self.judge
        return self.studio.through_vae(judge.draw(self.scene))[None]

    def score(self, results):
        """What the judge of the other motion says of clips (n, f, 3, h, w): a dict of numbers for each."""
        return [self.score_one(x) for x in results]

    def score_one(self, x):
        shares = self.judge.answers(x, self.scene, said(self.studio.captions))
        others = [shares[name] for name in world.ATTRIBUTES if name not in APPEARANCE]
        return shares | dict(rest=sum(others) / len(others), success=all(shares[name] > 0.5 for name in WANTED))


def work(args, i):
    """Clip i by every variant: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    clip, folder = make_clip("pose", i), args.out / args.captions / str(i)
    motion = other_motion(clip.motion, Random(f"other/{i}"))
    posing = Posing(args.weights, clip, motion, args.settings, args.captions)
    for name in REFERENCES:
        write(folder, name, lambda: posing.reference(name), posing)
    for name, variant in VARIANTS.items():
        write(folder, name, lambda: posing.make(variant), posing)
    picture(folder, posing.control.hints)
    return i


def picture(folder, hints):
    """A clip's results, a row each, below the source and the hints (f, 3, h, w) in [0, 1] -> pose.png."""
    rows = {name: load_file(folder / f"{name}.safetensors")["frames"][0] for name in (*REFERENCES, *VARIANTS)}
    drawn = frames.to_uint8(2 * hints - 1).permute(0, 3, 1, 2)
    labelled(folder / "pose.png", {"source": rows["source"], "hints": drawn, **rows})


def main():
    p = parser(__doc__.partition("\n")[0], "pose", 6)
    p.add_argument("--captions", choices=("user", "full"), default="user",
                   help="user: subject, activity and place, so that nothing but the tuned net holds the clothes; full: everything")
    args = p.parse_args()
    every_clip(work, args, load(args.weights), files=(EYE, CONTROL))
    text = table_of(args.out / args.captions, args.clips, (*REFERENCES, *VARIANTS), COLUMNS)
    (args.out / args.captions / "pose.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    cli.run(main)
