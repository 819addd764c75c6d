"""Edit the tuned clip with a prompt: python sample.py --prompt "a panda is skiing"."""
import warnings
from fractions import Fraction
from pathlib import Path

from tinytav import cli, pipeline
from tinytav.files import frames
from tinytav.files.runs import Run, new_name, slug
from tinytav.inflation import ATTENTIONS
from tinytav.measure import fit, memory
from tinytav.stable_diffusion.config import InputError

SUFFIXES = (".mp4", ".gif", ".png")


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", nargs="+", action="extend", required=True, help="one or several; each makes a clip")
    p.add_argument("--run", metavar="PATH", help="a folder that train.py made; else the newest in runs/")
    p.add_argument("--frames", type=cli.number(int, 1, 1000), metavar="N",
                   help="without inversion: how many; 1 is a picture")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N",
                   help="without inversion: pixels of a square; else the clip's own size")
    p.add_argument("--no-inversion", action="store_true", help="begin with random noise")
    p.add_argument("--steps", type=cli.number(int, 1, 999), metavar="N",
                   help="of DDIM, best a divisor of 1000; else the run's own")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="N",
                   help="how strongly to follow the prompt; else the run's own")
    p.add_argument("--attention", choices=ATTENTIONS, help="the frames a frame looks at; else the run's own")
    p.add_argument("--out", metavar="PATH", help="folder for the results; else the run's own, or samples/")
    return p.parse_args()


def find_run(args):
    """The run that is named or the newest; None for zero-shot use: weights named, no run."""
    if args.run is not None:
        return Run.open(args.run)
    return None if args.weights is not None else Run.newest("runs")


def refuse_what_does_not_go_together(args, run):
    """Raises InputError for flags that ask for two different things."""
    inverted = run is not None and not args.no_inversion
    if inverted and (args.frames or args.size):
        raise InputError("Inverted noise has the run's own size and frames: leave out --frames and --size, or begin with "
                         "random noise by --no-inversion.")


def make_net(args, run, sd):
    """The run's tuned net, or without a run the inflated, untuned one."""
    if run is not None:
        return run.net(sd, args.attention, args.frames)
    return pipeline.new_net(sd, args.frames or sd.defaults.frames, args.attention or "sparse-causal")


def random_noise(args, run, sd, count):
    """Noise for `count` frames: of the size that is asked for, else of the run's clip, else a square of the weights' size."""
    size = args.size or sd.defaults.size
    frames.check_size(size, sd.multiple)
    shape = pipeline.noise_shape(sd, count, size, size)
    if run is not None and args.size is None:
        mean, _ = run.latents()
        shape = (1, 4, count, *mean.shape[3:])
    return pipeline.gaussian(shape, 33 if args.seed is None else args.seed).to(sd.device)


def source_strip(sd, clip):
    """The frames of the source that a strip shows, as the VAE gives them back."""
    columns = frames.strip_columns(clip.frames)
    return pipeline.decode(sd.vae, clip.mean[:, :, columns])


def write(folder, name, x, source, fps, prompt):
    """An mp4 with the prompt as its title, a gif and a strip, or one picture. Returns the path of the one to look at."""
    path = folder / f"{new_name(folder, name, SUFFIXES)}.png"
    columns = frames.strip_columns(len(x))
    frames.write_strip(path, *([] if source is None else [source]), x[columns])
    if len(x) == 1:
        return path
    frames.write_mp4(path.with_suffix(".mp4"), x, fps, title=prompt)
    frames.write_gif(path.with_suffix(".gif"), x, fps)
    return path.with_suffix(".mp4")


def warn_if_tight(sd, net, noise, guidance, free):
    """A warning where sampling such noise may not fit into `free` bytes."""
    others = fit.weight_bytes(sd.vae) + fit.weight_bytes(sd.text_encoder)
    plan = fit.plan_sampling(memory.work_on(sd, net, noise), free, guidance, others)
    if plan.warning:
        warnings.warn(plan.warning)


def main():
    args = arguments()
    free = fit.free_bytes(cli.choose_device(args.device))       # before the weights take their part of it
    run = find_run(args)
    refuse_what_does_not_go_together(args, run)
    print(f"run: {run.path}" if run else "no run: the untuned net draws from random noise; --run names a run to edit")
    sd = cli.load_weights(args, run.settings.source() if run else None)
    if run:
        run.check(sd)
    cli.warn_of_the_unknown(sd.path, args.prompt)
    sd.tokenizer(args.prompt)                                   # raises for bytes that are not UTF-8
    defaults = run.settings if run else sd.defaults
    steps = args.steps or defaults.ddim_steps
    guidance = defaults.guidance if args.guidance is None else args.guidance
    fps = Fraction(run.settings.fps) if run else frames.FOLDER_FPS
    net = make_net(args, run, sd)
    source, suffix = None, ""
    if run and not args.no_inversion:
        clip = run.clip(sd)
        noise = run.noise(sd, net, clip, steps, cli.progress)
        source = source_strip(sd, clip)
    else:
        noise = random_noise(args, run, sd, net.frames)
        suffix = "-no-inversion" if run else ""
    warn_if_tight(sd, net, noise, guidance, free)
    folder = Path(args.out or (run.path if run else "samples"))
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in args.prompt:
        x = pipeline.sample_clip(sd, net, noise, prompt, steps, guidance, cli.progress)
        print(write(folder, slug(prompt) + suffix, x, source, fps, prompt))
    return 0


if __name__ == "__main__":
    cli.run(main)
