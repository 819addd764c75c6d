"""Pre-training: CLIP's tokenizer from captions, a stage that is killed and goes on, and the folder that is written."""
import json
import shutil
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import filled

import tinytav
from tinytav.errors import InputError
from tinytav.stable_diffusion.checkpoint import build, read_component
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.controlnet import ControlNet, ControlNetConfig, check_fits, load_controlnet
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.stable_diffusion.unet import UNet, UNetConfig
from tinytav.toy import pretrain, skeleton, training, world


def stage(name, out, steps, *more):
    return [name, "--steps", str(steps), "--pictures", "8", "--batch", "2", "--device", "cpu", "--out", str(out),
            "--work", str(out / "work"), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts of a Stable Diffusion, each trained for two steps."""
    out = tmp_path_factory.mktemp("toy")
    for name in ("clip", "vae", "unet"):
        pretrain.main(stage(name, out, 2))
    return out


def test_the_controlnets_loss_counts_more_around_the_stick_figure():
    hints = torch.zeros(1, 3, 32, 32)
    hints[0, 1, 9, 17] = 0.5                    # in latent (2, 4) of 8x8
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., 1:4, 3:6] = 1
    assert torch.equal(pretrain.around(hints, (8, 8)), expected)


def test_the_controlnets_loss_uses_the_weight(folder, monkeypatch):
    captured = []

    def capture(args, model, file, loss_of):
        captured.append(loss_of)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", capture)
    monkeypatch.setattr(pretrain, "around", lambda hints, size: torch.arange(256.).view(1, 1, 16, 16) / 128)
    with pytest.raises(KeyboardInterrupt):
        pretrain.train_control(SimpleNamespace(out=folder, seed=0, pictures=2, device="cpu"))
    losses = {}
    for figure in (0, 8):
        monkeypatch.setattr(pretrain, "FIGURE", figure)
        losses[figure] = captured[0](torch.tensor([1]), Random(5), torch.Generator().manual_seed(1)).item()
    assert losses[0] == pytest.approx(1, rel=0.2)           # the noise's own size: this U-Net is hardly trained
    assert losses[8] != losses[0] and losses[8] == pytest.approx(losses[0], rel=0.3)    # a mean, whatever the weight


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
    pretrain.main(stage("control", tmp_path, 2))
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
    (scene, view), = pretrain.imagine("a seed", 1)
    figure = skeleton.hint(skeleton.skeleton(scene.activity, view, pretrain.SIZE)[None])
    difference = control.embed_hint(figure) - control.embed_hint(torch.zeros_like(figure))
    assert difference.std() > 0.01          # conv_in's output is about 1, and torch's own start gives 0.0001


def test_more_training_starts_from_the_finished_weights(folder, tmp_path):
    pretrain.main(stage("vae", tmp_path, 1, "--lr", "1e-6", "--seed", "1", "--from", str(folder)))
    before, after = (load_file(out / "vae" / pretrain.WEIGHTS) for out in (folder, tmp_path))
    assert all(torch.allclose(before[name], after[name], atol=2e-3) for name in before)


def test_the_decoder_trains_alone(folder, tmp_path):
    pretrain.main(stage("vae", tmp_path, 2, "--keep", "--from", str(folder)))
    before, after = (load_file(out / "vae" / pretrain.WEIGHTS) for out in (folder, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith(("encoder.", "quant_conv.")) for name in moved)
    assert (folder / "vae/config.json").read_text() == (tmp_path / "vae/config.json").read_text()


def test_clips_vision_tower_trains_alone(folder, tmp_path):
    pretrain.main(stage("clip", tmp_path, 2, "--keep", "--from", str(folder)))
    before, after = (load_file(out / "clip/model.safetensors") for out in (folder, tmp_path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("text_model.") for name in moved)
    assert (folder / "clip/vocab.json").read_text() == (tmp_path / "clip/vocab.json").read_text()


def test_the_vaes_loss_counts_large_errors_and_lost_edges_more():
    x = torch.zeros(1, 3, 4, 4)
    same_everywhere = pretrain.difference(x, x + 0.5)       # no edge is lost
    assert same_everywhere == pytest.approx(0.5 + 3 * 0.25)
    striped = x.clone()
    striped[:, :, ::2] = 1                                                              # every second row
    assert pretrain.difference(x, striped) == pytest.approx(0.5 + 3 * 0.5 + 0.5)


@pytest.mark.parametrize("options, message", [
    (["--threads", "8", "--out", "x"], "--threads 8 cannot share a batch of 4 equally"),
    (["--keep", "--out", "x"], "--keep is for clip and vae, and needs --from"),
    ([], "the following arguments are required: --out"),
    (["--steps", "0", "--out", "x"], "0 is not from 1")])
def test_options_that_do_not_fit_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        pretrain.arguments(["vae", "--steps", "1", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_older_torch_has_no_muon(monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SystemExit):
        pretrain.arguments(["unet", "--steps", "1", "--out", "x"])
    assert "the stage unet needs torch 2.9 or later" in capsys.readouterr().err
    assert pretrain.arguments(["clip", "--steps", "1", "--out", "x"]).stage == "clip"       # needs no Muon


def test_a_stopped_stage_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch, capsys):
    def stop_after_two_steps(self, loss_of):
        if self.steps == 2:
            raise KeyboardInterrupt
        return step(self, loss_of)

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    command, checkpoint, step = stage("unet", tmp_path, 3), tmp_path / "work/unet.safetensors", training.Training.step
    pretrain.main(command)
    whole = load_file(tmp_path / "unet" / pretrain.WEIGHTS)
    monkeypatch.setattr(training.Training, "step", stop_after_two_steps)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(command)
    assert checkpoint.exists()
    monkeypatch.undo()
    (tmp_path / "unet" / pretrain.WEIGHTS).unlink()
    pretrain.main(command)
    assert "unet: goes on after 2 steps" in capsys.readouterr().out and not checkpoint.exists()
    resumed = load_file(tmp_path / "unet" / pretrain.WEIGHTS)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def begin(tmp_path):
    """Begins, or goes on with, the training of two convolutions: a function of options -> (training, loss_of)."""
    def begin(stage="vae", **options):
        args = SimpleNamespace(stage=stage, lr=None, batch=None, threads=1, work=tmp_path, seed=0, pictures=8, steps=4,
                               device="cpu")
        vars(args).update(options)
        model = filled(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 3, 3)))

        def loss_of(chosen, rng, generator):
            return model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()

        return training.Training(args, model), loss_of
    return begin


@pytest.mark.parametrize("name, optimizers", [("vae", ["AdamW", "Muon"]), ("control", ["AdamW", "AdamW"])])
def test_a_resumed_stage_takes_the_same_steps(begin, name, optimizers):
    first, loss_of = begin(name)
    start = {key: p.detach().clone() for key, p in first.parameters.items()}
    first.step(loss_of)
    first.save()
    resumed, its_loss_of = begin(name)
    whole, part = first.train(loss_of), resumed.train(its_loss_of)
    assert first.steps == resumed.steps == 4
    for key, p in first.parameters.items():
        assert torch.equal(p, resumed.parameters[key]) and not torch.equal(p, start[key])
        assert torch.equal(whole[key], part[key])
    assert sorted(type(optimizer).__name__ for optimizer in resumed.optimizers) == optimizers


@pytest.mark.parametrize("option", [dict(seed=1), dict(pictures=9), dict(steps=5), dict(lr=0.1)])
def test_another_trainings_checkpoint_is_refused(begin, option):
    first, loss_of = begin()
    first.step(loss_of)
    first.save()
    assert begin(threads=2)[0].steps == 1               # how the work is shared may change
    with pytest.raises(InputError, match=rf"other options \({next(iter(option))}\)"):
        begin(**option)


def test_each_step_and_part_has_its_own_randomness(begin):
    def randomness(seed):
        seen = []

        def noted(chosen, rng, generator):
            seen.append((*chosen.tolist(), rng.random(), generator.initial_seed()))
            return loss_of(chosen, rng, generator)

        one, loss_of = begin(threads=2, seed=seed)
        one.step(noted)
        one.step(noted)
        return set(seen)

    assert len(randomness(0) | randomness(1)) == 8 and randomness(0) == randomness(0)


def test_the_learning_rate_rises_and_falls_to_zero(begin):
    first, loss_of = begin(steps=99, lr=1.0)
    rates = []
    for _ in range(99):
        first.step(loss_of)
        rates.append(first.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1 / 3, rel=1e-3) and rates[2] == max(rates) > 0.99
    assert rates[49] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3


def test_the_latents_belong_to_the_scenes(folder):
    """Captions and noisy latents that are handed out together are of one picture."""
    args = SimpleNamespace(out=folder, device="cpu")
    imagined = pretrain.imagine("a seed", 3)
    mean, std = pretrain.encode_all(pretrain.finished(args, "vae"), pretrain.draw_many(imagined), "cpu")
    assert mean.shape == std.shape == (3, 4, 16, 16) and (std > 0).all()
    chosen, encoder = torch.tensor([2, 0]), pretrain.finished(args, "text_encoder")
    noisy, t, context, noise = pretrain.captioned_noise(args, imagined, empty=0)(
        chosen, Random(5), torch.Generator().manual_seed(1))
    draw = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    x0 = mean[chosen] + std[chosen] * draw
    assert torch.equal(noisy, Schedule.from_json(pretrain.SCHEDULER_JSON).add_noise(x0, noise, t))
    rng = Random(5)
    captions = []
    for i in chosen:
        rng.random()                                    # decides whether the caption is left empty
        captions.append(world.caption(imagined[i][0], rng))
    expected = encoder(Tokenizer.from_folder(folder / "tokenizer")(captions))
    assert torch.equal(context, expected)
    silent = pretrain.captioned_noise(args, imagined, empty=1)(chosen, Random(5), torch.Generator().manual_seed(1))
    assert torch.equal(silent[2], encoder(Tokenizer.from_folder(folder / "tokenizer")(["", ""])))
