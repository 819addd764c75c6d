"""High dynamic range -> standard range: what a clip in PQ or HLG looks like on an ordinary screen."""
import numpy as np
from av.video.reformatter import Interpolation

# Without these flags swscale rounds down: a clip becomes darker by half a level each time it is read, and its colours move.
ACCURATE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
PQ, HLG = 16, 18                # transfer characteristics, ITU-T H.273, table 3
WHITE = 203                     # cd/m2 of white paper in HDR, ITU-R BT.2408; it becomes white of standard range
PEAK = 1000 / WHITE             # the brightest light that is told from brighter light
KNEE = 0.75                     # darker light keeps its value; brighter light is compressed
GAMMA = 2.4                     # of a standard screen, ITU-R BT.1886
TO_BT709 = np.float32([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def to_standard(signal, transfer):
    """HDR signal (h, w, 3) in [0, 1], primaries of BT.2020, transfer PQ or HLG -> (h, w, 3) uint8, BT.709.

    As ffmpeg's `zscale=t=linear:npl=203,zscale=p=bt709,tonemap=mobius:param=0.75:desat=0,zscale=t=bt709`, with a peak of
    1000 cd/m2.
    """
    signal = np.asarray(signal, np.float32)
    light = (from_pq if transfer == PQ else from_hlg)(signal) / WHITE
    light = np.maximum(light @ TO_BT709.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    light = light * (compressed(brightest) / brightest)                     # one factor for r, g, b keeps the hue
    return (255 * light.clip(0, 1) ** (1 / GAMMA)).round().astype(np.uint8)


def from_pq(signal):
    """PQ signal -> light in cd/m2: the EOTF of SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def from_hlg(signal):
    """HLG signal -> light in cd/m2 of a screen of 1000 cd/m2: inverse OETF of ITU-R BT.2100, then its gamma of 1.2.

    The gamma is applied to r, g, b each, as zscale does. BT.2100 applies it to the luminance; greys are the same.
    """
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal ** 2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return 1000 * scene ** 1.2


def compressed(x):
    """Tone curve: x up to KNEE, above it a Moebius function of the same slope that maps PEAK to 1."""
    a = -KNEE ** 2 * (PEAK - 1) / (KNEE ** 2 - 2 * KNEE + PEAK)
    b = (KNEE ** 2 - 2 * KNEE * PEAK + PEAK) / (PEAK - 1)
    scale = (b ** 2 + 2 * b * KNEE + KNEE ** 2) / (b - a)
    return np.where(x <= KNEE, x, scale * (x + a) / (x + b))
