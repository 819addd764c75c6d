"""Edit the tuned clip with a prompt: python sample.py --prompt "a panda is skiing"."""
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from tinytav import cli, editing, pipeline
from tinytav.files import frames
from tinytav.files.runs import Run, new_name, slug
from tinytav.inflation import ATTENTIONS
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.config import InputError

SUFFIXES = (".mp4", ".gif", ".png")
# With which noise sampling begins, and what the name of an edited run's result then ends in.
NOISES = {"inverted": "", "random": "-no-inversion", "shared": "-shared-noise"}


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("--prompt", nargs="+", action="extend", required=True, help="one or several; each makes a clip")
    p.add_argument("--run", metavar="PATH", help="a folder that train.py made; else the newest in runs/")
    p.add_argument("--frames", type=cli.number(int, 1, 1000), metavar="N",
                   help="without inversion: how many; 1 is a picture")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N",
                   help="without inversion: pixels of a square; else the clip's own size")
    noise = p.add_mutually_exclusive_group()
    noise.add_argument("--no-inversion", action="store_true", help="begin with random noise")
    noise.add_argument("--noise", choices=NOISES,
                       help="begin with the clip's inverted noise (default where there is a run), with random noise, "
                            "or with random noise that all frames share")
    p.add_argument("--control", metavar="PATH", help="a ControlNet: its folder or .safetensors file; needs --hint")
    p.add_argument("--hint", metavar="PATH",
                   help="what the ControlNet understands (skeletons, depth, edges): a video or a folder of pictures, "
                        "one a frame")
    p.add_argument("--control-scale", type=cli.number(float, 0), metavar="N",
                   help="how strongly to follow the hint, usually from 0 to 2 (default: 1)")
    p.add_argument("--steps", type=cli.number(int, 1, 999), metavar="N",
                   help="of DDIM, best a divisor of 1000; else the run's own")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="N",
                   help="how strongly to follow the prompt; else the run's own")
    p.add_argument("--attention", choices=ATTENTIONS, help="the frames a frame looks at; else the run's own")
    cli.add_lora(p)
    p.add_argument("--out", metavar="PATH", help="folder for the results; else the run's own, or samples/")
    return p.parse_args()


def find_run(args):
    """The run that is named or the newest; None for zero-shot use: weights named, no run."""
    if args.run is not None:
        return Run.open(args.run)
    return None if args.weights is not None else Run.newest("runs")


def choose_noise(args, run):
    """With which noise sampling begins, a key of NOISES: the clip's inverted noise, unless another is asked for."""
    if args.noise is not None:
        return args.noise
    return "inverted" if run is not None and not args.no_inversion else "random"


def refuse_what_does_not_go_together(args, run):
    """Raises InputError for flags that ask for two different things."""
    inverted = choose_noise(args, run) == "inverted"
    if inverted and run is None:
        raise InputError("--noise inverted needs a run, whose clip is inverted: name it with --run.")
    if inverted and (args.frames or args.size or args.seed is not None):
        raise InputError("Inverted noise has the run's own size and frames, and nothing random: leave out --frames, --size "
                         "and --seed, or begin with random noise by --no-inversion.")
    if (args.control is None) != (args.hint is None):
        raise InputError("--control and --hint belong together: the ControlNet's weights, and what it is to follow.")
    if args.control_scale is not None and args.control is None:
        raise InputError("--control-scale has no meaning without --control and --hint.")


def load_weights(args, run):
    """The run's Stable Diffusion in the run's precision, unless flags say otherwise. Raises InputError."""
    if run is None:
        return cli.load_weights(args)
    sd = cli.load_weights(args, run.settings.source(), run.settings.precision)
    run.check(sd)
    return sd


def choose_loras(args, run):
    """--lora and run.json -> the LoRAs to use, and those the net was tuned with.

    A file of the run may have moved: one that is named and has its fingerprint stands for it.
    """
    tuned_with = run.settings.loras() if run else []
    wanted = cli.read_loras(args.lora)
    if wanted is None:
        return tuned_with, tuned_with
    moved = {one.fingerprint: one.file for one in wanted}
    return wanted, [replace(one, file=moved.get(one.fingerprint, one.file)) for one in tuned_with]


def make_net(args, run, sd):
    """The run's tuned net, or without a run the inflated, untuned one."""
    if run is not None:
        return editing.net_of(run, sd, args.attention, args.frames)
    return editing.new_net(sd, args.frames or sd.defaults.frames, args.attention or "sparse-causal")


def latents_shape(args, run, sd, count):
    """Of `count` frames of the size that is asked for, else of the run's clip, else a square of the weights' size."""
    if run is not None and args.size is None:
        mean, _ = run.latents()
        return 1, 4, count, *mean.shape[3:]
    size = args.size or sd.defaults.size
    frames.check_size(size, sd.multiple)
    return 1, 4, count, size // sd.multiple, size // sd.multiple


def make_control(args, sd, shape):
    """The ControlNet and its hints for latents of this shape, or None."""
    if args.control is None:
        return None
    scale = 1.0 if args.control_scale is None else args.control_scale
    return editing.load_control(sd, args.control, args.hint, shape, scale)


def gaussian_noise(args, sd, shape, shared):
    """White noise from the seed: one for each frame, or one that all frames share."""
    seed = 33 if args.seed is None else args.seed
    if shared:
        b, c, count, h, w = shape
        return pipeline.gaussian((b, c, 1, h, w), seed).repeat(1, 1, count, 1, 1).to(sd.device)
    return pipeline.gaussian(shape, seed).to(sd.device)


def strip_rows(sd, clip, control):
    """The rows above a result in its strip: the inverted clip's frames, as the VAE gives them back, and the hints."""
    rows = []
    if clip is not None:
        columns = frames.strip_columns(clip.frames)
        rows.append(pipeline.decode(sd.vae, clip.mean[:, :, columns]))
    if control is not None:
        columns = frames.strip_columns(len(control.hints))
        rows.append(2 * control.hints[columns] - 1)
    return rows


def write(folder, name, x, above, fps, prompt):
    """Writes x (f, 3, h, w); `above` are the strip's rows above its own.

    An mp4 with the prompt as its title, a gif and a strip, or one picture. Returns the path of the one to look at.
    """
    path = folder / f"{new_name(folder, name, SUFFIXES)}.png"
    columns = frames.strip_columns(len(x))
    frames.write_strip(path, *above, x[columns])
    if len(x) == 1:
        return path
    frames.write_mp4(path.with_suffix(".mp4"), x, fps, title=prompt)
    frames.write_gif(path.with_suffix(".gif"), x, fps)
    return path.with_suffix(".mp4")


def main():
    args = arguments()
    run = find_run(args)
    refuse_what_does_not_go_together(args, run)
    print(f"run: {run.path}" if run else "no run: sampling the untuned net from random noise; --run names a run to edit")
    sd = load_weights(args, run)
    loras, tuned_with = choose_loras(args, run)
    lora.merge(sd, tuned_with)
    cli.warn_about_unknown_words(sd.path, args.prompt)
    sd.tokenizer(args.prompt)                                   # raises for bytes that are not UTF-8
    defaults = run.settings if run else sd.defaults
    steps = args.steps or defaults.ddim_steps
    guidance = defaults.guidance if args.guidance is None else args.guidance
    fps = Fraction(run.settings.fps) if run else frames.FOLDER_FPS
    net = make_net(args, run, sd)
    same_loras = lora.same(loras, tuned_with)
    if not same_loras:
        lora.exchange(net, sd.text_encoder, tuned_with, loras)
    cli.print_loras(loras)
    shape = latents_shape(args, run, sd, net.frames)
    control = make_control(args, sd, shape)
    kind = choose_noise(args, run)
    clip = editing.clip_of(run, sd) if kind == "inverted" else None
    if clip is None:
        noise = gaussian_noise(args, sd, shape, shared=kind == "shared")
    elif same_loras:
        noise = editing.noise_of(run, sd, net, clip, steps, cli.progress)
    else:
        noise = editing.invert_clip(sd, net, clip, steps, cli.progress)
    above = strip_rows(sd, clip, control)
    suffix = (NOISES[kind] if run else "") + ("" if control is None else "-control")
    folder = Path(args.out or (run.path if run else "samples"))
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in args.prompt:
        x = editing.sample_clip(sd, net, noise, prompt, steps, guidance, cli.progress, control)
        print(write(folder, slug(prompt) + suffix, x, above, fps, prompt))
    return 0


if __name__ == "__main__":
    cli.run(main)
