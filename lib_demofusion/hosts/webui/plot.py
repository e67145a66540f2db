"""An axis of the host's X/Y/Z plot for each setting."""

from __future__ import annotations

import functools
from typing import Any

from lib_demofusion.config import PRESETS, DemoFusionConfig
from lib_demofusion.hosts.webui.choices import choices
from lib_demofusion.hosts.webui.settings import ARGUMENTS, CONFIG_FIELDS, NAME, PRESET_SETTINGS, SAME, STARTS

FLAGS = {"True": True, "False": False}  # as the host's own axes have them


def add_plot_axes(script: type) -> None:
    """Give the host's X/Y/Z plot an axis for each setting; a plot over one of them turns DemoFusion on.

    script: the class of the extension's script, by which a job's arguments are found; names and files may be others' too.
    """
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        axis = data.module.AxisOption
        preset = functools.partial(_set_preset, script)
        data.module.axis_options.append(axis(f"[{NAME}] preset", str, preset, choices=lambda: list(PRESETS)))
        start = functools.partial(_set_argument, script, "start_from")
        data.module.axis_options.append(
            data.module.AxisOptionImg2Img(f"[{NAME}] start from", str, start, choices=lambda: list(STARTS))
        )
        for name in filter(CONFIG_FIELDS.get, ARGUMENTS):
            field, offered = CONFIG_FIELDS[name], None
            flag = isinstance(field.default, bool)
            if flag:
                offered = functools.partial(list, FLAGS)
            elif name in SAME:
                offered = functools.partial(choices, name)
            data.module.axis_options.append(
                axis(
                    f"[{NAME}] {field.metadata['label']}",
                    str if flag else type(field.default),
                    functools.partial(_set_flag if flag else _set_argument, script, name),
                    choices=offered,
                )
            )
        return


def _set_flag(script: type, name: str, p: Any, value: str, values: Any) -> None:
    _set_argument(script, name, p, FLAGS.get(value, value), values)


def _set_argument(script: type, name: str, p: Any, value: Any, values: Any) -> None:
    _set_arguments(script, p, {name: value})


def _set_preset(script: type, p: Any, value: str, values: Any) -> None:
    try:
        config = DemoFusionConfig.preset(value)
    except ValueError as error:
        _set_arguments(script, p, {}, unread=str(error))  # refuses this cell, and not the whole plot
        return
    _set_arguments(script, p, {name: getattr(config, name) for name in PRESET_SETTINGS})


def _set_arguments(script: type, p: Any, values: dict[str, Any], unread: str = "") -> None:
    own = next(own for own in p.scripts.alwayson_scripts if isinstance(own, script))
    args = list(p.script_args)
    for name, value in {"enabled": True, **values}.items():
        args[own.args_from + ARGUMENTS.index(name)] = value
    if unread:
        args[own.args_from + len(ARGUMENTS) + 1] = unread
    p.script_args = args
