"""Tune a Stable Diffusion on one clip: python train.py clip.mp4 "a man is skiing"."""
import shutil
import signal
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import tinytav
from tinytav import cli, pipeline, tuning
from tinytav.files import frames, runs
from tinytav.measure import memory
from tinytav.stable_diffusion.config import InputError
from tinytav.inflation import LOOKS_AT, VideoUNet, inflate
from tinytav.files.runs import Run

SETTINGS = ("size", "frames", "start", "stride", "steps", "lr", "attention", "norm", "seed", "preview")


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("clip", nargs="?", help="mp4, mov, webm, gif, or a folder of images")
    p.add_argument("prompt", nargs="?", help="what the clip shows")
    p.add_argument("--out", metavar="PATH", default="runs", help="where the run's folder is made")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N", help="pixels of the short side; else the weights' own")
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="how many; else the weights' own number")
    p.add_argument("--start", type=cli.number(int, 0), metavar="N", default=0, help="first frame")
    p.add_argument("--stride", type=cli.number(int, 1), metavar="N",
                   help="take every n-th frame; else spread over the whole clip")
    p.add_argument("--steps", type=cli.number(int, 1), metavar="N", help="of tuning; else the weights' own")
    p.add_argument("--lr", type=cli.number(float, 0), metavar="N", help="learning rate; else the weights' own")
    p.add_argument("--attention", choices=LOOKS_AT, default="sparse-causal", help="the frames a frame looks at")
    p.add_argument("--norm", choices=["clip", "frame"], default="clip", help="what group norms run over")
    p.add_argument("--preview", metavar="PROMPT", help="sample this prompt at each quarter of the tuning")
    p.add_argument("--resume", metavar="RUN", help="go on with an unfinished run, by its own settings")
    args = p.parse_args()
    args.given = cli.given(p, args)
    return args


def start(args):
    """A new run: read the clip, encode it once. Returns the run, what it was loaded with, and is_tight."""
    if not hasattr(args, "prompt"):
        raise InputError('A clip and its caption are needed: python train.py clip.mp4 "a man is skiing".')
    if not args.prompt.strip():
        raise InputError("The prompt is empty: say in a few words what the clip shows.")
    sd, device, dtype = cli.load_weights(args)
    cli.warn_of_the_unknown(sd, [args.prompt], args.clip)
    sd.tokenizer([args.prompt, getattr(args, "preview", "")])               # before anything is written: are they text?
    settings = {name: value for name, value in vars(sd.defaults).items() if name != "draws"}
    settings |= {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    x, indices, fps = frames.read(args.clip, settings["size"], sd.multiple, settings["frames"], args.start,
                                  settings.get("stride"), exact=hasattr(args, "frames"))
    if len(x) < settings["frames"]:
        print(f"{args.clip} has fewer than {settings['frames']} frames: using {len(x)}")
    print(f"clip: {args.clip}, {len(x)} frames of {x.shape[3]}x{x.shape[2]}")
    checkpoint = is_tight(sd, settings, (1, 4, len(x), *(n // sd.vae.cfg.factor for n in x.shape[2:])), device)
    mean, std = pipeline.encode(sd.vae, x.to(device))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise InputError("The VAE gives this clip latents that are not finite: try --precision fp32.")
    settings |= dict(
        clip=str(args.clip), prompt=args.prompt, weights=str(sd.path), fingerprint=sd.fingerprint, frames=len(x),
        indices=indices, fps=str(fps), tokenizer=getattr(args, "tokenizer", None),
        prediction=getattr(args, "prediction", None), precision=cli.name_of(dtype),
        versions=dict(tinytav=tinytav.__version__, torch=torch.__version__, python=sys.version.split()[0]))
    run = Run.create(args.out, Path(args.clip).stem, settings | dict(finished=0))
    try:
        run.write("clip", dict(mean=mean, std=std))
        frames.write_mp4(run.path / "source.mp4", x, fps)
        run.save()
    except BaseException:
        shutil.rmtree(run.path)
        raise
    return run, sd, device, dtype, checkpoint


def resume(args):
    """An unfinished run, with the weights and the precision it was begun with."""
    run = Run.open(args.resume).hold()
    if run.finished:
        raise InputError(f"{run.path} is finished: sample from it with sample.py --run.")
    if more := args.given - {"resume", "device", "precision", *cli.SOURCE}:
        raise InputError(f"A resumed run keeps its own settings: leave out {', '.join(sorted(more))}.")
    if args.precision == "auto":
        args.precision = run.settings["precision"]
    sd, device, dtype = cli.load_weights(args, run)
    return run, sd, device, dtype, is_tight(sd, run.settings, run.clip("cpu")[0].shape, device)


def is_tight(sd, settings, shape, device):
    """Must tuning on latents of this shape checkpoint its gradients to fit? Raises InputError if it cannot."""
    with torch.device("meta"):
        net = VideoUNet(sd.unet.cfg, shape[2], settings["attention"], settings["norm"])
    return memory.is_tight(net, shape, (1, 77, sd.unet.cfg.cross_attention_dim), device, settings["size"], sd.multiple)


class Stop:
    """Within it, Ctrl-C and SIGTERM only leave their number in `signal`, so that a step ends whole. A second one kills."""

    def __enter__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def tune(run, net, schedule, mean, std, context, on_cpu, preview):
    """The loop: progress, checkpoints, previews. Returns the number of the signal that stopped it, or 0."""
    optimizer, total = tuning.adamw(net.tuned(), run.settings["lr"]), run.settings["steps"]
    losses = []
    if run.has("state"):
        losses = runs.load_state_dict(net, optimizer, run.read("state"))
    first = len(losses)
    steps = tuning.tune(net, optimizer, schedule, mean, std, context, run.settings["seed"], first, total)
    began, due, shown = time.time(), 0., [total * i // 4 for i in (1, 2, 3, 4)]
    with Stop() as stop, tqdm(total=total, initial=first, desc="tuning", unit="step") as bar:
        for step, loss in steps:
            losses.append(loss)
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            bar.update()
            if preview and step in shown:
                preview(step)
            if stop.signal or step == total or time.time() > due:
                start = time.time()
                run.write("state", runs.state_dict(net, optimizer, losses))
                run.write_losses(losses)
                due = time.time() + 20 * (time.time() - start)              # a twentieth of the time goes into saving
            if stop.signal:
                break
            if on_cpu and step == first + 3:
                say_time_left((time.time() - began) / 3 * (total - step), bar)
    return stop.signal


def say_time_left(seconds, bar):
    if seconds > 600:
        bar.write(f"about {seconds / 60:.0f} minutes of tuning are left on this CPU. Ctrl-C stops it so that --resume "
                  "goes on; fewer --steps, fewer --frames or a smaller --size is quicker.")


def main():
    args = arguments()
    run, sd, device, dtype, checkpoint = resume(args) if hasattr(args, "resume") else start(args)
    print(f"run: {run.path} (Ctrl-C stops it; go on with: python train.py --resume {run.path})")
    settings = run.settings
    torch.manual_seed(settings["seed"])                                     # draws T-Attn's first q, k and v
    net = inflate(sd.unet, settings["frames"], settings["attention"], settings["norm"])
    cli.autocast(net, device, dtype, "forward")
    print(f"inflated: {len(sd.unet.state_dict())} tensors kept, {len(net.state_dict()) - len(sd.unet.state_dict())} new, "
          f"{len(net.tuned())} tuned ({sum(p.numel() for p in net.tuned().values()):,} parameters)")
    mean, std = run.clip(device)
    context, empty, wanted = sd.encode_prompts([settings["prompt"], "", settings.get("preview", "")]).split(1)
    if checkpoint:
        memory.checkpoint_gradients(net)

    def preview(step):
        noise = pipeline.last(pipeline.invert(net, sd.schedule, mean, empty, settings["ddim_steps"]))
        latents = pipeline.last(pipeline.sample(net, sd.schedule, noise, wanted, empty, settings["ddim_steps"],
                                                settings["guidance"]))
        frames.write_gif(run.path / f"preview-{step}.gif", pipeline.decode(sd.vae, latents), Fraction(settings["fps"]))

    sd.text_encoder = None                                                  # its work is done; so is the VAE's
    if "preview" not in settings:
        sd.vae = None
    if number := tune(run, net, sd.schedule, mean, std, context, device.type == "cpu",
                      preview if "preview" in settings else None):
        print(f"stopped and saved; go on with: python train.py --resume {run.path}")
        return 128 + number
    run.write("tuned", net.tuned())
    steps = settings["ddim_steps"]
    noise = pipeline.last(tqdm(pipeline.invert(net, sd.schedule, mean, empty, steps), "inverting", steps, unit="step"))
    if not noise.isfinite().all():
        raise InputError("The tuned net inverts the clip to values that are not finite: begin again with a smaller --lr.")
    run.write("inversion", dict(noise=noise, steps=torch.tensor(steps)))
    run.finish()
    print(f'done; now edit it: python sample.py --run {run.path} --prompt "..."')
    return 0


if __name__ == "__main__":
    cli.run(main)
