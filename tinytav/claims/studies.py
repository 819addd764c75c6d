"""What is compared: the variants of the method, the studies that try them, and the claims about them."""
from typing import NamedTuple

from tinytav.claims.clips import FRAMES, longer, make_clip
from tinytav.claims.studio import Net, Studio, Variant

FRIENDLY = "edit-friendly"
RECIPE = "edit-friendly noise, strength 0.75"       # clips of the kind "choice" chose it
TRIAL = {
    "full method": Variant(),
    "untuned": Variant(Net(tuned=None)),
    "spatial attention": Variant(Net(attention="spatial")),
    "frame by frame": Variant(Net(None, "spatial", "frame")),
    "no inversion": Variant(noise="random"),
    "all tensors": Variant(Net(tuned="all")),
    RECIPE: Variant(noise=FRIENDLY, strength=0.75),
}
QUICK = {
    **{name: TRIAL[name] for name in ("full method", "untuned", "no inversion")},
    "no inversion, spatial attention": Variant(Net(attention="spatial"), noise="random"),
    "no inversion, untuned": Variant(Net(tuned=None), noise="random"),
}
# What an edit keeps. The true masks and first frames are drawn.
KEPT = {
    "full method": Variant(),
    "edit-friendly noise": Variant(noise=FRIENDLY),
    **{f"true mask, {noise}": Variant(noise=noise, mask="true") for noise in ("inverted", FRIENDLY)},
    **{f"mask by word, {noise}": Variant(noise=noise, mask="word") for noise in ("inverted", FRIENDLY)},
    **{f"first frame, {noise}": Variant(noise=noise, first=1) for noise in ("inverted", FRIENDLY, "random")},
    "first frame in half of the steps, inverted": Variant(first=0.5),
    "first frame and true mask, inverted": Variant(mask="true", first=1),
}
# How much of the tuning: one number between a net that ignores the clip and one that copies it.
STRENGTHS = {f"{rate:.2g} x the rate, strength {strength:g}": Variant(Net(rate=rate), strength=strength)
             for rate, strengths in ((1 / 3, (1, 1.5, 2, 3)), (1, (0, 0.5, 0.75, 1, 1.5, 2)), (10 / 3, (0.25, 0.5, 1)))
             for strength in strengths}

# (claim, better, worse, score in which it shows), as PLAN.md fixed them before anything was measured.
CLAIMS = (
    ("inversion carries the motion", "full method", "no inversion", "motion"),
    ("ST-Attn keeps frames alike", "full method", "spatial attention", "agreement"),
    ("tuning holds what the caption leaves open", "full method", "untuned", "unsaid"),
    ("tuning all tensors at the same rate destroys knowledge", "full method", "all tensors", "edited"),
    ("better than frame by frame", "full method", "frame by frame", "agreement"))
SIXTH = (("the recipe succeeds more often", RECIPE, "full method", "success"),)      # a test by itself

# What a score is called in tables. All but POINTS are shares of frames or of edits.
NAMES = dict(success="success", edited="edit right", kept="rest kept", unsaid="unsaid kept", agreement="agreement",
             look="look agrees", phase="limbs", x="position", camera="camera", psnr="PSNR", all_pairs="all pairs",
             neighbours="neighbours", text="text", motion="motion", outside="PSNR outside")
POINTS = ("psnr", "outside", "all_pairs", "neighbours", "text")
SCORES = ("success", "edited", "kept", "unsaid", "agreement", "look", "phase", "x", "camera", "psnr", "all_pairs",
          "neighbours", "text")
WINDOWED = ("success", "edited", "unsaid", "agreement", "motion", "phase", "x", "camera", "psnr")
KEEPING = ("success", "edited", "unsaid", "agreement", "motion", "psnr", "outside")


class Study(NamedTuple):
    """Rows that are made of the same clips, and how they are shown. Scores lie in STUDY/CLIP/ROW.json."""
    title: str
    rows: dict[str, Variant]
    kind: str                                   # of the clips
    clips: int
    captions: str = "user"                      # or full
    edits: tuple[str, ...] | None = None        # only those of these attributes
    frames: int = FRAMES                        # of a clip
    references: tuple[str, ...] = ("source", "true edit")       # what Studio.reference draws
    columns: tuple[str, ...] = SCORES           # of its table, keys of NAMES
    claims: tuple = ()                          # corrected for their number together
    separate: tuple = ()                        # claims that were planned apart from them
    compared: tuple[str, ...] = ()              # rows that a table compares with the full method

    def studio(self, weights, i, settings):
        """Clip i of the study, encoded."""
        clip = longer(make_clip(self.kind, i), self.frames)
        edits = [edit for edit in clip.edits if self.edits is None or edit.name in self.edits]
        return Studio(weights, clip._replace(edits=edits), settings, self.captions, self.frames)


TWO = ("subject", "place")
STUDIES = {
    "trial": Study("The trial: fresh clips, one question each", TRIAL, "trial", 24, claims=CLAIMS, separate=SIXTH,
                   compared=(RECIPE,)),
    "trial-full": Study("The trial's clips, captions that name everything",
                        {name: TRIAL[name] for name in ("full method", RECIPE)}, "trial", 24, captions="full",
                        compared=(RECIPE,)),
    "keep": Study("What an edit keeps", KEPT, "keep", 8, columns=KEEPING, compared=tuple(KEPT)[1:]),
    "strength": Study("Strength of the tuning", STRENGTHS, "strength", 8),
    "long": Study("Clips of 32 frames", {"full method": Variant()}, "long", 8, edits=TWO, frames=32, columns=WINDOWED),
    "short": Study("The same scenes in 8 frames", {"full method": Variant()}, "long", 8, edits=TWO, columns=WINDOWED),
    # Its references bound the rows: no edit, the right one, one frame of it, and the right one in another motion.
    "quick": Study("Two clips of the quick run", QUICK, "test", 2, edits=TWO, compared=tuple(QUICK)[1:],
                   references=("source", "true edit", "still", "other motion")),
}

# Orderings that the two clips of --quick show: (better, worse, score, margin). A quick run that breaks one fails.
# That tuning helps from random noise is plain on these two; over twelve clips the difference is small (EARLIER.md).
ROBUST = (("full method", "no inversion", "x", 0.2), ("full method", "no inversion", "phase", 0.1),
          ("no inversion", "no inversion, spatial attention", "agreement", 0.03),
          ("no inversion", "no inversion, untuned", "agreement", 0),
          ("full method", "source", "edited", 0.3), ("full method", "source", "text", 3),
          ("true edit", "full method", "success", 0), ("true edit", "full method", "psnr", 2),
          ("full method", "still", "success", 0.1), ("full method", "other motion", "success", 0.1))
