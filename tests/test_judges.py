"""The judges: windows' borders, and the paper's own metrics with stand-ins for the networks that it uses."""

import numpy as np
import pytest
from PIL import Image
from stand_ins import make_stand_ins

from evaluation.judges import Made, PhotoJudge, for_inception
from evaluation.readers import true_render


def test_borders_are_where_windows_begin_and_end():
    image, base = np.zeros((256, 512, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)
    made = Made("", 0, image, base, stride=0.75, window=(64, 128))
    rows, columns = made.borders
    assert rows == [0, 48, 64, 96, 112, 144, 160, 192, 208, 256]
    assert columns == [0, 96, 128, 192, 224, 288, 320, 384, 416, 512]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    make_stand_ins(folder)
    return folder


@pytest.fixture(scope="module")
def judge(networks):
    return PhotoJudge(networks / "inception.pt", networks / "clip", networks / "real", (128, 128))


@pytest.fixture(scope="module")
def images():
    return [true_render(6, index)[1] for index in range(8)]


@pytest.fixture(scope="module")
def real(judge):
    return judge.of_true(0, (512, 512))


def metrics_of(judge, real, images):
    captions = ["one red ring"] * len(images)
    made = [Made(captions[i], i, image, image[::4, ::4], 0.5, (128, 128)) for i, image in enumerate(images)]
    records = [judge.of_picture(own) for own in made]
    stacked = {name: np.stack([record[name] for record in records]) for name in records[0]}
    return judge.statistics(captions, stacked, {}, real)


def test_the_papers_metrics(judge, real, images):
    index = np.arange(8)
    good = metrics_of(judge, real, images)
    assert set(good) == {"FID", "IS", "crop FID", "crop IS", "CLIP"}
    assert all(np.isfinite(statistic(index)) for statistic in good.values())
    tinted = metrics_of(judge, real, [(image * (1, 0.1, 0.1)).astype(np.uint8) for image in images])
    same = metrics_of(judge, real, [images[0]] * 8)
    for prefix in ("", "crop "):
        assert tinted[f"{prefix}FID"](index) > 1.5 * good[f"{prefix}FID"](index)
        assert same[f"{prefix}IS"](index) < good[f"{prefix}IS"](index)
    assert same["IS"](index) == pytest.approx(1, abs=1e-6)


def test_they_are_those_of_clean_fid_and_torch_fidelity(networks, tmp_path):
    """clean-fid 0.1.35 in its mode "clean", torch-fidelity 0.4.0 with isc_splits=1, of the same pictures and network."""
    (tmp_path / "real").mkdir()
    for index in range(40):
        Image.fromarray(true_render(5, index)[1]).save(tmp_path / "real" / f"{index:03}.png")
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 25, (512, 512, 1)) for _ in range(24)]
    images = [np.clip(true_render(6, index)[1] + own, 0, 255).astype(np.uint8) for index, own in enumerate(noise)]
    judge = PhotoJudge(networks / "inception.pt", networks / "clip", tmp_path / "real", (256, 256))
    found = metrics_of(judge, judge.of_true(0, (512, 512)), images)
    expected = {"FID": 1.0525055, "crop FID": 1.1879694, "IS": 1.4306383}
    assert {name: found[name](np.arange(24)) for name in expected} == pytest.approx(expected, rel=1e-3)
    shown = [[43.03661, 162.93292, 64.72750], [37.82221, 148.54321, 57.31193], [24.28519, 80.14703, 32.52786]]
    assert for_inception(images[0])[100, 100:103] == pytest.approx(np.array(shown), abs=0.02)


def test_crops_are_of_the_bases_size_side_by_side(judge):
    image = np.arange(300 * 256 * 3, dtype=np.uint32).reshape(300, 256, 3).astype(np.uint8)
    crops = judge.crops(image)
    assert [crop.shape for crop in crops] == [(128, 128, 3)] * 4
    assert np.array_equal(crops[3], image[128:256, 128:256])


def test_real_images_smaller_than_a_crop_are_enlarged(networks, monkeypatch):
    judge, seen = PhotoJudge(networks / "inception.pt", networks / "clip", networks / "real", (256, 300)), []
    features = judge.features
    monkeypatch.setattr(judge, "features", lambda images: seen.append([x.shape for x in images]) or features(images))
    judge.of_true(0, (512, 600))
    assert seen == [[(160, 200, 3)]] * 12 + [[(256, 300, 3)]] * 12


def test_a_folder_without_images_is_refused(networks, tmp_path):
    with pytest.raises(ValueError, match="no real images"):
        PhotoJudge(networks / "inception.pt", networks / "clip", tmp_path, (128, 128))
