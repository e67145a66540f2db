"""What the extension sees of other extensions, on stand-ins; on the real ones in tests/webui/test_beside_extensions.py."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch

from lib_demofusion.hosts.webui import neighbours
from lib_demofusion.hosts.webui.neighbours import (
    NEIGHBOURS,
    check,
    check_again,
    check_latents,
    check_sampler,
    is_inner,
    note_on,
)


def script(title, first, count, **state):
    return SimpleNamespace(title=lambda: title, args_from=first, args_to=first + count, **state)


def job(*scripts, args=(), selectable=(), chosen=0):
    """A job of the host with these scripts and all their arguments, one list."""
    runner = SimpleNamespace(alwayson_scripts=list(scripts), selectable_scripts=list(selectable))
    return SimpleNamespace(scripts=runner, script_args=(chosen, *args), sd_model=SimpleNamespace())


def refusal(p):
    with pytest.raises(ValueError, match=" is on: ") as caught:
        check(p, "DemoFusion")
    line = str(caught.value)
    assert "\n" not in line
    return line


TICK_ON = [(True, 1), (1, 1), ({"enable": True},), ({"enabled": True},), (SimpleNamespace(enable=True),)]
TICK_OFF = [(False, 1), (None, 1), (0, 1), ({"enable": False},), ({},), (SimpleNamespace(enable=False),), ()]


def cases(common):
    return [pytest.param(known, args, id=f"{known.title}-{i}") for known in NEIGHBOURS for i, args in enumerate(common)]


@pytest.mark.parametrize(("known", "args"), cases(TICK_ON))
def test_what_is_known_not_to_work_is_refused_where_it_is_on(known, args):
    p = job(script("Another", 1, 1), script(known.title, 2, len(args)), args=(True, *args))
    line = refusal(p)
    assert line == f"{known.name} is on: {known.does}; untick it, or DemoFusion"


@pytest.mark.parametrize(("known", "args"), cases(TICK_OFF))
def test_what_is_installed_and_off_does_not_matter(known, args):
    check(job(script("Another", 1, 1), script(known.title, 2, len(args)), args=(True, *args)), "DemoFusion")


def test_a_job_without_scripts_has_no_neighbours():
    check(SimpleNamespace(scripts=None, script_args=None), "DemoFusion")
    check(SimpleNamespace(scripts=job().scripts, script_args=[]), "DemoFusion")
    check(job(), "DemoFusion")


def test_what_is_not_known_is_left_alone():
    check(job(script("Another", 1, 2), script("DemoFusion", 3, 2), args=(True, 1, True, 2)), "DemoFusion")


def test_a_script_of_the_list_counts_if_it_is_chosen():
    chosen, other = script("Tiled Diffusion", 1, 1), script("Another", 2, 1)
    check(job(args=(True, True), selectable=[chosen, other]), "DemoFusion")
    check(job(args=(True, True), selectable=[chosen, other], chosen=2), "DemoFusion")
    check(job(args=(True, True), selectable=[chosen, other], chosen=3), "DemoFusion")
    assert "Tiled Diffusion is on" in refusal(job(args=(True, True), selectable=[chosen, other], chosen=1))


def test_passes_over_finished_images_are_known():
    """Those of img2img within txt2img, ADetailer's, and whatever runs while the host is at work for another p."""
    assert is_inner(SimpleNamespace(init_images=[]), False)
    assert is_inner(SimpleNamespace(), True)
    assert not is_inner(SimpleNamespace(), False)
    assert not is_inner(SimpleNamespace(init_images=[]), True)
    assert is_inner(SimpleNamespace(init_images=[], _ad_inner=True), True)

    def process_images_inner(p, asked):
        return is_inner(asked, False)

    job, other = SimpleNamespace(), SimpleNamespace()
    assert not process_images_inner(job, job)
    assert process_images_inner(job, other)

    def process_images_inner_of_another(p):
        return process_images_inner(p, p)

    process_images_inner_of_another.__code__ = process_images_inner_of_another.__code__.replace(co_name="process_images_inner")
    assert not process_images_inner_of_another(job)


@pytest.fixture
def foreign(tmp_path):
    """foreign(folders): a function whose code lies in tmp_path/folders/scripts/theirs.py."""

    def make(*folders, module="theirs.py"):
        path = tmp_path.joinpath(*folders, "scripts", "theirs.py")
        space = {"__name__": module}
        exec(compile("def take_over(*args, **kwargs):\n    pass", str(path), "exec"), space)
        return space["take_over"]

    return make


def hosts(*args):
    """A function that belongs to no extension."""


class Sampler:
    def __init__(self):
        self.model_wrap_cfg = torch.nn.Identity()
        self.model_wrap_cfg.inner_model = torch.nn.Identity()

    def sample(self):
        pass

    sample_img2img = sample


def of_sampler(name, value, *path):
    sampler = Sampler()
    target = functools.reduce(getattr, path, sampler)
    setattr(target, name, value)
    return sampler


def ways(function):
    """Whatever is looked at, with the function in that place."""
    p = job()
    p.sample = function
    return {
        "sample": lambda: check_again(p),
        "sampler": lambda: check_sampler(of_sampler("sample", function)),
        "sampler's img2img": lambda: check_sampler(of_sampler("sample_img2img", function)),
        "denoiser": lambda: check_sampler(of_sampler("forward", function, "model_wrap_cfg")),
        "inner model": lambda: check_sampler(of_sampler("forward", function, "model_wrap_cfg", "inner_model")),
    }


WAYS = list(ways(hosts))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "wrap", [lambda f: f, functools.partial, lambda f: f.__get__(object())], ids=["plain", "partial", "bound"]
)
def test_who_takes_the_sampling_over_is_named(foreign, way, wrap):
    function = wrap(foreign("extensions", "sd-webui-theirs"))
    with pytest.raises(
        ValueError, match=r"^the extension sd-webui-theirs has replaced the host's sampling, .*; switch it off$"
    ):
        ways(function)[way]()


@pytest.mark.parametrize("way", WAYS)
def test_a_host_as_it_is_is_no_neighbour(foreign, way):
    ways(hosts)[way]()
    ways(foreign("webui", "extensions-builtin", "Lora"))[way]()
    ways(foreign("extensions", "webui", module="modules.sd_samplers"))[way]()  # the host's own folder may be called anything
    ways(torch.tanh)[way]()  # no code of Python's


def test_a_changed_model_gets_a_note(foreign):
    for change in ("apply_model", "forward"):
        model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
        assert note_on(model, model.model.diffusion_model) is None
        setattr(model if change == "apply_model" else model.model.diffusion_model, change, hosts)
        assert note_on(model, model.model.diffusion_model) is None
        setattr(model if change == "apply_model" else model.model.diffusion_model, change, foreign("extensions", "sd-theirs"))
        assert note_on(model, model.model.diffusion_model).startswith("the extension sd-theirs has changed the model")


def test_controlnets_hooks_are_known_and_what_lies_beneath_them_is_looked_at(foreign):
    """It is looked after itself; another extension beneath it is not."""

    class UnetHook:
        def hook(self):
            def take_over(*args):
                pass

            return take_over

    theirs, hook = foreign("extensions", "sd-theirs"), UnetHook().hook()
    hook.__code__ = foreign("extensions", "sd-webui-controlnet").__code__
    hook.__qualname__ = "UnetHook.hook.<locals>.process_sample"
    p, model = job(), SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
    p.sample, model.model.diffusion_model.forward = hook, hook
    check_again(p)
    assert note_on(model, model.model.diffusion_model) is None
    p.sample_before_CN_hack = model.model.diffusion_model._original_forward = hosts
    check_again(p)
    assert note_on(model, model.model.diffusion_model) is None
    p.sample_before_CN_hack = model.model.diffusion_model._original_forward = theirs
    with pytest.raises(ValueError, match="^the extension sd-theirs has replaced"):
        check_again(p)
    assert note_on(model, model.model.diffusion_model).startswith("the extension sd-theirs has changed the model")
    hook.__qualname__ = "another"
    with pytest.raises(ValueError, match="^the extension sd-webui-controlnet has replaced"):
        check_again(p)


def test_base_latents_are_of_the_planned_size():
    check_latents(torch.zeros(2, 4, 8, 12), (8, 12), 8)
    for wrong in ((12, 8), (8, 13), (32, 32)):
        line = rf"^another extension has made the base {wrong[1] * 8}x{wrong[0] * 8}, and not 96x64; switch it off$"
        with pytest.raises(ValueError, match=line):
            check_latents(torch.zeros(1, 4, *wrong), (8, 12), 8)


def test_titles_are_said_once():
    titles = [known.title for known in NEIGHBOURS]
    assert len(set(titles)) == len(titles)
    assert "DemoFusion" not in titles  # ours
    assert "modules" not in sys.modules or not hasattr(neighbours, "modules")
