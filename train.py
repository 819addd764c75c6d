"""Tune a Stable Diffusion on one clip: python train.py clip.mp4 "a man is skiing"."""
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import tinytav
from tinytav import cli, editing, pipeline
from tinytav.errors import InputError
from tinytav.files import frames, page
from tinytav.files.runs import Run, Settings, lock
from tinytav.inflation import ATTENTIONS
from tinytav.measure import fit, memory, recompute
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.precision import name_of
from tinytav.tuning import Tuner

RESUMABLE = {"resume", "device", "precision", "checkpointing", *cli.SOURCE}     # flags that may stand beside --resume


def arguments():
    p = cli.parser(__doc__)
    p.add_argument("clip", nargs="?", help="mp4, mov, webm, gif, or a folder of pictures")
    p.add_argument("prompt", nargs="?", help="what the clip shows")
    p.add_argument("--out", metavar="PATH", help="where the run's folder is made (default: runs)")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N", help="pixels of the short side; else the weights' own")
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N", help="how many; else the weights' own number")
    p.add_argument("--start", type=cli.number(int, 0), metavar="N", help="first frame (default: 0)")
    p.add_argument("--stride", type=cli.number(int, 1), metavar="N",
                   help="take every n-th frame; else spread over the whole clip")
    p.add_argument("--steps", type=cli.number(int, 1), metavar="N", help="of tuning; else the weights' own")
    p.add_argument("--lr", type=cli.number(float, 0), metavar="N", help="learning rate; else the weights' own")
    p.add_argument("--attention", choices=ATTENTIONS, help="the frames a frame looks at (default: sparse-causal)")
    p.add_argument("--norm", choices=["clip", "frame"], help="what group norms run over (default: clip)")
    p.add_argument("--preview", metavar="PROMPT", help="sample this prompt at each quarter of the tuning")
    cli.add_lora(p)
    p.add_argument("--checkpointing", choices=["auto", "on", "off"],
                   help="compute blocks again for the gradient, to save memory (default: auto, where it is needed)")
    p.add_argument("--resume", metavar="RUN", help="go on with an unfinished run, by its own settings")
    return p.parse_args()


# ---- A new run, or an unfinished one -------------------------------------------------------------

def start(args):
    """Reads the clip, encodes it once and makes a run of it. Returns the run and the Stable Diffusion."""
    if args.prompt is None:
        raise InputError('A clip and its caption are needed: python train.py clip.mp4 "a man is skiing".')
    if not args.prompt.strip():
        raise InputError("The prompt is empty: say in a few words what the clip shows.")
    frames.open_clip(args.clip)                 # raises if there is none, before gigabytes of weights are read
    sd = cli.load_weights(args)
    loras = cli.read_loras(args.lora) or []
    lora.merge(sd, loras)
    cli.print_loras(loras)
    cli.warn_about_unknown_words(sd.path, [args.prompt], args.clip)
    sd.tokenizer([args.prompt, args.preview or ""])             # raises for bytes that are not UTF-8
    size = args.size or sd.defaults.size
    source = frames.read(args.clip, size, sd.multiple, args.frames or sd.defaults.frames, start=args.start or 0,
                         stride=args.stride, exact=args.frames is not None)
    describe(args.clip, source)
    settings = settings_of(args, sd, loras, source, size)
    clip = editing.encode_clip(sd, source, args.prompt)
    run = Run.create(args.out or "runs", Path(args.clip).stem, settings)
    try:
        run.write("clip", dict(mean=clip.mean, std=clip.std))
        frames.write_mp4(run.path / "source.mp4", source.x, source.fps)
        run.save()
        page.write(run.path)
    except BaseException:
        shutil.rmtree(run.path)
        raise
    return run, sd


def settings_of(args, sd, loras, source, size):
    """All that is needed to repeat the run: what was given, and the weights' defaults for the rest. Raises InputError."""
    return Settings.from_json(dict(
        clip=str(args.clip), prompt=args.prompt, preview=args.preview,
        weights=str(sd.path), fingerprint=sd.fingerprint, tokenizer=args.tokenizer, prediction=args.prediction,
        precision=name_of(sd.dtype), lora=tuple(asdict(one) for one in loras) or None,
        size=size, frames=len(source.x), start=args.start or 0, stride=args.stride,
        indices=source.indices, total=source.total, fps=str(source.fps),
        steps=steps_of(args, sd), lr=sd.defaults.lr if args.lr is None else args.lr,
        ddim_steps=sd.defaults.ddim_steps, guidance=sd.defaults.guidance,
        attention=args.attention or "sparse-causal", norm=args.norm or "clip",
        seed=33 if args.seed is None else args.seed,
        versions=dict(tinytav=tinytav.__version__, torch=torch.__version__, python=sys.version.split()[0])))


def steps_of(args, sd):
    """How many steps to tune. A net that the official code has tuned is used as it is, unless --steps asks for more."""
    if args.steps is not None:
        return args.steps
    if sd.temporal:
        print(f"{sd.path} was tuned by the official code and is used as it is; --steps N would tune it further.")
        return 0
    return sd.defaults.steps


def describe(clip, source):
    """Prints which frames were chosen, and warns if they are far apart."""
    count, _, height, width = source.x.shape
    print(f"clip: {clip}, {count} of {source.total} frames: {float(source.fps):.3g} fps, {width}x{height}")
    frames.warn_if_far_apart(source, clip)


def resume(args):
    """An unfinished run, locked, with the weights and the precision it was begun with."""
    more = cli.given(args) - RESUMABLE
    if more:
        raise InputError(f"A resumed run keeps its own settings: leave out {', '.join(sorted(more))}.")
    lock(Run.open(args.resume).path)
    run = Run.open(args.resume)             # read again: another train.py may have finished it before the lock
    run.clear()
    if run.finished:
        raise InputError(f"{run.path} is finished: sample from it with sample.py --run.")
    sd = cli.load_weights(args, run.settings.source(), run.settings.precision)
    run.check(sd)
    lora.merge(sd, run.settings.loras())
    cli.print_loras(run.settings.loras())
    return run, sd


# ---- Tuning --------------------------------------------------------------------------------------

class Stop:
    """Within it, Ctrl-C and SIGTERM only leave their number in `received`, so that a step ends whole. A second one kills."""

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def tuning_loop(run, tuner, on_cpu, preview):
    """The loop: progress, checkpoints, previews. Returns the number of the signal that stopped it, or 0.

    preview(step, stop): called at each quarter, after the step is saved.
    """
    total, first = run.settings.steps, len(tuner.losses)
    quarters = [total * i // 4 for i in (1, 2, 3, 4)]
    began, save_at = time.time(), 0.
    with Stop() as stop, tqdm(total=total, initial=first, desc="tuning", unit="step") as bar:
        for step in range(first + 1, total + 1):
            make_step(tuner, bar.write)
            recent = tuner.losses[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            bar.update()
            if stop.received or step == total or step in quarters or time.time() > save_at:
                save_at = time.time() + 20 * save(run, tuner)       # a twentieth of the time goes into saving
            if step in quarters and not stop.received:
                preview(step, stop)
            if stop.received:
                break
            if on_cpu and step == first + 3:
                say_time_left((time.time() - began) / 3 * (total - step), bar)
    return stop.received


def make_step(tuner, say):
    """One step of tuning. If the device's memory runs out, all blocks are computed again, and the step is made again.

    A step is a function of the seed and its number, so the second attempt is the same step.
    """
    blocks = memory.checkpointable(tuner.net).values()
    try:
        tuner.step()
        return
    except torch.OutOfMemoryError:
        if all(block.checkpointing for block in blocks):
            raise
    # Here the error is gone, and with it the tensors of the failed step.
    tuner.optimizer.zero_grad()
    torch.cuda.empty_cache()
    recompute.switch(tuner.net, recompute.everything(tuner.net))
    say(f"the memory is too small for step {len(tuner.losses) + 1}: from now on all blocks are computed again for the "
        "gradient, which is slower.")
    tuner.step()


def save(run, tuner):
    """Writes what resuming needs, and the page. Returns the seconds it took."""
    began = time.time()
    run.write("state", tuner.state_dict())
    run.write_losses(tuner.losses)
    page.write(run.path)
    return time.time() - began


def say_time_left(seconds, bar):
    """On a CPU, tells once how long the tuning takes, if it is long."""
    if seconds > 600:
        bar.write(f"about {seconds / 60:.0f} minutes of tuning are left on this CPU. Ctrl-C stops it so that --resume "
                  "goes on; fewer --steps, fewer --frames or a smaller --size is quicker.")


def write_preview(run, sd, net, clip, step, stop):
    """Samples run.json's preview prompt and writes preview-<step>.gif, unless a signal stops it in between."""
    settings = run.settings
    wanted = sd.encode_prompts([settings.preview])
    steps = settings.ddim_steps
    noise = last_unless(stop, pipeline.invert(net, sd.schedule, clip.mean, clip.empty, steps))
    if noise is None:
        return
    latents = last_unless(stop, pipeline.sample(net, sd.schedule, noise, wanted, clip.empty, steps, settings.guidance))
    if latents is None:
        return
    frames.write_gif(run.path / f"preview-{step}.gif", pipeline.decode(sd.vae, latents), Fraction(settings.fps))


def last_unless(stop, steps):
    """The final value of a generator, or None as soon as a signal came."""
    for value in steps:
        if stop.received:
            return None
    return value


# ---- The command ---------------------------------------------------------------------------------

def report(sd, net):
    """Prints what inflation did to the U-Net."""
    kept, added = len(sd.unet.state_dict()), len(net.state_dict()) - len(sd.unet.state_dict())
    tuned = net.tuned()
    print(f"inflated: {kept} tensors kept, {added} {'read' if sd.temporal else 'new'}, {len(tuned)} tuned "
          f"({sum(p.numel() for p in tuned.values()):,} parameters)")


def plan_memory(args, run, sd, net, clip, free):
    """Chooses the blocks that are computed again, so that a step fits into `free` bytes. Prints and warns."""
    stay = 0 if run.settings.preview is None else fit.weight_bytes(sd.vae) + fit.weight_bytes(sd.text_encoder)
    plan = fit.plan_tuning(memory.work_on(sd, net, clip.mean.shape), free - stay, args.checkpointing or "auto")
    if plan.note:
        print(plan.note)
    if plan.warning:
        warnings.warn(plan.warning)
    recompute.switch(net, plan.recomputed)


def main():
    args = arguments()
    free = fit.free_bytes(cli.choose_device(args.device))       # before the weights take their part of it
    run, sd = start(args) if args.resume is None else resume(args)
    settings = run.settings
    print(f"run: {run.path} (Ctrl-C stops it; go on with: python train.py --resume {run.path})")
    clip = editing.clip_of(run, sd)
    net = editing.new_net(sd, settings.frames, settings.attention, settings.norm, settings.seed)
    report(sd, net)
    plan_memory(args, run, sd, net, clip, free)
    if settings.preview is None:
        sd.vae = sd.text_encoder = None                         # their work is done: free their memory

    def preview(step, stop):
        if settings.preview is not None:
            write_preview(run, sd, net, clip, step, stop)

    tuner = Tuner(net, sd.schedule, clip.mean, clip.std, clip.context, settings.lr, settings.seed)
    if run.has("state"):
        tuner.load_state_dict(run.read("state"))
    stopped_by = tuning_loop(run, tuner, sd.device.type == "cpu", preview)
    if stopped_by:
        print(f"stopped and saved; go on with: python train.py --resume {run.path}\npage: {run.path / 'index.html'}")
        return 128 + stopped_by
    run.write("tuned", net.tuned())
    noise = editing.invert_clip(sd, net, clip, settings.ddim_steps, cli.progress)
    run.write("inversion", dict(noise=noise, steps=torch.tensor(settings.ddim_steps)))
    run.finish()
    print(f'done; now edit it: python sample.py --run {run.path} --prompt "..."\npage: {page.write(run.path)}')
    return 0


if __name__ == "__main__":
    cli.run(main)
