"""What people have, through the commands: LoRA, runs of the official code, each row of weights/README.md."""
import importlib
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import singles
import tiny
import torch
from hardening.warm import warm
from safetensors.torch import load_file, save_file

from tinytav import merge_lora, new_net, pipeline, tune
from tinytav.editing import encode_clip, open_run
from tinytav.errors import InputError
from tinytav.files import frames, hub
from tinytav.files.runs import Run
from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion import lora
from tinytav.stable_diffusion.checkpoint import build
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.weights import OfficialConfig, load, split

ROOT = tiny.DATA.parents[1]
CAPTION = "a man is skiing"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, KEY, TEXT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", "text_model.encoder.layers.0.mlp.fc1"


def call(cwd, script, *args, status=0):
    """Runs a script in a fork of one interpreter that has imported torch."""
    done = warm()(cwd, script, *args, limit=300)
    assert done.status == status and "Traceback" not in done.err, done.out + done.err
    return done


def write_lora(path, seed=0):
    """A small LoRA in PEFT's names: a tuned layer, a frozen one, and one of the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, out, width in ((f"unet.{QUERY}", 16, 16), (f"unet.{KEY}", 16, 16), (f"text_encoder.{TEXT}", 96, 24)):
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, 2, generator=generator)
    save_file(tensors, path)


def change_of(path, name):
    """What the LoRA in `path` adds to a layer."""
    tensors = load_file(path)
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


@pytest.fixture(scope="module")
def place(place):
    """A folder with a checkpoint, a clip, two LoRAs, a run made with the first of them, and a run made with none."""
    write_lora(place / "a.safetensors", 0), write_lora(place / "b.safetensors", 1)
    call(place, "train.py", "clip.mp4", CAPTION, "--weights", "w", "--out", "with", "--lora", "a.safetensors:0.5")
    (place / "runs").rename(place / "without")
    return place


# ---- LoRA ----------------------------------------------------------------------------------------

def test_a_run_tunes_the_merged_weights_and_records_the_lora(place):
    run = Run.open(place / "with/clip")
    mark = lora.fingerprint(place / "a.safetensors")
    assert run.settings.lora == (dict(file="a.safetensors", scale=0.5, fingerprint=mark),)
    sd = load(place / "w")
    assert run.settings.fingerprint == sd.fingerprint           # of the weights without the LoRA
    merge_lora(sd, place / "a.safetensors", 0.5)
    clip = encode_clip(sd, frames.read(place / "clip.mp4", 32, sd.multiple, 3).x, CAPTION)
    net = new_net(sd, clip.mean.shape[2])
    steps = tune(net, sd.schedule, clip.mean, clip.std, clip.context, 6, tiny.DEFAULTS["lr"])
    expected = [loss for _, loss in steps]
    losses = [float(line.split(",")[1]) for line in (run.path / "loss.csv").read_text().splitlines()[1:]]
    assert losses == pytest.approx(expected, rel=1e-4)
    query = sd.unet.get_submodule(QUERY).weight                 # six steps move no number by more than about 6 lr
    assert (run.read("tuned")[f"{QUERY}.weight"] - query).abs().max() < 0.01 < 0.5 * change_of(
        place / "a.safetensors", f"unet.{QUERY}").abs().max()


def test_sampling_adds_loras_to_the_runs_own(place):
    sample = ["sample.py", "--run", "with/clip", "--prompt", "a dog", "--out", "same"]
    done = call(place, *sample)
    assert "lora: a.safetensors, scale 0.5" in done.out and "inverting" not in done.err
    done = call(place, *sample, "--lora", "a.safetensors:0.5")
    assert "inverting" not in done.err                          # the run's own, named
    assert (place / "same/a-dog.mp4").read_bytes() == (place / "same/a-dog-2.mp4").read_bytes()
    done = call(place, *sample, "--lora", "b.safetensors")
    assert "inverting" in done.err and "lora: a.safetensors, scale 0.5\nlora: b.safetensors, scale 1" in done.out
    first, other = (frames.read(place / f"same/{name}.mp4", 32, 8, 3).x for name in ("a-dog", "a-dog-3"))
    assert (other - first).abs().mean() > 0.02


@torch.no_grad()
def test_a_further_lora_is_added_to_what_was_tuned(place):
    run, sd, base = Run.open(place / "with/clip"), load(place / "w"), load(place / "w")
    own, more = lora.Lora.from_text(f"{place}/a.safetensors:0.5"), lora.Lora.from_text(f"{place}/b.safetensors:2")
    lora.merge(sd, [own])
    net = open_run(sd, run, loras=[more]).net
    change = {name: 0.5 * change_of(own.file, name) + 2 * change_of(more.file, name)
              for name in (f"unet.{KEY}", f"text_encoder.{TEXT}")}
    tuned = run.read("tuned")[f"{QUERY}.weight"]
    expected = {net.get_submodule(QUERY): tuned + 2 * change_of(more.file, f"unet.{QUERY}"),
                net.get_submodule(KEY): base.unet.get_submodule(KEY).weight + change[f"unet.{KEY}"],
                sd.text_encoder.get_submodule(TEXT):
                    base.text_encoder.get_submodule(TEXT).weight + change[f"text_encoder.{TEXT}"]}
    for module, weight in expected.items():
        torch.testing.assert_close(module.weight, weight, atol=1e-5, rtol=1e-5)


def test_a_run_without_lora_takes_one_for_its_edits_and_so_does_the_untuned_net(place):
    done = call(place, "sample.py", "--run", "without/clip", "--prompt", "a dog", "--out", "one",
                "--lora", "b.safetensors:-1.5")
    assert "lora: b.safetensors, scale -1.5" in done.out and "inverting" in done.err
    done = call(place, "sample.py", "--weights", "w", "--prompt", "a dog", "--out", "two",
                "--lora", "a.safetensors", "b.safetensors")
    assert "a.safetensors, scale 1" in done.out and "b.safetensors, scale 1" in done.out


def test_a_page_names_the_lora_and_pictures_of_attention_have_it(place, tmp_path):
    for name in ("w", "with", "a.safetensors"):
        (shutil.copytree if (place / name).is_dir() else shutil.copy)(place / name, tmp_path / name)
    call(tmp_path, "sample.py", "--run", "with/clip", "--prompt", "a dog")
    page = (tmp_path / "with/clip/index.html").read_text()
    assert "--lora a.safetensors:0.5 --out with" in page and lora.fingerprint(place / "a.safetensors") not in page
    attention = ["tinytav/__main__.py", "attention", "with/clip", "--pixel", 1, 1]
    call(tmp_path, *attention)
    (tmp_path / "a.safetensors").unlink()
    assert "a.safetensors cannot be read" in call(tmp_path, *attention, status=2).err


def unfinished(place, name):
    """A copy of the run with the LoRA, as if it had been stopped before its first checkpoint."""
    shutil.copytree(place / "with/clip", place / name)
    settings = json.loads((place / name / "run.json").read_text()) | {"finished": 0}
    (place / name / "run.json").write_text(json.dumps(settings))
    (place / name / "tuned.safetensors").unlink(), (place / name / "inversion.safetensors").unlink()


def test_a_resumed_run_has_its_lora_again(place):
    unfinished(place, "half")
    resume = ["train.py", "--resume", "half"]
    assert "b.safetensors is no LoRA of this run" in call(place, *resume, "--lora", "b.safetensors", status=2).err
    assert "lora: a.safetensors, scale 0.5" in call(place, *resume).out
    assert (place / "half/tuned.safetensors").read_bytes() == (place / "with/clip/tuned.safetensors").read_bytes()


def test_a_lora_that_moved_is_named_anew_and_another_file_in_its_place_is_refused(place, tmp_path):
    for name in ("w", "with"):
        shutil.copytree(place / name, tmp_path / name)
    sample = ["sample.py", "--run", "with/clip", "--prompt", "a dog"]
    assert "a.safetensors cannot be read" in call(tmp_path, *sample, status=2).err
    shutil.copy(place / "a.safetensors", tmp_path / "moved.safetensors")
    assert "inverting" not in call(tmp_path, *sample, "--lora", "moved.safetensors:0.5").err
    shutil.copy(place / "b.safetensors", tmp_path / "a.safetensors")
    assert "a.safetensors is another LoRA than the run was made with" in call(tmp_path, *sample, status=2).err


@pytest.mark.parametrize("text, file, scale", [
    ("x.safetensors", "x.safetensors", 1.), ("x.safetensors:0.3", "x.safetensors", 0.3),
    ("a:b.safetensors", "a:b.safetensors", 1.), ("a:b:-2", "a:b", -2.), ("x:", "x:", 1.)])
def test_file_and_scale(tmp_path, monkeypatch, text, file, scale):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_bytes(b"")
    one = lora.Lora.from_text(text)
    assert (one.file, one.scale) == (file, scale)


@pytest.mark.parametrize("texts, message", [
    (["none.safetensors"], "none.safetensors cannot be read"), (["a.safetensors:nan"], "is not from"),
    (["a.safetensors:inf"], "is not from"), (["clip.mp4"], "clip.mp4 is not a .safetensors file"),
    (["w"], "w cannot be read"),
    (["w/vae/diffusion_pytorch_model.safetensors"], "is not a LoRA for this model")])
def test_a_lora_that_cannot_be_used_is_refused_before_anything_is_written(place, texts, message):
    done = call(place, "train.py", "clip.mp4", CAPTION, "--weights", "w", "--out", "bad", "--lora", *texts, status=2)
    assert message in done.err and not (place / "bad").exists()


@pytest.mark.parametrize("entry", [
    {}, {"file": "a.safetensors", "scale": 1.0}, {"file": 5, "scale": 1.0, "fingerprint": "x"}, "a",
    {"file": "a.safetensors", "scale": float("nan"), "fingerprint": "x"}])
def test_a_lora_in_run_json_edited_by_hand_is_refused(place, tmp_path, entry):
    shutil.copytree(place / "with/clip", tmp_path / "run")
    settings = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(settings | {"lora": [entry]}))
    with pytest.raises(InputError, match="run.json: .*(Lora|lora)"):
        Run.open(tmp_path / "run")


# ---- A VAE and learned words ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def learned(place):
    """Another VAE and two learned words in `place`, and a run made with that VAE and one of the words."""
    vae = load_file(place / "w/vae/diffusion_pytorch_model.safetensors")
    tiny.save_json(place / "vae/config.json", tiny.VAE)
    vae["quant_conv.bias"] = vae["quant_conv.bias"] + 0.1
    save_file(vae, place / "vae/diffusion_pytorch_model.safetensors")
    for seed, word in enumerate(("<cat>", "<dog>")):
        vectors = torch.randn(2, 24, generator=torch.Generator().manual_seed(seed))
        save_file({word: 3 * vectors}, place / f"{word[1:-1]}.safetensors")
    call(place, "train.py", "clip.mp4", "a <cat> is skiing", "--weights", "w", "--out", "learned", "--vae", "vae",
         "--embedding", "cat.safetensors", "--steps", 1)
    return place


def test_a_run_records_its_vae_and_words_and_sampling_uses_them(learned):
    run, plain = Run.open(learned / "learned/clip"), Run.open(learned / "without/clip")
    assert (run.settings.vae, run.settings.embedding) == ("vae", ("cat.safetensors",))
    assert not torch.equal(run.latents()[0], plain.latents()[0])
    sd = load(learned / "w", vae=learned / "vae", embedding=[learned / "cat.safetensors"])
    assert run.settings.fingerprint == sd.fingerprint != plain.settings.fingerprint
    done = call(learned, "sample.py", "--run", "learned/clip", "--prompt", "a <cat>", "--out", "learned-out")
    assert "embedding: write '<cat>' in a prompt" in done.out and "inverting" not in done.err
    page = (learned / "learned/clip/index.html").read_text()
    assert "--vae vae --embedding cat.safetensors" in page


def test_further_words_may_be_learned_for_an_edit(learned):
    """By a run that was made with words and by one that was not; a word changes the edit."""
    sample = ["sample.py", "--prompt", "a <dog>", "--out", "words"]
    call(learned, *sample, "--run", "without/clip")
    done = call(learned, *sample, "--run", "without/clip", "--embedding", "dog.safetensors")
    assert "write '<dog>'" in done.out and "inverting" not in done.err
    first, second = (frames.read(learned / f"words/{name}.mp4", 32, 8, 3).x for name in ("a-dog", "a-dog-2"))
    assert (first - second).abs().mean() > 0.02
    done = call(learned, *sample, "--run", "learned/clip", "--embedding", "dog.safetensors")
    assert "write '<cat>'" in done.out and "write '<dog>'" in done.out


def test_another_vae_or_word_than_the_runs_is_refused_and_a_word_may_move(learned, tmp_path):
    for name in ("w", "learned", "vae"):
        shutil.copytree(learned / name, tmp_path / name)
    sample = ["sample.py", "--run", "learned/clip", "--prompt", "a <cat>"]
    assert "No embedding at cat.safetensors" in call(tmp_path, *sample, status=2).err
    shutil.copy(learned / "cat.safetensors", tmp_path / "moved.safetensors")
    call(tmp_path, *sample, "--embedding", "moved.safetensors")
    assert "was made with other weights" in call(tmp_path, *sample, "--embedding", "moved.safetensors", "--vae", "w",
                                                 status=2).err
    tensors = load_file(learned / "cat.safetensors")
    save_file({name: -z for name, z in tensors.items()}, tmp_path / "cat.safetensors")
    assert "was made with other weights" in call(tmp_path, *sample, status=2).err


# ---- Runs of the official code -------------------------------------------------------------------

def official_tensors():
    """The tiny U-Net as the official code would have tuned it: every tensor filled, T-Attn's bias too."""
    return tiny.filled(VideoUNet(UNetConfig.from_json(tiny.UNET), frames=3)).state_dict()


def write_official(folder):
    """A folder as the official code writes it, pickled, and with what else lies in it."""
    tiny.write_folder(folder)
    blocks = dict(down_block_types=["CrossAttnDownBlock3D", "DownBlock3D"], mid_block_type="UNetMidBlock3DCrossAttn",
                  up_block_types=["UpBlock3D", "CrossAttnUpBlock3D"])
    config = tiny.UNET | blocks | dict(_class_name="UNet3DConditionModel")
    tiny.save_json(folder / "unet/config.json", config)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(official_tensors(), folder / "unet/diffusion_pytorch_model.bin")
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        file, = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), folder / part / f"{name}.bin")
        file.unlink()
    (folder / "inv_latents").mkdir(), (folder / "samples").mkdir()
    torch.save(torch.ones(1, 4, 3, 4, 4), folder / "inv_latents/ddim_latent-500.pt")
    (folder / "samples/sample-500.gif").write_bytes(b"GIF89a")
    return folder


@pytest.fixture(scope="module")
def official_run(tmp_path_factory):
    """A folder with the official code's run, converted to `tuned`, the clip, and what train.py makes of them."""
    place = tmp_path_factory.mktemp("official")
    write_official(place / "outputs")
    tiny.write_clip(place / "clip.mp4")
    done = call(place, "tinytav/__main__.py", "convert", "outputs", "tuned")
    assert "left out: outputs/inv_latents/ddim_latent-500.pt holds no named tensors" in done.out
    done = call(place, "train.py", "clip.mp4", CAPTION, "--weights", "tuned")
    assert "tuned was tuned by the official code and is used as it is" in done.out
    return place


def test_every_tensor_of_the_official_net_is_used_as_it_is(official_run):
    sd = load(official_run / "tuned")
    net = new_net(sd, 3)
    tensors = official_tensors()
    assert net.state_dict().keys() == tensors.keys()
    assert all(torch.equal(p, tensors[name]) for name, p in net.state_dict().items())
    assert any(name.endswith("attn_temp.to_out.0.bias") and p.abs().max() > 0 for name, p in net.state_dict().items())


def test_train_makes_no_step_and_inverts_with_the_tuned_tensors(official_run):
    run, sd = Run.open(official_run / "runs/clip"), load(official_run / "tuned")
    assert run.finished and run.settings.steps == 0 and not (run.path / "state.safetensors").exists()
    tensors = official_tensors()
    assert all(torch.equal(z, tensors[name]) for name, z in run.read("tuned").items())
    net = VideoUNet(sd.unet.cfg, 3)
    net.load_state_dict(tensors)
    mean, _ = run.latents()
    noise = pipeline.last(pipeline.invert(net, sd.schedule, mean, sd.encode_prompts([""]), run.settings.ddim_steps))
    torch.testing.assert_close(run.read("inversion")["noise"], noise, atol=1e-5, rtol=1e-5)


def test_the_official_net_is_edited_and_draws_from_noise(official_run):
    done = call(official_run, "sample.py", "--prompt", "a panda is skiing")
    assert "--steps 0" not in (official_run / "runs/clip/index.html").read_text()
    assert "inverting" not in done.err and (official_run / "runs/clip/a-panda-is-skiing.mp4").exists()
    call(official_run, "sample.py", "--weights", "tuned", "--prompt", "a dog", "--frames", 3, "--out", "noise")


def test_the_official_net_can_be_tuned_further(official_run):
    done = call(official_run, "train.py", "clip.mp4", CAPTION, "--weights", "tuned", "--steps", 2, "--out", "more")
    assert "used as it is" not in done.out
    tuned, before = Run.open(official_run / "more/clip").read("tuned"), official_tensors()
    assert all(0 < (z - before[name]).abs().max() < 0.02 for name, z in tuned.items())


def test_a_whole_official_net_gives_what_the_official_code_gives():
    """The recorded net, taken apart into image U-Net and T-Attn as a folder is, and inflated again."""
    config, _ = tiny.reference("unet-sd1")
    _, case = tiny.reference("tav-sd1")
    keys = json.loads((tiny.DATA / "tav-sd1.keys.json").read_text())
    tensors = {name: torch.from_numpy(tiny.fill.weight(name, tuple(shape))) for name, shape in keys.items()}
    image, temporal = split(tensors, "it")
    unet = build(UNet, UNetConfig.from_json(config), image, "it")
    net = new_net(SimpleNamespace(unet=unet, temporal=temporal), case["x"].shape[2])
    with torch.no_grad():
        assert tiny.close(net(case["x"], case["timestep"].expand(2), case["context"]), case["y"])


def test_t_attn_counts_in_the_fingerprint(official_run, tmp_path):
    shutil.copytree(official_run / "tuned", tmp_path / "w")
    tensors = official_tensors()
    tensors[f"{BLOCK}.attn_temp.to_k.weight"] += 1e-3
    save_file(tensors, tmp_path / "w/unet/diffusion_pytorch_model.safetensors")
    assert load(tmp_path / "w").fingerprint != load(official_run / "tuned").fingerprint


def test_only_the_official_nets_config_is_read_in_2d():
    stages = dict(block_out_channels=[32], attention_head_dim=8, down_block_types=["DownBlock3D"],
                  up_block_types=["CrossAttnUpBlock3D"], mid_block_type="UNetMidBlock3DCrossAttn")
    for name in ("UNet2DConditionModel", None):
        with pytest.raises(InputError, match="UNetMidBlock3DCrossAttn"):
            OfficialConfig.from_json(stages | dict(_class_name=name))
    config = OfficialConfig.from_json(stages | dict(_class_name="UNet3DConditionModel"))
    assert (config.down_block_types, config.up_block_types) == (("DownBlock2D",), ("CrossAttnUpBlock2D",))
    assert type(config) is UNetConfig
    with pytest.raises(InputError, match="down_block_types = .*5.* is not a list of str"):
        OfficialConfig.from_json(stages | dict(_class_name="UNet3DConditionModel", down_block_types=["DownBlock3D", 5]))


def one_nan(*shape):
    """Zeros, of which one is NaN."""
    z = torch.zeros(shape)
    z[0, 1] = float("nan")
    return z


@pytest.mark.parametrize("change, message", [
    (lambda z: {k: v for k, v in z.items() if k != f"{BLOCK}.norm_temp.bias"}, "missing: .*norm_temp.bias"),
    (lambda z: z | {"conv_temp.weight": torch.zeros(1)}, "unexpected: conv_temp.weight"),
    (lambda z: z | {f"{BLOCK}.attn_temp.to_k.weight": torch.zeros(16, 17)}, r"to_k.weight has the shape \(16, 17\)"),
    (lambda z: z | {f"{BLOCK}.attn_temp.to_k.weight": torch.zeros(16, 16) / 0}, "to_k.weight holds NaN"),
    (lambda z: z | {f"{BLOCK}.attn_temp.to_k.weight": one_nan(16, 16)}, "to_k.weight holds NaN")])
def test_temporal_tensors_that_are_not_t_attns_are_refused(official_run, tmp_path, change, message):
    shutil.copytree(official_run / "tuned", tmp_path / "w")
    file = tmp_path / "w/unet/diffusion_pytorch_model.safetensors"
    save_file({name: z.contiguous() for name, z in change(official_tensors()).items()}, file)
    with pytest.raises(InputError, match=f"w/unet is not a net that the official .*{message}"):
        load(tmp_path / "w")


# ---- The table of weights/README.md --------------------------------------------------------------

def rows():
    """The first table: [(what you have, its commands)]."""
    lines = (ROOT / "weights/README.md").read_text().split("|---|---|")[1].strip().splitlines()
    for line in lines:
        if not line.startswith("|"):
            return
        _, have, types, _ = line.split("|")
        yield have.strip(), [shlex.split(command) for command in re.findall("`(python .+?)`", types)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with everything that the table names, small."""
    place = tmp_path_factory.mktemp("table")
    tiny.write_folder(place / "weights/sd15")
    shutil.copytree(tiny.DATA / "tokenizer", place / "tokenizer")
    tiny.write_clip(place / "clip.mp4", size=(64, 48))
    save_file(singles.single1(), place / "model.safetensors")
    save_file(singles.single2(), place / "model2.safetensors")
    torch.save({"state_dict": load_file(place / "model.safetensors"), "global_step": 5}, place / "dreambooth.ckpt")
    write_official(place / "outputs/man-skiing")
    write_official(place / "weights/old")
    shutil.copytree(place / "weights/sd15/unet", place / "weights/old/unet", dirs_exist_ok=True)
    torch.save(load_file(place / "weights/old/unet/diffusion_pytorch_model.safetensors"),
               place / "weights/old/unet/diffusion_pytorch_model.bin")
    (place / "weights/old/unet/diffusion_pytorch_model.safetensors").unlink()
    save_file({name: z for name, z in singles.single1().items() if name.startswith("first_stage_model.")},
              place / "vae.safetensors")
    save_file({"<cat-toy>": torch.ones(2, 24)}, place / "cat.safetensors")
    write_lora(place / "style.safetensors", 2), write_lora(place / "face.safetensors", 3)
    torch.save(load_file(place / "style.safetensors"), place / "old.pt")
    call(place, "train.py", "clip.mp4", CAPTION, "--weights", "weights/sd15")
    return place


@pytest.mark.parametrize("have, commands", list(rows()), ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_each_row_of_the_table_works_as_it_is_printed(table, monkeypatch, have, commands):
    monkeypatch.chdir(table)
    singles.make_small(monkeypatch)
    assert commands
    for _, *argv in commands:
        script = "tinytav.__main__" if argv[0] == "-m" else argv[0].removesuffix(".py")
        argv = argv[1:] if argv[0] == "-m" else argv
        if script == "train" and "--tokenizer" in argv:         # a single file has no defaults.json
            argv = [*argv, "--frames", "2", "--steps", "1", "--size", "32"]
        monkeypatch.setattr(sys, "argv", argv)
        assert importlib.import_module(script).main() == 0


def test_the_table_has_all_that_people_have():
    text = " ".join(have for have, _ in rows())
    for word in ("model_index.json", "civitai", "2.x", ".ckpt", ".bin", "LoRA", "VAE", "learned word", "official"):
        assert word in text


def test_the_one_command_names_what_hub_fetches():
    """It is not run: it would download gigabytes."""
    command, = re.findall(r"python train.py .* --weights (hub:\S+)", (ROOT / "weights/README.md").read_text())
    assert hub.is_name(command) and command.count("/") == 1
