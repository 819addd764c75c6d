"""The ladder: what is computed again for the gradient, when memory runs out and before."""
import pytest
import torch
from test_tuning import make_tuner

from tinytav import memory
from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion.unet import Transformer, UNetConfig

GONE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def on_meta(cfg, frames):
    with torch.device("meta"):
        return VideoUNet(cfg, frames)


@pytest.fixture(scope="module")
def stable_diffusion():
    """The net of Stable Diffusion 1.5 for 24 frames, without memory."""
    return on_meta(UNetConfig(), 24)


def test_the_ladder_goes_from_nothing_over_the_finest_level_to_all_blocks(stable_diffusion):
    rungs = memory.ladder(stable_diffusion)
    assert [len(rung) for rung in rungs] == [0, 5, 10, 20, 30, 38]
    assert all(isinstance(block, Transformer) for block in rungs[1])
    finest = [block for stage in (stable_diffusion.down_blocks[0], stable_diffusion.up_blocks[3])
              for block in [*stage.resnets, *stage.attentions]]
    assert {id(block) for block in rungs[2]} == {id(block) for block in finest}
    assert {id(block) for block in rungs[-1]} == {id(block) for block in memory.blocks(stable_diffusion)}


def test_climbing_takes_one_rung_after_the_other_and_ends_at_the_top(stable_diffusion):
    memory.recompute(stable_diffusion, [])
    climbed = []
    while memory.climb(stable_diffusion):
        climbed.append(memory.recomputed(stable_diffusion))
    assert climbed == [5, 10, 20, 30, 38]


# ---- When memory runs out ------------------------------------------------------------------------

def raise_once(tuner, failures, step=1):
    """A function for hooks that raises one of `failures` in the midst of a step, as long as there are any."""
    def fails(*anything, **settings):
        if len(tuner.losses) == step and failures:
            raise failures.pop()
    return fails


def fail_in_forward(tuner, fails, monkeypatch):
    tuner.net.conv_out.register_forward_pre_hook(fails)


def fail_in_backward(tuner, fails, monkeypatch):
    """Some gradients are there already, and must not count twice."""
    next(iter(tuner.parameters.values())).register_hook(fails)


def fail_in_clipping(tuner, fails, monkeypatch):
    plain = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: fails() or plain(*args))


def fail_in_the_update(tuner, fails, monkeypatch):
    """Before AdamW changes anything: it makes lists of its tensors first."""
    tuner.optimizer.register_step_pre_hook(fails)


PLACES = [fail_in_forward, fail_in_backward, fail_in_clipping, fail_in_the_update]


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_for_which_memory_runs_out_is_made_again_a_rung_higher(place, step, monkeypatch):
    calm = make_tuner()
    expected = [loss for _, loss in calm.run(3)]
    tuner = make_tuner()
    place(tuner, raise_once(tuner, [GONE, GONE], step), monkeypatch)
    with pytest.warns(UserWarning, match="The memory is too small for a step"):
        losses = [loss for _, loss in tuner.run(3)]
    rungs = [len(rung) for rung in memory.ladder(tuner.net)]
    assert memory.recomputed(tuner.net) == rungs[2]
    assert losses == expected
    for name, p in calm.parameters.items():
        assert torch.equal(p, tuner.parameters[name]), name


def test_the_moments_are_there_before_the_first_step():
    """AdamW would make them in its first update, in which the gradients lie in memory too."""
    tuner = make_tuner()
    before = {name: id(tuner.optimizer.state[p]["exp_avg_sq"]) for name, p in tuner.parameters.items()}
    tuner.step()
    assert before == {name: id(tuner.optimizer.state[p]["exp_avg_sq"]) for name, p in tuner.parameters.items()}


def test_memory_that_runs_out_at_the_top_of_the_ladder_is_the_end(recwarn):
    tuner = make_tuner()
    tuner.net.conv_out.register_forward_pre_hook(raise_once(tuner, [GONE] * 99, step=0))
    with pytest.raises(torch.OutOfMemoryError):
        next(tuner.run(1))
    assert memory.recomputed(tuner.net) == len(memory.blocks(tuner.net))


def test_an_error_of_another_kind_is_no_reason_to_try_again(recwarn):
    tuner = make_tuner()
    tuner.net.conv_out.register_forward_pre_hook(raise_once(tuner, [RuntimeError("an illegal memory access")], step=0))
    with pytest.raises(RuntimeError, match="illegal"):
        next(tuner.run(1))
    assert memory.recomputed(tuner.net) == 0


def test_without_climbing_the_first_error_is_the_end(recwarn):
    tuner = make_tuner()
    tuner.net.conv_out.register_forward_pre_hook(raise_once(tuner, [GONE], step=0))
    with pytest.raises(torch.OutOfMemoryError):
        next(tuner.run(1, climb=False))
    assert memory.recomputed(tuner.net) == 0


@pytest.mark.parametrize("error, gone", [
    (GONE, True), (MemoryError(), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
    (RuntimeError("mat1 and mat2 do not fit"), False), (ValueError("not enough memory"), False)])
def test_which_errors_say_that_memory_ran_out(error, gone):
    assert memory.is_out_of_memory(error) is gone


# ---- Before the first step -----------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLIP = (1, 4, 24, 64, 64)
GIB = 2 ** 30


@pytest.mark.parametrize("free, blocks", [(200, 0), (60, 5), (45, 10), (25, 20), (16, 30), (13, 38)])
def test_on_a_cpu_an_estimate_chooses_the_lowest_rung_that_fits(stable_diffusion, free, blocks, recwarn):
    assert memory.prepare(stable_diffusion, CLIP, CPU, free=free * GIB) == blocks and not recwarn.list


def test_where_no_rung_fits_all_is_computed_again_with_a_warning(stable_diffusion):
    with pytest.warns(UserWarning, match=r"A step of tuning needs about .* GiB of memory, and 2.00 are free.*--frames"):
        assert memory.prepare(stable_diffusion, CLIP, CPU, free=2 * GIB) == 38


def test_the_flag_decides_and_on_cuda_nothing_is_estimated(stable_diffusion, recwarn):
    assert memory.prepare(stable_diffusion, CLIP, CPU, "on", free=200 * GIB) == 38
    assert memory.prepare(stable_diffusion, CLIP, CPU, "off", free=1) == 0
    assert memory.prepare(stable_diffusion, CLIP, CUDA, "auto", free=1) == 0 and not recwarn.list


def test_the_estimate_is_linear_in_the_pixels_and_half_in_half_precision(stable_diffusion):
    whole = memory.pixel_bytes(stable_diffusion, CLIP)
    assert memory.pixel_bytes(stable_diffusion, (1, 4, 12, 64, 32)) == whole / 4
    assert memory.pixel_bytes(on_meta(UNetConfig(), 24).to(torch.bfloat16), CLIP) == pytest.approx(whole * 320 / 680)
    narrow = UNetConfig(block_out_channels=(160, 320, 640, 640))
    assert memory.pixel_bytes(on_meta(narrow, 24), CLIP) == whole / 2


def test_what_a_group_leaves_free_is_its_limit_less_what_is_used_without_caches(tmp_path):
    group = tmp_path / "a/b"
    group.mkdir(parents=True)
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 9\nactive_file 30\ninactive_file 70\n")):
        (group / f"memory.{name}").write_text(text)
    (tmp_path / "mine").write_text("0::/a/b/c\n")
    assert memory.group_bytes(tmp_path, tmp_path / "mine") == 400
    (tmp_path / "a/memory.max").write_text("max")
    assert memory.group_bytes(tmp_path, tmp_path / "mine") == 400
    assert memory.group_bytes(tmp_path, tmp_path / "none") == float("inf")


def test_the_memory_that_is_free_is_a_number_of_bytes():
    assert 2 ** 20 < memory.free_bytes() < 2 ** 60


@pytest.mark.parametrize("told", [None, "MemTotal: 1 kB"])
def test_memory_that_the_system_does_not_tell_has_no_end(monkeypatch, tmp_path, told):
    if told:
        (tmp_path / "meminfo").write_text(told)
    monkeypatch.setattr(memory, "Path", lambda *parts: tmp_path / "meminfo")
    assert memory.free_bytes() == float("inf")
