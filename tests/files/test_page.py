"""A run's page: what it shows, that no text becomes markup, and in a real browser that its videos play in step."""
import json
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import tiny
import torch

import train
from tinytav.files import frames, page, records
from tinytav.files.atomic import replace_text
from tinytav.files.runs import Run, Settings

SETTINGS = dict(clip="clip.mp4", prompt="a man is skiing", weights="w", fingerprint="0", frames=8, fps="8", size=64,
                norm="clip", attention="sparse-causal", steps=20, lr=3e-4, seed=33, ddim_steps=2, guidance=2.,
                precision="fp32", finished=1e9)
HOSTILE = ["</script><script>document.title = 'taken'</script>", "\"><img src=x onerror=\"document.title = 'taken'\">",
           "' autofocus onfocus=alert(1) '", "<!--page--><!--title-->", "&lt;b&gt; &amp; <b>bold</b>",
           "two\nlines \u202e turned", "W" * 300, "日本語", ""]
NESTED = "[" * 900 + "]" * 900


def make_run(folder, prompts=(), count=8, losses=20, **changes):
    """A run's folder with small videos, a record for each prompt, and a loss."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, None)
    replace_text(folder / "run.json", json.dumps(SETTINGS | changes))
    run.write_losses([1 / step for step in range(1, losses + 1)])
    x = torch.linspace(-1, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 32, 48)
    frames.write_mp4(folder / "source.mp4", x, fps=8)
    for number, prompt in enumerate(prompts):
        frames.write_mp4(folder / f"sample{number}.mp4", -x, fps=8, title=prompt)
        line = records.call("python sample.py", [], dict(prompt=prompt))
        records.write_record(folder, f"sample{number}", prompt, dict(guidance=2.0, seed=33), line)
        os.utime(folder / f"sample{number}.mp4", (number, number))
    return folder


class Elements(HTMLParser):
    """The elements of a page, as [(tag, attributes)], and its text."""

    def __init__(self, path):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_the_source_comes_first_then_the_samples_with_prompts_and_commands(tmp_path):
    folder = make_run(tmp_path / "runs/clip", ["a panda is skiing", "a \"fox\" isn't skiing"])
    frames.write_strip(folder / "sample0.png", torch.zeros(1, 3, 32, 32))
    shown = Elements(page.write(folder))
    assert [video["src"] for video in shown.all("video")] == ["source.mp4", "sample0.mp4", "sample1.mp4"]
    assert not shown.all("img")                                             # a sample's strip is no sample
    for text in ("a man is skiing", "clip.mp4", "a panda is skiing", "a \"fox\" isn't skiing", "finished",
                 "python sample.py --prompt 'a panda is skiing'", "mean over 5 steps", "--lr 0.0003"):
        assert text in shown.text, text
    line = "python train.py clip.mp4 'a man is skiing' --weights w --size 64 --frames 8 --window 8 --start 0 --steps 20"
    assert line in shown.text
    assert "all pairs" not in shown.text


def test_samples_stand_in_the_order_in_which_they_were_made_whatever_their_names(tmp_path):
    folder = make_run(tmp_path / "run", ["a zebra", "a yak", "an ape"])
    for name, when in (("sample0", 20), ("sample1", 30), ("sample2", 10)):
        os.utime(folder / f"{name}.mp4", (when, when))
    shown = Elements(page.write(folder))
    assert [video["src"] for video in shown.all("video")] == ["source.mp4", "sample2.mp4", "sample0.mp4", "sample1.mp4"]
    assert shown.text.index("an ape") < shown.text.index("a zebra") < shown.text.index("a yak")
    for name, when in (("b", 1), ("a", 2)):
        (folder / f"{name}.attention.png").write_bytes(b"")
        os.utime(folder / f"{name}.attention.png", (when, when))
    told = dict(caption="Where it looks.", command="python -m tinytav attention run")
    tiny.save_json(folder / "a.attention.json", told)
    shown = Elements(page.write(folder))
    assert "Where it looks." in shown.text and "python -m tinytav attention run" in shown.text
    assert [picture["src"] for picture in shown.all("img")] == ["b.attention.png", "a.attention.png"]


def test_metrics_are_shown_once_they_are_there_and_only_defined_ones(tmp_path):
    folder = make_run(tmp_path / "run", ["a panda"])
    values = dict(consistency_all_pairs=97.125, consistency_neighbours=None, textual_alignment=float("nan"), psnr="<b>")
    tiny.save_json(folder / "metrics.json", dict(clip="some/clip", values={"sample0.mp4": values}))
    shown = Elements(page.write(folder))
    assert "97.12" in shown.text and "some/clip" in shown.text
    assert "PSNR" not in shown.text and shown.text.count("neighbours") == 1


def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path):
    folder = make_run(tmp_path / "run", losses=7, finished=0, preview="a dog")
    for step in (5, 10):
        (folder / f"preview-{step}.gif").write_bytes(b"GIF89a")
    shown = Elements(page.write(folder))
    assert "unfinished: 7 of 20 steps" in shown.text and f"python train.py --resume {folder}" in shown.text
    assert [picture["src"] for picture in shown.all("img")] == ["preview-5.gif", "preview-10.gif"]
    assert "after 5 steps" in shown.text and "a dog" in shown.text


def test_the_chart_draws_means_of_steps_that_follow_each_other(tmp_path):
    path = page.write(make_run(tmp_path / "run", losses=60, steps=100))
    shown = Elements(path)
    *_, line = (path["d"] for path in shown.all("path"))
    means = [sum(1 / step for step in range(first, first + 5)) / 5 for first in range(1, 61, 5)]
    heights = [float(point.split()[1]) for point in line.removeprefix("M").split(" L")]
    assert heights == pytest.approx([100 - 100 * mean / means[0] for mean in means], abs=0.01)
    assert line.startswith("M0.0 0.00 L50.0 ") and " L550.0 " in line       # of 1000, where 100 steps end
    assert "Each point is a mean over 5 steps." in shown.text and f"{means[0]:.3g}" in shown.text


def test_a_long_runs_chart_has_few_points(tmp_path):
    path = page.write(make_run(tmp_path / "run", losses=2501, steps=1_000_000))
    assert path.stat().st_size < 50_000 and "mean over 40000 steps" in Elements(path).text


def hostile(folder):
    """A run whose texts and names try to become markup, with files that are broken."""
    make_run(folder, HOSTILE, clip=HOSTILE[0], prompt=HOSTILE[1])
    tiny.save_json(folder / "metrics.json", dict(clip=HOSTILE[1], values={"sample0.mp4": dict(psnr=HOSTILE[0])}))
    for name in ('"onerror=alert(1) x.mp4', "a?b#c%41.mp4", "<script>.mp4"):
        (folder / name).write_bytes((folder / "sample0.mp4").read_bytes())
    Path(os.fsdecode(os.fsencode(folder) + b"/raw\xff.mp4")).write_bytes(b"no video")
    (folder / "list.sample.json").write_text("[1, 2")
    tiny.save_json(folder / "x.attention.json", dict(caption=HOSTILE[0], command=HOSTILE[1]))
    (folder / "x.attention.png").write_bytes(b"no picture")
    return page.write(folder)


def test_no_text_and_no_name_becomes_markup(tmp_path):
    shown = Elements(hostile(tmp_path / "run"))
    assert len(shown.all("script")) == len(shown.all("style")) == len(shown.all("title")) == 1
    assert not any(name.startswith("on") or name == "autofocus" for _, attributes in shown.found for name in attributes)
    assert {tag for tag, _ in shown.found}.isdisjoint({"iframe", "object", "embed", "form"})
    for text in HOSTILE:
        assert text in shown.text
    assert [video["src"] for video in shown.all("video") if "41" in video["src"]] == ["a%3Fb%23c%2541.mp4"]
    assert [video["src"] for video in shown.all("video") if "raw" in video["src"]] == ["raw%FF.mp4"]


def test_a_page_names_no_other_place_than_its_folder(tmp_path):
    shown = Elements(hostile(tmp_path / "run"))
    links = [value for _, attributes in shown.found for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(re.fullmatch(r"[^/:]+", link) for link in links)
    assert "http" not in page.TEMPLATE.read_text() and "import(" not in page.TEMPLATE.read_text()


def test_a_set_shows_means_of_kinds_and_what_failed(tmp_path):
    same = dict(clip="c<1>.mp4", caption="a man", prompt=HOSTILE[0], page="c1/index.html", strip="c1/x y.png")
    rows = [dict(same, kind=kind, consistency_all_pairs=value)
            for kind, value in (("style", 90.), ("style", 92.), ("all", 70.))]
    shown = Elements(page.write_set(tmp_path, "a set", "By x.", rows, {"broken.mp4": "it is <broken>"}))
    assert "mean overeditsall pairsstyle291.00all170.00all384.00" in shown.text
    assert "3 edits of 1 clip. By x." in shown.text and "without results: 1 clipbroken.mp4" in shown.text
    assert "broken.mp4: it is <broken>" in shown.text and shown.all("img")[0]["src"] == "c1/x%20y.png"
    assert "0 edits of 0 clips" in Elements(page.write_set(tmp_path, "a set", "", [], {})).text


def test_an_index_that_this_project_did_not_write_stays_and_the_page_takes_another_name(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "index.html").write_text("<p>my own</p>")
    (folder / "index-2.html").symlink_to("nowhere")
    for _ in range(2):
        assert page.write(folder) == folder / "index-3.html"
    assert "a man is skiing" in (folder / "index-3.html").read_text()
    assert (folder / "index.html").read_text() == "<p>my own</p>" and (folder / "index-2.html").is_symlink()


def test_a_page_of_this_project_is_replaced(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "index.html").write_text(f"<title>{'W' * 2000}</title>{page.MARK} the title")
    assert page.write(folder) == folder / "index.html" and "a man is skiing" in (folder / "index.html").read_text()


def test_a_folder_of_samples_without_a_run_has_a_page_too(tmp_path):
    frames.write_mp4(tmp_path / "a-dog.mp4", torch.zeros(2, 3, 32, 32), fps=8)
    frames.write_strip(tmp_path / "a-cat.png", torch.zeros(1, 3, 32, 32))
    tiny.save_json(tmp_path / "a-cat.sample.json", dict(prompt="a cat"))
    shown = Elements(page.write(tmp_path))
    assert "a-dog" in shown.text and [picture["src"] for picture in shown.all("img")] == ["a-cat.png"]


@pytest.mark.parametrize("changes", [
    dict(fps="abc"), dict(fps="0/0"), dict(fps="1e999999999"), dict(finished="yes"), dict(finished=1e300),
    dict(finished=10 ** 400), dict(finished=-1), dict(steps=None), dict(steps=10 ** 400), dict(versions=3),
    dict(prompt=["a"], clip=None), dict(lora=[{"file": {}}, 3]), dict(size=10 ** 400)])
def test_with_a_run_json_that_is_no_runs_the_page_shows_the_samples_alone(tmp_path, changes):
    text = Elements(page.write(make_run(tmp_path / "run", ["a panda"], **changes))).text
    assert "a panda" in text and "0.0003" not in text


@pytest.mark.parametrize("name, content", [
    ("loss.csv", b"step,loss\n1,0.5\n2,\xff\n"), ("loss.csv", "step,loss\n1,1e999\n2,nan\n"),
    ("loss.csv", "step,loss\n1,1e-320\n"), ("loss.csv", 'step,loss\n1,"' + "9" * 200_000), ("metrics.json", NESTED),
    ("metrics.json", f'{{"values": {{"source.mp4": {{"psnr": 1{"0" * 400}}}}}}}'),
    ("metrics.json", f'{{"values": {{"source.mp4": {{"psnr": {NESTED}}}}}, "clip": {NESTED}}}'),
    ("sample0.sample.json", f'{{"prompt": "a panda", "settings": {{"x": {NESTED}}}, "command": {NESTED}}}'),
    ("sample0.sample.json", '{"settings": {"x": ' + "[" * 100_000),
    ("run.json", f'{{"size": {NESTED}, "clip": {NESTED}, "lora": [{NESTED}, {{"file": "a", "scale": {NESTED}}}]}}')])
def test_a_broken_file_of_a_folder_costs_the_page_no_more_than_what_it_tells(tmp_path, name, content):
    folder = make_run(tmp_path / "run", ["a panda"])
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shown = Elements(page.write(folder))
    assert [video["src"] for video in shown.all("video")] == ["source.mp4", "sample0.mp4"]
    assert ("sample0" if name == "sample0.sample.json" and "prompt" not in content else "a panda") in shown.text


def test_what_is_no_file_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "run", ["a panda"])
    for name in ("x.mp4", "x.attention.png", "y.sample.json"):
        (folder / name).symlink_to("nowhere")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "metrics.json")
    shown = Elements(page.write(folder))
    assert [video["src"] for video in shown.all("video")] == ["source.mp4", "sample0.mp4"] and not shown.all("img")


@pytest.mark.parametrize("values, line", [
    (dict(steps=3, seed=None, no_inversion=True, chosen=False), "--steps 3 --no-inversion"),
    (dict(prompt="it's \"x\""), """--prompt 'it'"'"'s "x"'"""), (dict(lora=["a", 0.5]), "--lora a 0.5"),
    (dict(prompt="-5 degrees"), "'--prompt=-5 degrees'"),
    (dict(lora=["-a", "b"], out=Path("-o")), "--lora=-a --lora=b --out=-o")])
def test_flags_are_a_line_that_the_shell_reads_back(values, line):
    assert records.call("it", [], values) == f"it {line}"


def test_lines_with_words_that_begin_with_a_dash_or_that_a_shell_would_run_are_read_back(tmp_path, monkeypatch):
    given = dict(clip="-clip.mp4", prompt="--steps; touch x #", weights="w; touch x #.ckpt", preview="-p")
    line = records.tuning_command(tmp_path / "-runs/run", Settings.from_json(SETTINGS | given | dict(
        lora=[dict(file="-l", scale=-1.5, fingerprint="0")])))
    monkeypatch.setattr("sys.argv", shlex.split(line)[1:])
    args = train.arguments()
    assert {name: getattr(args, name) for name in given} == given and args.norm == "clip"
    assert args.lora == ["-l:-1.5"] and args.steps == 20 and args.out == str(tmp_path / "-runs")
    monkeypatch.chdir(tmp_path)
    shown = Elements(page.write(make_run(Path("-runs/run"), finished=0)))
    assert "python train.py --resume=-runs/run" in shown.text


# ---- in a real browser ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not browser.PROGRAM:
        pytest.skip("chromium is not installed")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


TIMES = "[...document.querySelectorAll('video')].map(video => video.currentTime)"
BUTTON = "document.querySelector('.player button').textContent"


def requests(chromium):
    """The addresses that the page asked for."""
    return [event["params"]["request"]["url"] for event in chromium.events
            if event.get("method") == "Network.requestWillBeSent"]


def test_the_videos_play_in_step_by_one_button_and_one_scrubber(chromium, tmp_path):
    chromium.open(page.write(make_run(tmp_path / "run", ["a panda", "a fox"])), motion="reduce")
    chromium.wait("[...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
    assert chromium.value(BUTTON) == "Play" and chromium.value(TIMES) == [0, 0, 0]
    chromium.click(".player button")
    chromium.wait(f"{BUTTON} === 'Pause' && {TIMES}.every(time => time > 0.2)")
    chromium.wait(f"{TIMES}.every(time => time < 0.2)")                      # a new round
    chromium.click(".player button")
    chromium.wait("[...document.querySelectorAll('video')].every(video => video.paused)")
    times = chromium.value(TIMES)
    assert chromium.value(BUTTON) == "Play" and max(times) - min(times) <= 1 / 8
    chromium.value("(() => { const s = document.querySelector('.player input'); s.value = 5;"
                   "s.dispatchEvent(new Event('input')) })()")
    chromium.wait(f"{TIMES}.every(time => Math.abs(time - 5.5 / 8) < 0.01)")
    assert chromium.value("document.querySelector('.player output').textContent") == "frame 6 of 8"


def test_a_shorter_video_waits_and_a_broken_one_stops_no_other(chromium, tmp_path):
    folder = make_run(tmp_path / "run", ["a panda"])
    frames.write_mp4(folder / "short.mp4", torch.zeros(3, 3, 32, 48), fps=8)
    (folder / "broken.mp4").write_bytes(b"no video")
    chromium.open(page.write(folder))
    chromium.wait(f"{BUTTON} === 'Pause' && {TIMES}.some(time => time > 0.5)")
    chromium.wait(f"{TIMES}.every(time => time < 0.3)")
    assert chromium.value("document.querySelector('.player output').textContent").endswith("of 8")


def test_pictures_alone_have_no_player(chromium, tmp_path):
    frames.write_strip(tmp_path / "a-cat.png", torch.zeros(1, 3, 32, 32))
    tiny.save_json(tmp_path / "a-cat.sample.json", dict(prompt="a cat"))
    chromium.open(page.write(tmp_path))
    chromium.wait("document.querySelector('img').complete")
    assert chromium.value("document.querySelector('button')") is None


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_texts_run_nothing_load_nothing_and_fit_the_window(chromium, tmp_path, width, scheme):
    path = hostile(tmp_path / "run")
    chromium.open(path, width=width, scheme=scheme)
    chromium.wait("document.querySelector('video').readyState >= 2")
    assert chromium.value("document.title") == HOSTILE[1]
    assert chromium.value("document.documentElement.scrollWidth") <= width
    asked = requests(chromium)
    assert asked and all(address.startswith(path.parent.as_uri()) for address in asked)
    dark = chromium.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part < 60)")
    assert dark == (scheme == "dark")
    failed = [event for event in chromium.events if event.get("method") == "Runtime.exceptionThrown"]
    assert not failed
