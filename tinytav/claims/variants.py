"""What the claims table compares: the variants of the method, the claims about them, and who has how many seeds."""
from tinytav.claims.experiment import Net, Variant

# The learning rate for all tensors, times the weights' own. Chosen on the choice clips (README.md): with the toy's defaults
# it is 1e-4.
OWN_RATE = 1 / 3
VARIANTS = {
    "full method": Variant(),
    "untuned": Variant(Net(tuned=None)),
    "spatial attention": Variant(Net(attention="spatial")),
    "frame by frame": Variant(Net(None, "spatial", "frame")),
    "no inversion": Variant(noise="random"),
    "no inversion, spatial attention": Variant(Net(attention="spatial"), noise="random"),
    "no inversion, untuned": Variant(Net(tuned=None), noise="random"),
    **{f"no inversion, untuned, {attention}": Variant(Net(None, attention, "frame"), noise="random")
       for attention in ("spatial", "first", "sparse-causal", "full")},
    "all tensors": Variant(Net(tuned="all")),
    "all tensors, own rate": Variant(Net(tuned="all", rate=OWN_RATE)),
    "official 70 tensors": Variant(Net(tuned="official")),
    "norm per frame": Variant(Net(norm="frame")),
    "full attention": Variant(Net(attention="full")),
    "first-frame attention": Variant(Net(attention="first")),
    "a quarter of the steps": Variant(Net(steps=0.25)),
    "twice the steps": Variant(Net(steps=2)),
}
# Not in the paper. claims/beyond.py has the code, edit_friendly.py that of one of them.
BEYOND = {
    "inverted with the source's caption": Variant(noise="source caption"),
    "guided from the source's caption": Variant(noise="source caption", guide_from="source"),
    "fixed-point inversion": Variant(noise="fixed point"),
    "edit-friendly noise": Variant(noise="edit-friendly"),
    "blended by attention": Variant(blend=True),
}
# Measured with captions that name every attribute, too.
FULLY_CAPTIONED = ("full method", "untuned", "spatial attention", "frame by frame", "no inversion")
QUICK = ("full method", "untuned", "no inversion", "no inversion, spatial attention", "no inversion, untuned")
# What bounds the variants, all through the VAE: no edit, the right one, one frame of it held still, and the right one
# in the next clip's motion.
REFERENCES = ("source", "true edit", "still", "other motion")
SEEDS = (33, 34, 35)    # of the variants on which a claim rests and that draw random numbers; the others have the first alone
# What is claimed: (claim, better, worse, scores in which it should show). The paper's own ablations leave out tuning, ST-Attn and
# inversion. The other claims ask further.
CLAIMS = (
    ("tuning keeps frames alike", "full method", "untuned", ("agreement", "look", "neighbours")),
    ("tuning keeps what the caption leaves open", "full method", "untuned", ("unsaid", "psnr")),
    ("tuning keeps frames alike, without inversion", "no inversion", "no inversion, untuned", ("agreement", "look", "neighbours")),
    ("ST-Attn keeps frames alike", "full method", "spatial attention", ("agreement", "neighbours")),
    ("ST-Attn keeps frames alike, without inversion", "no inversion", "no inversion, spatial attention",
     ("agreement", "neighbours")),
    ("untuned ST-Attn keeps frames alike", "no inversion, untuned, sparse-causal", "no inversion, untuned, spatial",
     ("agreement", "neighbours")),
    ("inversion carries the motion", "full method", "no inversion", ("motion", "success")),
    ("tuning all tensors destroys knowledge", "full method", "all tensors", ("edited", "success")),
    ("tuning all tensors at a rate of their own destroys knowledge", "full method", "all tensors, own rate", ("edited", "success")),
    ("better than frame by frame", "full method", "frame by frame", ("agreement", "neighbours", "success")))
# Orderings that the two clips of --quick show: (better, worse, score, margin). A quick run that breaks one fails.
# That tuning helps from random noise is plain on these two; over twelve clips the difference is small (README.md).
ROBUST = (("full method", "no inversion", "x", 0.2), ("full method", "no inversion", "phase", 0.1),
          ("no inversion", "no inversion, spatial attention", "agreement", 0.03),
          ("no inversion", "no inversion, untuned", "agreement", 0),
          ("full method", "source", "edited", 0.3), ("full method", "source", "text", 3),
          ("true edit", "full method", "success", 0), ("true edit", "full method", "psnr", 2),
          ("full method", "still", "success", 0.1), ("full method", "other motion", "success", 0.1))


def is_random(variant):
    """Does the seed change what a variant makes? Only tuning and two kinds of noise draw random numbers."""
    return variant.net.tuned is not None or variant.noise in ("random", "edit-friendly")


def claimed():
    """The names of the variants on which a claim rests."""
    return {name for _, better, worse, _ in CLAIMS for name in (better, worse)}


# Of the variants on which no claim rests those from inverted noise. They are compared with the full method, as BEYOND is.
FURTHER = [name for name, variant in VARIANTS.items() if name not in claimed() and variant.noise == "inverted"]


def seeds_of(name, count):
    """The seeds of a row: `count` if a claim rests on it and they change it, else one."""
    return SEEDS[:count] if name in claimed() and is_random(VARIANTS[name]) else SEEDS[:1]


def plan(quick=False, only=None, seeds=len(SEEDS)):
    """{captions: {name: seeds}} of what is made. only: names of variants, which are then made with short captions alone."""
    if quick:
        only, seeds = QUICK, 1
    user = {name: seeds_of(name, seeds) for name in (*REFERENCES, *(only or (*VARIANTS, *BEYOND)))}
    if only:
        return {"user": user}
    return {"user": user, "full": dict.fromkeys((*REFERENCES, *FULLY_CAPTIONED), SEEDS[:1])}
