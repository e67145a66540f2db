"""The core imports torch and the standard library only, and imports point one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "lib_demofusion"
# Each module may import those before it in this order, and nothing after it.
LAYERS = [
    ["config", "memory"],
    ["files"],
    ["saved", "pictures"],
    ["schedule", "views"],
    ["fusion", "decode", "control"],
    ["areas", "distributed"],
    ["original"],
    ["phases"],
    ["hosts"],
    ["arguments"],
    ["job"],
    ["__main__"],
]
CORE = ["config", "memory", "files", "schedule", "views", "fusion", "decode", "control", "areas", "original", "phases"]
CORE += ["arguments", "distributed"]


def imports(path):
    """(top-level names, own modules) that a file imports, wherever in it."""
    packages, own = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "lib_demofusion":
                own.add(rest.split(".")[0])
            else:
                packages.add(head)
    return packages, own


def files():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if name != "__init__":
            yield pytest.param(path, name, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_torch_and_the_standard_library_only(name):
    packages, _ = imports(ROOT / f"{name}.py")
    assert packages <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(("path", "name"), files())
def test_imports_point_one_way(path, name):
    rank = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    modules = {p.stem for p in ROOT.glob("*.py")} | {"hosts"}
    _, own = imports(path)
    for other in own & modules - {"__init__"} - ({name} & {"hosts"}):  # a host may be more than one file
        assert rank[other] < rank[name], f"{name} imports {other}"


def test_hosts_do_not_import_one_another():
    """A host is a folder, or files that begin with its name; prompts are the same for all."""
    for path in (ROOT / "hosts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lib_demofusion.hosts"):
                modules = [node.module.split(".")[2]] if node.module.count(".") > 1 else [alias.name for alias in node.names]
                host = path.relative_to(ROOT / "hosts").parts[0].removesuffix(".py").partition("_")[0]
                assert all(name.partition("_")[0] in (host, "prompts") for name in modules), path.name
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("lib_demofusion.hosts")]


def test_only_the_hosts_the_command_and_saved_phases_know_other_packages():
    for path in ROOT.rglob("*.py"):
        packages, _ = imports(path)
        outside = packages - {"torch", *sys.stdlib_module_names}
        if "hosts" not in path.parts and path.name not in ("__main__.py", "saved.py", "job.py", "pictures.py"):
            assert not outside, f"{path.name} imports {outside}"
        if path.parent.name != "webui":
            assert "modules" not in packages
        if path.name in ("neighbours.py", "units.py"):
            assert not outside


# The files of the WebUI's package, each of which may import those before it.
WEBUI = ["embedded", "neighbours", "units", "settings", "choices", "samplers", "sampling", "patched_controls"]
WEBUI += ["a1111", "forge", "host", "decoding", "upscalers", "picture", "gallery", "controlnet", "checkpoints", "second_pass"]
WEBUI += ["checks", "readout", "progress", "step", "phases", "loop"]
SIDEWAYS = ["plot"]  # nothing imports these


def test_the_webuis_files_import_one_way_and_fit_a_sitting():
    files = {path.stem: path for path in (ROOT / "hosts" / "webui").glob("*.py") if path.stem != "__init__"}
    assert set(files) == {*WEBUI, *SIDEWAYS}
    for name, path in files.items():
        text = path.read_text()
        assert text.count("\n") <= 350, f"{name} is longer than a sitting"
        before = WEBUI[: WEBUI.index(name)] if name in WEBUI else WEBUI
        package = "lib_demofusion.hosts.webui"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
                rest = node.module.removeprefix(package).lstrip(".")
                for other in [rest] if rest else [alias.name for alias in node.names]:
                    assert other in before, f"{name} imports {other}"


def test_what_only_one_host_has_is_in_its_module():
    """`host` picks the module, and nobody else knows which it is."""
    folder, own = ROOT / "hosts" / "webui", {"a1111": {"modules.sd_hijack"}, "forge": {"backend", "modules_forge"}}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            named = [alias.name for alias in node.names]
            whole = named if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in named]
            for module, packages in own.items():
                if path.stem not in (module, "host"):
                    assert f"lib_demofusion.hosts.webui.{module}" not in whole, f"{path.name} imports {module}"
                if path.stem != module:
                    assert not [name for name in whole if name.startswith(tuple(packages))], f"{path.name} knows of {module}"


def test_the_hosts_modules_have_the_same_names():
    def public(name):
        names = set()
        for node in ast.parse((ROOT / "hosts" / "webui" / f"{name}.py").read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return {name for name in names if not name.startswith("_") and not name.isupper()}

    assert public("a1111") == public("forge")


# The files of the diffusers host, each of which may import those before it.
DIFFUSERS = [
    "arguments",
    "checkpoints",
    "schedules",
    "lora",
    "autoencoder",
    "upscaler",
    "controlnet_files",
    "controlnet",
    "run",
]


def test_the_diffusers_hosts_files_import_one_way():
    names = [f"diffusers_{name}" for name in DIFFUSERS] + ["diffusers"]
    assert {path.stem for path in (ROOT / "hosts").glob("diffusers*.py")} == set(names)
    for position, name in enumerate(names):
        for node in ast.walk(ast.parse((ROOT / "hosts" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lib_demofusion.hosts.diffusers"):
                assert node.module.rpartition(".")[2] in names[:position], f"{name} imports {node.module}"


# Development's own packages, each of which may import those before it, and the product.
DEVELOPMENT = ["training", "benchmarks", "evaluation"]


def test_developments_packages_import_one_way():
    for position, package in enumerate(DEVELOPMENT):
        for path in (ROOT.parent / package).glob("*.py"):
            packages, _ = imports(path)
            assert not packages & set(DEVELOPMENT[position + 1 :]), f"{package}/{path.name}"
