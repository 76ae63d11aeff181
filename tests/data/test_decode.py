"""Every backend shows the planned frames: seven codecs, constant and variable rates, B-frames, rotation, odd sizes."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from dppo_mcore.config import DataConfig
from dppo_mcore.data import decode_dali
from dppo_mcore.data.decode import Decoder, make_decoder
from dppo_mcore.data.decode_dali import DaliDecoder
from dppo_mcore.data.decode_pyav import PyAvDecoder
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.frames import plan_media
from dppo_mcore.data.patches import Geometry
from dppo_mcore.data.probe import _promised_seconds, probe
from dppo_mcore.types import Media
from tests.data.clips import CODECS, read_number, write_clip

DALI_ON_CPU = ("vp8", "vp9", "mjpeg")
# Gaps of one to seven tenths of a second: no two neighbouring frames are equally long on screen.
UNEVEN = np.concatenate([[0], np.cumsum(np.tile([0.1, 0.4, 0.2, 0.7, 0.1], 8))])[:40].round(3).tolist()
SHAPES = {
    "constant": {},
    "variable": {"times": UNEVEN},
    "rotated": {"rotation": 90, "size": (64, 96)},
    "odd": {"size": (75, 101)},
}


def clip(folder: Path, codec: str, shape: str) -> Path:
    """A numbered clip; VP8 and VP9 are rotated in Matroska, the others in MP4 or MOV."""
    suffix = "mkv" if shape == "rotated" and codec in ("vp8", "vp9") else CODECS[codec].suffix
    return write_clip(folder / f"{codec}-{shape}.{suffix}", codec, **SHAPES[shape])


@pytest.mark.parametrize(("codec", "shape"), itertools.product(CODECS, SHAPES))
def test_planned_frames_are_the_decoded_ones(codec: str, shape: str, tmp_path: Path) -> None:
    """The number a frame shows is its index, its time is the one it was written with, and it stands upright."""
    path = clip(tmp_path, codec, shape)
    data = DataConfig(fps=2, min_pixels=784, max_pixels=602112)
    plan = plan_media(Media("video", str(path)), data, None, Geometry())
    times = SHAPES[shape].get("times") or [n / 8 for n in range(40)]
    assert plan.times == pytest.approx([times[index] for index in plan.indices], abs=1.1e-3)
    backends = [PyAvDecoder()] + ([DaliDecoder(torch.device("cpu"))] if codec in DALI_ON_CPU else [])
    pictures = []
    for backend in backends:
        frames_TCHW = backend.decode(plan.path, plan.indices, plan.size, plan.rotation)
        assert frames_TCHW.shape == (len(plan.indices), 3, *plan.size) and frames_TCHW.dtype == torch.uint8
        pictures.append(frames_TCHW)
        if shape == "rotated":
            assert plan.rotation == 270 and plan.size[0] > plan.size[1]
            frames_TCHW = torch.rot90(frames_TCHW, -1, dims=(-2, -1))
        assert [read_number(frame_CHW) for frame_CHW in frames_TCHW] == list(plan.indices), backend.name
    for other in pictures[1:]:
        assert torch.equal(other, pictures[0])


@pytest.mark.parametrize("codec", CODECS)
def test_skipping_changes_no_pixel(codec: str, tmp_path: Path) -> None:
    """A few scattered frames equal the same frames of the whole clip decoded, repeats and all."""
    path = str(clip(tmp_path, codec, "constant"))
    whole = PyAvDecoder().decode(path, tuple(range(40)), (64, 64))
    for wanted in ((3,), (39,), (0, 17, 17, 30), (5, 6, 25), (26, 27, 38)):
        assert torch.equal(PyAvDecoder().decode(path, wanted, (64, 64)), whole[list(wanted)])


REFRESHED = "intra-refresh=1:bframes=0:keyint=8:min-keyint=8"


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_intra_refresh_has_no_groups_to_skip(suffix: str, tmp_path: Path) -> None:
    """What the container calls key frames only begin a refresh; real ones are known in both framings."""
    options = {"preset": "ultrafast", "g": "8"}
    path = write_clip(tmp_path / f"x.{suffix}", options={**options, "x264-params": REFRESHED})
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) == 5
    assert np.flatnonzero(probe(str(path)).keyframes).tolist() == [0]
    whole = PyAvDecoder().decode(str(path), tuple(range(40)), (64, 64))
    for wanted in ((3,), (20,), (39,), (12, 30)):
        assert torch.equal(PyAvDecoder().decode(str(path), wanted, (64, 64)), whole[list(wanted)])
    info = probe(str(write_clip(tmp_path / f"groups.{suffix}", options=options)))
    assert np.flatnonzero(info.keyframes).tolist() == [0, 8, 16, 24, 32] and info.closed


def test_refused_clips_go_to_the_next_backend_once(tmp_path: Path) -> None:
    """DALI has no h264 on a CPU: PyAV takes it, and both facts are counted."""
    path = clip(tmp_path, "h264", "constant")
    plan = plan_media(Media("video", str(path)), DataConfig(min_pixels=784), None, Geometry())
    decoder = make_decoder("dali", torch.device("cpu"))
    assert [read_number(frame_CHW) for frame_CHW in decoder(plan)] == list(plan.indices)
    assert dict(decoder.counts) == {"decode/dali_refused": 1, "decode/pyav": 1}


def test_dali_goes_on_after_a_bad_clip(tmp_path: Path) -> None:
    """One refusal costs one clip, not the backend."""
    good = str(clip(tmp_path, "vp9", "constant"))
    bad = str(clip(tmp_path, "h264", "constant"))
    backend = DaliDecoder(torch.device("cpu"))
    with pytest.raises(MediaError, match="do not decode"):
        backend.decode(bad, (0, 1), (64, 64))
    assert backend.decode(good, (0, 5), (64, 64)).shape == (2, 3, 64, 64)


def test_dali_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large clip is decoded a bounded number of bytes at a time, to the same pixels."""
    path = str(clip(tmp_path, "vp9", "constant"))
    backend, wanted = DaliDecoder(torch.device("cpu")), (0, 3, 3, 9, 20, 21, 22, 39)
    whole = backend.decode(path, wanted, (28, 56))
    monkeypatch.setattr(decode_dali, "FRAME_BYTES", 3 * 64 * 64 * 3)
    monkeypatch.setattr(decode_dali, "RESIZED_AT_ONCE", 2)
    assert torch.equal(backend.decode(path, wanted, (28, 56)), whole)
    with pytest.raises(MediaError, match="other frames than the plan"):
        backend.decode(path, (0, 40), (28, 56))


def test_dali_does_not_read_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is known before its bytes are in memory; PyAV takes it."""
    path = clip(tmp_path, "vp9", "constant")
    monkeypatch.setattr(decode_dali, "LARGEST_FILE", path.stat().st_size - 1)
    monkeypatch.setattr(np, "fromfile", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(MediaError, match="less than 2 GiB"):
        DaliDecoder(torch.device("cpu")).decode(str(path), (0, 5), (64, 64))


def test_dali_knows_the_device_by_our_name_for_it() -> None:
    """Imperative mode has no device "mixed": a name it doesn't know would send every clip to PyAV unnoticed."""
    import nvidia.dali.experimental.dynamic as ndd

    place = DaliDecoder(torch.device("cuda", 99))._place
    with pytest.raises(ValueError, match="Invalid device id: 99 for device type: gpu"):
        ndd.Device(place)


def hide_a_frame(path: Path, hidden: Path, number: int) -> Path:
    """The same VP8 clip with one frame that is decoded and never shown, as its reference frames often are."""
    with av.open(str(path)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for count, packet in enumerate(source.demux(video=0)):
            if packet.dts is None:
                continue
            content = bytearray(bytes(packet))
            content[0] &= 0xEF if count == number else 0xFF
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    return hidden


def test_clips_that_dali_counts_otherwise_go_to_pyav(tmp_path: Path) -> None:
    """Hidden frames and frames before time zero: each would shift every index behind it."""
    early = [n / 8 - 0.5 for n in range(40)]
    numbers = {
        hide_a_frame(clip(tmp_path, "vp8", "constant"), tmp_path / "hidden.webm", 9): [*range(9), *range(10, 40)],
        write_clip(tmp_path / "early.mkv", "vp9", times=early, muxer={"avoid_negative_ts": "disabled"}): range(40),
    }
    for path, shown in numbers.items():
        assert len(probe(str(path)).times) == len(shown) and not probe(str(path)).countable
        plan = plan_media(Media("video", str(path)), DataConfig(min_pixels=784), None, Geometry())
        decoder = make_decoder("dali", torch.device("cpu"))
        assert [read_number(frame_CHW) for frame_CHW in decoder(plan)] == [shown[index] for index in plan.indices]
        assert dict(decoder.counts) == {"decode/dali_refused": 1, "decode/pyav": 1}


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg4", "mjpeg"])
def test_frames_that_an_edit_list_cuts_off(codec: str, tmp_path: Path) -> None:
    """A clip trimmed without encoding it again is whole, and its first frame is the first one shown."""
    path = write_clip(tmp_path / "edited.mov", codec, times=[n / 8 - 0.5 for n in range(40)])
    plan = plan_media(Media("video", str(path)), DataConfig(min_pixels=784), None, Geometry())
    for name in ("pyav", "dali"):
        frames_TCHW = make_decoder(name, torch.device("cpu"))(plan)
        assert [read_number(frame_CHW) for frame_CHW in frames_TCHW] == [index + 4 for index in plan.indices]


def test_a_clip_that_ends_between_two_frames_is_truncated(tmp_path: Path) -> None:
    """No packet is incomplete, but a third of what the header promises is not there."""
    path = write_clip(tmp_path / "whole.mp4", "mpeg4", streaming=True)
    with av.open(str(path)) as container:
        end = next(packet.pos for number, packet in enumerate(container.demux(video=0)) if number == 26)
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:end])
    with pytest.raises(MediaError, match="truncated .the header says 40 frames, 26 are there"):
        probe(str(tmp_path / "cut.mp4"))


@pytest.mark.parametrize("late", [3.0, 100.0])
def test_a_matroska_clip_that_starts_late_is_whole(late: float, tmp_path: Path) -> None:
    """Its duration tag is the time of its end, as in a segment whose timestamps run on; half of it is truncated."""
    path = write_clip(tmp_path / "late.webm", "vp9", times=[late + n / 8 for n in range(40)])
    with av.open(str(path)) as container:
        assert _promised_seconds(container.streams.video[0]) == pytest.approx(late + 5, abs=0.2)
    info = probe(str(path))
    assert info.times[0] == 0 and info.duration == pytest.approx(5.0, abs=0.01)
    with av.open(str(path)) as container:
        end = next(packet.pos for number, packet in enumerate(container.demux(video=0)) if number == 20)
    (tmp_path / "cut.webm").write_bytes(path.read_bytes()[:end])
    with pytest.raises(MediaError, match="truncated .the header says 5.* s, 2.* s are there"):
        probe(str(tmp_path / "cut.webm"))


LISTED = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:5,\n{}\n#EXT-X-ENDLIST\n",
    "a.mp4": "ffconcat version 1.0\nfile {}\n",
}


@pytest.mark.parametrize("name", LISTED)
def test_a_list_of_clips_is_refused(name: str, tmp_path: Path) -> None:
    """Else it would show what lies outside the media root."""
    write_clip(tmp_path / "elsewhere.ts")
    path = tmp_path / "root" / name
    path.parent.mkdir()
    (path.parent / "inside.ts").symlink_to(tmp_path / "elsewhere.ts")
    path.write_text(LISTED[name].format("../elsewhere.ts" if name == "a.m3u8" else "inside.ts"))
    with av.open(str(path)) as container:
        assert container.format.name in ("hls", "concat")
    with pytest.raises(MediaError, match="not a media file"):
        probe(str(path))
    assert len(probe(str(tmp_path / "elsewhere.ts")).times) == 40


PIXELS = [("h264", "yuv420p10le"), ("hevc", "yuv420p10le"), ("vp9", "yuva420p"), ("h264", "gray"), ("h264", "yuv422p")]


@pytest.mark.parametrize(("codec", "pixels"), PIXELS)
def test_pixel_formats(codec: str, pixels: str, tmp_path: Path) -> None:
    """Ten bits, alpha, grey and fuller chroma all become eight-bit RGB of the right frames."""
    path = write_clip(tmp_path / f"x.{CODECS[codec].suffix}", codec, frames=24, pixels=pixels)
    plan = plan_media(Media("video", str(path)), DataConfig(min_pixels=784), None, Geometry())
    frames_TCHW = make_decoder("dali", torch.device("cpu"))(plan)
    assert [read_number(frame_CHW) for frame_CHW in frames_TCHW] == list(plan.indices)


def test_all_refusals_name_the_file(tmp_path: Path) -> None:
    """The last backend's reason is the clip's."""
    path = clip(tmp_path, "mpeg4", "constant")
    plan = plan_media(Media("video", str(path)), DataConfig(min_pixels=784), None, Geometry())
    path.write_bytes(b"")
    with pytest.raises(MediaError, match=f"{path.name}: zero bytes"):
        Decoder([PyAvDecoder()])(plan)


def test_cover_pictures_are_not_clips(tmp_path: Path) -> None:
    """The probe reports what it can't use by reason."""
    path = tmp_path / "still.mp4"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(path, format="PNG")
    with pytest.raises(MediaError, match="an image"):
        probe(str(path))


@pytest.mark.gpu
@pytest.mark.parametrize(("codec", "shape"), itertools.product(CODECS, SHAPES))
def test_nvdec_shows_the_planned_frames(codec: str, shape: str, tmp_path: Path) -> None:
    """The whole chain on a GPU: whoever takes the clip, its frames are the planned ones, close to the CPU's."""
    path = clip(tmp_path, codec, shape)
    plan = plan_media(Media("video", str(path)), DataConfig(fps=2, min_pixels=784), None, Geometry())
    decoder = make_decoder("auto", torch.device("cuda", 0))
    frames_TCHW = decoder(plan)
    reference_TCHW = PyAvDecoder().decode(plan.path, plan.indices, plan.size, plan.rotation)
    print(codec, shape, dict(decoder.counts), (frames_TCHW.int() - reference_TCHW.int()).abs().float().mean().item())
    if codec in ("h264", "hevc") and shape in ("constant", "variable"):
        assert decoder.counts["decode/dali"] == 1
    if shape == "rotated":
        frames_TCHW = torch.rot90(frames_TCHW, -1, dims=(-2, -1))
    assert [read_number(frame_CHW) for frame_CHW in frames_TCHW] == list(plan.indices)
