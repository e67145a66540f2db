"""What enlarges a phase on the diffusers host: by name, and by a network in a file that the package spandrel reads."""

import builtins
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from tiny import photo, spot, tiny_pipeline
from tiny_files import compact_network

from lib_demofusion.config import DemoFusionConfig
from lib_demofusion.fusion import Cancelled, Fusion
from lib_demofusion.hosts import diffusers_upscaler
from lib_demofusion.hosts.diffusers import UPSCALERS, Incomplete, generate, load_upscaler, needs, plan_for, upscaler_named
from lib_demofusion.memory import OutOfMemory

try:
    import spandrel

    WHY_NOT = ""
except Exception as error:  # torchvision's, which it imports, if that was built for another torch
    WHY_NOT = f"spandrel, of the extra demofusion[upscaler], cannot be imported: {error}".splitlines()[0]

needs_spandrel = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd15")


def image(h=40, w=60, seed=0):
    """Random numbers in -1..1, [1, 3, h, w]."""
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def references(monkeypatch):
    """The references of the phases, in their order."""
    seen, predict = {}, Fusion.predict

    def spied(fusion, *args):
        seen.setdefault(fusion.phase, fusion.reference.clone())
        return predict(fusion, *args)

    monkeypatch.setattr(Fusion, "predict", spied)
    return seen


# ---------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", [name for name in UPSCALERS if name.startswith("Latent")])
@pytest.mark.parametrize("pixel_upsampling", [False, True])
def test_latents_are_enlarged_as_the_name_says(pipe, monkeypatch, name, pixel_upsampling):
    """Also where the preset enlarges images: the upscaler's own name says what it enlarges."""
    seen = references(monkeypatch)
    config = DemoFusionConfig(scale=2.5, upscaler=name, pixel_upsampling=pixel_upsampling)
    result = generate(pipe, "red", config=config, steps=1, seed=[1, 2], cfg_scale=1)
    mode = name.removeprefix("Latent").strip(" ()").removesuffix("antialiased").strip() or "bilinear"
    for phase, latents in result.phases[:-1]:
        size = result.plan.phases[phase.number].size
        expected = F.interpolate(latents, size=size, mode=mode, antialias="antialiased" in name)
        torch.testing.assert_close(seen[phase.number + 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Lanczos", "Bicubic", "Nearest"])
def test_images_are_enlarged_as_the_name_says(pipe, monkeypatch, name):
    seen, vae, own = references(monkeypatch), pipe.vae, load_upscaler(name)
    result = generate(pipe, "red", config=DemoFusionConfig(scale=2.0, upscaler=name), steps=1, cfg_scale=1)
    with torch.inference_mode():
        base = vae.decode(result.phases[0][1] / vae.config.scaling_factor).sample
        larger = own.images(base, (128, 128))
        expected = vae.encode(larger.clamp(-1, 1)).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=1e-4)


PILLOWS = [("Lanczos", 1, (30, 20))]  # what a network has made too large becomes smaller by it
PILLOWS += [(*how, size) for how in (("Lanczos", 1), ("Bicubic", 6), ("Nearest", 0)) for size in ((100, 90), (64, 128))]


@pytest.mark.parametrize(("name", "levels", "size"), PILLOWS)
def test_images_are_enlarged_as_pillow_does_that(name, levels, size):
    """But for the bicubic one, which is torch's."""
    picture = photo((60, 40)).filter(ImageFilter.GaussianBlur(2))
    x = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    got = (load_upscaler(name).images(x, size) + 1) * 127.5
    pillow = np.array(picture.resize(size[::-1], getattr(Image.Resampling, name.upper())), np.float32)
    assert got.shape == (1, 3, *size)
    assert (got[0].permute(1, 2, 0).clamp(0, 255).round() - torch.from_numpy(pillow)).abs().max() <= levels
    assert name == "Nearest" or (got - got.round()).abs().max() > 0.1, "without its rounding to bytes"


def test_none_is_what_there_was_before(pipe, monkeypatch):
    """No upscaler, and the bicubic one of the setting, are the same to the bit."""
    assert load_upscaler("") is None
    found = []
    for settings in (dict(pixel_upsampling=True), dict(upscaler="Bicubic")):
        with monkeypatch.context() as patch:
            seen = references(patch)
            generate(pipe, "red", config=DemoFusionConfig(scale=2.0, **settings), steps=1, cfg_scale=1)
            found.append(seen[2])
    assert torch.equal(*found)


def test_names_are_found_whatever_their_case():
    assert [upscaler_named(name.upper()) for name in UPSCALERS] == list(UPSCALERS)
    assert upscaler_named("") == ""


# ------------------------------------------------------------------------------------------------------------ given pictures


@pytest.mark.parametrize("name", UPSCALERS)
def test_a_given_picture_is_enlarged_by_it(pipe, monkeypatch, name):
    seen, vae = references(monkeypatch), pipe.vae
    result = generate(
        pipe, "", config=DemoFusionConfig(scale=2.0, upscaler=name), image=photo(), steps=1, seed=[1, 2], cfg_scale=1
    )
    size = result.plan.phases[1].size
    x = pipe.image_processor.preprocess(photo())
    own = load_upscaler(name)
    with torch.inference_mode():
        if name.startswith("Latent"):
            expected = own.latents(vae.encode(x).latent_dist.mode() * vae.config.scaling_factor, size)
        else:
            larger = own.images(x, tuple(8 * side for side in size)).clamp(-1, 1)
            expected = vae.encode(larger).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(seen[2], expected.repeat(2, 1, 1, 1), rtol=0, atol=1e-4)


def test_a_given_picture_of_any_size_keeps_its_pixels(pipe, monkeypatch):
    """No factor divides its sides: it is not brought to a multiple of one before it is enlarged."""
    seen, own = [], diffusers_upscaler.IMAGES["Lanczos"]
    monkeypatch.setitem(diffusers_upscaler.IMAGES, "Lanczos", lambda x, size: seen.append(x) or own(x, size))
    generate(pipe, "", config=DemoFusionConfig(scale=3.0, upscaler="Lanczos"), image=photo((101, 67)), steps=1, cfg_scale=1)
    assert torch.equal(((seen[0] + 1) * 127.5)[0].round().byte(), torch.from_numpy(np.array(photo((101, 67)))).permute(2, 0, 1))


def test_around_a_mask_the_picture_is_enlarged_by_lanczos_as_in_the_result(pipe, monkeypatch):
    seen = references(monkeypatch)
    made = dict(image=photo(), mask=spot(), steps=1, seed=3)
    plain = generate(pipe, "", config=DemoFusionConfig(scale=2.0), **made)
    before = seen.pop(2)
    result = generate(pipe, "", config=DemoFusionConfig(scale=2.0, upscaler="Nearest"), **made)
    mask = result.given.mask_at(result.plan.phases[1].size).expand_as(before)
    assert torch.equal(seen[2][mask == 0], before[mask == 0])
    assert (seen[2] - before)[mask == 1].abs().mean() > 1e-3
    far = np.asarray(spot(box=(40, 20, 160, 120)).resize(result.images()[0].size)) == 0
    assert (np.asarray(result.images()[0])[far] == np.asarray(plain.images()[0])[far]).all()


# -------------------------------------------------------------------------------------------------- tiles, without spandrel


class Network:
    """A network that enlarges: each pixel as a square of its blur over five pixels, so that it sees two around it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scale=2, most=10**9):
        self.scale = scale
        self.most = most  # pixels that fit
        self.seen = []

    def __call__(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        if x.shape[-1] * x.shape[-2] > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")
        blurred = F.avg_pool2d(F.pad(x, [2] * 4, mode="replicate"), 5, stride=1)
        return F.interpolate(blurred, scale_factor=self.scale, mode="nearest")


def by_network(network, x, size, cancelled=lambda: False):
    return diffusers_upscaler._enlarge(network, cancelled, x, size)


def whole(network, x):
    return network(x / 2 + 0.5) * 2 - 1


@pytest.mark.parametrize("size", [(40, 60), (256, 256), (257, 100), (300, 611), (33, 900)])
def test_tiles_are_the_whole(size):
    network, x = Network(), image(*size)
    got = by_network(network, x, (2 * size[0], 2 * size[1]))
    torch.testing.assert_close(got, whole(Network(), x), rtol=0, atol=1e-5)
    assert max(map(max, network.seen)) <= 256, "the memory of a tile"
    assert (len(network.seen) > 1) == (max(size) > 256)


@pytest.mark.parametrize(("scale", "times"), [(2, 3), (4, 2), (3, 2), (8, 1)])
def test_it_is_applied_as_often_as_needed_and_the_exact_size_is_lanczos(scale, times):
    network, x = Network(scale), image(20, 30)
    got = by_network(network, x, (130, 200))
    sizes = list(dict.fromkeys(network.seen))
    assert len(sizes) == times
    assert got.shape == (1, 3, 130, 200)
    expected = x
    for _ in range(times):
        expected = whole(Network(scale), expected)
    expected = diffusers_upscaler.pillow(expected / 2 + 0.5, (130, 200), "LANCZOS") * 2 - 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_picture_of_just_that_size_is_left_alone():
    network, x = Network(), image()
    assert torch.equal(by_network(network, x, (40, 60)), (x / 2 + 0.5) * 2 - 1)
    assert not network.seen


@pytest.mark.parametrize("most", [128**2, 64**2])
def test_where_memory_runs_out_tiles_are_smaller(most):
    network, x = Network(most=most), image(200, 300)
    torch.testing.assert_close(by_network(network, x, (400, 600)), whole(Network(), x), rtol=0, atol=1e-5)
    with pytest.raises(OutOfMemory, match="out of memory in the upscaler with tiles of 64 pixels; a smaller one needs less"):
        by_network(Network(most=10), x, (400, 600))


def test_it_stops_between_two_tiles():
    network = Network()
    with pytest.raises(Cancelled):
        by_network(network, image(600, 300), (1200, 600), cancelled=lambda: len(network.seen) == 2)
    assert len(network.seen) == 2


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ESRGAN_4x", r"no upscaler called 'ESRGAN_4x'; there are: Latent, .*, Nearest, or a .pth or .safetensors file"),
        ("x.ckpt", "no upscaler called 'x.ckpt'"),
        ("/nowhere/x.pth", "no such upscaler: /nowhere/x.pth"),
        ("/nowhere/x.SAFETENSORS", "no such upscaler: /nowhere/x.SAFETENSORS"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_computed(pipe, name, says):
    for call in (generate, lambda pipe, prompt, **more: plan_for(pipe, **more)):
        with pytest.raises(ValueError, match=says) as error:
            call(pipe, "red", config=DemoFusionConfig(upscaler=name), steps=1)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'spandrel'", name="spandrel"), RuntimeError("nms\ndoes not exist")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, error):
    own = builtins.__import__

    def fail(name, *args, **more):
        if name == "spandrel":
            raise error
        return own(name, *args, **more)

    save_file(compact_network(), tmp_path / "x.safetensors")
    monkeypatch.delitem(sys.modules, "spandrel", raising=False)
    monkeypatch.setattr(builtins, "__import__", fail)
    says = r"spandrel is missing, which upscalers in files need; pip install 'demofusion\[upscaler\]'"
    says = says if isinstance(error, ImportError) else "spandrel, which upscalers in files need, cannot be imported: nms$"
    with pytest.raises(ValueError, match=says):
        load_upscaler(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(scale=1), "x.pth holds a network that enlarges nothing; use another one"),
        (dict(input_channels=1, output_channels=1), "x.pth holds an upscaler for images of 1 channels; use one for RGB"),
        (dict(output_channels=1), "use one for RGB"),
        (None, "x.pth holds a network that enlarges nothing"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(tmp_path, monkeypatch, change, says):
    class Descriptor:
        def __init__(self, scale=2, input_channels=3, output_channels=3):
            self.scale, self.input_channels, self.output_channels = scale, input_channels, output_channels

    loaded = object() if change is None else Descriptor(**change)
    loader = SimpleNamespace(load_from_file=lambda path: loaded)
    known = dict(ModelLoader=lambda device: loader, ImageModelDescriptor=Descriptor, UnsupportedModelError=KeyError)
    monkeypatch.setitem(sys.modules, "spandrel", SimpleNamespace(**known))
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=says):
        load_upscaler(str(tmp_path / "x.pth"))


# ------------------------------------------------------------------------------------------------------------- with spandrel


@pytest.fixture(params=["safetensors", "pth"])
def file(request, tmp_path):
    path = tmp_path / f"2x-tiny.{request.param}"
    save_file(compact_network(), path) if request.param == "safetensors" else torch.save({"params": compact_network()}, path)
    return path


@needs_spandrel
def test_the_network_is_spandrels(file):
    own = spandrel.ModelLoader("cpu").load_from_file(file)
    for size in ((40, 60), (600, 300)):
        got = load_upscaler(str(file)).images(image(*size), (2 * size[0], 2 * size[1]))
        torch.testing.assert_close(got, own(image(*size) / 2 + 0.5) * 2 - 1, rtol=0, atol=0 if size == (40, 60) else 1e-5)
        assert got.std() > 0.05


@needs_spandrel
def test_phases_and_given_pictures_go_through_the_network(pipe, file, monkeypatch):
    seen, config = references(monkeypatch), DemoFusionConfig(scale=2.0, upscaler=str(file))
    own, vae = load_upscaler(str(file)), pipe.vae
    result = generate(pipe, "red", config=config, steps=1, seed=[1, 2], cfg_scale=1)
    with torch.inference_mode():
        images = [
            own.images(vae.decode(z / vae.config.scaling_factor).sample, (128, 128)) for z in result.phases[0][1].split(1)
        ]
        expected = torch.cat([vae.encode(x).latent_dist.mode() * vae.config.scaling_factor for x in images])
    torch.testing.assert_close(seen.pop(2), expected, rtol=0, atol=1e-4)
    result = generate(pipe, "", config=config, image=photo(), steps=1, cfg_scale=1)
    with torch.inference_mode():
        size = tuple(8 * side for side in result.plan.phases[1].size)
        larger = own.images(pipe.image_processor.preprocess(photo()), size).clamp(-1, 1)
        expected = vae.encode(larger).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=1e-4)


@needs_spandrel
def test_cancelled_in_the_upscaler_what_is_finished_is_handed_out(pipe, file):
    done = []
    with pytest.raises(Incomplete) as stop:
        generate(
            pipe,
            "red",
            config=DemoFusionConfig(scale=2.0, upscaler=str(file)),
            steps=1,
            finished=lambda *_: done.append(1),
            cancelled=lambda: bool(done),
        )
    assert stop.value.cancelled
    assert len(stop.value.result.phases) == 1


@needs_spandrel
def test_its_weights_count_for_the_memory(pipe, file):
    plan = plan_for(pipe, DemoFusionConfig(scale=2.0), steps=1)
    assert needs(pipe, plan, upscaler=str(file)).weights == needs(pipe, plan).weights + file.stat().st_size
    assert needs(pipe, plan, upscaler="Lanczos") == needs(pipe, plan)


@needs_spandrel
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.safetensors", {"x": torch.zeros(2)}, "x.safetensors is no upscaler that spandrel knows; use another one"),
        ("x.safetensors", b"no", "x.safetensors cannot be loaded as an upscaler: "),
        ("x.pth", b"", "x.pth cannot be loaded as an upscaler: "),
        ("x.pth", pickle.dumps(print), "x.pth cannot be loaded as an upscaler: "),
    ],
)
def test_files_that_are_no_upscaler_are_refused(tmp_path, name, content, says):
    path = tmp_path / name
    save_file(content, path) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_upscaler(str(path))
    assert "\n" not in str(error.value)
