"""What pictures scored is kept, adds up, and is all that the report is made of."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from tiny import tiny_pipeline

import evaluation.__main__
from evaluation.__main__ import Run, fingerprint, prompt_range, scenes
from evaluation.drawing import TABLES, label
from evaluation.judges import FEATURE, VERSION, Made, SceneJudge
from evaluation.methods import METHODS, Method
from evaluation.metrics import Normal, frechet_distance
from evaluation.readers import small, true_render
from evaluation.scores import BASE, Scores, keep, kept
from training.scenes import render

THREE = {name: METHODS[name] for name in ("DemoFusion", "Fast", "Turbo")}
COUNT = 5
WRITTEN = ("report.md", "report/presets-4x.svg", "report/scores-4x.npz")


class Here:
    """Workers that are this process."""

    def __init__(self, workers, context, starting):
        starting()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    map = staticmethod(map)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setitem(TABLES, "Presets", replace(TABLES["Presets"], methods=THREE, sizes=("4x",)))
    monkeypatch.setattr("evaluation.__main__.TRUE_RENDERS", 40)
    monkeypatch.setattr("evaluation.judges.SceneJudge.draws", 10)
    monkeypatch.setattr("evaluation.__main__.ProcessPoolExecutor", Here)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build folder with pictures and what they cost, as they were kept before there were scores."""
    folder = tmp_path_factory.mktemp("build")
    for index, scene in enumerate(scenes(COUNT)):
        own = folder / "embedded-50" / "4x" / f"{index:04}"
        own.mkdir(parents=True)
        image = Image.fromarray(render(scene, np.random.default_rng(index)).astype(np.uint8)).resize((256, 256))
        pictures = {label(name): image.filter(ImageFilter.GaussianBlur(i)) for i, name in enumerate(THREE)}
        for name, picture in {BASE: image.resize((128, 128), Image.Resampling.BOX), **pictures}.items():
            picture.save(own / f"{name}.png")
            (own / f"{name}.json").write_text(json.dumps([100, 1.5 + index]))
    return folder


@pytest.fixture
def build(built, tmp_path):
    return shutil.copytree(built, tmp_path / "build")


def evaluate(monkeypatch, folder, *options):
    """The report's bytes, by name."""
    monkeypatch.setattr("sys.argv", ["evaluation", "-o", str(folder / "report.md"), *map(str, options)])
    evaluation.__main__.main()
    return {name: (folder / name).read_bytes() for name in WRITTEN if (folder / name).exists()}


def scored(monkeypatch, folder, build, *options):
    return evaluate(monkeypatch, folder, "--tables", "Presets", "--no-draw", "--build", build, *options)


def refused(monkeypatch, capsys, folder, *options):
    """The line that says why."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, folder, *options)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_report_is_made_of_scores_alone(build, tmp_path, monkeypatch, capsys):
    first = scored(monkeypatch, tmp_path / "a", build)
    assert f"{COUNT * 4} pictures are there that this version's judge has not scored" in capsys.readouterr().out
    assert f" {COUNT} prompts, 50 steps".encode() in first["report.md"]
    assert scored(monkeypatch, tmp_path / "b", build) == first, "of the records beside the pictures"
    assert "not scored" not in capsys.readouterr().out, "again"
    assert scored(monkeypatch, tmp_path / "b", build) == first
    assert f"{COUNT * 4} pictures' scores are beside the report: they are not drawn" in capsys.readouterr().out
    shutil.rmtree(build)
    sheet = (tmp_path / "a/report/presets-4x.jpg").read_bytes()
    for name in WRITTEN[:2]:
        (tmp_path / "a" / name).unlink()
    assert evaluate(monkeypatch, tmp_path / "a", "--from-scores") == first
    assert (tmp_path / "a/report/presets-4x.jpg").read_bytes() == sheet, "stays"


def test_two_halves_add_up(build, tmp_path, monkeypatch):
    whole = scored(monkeypatch, tmp_path / "whole", build)
    halves = [tmp_path / name / "report" for name in ("late", "early")]
    for half, prompts in zip(halves, ("2:200", "2")):
        assert scored(monkeypatch, half.parent, build, "--prompts", prompts) != whole
    assert evaluate(monkeypatch, tmp_path / "sum", "--from-scores", *halves) == whole
    sheets = [folder / "presets-4x.jpg" for folder in (tmp_path / "sum/report", halves[1])]
    assert not sheets[0].exists(), "five prompts' pictures are on neither half's sheet"
    late, early = (shutil.copytree(half.parent, tmp_path / f"other {half.parent.name}") for half in halves)
    assert scored(monkeypatch, early, build, "--prompts", "2:5") == whole, "what is beside the report is added to"
    assert evaluate(monkeypatch, late, "--from-scores", halves[1]) == whole


def test_what_has_a_score_is_not_drawn_again(build, tmp_path, monkeypatch):
    whole = scored(monkeypatch, tmp_path, build)
    shutil.rmtree(build)
    drawn = []
    monkeypatch.setattr("evaluation.drawing._job", lambda task: drawn.append(task.index))
    options = ["--tables", "Presets", "--build", build, "--prompts", str(COUNT)]
    assert evaluate(monkeypatch, tmp_path, *options) == whole
    assert not drawn
    asked = evaluation.__main__.parser().parse_args([*map(str, options[:-1]), str(COUNT + 2), "--anew"])
    assert all(task.missing() for task in Run(asked, tmp_path / "report.md").tasks["4x"]), "unless asked for"


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    tiny_pipeline("sd15", 16).save_pretrained(checkpoint)
    calls = []

    def halting(job):
        calls.append(job.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return METHODS["learned upscaler"].run(job)

    methods = {"Lanczos": METHODS["Lanczos"], "DemoFusion": Method(halting)}
    monkeypatch.setitem(TABLES, "Presets", replace(TABLES["Presets"], methods=methods))
    monkeypatch.setattr("evaluation.drawing.all_methods", lambda: methods)
    options = ["--tables", "Presets", "--model", checkpoint, "--steps", "2", "--prompts", "3", "--build", tmp_path / "build"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(monkeypatch, tmp_path, *options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*.*")}
    assert [path.stem for path in sorted(before) if path.suffix == ".png"] == ["DemoFusion", "Lanczos", "base"] + [
        "Lanczos",
        "base",
    ]
    assert len([path for path in before if path.suffix == ".npy"]) == 5, "each is scored when it is there"
    drawn = evaluate(monkeypatch, tmp_path, *options)
    assert b" 3 prompts, 2 steps" in drawn["report.md"]
    assert evaluate(monkeypatch, tmp_path, "--from-scores") == drawn
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert calls == [0, 1, 1, 2]


def test_scores_by_another_reader_or_judge_are_refused(build, tmp_path, monkeypatch, capsys):
    before = scored(monkeypatch, tmp_path, build)
    monkeypatch.setattr("evaluation.judges.checksum", lambda file: "0badf00d")
    line = refused(monkeypatch, capsys, tmp_path, "--from-scores")
    assert "scores-4x.npz is by reader" in line
    assert "this version's is 0badf00d: score the pictures again with --anew" in line
    assert line == refused(monkeypatch, capsys, tmp_path, "--tables", "Presets", "--no-draw", "--build", build)
    after = scored(monkeypatch, tmp_path, build, "--anew")
    assert f"{COUNT * 4} pictures are there" in capsys.readouterr().out, "they are scored again, not drawn"
    assert after["report.md"] == before["report.md"]
    assert after["report/scores-4x.npz"] != before["report/scores-4x.npz"]
    monkeypatch.setattr("evaluation.judges.VERSION", VERSION + 1)
    assert f"is by judge {VERSION}" in refused(monkeypatch, capsys, tmp_path, "--from-scores")


def test_scores_of_pictures_that_were_drawn_otherwise_are_refused(build, tmp_path, monkeypatch, capsys):
    scored(monkeypatch, tmp_path, build)
    own = ["--tables", "Presets", "--no-draw", "--build", build]
    assert "holds scores with steps 50, not 20: name another report" in refused(
        monkeypatch, capsys, tmp_path, *own, "--steps", "20"
    )
    line = refused(monkeypatch, capsys, tmp_path, *own, "--dtype", "bfloat16")
    assert "holds scores with arithmetic float32, not bfloat16" in line
    checkpoint = tmp_path / "unet"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"others")
    assert "with checkpoint" in refused(monkeypatch, capsys, tmp_path, *own, "--model", tmp_path)
    monkeypatch.setitem(TABLES, "Parts", replace(TABLES["Parts"], methods=THREE))
    line = refused(monkeypatch, capsys, tmp_path, "--tables", "Parts", "--no-draw", "--model", tmp_path)
    assert "the scores of one report are of one checkpoint" in line, "at another size"


def test_other_scores_of_the_same_picture_are_refused(build, tmp_path, monkeypatch, capsys):
    scored(monkeypatch, tmp_path, build)
    record = next(build.rglob(f"0003/{label('Turbo')}.*.npy"))
    keep({**kept(record), "seconds": np.float32(9)}, record)
    scored(monkeypatch, tmp_path, build)
    keep({**kept(record), "strays": np.uint16(9)}, record)
    line = refused(monkeypatch, capsys, tmp_path, "--tables", "Presets", "--no-draw", "--build", build)
    assert f"holds other scores of {label('Turbo')}, prompt 3" in line


def test_where_there_is_nothing_to_report_on(tmp_path, monkeypatch, capsys):
    assert "draw pictures first" in refused(monkeypatch, capsys, tmp_path, "--from-scores")
    assert f"no scores in {tmp_path}" in refused(monkeypatch, capsys, tmp_path, "--from-scores", tmp_path)
    assert "leave --steps out" in refused(monkeypatch, capsys, tmp_path, "--from-scores", "--steps", "20")
    assert "there are no pictures" in refused(monkeypatch, capsys, tmp_path, "--no-draw", "--build", tmp_path)
    assert "Presets is not of 9x" in refused(monkeypatch, capsys, tmp_path, "--tables", "Presets", "--sizes", "9x")
    assert [*prompt_range("3")] == [0, 1, 2]
    assert [*prompt_range("100:102")] == [100, 101]
    for text in ("0", "", "-3", "5:5", "7:3", "a:b", "1:2:3"):
        assert f"{text} is not a number of prompts" in refused(monkeypatch, capsys, tmp_path, f"--prompts={text}")


def test_a_record_is_what_was_kept(tmp_path):
    record = {"objects": np.uint16(3), "seams": np.float16(1.25), "whole": np.arange(4, dtype=np.int16)}
    keep(record, tmp_path / "a.npy")
    found = kept(tmp_path / "a.npy")
    assert found.keys() == record.keys()
    assert all(found[name].dtype == record[name].dtype and np.array_equal(found[name], record[name]) for name in record)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_the_file_is_small_and_the_same_each_time(tmp_path):
    """200 prompts and 13 methods, as the largest table has: less than its sheet of pictures."""
    rng, one = np.random.default_rng(0), true_render(3, 0)
    like = SceneJudge().of_picture(Made(*(one[0], 0, one[1], small(one[1]), 0.5, (128, 128))))
    scores = Scores({"size": "16x", "judge": 1})
    for method in range(13):
        for prompt in range(200):
            made = {name: np.float16(rng.normal(100, 10)) if like[name].dtype == np.float16 else like[name] for name in like}
            made |= {name: np.int16(rng.normal(0, 5 / FEATURE, 32)) for name in ("whole", "close")}
            scores.records[f"method {method}", prompt] = {"seconds": np.float32(rng.uniform()), **made}
    scores.write(tmp_path / "a.npz")
    scores.records = dict(reversed(scores.records.items()))
    scores.write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes(), "in whatever order they came"
    assert (tmp_path / "a.npz").stat().st_size < 330_000
    again = Scores.read(tmp_path / "a.npz")
    again.write(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert again.records.keys() == scores.records.keys()
    assert again.about == scores.about


def test_features_are_kept_as_finely_as_distances_need():
    judge = SceneJudge()
    true = [true_render(11, index) for index in range(60)]
    blurred = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2))) for _, image in true]
    real = [judge.read(*zip(*(true_render(12, index) for index in range(60))), range(60))]
    for own, other in zip(judge.read([scene for scene, _ in true], blurred, range(60)), *real):
        distances = [
            frechet_distance(features, Normal.of(other.numpy()))
            for features in (own.numpy(), np.round(own.numpy() / FEATURE) * FEATURE)
        ]
        assert distances[1] == pytest.approx(distances[0], rel=1e-3)


def test_what_this_version_of_the_judge_scores():
    """Where this changes, VERSION is to be raised, so that what was scored before is not mixed with it."""
    scene, image = true_render(3, 1)
    base = small(np.roll(image, 60, 1))
    found = SceneJudge().of_picture(Made(scene, 7, image, base, 0.75, (128, 128)))
    assert VERSION == 1
    assert {name: float(value) for name, value in found.items() if value.ndim == 0} == pytest.approx(
        {
            "objects": 3,
            "strays": 0,
            "off the base": 60.56,
            "detail": 23.03,
            "object detail": 123.4,
            "base object detail": 118.25,
        }
        | {"seams": 1.0547},
        rel=1e-3,
    )
    assert np.abs(found["whole"][:6] - [122, 69, -40, 69, -215, -253]).max() <= 1
    assert np.abs(found["close"][:6] - [122, -53, 97, -55, -150, -32]).max() <= 1
    assert SceneJudge().of_base(scene, base, (512, 512)) == {"objects": 4, "true object detail": pytest.approx(107.9, rel=1e-3)}


def test_a_checkpoint_is_known_by_its_weights(tmp_path):
    for name in ("a", "b"):
        for part in ("unet", "vae"):
            (tmp_path / name / part).mkdir(parents=True)
            (tmp_path / name / part / "model.safetensors").write_bytes(bytes(3 * 2**20))
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b")), "wherever it lies"
    with open(tmp_path / "b/vae/model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"1")
    assert fingerprint(str(tmp_path / "a")) != fingerprint(str(tmp_path / "b"))
    assert fingerprint("someone/model") != fingerprint("someone/other")
    assert fingerprint(str(tmp_path / "b/vae/model.safetensors")) != fingerprint(str(tmp_path / "a/vae/model.safetensors"))
