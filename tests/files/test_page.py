"""A run's page: what it shows, that no text becomes markup, and in a real browser that its videos play in step."""
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import tiny
import torch

from tinytav.files import frames, page
from tinytav.files.atomic import replace_text
from tinytav.files.runs import Run

SETTINGS = dict(clip="clip.mp4", prompt="a man is skiing", weights="w", fingerprint="0", frames=8, fps="8", size=64, norm="clip",
                attention="sparse-causal", steps=20, lr=3e-4, seed=33, ddim_steps=2, guidance=2., precision="fp32", finished=1e9)
HOSTILE = ["</script><script>document.title = 'taken'</script>", "\"><img src=x onerror=\"document.title = 'taken'\">",
           "' autofocus onfocus=alert(1) '", "<!--page--><!--title-->", "&lt;b&gt; &amp; <b>bold</b>", "two\nlines \u202e turned",
           "W" * 300, "日本語", ""]


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
        told = dict(prompt=prompt, settings=dict(guidance=2.0, seed=33), command=page.command("python", "sample.py", "--prompt", prompt))
        tiny.save_json(folder / f"sample{number}.sample.json", told)
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


def test_the_source_comes_first_then_the_samples_with_prompts_settings_and_commands(tmp_path):
    folder = make_run(tmp_path / "runs/clip", ["a panda is skiing", "a \"fox\" isn't skiing"])
    shown = Elements(page.write(folder))
    assert [video["src"] for video in shown.all("video")] == ["source.mp4", "sample0.mp4", "sample1.mp4"]
    for text in ("a man is skiing", "clip.mp4", "a panda is skiing", "a \"fox\" isn't skiing", "finished", "guidance",
                 "python sample.py --prompt 'a panda is skiing'", "of the last 5 steps", "0.0003"):
        assert text in shown.text, text
    assert "python train.py clip.mp4 'a man is skiing' --weights w --size 64 --frames 8 --steps 20 --lr 0.0003" in shown.text
    assert "all pairs" not in shown.text


def test_metrics_are_shown_once_they_are_there_and_only_defined_ones(tmp_path):
    folder = make_run(tmp_path / "run", ["a panda"])
    values = dict(consistency_all_pairs=97.125, consistency_neighbours=None, textual_alignment=float("nan"), psnr="<b>")
    tiny.save_json(folder / "metrics.json", dict(clip="some/clip", values={"sample0.mp4": values}))
    shown = Elements(page.write(folder))
    assert "97.12" in shown.text and "some/clip" in shown.text and "PSNR" not in shown.text and shown.text.count("neighbours") == 1


def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(tmp_path):
    folder = make_run(tmp_path / "run", losses=7, finished=0, preview="a dog")
    (folder / "preview-5.gif").write_bytes(b"GIF89a")
    shown = Elements(page.write(folder))
    assert "unfinished: 7 of 20 steps" in shown.text and f"python train.py --resume {folder}" in shown.text
    assert [picture["src"] for picture in shown.all("img")] == ["preview-5.gif"] and "a dog" in shown.text


def test_the_chart_draws_each_step_and_its_running_mean(tmp_path):
    folder = make_run(tmp_path / "run", losses=20)
    *_, dots, line = (path["d"] for path in Elements(page.write(folder)).all("path"))
    assert len(re.findall("h0", dots)) == 20 and dots.startswith("M0.0 0.00h0") and dots.endswith("M1000.0 95.00h0")
    last = sum(1 / step for step in range(16, 21)) / 5
    assert line.endswith(f"1000.0 {100 - 100 * last:.2f}")


@pytest.mark.parametrize("value, top", [(0.9, 1), (1.0, 1), (0.31, 0.4), (3, 4), (4.1, 5), (6, 8), (900, 1000), (0, 1)])
def test_the_axis_ends_at_a_round_number(value, top):
    assert page.nice_top(value) == pytest.approx(top)


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
    rows = [dict(clip="c<1>.mp4", caption="a man", kind=kind, prompt=HOSTILE[0], page="c1/index.html", strip="c1/x y.png",
                 consistency_all_pairs=value) for kind, value in (("style", 90.), ("style", 92.), ("object", 70.))]
    shown = Elements(page.write_set(tmp_path, "a set", rows, {"broken.mp4": "it is <broken>"}))
    assert "91.00" in shown.text and "70.00" in shown.text and "84.00" in shown.text and "neighbours" not in shown.text.split("cosine")[-1]
    assert "broken.mp4: it is <broken>" in shown.text and shown.all("img")[0]["src"] == "c1/x%20y.png"
    assert "0 edits of 0 clips" in Elements(page.write_set(tmp_path, "a set", [], {})).text


def test_a_folder_of_samples_without_a_run_has_a_page_too(tmp_path):
    frames.write_mp4(tmp_path / "a-dog.mp4", torch.zeros(2, 3, 32, 32), fps=8, title="a dog")
    frames.write_strip(tmp_path / "a-cat.png", torch.zeros(1, 3, 32, 32))
    tiny.save_json(tmp_path / "a-cat.sample.json", dict(prompt="a cat"))
    shown = Elements(page.write(tmp_path))
    assert "a dog" in shown.text and [picture["src"] for picture in shown.all("img")] == ["a-cat.png"]


@pytest.mark.parametrize("changes", [dict(fps="abc"), dict(fps="0/0"), dict(finished="yes"), dict(steps=None), dict(versions=3),
                                     dict(prompt=["a"], clip=None)])
def test_a_run_json_edited_by_hand_is_shown_as_far_as_it_can_be(tmp_path, changes):
    assert "0.0003" in Elements(page.write(make_run(tmp_path / "run", **changes))).text


@pytest.mark.parametrize("values, line", [
    (dict(steps=3, seed=None, no_inversion=True, chosen=False), "--steps 3 --no-inversion"),
    (dict(prompt="it's \"x\""), """--prompt 'it'"'"'s "x"'"""), (dict(lora=["a.safetensors", 0.5]), "--lora a.safetensors 0.5")])
def test_flags_are_a_line_that_the_shell_reads_back(values, line):
    assert page.command(*page.flags(values)) == line


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
    return [event["params"]["request"]["url"] for event in chromium.events if event.get("method") == "Network.requestWillBeSent"]


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
    chromium.value("(() => { const s = document.querySelector('.player input'); s.value = 5; s.dispatchEvent(new Event('input')) })()")
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
