"""What inflation promises, beside equality with the official net."""
import pytest
import torch

from tiny import UNET, filled
from tinytav.measure import memory
from tinytav import tuning
from tinytav.stable_diffusion.config import InputError
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.inflation import LOOKS_AT, SpatioTemporalAttention, VideoUNet, inflate
from tinytav.stable_diffusion.unet import Attention, UNet, UNetConfig

FRAMES = 4


def random_clip(seed=0, frames=FRAMES, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, frames, 8, 8, generator=generator), torch.full((batch,), 500),
            torch.randn(batch, 7, 24, generator=generator))


@pytest.fixture
def unet():
    return filled(UNet(UNetConfig.from_json(UNET)))


@pytest.mark.parametrize("attention", LOOKS_AT)
@torch.no_grad()
def test_a_still_clip_gives_the_image_nets_answer_f_times(unet, attention):
    x, t, context = random_clip(frames=1, batch=2)
    y = unet(x[:, :, 0], t, context)
    video = inflate(unet, FRAMES, attention)(x.expand(-1, -1, FRAMES, -1, -1), t, context)
    for i in range(FRAMES):
        torch.testing.assert_close(video[:, :, i], y, atol=1e-5, rtol=0)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(unet):
    x, t, context = random_clip(batch=2)
    net = filled(inflate(unet, FRAMES))
    both = net(x, torch.tensor([10, 900]), context)
    alone = net(x[1:], torch.tensor([900]), context[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention, seen", [
    ("sparse-causal", [[0], [0, 1], [0, 1, 2], [0, 2, 3]]), ("spatial", [[0], [1], [2], [3]]),
    ("first", [[0], [0, 1], [0, 2], [0, 3]]), ("causal", [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
    ("full", [[0, 1, 2, 3]] * 4)])
def test_the_gradient_of_a_frame_reaches_the_frames_it_looks_at_and_itself(attention, seen):
    layer = SpatioTemporalAttention(FRAMES, attention, 16, 2)
    for i in range(FRAMES):
        x = torch.randn(FRAMES, 5, 16, requires_grad=True)
        layer(x)[i].sum().backward()
        assert [j for j in range(FRAMES) if x.grad[j].abs().max() > 0] == seen[i]


def test_the_table_of_frames():
    table = {name: [row(i, 3) for i in range(3)] for name, row in LOOKS_AT.items()}
    assert table == {"sparse-causal": [[0, 0], [0, 0], [0, 1]], "spatial": [[0], [1], [2]], "first": [[0], [0], [0]],
                     "causal": [[0], [0, 1], [0, 1, 2]], "full": [[0, 1, 2]] * 3}


@torch.no_grad()
def test_frames_of_one_call_and_frames_one_by_one_are_the_same_attention():
    layer, x = SpatioTemporalAttention(FRAMES, "full", 16, 2), torch.randn(2 * FRAMES, 5, 16)
    whole = layer(x)
    layer.rows = [*layer.rows[:-1], [*layer.rows[-1], 0]]       # unequal rows go the other way
    torch.testing.assert_close(layer(x).unflatten(0, (2, FRAMES))[:, :-1], whole.unflatten(0, (2, FRAMES))[:, :-1])


@torch.no_grad()
def test_group_norm_over_the_clip_or_over_a_frame(unet):
    x, t, context = random_clip()
    changed = x.clone()
    changed[:, :, -1] += 1                                      # spatial attention: only a norm can carry it to frame 0
    for norm, carries in (("clip", True), ("frame", False)):
        net = inflate(unet, FRAMES, "spatial", norm)
        moved = (net(x, t, context)[:, :, 0] - net(changed, t, context)[:, :, 0]).abs().max()
        assert (moved > 1e-4) == carries


def test_inflation_shares_what_is_frozen_and_copies_what_is_tuned(unet):
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    net = inflate(unet, FRAMES)
    mean, t, context = random_clip()
    optimizer = tuning.adamw(net.tuned(), lr=1e-2)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == net.tuned().keys()
    frozen = {name: p.clone() for name, p in net.state_dict().items() if name not in net.tuned()}
    tuned = {name: p.detach().clone() for name, p in net.tuned().items()}
    losses = list(tuning.tune(net, optimizer, Schedule(), mean, 0.1 * mean.abs(), context, steps=3))
    assert [step for step, _ in losses] == [1, 2, 3]
    for name, p in net.state_dict().items():
        assert (name in frozen) == torch.equal(p, {**frozen, **tuned}[name]), name
    for name, p in unet.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert net.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


def test_the_first_step_cannot_move_temporal_queries(unet):
    net = inflate(unet, FRAMES)
    tuning.adamw(net.tuned(), lr=1e-2)
    x, t, context = random_clip()
    tuning.denoising_loss(net, Schedule(), x, torch.ones_like(x), t, context).backward()
    for name, p in net.tuned().items():
        zero = "attn_temp" in name and "to_out" not in name     # their way out is still zero
        assert (p.grad.abs().max() == 0) == zero, name


def test_gradient_checkpointing_changes_no_gradient(unet):
    x, t, context = random_clip()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = inflate(unet, FRAMES)
        tuning.adamw(net.tuned(), lr=1e-2)
        for p in net.tuned().values():
            torch.nn.init.normal_(p, std=0.1)
        if checkpointed:
            memory.checkpoint_gradients(net)
        tuning.denoising_loss(net, Schedule(), x, torch.ones_like(x), t, context).backward()
        gradients.append({name: p.grad for name, p in net.tuned().items()})
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]) and gradients[1][name].abs().max() > 0, name


@pytest.mark.parametrize("upcast, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_upcast_attention_computes_in_float32_also_in_half_precision(monkeypatch, upcast, dtype):
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v):
        y = attention(q, k, v)
        seen.append(y.dtype)
        return y
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        assert Attention(16, 2, upcast=upcast)(torch.randn(1, 5, 16)).dtype is torch.bfloat16
    assert seen == [dtype]


def test_the_report_at_stable_diffusion_size():
    with torch.device("meta"):
        unet = UNet()
        net = VideoUNet(UNetConfig(), 24)
    kept, all_keys = unet.state_dict().keys(), net.state_dict().keys()
    assert len(kept) == 686 and kept <= all_keys
    assert len(all_keys - kept) == 112 and all("_temp." in name for name in all_keys - kept)
    assert len(net.tuned()) == 112 and sum(p.numel() for p in net.tuned().values()) == 74_354_880
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in net.parameters()) == 909_120_004


@pytest.mark.parametrize("upcast", [False, True])
def test_memory_of_a_step_is_counted_before_it_is_needed(upcast):
    net = inflate(filled(UNet(UNetConfig.from_json(UNET | dict(upcast_attention=upcast)))), FRAMES)
    x, t, context = random_clip()
    counted, _ = memory.training_bytes(net, x.shape, context.shape)
    tuning.adamw(net.tuned(), lr=0.)
    weights = {p.data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x, t, context)
    true = sum(z.untyped_storage().nbytes() for pointer, z in kept.items() if pointer not in weights)
    assert 0.8 * true < counted < 1.5 * true


@pytest.mark.parametrize("settings", [dict(attention="sideways"), dict(norm="batch"), dict(frames=0)])
def test_unknown_settings_are_refused_by_name(unet, settings):
    with pytest.raises(InputError, match=str(next(iter(settings.values())))):
        inflate(unet, **(dict(frames=2) | settings))
