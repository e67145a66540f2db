"""Prompts as the WebUI reads them and as diffusers does: there brackets weigh, here every prompt is plain text."""

from __future__ import annotations

import re

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# A number behind a colon, as in 1.2; but not a time or a ratio as in 10:30 and 16:9, which need brackets round them too.
WEIGHT = rf"(?:(?<!\d):\s*{NUMBER}|:\s*[+-]?\d*\.\d+)\s*"
# What is found where a prompt was written for the WebUI, and what to write instead.
SYNTAX = (
    (r"<\w+:[^<>]*>", "load such a network into the pipeline, or leave it out"),
    (r"\bBREAK\b", "leave it out, or write it in small letters"),
    (r"\bAND\b", "write one prompt, or write it in small letters"),
    (r"\\[()\[\]]", "write the bracket without the backslash"),
    (rf"\((?:[^()]|\([^()]*\))*?{WEIGHT}\)", "write it without the brackets and the number"),
    (rf"\[[^\[\]]*{WEIGHT}\]", "write one prompt for all steps"),
    (r"\[[^\[\]]*\|[^\[\]]*\]", "write one prompt for all steps"),
    (r"\(\([^()]*\)\)|\[\[[^\[\]]*\]\]", "write it without the brackets"),
)


def check_syntax(prompt: str, name: str) -> None:
    """Raises ValueError, one line, if a prompt holds what only the WebUI understands: weights, networks, AND, schedules.

    Plain brackets, as in "a cat (a tabby)", are text.
    """
    for pattern, instead in SYNTAX:
        if found := re.search(pattern, prompt):
            part = " ".join(found[0].split())
            part = part if len(part) <= 40 else f"{part[:37]}..."
            raise ValueError(f"the {name} has {part!r}, which only the WebUI understands; {instead}")


def as_webui_prompt(text: str) -> str:
    """Plain text as the WebUI must be given it, so that it reads the same: its brackets and backslashes with a backslash."""
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
