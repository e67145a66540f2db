"""The form in txt2img and img2img, and the host's callbacks; what they do is in lib_demofusion.hosts.webui.

Where that cannot be imported, or cannot run, the form says so and what is asked for is refused; that much is in this file.
"""

import html
import json
import sys
import textwrap
import traceback

import gradio as gr
from modules import script_callbacks, scripts

TITLE = "DemoFusion Upscale"  # in the API and in lists of scripts; one of Tiled Diffusion's is called "demofusion"
NAME = "DemoFusion"  # in what people read; what is said of a picture begins with it in its infotext

for name in [name for name in sys.modules if name.partition(".")[0] == "lib_demofusion"]:
    del sys.modules[name]  # "Apply and restart UI" after an update loads this file again, and the rest with it

problem = None  # why DemoFusion cannot run here, and what to do, in one line


def cannot_load(error):
    traceback.print_exc()
    return f"it could not be loaded ({type(error).__name__}: {error}); update it, and the WebUI to 1.10; the console says more"


try:
    from modules.ui_components import InputAccordion, ToolButton

    from lib_demofusion.hosts.webui import checks, choices, gallery, loop, neighbours, plot, readout, settings
    from lib_demofusion.hosts.webui.host import host

    problem = host.unsupported()
except Exception as error:  # whatever it is, what is asked for from now on must be refused
    problem = cannot_load(error)


class DemoFusionScript(scripts.Script):
    section = "accordions"
    create_group = False
    start = None  # the picture that the job starts from, from one of its callbacks to the next
    selected = None  # the gallery's picture, where its button has asked for the job; or why there is none
    unrefused = {}  # what a refusal has changed on the job, and what it was

    def title(self):
        return TITLE

    def elem_id(self, item_id):
        tab = "img2img_" if self.is_img2img else ""
        return f"script_demofusion_{tab}{item_id}"  # whatever the title; Tiled Diffusion's begin with script_txt2img_

    def show(self, is_img2img):
        if not problem:
            self.gallery_button()
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        global problem
        if not problem:
            try:
                return self.form()
            except Exception as error:
                problem = cannot_load(error)
        line = html.escape(f"{NAME} cannot run here: {problem}.")
        gr.HTML(line, elem_id=self.elem_id("unsupported"))
        enabled = gr.Checkbox(False, label=NAME, elem_id=self.elem_id("enable"))  # so that it is known who asks for it
        self.infotext_fields = [] if self.is_img2img else [(enabled, lambda d: f"{NAME} scale" in d)]
        return [enabled]

    def form(self):
        controls = {}
        with InputAccordion(False, label="DemoFusion", elem_id=self.elem_id("enable")) as controls["enabled"]:
            with controls["enabled"].extra():
                table = html.escape(json.dumps(readout.readout_table()))
                gr.HTML(
                    f'<span class="demofusion-readout" data-tab="{self.tab}" data-id="{self.elem_id("")}" '
                    f'data-table="{table}"></span>',
                    elem_id=self.elem_id("readout"),
                    min_width=0,
                )
            if self.is_img2img:
                controls["start_from"] = gr.Radio(
                    list(settings.STARTS),
                    value=settings.PICTURE,
                    label="Start from",
                    elem_id=self.elem_id("start_from"),
                    tooltip="Picture: as it is, no base is sampled, and the tab's width and height do not matter. img2img "
                    "result: first what the tab makes by itself",
                )
            else:
                controls["start_from"] = gr.Textbox("", label="Start from", visible=False, elem_id=self.elem_id("start_from"))
            controls["scale"] = self.slider("scale", "Scale", minimum=1.05, maximum=8, step=0.05)
            preset = gr.Radio(list(settings.PRESETS), value=settings.PRESET, label="Preset", elem_id=self.elem_id("preset"))
            gr.HTML('<span class="demofusion-preset-help"></span>', elem_id=self.elem_id("preset_help"))
            with gr.Accordion("Second pass", open=False, elem_id=self.elem_id("second_pass")) as second_pass:
                self.second_pass(controls)
            with gr.Accordion("Advanced", open=False, elem_id=self.elem_id("advanced")):
                with gr.Row():
                    controls["phase_steps"] = self.slider("phase_steps", "Steps per phase", maximum=150, step=1)
                    controls["most_phase_steps"] = self.slider("most_phase_steps", "Most steps per phase", maximum=150, step=1)
                    controls["denoising_strength"] = self.slider(
                        "denoising_strength", "Denoising strength", minimum=0.05, maximum=1, step=0.05
                    )
                with gr.Row():
                    controls["stride"] = self.slider("stride", "Stride", minimum=0.025, maximum=1, step=0.025)
                    controls["alpha1"] = self.slider("alpha1", "Skip residual α1", maximum=10, step=0.1)
                    controls["hold_steps"] = self.slider("hold_steps", "Hold steps", maximum=150, step=1)
                with gr.Row():
                    controls["hold_flat"] = self.slider("hold_flat", "Hold flat areas", maximum=20, step=0.5)
                    controls["unguided_flat"] = self.slider("unguided_flat", "Unguided flat areas", maximum=50, step=0.5)
                with gr.Row():
                    controls["alpha2"] = self.slider("alpha2", "Dilated sampling α2", maximum=10, step=0.1)
                    controls["alpha3"] = self.slider("alpha3", "Gaussian blur α3", maximum=10, step=0.1)
                    controls["blur_sigma"] = self.slider("blur_sigma", "Blur sigma", minimum=0.05, maximum=5, step=0.05)
                with gr.Row():
                    controls["view_batch_size"] = self.slider("view_batch_size", "View batch size", maximum=64, step=1)
                    controls["window"] = self.slider("window", "Window", maximum=2048, step=64, visible=self.is_img2img)
                with gr.Row():
                    controls["doubling"] = self.checkbox("doubling", "Doubling")
                    controls["pixel_upsampling"] = self.checkbox("pixel_upsampling", "Pixel upsampling")
                    controls["feather"] = self.checkbox("feather", "Feather")
                    controls["jitter"] = self.checkbox("jitter", "Jitter")
                    controls["save_phases"] = gr.Checkbox(
                        False,
                        label="Save intermediate phases",
                        elem_id=self.elem_id("save_phases"),
                        tooltip="write the images of the phases before the last beside the output, with a suffix",
                    )
                controls["resume"] = gr.Textbox(
                    value="",
                    label="Resume from",
                    placeholder="the .safetensors beside a saved phase's image; first send that image here from PNG Info",
                    elem_id=self.elem_id("resume"),
                    max_lines=1,
                    tooltip="the path of a saved phase, to go on from it instead of making it again",
                )

        # Choosing a preset sets the controls, and the controls, whoever sets them, say which preset they are.
        table = json.dumps(settings.presets_table())
        shown = [controls[name] for name in settings.PRESET_SETTINGS]
        self.in_browser(preset.input, f"(name) => ({table})[name]", [preset], shown)
        for control in shown:
            self.in_browser(control.change, f"(...shown) => demofusionPreset({table}, shown)", shown, [preset])

        named = [name for name in settings.ARGUMENTS if name in settings.CONFIG_FIELDS]
        # What is sent to img2img is often the very picture that was made: to enlarge it again takes a click.
        ticks = [] if self.is_img2img else [(controls["enabled"], lambda d: self.read_pasted(d)[0] is not None)]
        self.infotext_fields = ticks
        for name in named:
            self.infotext_fields.append((controls[name], self.pasted(name)))
        self.infotext_fields.append((controls["resume"], lambda d: ""))
        self.infotext_fields.append((second_pass, self.pasted_second_pass))
        if self.is_img2img:
            self.infotext_fields.append((controls["start_from"], settings.pasted_start))

        # Behind what the API promises: the host cuts longer lists off here, so that one argument too many arrives as this.
        end = gr.Textbox(settings.END, label="end of the arguments", visible=False, elem_id=self.elem_id("end"))
        # What a pasted text says and nobody can read; shown until it is emptied, or something else is pasted.
        unread = gr.Textbox("", label=f"{NAME} cannot read", visible=False, elem_id=self.elem_id("unread"))
        # What the gallery's button asks for. It is set for the one click on Generate that follows, and then empty again.
        self.asked = gr.Textbox("", label=f"{NAME} of the gallery", visible=False, elem_id=self.elem_id("asked"))
        self.in_browser(self.asked.change, f"(asked) => demofusionGenerate('{self.tab}', asked)", [self.asked], [self.asked])
        for hidden in (end, unread, self.asked):
            hidden.do_not_save_to_config = True
        self.infotext_fields.append((unread, self.pasted_unread))
        return [*(controls[name] for name in settings.ARGUMENTS), end, unread, self.asked]

    def second_pass(self, controls):
        """What Hires. fix has for its second pass, for the phases after the base."""
        with gr.Row():
            controls["upscaler"] = self.dropdown("upscaler", "Upscaler")
            controls["resize_width"] = self.slider("resize_width", "Resize width to", maximum=8192, step=8)
            controls["resize_height"] = self.slider("resize_height", "Resize height to", maximum=8192, step=8)
        with gr.Row():
            checkpoint = controls["phase_checkpoint"] = self.dropdown("phase_checkpoint", "Checkpoint")
            self.refresh_button(checkpoint, choices.refresh_checkpoints, "phase_checkpoint")
            controls["phase_cfg_scale"] = self.slider("phase_cfg_scale", "CFG scale", maximum=30, step=0.5)
        with gr.Row():
            controls["phase_sampler"] = self.dropdown("phase_sampler", "Sampler")
            controls["phase_schedule"] = self.dropdown("phase_schedule", "Schedule type")
        with gr.Row():
            controls["phase_prompt"] = self.prompt("phase_prompt", "Prompt")
            controls["phase_negative_prompt"] = self.prompt("phase_negative_prompt", "Negative prompt")

    @property
    def tab(self):
        return "img2img" if self.is_img2img else "txt2img"

    def gallery_button(self):
        """In the row below the tab's gallery, one more button: it enlarges the picture that is selected."""
        parts = {}

        def make(last):
            if problem:  # found since, in drawing the form
                return
            tip = "Enlarge the selected picture with DemoFusion, by the settings of its form, ticked or not."
            parts["button"] = ToolButton("🔎", elem_id=self.elem_id("gallery"), tooltip=tip)

        def wire(infos):
            if problem:
                return
            self.in_browser(
                parts["button"].click,
                "(gallery, infos) => demofusionSelected(gallery, infos)",
                [parts["gallery"], infos.component],
                [self.asked],
            )

        self.on_after_component(lambda made: parts.update(gallery=made.component), elem_id=f"{self.tab}_gallery")
        self.on_after_component(make, elem_id="img2img_send_to_extras" if self.is_img2img else "txt2img_upscale")
        self.on_after_component(wire, elem_id=f"generation_info_{self.tab}")

    def in_browser(self, event, script, inputs, outputs):
        """At an event the page runs a script. Its argument is gradio 3's; where there is none the form is not drawn (`ui`)."""
        event(fn=None, _js=script, inputs=inputs, outputs=outputs)

    def slider(self, name, label, minimum=0, **kwargs):
        return gr.Slider(minimum=minimum, **self.shared(name, label), **kwargs)

    def checkbox(self, name, label):
        return gr.Checkbox(**self.shared(name, label))

    def dropdown(self, name, label):
        """A choice of the host's. Another name can be written there, and is refused when it is asked for: gradio takes what
        is no choice for none at all."""
        return gr.Dropdown(choices.choices(name), allow_custom_value=True, **self.shared(name, label))

    def prompt(self, name, label):
        placeholder = f"{label} of the phases after the base.\nEmpty: as the base."
        classes = ["prompt"]  # by which the host's keys for weights and order know it
        return gr.Textbox(lines=3, placeholder=placeholder, elem_classes=classes, **self.shared(name, label))

    def refresh_button(self, control, refresh, name):
        """The host's, which looks for what has come to a list; none on a host that has no such button."""
        try:
            from modules.ui_common import create_refresh_button
        except ImportError:
            return
        create_refresh_button(control, refresh, lambda: {"choices": choices.choices(name)}, self.elem_id(f"{name}_refresh"))

    def shared(self, name, label):
        """What every control of a setting has."""
        value, help = settings.shown(name, getattr(settings.FORM, name)), settings.CONFIG_FIELDS[name].metadata["help"]
        return dict(value=value, label=label, elem_id=self.elem_id(name), tooltip=help)

    def read_pasted(self, parameters):
        """The settings in pasted parameters, and what is none of them: each tab reads those of pictures that it makes."""
        if (settings.START_KEY in parameters) != self.is_img2img:
            return None, ""
        return settings.read_pasted(parameters)

    def pasted(self, name):
        """The value of a control for pasted parameters: as written, else the default; none without DemoFusion."""

        def value(parameters):
            read, _ = self.read_pasted(parameters)
            return None if read is None else settings.shown(name, read[name])

        return value

    def pasted_second_pass(self, parameters):
        """Its part of the form opens where pasted parameters set something in it that no preset says."""
        read, _ = self.read_pasted(parameters)
        return gr.update(open=True) if read is not None and settings.sets_second_pass(read) else gr.update()

    def pasted_unread(self, parameters):
        _, unread = self.read_pasted(parameters)
        return gr.update(value=unread, visible=bool(unread))

    def own(self, p):
        """Whether p is the job that the user asked for, and no other extension's pass within it."""
        return problem or not neighbours.is_inner(p, self.is_img2img)

    def of(self, p):
        """What the job p starts from, if that is a picture."""
        return self.start if self.start is not None and self.start.p is p else None

    def before_process(self, p, *args):
        """Before the host has looked at the job: what the gallery's button asks for."""
        if not self.own(p):
            return
        forget(p)
        self.start = self.selected = None
        if problem:
            return
        try:
            self.selected = gallery.take(p, args)
        except Exception as error:  # refused in `process`; now the host has not counted its prompts yet
            self.selected = error

    def process(self, p, *args):
        """Before anything is sampled. Whatever is wrong by then refuses the job."""
        if not self.own(p):
            return
        try:
            asked = bool(args) and args[0] not in (False, None)
            twin = self.twin(p, asked)
            if asked and problem:
                raise ValueError(f"it cannot run here: {problem}")
            if twin is not None:
                raise ValueError(f"another script is called {TITLE} as well ({twin.filename}); remove one of the two")
            if isinstance(self.selected, Exception):
                raise self.selected
            if args and not problem:
                self.start = checks.prepare(p, args, self.selected)
        except Exception as error:
            self.refuse(p, error)
            p.init = lambda *args: None  # which would encode pictures, at whatever size, for nothing

    def twin(self, p, asked):
        """Another script of our name, if DemoFusion may be meant: the API gives the arguments of both to the first."""
        for script in p.scripts.alwayson_scripts if p.scripts else []:
            if script is self or str(script.name).lower() != TITLE.lower():
                continue
            given = p.script_args[script.args_from : script.args_to]
            untouched = [getattr(control, "value", None) for control in script.controls or []]
            if asked or (getattr(p, "is_api", False) and repr(list(given)) != repr(untouched)):
                return script
        return None

    def before_process_batch(self, p, *args, **kwargs):
        """Before anything of a batch is sampled, when all scripts have had their turn."""
        if not self.own(p):
            return
        if args and not problem and not refused(p):
            try:
                checks.before_batch(p, args, self.of(p))
            except Exception as error:
                self.refuse(p, error)
        if refused(p):
            p.prompts = []  # ends the host's loop over the batches, however many another script has asked for since

    def process_before_every_sampling(self, p, *args, **kwargs):
        if args and not problem and self.own(p) and not refused(p):
            loop.before_sampling(p, args, self.of(p))

    def post_sample(self, p, ps, *args):
        if args and not problem and self.own(p) and not refused(p):
            loop.post_sample(p, ps, args, self.of(p))

    def postprocess_maskoverlay(self, p, ppmo, *args):
        if self.own(p) and self.of(p) is not None:
            self.of(p).overlay(ppmo)

    def postprocess(self, p, processed, *args):
        """A refused job of another script, a cell of a plot, say, becomes a picture of the refusal: they need one, or fail."""
        if not self.own(p):
            return
        if self.of(p) is not None:
            self.start.put_back()
            self.start = None
        chosen = p.script_args[0]  # the number of a script; a pasted text puts "None" there
        if refused(p) and not processed.images and isinstance(chosen, int) and chosen > 0:
            words = picture_of(f"{NAME}: {refused(p)}", p.width, p.height)
            processed.images = [words.copy() for _ in p.all_prompts]
            processed.infotexts = [processed.infotext(p, i) for i in range(len(p.all_prompts))]
        if refused(p):  # img2img's batch goes on with p
            vars(p).pop("init", None)
            vars(p).update(self.unrefused)

    def refuse(self, p, error):
        if not refused(p):
            self.unrefused = {name: getattr(p, name) for name in ("n_iter", "do_not_save_grid") if hasattr(p, name)}
        refuse_because(p, error)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


REFUSED = f"{NAME} refused"


def refuse(p, line):
    """No image is made; the line reaches the form's comments and, through the infotext, the API's reply."""
    line = " ".join(str(line).split())
    if hasattr(p, "comment"):  # hosts that are too old have none
        p.comment(f"{NAME}: {line}")
    p.extra_generation_params[REFUSED] = line
    p.n_iter = 0
    p.do_not_save_grid = True


def refuse_because(p, error):
    """Refuse for what was raised: a ValueError says it in words for the user, anything else is a fault."""
    if isinstance(error, ValueError):
        refuse(p, error)
    else:
        traceback.print_exc()
        refuse(p, f"it failed before it began ({type(error).__name__}: {error}); the console says more")


def refused(p):
    return p.extra_generation_params.get(REFUSED)


def forget(p):
    """What was said of another job: the host's plots make their jobs as copies that share these parameters."""
    for key in [key for key in p.extra_generation_params if key.startswith(f"{NAME} ")]:
        del p.extra_generation_params[key]


def picture_of(line, width, height):
    from modules import images
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (max(width, 256), max(height, 256)), "white")
    size = max(picture.width // 24, 10)
    text = "\n".join(textwrap.wrap(line, width=picture.width * 2 // size - 4))
    ImageDraw.Draw(picture).multiline_text((size, size), text, font=images.get_font(size), fill="black")
    return picture


# ---------------------------------------------------------------------------------------------------------------------

if not problem:
    script_callbacks.on_cfg_denoiser(loop.on_cfg_denoiser)
    script_callbacks.on_before_ui(lambda: plot.add_plot_axes(DemoFusionScript))
    script_callbacks.on_app_started(readout.add_routes)
