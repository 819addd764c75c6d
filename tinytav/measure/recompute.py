"""Gradient checkpointing by choice: which blocks of the U-Net are computed again, so that a step of tuning fits.

A block that is computed again keeps only its inputs during the forward pass. It costs one more forward of this block.
"""
from tinytav.measure import memory


def choose(cost, free):
    """Names of the blocks to compute again, so that the peak is at most `free` bytes and few FLOPs are repeated.

    cost: of memory.tuning(work), where nothing is computed again. Only the blocks before the peak's place help: they
    wait there with what they keep. Of these, the one that saves the most bytes per FLOP comes first. Where nothing
    suffices, all that helps is chosen.
    """
    chosen = set()
    while True:
        peak, place = highest(cost, chosen)
        helpful = [number for number, block in enumerate(cost.blocks)
                   if 2 * number < place and number not in chosen and block.kept > 0]
        if peak <= free or not helpful:
            break
        chosen.add(max(helpful, key=lambda number: bytes_per_flop(cost.blocks[number])))
    for number in sorted(chosen, key=lambda number: -cost.blocks[number].flops):
        without = chosen - {number}
        if highest(cost, without)[0] <= free:               # the last choices may save more than was missing
            chosen = without
    return {cost.blocks[number].name for number in chosen}


def bytes_per_flop(block):
    return block.kept / max(1, block.flops)


def highest(cost, chosen):
    """(bytes, place) of the peak, when the blocks of these numbers are computed again.

    At each place it is the plain peak less what the chosen blocks before this place no longer keep. The block that is
    being computed again needs at its own place what it needs otherwise.
    """
    peaks = []
    for place, peak in enumerate(cost.peaks):
        saved = sum(cost.blocks[number].kept for number in chosen if 2 * number < place)
        peaks.append((peak - saved, place))
    return max(peaks)


def fit(work, free):
    """(names, Cost): the blocks to compute again so that a step of tuning fits into `free` bytes, and its cost then.

    The choice predicts the peak within some per cent. Where the simulation of the choice is above `free`, it chooses
    again, for as much less. The Cost may be above `free`: then nothing suffices.
    """
    cost = plain = memory.tuning(work)
    names, target = set(), free
    for _ in range(4):
        if cost.peak <= free:
            break
        target -= max(0, cost.peak - free) if names else 0
        names = choose(plain, target)
        cost = memory.tuning(work, names)
    return names, cost


def switch(net, names):
    """Sets which blocks of the net are computed again for the gradient: those of these names and no others."""
    for name, block in memory.checkpointable(net).items():
        block.checkpointing = name in names


def everything(net):
    """Names of all blocks that may be computed again."""
    return set(memory.checkpointable(net))
