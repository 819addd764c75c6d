"""Videos, read by PyAV as a player shows them: upright, square pixels, standard range, frames at their own times."""
import warnings
from contextlib import contextmanager
from itertools import islice

import av
import numpy as np
from av.stream import Disposition
from PIL import Image
from tqdm import tqdm

from tinytav.errors import InputError
from tinytav.files import colour
from tinytav.files.clips import FOLDER_FPS, MOST_PIXELS, Reader, check_pixels, on_white

# FFmpeg's readers that may start. None of them opens other files, as those of playlists do.
DEMUXERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,obu,ivf,flv,ogg,asf,mxf,dv,nut,mp3,flac,wav,aac"
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}     # FFmpeg's own decoders of these leave transparency out
UNSPECIFIED, BT709, BT601, BT2020 = 2, 1, 6, 9          # matrices between YCbCr and RGB, by the numbers of ITU-T H.273


class Video(Reader):
    """A video file. Its frames are counted without decoding them, and decoding ends with the last wanted one."""

    known = None                # clock()'s answer

    def clock(self):
        if self.known is None:
            with opened(self.path) as (container, stream):
                stamps = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
                self.known = clock(stamps, stream)
        return self.known

    def recount(self):
        """Makes clock() that of the frames that can be decoded, and warns of damage. Raises InputError if none can."""
        announced = self.count()
        with opened(self.path) as (container, stream):
            self.known = clock([frame.pts for frame in self.frames(container, stream)], stream)
        lost = announced - len(self.known[0])
        if lost == announced:
            raise InputError(f"{self.path} cannot be read as a video: no frame can be decoded.")
        if self.damaged and lost > 0:
            self.warn_of_damage(lost, announced)

    def pictures(self, indices):
        end = indices[-1] + 1
        with opened(self.path) as (container, stream):
            frames = islice(self.frames(container, stream), end)
            for i, frame in enumerate(tqdm(frames, "reading", end, unit="frame", delay=2, leave=False)):
                if i in indices:
                    yield self.picture(frame, stream)

    def frames(self, container, stream):
        """Yields decoded frames in the order in which they are shown; those that cannot be decoded are missing."""
        decoder = stream.codec_context
        if "1" in (stream.metadata.get("alpha_mode"), stream.metadata.get("ALPHA_MODE")) and decoder.name in WITH_ALPHA:
            decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")
        decoder.thread_type = "AUTO"
        decoder.options = {"max_pixels": str(MOST_PIXELS)}                  # a stream may change its size
        for packet in container.demux(stream):
            try:
                yield from decoder.decode(packet)
            except av.FFmpegError:
                self.damaged = True

    def picture(self, frame, stream):
        """A decoded frame -> RGB PIL picture, as a player shows it."""
        transfer = stream.codec_context.color_trc
        is_hdr = transfer in (colour.PQ, colour.HLG)
        has_alpha = any(component.is_alpha for component in frame.format.components)
        if frame.colorspace == UNSPECIFIED:         # then Chromium and mpv suppose a matrix by the size
            is_large = frame.width >= 1280 or frame.height > 576
            frame.colorspace = BT2020 if is_hdr else BT709 if is_large else BT601
        pixels = frame.to_ndarray(format="rgb48le" if is_hdr else "rgba" if has_alpha else "rgb24",
                                  interpolation=colour.ACCURATE)
        if is_hdr:
            warnings.warn(f"{self.path} has a high dynamic range. It is converted to standard range.")
            pixels = colour.to_standard(pixels / np.float32(65535), transfer)
        if frame.interlaced_frame:
            warnings.warn(f"{self.path} is interlaced: every second row is of another moment. Those rows are left out.")
            pixels = pixels[::2]
        picture = on_white(Image.fromarray(pixels))
        return upright(picture.resize(shown_size(frame, stream, self.path), Image.Resampling.LANCZOS), frame)


@contextmanager
def opened(path):
    """The context in which a video is open: (container, the stream that a player shows). Raises InputError."""
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:                                            # "file:" because a name such as 12:30.mp4 looks like a protocol
        with av.open(f"file:{path}", metadata_errors="replace", container_options=options) as container:
            streams = [video for video in container.streams.video
                       if video.codec_context and not video.disposition & Disposition.attached_pic]
            if not streams:
                raise InputError(f"{path} cannot be read as a video: it has no video stream that can be decoded.")
            stream = min(streams, key=lambda video: not video.disposition & Disposition.default)
            shown_size(stream, stream, path)
            yield container, stream
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be read as a video: {error.strerror}.") from None


def clock(stamps, stream):
    """Time stamps of a stream's frames -> (their times in seconds, frames a second)."""
    rate = stream.average_rate or stream.guessed_rate or FOLDER_FPS
    if None in stamps or len(set(stamps)) < len(stamps):                    # a bare stream, or a broken one
        return [i / rate for i in range(len(stamps))], rate
    stamps = sorted(stamps)
    times = [(stamp - stamps[0]) * stream.time_base for stamp in stamps]
    measured = (len(times) - 1) / times[-1] if len(times) > 1 else rate
    return times, rate if abs(rate / measured - 1) < 0.02 else measured     # the rate is without the stamps' rounding


def shown_size(frame, stream, path):
    """(width, height) at which frames are shown: their pixels need not be square. Raises InputError if too large."""
    width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
    check_pixels(width, frame.height, path)
    return width, frame.height


def upright(picture, frame):
    """Turns and mirrors a picture as the frame's display matrix says: x' = a x + c y, y' = b x + d y."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:                              # a kind of side data that PyAV cannot name hides all others
        return picture.rotate(frame.rotation, expand=True)
    if found is None:
        return picture
    a, b, _, c, d = np.frombuffer(found, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else picture
