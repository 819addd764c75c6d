"""What attention sees, as pictures: where frames look for a word, and where a pixel looks in other frames.

    python -m tinytav attention runs/skiing --word panda
    python -m tinytav attention runs/skiing --pixel 120 140 --frame 5

A word's maps are those of the cross-attention (attn2) while a sample is made: softmax(Q K^T / sqrt(d)) of every pixel,
at the word's tokens. A pixel's are those of ST-Attn (attn1), in the frames that frame i takes its keys from: the first
and the previous one (paper, section 3.2). Both are means over heads, layers and timesteps.

attention_maps.py computes them beside the model's own calls.
"""
import json

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tinytav import cli, editing, pipeline
from tinytav.attention_maps import Mean, WordMaps, grid, probabilities, spans_of, watched, word_positions
from tinytav.errors import InputError
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace, replace_text
from tinytav.files.runs import Run, slug
from tinytav.inflation import ClipCrossAttention, SparseCausalAttention

# Dark violet to light yellow, from nothing to the most: as heat maps are often drawn. Red, green, blue.
HEAT = np.array([(0, 0, 4), (60, 15, 112), (137, 34, 106), (212, 72, 66), (250, 141, 10), (252, 255, 164)], float)
COLUMNS = 4             # frames in a row of a picture
LABEL = 20              # pixels of the line of text above a row


class PixelMaps:
    """How much attention a pixel of one frame pays, by ST-Attn, to each pixel of the first frame and the previous one.

    frame: from 0. y, x: where the pixel is, as parts of height and width.
    """

    def __init__(self, frames, frame, y, x, height, width):
        self.frames, self.frame, self.y, self.x = frames, frame, y, x
        self.looked_at = [0, max(frame - 1, 0)]                             # the first frame is its own predecessor
        self.seen = sorted(set(self.looked_at))
        self.mean = Mean(height, width)

    def __call__(self, attention, x):                                       # (b f) n c
        height, width = grid(x.shape[1], *self.mean.size)
        pixel = int(self.y * height) * width + int(self.x * width)
        clip = x[-self.frames:]
        q, k = attention.to_q(clip[self.frame, pixel]), attention.to_k(clip[self.looked_at])
        parts = probabilities(attention, q[None], k.flatten(0, 1))[0].unflatten(0, (2, height, width))
        # where the first frame is also the previous one, its keys stand there twice, and both shares are its own
        shares = parts if len(self.seen) == 2 else parts.sum(0, keepdim=True)
        self.mean.add(shares * height * width)                              # 1: as if it looked at one frame, evenly


# ---- pictures ------------------------------------------------------------------------------------

def heated(picture, heat):
    """A picture (h, w, 3) uint8 under a map (h', w') in [0, 1]: grey where it is 0, brightly coloured where it is 1."""
    size = picture.shape[1], picture.shape[0]
    heat = Image.fromarray(np.asarray(heat, np.float32)).resize(size, Image.Resampling.BICUBIC)
    heat = np.asarray(heat).clip(0, 1)[..., None]
    grey = 0.7 * picture.mean(-1, keepdims=True)
    colour = np.concatenate([np.interp(heat, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1)
    weight = 0.85 * heat ** 0.7                 # so that a little attention is seen too
    return ((1 - weight) * grey + weight * colour).round().astype(np.uint8)


def sheet(rows):
    """Rows (text, [(picture, label), ...]) -> one picture. The text stands above its row, a label above its picture."""
    height, width = rows[0][1][0][0].shape[:2]
    right, down = width + 4, 2 * LABEL + height + 8
    image = Image.new("RGB", (right * max(len(row) for _, row in rows) - 4, down * len(rows) - 8), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, (text, row) in enumerate(rows):
        draw.text((2, down * i + 2), text, "black", font)
        for j, (picture, label) in enumerate(row):
            draw.text((right * j + 2, down * i + LABEL + 2), label, "#555555", font)
            image.paste(Image.fromarray(picture), (right * j, down * i + 2 * LABEL))
    return image


def word_rows(x, maps, word):
    """Rows of frames (f, 3, h, w), each above its frames under the word's maps (f, h', w'); all maps on one scale."""
    pictures, heat = frames.enlarged(x), maps / maps.max().clamp(min=1e-12)
    chosen, rows = frames.strip_columns(len(x)), []
    for part in (chosen[i:i + COLUMNS] for i in range(0, len(chosen), COLUMNS)):
        rows.append(("the sample", [(pictures[i], f"frame {i + 1}") for i in part]))
        rows.append((f"attention to '{word}'", [(heated(pictures[i], heat[i]), f"frame {i + 1}") for i in part]))
    return rows


def pixel_row(x, frame, place, seen, maps):
    """Frame `frame` with the pixel marked, and the frames it looks at under their maps, on one scale: a row of sheet().

    x (f, 3, h, w); place (y, x) as parts; seen: the n frames looked at; maps (n, h', w').
    """
    pictures, heat = frames.enlarged(x), maps / maps.max().clamp(min=1e-12)
    shares = 100 * maps.sum((1, 2)) / maps.sum()
    looked_at = [(heated(pictures[i], one), f"frame {i + 1}: {share:.0f} % of its attention")
                 for i, one, share in zip(seen, heat, shares)]
    return [(marked(pictures[frame], *place), f"frame {frame + 1}: the pixel"), *looked_at]


def marked(picture, y, x):
    """The picture with a ring around the place (y, x), as parts of its height and width."""
    image = Image.fromarray(picture)
    draw, centre, radius = ImageDraw.Draw(image), (x * image.width, y * image.height), 0.06 * min(image.size)
    draw.circle(centre, radius, outline="black", width=5)
    draw.circle(centre, radius - 1, outline="white", width=2)
    return np.asarray(image)


# ---- the command ---------------------------------------------------------------------------------

def arguments():
    p = cli.parser(__doc__.splitlines()[0], seeded=False)
    p.add_argument("run", help="the folder of a finished run")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--word", help="show where each frame looks for this word of the prompt")
    what.add_argument("--pixel", type=cli.number(int, 0), nargs=2, metavar=("X", "Y"),
                      help="show where this pixel looks in other frames; counted in source.mp4, from the top left")
    p.add_argument("--frame", type=cli.number(int, 1), metavar="N", help="take this frame (default: the last)")
    p.add_argument("--prompt", help="sample this prompt for --word (default: the newest sample's that holds "
                                    "the word, or the run's own)")
    args = p.parse_args()
    if args.pixel is None and args.frame or args.pixel is not None and args.prompt is not None:
        p.error("--frame belongs to --pixel, and --prompt belongs to --word")
    return args


def watch_word(args, session):
    """Samples from the inverted clip and watches the word -> its picture's name, rows, caption, and what repeats it."""
    prompt = editing.chosen(args.prompt, prompt_with(session.run, args.word))
    maps = WordMaps(session.net.frames, word_positions(session.sd.tokenizer, prompt, args.word), *session.shape[3:])
    cli.say(f"prompt: {prompt}")
    noise = session.make_noise("inverted", progress=cli.progress)
    with watched(session.net, ClipCrossAttention, maps):
        x = editing.sample_clip(session.sd, session.net, noise, prompt, session.defaults.guidance,
                                progress=cli.progress).cpu()
    maps = maps.mean.value()
    caption = (f"Where each frame looks for \u201c{args.word}\u201d in \u201c{prompt}\u201d: cross-attention, the mean "
               f"over heads, layers and {noise.steps} steps. Brightest: {100 * maps.max():.1f} % of a pixel's "
               "attention.")
    name = f"{slug(prompt)}.{slug(args.word)}"
    return name, word_rows(x, maps, args.word), caption, dict(word=args.word, prompt=prompt)


def prompt_with(run, word):
    """The newest sample's prompt that holds the word; the run's own if no sample's does."""
    prompts = [details["prompt"] for name, details in records.read_samples(run.path) if name != "source.mp4"]
    return next((prompt for prompt in reversed(prompts) if spans_of(word, prompt)), run.settings.prompt)


@torch.no_grad()
def watch_pixel(args, session):
    """Shows the noised clip to the net -> as watch_word."""
    sd, clip, settings = session.sd, session.clip, session.run.settings
    if settings.attention != "sparse-causal":
        raise InputError(f"{session.run.path} was tuned with {settings.attention} attention, and --pixel shows "
                         "sparse-causal attention alone: name another run.")
    x = pipeline.decode(sd.vae, clip.mean).cpu()
    height, width = frames.enlarged(x[:1]).shape[1:3]                       # as source.mp4 shows it
    frame, (column, line) = args.frame or len(x), args.pixel
    if column >= width or line >= height or frame > len(x):
        raise InputError(f"source.mp4 of {session.run.path} has {len(x)} frames of {width}x{height} pixels: pixel "
                         f"{column} {line} of frame {frame} is not in it.")
    place = (line + 0.5) / height, (column + 0.5) / width
    noise = pipeline.gaussian(clip.mean.shape, settings.seed).to(sd.device)
    maps = PixelMaps(session.net.frames, frame - 1, *place, *session.shape[3:])
    with watched(session.net, SparseCausalAttention, maps):
        for t, _ in cli.progress(sd.schedule.pairs(settings.ddim_steps), settings.ddim_steps, "looking"):
            pipeline.predict(session.net, sd.schedule.add_noise(clip.mean, noise, t), t, clip.context)
    caption = (f"Where the pixel {column}, {line} of frame {frame} looks in the first and the previous frame: sparse-"
               f"causal attention, the mean over heads, layers and {settings.ddim_steps} timesteps of the noised clip.")
    rows = [("after tuning", pixel_row(x, frame - 1, place, maps.seen, maps.mean.value()))]
    return f"pixel-{column}-{line}-frame-{frame}", rows, caption, dict(pixel=args.pixel, frame=frame)


def main():
    args = arguments()
    run = Run.open(args.run)
    sd = cli.load_weights(args, run.settings.source(), run.settings.precision, run.settings.loras())
    session = editing.open_run(sd, run)
    if session.net.frames < session.shape[2]:
        raise InputError(f"{run.path} was tuned in windows of {session.net.frames} frames, of which no maps can be "
                         "drawn: tune with --frames no larger than the window.")
    name, rows, caption, flags = watch_word(args, session) if args.pixel is None else watch_pixel(args, session)
    path = run.path / f"{name}.attention.png"
    replace(path, lambda file: sheet(rows).save(file, "PNG", optimize=True))
    line = records.call("python -m tinytav attention", [run.path], flags)
    replace_text(path.with_suffix(".json"), json.dumps(dict(caption=caption, command=line), indent=2) + "\n")
    cli.say(f"{path}\n{caption}\npage: {page.write(run.path)}")
    return 0
