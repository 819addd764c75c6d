"""The HTML page of a run's folder, and of an evaluated set: videos that play in step, prompts, settings, metrics, loss.

A page is one file that opens from disk. It loads nothing but the pictures and videos beside it. Everything is built of
elements (xml.etree), which escape their texts and attributes, so that no prompt and no file name can become markup.
What the page shows it reads from the folder:

run.json, loss.csv          the settings and the loss
*.mp4                       the source and the samples
NAME.sample.json            of sample NAME: prompt, settings, and the command that repeats it
NAME.attention.json         of picture NAME.attention.png: caption, and the command that repeats it
metrics.json                what `python -m tinytav metrics` measured
"""
import csv
import html
import json
import math
import re
import shlex
import time
from fractions import Fraction
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from tinytav.errors import InputError
from tinytav.files import frames
from tinytav.files.atomic import replace, replace_text
from tinytav.stable_diffusion.checkpoint import read_json

TEMPLATE = Path(__file__).with_name("page.html")
NUMBERS = {
    "consistency_all_pairs": "all pairs",
    "consistency_neighbours": "neighbours",
    "textual_alignment": "text",
    "psnr": "PSNR (dB)",
    "pick_score": "PickScore",
}
LEGEND = ("All pairs and neighbours are the two frame consistencies, 100 x the mean cosine between CLIP's features of "
          "frames. Text is 100 x the mean cosine of frames and prompt. Values of two CLIPs cannot be compared")
# The settings of a run that are flags of train.py, in the order of its --help.
TUNING_FLAGS = ("weights", "tokenizer", "prediction", "vae", "embedding", "size", "frames", "start", "stride", "steps",
                "lr", "attention", "norm", "precision", "seed", "preview")
NOT_SHOWN = {"clip", "prompt", "finished", "indices", "versions", "fingerprint", "clip_fingerprint", "lora"}    # said elsewhere, or long


def write(folder):
    """Writes folder/index.html for a run's folder, or for a folder of samples without a run. Returns its path."""
    folder = Path(folder)
    settings = record(folder / "run.json")
    samples = read_samples(folder)
    content = [*heading(folder, settings), *clips(folder, settings, samples)]
    content += attention(folder) + loss_chart(folder, settings) + previews(folder) + run_settings(folder, settings)
    return save(folder / "index.html", shown(settings.get("prompt", folder.resolve().name)), content)


def save(path, title, content):
    """The template with this title and these elements -> a file, replaced whole. Returns its path."""
    start, rest = TEMPLATE.read_text(encoding="utf-8").split("<!--title-->")
    middle, end = rest.split("<!--page-->")
    elements = "\n".join(ElementTree.tostring(item, encoding="unicode", method="html") for item in content)
    text = start + html.escape(title) + middle + elements + end

    def write_text(file):
        Path(file).write_text(text, encoding="utf-8", errors="replace")     # file names may hold bytes that are no text
    replace(path, write_text)
    return path


# ---- elements ------------------------------------------------------------------------------------

def element(tag, attributes, *content):
    """An element; `content` are texts and elements. Texts are kept as texts, whatever they hold."""
    made = ElementTree.Element(tag, attributes)
    last = None
    for item in content:
        if isinstance(item, str) and last is None:
            made.text = (made.text or "") + item
        elif isinstance(item, str):
            last.tail = (last.tail or "") + item
        else:
            made.append(item)
            last = item
    return made


def address(name):
    """A file's name, or its path below the page's folder, as the address of a link."""
    return quote(str(name).encode(errors="surrogateescape"))


def prompt_text(prompt):
    return element("span", {"class": "prompt", "dir": "auto"}, prompt or "(the empty prompt)")


def definitions(style, pairs):
    """A list of terms and their texts, from (term, text) pairs."""
    items = []
    for term, text in pairs:
        items += [element("dt", {}, term), element("dd", {}, text)]
    return element("dl", {"class": style}, *items)


def shown(value):
    """A setting as text: numbers as short as they are, lists with commas."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return str(value)


def number(value):
    """A measured number as text; "-" where it is not defined."""
    defined = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.2f}" if defined else "-"


def command(*words):
    """Words -> a line for the shell."""
    return shlex.join(map(str, words))


def flags(values):
    """{name: value} -> the words of a command line. None and False are not given; a list follows its flag."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, (list, tuple)):
            words += value
        elif value is not True:
            words.append(value)
    return words


def write_record(folder, name, prompt, settings, repeat):
    """NAME.sample.json: the settings of a sample, and the command that repeats it. No sample's own file has this name."""
    details = dict(prompt=prompt, settings=settings, command=repeat)
    replace_text(Path(folder) / f"{name}.sample.json", json.dumps(details, indent=2) + "\n")


# ---- what the folder holds -----------------------------------------------------------------------

def record(file):
    """A JSON file's object; an empty one where the file is absent or broken: a page shows what there is."""
    try:
        return read_json(file)
    except InputError:
        return {}


def read_samples(folder):
    """[(file name, record)], the source first, then from the oldest to the newest. A record always has a prompt."""
    files = {file.name.removesuffix(".sample.json"): file for file in folder.glob("*.sample.json")}
    found = []
    for path in [*folder.glob("*.mp4"), *(folder / f"{name}.png" for name in files)]:
        if path.suffix == ".png" and (path.with_suffix(".mp4").exists() or not path.exists()):
            continue                                        # a clip's strip, or a sample whose picture was removed
        details = record(files[path.stem]) if path.stem in files else {}
        if not isinstance(details.get("prompt"), str):
            details["prompt"] = title(path) or path.stem
        found.append((path.name, details, path.stat().st_mtime))
    found.sort(key=order)
    return [(name, details) for name, details, _ in found]


def order(sample):
    name, _, changed = sample
    return name != "source.mp4", changed, name


def title(path):
    """The prompt that an mp4 keeps; "" where it keeps none, or cannot be read."""
    try:
        return frames.title(path)
    except (OSError, ValueError):                           # PyAV's errors are both
        return ""


def read_losses(folder):
    """loss.csv -> a list of numbers; empty where there is none."""
    if not (folder / "loss.csv").is_file():
        return []
    with open(folder / "loss.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [float(row["loss"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        return []


# ---- the parts of a run's page -------------------------------------------------------------------

def heading(folder, settings):
    if not settings:
        return [element("p", {"class": "kind"}, "samples"), element("h1", {}, folder.resolve().name)]
    clip = element("b", {}, shown(settings.get("clip")))
    content = [element("p", {"class": "kind"}, "tuned on ", clip, " with the caption"),
               element("h1", {}, prompt_text(shown(settings.get("prompt"))))]
    finished = settings.get("finished")
    if isinstance(finished, (int, float)) and finished > 0:
        when = time.strftime("%d %B %Y, %H:%M", time.localtime(finished))
        return [*content, element("p", {"class": "state finished"}, f"finished {when}")]
    done = f"unfinished: {len(read_losses(folder))} of {shown(settings.get('steps'))} steps"
    again = element("pre", {}, command("python", "train.py", "--resume", folder))
    return [*content, element("p", {"class": "state unfinished"}, done),
            element("p", {"class": "soft"}, "If no train.py is at work on it, go on with"), again]


def clips(folder, settings, samples):
    """One player, and a figure for the source and for each sample."""
    if not samples:
        return []
    metrics = record(folder / "metrics.json")
    values = metrics.get("values") if isinstance(metrics.get("values"), dict) else {}
    figures = [figure(name, details, settings, values.get(name)) for name, details in samples]
    content = [player(settings.get("fps", "8")), element("div", {"class": "clips"}, *figures)]
    if len(samples) == 1 and settings.get("finished"):
        edit = command("python", "sample.py", "--run", folder, "--prompt", "...")
        content += [element("p", {"class": "legend"}, "No edit yet; make one with"), element("pre", {}, edit)]
    if values:
        content.append(element("p", {"class": "legend"}, f"{LEGEND}; these are by {shown(metrics.get('clip'))}."))
    return content


def player(fps):
    """The one play button and scrubber; `fps` as run.json writes it, "8" or "25/2"."""
    try:
        rate = float(Fraction(fps))
    except (TypeError, ValueError, ArithmeticError):        # a run.json edited by hand
        rate = float(frames.FOLDER_FPS)
    scrubber = {"type": "range", "min": "0", "max": "0", "step": "1", "value": "0", "aria-label": "frame"}
    return element("div", {"class": "player", "data-fps": f"{rate:.6g}"},
                   element("button", {"type": "button"}, "Play"), element("input", scrubber), element("output", {}))


def figure(name, details, settings, values):
    """The clip `name` with its prompt, its metrics, and what repeats it."""
    is_source = name == "source.mp4"
    label = {"src": address(name), "aria-label": details["prompt"]}
    if name.endswith(".mp4"):
        media = element("video", {**label, "muted": "", "playsinline": "", "preload": "auto"})
    else:
        media = element("img", {"src": address(name), "alt": details["prompt"]})
    text = [element("span", {"class": "tag"}, "source")] if is_source else []
    text.append(prompt_text(shown(settings.get("prompt", details["prompt"])) if is_source else details["prompt"]))
    if isinstance(values, dict):
        text.append(definitions("numbers", measured(values)))
    if details.get("command") or isinstance(details.get("settings"), dict):
        text.append(repeat(details))
    return element("figure", {"class": "source" if is_source else "sample"}, media, element("figcaption", {}, *text))


def measured(values):
    """The defined ones among a clip's numbers, as (name, text) pairs."""
    return [(name, number(values.get(key))) for key, name in NUMBERS.items() if number(values.get(key)) != "-"]


def repeat(details):
    """Settings and command of a sample, folded away."""
    content = [element("summary", {}, "how to repeat it")]
    if isinstance(details.get("settings"), dict):
        pairs = [(words(key), shown(value)) for key, value in details["settings"].items() if value is not None]
        content.append(definitions("settings", pairs))
    if details.get("command"):
        content.append(element("pre", {}, shown(details["command"])))
    return element("details", {}, *content)


def words(key):
    """ddim_steps -> "DDIM steps"."""
    known = {"ddim_steps": "DDIM steps", "fps": "frames a second", "lr": "learning rate"}
    return known.get(key, key.replace("_", " "))


def attention(folder):
    """The pictures that `python -m tinytav attention` made."""
    found = []
    for file in sorted(folder.glob("*.attention.png"), key=lambda file: (file.stat().st_mtime, file.name)):
        details = record(file.with_suffix(".json"))
        caption = shown(details.get("caption", file.name))
        picture = element("img", {"src": address(file.name), "alt": caption})
        link = element("a", {"href": address(file.name)}, picture)
        found.append(element("figure", {}, link, element("figcaption", {}, prompt_text(caption), repeat(details))))
    if not found:
        return []
    return [element("h2", {}, "Attention"), element("div", {"class": "pictures"}, *found)]


def loss_chart(folder, settings):
    losses = [loss for loss in read_losses(folder) if math.isfinite(loss)]
    if not losses:
        return []
    total = settings.get("steps") if isinstance(settings.get("steps"), int) else len(losses)
    total = max(total, len(losses))
    window = max(5, total // 10)
    top = nice_top(max(losses))
    labels = [element("span", {}, f"{top * part / 4:.3g}") for part in (4, 3, 2, 1, 0)]
    steps = [element("span", {}, shown(step)) for step in (1, (1 + total) // 2, total)]
    legend = element("p", {"class": "legend"}, key_of("swatch dots", "each step, at its random timestep"),
                     key_of("swatch", f"mean of the last {window} steps"))
    chart = element("div", {"class": "chart"}, element("div", {"class": "up"}, *labels),
                    drawing(losses, total, top, window), element("div", {"class": "along"}, *steps))
    return [element("h2", {}, "Loss"), legend, chart]


def key_of(style, text):
    return element("span", {"class": "key"}, element("span", {"class": style}), text)


def drawing(losses, total, top, window):
    """The chart's lines as an SVG of 1000 x 100 units, which the page stretches."""
    across = [1000 * step / max(1, total - 1) for step in range(total)]
    points = [(across[step], 100 - 100 * loss / top) for step, loss in enumerate(losses)]
    dots = " ".join(f"M{x:.1f} {y:.2f}h0" for x, y in points)
    means = [100 - 100 * mean(losses[max(0, step - window + 1):step + 1]) / top for step in range(len(losses))]
    line = "M" + " L".join(f"{x:.1f} {y:.2f}" for x, y in zip(across, means))
    grid = "".join(f"M0 {height}h1000" for height in (0, 25, 50, 75))
    label = f"loss after {len(losses)} steps: a mean of {mean(losses[-window:]):.4f} over the last {window}"
    size = {"viewBox": "0 0 1000 100", "preserveAspectRatio": "none", "role": "img", "aria-label": label}
    return element("svg", size, element("path", {"class": "grid", "d": grid}),
                   element("path", {"class": "steps", "d": dots}), element("path", {"class": "mean", "d": line}))


def mean(values):
    return sum(values) / len(values)


def nice_top(value):
    """The least of 1, 2, 4, 5, 8, 10 times a power of ten that is not below `value`: where the axis ends."""
    if value <= 0:
        return 1.
    power = 10. ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 5, 8, 10) if factor * power >= value * (1 - 1e-9))


def previews(folder):
    """What train.py --preview sampled while it tuned."""
    files = sorted((int(match[1]), file) for file in folder.glob("preview-*.gif")
                   if (match := re.fullmatch(r"preview-(\d+)\.gif", file.name)))
    if not files:
        return []
    figures = [element("figure", {}, element("img", {"src": address(file.name), "alt": f"preview after {step} steps"}),
                       element("figcaption", {}, f"after {step} steps")) for step, file in files]
    prompt = record(folder / "run.json").get("preview")
    return [element("h2", {}, "Previews"), element("p", {"class": "soft"}, prompt_text(shown(prompt))),
            element("div", {"class": "previews"}, *figures)]


def run_settings(folder, settings):
    """The run's settings, and the command that tunes as it did."""
    if not settings:
        return []
    details = {key: value for key, value in settings.items() if key not in NOT_SHOWN and value is not None}
    pairs = [(words(key), shown(value)) for key, value in details.items()]
    versions = settings.get("versions")
    if isinstance(versions, dict):
        pairs += [(f"{name} version", shown(version)) for name, version in versions.items()]
    items = [element("div", {}, element("dt", {}, key), element("dd", {}, value)) for key, value in pairs]
    return [element("section", {"class": "run"}, element("h2", {}, "Settings"),
                    element("dl", {"class": "settings"}, *items),
                    element("p", {"class": "soft"}, "The command that tunes so again:"),
                    element("pre", {}, tuning_command(folder, settings)))]


def tuning_command(folder, settings):
    """The line that repeats a run, with every setting named, so that no default can change it."""
    given = {key: settings.get(key) for key in TUNING_FLAGS} | dict(lora=lora_words(settings), out=folder.parent)
    if given["steps"] == 0:                 # a net that was tuned before: train.py takes it as it is, without the flag
        given["steps"] = None
    return command("python", "train.py", settings.get("clip"), settings.get("prompt"), *flags(given))


def lora_words(settings):
    """The run's LoRAs as words of --lora; None where there is none."""
    loras = settings.get("lora") if isinstance(settings.get("lora"), list) else []
    return [f"{lora.get('file')}:{shown(lora.get('scale'))}" for lora in loras if isinstance(lora, dict)] or None


# ---- the page of a set ---------------------------------------------------------------------------

def write_set(folder, title, results, failures, note=""):
    """Writes folder/index.html for a set of clips. Returns its path.

    results: one dict an edit, with clip, caption, kind, prompt, page and strip (paths below folder), and NUMBERS' keys.
    failures: {clip: why it has no results}.
    """
    used = [key for key in NUMBERS if any(number(row.get(key)) != "-" for row in results)]
    clips_done = list(dict.fromkeys(row["clip"] for row in results))
    content = [element("p", {"class": "kind"}, "an evaluated set"), element("h1", {}, title),
               element("p", {"class": "soft"}, f"{len(results)} edits of {len(clips_done)} clips. {note}"),
               element("p", {"class": "legend"}, f"{LEGEND}."), *failed(failures), means_table(results, used)]
    for clip in clips_done:
        content += clip_section([row for row in results if row["clip"] == clip])
    return save(Path(folder) / "index.html", title, content)


def failed(failures):
    if not failures:
        return []
    items = [element("li", {}, element("b", {}, clip), ": ", reason) for clip, reason in failures.items()]
    return [element("p", {"class": "state unfinished"}, f"without results: {len(failures)} clips"),
            element("ul", {}, *items)]


def means_table(results, used):
    """The mean of each number over all edits, and over those of each kind."""
    head = element("tr", {}, element("th", {}, "mean over"), element("th", {"class": "number"}, "edits"),
                   *(element("th", {"class": "number"}, NUMBERS[key]) for key in used))
    rows = [means_row(kind, [row for row in results if row["kind"] == kind], used, "")
            for kind in dict.fromkeys(row["kind"] for row in results)]
    rows.append(means_row("all", results, used, "mean-row"))
    return element("div", {"class": "scroll"}, element("table", {}, head, *rows))


def means_row(name, rows, used, style):
    texts = [str(len(rows)), *(number(mean_of(rows, key)) for key in used)]
    cells = [element("td", {"class": "number"}, text) for text in texts]
    return element("tr", {"class": style}, element("td", {}, name), *cells)


def mean_of(rows, key):
    """Mean of the defined numbers; nan where there is none."""
    values = [row[key] for row in rows if number(row.get(key)) != "-"]
    return mean(values) if values else math.nan


def clip_section(rows):
    """One clip: its caption, and each edit's strip, source above and edit below."""
    first = rows[0]
    figures = []
    for row in rows:
        text = [element("span", {"class": "tag"}, row["kind"]), prompt_text(row["prompt"]),
                definitions("numbers", measured(row))]
        strip = element("img", {"src": address(row["strip"]), "alt": row["prompt"], "loading": "lazy"})
        figures.append(element("figure", {}, element("a", {"href": address(first["page"])}, strip),
                               element("figcaption", {}, *text)))
    return [element("h3", {}, element("a", {"href": address(first["page"])}, first["clip"]), ": ",
                    prompt_text(first["caption"])), element("div", {"class": "pictures"}, *figures)]
