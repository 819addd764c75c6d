"""Edit the tuned clip with a prompt: python sample.py --prompt "a panda is skiing"."""
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from tinytav import cli, pipeline
from tinytav.files import frames
from tinytav.stable_diffusion.config import InputError
from tinytav.inflation import LOOKS_AT, inflate
from tinytav.files.runs import Run, new_name, slug


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", nargs="+", action="extend", required=True, help="one or several; each makes a clip")
    p.add_argument("--run", metavar="PATH", help="a folder that train.py made; else the newest in runs/")
    p.add_argument("--frames", type=cli.number(int, 1, 1000), metavar="N",
                   help="without inversion: how many; 1 is a picture")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N",
                   help="without inversion: pixels of a square; else the weights' own")
    p.add_argument("--no-inversion", action="store_true", default=False, help="begin with random noise")
    p.add_argument("--steps", type=cli.number(int, 1, 999), metavar="N",
                   help="of DDIM, best a divisor of 1000; else the run's own")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="N",
                   help="how strongly to follow the prompt; else the run's own")
    p.add_argument("--attention", choices=LOOKS_AT, help="the frames a frame looks at; else the run's own")
    p.add_argument("--out", metavar="PATH", help="folder for the results; else the run's own, or samples/")
    return p.parse_args()


def find_run(args):
    """The run that is named or the newest; None for zero-shot use: weights named, no run."""
    if hasattr(args, "run"):
        return Run.open(args.run)
    return None if hasattr(args, "weights") else Run.newest("runs")


def tuned_net(run, sd, settings):
    """The inflated U-Net, with the run's tuned tensors if there is a run."""
    net = inflate(sd.unet, settings["frames"], settings["attention"], settings["norm"])
    if run:
        tensors = run.read("tuned", {name: p.shape for name, p in net.tuned().items()})
        for name, p in net.tuned().items():
            p.copy_(tensors[name])
    return net


def inverted(run, net, sd, empty, device, steps):
    """The clip's noise: as it was saved, or anew if it was made with another number of steps or another attention."""
    mean, _ = run.clip(device)
    if net.attention == run.settings["attention"] and run.has("inversion"):
        inversion = run.read("inversion", dict(noise=mean.shape, steps=()))
        if int(inversion["steps"]) == steps:
            return inversion["noise"].to(device)
    return pipeline.last(tqdm(pipeline.invert(net, sd.schedule, mean, empty, steps), "inverting", steps, unit="step"))


def noise_shape(run, sd, settings, args):
    """Of random noise: the run's clip's, with the size and frames asked for."""
    height = width = settings["size"] // sd.multiple * sd.multiple // sd.vae.cfg.factor
    if run and not hasattr(args, "size"):
        height, width = run.clip("cpu")[0].shape[3:]
    if not sd.multiple <= settings["size"] <= frames.LARGEST:
        raise InputError(f"The size {settings['size']} is not from {sd.multiple} to {frames.LARGEST}: use a multiple "
                         f"of {sd.multiple}.")
    return 1, 4, settings["frames"], height, width


def write(folder, name, x, source, fps, prompt):
    """An mp4 with the prompt as its title, a gif and a strip, or one picture. Returns the path of the one to look at."""
    path = folder / f"{new_name(folder, name, ('.mp4', '.gif', '.png'))}.png"
    if len(x) > 1:
        frames.write_mp4(path.with_suffix(".mp4"), x, fps, title=prompt)
        frames.write_gif(path.with_suffix(".gif"), x, fps)
    frames.write_strip(path, *([] if source is None else [source]), x)
    return path if len(x) == 1 else path.with_suffix(".mp4")


def main():
    args = arguments()
    run = find_run(args)
    invert = run and not args.no_inversion
    if invert and (hasattr(args, "frames") or hasattr(args, "size")):
        raise InputError("Inverted noise has the run's own size and frames: leave out --frames and --size, or begin with "
                         "random noise by --no-inversion.")
    print(f"run: {run.path}" if run else "no run: the untuned net draws from random noise; --run names a run to edit")
    sd, device, dtype = cli.load_weights(args, run)
    cli.warn_of_the_unknown(sd, args.prompt)
    settings = vars(sd.defaults) | dict(attention="sparse-causal", norm="clip", fps="8") | (run.settings if run else {})
    settings |= {name: getattr(args, name) for name in ("frames", "size", "guidance", "attention") if hasattr(args, name)}
    steps = getattr(args, "steps", settings["ddim_steps"])
    net = tuned_net(run, sd, settings)
    cli.autocast(net, device, dtype, "forward")
    empty, *contexts = sd.encode_prompts(["", *args.prompt]).split(1)
    sd.text_encoder = None                                                  # its work is done
    if invert:
        noise = inverted(run, net, sd, empty, device, steps)
        source = pipeline.decode(sd.vae, run.clip(device)[0])
    else:
        noise = pipeline.gaussian(noise_shape(run, sd, settings, args), args.seed).to(device)
        source = None
    folder = Path(getattr(args, "out", run.path if run else "samples"))
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, context in zip(args.prompt, contexts):
        latents = pipeline.sample(net, sd.schedule, noise, context, empty, steps, settings["guidance"])
        latents = pipeline.last(tqdm(latents, slug(prompt)[:30], steps, unit="step"))
        if not latents.isfinite().all():
            raise InputError(f"{prompt!r} gave values that are not finite: use a smaller --guidance or --precision fp32.")
        name = slug(prompt) + ("-no-inversion" if run and not invert else "")
        print(write(folder, name, pipeline.decode(sd.vae, latents), source, Fraction(settings["fps"]), prompt))
    return 0


if __name__ == "__main__":
    cli.run(main)
