"""What attention sees, as pictures: where frames look for a word, and where a pixel looks in other frames.

    python -m tinytav attention runs/skiing --word panda
    python -m tinytav attention runs/skiing --pixel 120 140 --frame 5

A word's maps are those of the cross-attention (attn2) while a sample is made: softmax(Q K^T / sqrt(d)) of every pixel,
at the word's tokens. A pixel's are those of ST-Attn (attn1), in the frames that frame i takes its keys from: the first
and the previous one (paper, section 3.2). Both are means over heads, layers and timesteps.

The model computes attention in one fused call that returns no map. So the maps are computed beside it, from what enters
each attention, and only for the rows that are asked for. Nothing in the model is replaced: its results stay the same
bits.
"""
import json
import math
import re
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from tinytav import cli, editing, pipeline
from tinytav.errors import InputError
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace, replace_text
from tinytav.files.runs import Run, slug
from tinytav.inflation import ATTENTIONS, ClipCrossAttention
from tinytav.stable_diffusion import lora

# Dark violet to light yellow, from nothing to the most: as heat maps are often drawn. Red, green, blue.
HEAT = np.array([(0, 0, 4), (60, 15, 112), (137, 34, 106), (212, 72, 66), (250, 141, 10), (252, 255, 164)], float)
FRAMES = 8              # in a picture at most; of more, they are spread over the clip
COLUMNS = 4             # frames in a row of a picture
SIDE = 200              # pixels of a frame's short side in a picture
LABEL = 20              # pixels of the line of text above a row


def looks_at(kind, frame, count):
    """The frames, from 0, whose keys the frame gets from an attention of this name, in the order of its keys."""
    frames = {
        "sparse-causal": [0, max(frame - 1, 0)],            # the first frame is its own predecessor
        "spatial": [frame],
        "first": [0],
        "causal": list(range(frame + 1)),
        "full": list(range(count)),
    }
    return frames[kind]


@contextmanager
def watched(net, kind, look):
    """Within it, before a module of `kind` in `net` computes, look(module, *inputs) gets what enters it."""
    def hook(module, inputs):
        with torch.no_grad():
            look(module, *inputs)           # returns nothing, so the inputs stay as they are
    handles = [module.register_forward_pre_hook(hook) for module in net.modules() if isinstance(module, kind)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probabilities(attention, q, k):
    """softmax(Q K^T / sqrt(d)), the mean over heads: projected q (n, c), k (m, c) -> (n, m), in float32."""
    q, k = (z.float().unflatten(-1, (attention.heads, -1)).transpose(0, 1) for z in (q, k))     # (heads, ., d)
    return (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1).mean(0)


def grid(n, height, width):
    """Height and width of a layer's n pixels: those of the latents, halved some times, rounding up."""
    while height * width > n:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == n
    return height, width


class Mean:
    """The mean of maps (f, h, w) of several layers and steps, each enlarged to the latents' size."""

    def __init__(self, height, width):
        self.size, self.total, self.count = (height, width), 0., 0

    def add(self, maps):
        self.total = self.total + F.interpolate(maps[None], self.size, mode="bilinear")[0]
        self.count += 1

    def value(self):
        return (self.total / self.count).cpu()


class WordMaps:
    """How much attention each pixel pays to the tokens at `positions` of the last prompt of a batch."""

    def __init__(self, frames, positions, height, width):
        self.frames, self.positions, self.mean = frames, positions, Mean(height, width)

    def __call__(self, attention, x, context):                              # (b f) n c, b m d
        k = attention.to_k(context[-1])
        maps = []
        for frame in x[-self.frames:]:                                      # n c
            weights = probabilities(attention, attention.to_q(frame), k)    # n m
            maps.append(weights[:, self.positions].sum(-1))
        self.mean.add(torch.stack(maps).unflatten(1, grid(x.shape[1], *self.mean.size)))


class PixelMaps:
    """How much attention a pixel of one frame pays to each pixel of the frames it looks at.

    kind: the name of the attention. frame: from 0. y, x: where the pixel is, as parts of height and width.
    """

    def __init__(self, kind, frames, frame, y, x, height, width):
        self.frames, self.frame, self.y, self.x = frames, frame, y, x
        self.looked_at = looks_at(kind, frame, frames)
        self.seen = sorted(set(self.looked_at))
        self.mean = Mean(height, width)

    def __call__(self, attention, x):                                       # (b f) n c
        height, width = grid(x.shape[1], *self.mean.size)
        pixel = int(self.y * height) * width + int(self.x * width)
        clip = x[-self.frames:]
        q, k = attention.to_q(clip[self.frame, pixel]), attention.to_k(clip[self.looked_at])
        parts = probabilities(attention, q[None], k.flatten(0, 1))[0].unflatten(0, (-1, height, width))
        # where the first frame is also the previous one, its keys stand there twice, and both shares are its own
        shares = [sum(part for part, at in zip(parts, self.looked_at) if at == frame) for frame in self.seen]
        self.mean.add(torch.stack(shares) * height * width)                 # 1: as if it looked at one frame, evenly


def word_positions(tokenizer, prompt, word):
    """Where the tokens of `word` stand in the prompt's row of ids. Raises InputError if the prompt has no such word."""
    spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    offsets = tokenizer.bpe.encode(prompt, add_special_tokens=False).offsets[:tokenizer.length - 2]
    positions = [1 + i for i, (first, end) in enumerate(offsets)            # 1: the row begins with <|startoftext|>
                 if any(first < span_end and end > span_first for span_first, span_end in spans)]
    if not word.strip() or not positions:
        raise InputError(f"{prompt!r} does not hold the word {word!r}, or is cut before it: name a word of the prompt "
                         "with --word, and the prompt with --prompt.")
    return positions


# ---- the maps of a run ---------------------------------------------------------------------------

def of_word(net, sd, noise, context, empty, positions, steps, guidance):
    """Samples the prompt, and watches it. Returns latents (1, 4, f, h, w) and maps (f, h, w)."""
    maps = WordMaps(net.frames, positions, *noise.shape[3:])
    with watched(net, ClipCrossAttention, maps):
        sampling = pipeline.sample(net, sd.schedule, noise, context, empty, steps, guidance)
        latents = pipeline.last(cli.progress(sampling, steps, "sampling"))
    return latents, maps.mean.value()


@torch.no_grad()
def of_pixel(net, sd, latents, context, noise, frame, y, x, steps, name):
    """Shows the net the noised clip at every timestep of the sampler. Returns maps (n, h, w) and their n frames.

    latents and noise (1, 4, f, h, w). The same noise, whatever the net: what differs between two nets is their doing.
    """
    maps = PixelMaps(net.attention, net.frames, frame, y, x, *latents.shape[3:])
    with watched(net, ATTENTIONS[net.attention], maps):
        for t, _ in cli.progress(sd.schedule.pairs(steps), steps, name):
            pipeline.predict(net, sd.schedule.add_noise(latents, noise, t), t, context)
    return maps.mean.value(), maps.seen


# ---- pictures ------------------------------------------------------------------------------------

def heated(picture, heat):
    """A picture (h, w, 3) uint8 under a map (h', w') in [0, 1]: grey where it is 0, brightly coloured where it is 1."""
    size = picture.shape[1], picture.shape[0]
    heat = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    heat = np.asarray(heat).clip(0, 1)[..., None]
    grey = 0.7 * picture.mean(-1, keepdims=True).repeat(3, -1)
    place = heat * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    colour = HEAT[low[..., 0]] + (place - low) * (HEAT[low[..., 0] + 1] - HEAT[low[..., 0]])
    weight = 0.85 * heat ** 0.7                 # so that a little attention is seen too
    return ((1 - weight) * grey + weight * colour).round().astype(np.uint8)


def row_of(text, pictures, labels):
    """Pictures side by side under a line of text each; `text` stands above the first."""
    height, width = pictures[0].shape[:2]
    gap = 4
    row = Image.new("RGB", (len(pictures) * (width + gap) - gap, 2 * LABEL + height), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(13)
    draw.text((2, 2), text, "black", font)
    for i, (picture, label) in enumerate(zip(pictures, labels)):
        draw.text((i * (width + gap) + 2, LABEL + 2), label, "#555555", font)
        row.paste(Image.fromarray(picture), (i * (width + gap), 2 * LABEL))
    return row


def stacked(rows):
    """Rows, one below the other, on white."""
    height = sum(row.height for row in rows) + 8 * (len(rows) - 1)
    whole = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + 8
    return whole


def resized(x, side):
    """Frames (f, 3, h, w) in [-1, 1] -> (f, h', w', 3) uint8, with a short side of `side` pixels."""
    factor = side / min(x.shape[2:])
    size = [round(n * factor) for n in x.shape[2:]]
    mode = dict(mode="nearest") if factor > 1 else dict(mode="area")
    return frames.to_uint8(F.interpolate(x, size, **mode)).numpy()


def spread(count, most):
    """At most `most` indices of `count` things, spread over them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def word_picture(x, maps, word):
    """Frames (f, 3, h, w), and below them the same under the word's maps (f, h', w'); all maps on one scale."""
    pictures = resized(x, SIDE)
    heat = (maps / maps.max().clamp(min=1e-12)).numpy()
    chosen = spread(len(x), FRAMES)
    rows = []
    for part in (chosen[i:i + COLUMNS] for i in range(0, len(chosen), COLUMNS)):
        labels = [f"frame {i + 1}" for i in part]
        rows.append(row_of("the sample", [pictures[i] for i in part], labels))
        rows.append(row_of(f"attention to '{word}'", [heated(pictures[i], heat[i]) for i in part], labels))
    return stacked(rows)


def marked(picture, y, x):
    """The picture with a ring around the place (y, x), as parts of its height and width."""
    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    centre, radius = (x * width, y * height), 0.06 * min(height, width)
    box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
    draw.ellipse(box, outline="black", width=5)
    draw.ellipse([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline="white", width=2)
    return np.asarray(image)


def pixel_picture(x, frame, place, seen, rows):
    """Frame `frame` with the pixel marked, beside the frames it looks at, under their maps.

    x (f, 3, h, w); place (y, x) as parts; seen: the frames looked at; rows: [(text, maps (n, h', w'))], on one scale.
    """
    pictures = resized(x, SIDE)
    top = max(maps.max().item() for _, maps in rows)
    shown = spread(len(seen), FRAMES)
    made = []
    for text, maps in rows:
        heat = (maps / max(top, 1e-12)).numpy()
        labels = [f"frame {seen[i] + 1}: {100 * maps[i].sum() / maps.sum():.0f} % of its attention" for i in shown]
        row = [marked(pictures[frame], *place), *(heated(pictures[seen[i]], heat[i]) for i in shown)]
        made.append(row_of(text, row, [f"frame {frame + 1}: the pixel", *labels]))
    return stacked(made)


# ---- the command ---------------------------------------------------------------------------------

def arguments():
    p = cli.parser(__doc__.splitlines()[0])
    p.add_argument("run", help="a finished run's folder")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--word", help="where each frame looks for this word of the prompt")
    what.add_argument("--pixel", type=cli.number(int, 0), nargs=2, metavar=("X", "Y"),
                      help="where this pixel looks in other frames; counted in source.mp4, from the top left")
    p.add_argument("--frame", type=cli.number(int, 1), metavar="N", help="the pixel's frame, from 1; else the last")
    p.add_argument("--prompt", help="else the newest sample's that holds the word, or the run's own")
    return p.parse_args()


def prompt_with(run, word):
    """The newest sample's prompt that holds the word; the run's own if no sample's does."""
    prompts = [details["prompt"] for name, details in records.read_samples(run.path) if name != "source.mp4"]
    holding = [prompt for prompt in prompts if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    return holding[-1] if holding else run.settings.prompt


def save(run, name, picture, caption, repeat):
    """The picture and its record in the run's folder; then the page. Prints where they are."""
    path = run.path / f"{name}.attention.png"
    replace(path, lambda file: picture.save(file, "PNG", optimize=True))
    replace_text(path.with_suffix(".json"), json.dumps(dict(caption=caption, command=repeat), indent=2) + "\n")
    print(f"{path}\n{caption}\npage: {page.write(run.path)}")


def watch_word(args, run, sd):
    """Samples with the word's maps, and saves their picture."""
    settings = run.settings
    prompt = prompt_with(run, args.word) if args.prompt is None else args.prompt
    positions = word_positions(sd.tokenizer, prompt, args.word)
    print(f"prompt: {prompt}")
    net, clip = editing.net_of(run, sd), editing.clip_of(run, sd)
    noise = editing.noise_of(run, sd, net, clip, settings.ddim_steps, cli.progress)
    latents, maps = of_word(net, sd, noise, sd.encode_prompts([prompt]), clip.empty, positions, settings.ddim_steps,
                            settings.guidance)
    picture = word_picture(pipeline.decode(sd.vae, latents).cpu(), maps, args.word)
    caption = (f"Where each frame looks for \u201c{args.word}\u201d in \u201c{prompt}\u201d: cross-attention, the mean "
               f"over heads, layers and {settings.ddim_steps} steps. Brightest: {100 * maps.max():.1f} % of a pixel's "
               "attention.")
    save(run, f"{slug(prompt)}.{slug(args.word)}", picture, caption,
         records.command("python", "-m", "tinytav", "attention", run.path, "--word", args.word, "--prompt", prompt))


def watch_pixel(args, run, sd):
    """Shows the noised clip to the net before and after tuning, and saves the picture of a pixel's maps."""
    settings = run.settings
    clip = editing.clip_of(run, sd)
    x = pipeline.decode(sd.vae, clip.mean).cpu()
    height, width = frames.enlarged(x[:1]).shape[1:3]                       # as source.mp4 shows it
    frame = len(x) if args.frame is None else args.frame
    if args.pixel[0] >= width or args.pixel[1] >= height or frame > len(x):
        raise InputError(f"source.mp4 of {run.path} has {len(x)} frames of {width}x{height} pixels: pixel "
                         f"{args.pixel[0]} {args.pixel[1]} of frame {frame} is not in it.")
    place = (args.pixel[1] + 0.5) / height, (args.pixel[0] + 0.5) / width
    noise = pipeline.gaussian(clip.mean.shape, settings.seed).to(sd.device)
    untuned = editing.new_net(sd, clip.frames, settings.attention, settings.norm, settings.seed)
    rows = []
    for name, net in (("before tuning", untuned), ("after tuning", editing.net_of(run, sd))):
        maps, seen = of_pixel(net, sd, clip.mean, clip.context, noise, frame - 1, *place, settings.ddim_steps, name)
        rows.append((name, maps))
    picture = pixel_picture(x, frame - 1, place, seen, rows)
    what = "the first and the previous frame" if settings.attention == "sparse-causal" else "the frames it is shown"
    pixel = f"{args.pixel[0]}, {args.pixel[1]}"
    caption = (f"Where the pixel {pixel} of frame {frame} looks in {what}: {settings.attention} attention, the mean "
               f"over heads, layers and {settings.ddim_steps} timesteps of the noised clip.")
    save(run, f"pixel-{args.pixel[0]}-{args.pixel[1]}-frame-{frame}", picture, caption,
         records.command("python", "-m", "tinytav", "attention", run.path, "--pixel", *args.pixel, "--frame", frame))


def main():
    args = arguments()
    run = Run.open(args.run)
    if not run.finished:
        raise InputError(f"{run.path} is unfinished: go on with python train.py --resume {run.path}.")
    sd = cli.load_weights(args, run.settings.source(), run.settings.precision)
    run.check(sd)
    lora.merge(sd, run.settings.loras())
    if args.word is not None:
        watch_word(args, run, sd)
    else:
        watch_pixel(args, run, sd)
    return 0
