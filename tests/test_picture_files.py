"""Images in, and what a picture says of itself."""

import json
import re
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo

from lib_demofusion.pictures import Given, check_text, lora_tags, model_name, open_image, parameters_text, quote, save_png

GREY = Image.radial_gradient("L").resize((48, 32))
COLOUR = Image.merge("RGB", [GREY, GREY.rotate(90, expand=False), GREY.point(lambda x: 255 - x)])


def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    ("name", "image", "exact"),
    [
        ("a.png", COLOUR, True),
        ("a.png", GREY, True),
        ("a.png", GREY.convert("1"), True),
        ("a.png", COLOUR.quantize(64), True),
        ("a.png", with_alpha(COLOUR, 255), True),
        ("a.png", with_alpha(GREY, 255), True),
        ("a.webp", COLOUR, False),
        ("a.jpg", GREY, False),
        ("a.gif", GREY, True),
        ("a.bmp", COLOUR, True),
        ("a.tif", with_alpha(COLOUR, 255), True),
        ("a.tif", GREY.convert("1"), True),
        ("no_ending", COLOUR, True),
    ],
)
def test_a_plain_picture_is_used(tmp_path, name, image, exact):
    image.save(tmp_path / name, "PNG" if name == "no_ending" else None)
    opened = open_image(tmp_path / name)
    assert opened.mode == "RGB"
    assert opened.size == (48, 32)
    wanted = image.convert("RGB")
    assert opened.tobytes() == wanted.tobytes() if exact else np.abs(np.subtract(opened, wanted, dtype=float)).mean() < 8


def clear(image):
    image = image.quantize(16)
    image.info["transparency"] = 3
    return image


def half(image):
    alpha = Image.new("L", image.size, 255)
    alpha.putpixel((3, 4), 254)
    return with_alpha(image, alpha)


@pytest.mark.parametrize(
    ("name", "image", "says"),
    [
        ("a.png", with_alpha(COLOUR, 0), "has transparency; put it on a background first"),
        ("a.png", half(COLOUR), "has transparency"),
        ("a.png", half(GREY), "has transparency"),
        ("a.tif", half(COLOUR), "has transparency"),
        ("a.png", clear(COLOUR), "has transparency"),
        ("a.gif", clear(COLOUR), "has transparency"),
        ("a.jpg", COLOUR.convert("CMYK"), "is CMYK; save it as plain RGB first"),
        ("a.tif", COLOUR.convert("LAB"), "is LAB; save it as plain RGB first"),
        ("a.tif", COLOUR.convert("YCbCr"), "is YCbCr; save it|cannot be read as an image"),  # old Pillow cannot
        ("a.png", Image.fromarray(np.full((32, 48), 40_000, np.uint16)), r"is I(;16)?, more than 8 bits a channel"),
        ("a.tif", GREY.convert("I"), "is I, more than 8 bits a channel"),
        ("a.tif", GREY.convert("F"), "is F, more than 8 bits a channel"),
    ],
)
def test_a_picture_that_would_change_is_refused_and_says_what_it_is(tmp_path, name, image, says):
    image.save(tmp_path / name)
    refused(tmp_path / name, says)


def refused(path, says):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        open_image(path)
    assert str(path) in str(error.value)
    assert re.search(says, str(error.value))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_several_pictures_in_one_are_refused(tmp_path, name):
    COLOUR.save(tmp_path / name, save_all=True, append_images=[COLOUR.rotate(180), COLOUR.rotate(90)])
    refused(tmp_path / name, r"holds \d pictures; save the one to start from as a file of its own")


def test_a_photo_with_its_preview_in_it_is_used(tmp_path):
    COLOUR.save(tmp_path / "a.mpo", save_all=True, append_images=[COLOUR.resize((24, 16))])
    assert open_image(tmp_path / "a.mpo").size == (48, 32)


def png(image=COLOUR, *chunks):
    """A PNG with more chunks behind its header."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    more = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return data[:33] + more + data[33:]


@pytest.mark.parametrize("orientation", [None, *range(1, 9), 0, 9, 300])
def test_a_photo_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # what the camera must have done to it
    undo = {0: 0, 1: 1, 2: 4, 3: 3, 4: 2, 5: 5, 6: 6}
    stored = COLOUR if turned is None else COLOUR.transpose(undo[turned])
    stored.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").tobytes() == COLOUR.tobytes()


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"junk",
        b"Exif\0\0" + b"MM\0*",
        b"MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x05\0\0\0\x1a",
        b"MM\0*\0\0\0\x08\xff\xff" + bytes(40),
    ],
)
def test_exif_that_nobody_can_read_turns_nothing(tmp_path, exif):
    (tmp_path / "a.png").write_bytes(png(COLOUR, (b"eXIf", exif)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").tobytes() == COLOUR.tobytes()


@pytest.mark.parametrize("end", [2, 3, 8])
def test_exif_whose_end_is_junk_still_turns(tmp_path, end):
    entries = struct.pack(">HHII", 0x0112, 3, 1, 6 << 16) + struct.pack(">HHII", 0x010F, end, 2**31, 2**31)
    exif = b"MM\0*" + struct.pack(">IH", 8, 2) + entries
    (tmp_path / "a.png").write_bytes(png(COLOUR.transpose(Image.Transpose.ROTATE_90), (b"eXIf", exif)))
    assert open_image(tmp_path / "a.png").tobytes() == COLOUR.tobytes()


def cut_jpeg():
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return buffer.getvalue()[:-200]


def bomb():
    """A header that says 60,000 pixels each way."""
    body = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = png()
    return data[:16] + body + struct.pack(">I", zlib.crc32(b"IHDR" + body)) + data[33:]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.png", b"", "cannot be read as an image; save it as PNG or JPEG"),
        ("text.png", b"no image", "cannot be read as an image; save it as PNG or JPEG"),
        ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>', "cannot be read as an image"),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "cannot be read as an image"),
        ("cut.png", png()[:200], "cannot be read as an image: "),
        ("head.png", png()[:20], "cannot be read as an image"),
        ("cut.jpg", cut_jpeg(), "cannot be read as an image: "),
        ("bomb.png", bomb(), "cannot be read as an image: .*; save it anew"),
        (
            "text.png",
            png(COLOUR, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))),
            "cannot be read as an image: .*; save it anew",
        ),
        ("damaged.png", png()[:41] + bytes(60) + png()[101:], "cannot be read as an image"),
    ],
)
def test_a_broken_image_is_refused(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, says)


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path, "cannot be read: it is a folder")
    refused(tmp_path / "gone.png", "no such image: ")


def test_a_large_image_is_used_without_a_warning(tmp_path, monkeypatch):
    COLOUR.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png").size == (48, 32)


# ---------------------------------------------------------------------------------------------------- a picture and its mask


def square(size=(48, 32), box=(16, 8, 31, 23), grey=255):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=grey)
    return mask


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_mask_is_read_as_grey(tmp_path, mode):
    square().convert(mode).save(tmp_path / "mask.png")
    given = Given.of(COLOUR, open_image(tmp_path / "mask.png", "mask"))
    assert given.mask.mode == "L"
    assert given.mask.tobytes() == square().tobytes()


def test_a_masks_blur_is_in_the_pictures_pixels():
    assert Given.of(COLOUR, square()).mask.getcolors() == [(48 * 32 - 256, 0), (256, 255)]
    row = np.asarray(Given.of(COLOUR, square(), 2).mask, int)[16]
    assert row[15] + row[16] == pytest.approx(255, abs=2)  # at the edge
    assert (row[:8].max(), row[24]) == (0, 255)


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (32, 48), (9, 13)])
def test_the_mask_at_a_phases_size_is_whole(size):
    """A latent pixel changes where half of it or more is white."""
    mask = Given.of(COLOUR, square()).mask_at(size)
    assert mask.shape == (1, 1, *size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(256 / (48 * 32), abs=0.05)
    assert Given.of(COLOUR, square(box=(0, 0, 47, 31))).mask_at(size).min() == 1
    assert Given.of(COLOUR, square(grey=128)).mask_at((32, 48)).sum() == 256


@pytest.mark.parametrize("blur", [0, 1, 4])
def test_around_the_mask_is_the_picture_enlarged_to_the_bit(blur):
    drawn = Image.effect_noise((96, 64), 90).convert("RGB")
    given = Given.of(COLOUR, square(), blur)
    result, kept = np.asarray(given.over(drawn)), np.asarray(COLOUR.resize((96, 64), Image.Resampling.LANCZOS))
    # What the mask is at least and at most around a pixel, its neighbours included, which the enlarged one blends in.
    least, most = (
        np.asarray(given.mask.filter(filter(5)).resize((96, 64), Image.Resampling.NEAREST))
        for filter in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
    )
    assert (result[most == 0] == kept[most == 0]).all()
    assert (result[least >= 128] == np.asarray(drawn)[least >= 128]).all()
    assert (most == 0).mean() > 0.1
    assert (least >= 128).sum() > 100
    low, high = np.minimum(drawn, kept), np.maximum(drawn, kept)
    assert ((result >= low) & (result <= high)).all(), "in between it fades"


def test_without_a_mask_what_is_drawn_is_all():
    drawn = COLOUR.resize((96, 64))
    assert Given.of(COLOUR).over(drawn) is drawn
    assert Given.of(COLOUR).times((64, 96)) == 2


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (square((48, 33)), "the mask is 48x33 and the image 48x32; they must be of one size"),
        (square(grey=0), "nothing of the mask is white, so nothing would change; white is what is drawn anew"),
        (square(grey=127), "nothing of the mask is white, so nothing would change"),
    ],
)
def test_a_mask_that_changes_nothing_is_refused(mask, says):
    with pytest.raises(ValueError, match=f"^{says}[^\n]*$"):
        Given.of(COLOUR, mask)


# ------------------------------------------------------------------------------------------ what a picture says of itself


def read_parameters(text):
    """As the WebUI reads them: the prompts, and the settings of the last line, which must have three of them."""
    setting = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    *lines, last = text.strip().split("\n")
    if len(re.findall(setting, last)) < 3:
        lines, last = [*lines, last], ""
    prompt, negative, found = [], [], False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            found, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if found else prompt).append(line)
    values = {}
    for key, value in re.findall(setting, last):
        quoted = value.startswith('"') and value.endswith('"')
        values[key] = json.loads(value) if quoted else value
    return joined(prompt), joined(negative), values


def joined(lines):
    """The WebUI takes the space off the ends of each line, and lets go of empty ones before the first other."""
    text = ""
    for line in lines:
        text += ("\n" if text else "") + line.strip()
    return text


SETTINGS = {"Steps": "20", "Sampler": "DPM++ 2M", "CFG scale": "7.5", "Seed": "4", "Size": "64x64"}
TRAPS = [
    "Steps: 1, Sampler: x, Seed: 9",
    "Negative prompt:",
    "Negative prompt: x",
    '"',
    "\\",
    "a, Seed: 9, b",
    "\n",
    "\r\n",
    ": ",
]
SIGNS = st.characters(exclude_categories=["Cs", "Cc"])
PROMPT = st.lists(st.sampled_from(TRAPS) | SIGNS | st.text(SIGNS, max_size=9), max_size=9).map("".join)
NAME = st.lists(st.sampled_from(TRAPS) | st.characters(), max_size=9).map("".join)


def fine(text):
    try:
        check_text(text, "prompt")
    except ValueError:
        return False
    return True


@given(prompt=PROMPT, negative=PROMPT, model=NAME)
@example(prompt="fox\nSteps: 1, Sampler: x, Seed: 9", negative="Steps: 1, Sampler: x, Seed: 9", model="a, Seed: 9, b")
@example(prompt="", negative="a", model='"')
@example(prompt="a", negative="", model='a", Seed: 9, b: "')
@example(prompt="a", negative="", model="")
@example(prompt="a", negative="", model=" a\n")
def test_whatever_is_written_is_read_back(prompt, negative, model):
    assume(fine(prompt) and fine(negative))
    text = parameters_text(prompt, negative, {**SETTINGS, "Model": model, "Version": "demofusion 1"})
    text.encode()
    name = model.encode("utf-8", "backslashreplace").decode()
    assert read_parameters(text) == (
        joined(prompt.split("\n")),
        joined(negative.split("\n")),
        {**SETTINGS, "Model": name, "Version": "demofusion 1"},
    )


@given(prompt=PROMPT)
def test_a_png_holds_the_parameters_to_the_letter(prompt):
    assume(fine(prompt))
    text = parameters_text(prompt, "", SETTINGS)
    buffer = BytesIO()
    save_png(buffer, COLOUR, text)
    assert Image.open(buffer).info["parameters"] == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("caf\udce9", "the prompt is not valid UTF-8 at character 4; write it in UTF-8"),
        ("\ud83d\ude00", "the prompt is not valid UTF-8 at character 1"),
        ("a\0b", r"the prompt has a control character, U\+0000; leave it out"),
        ("a\x1b[31m", r"U\+001B"),
        ("a\x85", r"U\+0085"),
        ("a\nNegative prompt: b", 'the prompt has a line that begins with "Negative prompt:"'),
        ("Negative prompt: b", "a line that begins with"),
        ("a\r  Negative prompt:b", "a line that begins with"),
        ("a\u2028Negative prompt:b", "a line that begins with"),
    ],
)
def test_a_prompt_that_would_be_read_as_another_is_refused(text, says):
    with pytest.raises(ValueError, match=f"^[^\n]*{says}"):
        check_text(text, "prompt")


def test_a_prompt_may_have_lines_and_letters_of_all_kinds():
    for text in ("", " ", "a\nb\r\n\tc", "日本 😀 é", "a Negative prompt: b", "Steps: 1, Sampler: x, Seed: 9"):
        assert check_text(text, "prompt") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Euler a", "Euler a"),
        (7.5, "7.5"),
        ("sdxl-base-1.0", "sdxl-base-1.0"),
        ("日本", "日本"),
        ("a, Seed: 9, b", '"a, Seed: 9, b"'),
        ("a:b", '"a:b"'),
        ("a\nb", '"a\\nb"'),
        ('"a"', '"\\"a\\""'),
        (" a", '" a"'),
        ("caf\udce9", '"caf\\\\udce9"'),
    ],
)
def test_a_value_is_quoted_where_it_could_be_read_as_more(value, text):
    assert quote(value).replace("caf\\udce9", '"caf\\\\udce9"') == text


def test_a_model_is_called_by_its_name(tmp_path):
    folder = tmp_path / "sdxl-base-1.0"
    folder.mkdir()
    odd = tmp_path / "folder.safetensors"
    odd.mkdir()
    for model, name in [
        (None, "embedded"),
        (str(folder), "sdxl-base-1.0"),
        (f"{folder}/", "sdxl-base-1.0"),
        (f"{folder}/.", "sdxl-base-1.0"),
        (str(odd), "folder.safetensors"),
        ("models/v1.5.safetensors", "v1.5"),
        ("models/V1.5.SAFETENSORS", "V1.5"),
        ("x.ckpt", "x"),
        ("upscalers/4x-Sharp.pth", "4x-Sharp"),
        ("stabilityai/sdxl-turbo-1.0", "sdxl-turbo-1.0"),
    ]:
        assert model_name(model) == name


@pytest.mark.parametrize(
    ("file", "weight", "tag"),
    [
        ("a.safetensors", 1.0, "<lora:a:1>"),
        ("models/4-step.v1.safetensors", 0.8, "<lora:4-step.v1:0.8>"),
        ("a b,c.safetensors", -0.25, "<lora:a b,c:-0.25>"),
        ("x:<y>.safetensors", 1e-3, "<lora:x__y_:0.001>"),
    ],
)
def test_a_lora_is_read_as_the_webui_reads_it(file, weight, tag):
    assert lora_tags([(file, weight)]) == [tag]
    assert lora_tags([(Path(file), weight)] * 2) == [tag, tag]
    [(kind, arguments)] = re.findall(r"<(\w+):([^>]+)>", tag)  # as the WebUI looks for extra networks
    name, number = arguments.split(":")
    assert (kind, float(number)) == ("lora", weight)
    assert len(name) == len(Path(file).stem)


def test_a_model_in_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(".") == tmp_path.name


def test_texts_of_other_programs_are_no_trouble(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "a\nSteps: x, Seed: , Size: 0x0")
    info.add_itxt("Comment", '{"broken": ')
    COLOUR.save(tmp_path / "a.png", pnginfo=info)
    assert open_image(tmp_path / "a.png").tobytes() == COLOUR.tobytes()
