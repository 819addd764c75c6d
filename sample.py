"""Edit the tuned clip with a prompt: python sample.py --prompt "a panda is skiing"."""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C while torch is imported ends without a traceback

from tinytav import cli, editing, memory
from tinytav.attention_maps import word_positions
from tinytav.control import load_control
from tinytav.errors import InputError
from tinytav.files.runs import Run
from tinytav.inflation import ATTENTIONS
from tinytav.noise import NOISES


def arguments():
    p = cli.parser(__doc__, 'sample.py --prompt "what to show" [options]')
    p.add_argument("--prompt", nargs="+", action="extend", required=True,
                   help="what the edit shows; each prompt makes a clip")
    p.add_argument("--run", metavar="PATH",
                   help="edit this run (default: the newest in runs/; with --weights alone the untuned net)")
    p.add_argument("--negative", metavar="PROMPT", help="guide away from this prompt (default: from the empty one)")
    p.add_argument("--noise", choices=NOISES,
                   help="begin with the clip's inverted noise (the default where there is a run), with edit-friendly "
                        "noise, which keeps more of the clip, or with random noise, of each frame or shared by all")
    p.add_argument("--frames", type=cli.number(int, 1, 1000), metavar="N",
                   help="make N frames from random noise (default: the run's or the weights' number); 1 is a picture")
    p.add_argument("--size", type=cli.number(int, 8), metavar="N",
                   help="make squares of N pixels from random noise (default: the size of the run or of the weights)")
    mask = p.add_mutually_exclusive_group()
    mask.add_argument("--mask", metavar="PATH",
                      help="keep the clip where this is black: one picture for all frames, or a video or a folder of "
                           "pictures, one a frame")
    mask.add_argument("--mask-word", metavar="WORD",
                      help="keep the clip where this word of the prompt draws no attention")
    p.add_argument("--first-frame", metavar="PICTURE",
                   help="begin the edit with this picture: the clip's first frame, edited by hand")
    p.add_argument("--control", metavar="PATH", help="follow a hint by this ControlNet: a folder or a .safetensors")
    p.add_argument("--hint", metavar="PATH",
                   help="skeletons, depth or edges for the ControlNet: a video or a folder of pictures, one a frame")
    p.add_argument("--control-scale", type=cli.number(float, 0), metavar="X",
                   help="how strongly the edit follows the hint, usually from 0 to 2 (default: 1)")
    p.add_argument("--steps", type=cli.number(int, 1, 999), metavar="N",
                   help="make N steps of DDIM, best a divisor of 1000 (default: the run's own)")
    p.add_argument("--guidance", type=cli.number(float, 0), metavar="X",
                   help="how strongly the edit follows the prompt (default: the run's own)")
    p.add_argument("--strength", type=cli.number(float, 0), metavar="X",
                   help="use this much of the tuning: 0 is the untuned net, 1 (the default) the tuned one; more keeps "
                        "more of the clip and follows the prompt less")
    p.add_argument("--attention", choices=ATTENTIONS, help="the frames a frame looks at (default: the run's own)")
    cli.add_lora(p, "add these LoRA files to those that the run was tuned with")
    p.add_argument("--out", metavar="PATH", help="write the results here (default: the run's folder, or samples/)")
    return p.parse_args()


def find_run(args):
    """The run that is named or the newest; None for zero-shot use: weights named, no run."""
    if args.run is not None:
        return Run.open(args.run)
    return None if args.weights is not None else Run.newest("runs")


def check(args, run):
    """Raises InputError for flags that do not go together."""
    noise = NOISES[args.noise or ("inverted" if run else "random")]
    if not noise.seeded and args.seed is not None:
        raise InputError(f"The {noise.name} noise has nothing random: leave out --seed, or begin with random noise by "
                         "--noise random.")
    if (args.control is None) != (args.hint is None):
        raise InputError("--control and --hint belong together: the ControlNet's weights, and what it is to follow.")
    if args.strength is not None and run is None:
        raise InputError("--strength needs the tuning of a run: name a run with --run.")
    if args.control_scale is not None and args.control is None:
        raise InputError("--control-scale has no meaning without --control and --hint.")


def open_session(args, run):
    """The run's tuned net, or the inflated, untuned one -> editing.Session, with its LoRAs and those of --lora."""
    more = cli.read_loras(args.lora)
    if run is None:
        sd = cli.load_weights(args, loras=more)
        session = editing.untuned(sd, args.frames, args.size, args.attention or "sparse-causal", more)
    else:
        run.require("tuned")
        own, more = cli.share_out(run.settings.loras(), more)
        sd = cli.load_weights(args, run.settings.source(), run.settings.precision, own)
        strength = 1. if args.strength is None else args.strength
        session = editing.open_run(sd, run, args.attention, args.frames, args.size, more, strength)
        session.moved = [one for one in own if one not in run.settings.loras()]
        cli.print_loras(more)
    cli.warn_about_unknown_words(sd.path, args.prompt)
    sd.tokenizer([*args.prompt, args.negative or ""])           # raises for bytes that are not UTF-8
    return session


def main():
    args = arguments()
    run = find_run(args)
    check(args, run)
    untuned = "no run: sampling the untuned net from random noise; --run names a run to edit"
    cli.say(f"run: {run.path}" if run else untuned)
    session = open_session(args, run)
    cli.say_windows(session.net, session.shape)
    memory.warn_before_sampling(session.net, session.shape, session.sd.device)
    control = None
    if args.control is not None:
        scale = 1.0 if args.control_scale is None else args.control_scale
        control = load_control(session.sd, args.control, args.hint, session.shape, scale)
    keep = session.keep(args.mask, args.mask_word, args.first_frame)
    for prompt in args.prompt if args.mask_word else ():
        word_positions(session.sd.tokenizer, prompt, args.mask_word)        # raises before anything is written
    seed = 33 if args.seed is None else args.seed
    noise = session.make_noise(args.noise, args.steps, seed, cli.progress, way=bool(keep))
    for prompt in args.prompt:
        edit = session.edit(prompt, noise, args.guidance, args.negative or "", control, args.out, cli.progress,
                            keep)
        cli.say(edit.file)
    cli.say(f"page: {edit.page}")
    return 0


if __name__ == "__main__":
    cli.run(main)
