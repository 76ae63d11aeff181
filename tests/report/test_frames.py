"""The report's pictures are what the model sees: turned clips and images, late starts, covers, 16-bit depth."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dppo_mcore.data.decode_pyav import PyAvDecoder
from dppo_mcore.data.images import read_image
from dppo_mcore.data.probe import probe
from dppo_mcore.practice.ledger import Ledger
from dppo_mcore.report import frames
from dppo_mcore.report.blocks import Limits, sample_blocks
from dppo_mcore.report.frames import clip_frames, frames_of, image_picture
from dppo_mcore.report.read import open_run
from dppo_mcore.types import Media, Sample, Turn
from tests.data.clips import picture, read_number, write_clip


def pixels(jpeg: str) -> torch.Tensor:
    """[3, h, w] of a picture."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(jpeg))))).permute(2, 0, 1)


def assert_seen(path: Path, strip: list[tuple[float, str]]) -> None:
    """Each picture is the trainer's frame of its time."""
    info = probe(str(path))
    for second, jpeg in strip:
        picture_CHW = pixels(jpeg)
        number = int(np.abs(info.times - second).argmin())
        size = (picture_CHW.shape[1], picture_CHW.shape[2])
        seen_CHW = PyAvDecoder().decode(str(path), (number,), size, info.rotation)[0]
        assert (picture_CHW.float() - seen_CHW.float()).abs().mean() < 8


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "mp4"), ("vp9", "mkv"), ("mjpeg", "mov")])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_turned_clip_stands_upright(codec: str, suffix: str, rotation: int, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"x.{suffix}", codec, size=(64, 96), rotation=rotation)
    strip = clip_frames(str(path), None, None)
    assert len(strip) == 8
    assert pixels(strip[0][1]).shape[1:] == ((96, 64) if rotation in (90, 270) else (64, 96))
    assert_seen(path, strip)


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    """A recording whose clock stands at an hour when it begins."""
    path = write_clip(tmp_path / "x.ts", "h264", muxer={"output_ts_offset": "3600"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time * container.streams.video[0].time_base > 3599
    strip = clip_frames(str(path), None, None)
    assert [read_number(pixels(jpeg)) for _, jpeg in strip] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert [second for second, _ in strip] == pytest.approx([number / 8 for number in range(2, 40, 5)], abs=0.01)
    window = clip_frames(str(path), 1.0, 2.0, count=4)
    assert [read_number(pixels(jpeg)) for _, jpeg in window] == [9, 11, 13, 15]


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp8", "mpeg4"])
def test_a_late_window_of_a_long_clip(codec: str, tmp_path: Path) -> None:
    """Groups of pictures before it aren't decoded where they can be told apart; a slow clip repeats no frame."""
    path = write_clip(tmp_path / "x.mkv", codec, frames=200)
    strip = clip_frames(str(path), 20.0, 22.0, count=4)
    assert [read_number(pixels(jpeg)) for _, jpeg in strip] == [162, 166, 170, 174]
    assert_seen(path, strip)
    assert len(clip_frames(str(path), 10.0, 10.25, count=8)) == 2


def test_a_clip_of_intra_refresh(tmp_path: Path) -> None:
    """It is decoded from its beginning: what the container calls key frames can't be started at."""
    options = {"preset": "ultrafast", "g": "8", "x264-params": "intra-refresh=1:bframes=0:keyint=8:min-keyint=8"}
    path = write_clip(tmp_path / "x.mp4", options=options)
    strip = clip_frames(str(path), 3.0, 4.0, count=2)
    assert [read_number(pixels(jpeg)) for _, jpeg in strip] == [26, 30]
    assert_seen(path, strip)


def write_covered(path: Path) -> None:
    """A clip with a white cover, which its header names before the clip itself."""
    with av.open(str(path), "w") as container:
        clip = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        clip.width, clip.height, clip.pix_fmt = 64, 64, "yuv420p"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        white = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
        for packet in (*cover.encode(white), *cover.encode()):
            container.mux(packet)
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(picture(number, 64, 64), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(clip.encode(frame))
        container.mux(clip.encode())
    content = path.read_bytes()
    at = content.index(b"moov") - 4
    end = at + struct.unpack_from(">I", content, at)[0]
    boxes, place = [], at + 8
    while place < end:
        size = struct.unpack_from(">I", content, place)[0]
        boxes.append(content[place : place + size])
        place += size
    boxes.sort(key=lambda box: (b"mvhd", b"udta", b"trak").index(box[4:8]))
    path.write_bytes(content[: at + 8] + b"".join(boxes) + content[end:])


def test_a_cover_is_not_the_clip(tmp_path: Path) -> None:
    write_covered(tmp_path / "x.mp4")
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    strip = clip_frames(str(tmp_path / "x.mp4"), None, None)
    assert [read_number(pixels(jpeg)) for _, jpeg in strip] == [1, 3, 5, 7, 9, 11, 13, 15]


def test_images_are_upright_and_depth_keeps_its_shades(tmp_path: Path) -> None:
    turned, depth = tmp_path / "turned.jpg", tmp_path / "depth.png"
    image, exif = Image.new("RGB", (96, 64)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 48, 64))
    exif[0x0112] = 6
    image.save(turned, exif=exif)
    Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)).save(depth)
    for path in (turned, depth, tmp_path / "transparent.png"):
        if not path.exists():
            Image.new("RGBA", (64, 64), (250, 10, 10, 128)).save(path)
        shown_CHW = torch.from_numpy(np.array(image_picture(str(path)))).permute(2, 0, 1)
        assert torch.equal(shown_CHW, read_image(str(path))[0])
    assert image_picture(str(turned)).size == (64, 96)


def test_a_medium_that_cannot_be_read_leaves_the_others_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, no clip, floating-point depth, an empty window, and what no reader's author thought of."""
    good = write_clip(tmp_path / "good.mp4", "h264")
    (tmp_path / "text.mp4").write_text("no clip")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tiff")
    write_clip(tmp_path / "strange.mp4", "h264")
    media = [Media("video", str(tmp_path / name)) for name in ("none.mp4", "text.mp4", "strange.mp4", "good.mp4")]
    media += [Media("image", str(tmp_path / "float.tiff")), Media("video", str(good), 90.0, 91.0)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_samples([Sample("a", "exact", (Turn("user", "?"),), tuple(media))], "eval")
        ledger.connection.execute("INSERT INTO success VALUES (1, 0, 1, 1, 1)")
        ledger.connection.execute("INSERT INTO phases (key, name, loop, kind) VALUES (1, '1-1 RL', 1, 'rl')")

    def stumble(path: str) -> Any:
        if "strange" in path:
            raise RuntimeError("not foreseen")
        return probe(path)

    monkeypatch.setattr(frames, "probe", stumble)
    run = open_run(tmp_path)
    found, note = frames_of(run, sample_blocks(run, Limits()), Limits())
    run.close()
    assert [len(strip) for strip in found[0]] == [0, 0, 0, 8, 0, 0]
    assert note == "5 clips or images couldn't be read"


def test_a_report_needs_no_torch() -> None:
    code = "import dppo_mcore.report.__main__, json, sys; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
