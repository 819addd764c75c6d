"""Means over clips, how sure they are, and whether two variants differ."""
import numpy as np

RESAMPLES = 10_000      # of the bootstrap
EXACT = 14              # clips: up to so many, every combination of signs is tried


def means(clips, key):
    """The mean over a clip's edits and seeds, for each clip."""
    return np.array([np.mean([scores[key] for scores in clip]) for clip in clips])


def interval(values):
    """Of one value a clip: (mean, low, high), a 95 % bootstrap interval. Clips are drawn again and again, with replacement."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return values.mean(), low, high


def p_value(found):
    """Of a mean difference over clips, two-sided: the sign-flip test.

    If the two variants did not differ, each clip's difference would be as likely to have the other sign. p is the share of all
    2^n combinations of signs that give a mean as far from zero. It is exact also for few clips, where p-values from a
    bootstrap are too small. For more than EXACT clips 2^EXACT combinations are drawn.
    """
    n = len(found)
    if n <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(2 ** EXACT, n))
        signs[0] = 1
    tolerance = 1e-9        # sums of the same numbers in another order
    return np.mean(abs(signs @ found) >= abs(found.sum()) - tolerance)


def holm(p_values):
    """p-values corrected for their number, in the given order: Holm, Scandinavian Journal of Statistics 6, 1979."""
    order = np.argsort(p_values)
    corrected, highest = np.empty(len(p_values)), 0.
    for place, i in enumerate(order):
        highest = max(highest, min(1., (len(p_values) - place) * p_values[i]))
        corrected[i] = highest
    return corrected
