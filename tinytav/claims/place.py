"""Why the background's motion is often wrong after a change of place: edits from noises that are mixed from two clips.

    python -m tinytav place --out place --processes 2

The place of each test clip is edited as in the claims table, with the same tuned nets, but from several noises. One is the
source's inverted noise, which the method begins with. One is that of the true edit, which is known because it can be drawn.
Two more have the coarse part of one and the fine part of the other. If the background moves correctly from the true edit's
noise alone, then the source's noise is what fails, and not the net. Writes the table place.md, and a picture of each clip.
"""
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tinytav import cli, pipeline
from tinytav.claims.experiment import Studio, Variant, make_clip
from tinytav.claims.results import every_clip, labelled, parser, table_of, write
from tinytav.toy import world
from tinytav.weights import load

SEED, METHOD = 33, Variant()       # the full method
COARSE = 4          # the coarse part of a frame's noise: means over a grid of 4x4 cells
REFERENCES = ("source", "true edit")
VARIANTS = ("source's noise", "source's noise, all named", "true edit's noise", "coarse of the true edit, fine of the source",
            "fine of the true edit, coarse of the source")
COLUMNS = dict(camera="camera", edited="edit right", phase="limbs", x="position", success="success", psnr="PSNR")


def coarse(noise):
    """Noise (1, 4, f, h, w) -> its mean in each cell of a grid, the same shape."""
    frames = noise[0].transpose(0, 1)                                   # (f, 4, h, w)
    means = F.adaptive_avg_pool2d(frames, COARSE)
    return F.interpolate(means, size=frames.shape[2:], mode="nearest").transpose(0, 1)[None]


class Changing:
    """A clip whose place is edited. `settings`: steps, lr, ddim_steps, guidance."""

    def __init__(self, folder, clip, settings):
        self.edit, = [edit for edit in clip.edits if edit.name == "place"]
        self.studio = Studio(folder, clip._replace(edits=[self.edit]), settings)
        self.settings, self.score = settings, self.studio.score

    def noise(self, net, scene):
        """The inverted noise of a scene in the clip's motion."""
        studio = self.studio
        latents, _ = pipeline.encode(studio.sd.vae, studio.judge.draw(scene))
        return pipeline.last(pipeline.invert(net, studio.sd.schedule, latents, studio.empty, self.settings["ddim_steps"]))

    def mixed(self, variant, net):
        """The noise that a variant's name describes."""
        source, true = (self.noise(net, scene) for scene in (self.studio.clip.scene, self.edit.scene))
        if variant == "true edit's noise":
            return true
        if variant == "coarse of the true edit, fine of the source":
            return coarse(true) + source - coarse(source)
        if variant == "fine of the true edit, coarse of the source":
            return coarse(source) + true - coarse(true)
        return source

    def make(self, variant):
        """The edit from one of the noises -> frames (1, f, 3, h, w)."""
        studio = self.studio
        net = studio.tuned_net(METHOD.net, SEED)
        noise = self.mixed(variant, net)
        wanted = studio.wanted
        if variant == "source's noise, all named":
            wanted = studio.sd.encode_prompts([world.caption(self.edit.scene)])
        latents = pipeline.last(pipeline.sample(net, studio.sd.schedule, noise, wanted, studio.empty,
                                                self.settings["ddim_steps"], self.settings["guidance"]))
        return pipeline.decode(studio.sd.vae, latents)[None]

    def reference(self, name):
        scene = self.studio.clip.scene if name == "source" else self.edit.scene
        return self.studio.through_vae(self.studio.judge.draw(scene))[None]


def work(args, i):
    """Clip i from every noise: a file of frames and one of scores for each, unless they are there."""
    torch.set_num_threads(1)
    changing, folder = Changing(args.weights, make_clip("test", i), args.settings), args.out / str(i)
    for name in REFERENCES:
        write(folder, name, lambda: changing.reference(name), changing)
    for name in VARIANTS:
        write(folder, name, lambda: changing.make(name), changing)
    labelled(folder / "place.png", {name: load_file(folder / f"{name}.safetensors")["frames"][0]
                                    for name in (*REFERENCES, *VARIANTS)})
    return i


def main():
    args = parser(__doc__.partition("\n")[0], "place", 12).parse_args()
    every_clip(work, args, load(args.weights))
    text = table_of(args.out, args.clips, (*REFERENCES, *VARIANTS), COLUMNS)
    (args.out / "place.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    cli.run(main)
