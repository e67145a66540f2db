"""javascript/demofusion.js outside the browser, in node."""

import json
import shutil
import subprocess
from pathlib import Path

NODE = shutil.which("node")
SCRIPT = Path(__file__).resolve().parent.parent / "javascript" / "demofusion.js"
# What the form says at first of the phases' own settings.
SAME = {"mostPhaseSteps": 0, "phaseSampler": "", "phaseScheduler": "", "phaseCfg": 0, "upscaler": "", "resize": [0, 0]}
RUN = """
const {demofusionReadout} = require(process.argv[1]);
const forms = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify(forms.map(demofusionReadout)));
"""


def in_node(script, *arguments):
    """What a function of the form, written in JavaScript, returns."""
    code = "Object.assign(globalThis, require(process.argv[1])); "
    code += "Promise.resolve(%s(...%s)).then((value) => console.log(JSON.stringify(value)))"
    command = [NODE, "-e", code % (f"({script})", json.dumps(arguments)), str(SCRIPT)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def readouts(forms):
    """What the form's line says for each form, all in one process; as at first, where it says nothing of the phases' own."""
    forms = [{**SAME, **form} for form in forms]
    command = [NODE, "-e", RUN, str(SCRIPT)]
    run = subprocess.run(command, input=json.dumps(forms), capture_output=True, text=True, check=True)
    return json.loads(run.stdout)
