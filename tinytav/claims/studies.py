"""What is compared: the variants of the method, the studies that try them, and the claims about them."""
from typing import NamedTuple

from tinytav.claims.clips import FRAMES, longer, make_clip, pose_clip
from tinytav.claims.studio import Net, Posing, Studio, Variant

# The learning rate for all tensors, times the weights' own. Chosen on the choice clips: with the toy's defaults it is
# 1e-4 (README.md).
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
# Not in the paper. beyond.py has the code, edit_friendly.py that of one of them.
BEYOND = {
    "inverted with the source's caption": Variant(noise="source caption"),
    "guided from the source's caption": Variant(noise="source caption", guide_from="source"),
    "fixed-point inversion": Variant(noise="fixed point"),
    "edit-friendly noise": Variant(noise="edit-friendly"),
    "blended by attention": Variant(mask="word"),
}
FULLY_CAPTIONED = ("full method", "untuned", "spatial attention", "frame by frame", "no inversion")
# Why the background often moves wrongly after a change of place: edits by the same net from noises that are mixed from
# two clips. The inverted noise of the true edit is known, because the true edit can be drawn.
PLACE = {
    "source's noise": Variant(),
    "source's noise, all named": Variant(all_named=True),
    "true edit's noise": Variant(noise="true edit"),
    "coarse of the true edit, fine of the source": Variant(noise="coarse of the true edit"),
    "fine of the true edit, coarse of the source": Variant(noise="fine of the true edit"),
}
# How steps, learning rate and guidance were chosen: on clips of their own, none of them a test clip.
SWEEP = {f"{tuned} tensors, {rate:.2g} x the rate, {steps:g} x the steps, guidance {guidance:g}":
         Variant(Net(tuned, steps=steps, rate=rate), guidance=guidance / 3)
         for tuned, rates in (("the paper's", (1 / 3, 1, 10 / 3)), ("all", (0.1, OWN_RATE)))
         for rate in rates for steps in (0.25, 1) for guidance in (1, 3, 6, 12)}
# What an edit keeps. The true masks and first frames are drawn.
FRIENDLY = "edit-friendly"
KEPT = {
    "full method": Variant(),
    "edit-friendly noise": Variant(noise=FRIENDLY),
    **{f"true mask, {noise}": Variant(noise=noise, mask="true") for noise in ("inverted", FRIENDLY)},
    **{f"mask by word, {noise}": Variant(noise=noise, mask="word") for noise in ("inverted", FRIENDLY)},
    **{f"first frame, {noise}": Variant(noise=noise, first=1) for noise in ("inverted", FRIENDLY, "random")},
    "first frame in half of the steps, inverted": Variant(first=0.5),
    "first frame and true mask, inverted": Variant(mask="true", first=1),
}
NOISES = ("inverted", "random", "shared")
# Ways to keep more of the clip, or less, and pairs of them: which one is the best recipe? First on four clips.
LONGER, ALL = Net(steps=2), Net("all", rate=OWN_RATE)
EDIT_FRIENDLY, FROM_CAPTION = Variant(noise=FRIENDLY), Variant(noise="source caption")
RECIPES = {
    "full method": Variant(),
    "edit-friendly noise": EDIT_FRIENDLY,
    "inverted with the source's caption": FROM_CAPTION,
    "guided from the source's caption": FROM_CAPTION._replace(guide_from="source"),
    "edit-friendly noise, guided from the source's caption": EDIT_FRIENDLY._replace(guide_from="source"),
    "strength 0.5": Variant(strength=0.5),
    "edit-friendly noise, strength 0.5": EDIT_FRIENDLY._replace(strength=0.5),
    "the source's caption, strength 0.5": FROM_CAPTION._replace(strength=0.5),
    "edit-friendly noise, 2 x the guidance": EDIT_FRIENDLY._replace(guidance=2),
    "the source's caption, 2 x the guidance": FROM_CAPTION._replace(guidance=2),
    "twice the steps": Variant(LONGER),
    "twice the steps, edit-friendly noise": EDIT_FRIENDLY._replace(net=LONGER),
    "twice the steps, strength 0.5": Variant(LONGER, strength=0.5),
    "all tensors, own rate": Variant(ALL),
    "all tensors, own rate, 2 x the guidance": Variant(ALL, guidance=2),
    "all tensors, own rate, strength 0.5": Variant(ALL, strength=0.5),
    "all tensors, own rate, edit-friendly noise": EDIT_FRIENDLY._replace(net=ALL),
}
# Then on eight clips the best of them, and what lies near it.
FINALISTS = {
    **{name: RECIPES[name] for name in ("full method", "edit-friendly noise", "guided from the source's caption",
                                        "strength 0.5")},
    **{f"edit-friendly noise, strength {strength:g}": EDIT_FRIENDLY._replace(strength=strength)
       for strength in (0.25, 0.5, 0.75)},
    "edit-friendly noise, strength 0.5, full attention":
        EDIT_FRIENDLY._replace(net=Net(attention="full"), strength=0.5),
    "all tensors, own rate, edit-friendly noise, strength 0.5": EDIT_FRIENDLY._replace(net=ALL, strength=0.5),
}
# How much of the tuning: one number between a net that ignores the clip and one that copies it.
STRENGTHS = {f"{rate:.2g} x the rate, strength {strength:g}": Variant(Net(rate=rate), strength=strength)
             for rate, strengths in ((1 / 3, (1, 1.5, 2, 3)), (1, (0, 0.5, 0.75, 1, 1.5, 2)), (10 / 3, (0.25, 0.5, 1)))
             for strength in strengths}
SCALE = 1.5         # the toy's ControlNet follows limbs better than at 1: chosen on two clips of the kind "choice"
POSE = {
    "tuned, inverted noise, scale 1": Variant(control=1),
    **{f"tuned, {noise} noise": Variant(noise=noise, control=SCALE) for noise in NOISES},
    **{f"no control, {noise} noise": Variant(noise=noise) for noise in NOISES},
    **{f"untuned, {noise} noise": Variant(Net(tuned=None), noise, control=SCALE) for noise in NOISES},
}

# Clips of more frames than the net sees at once. "full method": as windows.py says.
LONG = {
    "full method": Variant(Net(windows="averaged")),
    "windows not averaged": Variant(Net(windows="not averaged")),
    "windows without the first frame": Variant(Net(windows="no first frame")),
}

# (claim, better, worse, score in which it shows), as PLAN.md fixed them before anything was measured.
CLAIMS = (
    ("inversion carries the motion", "full method", "no inversion", "motion"),
    ("ST-Attn keeps frames alike", "full method", "spatial attention", "agreement"),
    ("tuning holds what the caption leaves open", "full method", "untuned", "unsaid"),
    ("tuning all tensors at the same rate destroys knowledge", "full method", "all tensors", "edited"),
    ("better than frame by frame", "full method", "frame by frame", "agreement"))
# The sixth test, by itself: the recipe that the choice clips chose.
RECIPE = "edit-friendly noise, strength 0.75"
SIXTH = ("the recipe succeeds more often", RECIPE, "full method", "success"),

# What a score is called in tables. All but POINTS are shares of frames or of edits.
NAMES = dict(success="success", edited="edit right", kept="rest kept", unsaid="unsaid kept", agreement="agreement",
             look="look agrees", phase="limbs", x="position", camera="camera", psnr="PSNR", all_pairs="all pairs",
             neighbours="neighbours", text="text", motion="motion", subject="subject", clothes="clothes",
             rest="other words", outside="PSNR outside")
POINTS = ("psnr", "outside", "all_pairs", "neighbours", "text")
SEED = 33                   # one, because the clips carry the variance


class Study(NamedTuple):
    """Rows that are made of the same clips, and how they are shown. Scores lie in STUDY/CLIP/ROW-33.json."""
    title: str
    rows: dict[str, Variant]
    columns: tuple[str, ...]                    # of its table, keys of NAMES
    references: tuple[str, ...] = ("source", "true edit")       # what Studio.reference draws
    kind: str = "test"                          # of the clips
    clips: int = 12
    captions: str = "user"                      # or full
    edits: tuple[str, ...] | None = None        # only those of these attributes
    frames: int = FRAMES                        # of a clip
    claims: tuple = ()                          # corrected for their number together
    separate: tuple = ()                        # claims that were planned apart from them
    compared: tuple[str, ...] = ()              # rows that a table compares with the full method

    def studio(self, weights, i, settings):
        """Clip i of the study, encoded."""
        if self.kind == "pose":
            return Posing(weights, pose_clip(i), settings, self.captions)
        clip = longer(make_clip(self.kind, i), self.frames)
        edits = [edit for edit in clip.edits if self.edits is None or edit.name in self.edits]
        return Studio(weights, clip._replace(edits=edits), settings, self.captions, self.frames)


# What bounds the variants: no edit, the right one, one frame of it, and the right one in the next clip's motion.
BOUNDS = ("source", "true edit", "still", "other motion")
SCORES = ("success", "edited", "kept", "unsaid", "agreement", "look", "phase", "x", "camera", "psnr", "all_pairs",
          "neighbours", "text")
POSED = ("phase", "x", "subject", "clothes", "rest", "agreement", "camera", "success", "psnr")
WINDOWED = ("success", "edited", "unsaid", "agreement", "motion", "phase", "x", "camera", "psnr")
STUDIES = {
    "user": Study("Captions as users write them", VARIANTS | BEYOND, SCORES, BOUNDS,
                  compared=(*list(VARIANTS)[1:], *BEYOND)),
    "full": Study("Captions that name everything", {name: VARIANTS[name] for name in FULLY_CAPTIONED}, SCORES, BOUNDS,
                  captions="full"),
    "trial": Study("The trial: fresh clips, one question each", {name: VARIANTS[name] for name in (
        "full method", "untuned", "spatial attention", "frame by frame", "no inversion", "all tensors")}
        | {RECIPE: FINALISTS[RECIPE]}, SCORES, kind="trial", clips=24, claims=CLAIMS, separate=SIXTH,
        compared=(RECIPE,)),
    "trial-full": Study("The trial's clips, captions that name everything", {
        "full method": Variant(), RECIPE: FINALISTS[RECIPE]}, SCORES, kind="trial", clips=24, captions="full",
        compared=(RECIPE,)),
    "place": Study("Changes of place", PLACE, ("camera", "edited", "phase", "x", "success", "psnr"), edits=("place",)),
    "keep": Study("What an edit keeps", KEPT, ("success", "edited", "unsaid", "agreement", "motion", "psnr", "outside"),
                  kind="keep", clips=8, compared=tuple(KEPT)[1:]),
    "sweep": Study("Steps, learning rate, guidance", SWEEP, ("success", "edited", "agreement", "psnr"), kind="choice",
                   clips=4),
    "recipes": Study("Recipes, on four clips", RECIPES, SCORES, kind="choice", clips=4, compared=tuple(RECIPES)[1:]),
    "finalists": Study("Recipes, on eight clips", FINALISTS, SCORES, kind="choice", clips=8,
                       compared=tuple(FINALISTS)[1:]),
    "strength": Study("Strength of the tuning", STRENGTHS, SCORES, kind="strength", clips=8),
    "long": Study("Clips of 32 frames", LONG, WINDOWED, kind="long", clips=8, edits=("subject", "place"), frames=32,
                  compared=tuple(LONG)[1:]),
    "short": Study("The same scenes in 8 frames", {"full method": Variant()}, WINDOWED, kind="long", clips=8,
                   edits=("subject", "place")),
    "pose": Study("Pose control, captions as users write them", POSE, POSED, kind="pose", clips=6),
    "pose-full": Study("Pose control, captions that name everything", POSE, POSED, kind="pose", clips=6,
                       captions="full"),
}
QUICK = STUDIES["user"]._replace(clips=2, edits=("subject", "place"), rows={name: VARIANTS[name] for name in (
    "full method", "untuned", "no inversion", "no inversion, spatial attention", "no inversion, untuned")})

# Orderings that the two clips of --quick show: (better, worse, score, margin). A quick run that breaks one fails.
# That tuning helps from random noise is plain on these two; over twelve clips the difference is small (README.md).
ROBUST = (("full method", "no inversion", "x", 0.2), ("full method", "no inversion", "phase", 0.1),
          ("no inversion", "no inversion, spatial attention", "agreement", 0.03),
          ("no inversion", "no inversion, untuned", "agreement", 0),
          ("full method", "source", "edited", 0.3), ("full method", "source", "text", 3),
          ("true edit", "full method", "success", 0), ("true edit", "full method", "psnr", 2),
          ("full method", "still", "success", 0.1), ("full method", "other motion", "success", 0.1))
