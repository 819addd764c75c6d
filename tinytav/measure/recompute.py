"""Gradient checkpointing by choice: which blocks of the U-Net are computed again, so that a step of tuning fits.

A block that is computed again keeps only its inputs during the forward pass. It costs one more forward of this block.
"""
from tinytav.measure import memory


def choose(cost, free):
    """Names of the blocks to compute again, so that the peak is at most `free` bytes and few FLOPs are repeated.

    cost: of memory.tuning(work), nothing recomputed. Where the peak is too high, only the blocks before it help: by then
    they wait with what they kept. Of these, the one that saves the most bytes for a FLOP is taken. If nothing suffices,
    it returns all that helps.
    """
    chosen = set()
    while True:
        peak, place = highest(cost, chosen)
        helpful = [number for number, block in enumerate(cost.blocks)
                   if 2 * number < place and number not in chosen and block.kept > 0]
        if peak <= free or not helpful:
            break
        chosen.add(max(helpful, key=lambda number: cost.blocks[number].kept / cost.blocks[number].flops))
    for number in sorted(chosen, key=lambda number: -cost.blocks[number].flops):    # the last ones may save too much
        if highest(cost, chosen - {number})[0] <= free:
            chosen.remove(number)
    return {cost.blocks[number].name for number in chosen}


def highest(cost, chosen):
    """(bytes, place) of the peak when the blocks of these numbers are computed again.

    At each place it is the plain peak less what the chosen blocks before that place no longer keep. A block that is
    being computed again needs at its own place what it needs without it.
    """
    peaks = []
    for place, peak in enumerate(cost.peaks):
        saved = sum(cost.blocks[number].kept for number in chosen if 2 * number < place)
        peaks.append((peak - saved, place))
    return max(peaks)


def tuning(work, free):
    """(names, Cost): the blocks to compute again so that a step fits into `free` bytes, and what the step then costs."""
    cost = memory.tuning(work)
    names = choose(cost, free)
    return names, memory.tuning(work, names) if names else cost
