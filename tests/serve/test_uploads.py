"""What people upload: every format that is taken, and a sentence for everything that is not an image to use."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from hpcmm.errors import HpcmmError
from hpcmm.serve.options import ServeOptions
from hpcmm.serve.uploads import FORMATS, UnusableImageError, open_upload
from hpcmm.workloads.anomaly.data import images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_format_is_known_by_its_content_and_not_by_its_name(kind, picture, options):
    uploaded = open_upload(picture("image.txt", format=kind), options)
    assert (uploaded.image.mode, uploaded.image.size, uploaded.note) == ("RGB", (64, 48), "")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "1"), ("a.png", "L"), ("a.png", "LA"), ("a.png", "P"), ("a.png", "RGBA"), ("a.jpg", "CMYK"),
     ("a.tif", "CMYK"), ("a.tif", "LAB")],
)  # fmt: skip
def test_every_mode_of_pixels_becomes_rgb(name, mode, picture, options):
    assert open_upload(picture(name, mode), options).image.mode == "RGB"


def test_sixteen_bits_a_pixel_are_scaled_and_not_cut_off(tmp_path, options):
    values = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(open_upload(tmp_path / "deep.png", options).image)[..., 0]
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert 120 < pixels.mean() < 135


def test_values_of_unknown_range_are_refused(picture, options):
    with pytest.raises(UnusableImageError, match="32-bit values"):
        open_upload(picture("a.tif", "F"), options)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_image_is_taken_and_that_is_said(name, tmp_path, options):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    uploaded = open_upload(tmp_path / name, options)
    assert uploaded.note == "The file holds several images; this is the first."
    red, _, blue = uploaded.image.getpixel((5, 5))
    assert red > 200
    assert blue < 60


def test_a_photograph_stands_upright(tmp_path, options):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_upload(tmp_path / "a.jpg", options).image.size == (20, 40)


@pytest.mark.parametrize(
    "content", [b"", b"<svg onload='alert(1)'/>", b"GIF89a" + bytes(40), b"%!PS-Adobe\n", bytes(99)]
)
def test_what_is_no_image_of_these_formats_is_refused_in_one_sentence(content, tmp_path, options):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnusableImageError, match=r"^The file is no PNG, JPEG, BMP, TIFF or WebP image\.$"):
        open_upload(path, options)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"])
def test_a_file_that_is_cut_off_is_refused(name, picture, options):
    path = picture(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnusableImageError):
        open_upload(path, options)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["png", "jpg", "webp", "tif", "bmp"]), data=st.data())
def test_damage_anywhere_gives_an_image_or_the_sentence(kind, data, picture, options):
    path: Path = picture(f"damaged.{kind}")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        assert open_upload(path, options).image.mode == "RGB"
    except UnusableImageError as error:
        assert str(error).endswith(".")


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [2001, 12_000, 100_000])
def test_a_small_file_with_many_pixels_is_refused_before_one_is_decoded(side, tmp_path, options):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side))
    with pytest.raises(UnusableImageError, match=r"At most 4 million pixels are taken"):
        open_upload(path, options)


def test_a_small_file_whose_image_is_many_passes_over_its_pixels_is_refused(picture, options):
    path = picture("scans.jpg", progressive=True)
    content = path.read_bytes()
    last = content[content.rindex(b"\xff\xda") : -2]
    assert open_upload(path, options).image.size == (64, 48)
    path.write_bytes(content[:-2] + 200 * last + b"\xff\xd9")
    with pytest.raises(UnusableImageError, match="in very many pieces"):
        open_upload(path, options)


@pytest.mark.parametrize("options_of_jpeg", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_scans_of_what_a_jpeg_holds_or_precedes_are_not_its_own(options_of_jpeg, picture, options):
    path = picture("motion.jpg", **options_of_jpeg)
    content = path.read_bytes()
    thumbnail = b"\xff\xe1" + struct.pack(">H", 602) + 300 * b"\xff\xda"
    film = b"\0\0\0\x18ftypmp42" + 200 * b"\xff\xda\0\x0c"
    path.write_bytes(content[:2] + thumbnail + content[2:] + film)
    assert open_upload(path, options).image.size == (64, 48)


@pytest.mark.parametrize("before", [b"\xff\x50\xff\xff", b"\xff\x01\xff\xff", b"\xff\xd0\xff\xff", b"\xff\0\xff\xff"])
def test_scans_behind_what_a_decoder_looks_past_are_counted(before, picture, options):
    path = picture("scans.jpg", progressive=True)
    content = path.read_bytes()
    last = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + before + 200 * last + b"\xff\xd9")
    with pytest.raises(UnusableImageError, match=r"in very many pieces.*save it again with another program"):
        open_upload(path, options)


def test_a_small_file_of_very_many_strips_is_refused(tmp_path, options):
    count = 210_000
    shape = [(256, 3, 1, 64), (257, 3, 1, 48), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    strips = [(273, 4, count, 200), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, count, 200)]
    entries = b"".join(struct.pack("<HHII", *entry) for entry in [*shape, *strips])
    head = b"II*\0" + struct.pack("<IH", 8, 9) + entries + struct.pack("<I", 0)
    (tmp_path / "strips.tiff").write_bytes(head.ljust(200, b"\0") + bytes(4 * count))
    with pytest.raises(UnusableImageError, match="in very many pieces"):
        open_upload(tmp_path / "strips.tiff", options)


def test_a_large_file_is_refused(tmp_path, options):
    path = tmp_path / "large.bmp"
    path.write_bytes(b"BM" + bytes(options.max_upload_bytes))
    with pytest.raises(HpcmmError, match=r"2\.0 MB, and at most 2 MB"):
        open_upload(path, options)


def test_a_file_that_has_gone_is_said(tmp_path):
    with pytest.raises(HpcmmError, match="upload it again"):
        open_upload(tmp_path / "gone.png", ServeOptions(run="/runs/small"))


def test_what_is_taken_is_what_a_model_can_be_trained_on():
    assert FORMATS == images.FORMATS
