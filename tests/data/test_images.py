"""Images of every mode and turn, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dppo_mcore.config import DataConfig
from dppo_mcore.data.decode import decode_image
from dppo_mcore.data.errors import MediaError
from dppo_mcore.data.frames import plan_media
from dppo_mcore.data.patches import Geometry
from dppo_mcore.types import FramePlan, Media


def plan(path: Path) -> FramePlan:
    """Plan of an image."""
    return plan_media(Media("image", str(path)), DataConfig(), None, Geometry())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_modes(mode: str, tmp_path: Path) -> None:
    """All become three channels."""
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (70, 90), (250, 10, 10)).convert(mode).save(path)
    found = plan(path)
    assert (found.size, found.grid, found.seconds_per_grid) == ((84, 56), (1, 6, 4), None)
    assert decode_image(found).shape == (1, 3, 84, 56)


def test_exif_turns_the_image(tmp_path: Path) -> None:
    """A picture taken with the camera on its side stands upright, in plan and pixels."""
    image = Image.new("RGB", (112, 56))
    image.paste((255, 255, 255), (0, 0, 56, 56))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    found = plan(tmp_path / "x.png")
    assert found.size == (112, 56)
    pixels = decode_image(found)[0].float()
    assert pixels[:, :40].mean() > 250 and pixels[:, 72:].mean() < 5


def test_damaged_images_are_named(tmp_path: Path) -> None:
    """Missing, empty, no image, cut in half, absurdly long."""
    noise = torch.randint(0, 256, (300, 300, 3), dtype=torch.uint8).numpy()
    good = tmp_path / "good.png"
    Image.fromarray(noise).save(good)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:40000])
    Image.new("RGB", (3000, 10)).save(tmp_path / "long.png")
    for name, reason in (
        ("none", "missing file"),
        ("empty", "zero bytes"),
        ("text", "not an image"),
        ("long", "unusable frame size"),
    ):
        with pytest.raises(MediaError, match=reason):
            plan(tmp_path / f"{name}.png")
    with pytest.raises(MediaError, match="half.png: .*truncated"):
        decode_image(plan(tmp_path / "half.png"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_range(suffix: str, tmp_path: Path) -> None:
    """A depth map's upper eight bits are what is seen, not 255 wherever it is above 255."""
    ramp = np.linspace(0, 65535, 56 * 56).astype(np.uint16).reshape(56, 56)
    Image.fromarray(ramp).save(tmp_path / f"x.{suffix}")
    pixels = decode_image(plan(tmp_path / f"x.{suffix}"))
    assert torch.equal(pixels[0, 0], torch.from_numpy((ramp >> 8).astype(np.uint8)))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(MediaError, match="no known range"):
        decode_image(plan(tmp_path / "float.tif"))


def test_an_animation_shows_its_first_picture(tmp_path: Path) -> None:
    """Given as an image, a GIF is one."""
    first, second = Image.new("RGB", (56, 56), (255, 0, 0)), Image.new("RGB", (56, 56), (0, 0, 255))
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    assert decode_image(plan(tmp_path / "x.gif"))[0, :, 5, 5].tolist() == [255, 0, 0]


def test_only_pictures_are_opened(tmp_path: Path) -> None:
    """EPS is a program, which Pillow would give to Ghostscript, whatever the file is called."""
    picture = Image.new("RGB", (56, 56), (250, 10, 10))
    picture.save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "EPS"
    with pytest.raises(MediaError, match="wrong kind of file .not an image"):
        plan(tmp_path / "x.png")
    picture.save(tmp_path / "x.mpo", save_all=True, append_images=[picture])
    for form in ("JPEG", "WEBP", "GIF", "BMP", "TIFF", "PNG"):
        picture.save(tmp_path / f"x.{form}", format=form)
    for path in tmp_path.glob("x.[!p]*"):
        assert plan(path).size == (56, 56)


def test_too_many_pixels_are_named(tmp_path: Path) -> None:
    """Pillow's bound against decompression bombs costs the sample, not the run."""
    Image.new("1", (14000, 14000)).save(tmp_path / "x.png")
    with pytest.raises(MediaError, match="not a media file .*decompression bomb"):
        plan(tmp_path / "x.png")


def test_random_damage_is_named(tmp_path: Path) -> None:
    """Whatever bytes are flipped in a header: pixels or a refusal, never another exception."""
    chance = np.random.default_rng(0)
    noise = Image.fromarray(chance.integers(0, 255, (50, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        noise.save(tmp_path / f"x.{suffix}", **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
        content = (tmp_path / f"x.{suffix}").read_bytes()
        for _ in range(60):
            bad = bytearray(content)
            for at in chance.integers(0, min(len(bad), 300), 3):
                bad[at] = chance.integers(256)
            (tmp_path / f"bad.{suffix}").write_bytes(bad)
            try:
                decode_image(plan(tmp_path / f"bad.{suffix}"))
            except MediaError as error:
                assert error.reason
