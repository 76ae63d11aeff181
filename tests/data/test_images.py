"""Images of every mode and turn, and damaged ones."""

from __future__ import annotations

from pathlib import Path

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
