"""The phases' own sampler, guidance, prompts, extra networks and checkpoint, as Hires. fix has them for its second pass.

`resolved` says before anything is sampled what the host knows of the names in the settings. While the phases run, p's fields
are the phases' (`SecondPass.running`), so that whoever reads them, the host included, reads the phases'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from modules import extra_networks, sd_samplers, sd_schedulers, shared

from lib_demofusion.config import INFOTEXT_PREFIX, DemoFusionConfig
from lib_demofusion.hosts.webui.checkpoints import Checkpoint, another, check_kind, checkpoint_named
from lib_demofusion.hosts.webui.decoding import in_turns
from lib_demofusion.hosts.webui.host import host
from lib_demofusion.hosts.webui.samplers import SAMPLERS
from lib_demofusion.hosts.webui.settings import say
from lib_demofusion.hosts.webui.upscalers import one_of, upscaler_named

# ---------------------------------------------------------------------------------------------------- what names stand for


def resolved(config: DemoFusionConfig) -> DemoFusionConfig:
    """The settings with names as the host writes them. Raises ValueError, one line, for what the host does not have."""
    sampler, schedule = _sampling(config.phase_sampler, config.phase_schedule)
    info = checkpoint_named(config.phase_checkpoint)
    return replace(
        config,
        phase_sampler=sampler,
        phase_schedule=schedule,
        phase_checkpoint="" if info is None else info.short_title,
        upscaler=upscaler_named(config.upscaler),
    )


def check(config: DemoFusionConfig) -> None:
    """Raises ValueError, one line, for what the phases cannot have, as far as it is known before anything is sampled."""
    check_kind(another(config.phase_checkpoint))
    loras = _host_loras()
    for name in _loras_of(extra_networks.parse_prompt(config.phase_prompt)[1]):
        if loras is None or _lora_named(loras, name) is not None:
            continue
        loras.list_available_networks()  # as the host does, which may not have seen a new file
        if _lora_named(loras, name) is None:
            known = ", ".join(sorted(loras.available_networks)) or "none"
            raise ValueError(f"there is no LoRA {name!r}, which the phase prompt names; there are: {known}")


def _sampling(sampler: str, schedule: str) -> tuple[str, str]:
    """The host's names of a sampler and a schedule, each of which may be "".

    As the host reads them: also by their aliases, and a schedule's behind the sampler's. Raises ValueError, one line.
    """
    schedules = {known.label: [known.label, known.name, *(known.aliases or [])] for known in sd_schedulers.schedulers}
    wanted, found = schedule.strip().lower(), sd_samplers.samplers_map.get(sampler.strip().lower())
    named = next((label for label, names in schedules.items() if wanted in map(str.lower, names)), None)
    if schedule:
        schedule = named or one_of(schedule, "schedule type", schedules)
    if not sampler:
        return "", schedule
    ends = [(label, f" {name.lower()}") for label, names in schedules.items() for name in names]
    for label, end in () if found else ends:
        head = sampler.strip().lower().removesuffix(end)
        if head in sd_samplers.samplers_map and schedule in ("", label):
            return sd_samplers.samplers_map[head], label
    known = [data.name for data in sd_samplers.all_samplers if data.name in SAMPLERS]
    return found or one_of(sampler, "sampler", known), schedule


# ------------------------------------------------------------------------------------------------------ the host's LoRAs


def _host_loras() -> Any:
    """The module of the host's own extension Lora that knows the files; None where LoRAs are another extension's."""
    activate = getattr(type(extra_networks.extra_network_registry.get("lora")), "activate", None)
    module = getattr(activate, "__globals__", {}).get("networks")
    needed = ("available_networks", "available_network_aliases", "forbidden_network_aliases", "loaded_networks")
    return module if all(hasattr(module, name) for name in needed) else None


def _loras_of(networks: Any) -> list[str]:
    """The names of the LoRAs among a prompt's extra networks."""
    kinds = ["lora"] + ["lyco"] * ("lyco" not in extra_networks.extra_network_registry)
    return [params.positional[0] for kind in kinds for params in (networks or {}).get(kind, ()) if params.positional]


def _lora_named(loras: Any, name: str) -> Any:
    """What the host has of a LoRA, by its name or its alias; None: nothing."""
    known = loras.available_networks if name.lower() in loras.forbidden_network_aliases else loras.available_network_aliases
    return known.get(name)


# ------------------------------------------------------------------------------------------------------- few-step weights

FEW_STEPS = re.compile(r"lcm|lightning|turbo|hyper|dmd|tcd|pcm|schnell|flash|distil|few.?step|\b[1-9].?steps?\b", re.IGNORECASE)
GUIDED = 3  # the CFG scale from which on ordinary weights draw well


def few_step_note(sampler: str, cfg_scale: float, names: Iterable[str]) -> str | None:
    """What to tell of phases that sample as few-step weights want it, where no name says that there are any.

    names: of the phases' checkpoint and LoRAs, and what their files say of themselves.
    """
    if sampler != "LCM" or cfg_scale >= GUIDED or any(FEW_STEPS.search(name) for name in names):
        return None
    return (
        f"LCM at CFG scale {cfg_scale:g} is for few-step weights, and no name of the phases' checkpoint or LoRAs says that "
        "they are such; if they are not, write an LCM-LoRA into the phase prompt, or choose another sampler and CFG scale"
    )


def _said_of(metadata: Any) -> list[str]:
    """The short texts among what a file says of itself; of what it was trained on there may be much more."""
    return [value for value in (metadata or {}).values() if isinstance(value, str) and len(value) <= 200]


# ------------------------------------------------------------------------------------------------------- while they run

# Of p, what the phases may have of their own, and what the host sets when it samples by that.
FIELDS = ("sampler_name", "scheduler", "cfg_scale", "prompts", "negative_prompts", "extra_network_data", "lora_hashes")
FIELDS += ("steps", "c", "uc", "step_multiplier", "firstpass_steps", "s_churn", "s_tmin", "s_tmax", "s_noise")
HASHES = "Lora hashes"  # in the infotext, of all that had a part in the picture
# What else the host writes there while it samples, and is to be read of the phases, too.
KEPT = (HASHES, "Refiner", "Refiner switch at", "Refiner switch by sampling steps")


class SecondPass:
    """A batch of the job p, whose base is there, as its phases have it. config: as `resolved` gives it."""

    def __init__(self, p: Any, config: DemoFusionConfig):
        self.p = p
        self.config = config
        self.checkpoint = Checkpoint(p, another(config.phase_checkpoint), self._activate)
        self.before = {name: vars(p)[name] for name in FIELDS if name in vars(p)}
        self.told = dict(p.extra_generation_params)
        self.hashes = dict(getattr(p, "lora_hashes", {}))
        self.own = {name: value for name, value in self._values().items() if value != getattr(p, name)}
        self._turns = ExitStack()

    def _values(self) -> dict[str, Any]:
        """p's fields as the phases have them."""
        p, config = self.p, self.config
        prompts, networks = self._prompts()
        negative = [shared.prompt_styles.apply_negative_styles_to_prompt(config.phase_negative_prompt, p.styles)]
        return {
            "sampler_name": config.phase_sampler or p.sampler_name,
            "scheduler": config.phase_schedule or p.scheduler,
            "cfg_scale": config.phase_cfg_scale or p.cfg_scale,
            "prompts": prompts,
            "negative_prompts": negative * len(p.prompts) if config.phase_negative_prompt.strip() else p.negative_prompts,
            "extra_network_data": networks,
        }

    def _prompts(self) -> tuple[list[str], Any]:
        """The prompts without their extra networks, and these, by kind."""
        p, typed = self.p, self.config.phase_prompt
        if not typed.strip():
            return p.prompts, p.extra_network_data
        text, networks = extra_networks.parse_prompt(typed)
        if not text.strip():  # networks alone come to the base's, as if they were written behind its prompt
            base = p.extra_network_data or {}
            return p.prompts, {kind: [*base.get(kind, ()), *networks.get(kind, ())] for kind in {**base, **networks}}
        text, networks = extra_networks.parse_prompt(shared.prompt_styles.apply_styles_to_prompt(typed, p.styles))
        return [text] * len(p.prompts), networks

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile p's fields are the phases', and its infotext's, too; then they are the base's again."""
        p = self.p
        try:
            with self._turns:
                self._turns.enter_context(in_turns(p.sd_model))
                vars(p).update(self.own)
                if self.own.keys() - {"scheduler", "cfg_scale"} or self.checkpoint.info:
                    p.c = p.uc = None  # to be set up
                yield
        finally:
            networks = p.extra_network_data
            _restore(vars(p), self.before, FIELDS)
            if self.own or self.checkpoint.info:
                _restore(p.extra_generation_params, self.told, self._hosts_words())
            if self._own_networks:
                extra_networks.deactivate(p, networks)  # tells of those that did not fit the model
                self._activate_bases()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within `running`, meanwhile p's fields and its infotext are the base's, of what is saved."""
        p = self.p
        fields, words = dict(vars(p)), dict(p.extra_generation_params)
        _restore(vars(p), self.before, FIELDS)
        _restore(p.extra_generation_params, self.told, self._hosts_words())
        try:
            yield
        finally:
            _restore(vars(p), fields, FIELDS)
            _restore(p.extra_generation_params, words, self._hosts_words())

    def begin(self) -> None:
        """What `running` cannot undo by itself: the phases' networks. Raises RuntimeError, one line, if one is not active."""
        if self._own_networks:
            self._activate()
        elif not self.checkpoint.info:
            self._warn()

    def load(self) -> None:
        """The phases' checkpoint, if it is not loaded yet, with the phases' networks."""
        if self.checkpoint.waits:
            model = self.p.sd_model
            self.checkpoint.load()
            if self.p.sd_model is not model:
                self._turns.enter_context(in_turns(self.p.sd_model))

    def put_back(self) -> None:
        """The base's checkpoint, with its networks, if the phases' has been loaded."""
        if self.checkpoint.put_back():
            self._activate_bases()

    def describe(self, number: int) -> None:
        """Let the infotext of what is saved of phase `number` name the networks that had a part in it."""
        base = self.before.get("lora_hashes", {})
        hashes = self.hashes if number > 1 else base
        if self.hashes != base:
            words = {HASHES: ", ".join(f"{name}: {value}" for name, value in hashes.items())} if hashes else {}
            _restore(self.p.extra_generation_params, words, (HASHES,))

    @property
    def _own_networks(self) -> bool:
        """Whether the phases' networks are to be made the active ones, and no checkpoint's loading does that."""
        return "extra_network_data" in self.own and not self.checkpoint.info and not self.p.disable_extra_networks

    def _activate(self) -> None:
        p = self.p
        host.activate(p, p.extra_network_data)
        self.hashes.update(getattr(p, "lora_hashes", {}))
        loras = _host_loras()
        active = {lora.mentioned_name for lora in loras.loaded_networks} if loras else set()
        for name in _loras_of(extra_networks.parse_prompt(self.config.phase_prompt)[1]):
            if loras and name not in active and not p.disable_extra_networks:
                raise RuntimeError(f"the LoRA {name} could not be loaded, as the console says; take another")
        self._warn()

    def _activate_bases(self) -> None:
        p = self.p
        words = p.extra_generation_params.get(HASHES)
        host.activate(p, p.extra_network_data)
        _restore(vars(p), self.before, ("lora_hashes",))
        _restore(p.extra_generation_params, {} if words is None else {HASHES: words}, (HASHES,))

    def _warn(self) -> None:
        """Tell of settings for few-step weights where there may be none."""
        p = self.p
        if not self.own.keys() & {"sampler_name", "cfg_scale"}:
            return
        info = p.sd_model.sd_checkpoint_info
        names = [info.name_for_extra, *_said_of(info.metadata), *_loras_of(p.extra_network_data)]
        for lora in getattr(_host_loras(), "loaded_networks", ()):
            file = lora.network_on_disk
            names += [file.name, file.alias, *_said_of(file.metadata)]
        note = few_step_note(p.sampler_name, p.cfg_scale, names)
        if note:
            say(p, "note", note)

    def _hosts_words(self) -> list[str]:
        """The keys of the infotext that the host's own sampling may have written."""
        own = (*KEPT, f"{INFOTEXT_PREFIX} ")
        return [key for key in {**self.told, **self.p.extra_generation_params} if not key.startswith(own)]


def _restore(values: dict[str, Any], before: dict[str, Any], names: Iterable[str]) -> None:
    """Of `values`, those of these names are as in `before`, or not there."""
    for name in names:
        if name in before:
            values[name] = before[name]
        else:
            values.pop(name, None)
