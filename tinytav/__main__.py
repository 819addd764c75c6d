"""The commands beside train.py and sample.py: python -m tinytav COMMAND.

Each command is the `main` of one module. Without a command, a list of them is printed.
"""
import importlib
import sys

from tinytav import cli

# command: (module, what it does)
COMMANDS = {
    "convert": ("tinytav.files.convert", "turn a pickled checkpoint (.ckpt, .bin, .pt) into safetensors"),
    "metrics": ("tinytav.measure.metrics", "consistency, textual alignment and PSNR of a run's clips"),
    "attention": ("tinytav.measure.attention", "pictures of where frames look for a word, or a pixel in other frames"),
    "evaluate": ("tinytav.measure.evaluate", "tune, edit and measure a whole set of clips, on one or several machines"),
    "bench": ("tinytav.measure.bench", "seconds and memory of each part on this machine"),
    "claims": ("tinytav.claims.results", "the paper's claims and further studies, measured in the toy world"),
    "card": ("tinytav.toy.card", "the numbers and pictures of the toy's model card"),
    "pretrain": ("tinytav.toy.pretrain", "train the toy's CLIP, VAE and U-Net"),
    "examples": ("tinytav.toy.examples", "draw the example clips in weights/toy"),
}


def usage():
    """The list of commands, one a line."""
    lines = [f"  {name:14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m tinytav COMMAND [OPTIONS]", "", *lines, "",
                      "python -m tinytav COMMAND --help lists the options of one."])


def main():
    """Runs the command that is named first. Exit status 2 if there is none of that name."""
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}.\n\n{usage()}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv = [f"python -m tinytav {name}", *options]
    return importlib.import_module(module).main()


if __name__ == "__main__":
    cli.run(main)
