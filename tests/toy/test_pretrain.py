"""Pre-training: the folder that is written, what trains and what is frozen, and the losses."""
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import filled

import tinytav
from tinytav.stable_diffusion.checkpoint import build, read_component
from tinytav.stable_diffusion.clip import CLIP, CLIPConfig
from tinytav.stable_diffusion.tokenizer import Tokenizer
from tinytav.toy import draw, pretrain, world


def stage(name, out, steps, *more):
    return [name, "--steps", str(steps), "--pictures", "8", "--batch", "2", "--device", "cpu", "--out", str(out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts of a Stable Diffusion, each trained for two steps."""
    out = tmp_path_factory.mktemp("toy")
    for name in ("clip", "vae", "unet"):
        pretrain.main(stage(name, out, 2))
    return out


def test_every_word_of_a_caption_is_one_token_and_comes_back(folder):
    tokenizer, rng = Tokenizer.from_folder(folder / "tokenizer"), Random(1)
    for caption in (world.caption(world.random_scene(rng, held_out=i % 2 == 1), rng) for i in range(300)):
        row = tokenizer([caption])[0].tolist()
        length = row.index(tokenizer.end)
        words = [tokenizer.bpe.id_to_token(i) for i in row[1:length]]
        assert words == [word + "</w>" for word in caption.replace(",", " ,").split()]
        assert row[0] == tokenizer.begin and row[length:] == [tokenizer.end] * (tokenizer.length - length)


def test_the_folder_is_a_stable_diffusion(folder):
    sd = tinytav.load(folder)       # reads every config and fits every tensor strictly
    assert sd.schedule.prediction_type == "epsilon" and sd.vae.cfg.scaling_factor != 1
    context = sd.encode_prompts(["a fox", ""])
    assert context.shape == (2, 32, sd.unet.cfg.cross_attention_dim)
    with torch.no_grad():
        latents = sd.unet(torch.randn(2, 4, 16, 16), torch.tensor([1, 981]), context)
        assert sd.vae.decode(latents).shape == (2, 3, draw.SIZE, draw.SIZE)
    assert (folder / "unet" / pretrain.WEIGHTS).stat().st_size < 16 * 2 ** 20
    assert sd.defaults.size == draw.SIZE and (folder / "knows.txt").is_file()


def test_scaled_latents_of_the_training_pictures_have_unit_variance(folder):
    pictures = pretrain.draw_many(pretrain.imagine(0, 8))
    mean, std = pretrain.encode_all(tinytav.load(folder).vae, pictures, "cpu")
    assert mean.var() + std.square().mean() == pytest.approx(1, abs=0.02)           # weights are kept in half precision


def test_the_clip_holds_the_same_text_encoder(folder):
    clip = build(CLIP, *read_component(folder / "clip", CLIPConfig))
    encoder = tinytav.load(folder).text_encoder
    ids = Tokenizer.from_folder(folder / "clip")(["a woman on the moon at night"])
    assert torch.equal(clip.text_model(ids), encoder(ids))
    assert clip.cfg.text_config.eos_token_id == encoder.cfg.eos_token_id == ids[0, -1]


def test_more_training_starts_from_the_finished_weights(folder, tmp_path):
    pretrain.main(stage("vae", tmp_path, 1, "--lr", "1e-6", "--seed", "1", "--from", str(folder)))
    before, after = (load_file(out / "vae" / pretrain.WEIGHTS) for out in (folder, tmp_path))
    assert all(torch.allclose(before[name], after[name], atol=2e-3) for name in before)


def test_the_vaes_loss_counts_large_errors_and_lost_edges_more():
    x = torch.zeros(1, 3, 4, 4)
    same_everywhere = pretrain.difference(x, x + 0.5)       # no edge is lost
    assert same_everywhere == pytest.approx(0.5 + 3 * 0.25)
    striped = x.clone()
    striped[:, :, ::2] = 1                                                              # every second row
    assert pretrain.difference(x, striped) == pytest.approx(0.5 + 3 * 0.5 + 0.5)


@pytest.mark.parametrize("options, message", [
    ([], "the following arguments are required: --out"),
    (["--steps", "0", "--out", "x"], "0 is not from 1")])
def test_options_that_do_not_fit_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        pretrain.arguments(["vae", "--steps", "1", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def training(tmp_path):
    """A function of options that trains two convolutions for four steps and returns what is seen of it."""
    def training(**options):
        args = SimpleNamespace(stage="vae", lr=0.1, batch=2, decay=0.0, optimizer="AdamW", seed=0, pictures=8, steps=4,
                               device="cpu", out=tmp_path, start=None, source=pretrain.TOY)
        vars(args).update(options)
        model = filled(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 3, 3)))
        seen = SimpleNamespace(model=model, randomness=[], weights=[], written=0)

        def loss_of(chosen, rng, generator):
            seen.randomness.append((*chosen.tolist(), rng.random(), generator.initial_seed()))
            seen.weights.append([p.detach().clone() for p in model.parameters()])
            return model(torch.randn(2, 3, 8, 8, generator=generator)).square().mean()

        def written():
            seen.written += 1
        pretrain.train(args, model, f"vae/{pretrain.WEIGHTS}", loss_of, written)
        seen.weights.append(list(model.parameters()))
        return seen
    return training


def test_an_older_torch_has_no_muon(monkeypatch, capsys):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SystemExit):
        pretrain.arguments(["unet", "--steps", "1", "--out", "x"])
    assert "the stage unet needs torch 2.9 or later" in capsys.readouterr().err
    assert pretrain.arguments(["clip", "--steps", "1", "--out", "x"]).stage == "clip"       # needs no Muon


def test_each_step_has_its_own_randomness(training):
    first, again, other = training(), training(), training(seed=1)
    assert len({*first.randomness, *other.randomness}) == 8 and first.randomness == again.randomness
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters()))


def test_the_weights_are_written_every_twentieth_of_the_steps_and_at_the_end(training, tmp_path):
    seen = training(steps=48)
    assert seen.written == 24
    found = load_file(tmp_path / "vae" / pretrain.WEIGHTS)
    assert all(torch.equal(found[name], p.half()) for name, p in seen.model.state_dict().items())


def test_the_learning_rate_rises_and_falls_to_zero(training):
    assert pretrain.rate(0.01) == pytest.approx(1 / 3, rel=1e-3) and pretrain.rate(0.03) > 0.99
    assert pretrain.rate(0.5) == pytest.approx(0.5) and 0 < pretrain.rate(0.99) < 1e-3
    before, *weights = training(steps=2).weights           # AdamW's first step moves every weight by the learning rate
    moved = torch.cat([(b - a).abs().flatten() for a, b in zip(before, weights[0])])
    assert moved.median() == pytest.approx(0.1 * pretrain.rate(1 / 3), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_only_matrices_decay(training, optimizer):
    seen = training(steps=1, optimizer=optimizer, decay=5.0), training(steps=1, optimizer=optimizer)
    for p, q in zip(*(one.model.parameters() for one in seen)):
        assert torch.equal(p, q) == (p.ndim < 2)


def test_muon_moves_a_kernel_in_all_directions_alike(training):
    """Its step is nearly orthogonal, seen as a matrix (out, in*h*w). AdamW's first step is the same for each weight."""
    steps = {}
    for optimizer in ("Muon", "AdamW"):
        before, after = training(steps=1, optimizer=optimizer).weights
        steps[optimizer] = (after[0] - before[0]).detach().flatten(1)
    values = torch.linalg.svdvals(steps["Muon"])
    assert values.max() < 2 * values.min()
    sizes = {name: step.abs() for name, step in steps.items()}
    assert sizes["AdamW"].std() < 0.01 * sizes["AdamW"].mean() and sizes["Muon"].std() > 0.1 * sizes["Muon"].mean()


def test_the_unet_learns_the_noise_of_pictures_with_their_own_captions(folder, monkeypatch):
    losses, seen = [], []

    class Net(torch.nn.Module):
        def forward(self, *inputs):
            seen[:] = inputs
            return torch.zeros(2, 4, 16, 16)
    monkeypatch.setattr(pretrain, "train", lambda args, model, file, loss_of: losses.append(loss_of))
    monkeypatch.setattr(pretrain, "new", lambda *args: Net())
    args = SimpleNamespace(out=folder, device="cpu", seed="a seed", pictures=3)
    pretrain.train_unet(args)
    sd, imagined = tinytav.load(folder), pretrain.imagine("a seed", 3)
    mean, std = pretrain.encode_all(pretrain.finished(args, "vae"), pretrain.draw_many(imagined), "cpu")
    assert mean.shape == std.shape == (3, 4, 16, 16) and (std > 0).all()

    generator, rng, chosen, captions = torch.Generator().manual_seed(1), Random(5), torch.tensor([2, 0]), []
    x0 = mean[chosen] + std[chosen] * torch.randn(2, 4, 16, 16, generator=generator)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    for i in chosen:
        rng.random()                                    # decides whether the caption is left empty
        captions.append(world.caption(imagined[i][0], rng))
    tokenizer, encoder = Tokenizer.from_folder(folder / "tokenizer"), pretrain.finished(args, "text_encoder")
    for share, expected in ((0, captions), (1, ["", ""])):
        monkeypatch.setattr(pretrain, "SILENT", share)
        loss = losses[0](chosen, Random(5), torch.Generator().manual_seed(1))
        assert torch.equal(seen[0], sd.schedule.add_noise(x0, noise, t)) and torch.equal(seen[1], t)
        assert torch.equal(seen[2], encoder(tokenizer(expected)))
        assert loss == pytest.approx(noise.square().mean())
