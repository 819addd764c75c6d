"""Choosing blocks: the prediction holds, the choice fits, and it is not wasteful."""
import pytest
import tiny
import torch

from tinytav.measure import memory, recompute
from tinytav.stable_diffusion.unet import UNetConfig

UNET = UNetConfig.from_json(tiny.UNET | dict(layers_per_block=2, block_out_channels=[32, 64]))
WORK = memory.Work(8, 24, 24, unet=UNET)


@pytest.fixture(scope="module")
def plain():
    return memory.tuning(WORK)


def at(plain, share):
    """Free bytes: between what everything recomputed needs (0) and what nothing recomputed needs (1)."""
    least = memory.tuning(WORK, {block.name for block in plain.blocks}).peak
    return least + share * (plain.peak - least)


def test_blocks_come_in_the_order_in_which_they_run(plain):
    names = [block.name for block in plain.blocks]
    assert names[:4] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "down_blocks.0.resnets.1",
                         "down_blocks.0.attentions.1"]
    assert set(names) == set(memory.checkpointable(memory.on_meta(WORK))) and len(names) == len(set(names))
    assert plain.blocks[0].kept == 0                        # nothing before it is tuned, so no gradient goes through it
    assert all(block.kept > 0 for block in plain.blocks[1:]) and all(block.flops > 0 for block in plain.blocks)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_choice_fits_and_is_predicted_from_one_simulation(plain, share):
    free = at(plain, share)
    names = recompute.choose(plain, free)
    numbers = {number for number, block in enumerate(plain.blocks) if block.name in names}
    predicted, _ = recompute.highest(plain, numbers)
    assert predicted <= free and predicted == pytest.approx(memory.tuning(WORK, names).peak, rel=0.05)
    for number in numbers:                                  # each of them is needed
        assert recompute.highest(plain, numbers - {number})[0] > free


def test_nothing_is_recomputed_where_all_fits_and_no_more_than_helps_where_nothing_does(plain):
    assert recompute.choose(plain, plain.peak) == set()
    assert recompute.fit(WORK, plain.peak) == (set(), plain)
    names = recompute.choose(plain, 0)
    assert "down_blocks.0.resnets.0" not in names and len(names) > 5


def test_less_memory_costs_more_flops(plain):
    repeated = []
    for share in (0.8, 0.2):
        names, cost = recompute.fit(WORK, at(plain, share))
        assert cost.peak <= at(plain, share)
        repeated.append(cost.flops - plain.flops)
    assert 0 < repeated[0] < repeated[1]
    everything = memory.tuning(WORK, {block.name for block in plain.blocks}).flops - plain.flops
    assert repeated[0] < 0.4 * everything


def test_the_block_that_saves_most_for_its_flops_comes_first():
    blocks = (memory.Block("dear", 100, 1000), memory.Block("cheap", 60, 10), memory.Block("last", 500, 1))
    cost = memory.Cost(0, 1000, 0, blocks, peaks=(400, 500, 600, 700, 1000, 900))      # the peak is within "last"
    assert recompute.choose(cost, 950) == {"cheap"}
    assert recompute.choose(cost, 920) == {"dear"}          # "cheap" does not suffice, "dear" alone does
    assert recompute.choose(cost, 850) == {"cheap", "dear"}


def test_switch_sets_these_blocks_and_no_others():
    with torch.device("meta"):
        net = memory.VideoUNet(UNET, 2)
    recompute.switch(net, recompute.everything(net))
    recompute.switch(net, {"mid_block.attentions.0"})
    chosen = [name for name, block in memory.checkpointable(net).items() if block.checkpointing]
    assert chosen == ["mid_block.attentions.0"]
