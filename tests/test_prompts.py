"""Prompts are plain text: what only the WebUI understands is refused, and brackets reach it as brackets."""

import re

import pytest

from lib_demofusion.hosts.diffusers import as_webui_prompt, check_syntax

REFUSED = {
    "a (red:1.2) fox": "(red:1.2)",
    "a ((red) fox:0.9)": "((red) fox:0.9)",
    "a ( red : 1.2 ) fox": "( red : 1.2 )",
    "(red:-1)": "(red:-1)",
    "(red:.5)": "(red:.5)",
    "(a 35 mm photograph of a very old red fox on grass:1.3)": "(a 35 mm photograph of a very old red...",
    "(model 3:1.2)": "(model 3:1.2)",
    "<lora:detail:0.8> a fox": "<lora:detail:0.8>",
    "<lora:detail>": "<lora:detail>",
    "<hypernet:anime:1>": "<hypernet:anime:1>",
    "<lyco:x:1>": "<lyco:x:1>",
    "a fox BREAK a hound": "BREAK",
    "a fox\nBREAK\na hound": "BREAK",
    "a fox AND a hound": "AND",
    "a fox AND a hound:0.5": "AND",
    "[fox:hound:0.5]": "[fox:hound:0.5]",
    "[fox::10]": "[fox::10]",
    "[hound:0.25]": "[hound:0.25]",
    "[fox|hound] on grass": "[fox|hound]",
    r"a fox \(animal\)": r"\(",
    r"a fox \[animal\]": r"\[",
    "((fox))": "((fox))",
    "[[fox]]": "[[fox]]",
}
PLAIN = [
    "a cat (a tabby) on grass",
    "a clock (at 10:30)",
    "a screen [16:9]",
    "a (wide 21:9) screen",
    "a red fox, sharp focus: 8k",
    "sand and stars, BREAKFAST, LAND, BRAND",
    "a <token> of mine",
    "2 < 3 : 4 > 1",
    ":) :( :-)",
    "C:\\folder",
    "",
]


@pytest.mark.parametrize("prompt", REFUSED)
def test_what_only_the_webui_understands_is_refused_with_what_was_found(prompt):
    with pytest.raises(ValueError, match=r"^the negative prompt has '.*', which only the WebUI understands; \w+") as error:
        check_syntax(prompt, "negative prompt")
    assert repr(REFUSED[prompt]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_text_is_not(prompt):
    check_syntax(prompt, "prompt")


def read_by_the_webui(text):
    """Its rule: with a backslash brackets and backslashes are text; without, brackets weigh and a backslash is lost."""
    weighing = re.findall(r"(?<!\\)(?:\\\\)*[()\[\]]", text)
    return re.sub(r"\\([\\()\[\]])", r"\1", text), weighing


@pytest.mark.parametrize("prompt", PLAIN)
def test_the_webui_reads_the_same_text(prompt):
    assert read_by_the_webui(as_webui_prompt(prompt)) == (prompt, [])


def test_brackets_get_a_backslash():
    assert as_webui_prompt("a cat (a tabby), [16:9]") == r"a cat \(a tabby\), \[16:9\]"
    assert as_webui_prompt("a red fox") == "a red fox"
