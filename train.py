"""Tune a Stable Diffusion on one clip: python train.py clip.mp4 "a man is skiing"."""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C while torch is imported ends without a traceback

import shlex
from fractions import Fraction

from tqdm import tqdm

from tinytav import cli, editing, memory
from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.runs import MOST_STEPS, Run
from tinytav.inflation import ATTENTIONS

# Flags that may stand beside --resume. All others, except --precision, are arguments of editing.begin.
RESUMABLE = {"resume", "device", "checkpointing", "lora", *cli.SOURCE}


def arguments():
    p = cli.parser(__doc__, 'train.py CLIP "what it shows" [options]')
    p.add_argument("clip", nargs="?", help="the clip: mp4, mov, webm, gif, or a folder of pictures")
    p.add_argument("prompt", nargs="?", help="what the clip shows, in a few words")
    p.add_argument("--out", metavar="PATH", help="make the run's folder here (default: runs)")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N",
                   help="scale the short side to N pixels (default: the size the weights were made for)")
    p.add_argument("--frames", type=cli.number(int, 1), metavar="N",
                   help="use N frames (default: the weights' own number)")
    p.add_argument("--window", type=cli.number(int, 1), metavar="N",
                   help="let the net see N frames at a time: it needs memory for these alone, however long the clip is "
                        "(default: the weights' own number of frames)")
    p.add_argument("--start", type=cli.number(int, 0), metavar="N", help="begin at frame N of the clip (default: 0)")
    p.add_argument("--stride", type=cli.number(int, 1), metavar="N",
                   help="take every N-th frame (default: spread the frames over the whole clip)")
    p.add_argument("--steps", type=cli.number(int, 1, MOST_STEPS), metavar="N",
                   help="make N steps of tuning (default: the weights' own number)")
    p.add_argument("--lr", type=cli.number(float, 0), metavar="X", help="learning rate (default: the weights' own)")
    p.add_argument("--attention", choices=ATTENTIONS,
                   help="choose which frames a frame looks at (default: sparse-causal, the first and the previous one)")
    p.add_argument("--norm", choices=["clip", "frame"],
                   help="compute the group norms over the whole clip or over each frame (default: clip)")
    p.add_argument("--preview", metavar="PROMPT", help="sample this prompt at each quarter of the tuning")
    cli.add_lora(p, "merge these LoRA files into the weights before tuning")
    p.add_argument("--checkpointing", choices=["auto", "on", "off"],
                   help="compute blocks of the U-Net again for the gradient, which saves memory and costs time "
                        "(default: auto, as few as the memory needs)")
    p.add_argument("--resume", metavar="RUN", help="go on with an unfinished run, by its own settings")
    return p.parse_args()


# ---- A new run, or an unfinished one -------------------------------------------------------------

def start(args):
    """Reads the clip and makes a run of it -> editing.Session."""
    if not args.clip or args.prompt is None:
        raise InputError('A clip and its caption are needed: python train.py clip.mp4 "a man is skiing".')
    frames.open_clip(args.clip)                 # raises if there is none, before gigabytes of weights are read
    loras = cli.read_loras(args.lora)
    sd = cli.load_weights(args, loras=loras)
    cli.warn_about_unknown_words(sd.path, [args.prompt], args.clip)
    sd.tokenizer([args.prompt, args.preview or ""])             # raises for bytes that are not UTF-8
    given = {name: getattr(args, name) for name in cli.given(args) - RESUMABLE - {"precision"}}
    session = editing.begin(sd, loras=loras, **given)
    settings, (height, width) = session.run.settings, session.shape[3:]
    cli.say(f"clip: {args.clip}, {settings.frames} of {settings.total} frames: {float(Fraction(settings.fps)):.3g} "
            f"fps, {width * sd.multiple}x{height * sd.multiple}")
    if settings.steps == 0:
        cli.say(f"{sd.path} was tuned by the official code and is used as it is; --steps N would tune it further.")
    return session


def resume(args):
    """An unfinished run, locked, with the weights and the precision it was begun with -> editing.Session."""
    more = cli.given(args) - RESUMABLE
    if more:
        flags = ", ".join(f"--{name}" for name in sorted(more))
        raise InputError(f"A resumed run keeps its own settings: leave out {flags}.")
    run = Run.locked(args.resume)
    if run.finished:
        raise InputError(f"{args.resume} is finished: sample from it with sample.py --run.")
    loras, more_loras = cli.share_out(run.settings.loras(), cli.read_loras(args.lora))
    if more_loras:
        raise InputError(f"{more_loras[0].file} is no LoRA of this run. Beside --resume, --lora only says where one "
                         "lies now.")
    sd = cli.load_weights(args, run.settings.source(), run.settings.precision, loras)
    return editing.resume(sd, run)


# ---- Tuning --------------------------------------------------------------------------------------

class Stop:
    """Within it, Ctrl-C and SIGTERM only leave their number in `received`, so that a step ends whole. A second one
    kills.
    """

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


class Stopped(Exception):
    """A signal came while a preview was sampled."""


def tune(session, checkpointing):
    """Tunes with a progress bar and previews. Returns the number of the signal that stopped it, or 0."""
    total = session.run.settings.steps
    steps = session.tune(checkpointing)
    if count := memory.recomputed(session.net):
        blocks = len(memory.blocks(session.net))
        cli.say(f"{count} of {blocks} blocks are computed again for the gradient, to save memory.")
    done = len(session.tuner.losses)
    with Stop() as stop, tqdm(total=total, initial=done, desc="tuning", unit="step") as bar:
        for step, _ in steps:
            recent = session.tuner.losses[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            bar.update()
            if session.run.settings.preview is not None and step in session.quarters and not stop.received:
                write_preview(session, step, stop)
            if stop.received:
                session.save()
                break
    return stop.received


def write_preview(session, step, stop):
    """Samples run.json's preview prompt and writes preview-<step>.gif, unless a signal stops it in between."""
    def until_stopped(steps, total, name):
        for value in steps:
            if stop.received:
                raise Stopped
            yield value
    settings = session.run.settings
    try:
        noise = session.make_noise("inverted", progress=until_stopped)
        x = editing.sample_clip(session.sd, session.net, noise, settings.preview, settings.guidance,
                                progress=until_stopped)
    except Stopped:
        return
    frames.write_gif(session.run.path / f"preview-{step}.gif", x, Fraction(settings.fps))


# ---- The command ---------------------------------------------------------------------------------

def report(sd, net):
    """Prints what inflation did to the U-Net."""
    kept, added = len(sd.unet.state_dict()), len(net.state_dict()) - len(sd.unet.state_dict())
    tuned = net.tuned()
    print(f"inflated: {kept} tensors kept, {added} {'read' if sd.temporal else 'new'}, {len(tuned)} tuned "
          f"({sum(p.numel() for p in tuned.values()):,} parameters)")


def main():
    args = arguments()
    session = start(args) if args.resume is None else resume(args)
    folder = shlex.quote(str(session.run.path))
    go_on = f"python train.py --resume {folder}"
    cli.say(f"run: {session.run.path} (Ctrl-C stops it; go on with: {go_on})")
    report(session.sd, session.net)
    cli.say_windows(session.net, session.shape)
    if session.run.settings.preview is None:
        session.sd.vae = session.sd.text_encoder = None         # their work is done: free their memory
    stopped_by = tune(session, args.checkpointing or "auto")
    if stopped_by:
        cli.say(f"stopped and saved; go on with: {go_on}\npage: {session.run.path / 'index.html'}")
        return 128 + stopped_by
    page = session.finish(cli.progress)
    cli.say(f'done; now edit it: python sample.py --run {folder} --prompt "..."\npage: {page}')
    return 0


if __name__ == "__main__":
    cli.run(main)
