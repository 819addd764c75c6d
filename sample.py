"""Edit the tuned clip with a prompt: python sample.py --prompt "a panda is skiing"."""
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from tinytav import cli, editing, pipeline
from tinytav.control import load_control
from tinytav.errors import InputError
from tinytav.files import frames, page
from tinytav.files.runs import Run, new_name, slug
from tinytav.inflation import ATTENTIONS
from tinytav.measure import fit, memory
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.precision import name_of

SUFFIXES = (".mp4", ".gif", ".png", ".sample.json")
# With which noise sampling begins, and what the name of an edited run's result then ends in.
NOISES = {"inverted": "", "edit-friendly": "-edit-friendly", "random": "-no-inversion", "shared": "-shared-noise"}
FROM_THE_CLIP = ("inverted", "edit-friendly")


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
                       help="begin with the clip's inverted noise (default where there is a run), with edit-friendly "
                            "noise, which keeps more of the clip, with random noise, or with random noise that all "
                            "frames share")
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
    kind = choose_noise(args, run)
    if kind in FROM_THE_CLIP and run is None:
        raise InputError(f"--noise {kind} needs a run, whose clip is inverted: name it with --run.")
    if kind in FROM_THE_CLIP and (args.frames or args.size):
        raise InputError("The noise of a clip has the clip's own size and frames: leave out --frames and --size, or begin "
                         "with random noise by --no-inversion.")
    if kind == "inverted" and args.seed is not None:
        raise InputError("Inverted noise has nothing random: leave out --seed, or begin with random noise by "
                         "--no-inversion.")
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


def make_net(args, run, sd, loras, tuned_with):
    """The run's tuned net, or without a run the inflated, untuned one, with these LoRAs in it and in the text encoder.

    A tuned net has the LoRAs `tuned_with` in it. If others are wanted, those are taken out and these are put in.
    """
    lora.merge(sd, tuned_with)
    if run is not None:
        net = editing.net_of(run, sd, args.attention, args.frames)
    else:
        net = editing.new_net(sd, args.frames or sd.defaults.frames, args.attention or "sparse-causal")
    if not lora.same(loras, tuned_with):
        lora.exchange(net, sd.text_encoder, tuned_with, loras)
    cli.print_loras(loras)
    return net


def inverted_noise(run, sd, net, clip, steps, anew):
    """The clip's noise: as the run saved it if that fits, or inverted anew."""
    if anew:
        return editing.invert_clip(sd, net, clip, steps, cli.progress)
    return editing.noise_of(run, sd, net, clip, steps, cli.progress)


def latents_shape(args, run, sd, count):
    """Of `count` frames of the size that is asked for, else of the run's clip, else a square of the weights' size."""
    if run is not None and args.size is None:
        mean, _ = run.latents()
        return 1, 4, count, *mean.shape[3:]
    size = args.size or sd.defaults.size
    frames.check_size(size, sd.multiple)
    side = size // sd.multiple
    return 1, 4, count, side, side


def make_control(args, sd, shape):
    """The ControlNet and its hints for latents of this shape, or None."""
    if args.control is None:
        return None
    scale = 1.0 if args.control_scale is None else args.control_scale
    return load_control(sd, args.control, args.hint, shape, scale)


def seed_of(args):
    return 33 if args.seed is None else args.seed


def gaussian_noise(args, sd, shape, shared):
    """White noise from the seed: one for each frame, or one that all frames share."""
    if shared:
        b, c, count, h, w = shape
        return pipeline.gaussian((b, c, 1, h, w), seed_of(args)).repeat(1, 1, count, 1, 1).to(sd.device)
    return pipeline.gaussian(shape, seed_of(args)).to(sd.device)


def source_strip(sd, clip):
    """The frames of the source that a strip shows, as the VAE gives them back."""
    columns = frames.strip_columns(clip.frames)
    return pipeline.decode(sd.vae, clip.mean[:, :, columns])


def hint_strip(control):
    """The hints that a strip shows, (n, 3, h, w) in [-1, 1]."""
    columns = frames.strip_columns(len(control.hints))
    return 2 * control.hints[columns] - 1


def free_name(folder, name):
    """name, or name-2, ...: the first for which the folder holds no result."""
    return new_name(folder, name, SUFFIXES)


def write(folder, name, x, above, fps, prompt):
    """Writes x (f, 3, h, w): an mp4 with the prompt as its title, a gif and a strip; of one frame a picture alone.

    above: the strip's rows above its own. Returns the path of the file to look at.
    """
    path = folder / f"{name}.png"
    columns = frames.strip_columns(len(x))
    frames.write_strip(path, *above, x[columns])
    if len(x) == 1:
        return path
    frames.write_mp4(folder / f"{name}.mp4", x, fps, title=prompt)
    frames.write_gif(folder / f"{name}.gif", x, fps)
    return folder / f"{name}.mp4"


def command_for(args, run, prompt, steps, guidance):
    """The line that makes this sample again, whatever the defaults are then."""
    named = dict(run=run.path if run else None, prompt=prompt, steps=steps, guidance=guidance)
    return page.command("python", "sample.py", *page.flags(vars(args) | named))


def warn_if_tight(sd, net, control, shape, guidance, free):
    """Warns where sampling latents of this shape may not fit into `free` bytes. Of a ControlNet it counts the weights only."""
    others = fit.weight_bytes(sd.vae) + fit.weight_bytes(sd.text_encoder)
    if control is not None:
        others += fit.weight_bytes(control.controlnet)
    plan = fit.plan_sampling(memory.work_on(sd, net, shape), free, guidance, others)
    if plan.warning:
        warnings.warn(plan.warning)


def main():
    args = arguments()
    free = fit.free_bytes(cli.choose_device(args.device))       # before the weights take their part of it
    run = find_run(args)
    refuse_what_does_not_go_together(args, run)
    print(f"run: {run.path}" if run else "no run: sampling the untuned net from random noise; --run names a run to edit")
    sd = load_weights(args, run)
    cli.warn_about_unknown_words(sd.path, args.prompt)
    sd.tokenizer(args.prompt)                                   # raises for bytes that are not UTF-8
    loras, tuned_with = choose_loras(args, run)
    net = make_net(args, run, sd, loras, tuned_with)
    defaults = run.settings if run else sd.defaults
    steps = args.steps or defaults.ddim_steps
    guidance = defaults.guidance if args.guidance is None else args.guidance
    shape = latents_shape(args, run, sd, net.frames)
    control = make_control(args, sd, shape)
    kind = choose_noise(args, run)
    above = []                                                  # rows of the strips
    if kind in FROM_THE_CLIP:
        clip = editing.clip_of(run, sd)
        above.append(source_strip(sd, clip))
    if kind == "inverted":
        noise = inverted_noise(run, sd, net, clip, steps, anew=not lora.same(loras, tuned_with))
    elif kind == "edit-friendly":
        noise = editing.invert_edit_friendly(sd, net, clip, steps, seed_of(args), cli.progress)
    else:
        noise = gaussian_noise(args, sd, shape, shared=kind == "shared")
    if control is not None:
        above.append(hint_strip(control))
    warn_if_tight(sd, net, control, shape, guidance, free)
    suffix = (NOISES[kind] if run else "") + ("-control" if control else "")
    settings = dict(ddim_steps=steps, guidance=guidance, attention=net.attention, frames=net.frames, noise=kind,
                    precision=name_of(sd.dtype))
    folder = Path(args.out or (run.path if run else "samples"))
    folder.mkdir(parents=True, exist_ok=True)
    fps = Fraction(run.settings.fps) if run else frames.FOLDER_FPS
    for prompt in args.prompt:
        x = editing.sample_clip(sd, net, noise, prompt, steps, guidance, cli.progress, control)
        name = free_name(folder, slug(prompt) + suffix)
        page.write_record(folder, name, prompt, settings, command_for(args, run, prompt, steps, guidance))
        print(write(folder, name, x, above, fps, prompt))
        shown = page.write(folder)
    print(f"page: {shown}")
    return 0


if __name__ == "__main__":
    cli.run(main)
