"""The HTML page of a run's folder, and of an evaluated set: videos that play in step, prompts, commands, metrics, loss.

A page is one file that opens from disk. It loads nothing but the pictures and videos beside it. All markup is built by
`element`, which escapes texts and attributes, so that no prompt and no file name can become markup. A page shows what
its folder holds:

run.json, loss.csv          the caption, the loss, and the command that repeats the tuning with each of its settings
*.mp4                       the source and the samples
NAME.sample.json            of sample NAME: prompt, and the command that repeats it with each of its settings
NAME.attention.json         of picture NAME.attention.png: caption, and the command that repeats it
metrics.json                what `python -m tinytav metrics` measured
"""
import html
import math
import os
import time
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from tinytav.errors import InputError
from tinytav.files.atomic import replace_text
from tinytav.files.clips import FOLDER_FPS, natural_order
from tinytav.files.records import by_time, call, inner, read_losses, read_samples, record, tuning_command
from tinytav.files.runs import Run, free_name

TEMPLATE = Path(__file__).with_name("page.html")
MARK = '<meta name="generator" content="tinytav">'      # what only a page of this project holds
NUMBERS = {                 # the measured numbers that a page shows, and their names there
    "consistency_all_pairs": "all pairs",
    "consistency_neighbours": "neighbours",
    "textual_alignment": "text",
    "success_rate": "success (%)",
    "psnr": "PSNR (dB)",
    "psnr_outside": "PSNR outside the mask (dB)",
    "pick_score": "PickScore",
}
LEGEND = ("All pairs and neighbours are the two frame consistencies, 100 x the mean cosine between CLIP's features of "
          "frames. Text is 100 x the mean cosine of frames and prompt. Success is the share of frames that CLIP finds "
          "nearer to the prompt than to the source's caption. Values of two CLIPs cannot be compared")
POINTS = 25                 # of the chart's line, each a mean of several steps


def write(folder):
    """Writes the page of a run's folder, or of a folder of samples without a run. Returns its path, as `save` does."""
    folder = Path(folder)
    try:
        settings = Run.open(folder).settings
    except InputError:
        settings = None
    losses = read_losses(folder)
    parts = [clips(folder, settings), attention(folder)]
    if settings is None:
        title = folder.resolve().name
        return save(folder, title, [element("p.kind", "samples"), element("h1", title), parts])
    return save(folder, settings.prompt, [
        heading(folder, settings, len(losses)), parts, loss_chart(losses, max(settings.steps, len(losses))),
        previews(folder, settings), element("h2", "The command that tunes so again"),
        element("pre", tuning_command(folder, settings))])


def save(folder, title, parts):
    """The template with this title and these parts -> index.html in the folder, replaced whole. Returns its path.

    An index.html that this project did not write stays as it is. The page is then index-2.html, or -3, ...
    """
    name = free_name("index", lambda name: is_foreign(folder / f"{name}.html"))
    path = folder / f"{name}.html"
    text = TEMPLATE.read_text(encoding="utf-8").replace("<!--title-->", markup(title))
    text = text.replace("<!--page-->", "\n".join(map(markup, parts)))
    replace_text(path, text.encode(errors="replace").decode())      # file names may hold bytes that are no text
    return path


def is_foreign(path):
    """Is there something at `path` that is no page of this project?"""
    if not path.is_file():
        return os.path.lexists(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        return MARK not in file.read(2 ** 16)


# ---- elements and texts --------------------------------------------------------------------------

class Html(str):
    """A text that is markup already."""


def element(tag, *content, **attributes):
    """The markup of an element. tag: its name, perhaps with classes: "p.soft". content: texts, elements, lists."""
    name, *classes = tag.split(".")
    if classes:
        attributes = {"class": " ".join(classes)} | attributes
    inside = "".join(f' {key.replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{inside}>" if name in ("img", "input") else f"<{name}{inside}>{markup(content)}</{name}>")


def markup(value):
    """Html as it is, the items of a list one after the other, and anything else as escaped text."""
    if isinstance(value, (list, tuple)):
        return Html("".join(map(markup, value)))
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def address(name):
    """A file's name, or its path below the page's folder, as the address of a link."""
    return quote(str(name).encode(errors="surrogateescape"))


def prompt_text(prompt):
    return element("span.prompt", prompt or "(the empty prompt)", dir="auto")


def picture(file, alt, link, *text):
    """A figure: a picture that is a link, and what stands below it."""
    image = element("img", src=address(file), alt=alt, loading="lazy")
    return element("figure", element("a", image, href=address(link)), element("figcaption", text))


def number(value):
    """A measured number as text; "" where it is not defined."""
    defined = isinstance(value, (int, float)) and abs(value) < 1e100        # neither NaN nor a huge integer
    return f"{value:.2f}" if defined else ""


def measured(values):
    """The defined ones among a clip's numbers, as a list of names and texts."""
    items = [element("div", element("dt", name), element("dd", number(values[key]))) for key, name in NUMBERS.items()
             if number(values.get(key))]
    return element("dl.numbers", items) if items else []


# ---- the parts of a run's page -------------------------------------------------------------------

def heading(folder, settings, steps):
    """What the run is of, and whether it is finished. steps: how many are done."""
    if settings.finished:
        date = time.strftime("%d %B %Y, %H:%M", time.localtime(settings.finished))
        state = element("p.state", "finished ", date)
    else:
        state = [element("p.state", f"unfinished: {steps} of {settings.steps} steps"),
                 element("p.soft", "If no train.py is at work on it, go on with"),
                 element("pre", call("python train.py", [], dict(resume=folder)))]
    return (element("p.kind", "tuned on ", element("b", settings.clip), " with the caption"),
            element("h1", prompt_text(settings.prompt)), state)


def clips(folder, settings):
    """A figure for the source and for each sample, and what their numbers mean. The template's script plays them."""
    samples, metrics = read_samples(folder), record(folder / "metrics.json")
    values = inner(metrics, "values")
    figures = [clip(name, details, settings, inner(values, name)) for name, details in samples]
    fps = Fraction(settings.fps) if settings else FOLDER_FPS
    parts = [element("div.clips", figures, data_fps=f"{float(fps):.6g}")]
    if values:
        parts.append(element("p.soft", LEGEND, "; these are by ", inner(metrics, "clip", str), "."))
    return parts


def clip(name, details, settings, values):
    """The clip `name` with its prompt, its metrics, and what repeats it."""
    prompt, kind, tag = details["prompt"], "sample", []
    if name == "source.mp4" and settings:
        prompt, kind, tag = settings.prompt, "source", element("span.tag", "source")
    if name.endswith(".mp4"):
        media = element("video", src=address(name), aria_label=prompt, muted="", playsinline="", preload="auto")
    else:
        media = element("img", src=address(name), alt=prompt)
    caption = element("figcaption", tag, prompt_text(prompt), measured(values), repeat(details))
    return element(f"figure.{kind}", media, caption)


def repeat(details):
    """The command of a sample or a picture, folded away; nothing where the record has none."""
    command = inner(details, "command", str)
    return element("details", element("summary", "how to repeat it"), element("pre", command)) if command else []


def attention(folder):
    """The pictures that `python -m tinytav attention` made."""
    figures = []
    for file in by_time(folder.glob("*.attention.png")):
        details = record(file.with_suffix(".json"))
        caption = inner(details, "caption", str) or file.name
        figures.append(picture(file.name, caption, file.name, prompt_text(caption), repeat(details)))
    return [element("h2", "Attention"), element("div.pictures", figures)] if figures else []


def loss_chart(losses, total):
    """The losses' means as a line of an SVG of 1000 x 100 units, which the page stretches. total: steps to be made."""
    if not losses:
        return []
    window = max(5, math.ceil(total / POINTS))
    means = [fmean(losses[i:i + window]) for i in range(0, len(losses), window)]
    top = max(means) or 1
    points = [f"{1000 * window * i / total:.1f} {100 - 100 * mean / top:.2f}" for i, mean in enumerate(means)]
    lines = dict(grid="M0 0h1000M0 50h1000", mean="M" + " L".join(points))
    drawing = element("svg", [element(f"path.{name}", d=d) for name, d in lines.items()], viewBox="0 0 1000 100",
                      preserveAspectRatio="none", role="img",
                      aria_label=f"loss after {len(losses)} steps: {means[-1]:.4f}")
    up, along = ([element("span", mark) for mark in marks]
                 for marks in ([f"{top:.3g}", f"{top / 2:.3g}", 0], [0, total // 2, total]))
    chart = element("div.chart", element("div.up", up), drawing, element("div.along", along))
    return element("h2", "Loss"), element("p.soft", f"Each point is a mean over {window} steps."), chart


def previews(folder, settings):
    """What train.py --preview sampled while it tuned."""
    figures = []
    for file in sorted(folder.glob("preview-*.gif"), key=natural_order):
        after = f"after {file.stem.removeprefix('preview-')} steps"
        figures.append(picture(file.name, f"preview {after}", file.name, after))
    prompt = element("p.soft", prompt_text(settings.preview))
    return (element("h2", "Previews"), prompt, element("div.previews", figures)) if figures else []


# ---- the page of a set ---------------------------------------------------------------------------

def write_set(folder, title, note, results, failures):
    """Writes the page of a set of clips. Returns its path, as `save` does.

    note: a sentence. results: one dict an edit, with clip, caption, kind, prompt, page and strip (paths below folder),
    and NUMBERS' keys. failures: {clip: why it has no results}.
    """
    sections = [clip_section(list(rows)) for _, rows in groupby(results, itemgetter("page"))]
    parts = [element("p.kind", "an evaluated set"), element("h1", title),
             element("p.soft", f"{counted(results, 'edit')} of {counted(sections, 'clip')}. {note}"),
             element("p.soft", LEGEND, ".")]
    if failures:
        parts += [element("p.state", f"without results: {counted(failures, 'clip')}"),
                  element("ul", [element("li", element("b", name), ": ", why) for name, why in failures.items()])]
    return save(folder, title, [parts, means_table(results), sections])


def counted(things, name):
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def means(rows):
    """{key of NUMBERS: its mean over the rows that have it}."""
    values = {key: [row[key] for row in rows if key in row] for key in NUMBERS}
    return {key: fmean(found) for key, found in values.items() if found}


def means_table(results):
    """The mean of each number over the edits of each kind, and over all."""
    used = means(results)
    lines = [element("tr", [element("th", name) for name in ("mean over", "edits", *map(NUMBERS.get, used))])]
    kinds = dict.fromkeys(row["kind"] for row in results)
    groups = [(kind, [row for row in results if row["kind"] == kind]) for kind in kinds]
    for kind, rows in [*groups, ("all", results)]:
        found = means(rows)
        cells = kind, len(rows), *(number(found.get(key)) or "-" for key in used)
        lines.append(element("tr", [element("td", cell) for cell in cells]))
    return element("div.scroll", element("table", lines))


def clip_section(rows):
    """One clip: its caption, and each edit's strip, source above and edit below."""
    first = rows[0]
    link = element("a", first["clip"], href=address(first["page"]))
    figures = [picture(row["strip"], row["prompt"], row["page"], element("span.tag", row["kind"]),
                       prompt_text(row["prompt"]), measured(row)) for row in rows]
    return element("h3", link, ": ", prompt_text(first["caption"])), element("div.pictures", figures)
