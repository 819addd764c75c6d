"""Colours of videos: high dynamic range -> standard range, and how swscale must convert."""
import numpy as np

# Without these flags swscale rounds down: each reading makes a clip darker by half a level, and moves its colours.
ACCURATE = 0x4 | 0x40000 | 0x2000       # SWS_BICUBIC, SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT; older PyAV has no names
PQ, HLG = 16, 18                # transfer characteristics of HDR, by the numbers of ITU-T H.273
WHITE = 203                     # cd/m2 of white paper in HDR, ITU-R BT.2408; it is 1 below
PEAK = 1000 / WHITE             # brighter light looks the same
KNEE = 0.75                     # darker light stays as it is; brighter light is compressed
TO_BT709 = np.float32([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def to_standard(signal, transfer):
    """HDR signal (h, w, 3) in [0, 1], primaries of BT.2020, transfer PQ or HLG -> (h, w, 3) uint8, BT.709.

    As ffmpeg's filters zscale=t=linear:npl=203, zscale=p=bt709, tonemap=mobius:param=0.75:desat=0:peak=4.926 and
    zscale=t=bt709 do.
    """
    light = from_pq(signal) if transfer == PQ else from_hlg(signal)
    light = np.maximum(light / WHITE @ TO_BT709.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    light *= compressed(brightest) / brightest                              # one factor for r, g, b keeps the hue
    return (255 * light.clip(0, 1) ** (1 / 2.4)).round().astype(np.uint8)   # the screen's gamma, ITU-R BT.1886


def from_pq(signal):
    """PQ signal -> light in cd/m2: the EOTF of SMPTE ST 2084."""
    power = signal ** (1 / 78.84375)
    return 10000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def from_hlg(signal):
    """HLG signal -> light in cd/m2 of a screen of 1000 cd/m2: inverse OETF of ITU-R BT.2100, then its gamma of 1.2.

    The gamma is applied to r, g, b each, as zscale does. BT.2100 applies it to the luminance; greys are the same.
    """
    scene = np.where(signal <= 0.5, signal ** 2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return 1000 * scene ** 1.2


def compressed(light):
    """Tone curve: the Moebius function that touches y = x at KNEE and maps PEAK to 1."""
    over, most = ((x - KNEE) / (1 - KNEE) for x in (light, PEAK))
    return np.where(over <= 0, light, KNEE + (1 - KNEE) * over / (1 + over * (1 - 1 / most)))
