"""Pre-training: CLIP's tokenizer from captions, a stage that is killed and goes on, and the folder that is written."""
import json
import shutil
import subprocess
import sys
import time
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import filled

import tinytav
from tinytav.stable_diffusion.checkpoint import build, read_component
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.controlnet import ControlNet, ControlNetConfig, check_fits, load_controlnet
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.toy import pretrain, skeleton, training, world


def stage(name, out, minutes, *more):
    return [name, "--minutes", str(minutes), "--pictures", "32", "--batch", "4", "--device", "cpu", "--out", str(out),
            "--work", str(out / "work"), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts of a Stable Diffusion, each trained for a moment."""
    out = tmp_path_factory.mktemp("toy")
    for name in ("clip", "vae", "unet"):
        pretrain.main(stage(name, out, 0.005))
    return out


def test_the_controlnets_loss_counts_more_around_the_stick_figure():
    hints = torch.zeros(1, 3, 32, 32)
    hints[0, 1, 9, 17] = 0.5                    # in latent (2, 4) of 8x8
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 1:4, 3:6] = 1
    assert torch.equal(pretrain.around(hints, (8, 8)), expected)


def test_every_word_of_a_caption_is_one_token_and_comes_back(folder):
    tokenizer, rng = Tokenizer.from_folder(folder / "tokenizer"), Random(1)
    for caption in (world.caption(world.random_scene(rng, held_out=i % 2 == 1), rng) for i in range(300)):
        row = tokenizer([caption])[0].tolist()
        length = row.index(tokenizer.end)
        words = [tokenizer.bpe.id_to_token(i) for i in row[1:length]]
        assert words == [word + "</w>" for word in caption.replace(",", " ,").split()]
        assert row[0] == tokenizer.begin and row[length:] == [tokenizer.end] * (pretrain.LENGTH - length)


def test_vocabulary_is_laid_out_as_clips(folder):
    tokens = list(json.loads((folder / "tokenizer/vocab.json").read_text(encoding="utf-8")).items())
    merges = (folder / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    assert [i for _, i in tokens] == list(range(len(tokens)))
    names = [token for token, _ in tokens]
    assert all(len(token) == 1 for token in names[:256])
    assert names[256:512] == [token + "</w>" for token in names[:256]]
    assert merges[0] == "#version: 0.2" and names[512] == merges[1].replace(" ", "")
    assert names[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_the_folder_is_a_stable_diffusion(folder):
    sd = tinytav.load(folder)       # reads every config and fits every tensor strictly
    assert sd.schedule.prediction_type == "epsilon" and sd.vae.cfg.scaling_factor != 1
    context = sd.encode_prompts(["a fox", ""])
    assert context.shape == (2, pretrain.LENGTH, sd.unet.cfg.cross_attention_dim)
    with torch.no_grad():
        latents = sd.unet(torch.randn(2, 4, 16, 16), torch.tensor([1, 981]), context)
        assert sd.vae.decode(latents).shape == (2, 3, pretrain.SIZE, pretrain.SIZE)
    assert (folder / "unet" / pretrain.WEIGHTS).stat().st_size < 16 * 2 ** 20
    assert not list((folder / "work").iterdir())        # finished stages leave no checkpoint


def test_the_clip_holds_the_same_text_encoder(folder):
    clip = build(CLIP, *read_component(folder / "clip", CLIPConfig))
    encoder = tinytav.load(folder).text_encoder
    ids = Tokenizer.from_folder(folder / "clip")(["a woman on the moon at night"])
    assert torch.equal(clip.text_model(ids), encoder(ids))
    assert clip.cfg.text_config.eos_token_id == encoder.cfg.eos_token_id == ids[0, -1]


def test_the_controlnet_fits_the_unet_and_is_trained(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    unet = filled(UNet(UNetConfig.from_json(pretrain.UNET_JSON)))          # one whose every layer passes gradients on
    pretrain.write(tmp_path / "unet" / pretrain.WEIGHTS, pretrain.UNET_JSON, unet.state_dict())
    pretrain.main(stage("control", tmp_path, 0.05))
    sd, control = tinytav.load(tmp_path), load_controlnet(tmp_path / "controlnet")
    check_fits(control.cfg, sd.unet.cfg, sd.vae.cfg.factor)
    assert (tmp_path / "controlnet" / pretrain.WEIGHTS).stat().st_size < 8 * 2 ** 20
    with torch.no_grad():
        context, hint = sd.encode_prompts(["a fox"]), torch.zeros(1, 3, pretrain.SIZE, pretrain.SIZE)
        residuals = control(torch.randn(1, 4, 16, 16), torch.tensor([981]), context, hint)
    assert all(residual.abs().max() > 0 for residual in residuals)


@torch.no_grad()
def test_before_training_a_controlnet_changes_nothing(folder):
    sd, control = tinytav.load(folder), ControlNet(ControlNetConfig.from_json(pretrain.CONTROL_JSON))
    pretrain.begin_as_unet(control, sd.unet)
    assert torch.equal(control.mid_block.resnets[0].conv1.weight, sd.unet.mid_block.resnets[0].conv1.weight)
    x, t, context = torch.randn(1, 4, 16, 16), torch.tensor([981]), sd.encode_prompts(["a fox"])
    residuals = control(x, t, context, torch.rand(1, 3, pretrain.SIZE, pretrain.SIZE))
    assert torch.equal(sd.unet(x, t, context, residuals), sd.unet(x, t, context))


@torch.no_grad()
def test_before_training_a_stick_figure_already_reaches_the_controlnet(folder):
    sd, control = tinytav.load(folder), ControlNet(ControlNetConfig.from_json(pretrain.CONTROL_JSON))
    pretrain.begin_as_unet(control, sd.unet)
    scene, view = pretrain.imagine("a seed")
    figure = skeleton.hint(skeleton.skeleton(scene.activity, view, pretrain.SIZE)[None])
    difference = control.embed_hint(figure) - control.embed_hint(torch.zeros_like(figure))
    assert difference.std() > 0.01          # conv_in's output is about 1, and torch's own start gives 0.0001


def test_more_training_starts_from_the_finished_weights(folder, tmp_path):
    pretrain.main(stage("vae", tmp_path, 1e-9, "--from", str(folder)))       # no time for a change worth the name
    before, after = (load_file(out / "vae" / pretrain.WEIGHTS) for out in (folder, tmp_path))
    assert all(torch.allclose(before[name], after[name], atol=2e-3) for name in before)


def test_the_decoder_trains_alone(folder, tmp_path):
    pretrain.main(stage("vae", tmp_path, 0.1, "--keep-encoder", "--from", str(folder)))
    before, after = (load_file(out / "vae" / pretrain.WEIGHTS) for out in (folder, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith(("encoder.", "quant_conv.")) for name in moved)
    assert (folder / "vae/config.json").read_text() == (tmp_path / "vae/config.json").read_text()


def test_the_vaes_loss_counts_large_errors_and_lost_edges_more():
    x = torch.zeros(1, 3, 4, 4)
    assert pretrain.difference(x, x + 0.5, squared=3) == pytest.approx(0.5 + 3 * 0.25)             # the same everywhere: no edge is lost
    striped = x.clone()
    striped[:, :, ::2] = 1                                                              # every second row
    assert pretrain.difference(x, striped, squared=3) == pytest.approx(0.5 + 3 * 0.5 + 0.5)


def test_threads_that_cannot_share_a_batch_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["vae", "--minutes", "1", "--threads", "8", "--out", str(tmp_path)])
    assert "--threads 8 cannot share a batch of 4 equally" in capsys.readouterr().err


def test_a_killed_stage_goes_on(tmp_path, capsys):
    command, checkpoint = stage("vae", tmp_path, 0.05), tmp_path / "work/vae.safetensors"
    process = subprocess.Popen([sys.executable, "-m", "tinytav.toy.pretrain", *command], stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not checkpoint.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not (tmp_path / "vae").exists()
    with safe_open(checkpoint, "pt") as file:
        steps = int(file.metadata()["steps"])
    pretrain.main(command)
    assert f"vae: goes on after {4 * steps} samples" in capsys.readouterr().out
    assert (tmp_path / "vae" / pretrain.WEIGHTS).exists() and not checkpoint.exists()


@pytest.mark.parametrize("name", ["vae", "control"])    # Muon, and AdamW alone
def test_a_resumed_stage_takes_the_same_steps(tmp_path, name):
    args = SimpleNamespace(stage=name, lr=None, batch=None, threads=1, work=tmp_path, seed=0, pictures=8, device="cpu")

    def begin():
        model = filled(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 3, 3)))
        run = training.Run(args, model)
        return run, lambda chosen, rng, generator: model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()

    first, loss_of = begin()
    start = {key: p.detach().clone() for key, p in first.parameters.items()}
    first.step(loss_of, 0.5)
    first.save()
    resumed, its_loss_of = begin()
    first.step(loss_of, 0.6)
    resumed.step(its_loss_of, 0.6)
    for key, p in first.parameters.items():
        assert torch.equal(p, resumed.parameters[key]) and not torch.equal(p, start[key])
    assert len(resumed.optimizers) == (2 if name == "vae" else 1)


def test_a_killed_unet_finds_its_latents_again(folder, tmp_path):
    args = SimpleNamespace(out=folder, work=tmp_path, seed=0, pictures=6, device="cpu")
    scenes, mean, std = pretrain.draw_and_encode(args)
    assert mean.shape == std.shape == (6, 4, 16, 16) and (std > 0).all()
    again = pretrain.draw_and_encode(args)
    assert again[0] == scenes and torch.equal(again[1], mean) and torch.equal(again[2], std)
