"""The script's arguments for tests, which name the settings that they change; the others are the paper's."""

from dataclasses import fields


def settings_of(webui, values):
    """Of the arguments' values, in their order, those that a picture's parameters hold."""
    return [
        value for name, value in zip(webui.settings.ARGUMENTS, values) if name not in ("save_phases", "resume", "start_from")
    ]


def script_arguments(webui, args):
    """(enabled, scale) or (enabled, scale, {name: value}) as all the arguments in their order; anything else as it is."""
    if len(args) != 2 and not (len(args) == 3 and isinstance(args[2], dict)):
        return list(args)
    paper = {f.name: f.default for f in fields(webui.settings.DemoFusionConfig)}
    given = {"save_phases": False, "resume": "", "start_from": "", **dict(zip(("enabled", "scale"), args)), **dict(*args[2:])}
    return [{**paper, **given}[name] for name in webui.settings.ARGUMENTS]
