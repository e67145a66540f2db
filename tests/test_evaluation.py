"""The evaluation's methods do what their names say, on a tiny random model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from stand_ins import make_stand_ins
from tiny import tiny_pipeline

import evaluation.__main__
from evaluation import report
from evaluation.drawing import draw, start
from evaluation.methods import ABLATION, CONTROL, METHODS, PICTURES, demofusion, make_job, only, tile_controlnet
from evaluation.metrics import Estimate, mean_of
from evaluation.readers import small, true_render
from evaluation.upscaler import enlarge
from evaluation.upscaler import load as load_upscaler
from lib_demofusion import fusion, phases
from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.hosts.diffusers import load_pipeline
from training.tile import CONTROLNET_WEIGHTS

STEPS, SCALE = 4, 2


@pytest.fixture(scope="module")
def job():
    return make_job(tiny_pipeline("sd15", 16), "one red ring", 3, SCALE, STEPS)


@pytest.fixture(scope="module")
def wide():
    return make_job(tiny_pipeline("sdxl", 16), "one red ring", 3, SCALE, STEPS, size=(64, 128))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_picture_of_the_size(job, wide, name):
    method = METHODS[name]
    picture = method(job)
    assert picture.image.shape == (256, 256, 3)
    assert picture.image.dtype == np.uint8
    assert np.array_equal(method(job).image, picture.image), "the same seed, another picture"
    assert method(wide).image.shape == (128, 256, 3), "of another shape, with a model of another kind"


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("Lanczos", 0),
        ("learned upscaler", 0),
        ("direct", 2 * 4 * 4),
        ("ScaleCrafter", 2 * 4 * 4),
        ("MultiDiffusion", 2 * 4 * 9),
        ("Hires. fix, latent 0.7", 2 * 2 * 4),  # 70 % of four steps, rounded down, at four times the area
        ("Hires. fix, Lanczos 0.5", 2 * 2 * 4),
        ("tiles 0.35", 2 * 1 * 9),
        ("DemoFusion", 2 * 4 * 13),
    ],
)
def test_costs_are_counted_at_the_bases_size(job, name, evaluations):
    seen = []
    handle = job.pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    picture = METHODS[name](job)
    handle.remove()
    counted = sum(shape[0] * shape[2] * shape[3] / 256 for shape in seen) - (
        2 * STEPS if "Fusion" in name or "Diff" in name else 0
    )
    assert picture.evaluations == counted == evaluations


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("Lanczos", 0),
        ("Hires. fix, Lanczos 0.5", 2 * 2 * 16),
        ("tiles 0.35", 2 * 1 * 25),
        ("Paper, 8 steps", 2 * 8 * (25 + 9 + 49 + 16)),  # 384 and 512, since the picture is as large as the phase before
        ("Fast, strength 0.3", 2 * 1 * (36 + 16)),
        ("Fast", 2 * 2 * (36 + 16)),
        ("Fast, hold flat 6", 2 * 2 * (36 + 16)),
    ],
)
def test_a_given_picture_is_enlarged_in_windows_of_the_models_own_size(job, name, evaluations):
    seen = []
    handle = job.pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    base = Image.fromarray(true_render(21, 0)[1]).resize((256, 256))
    picture = PICTURES[name](replace(job, base=base, latents=None, window=(128, 128)))
    handle.remove()
    assert picture.image.shape == (512, 512, 3)
    assert picture.evaluations == sum(shape[0] * shape[2] * shape[3] / 256 for shape in seen) == evaluations
    assert {shape[2] for shape in seen} <= ({64} if "Hires" in name else {16})


def test_scalecrafter_dilates_the_deep_kernels_for_the_first_steps(job):
    unet, seen = job.pipe.unet, []
    names = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.0.resnets.1.conv2")
    modules = [unet.get_submodule(name) for name in names]
    handle = unet.register_forward_pre_hook(lambda *_: seen.append([module.dilation[0] for module in modules]))
    before = [(module.dilation, module.padding) for module in modules]
    METHODS["ScaleCrafter"](job)
    handle.remove()
    assert seen == [[1, 2, 2]] * 2 + [[1, 1, 1]] * 2
    assert [(module.dilation, module.padding) for module in modules] == before


def test_the_learned_upscaler_is_sharper_and_nearer_than_interpolation():
    losses = []
    for index in range(6):
        _, image = true_render(21, index)
        base = Image.fromarray(small(image))
        learned = enlarge(load_upscaler(), base)
        assert learned.size == (512, 512)
        plain = base.resize((512, 512), Image.Resampling.BICUBIC)
        losses.append([np.square(np.asarray(x, float) - image).mean() for x in (learned, plain)])
    assert np.mean(losses, 0)[0] < 0.9 * np.mean(losses, 0)[1]


def test_the_parts_of_demofusion():
    config, (names) = DemoFusionConfig(scale=3.0), [*ABLATION]
    assert names == ["none", "DS", "SR", "SR + DS", "PU", "PU + DS", "PU + SR", "PU + SR + DS"]
    with only(progressive=False, skip_residual=False, dilated=False):
        assert [phase.views for phase in phases.make_plan((8, 8), 4, config).phases] == [1, 25]
        assert fusion.weights_at(600, config, 1000).c2 == 0
        assert fusion.hold_at(600, 620, config, None, 1000) == 0
    with only(progressive=True, skip_residual=True, dilated=False):
        assert [phase.views for phase in phases.make_plan((8, 8), 4, config).phases] == [1, 9, 25]
        assert fusion.hold_at(600, 620, config, None, 1000) > 0
    whole = phases.make_plan((8, 8), 4, config)
    with only(True, True, True):
        assert phases.make_plan((8, 8), 4, config) == whole


def test_pictures_of_other_settings_have_other_names():
    settings = [{}, {"phase_cfg_scale": 2.0}, {"hold_flat": 6.0}, {"unguided_flat": 10.0}]
    tags = [demofusion(preset="Few-step", **own).tag for own in settings]
    assert len(set(tags)) == len(tags)
    assert demofusion(preset="Few-step", few_step=True).tag not in tags
    assert demofusion(scale=3.0).tag == demofusion().tag


def test_pictures_by_other_weights_have_other_names(tmp_path, monkeypatch):
    (tmp_path / CONTROLNET_WEIGHTS).write_bytes(b"others")
    settings = [dict(few_step=True), dict(control=(1.0, 1.0))]
    before = [demofusion(**own).tag for own in settings]
    monkeypatch.setattr("evaluation.methods.LORA", tmp_path / CONTROLNET_WEIGHTS)
    monkeypatch.setattr("evaluation.methods.CONTROLNET", tmp_path)
    tags = [*before, *(demofusion(**own).tag for own in settings), METHODS["learned upscaler"].tag, demofusion().tag]
    assert len(set(tags)) == len(tags)


def test_the_base_is_the_first_phase_of_demofusion(job):
    """What the methods enlarge is what DemoFusion starts from."""
    from lib_demofusion.hosts.diffusers import generate

    result = generate(job.pipe, job.caption, config=DemoFusionConfig(scale=2.0), seed=3, steps=STEPS)
    assert np.array_equal(np.asarray(result.images(0)[0]), np.asarray(job.base))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_pipeline("sd15", 16).save_pretrained(folder)
    return folder


def evaluate(checkpoint, folder, monkeypatch, *options):
    out = folder / "report.md"
    command = ["evaluation", "--model", str(checkpoint), "--steps", "2", "--prompts", "4", "--workers", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--build", str(folder / "build"), "-o", str(out), *options])
    monkeypatch.setattr("evaluation.judges.SceneJudge.draws", 10)
    evaluation.__main__.main()
    return out.read_text()


def forget(picture):
    """A picture of a build folder, and what it scored."""
    for path in picture.parent.glob(f"{picture.stem}.*"):
        path.unlink()


def test_workers_find_what_they_are_to_do():
    """A process that is spawned knows no function of a package's __main__."""
    assert {draw.__module__, start.__module__} == {"evaluation.drawing"}


def test_the_report(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.__main__.TRUE_RENDERS", 40)
    table = evaluation.__main__.TABLES["Presets"]
    few = {name: table.methods[name] for name in ("DemoFusion", "Turbo", "Fast, hold flat 6")}
    monkeypatch.setitem(evaluation.__main__.TABLES, "Presets", replace(table, methods=few))
    options = ["--tables", "Presets", "--sizes", "8x, 1:2", "4x"]
    text = evaluate(checkpoint, tmp_path, monkeypatch, *options)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Evaluation", "## Presets, 4x", "## Presets, 8x, 1:2"
    ]  # fmt: skip
    heads = [line for line in text.splitlines() if line.startswith("| | ")]
    assert sum(head.count("base object detail → 1") for head in heads) == 2
    rows = [line for line in text.splitlines() if line.startswith(("| DemoFusion", "| Fa", "| Turbo"))]
    assert len(rows) == 2 * 3 * 2, "each in two tables"
    assert rows[0].startswith(f"| DemoFusion | {2 * 2 * 13} | "), "evaluations besides the base's"
    for stem in ("presets-4x", "presets-8x"):
        assert f"report/{stem}.svg" in text
        with Image.open(tmp_path / "report" / f"{stem}.jpg") as sheet:
            assert sheet.width == 4 * 224

    pictures = sorted((tmp_path / "build").rglob("*.png"))
    assert len(pictures) == 2 * 4 * 4
    assert {Image.open(path).size for path in pictures} == {(128, 128), (256, 256), (128, 64), (512, 256)}
    lost, before = pictures[0], {path: path.stat().st_mtime_ns for path in pictures}
    forget(lost)
    options.append("--anew")
    assert evaluate(checkpoint, tmp_path, monkeypatch, *options).startswith("# Evaluation")
    assert [path for path in pictures if path.stat().st_mtime_ns != before[path]] == [lost], "only what was missing"

    for path in (tmp_path / "build").rglob("0003/Turbo*.png"):
        forget(path)
    text = evaluate(checkpoint, tmp_path, monkeypatch, "--no-draw", *options)
    complete = text.count(" 3 prompts, 2 steps, the UNet in float32.")
    assert text.count("\n## Presets, ") == complete == 2, "those that every method has a picture of"


def test_the_report_on_given_pictures(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.__main__.TRUE_RENDERS", 4)
    few = {name: PICTURES[name] for name in ("Lanczos", "tiles 0.35", "Fast")}
    monkeypatch.setitem(evaluation.__main__.TABLES, "Pictures", replace(evaluation.__main__.TABLES["Pictures"], methods=few))
    text = evaluate(checkpoint, tmp_path, monkeypatch, "--tables", "Pictures", "--prompts", "2", "--steps", "4")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Pictures, 256 to 512", "## Pictures, 256 to 1024"]
    heads = [line for line in text.splitlines() if line.startswith("| | ")]
    assert len(heads) == 2
    assert all("count kept" in head and "seams" in head and "FID" not in head for head in heads)
    for size, side in (("256-to-512", 512), ("256-to-1024", 1024)):
        assert f"(report/pictures-{size}.jpg)" in text
        [folder] = (tmp_path / "build").glob(f"*/{size.replace('-', ' ')}/0001")
        assert {path.stem[:4]: Image.open(path).size[0] for path in folder.glob("*.png")} == {
            "base": 256, "Lanc": side, "tile": side, "Fast": side
        }  # fmt: skip
    bases = [Image.open(path) for path in (tmp_path / "build").glob("*/*/0001/base.png")]
    assert np.array_equal(*map(np.asarray, bases)), "the same picture at both sizes"
    captions = tmp_path / "captions.txt"
    make_stand_ins(tmp_path)
    captions.write_text("one red ring\ntwo blue stars\n")
    options = ["--captions", str(captions), "--real", str(tmp_path / "real"), "--clip", str(tmp_path / "clip")]
    options += ["--inception", str(tmp_path / "inception.pt"), "--tables", "Pictures"]
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path, monkeypatch, *options)
    assert "Pictures is of given pictures, which captions have none of" in capsys.readouterr().err


def test_the_report_of_the_tile_controlnet(checkpoint, tmp_path, monkeypatch):
    """It is of the embedded checkpoint alone, whose ControlNet fits no other."""
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path, monkeypatch, "--tables", "Presets", "Control")
    few = {name: CONTROL[name] for name in ("Fast", "Turbo", "Turbo, tile 1")}
    table = replace(evaluation.__main__.TABLES["Control"], methods=few, sizes=("4x",))
    monkeypatch.setitem(evaluation.__main__.TABLES, "Control", table)
    monkeypatch.setattr("evaluation.__main__.TRUE_RENDERS", 4)
    monkeypatch.setattr("evaluation.judges.SceneJudge.draws", 10)
    command = ["evaluation", "--tables", "Control", "--prompts", "2", "--steps", "4", "--workers", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--build", str(tmp_path / "build"), "-o", str(tmp_path / "report.md")])
    evaluation.__main__.main()
    text = (tmp_path / "report.md").read_text()
    assert "the reference,\nFast or Turbo, leaves zero out." in text
    told, plain = (
        next(line.split(" | ")[1] for line in text.splitlines() if line.startswith(f"| {name} |"))
        for name in ("Turbo, tile 1", "Turbo")
    )
    assert told == plain, "as many evaluations of the UNet"
    pictures = [np.asarray(Image.open(path)) for path in (tmp_path / "build").rglob("0001/Turbo*.png")]
    assert len(pictures) == 2
    assert not np.array_equal(*pictures)


def test_the_tile_controlnet_is_on_in_the_phases_at_its_scale_and_up_to_its_end():
    job = make_job(load_pipeline(), "one red dotted star on snow", 3, SCALE, 10)
    told, hints = [], []

    def unet_is_called(module, args, others):
        told.append("down_block_additional_residuals" in others)

    def controlnet_is_called(module, args, others):
        hints.append(others)

    handles = [
        job.pipe.unet.register_forward_pre_hook(unet_is_called, with_kwargs=True),
        tile_controlnet(job.pipe).register_forward_pre_hook(controlnet_is_called, with_kwargs=True),
    ]
    demofusion(preset="Turbo", control=(0.5, 0.5))(job)
    for handle in handles:
        handle.remove()
    assert not any(told[:10]), "the base, which there is nothing before"
    assert any(told)
    assert told[10:] == sorted(told[10:], reverse=True)
    assert sum(told) == len(hints) < len(told[10:])
    assert {call["conditioning_scale"] for call in hints} == {0.5}
    assert {call["controlnet_cond"].shape[1:] for call in hints} == {(3, 128, 128)}


@pytest.fixture
def openvino():
    pytest.importorskip("openvino", reason="it needs OpenVINO: pip install openvino")
    from evaluation import openvino

    return openvino


@pytest.mark.parametrize("kind", ["sd15", "sd2"])
def test_a_unet_by_openvino_gives_what_torch_gives(openvino, kind):
    plain, other = (make_job(tiny_pipeline(kind, 16), "one red ring", 3, SCALE, STEPS) for _ in range(2))
    openvino.compile_unet(other.pipe.unet, "f32")
    called = []
    other.pipe.unet.mid_block.register_forward_hook(lambda *_: called.append(True))
    for name in ("DemoFusion", "Turbo", "ScaleCrafter", "Hires. fix, Lanczos 0.5"):
        made, expected = (METHODS[name](job).image.astype(int) for job in (other, plain))
        assert np.abs(made - expected).max() <= 1, name
    assert called, "to be compiled"
    called.clear()
    METHODS["Turbo"](other)
    assert not called, "torch's modules, once it is compiled"


def test_the_tile_controlnet_by_openvino_gives_what_torch_gives(openvino):
    plain, other = (make_job(load_pipeline(), "one red ring on snow", 3, SCALE, STEPS) for _ in range(2))
    expected = CONTROL["Turbo, tile 1"](plain).image.astype(int)
    openvino.compile_unet(other.pipe.unet, "f32")
    openvino.compile_controlnet(tile_controlnet(other.pipe), "f32")
    called = []
    tile_controlnet(other.pipe).mid_block.register_forward_hook(lambda *_: called.append(True))
    made = CONTROL["Turbo, tile 1"](other).image.astype(int)
    assert np.abs(made - expected).max() <= 1
    assert called, "to be compiled"
    called.clear()
    CONTROL["Turbo, tile 1"](other)
    assert not called, "torch's modules, once it is compiled"


def test_the_report_of_pictures_by_openvino(openvino, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.__main__.TRUE_RENDERS", 40)
    text = evaluate(checkpoint, tmp_path, monkeypatch, "--tables", "Presets", "--sizes", "4x", "--openvino")
    assert " 4 prompts, 2 steps, the UNet in bfloat16, by OpenVINO." in text
    [kept] = (tmp_path / "build").iterdir()
    assert kept.name.endswith("-2-openvino"), "beside those by torch"
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path, monkeypatch, "--openvino", "--dtype", "float16")


def test_what_openvino_cannot_run_is_refused(openvino):
    with pytest.raises(ValueError, match="conditioned by text alone"):
        openvino.compile_unet(tiny_pipeline("sdxl", 8).unet)
    unet = tiny_pipeline("sd15", 8).unet
    openvino.compile_unet(unet)
    with pytest.raises(ValueError, match="different texts"):
        unet(torch.zeros(3, 4, 8, 8), 1, torch.randn(3, 77, 16))
    with pytest.raises(ValueError, match="residuals of an adapter"):
        unet(torch.zeros(1, 4, 8, 8), 1, torch.randn(1, 77, 16), down_block_additional_residuals=[torch.zeros(1)])
    controlnet = ControlNetModel.from_unet(unet)
    with pytest.raises(ValueError, match="without attention"):
        openvino.compile_controlnet(controlnet)


def test_the_papers_own_metrics_in_the_report(checkpoint, tmp_path, monkeypatch):
    make_stand_ins(tmp_path)
    captions = tmp_path / "captions.txt"
    captions.write_text("one red ring\ntwo blue stars\none green disc\nthree plain hearts\n")
    options = ["--tables", "Presets", "--sizes", "4x", "--captions", str(captions), "--real", str(tmp_path / "real")]
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path, monkeypatch, *options)
    options += ["--inception", str(tmp_path / "inception.pt"), "--clip", str(tmp_path / "clip")]
    text = evaluate(checkpoint, tmp_path, monkeypatch, *options)
    [head] = [line for line in text.splitlines() if line.startswith("| | ")]
    assert head == "| | evaluations | time | FID ↓ | IS ↑ | crop FID ↓ | crop IS ↑ | CLIP ↑ |"


def test_a_difference_is_said_where_its_interval_leaves_zero_out():
    rng = np.random.default_rng(0)
    own = rng.normal(5, 2, 60)

    def row(**values):
        return report.Row(1, 1, {name: Estimate.of(mean_of(value), 60, 200) for name, value in values.items()})

    rows = {
        "reference": row(strays=own, seams=own, IS=own),
        "more": row(strays=own + 1, seams=own + 1, IS=own + 1),
        "nearer": row(strays=own - 1, seams=own * 0 + 1, IS=own - 1),
        "other": row(**{name: rng.permutation(own) for name in ("strays", "seams", "IS")}),
    }
    said = report.verdicts(rows, "reference")
    assert said["reference"] == said["other"] == dict.fromkeys(("strays", "seams", "IS"), "")
    assert said["more"] == {"strays": "worse", "seams": "worse", "IS": "better"}
    assert said["nearer"] == {"strays": "better", "seams": "better", "IS": "worse"}
    apart = report.verdicts(rows, "more", {"other": "reference"})
    assert apart["other"] == said["other"], "by a reference of its own"
    assert apart["nearer"]["strays"] == "better"
    assert apart["reference"]["strays"] == "better"
    table = next(report.tables(rows, "reference")).splitlines()
    assert table[0] == "| | evaluations | time | strays ↓ | seams → 1 | IS ↑ |"
    assert table[3].count("**worse**") == 2


def test_numbers_are_as_long_as_they_must_be():
    values = {0.455: "0.46", -0.001: "0.00", 9.994: "9.99", 9.996: "10.0", 23.46: "23.5", 99.96: "100", -231.4: "-231"}
    assert {value: report.digits(value) for value in values} == values


def test_no_table_is_wider_than_a_page():
    rows = {name: report.Row(1, 1, dict.fromkeys(report.BETTER, Estimate(1.0, np.ones(3)))) for name in "ab"}
    heads = [text.splitlines()[0].split(" | ")[3:] for text in report.tables(rows, "a")]
    assert max(map(len, heads)) <= report.COLUMNS
    assert [name.split(" ↑")[0].split(" ↓")[0].split(" → ")[0] for head in heads for name in head] == list(report.BETTER)
