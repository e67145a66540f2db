"""Saved phases: what is written is read, and no file is trusted."""

import json
import os

import pytest
import torch
from safetensors.torch import save

from lib_demofusion.saved import SavedPhase, read_json, read_saved


def good(**changed):
    """Phase 2 of a job of the command's, as the tensors and notes of its file."""
    generators = torch.stack([torch.Generator().manual_seed(4).get_state()])
    tensors = dict(latents=torch.rand(1, 4, 16, 20), base=torch.rand(1, 4, 8, 10), generators=generators)
    notes = dict(format="demofusion-phase-1", phase="2", made_by="command", settings="{}")
    for name, value in changed.items():
        (tensors if isinstance(value, torch.Tensor) or name in tensors else notes)[name] = value
    keep = {name: x for name, x in tensors.items() if x is not None}
    return save(keep, {name: x for name, x in notes.items() if x is not None})


def refused(path, data, says):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        read_saved(path, "command")
    assert str(path) in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize("made_by", ["command", "WebUI"])
def test_what_is_written_is_read(tmp_path, made_by):
    state = torch.Generator().manual_seed(4).get_state()
    generators = torch.stack([state, state]) if made_by == "command" else None
    phase = SavedPhase(3, torch.rand(2, 4, 12, 15), torch.rand(2, 4, 4, 5).half(), made_by, generators, '{"a": "é"}')
    phase.write(tmp_path / "x.safetensors")
    again = read_saved(tmp_path / "x.safetensors", made_by)
    assert (again.number, again.made_by, again.settings) == (3, made_by, '{"a": "é"}')
    for name in ("latents", "base", "generators"):
        a, b = getattr(phase, name), getattr(again, name)
        assert a is b is None or torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_phase_of_a_job_from_a_picture_says_so_and_has_a_size_of_its_own(tmp_path):
    state = torch.stack([torch.Generator().get_state()])
    latents, base = torch.rand(1, 4, 60, 80), torch.rand(1, 4, 6, 8)
    SavedPhase(2, latents, base, "command", state, from_picture=True).write(tmp_path / "x.safetensors")
    assert read_saved(tmp_path / "x.safetensors", "command").from_picture
    (tmp_path / "y.safetensors").write_bytes(good())
    assert not read_saved(tmp_path / "y.safetensors", "command").from_picture
    assert SavedPhase(24, latents, base, "WebUI", from_picture=True).number == 24
    for number in (1, 100):
        with pytest.raises(ValueError, match=f"^the phase must be a whole number from 2 to 99, got {number}$"):
            SavedPhase(number, latents, base, "WebUI", from_picture=True)
    with pytest.raises(ValueError, match="^the phase is smaller than its windows$"):
        SavedPhase(2, base, latents, "WebUI", from_picture=True)


@pytest.mark.parametrize(
    ("number", "size", "base"),
    [
        (1, (8, 10), (8, 10)),
        (2, (9, 10), (8, 9)),  # 1.1 times, where it ends
        (2, (16, 20), (8, 10)),
        (3, (20, 25), (8, 10)),  # 2.5
        (3, (32, 40), (8, 10)),  # doubled
        (4, (64, 80), (8, 10)),
        (8, (64, 80), (8, 10)),
    ],
)
def test_sizes_that_a_phase_has(number, size, base):
    assert phase(number, size, base).number == number


def phase(number, size, base):
    return SavedPhase(number, torch.zeros(1, 4, *size), torch.zeros(1, 4, *base), "WebUI")


@pytest.mark.parametrize(
    ("number", "size", "base"),
    [
        (1, (16, 20), (8, 10)),
        (2, (8, 10), (8, 10)),
        (2, (8, 10), (16, 20)),
        (2, (24, 30), (8, 10)),
        (3, (16, 20), (8, 10)),
        (2, (16, 30), (8, 10)),
        (8, (72, 90), (8, 10)),
    ],
)
def test_sizes_that_no_phase_has(number, size, base):
    with pytest.raises(ValueError, match=f"^no phase {number} makes latents of "):
        phase(number, size, base)


def nan(*shape):
    x = torch.zeros(shape)
    x.view(-1)[-1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(format=None), "is no saved phase; one lies beside each image of an intermediate phase"),
        (dict(format="demofusion-phase-2"), "was saved by another version, as demofusion-phase-2"),
        (dict(format="other"), "is no saved phase"),
        (dict(phase=None), "the note phase is missing"),
        (dict(made_by=None), "the note made_by is missing"),
        (dict(settings=None, made_by=None), "the note made_by, settings is missing"),
        (dict(made_by="someone"), "'someone' is no host that saves phases"),
        (dict(made_by="WebUI"), "was made by the WebUI, whose noise the command cannot repeat; go on there"),
        *((dict(phase=phase), "the phase must be a whole number from 1 to 8") for phase in ("0", "9", "-1", "two", "", "2.0")),
        *((dict(phase=phase), "the phase must be a whole number from 1 to 8") for phase in ("²", "２", " 2", "9" * 9999)),
        (dict(phase="3"), "no phase 3 makes latents of 16x20 from 8x10"),
        (dict(latents=None), "the tensor latents is missing"),
        (dict(base=None), "the tensor base is missing"),
        (dict(generators=None), "the generators are missing"),
        (dict(more=torch.zeros(1)), "unknown: more"),
        (
            dict(latents=torch.rand(4, 16, 20)),
            "latents must have four dimensions (images, channels, height, width), got 4x16x20",
        ),
        (dict(base=torch.rand(1)), "base must have four dimensions"),
        (dict(base=torch.tensor(1.0)), "base must have four dimensions (images, channels, height, width), got one number"),
        (dict(latents=torch.rand(0, 4, 16, 20)), "cannot be resumed: "),  # old safetensors read no tensor without numbers
        (dict(latents=torch.rand(2, 4, 16, 20)), "must agree in images and channels, got 2x4 and 1x4"),
        (dict(latents=torch.rand(1, 3, 16, 20)), "must agree in images and channels, got 1x3 and 1x4"),
        (dict(latents=torch.ones(1, 4, 16, 20, dtype=torch.int32)), "latents must be floating point numbers, got int32"),
        (dict(base=torch.ones(1, 4, 8, 10, dtype=torch.bool)), "base must be floating point numbers, got bool"),
        (dict(latents=nan(1, 4, 16, 20)), "latents must be finite"),
        (dict(base=nan(1, 4, 8, 10).half()), "base must be finite"),
        (dict(base=torch.full((1, 4, 8, 10), torch.inf)), "base must be finite"),
        (dict(generators=torch.zeros(5056, dtype=torch.uint8)), "generators must be bytes, a row for each image, got 5056"),
        (
            dict(generators=torch.zeros(2, 5056, dtype=torch.uint8)),
            "generators must be bytes, a row for each image, got 2x5056",
        ),
        (dict(generators=torch.zeros(1, 5056)), "generators must be bytes"),
        (dict(generators=torch.zeros(1, 16, dtype=torch.uint8)), "generators must be states of torch's generator"),
        (dict(generators=torch.full((1, 5056), 255, dtype=torch.uint8)), "generators must be states of torch's generator"),
    ],
)
def test_a_file_that_says_something_wrong_is_refused(tmp_path, changed, says):
    refused(tmp_path / "x.safetensors", good(**changed), says)


def header(text, rest=b""):
    return len(text).to_bytes(8, "little") + text + rest


def twice(data):
    """The same file with its phase said twice."""
    size = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + size].replace(b'"phase":"2"', b'"phase":"2","phase":"1"')
    return header(text, data[8 + size :])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no .safetensors file, or only a part of one"),
        (b"no", "no .safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no .safetensors file"),
        (good()[:100], "no .safetensors file, or only a part of one"),
        (good()[:-1], "its tensors cannot be read"),
        (good() + b"more", "its tensors cannot be read"),
        ((2**63).to_bytes(8, "little") + b"{}", "no .safetensors file"),
        (header(b"[]"), "no .safetensors file"),
        (header(b"{"), "cannot be read"),
        (header(b"{\xff}"), "cannot be read"),
        (header(b'{"a":' + b"[" * 100_000), "cannot be read: "),
        (header(b'{"__metadata__": 1}'), "is no saved phase"),
        (header(b'{"__metadata__": {"format": 1}}'), "is no saved phase"),
        (header(b'{"__metadata__": {"format": null}}'), "is no saved phase"),
        (header(b"{}"), "is no saved phase"),
        (twice(good()), "'phase' is there twice"),
        (good().replace(b'"F32"', b'"F3x"'), "its tensors cannot be read"),
    ],
)
def test_a_file_that_is_broken_is_refused(tmp_path, data, says):
    refused(tmp_path / "x.safetensors", data, says)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    for name, says in [
        ("gone", "no such file to resume from: "),
        ("folder", "it is a folder"),
        ("pipe", "it is no plain file"),
        ("circle", "cannot be read: "),
        ("a" * 300, "cannot be read: "),
        ("a\0", "cannot be read: "),
    ]:
        with pytest.raises(ValueError, match=f"^[^\n]*{says}[^\n]*$"):
            read_saved(tmp_path / name, "command")


def test_a_file_whose_name_is_no_utf8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    path.write_bytes(good())
    assert read_saved(path, "command").number == 2


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', "[Infinity]", "-Infinity", '{"a": 1, "a": 2}', '[{"a": {"b": 1, "b": 1}}]', "{", ""]
)
def test_json_says_one_thing(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_json(text)
    assert read_json(json.dumps({"a": [1, None, "x"]})) == {"a": [1, None, "x"]}
