"""What inflation promises, beside equality with the official net."""
import pytest
import torch
from tiny import UNET, filled
from torch.nn import functional as F

from tinytav import tuning
from tinytav.errors import InputError
from tinytav.inflation import ATTENTIONS, VideoUNet, inflate
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import Attention, ResnetBlock, Transformer, UNet, UNetConfig
from tinytav.tuning import Tuner

FRAMES = 4


def random_clip(seed=0, frames=FRAMES, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, frames, 8, 8, generator=generator), torch.full((batch,), 500),
            torch.randn(batch, 7, 24, generator=generator))


def require_gradients(net):
    for p in net.tuned().values():
        p.requires_grad_()


@pytest.fixture
def unet():
    return filled(UNet(UNetConfig.from_json(UNET)))


@pytest.mark.parametrize("attention", ATTENTIONS)
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
    layer = ATTENTIONS[attention](FRAMES, 16, 2)
    for i in range(FRAMES):
        x = torch.randn(FRAMES, 5, 16, requires_grad=True)
        layer(x)[i].sum().backward()
        assert [j for j in range(FRAMES) if x.grad[j].abs().max() > 0] == seen[i]


# Frame i of 4 looks at these frames (paper, section 3.2; the first frame is its own predecessor).
ROWS = {"sparse-causal": [[0, 0], [0, 0], [0, 1], [0, 2]], "spatial": [[0], [1], [2], [3]], "first": [[0]] * 4,
        "causal": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]], "full": [[0, 1, 2, 3]] * 4}


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_each_attention_is_its_equation(attention):
    """Against the plainest way to say it: a softmax for each frame of each clip, over copies of the keys it sees."""
    layer, x = ATTENTIONS[attention](FRAMES, 16, 2), torch.randn(2 * FRAMES, 5, 16)
    clips = layer.unfold(x)
    for clip, answer in zip(clips, layer.unfold(layer(x))):
        for i, row in enumerate(ROWS[attention]):
            seen = torch.cat([clip[j] for j in row])[None]
            expected = Attention.forward(layer, clip[i:i + 1], seen)
            torch.testing.assert_close(answer[i:i + 1], expected, atol=1e-6, rtol=1e-5)


def test_full_attention_keeps_no_copies_of_its_keys():
    """What the gradient keeps grows with the frames, not with their square."""
    kept = {}
    for frames in (4, 16):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        layer = ATTENTIONS["full"](frames, 16, 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(torch.randn(frames, 64, 16, requires_grad=True))
        weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        kept[frames] = sum(size for pointer, size in sizes.items() if pointer not in weights)
    assert kept[16] < 4.5 * kept[4]


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
    tuner = Tuner(net, Schedule(), mean, 0.1 * mean.abs(), context, lr=1e-2)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == net.tuned().keys()
    frozen = {name: p.clone() for name, p in net.state_dict().items() if name not in net.tuned()}
    tuned = {name: p.detach().clone() for name, p in net.tuned().items()}
    for _ in range(3):
        tuner.step()
    for name, p in net.state_dict().items():
        assert (name in frozen) == torch.equal(p, {**frozen, **tuned}[name]), name
    for name, p in unet.state_dict().items():
        assert torch.equal(p, before[name]), name
    assert net.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


def test_the_first_step_cannot_move_temporal_queries(unet):
    net = inflate(unet, FRAMES)
    require_gradients(net)
    x, t, context = random_clip()
    tuning.denoising_loss(net, Schedule(), x, torch.ones_like(x), 500, context).backward()
    for name, p in net.tuned().items():
        zero = "attn_temp" in name and "to_out" not in name     # their way out is still zero
        assert (p.grad.abs().max() == 0) == zero, name


def test_gradient_checkpointing_changes_no_gradient(unet):
    x, t, context = random_clip()
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = inflate(unet, FRAMES)
        for p in net.tuned().values():
            torch.nn.init.normal_(p, std=0.1)
        require_gradients(net)
        if checkpointed:
            for block in net.modules():
                if isinstance(block, (ResnetBlock, Transformer)):
                    block.checkpointing = True
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = tuning.denoising_loss(net, Schedule(), x, torch.ones_like(x), 500, context)
        kept.append(sum(sizes.values()))
        loss.backward()
        gradients.append({name: p.grad for name, p in net.tuned().items()})
    assert kept[1] < 0.5 * kept[0]
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]) and gradients[1][name].abs().max() > 0, name


@pytest.mark.parametrize("upcast, half, dtype", [
    (True, torch.float16, torch.float32), (False, torch.float16, torch.float16),
    (True, torch.bfloat16, torch.bfloat16)])
def test_upcast_attention_computes_in_float32_where_fp16_would_overflow(monkeypatch, upcast, half, dtype):
    attention, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v):
        y = attention(q, k, v)
        seen.append(y.dtype)
        return y
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", half):
        assert Attention(16, 2, upcast=upcast)(torch.randn(1, 5, 16)).dtype is half
    assert seen == [dtype]


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_every_attention_of_the_video_net_is_upcast_where_the_config_says_so(monkeypatch, attention):
    """ST-Attn, cross-attention and T-Attn: with SD 2.1's setting each softmax of an fp16 net runs in float32."""
    seen = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.dtype) or real(q, k, v))
    for upcast, dtype in ((True, torch.float32), (False, torch.float16)):
        net = VideoUNet(UNetConfig.from_json(UNET | dict(upcast_attention=upcast)), 2, attention).half()
        seen.clear()
        with torch.autocast("cpu", torch.float16):
            net(torch.randn(1, 4, 2, 4, 4), torch.ones(1), torch.randn(1, 3, 24))
        assert len(seen) >= 12 and set(seen) == {dtype}


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


@pytest.mark.parametrize("settings", [dict(attention="sideways"), dict(norm="batch"), dict(frames=0)])
def test_unknown_settings_are_refused_by_name(unet, settings):
    with pytest.raises(InputError, match=str(next(iter(settings.values())))):
        inflate(unet, **(dict(frames=2) | settings))
