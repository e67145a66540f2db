"""The form in the txt2img tab, and the host's callbacks; what they do is in lib_demofusion.hosts.webui."""

import json
import sys

import gradio as gr
from modules import script_callbacks, scripts
from modules.infotext_utils import PasteField
from modules.ui_components import InputAccordion

for name in [name for name in sys.modules if name.partition(".")[0] == "lib_demofusion"]:
    del sys.modules[name]  # "Apply and restart UI" after an update loads this file again, and the rest with it

try:
    from lib_demofusion.config import infotext_label
    from lib_demofusion.hosts import webui

    problem = webui.unsupported()
except (ImportError, AttributeError) as error:
    problem = f"it lacks what the extension needs ({error})"


class DemoFusionScript(scripts.Script):
    section = "accordions"
    create_group = False

    def title(self):
        return "DemoFusion"

    def show(self, is_img2img):
        return False if is_img2img else scripts.AlwaysVisible

    def ui(self, is_img2img):
        if problem:
            gr.HTML(f"DemoFusion does not support this host yet: {problem}.", elem_id=self.elem_id("unsupported"))
            return []
        controls = {}
        with InputAccordion(False, label="DemoFusion", elem_id=self.elem_id("enable")) as controls["enabled"]:
            with controls["enabled"].extra():
                table = json.dumps(webui.readout_table()).replace('"', "&quot;")
                gr.HTML(
                    f'<span class="demofusion-readout" data-table="{table}"></span>',
                    elem_id=self.elem_id("readout"),
                    min_width=0,
                )
            with gr.Row():
                controls["scale"] = self.slider("scale", "Scale", minimum=1.05, maximum=8, step=0.05)
                preset = gr.Radio(
                    list(webui.PRESETS),
                    value=webui.PRESET,
                    label="Preset",
                    elem_id=self.elem_id("preset"),
                    tooltip="sets what is under Advanced; nothing is chosen where that is no preset",
                )
            with gr.Accordion("Advanced", open=False, elem_id=self.elem_id("advanced")):
                with gr.Row():
                    controls["phase_steps"] = self.slider("phase_steps", "Steps per phase", maximum=150, step=1)
                    controls["denoising_strength"] = self.slider(
                        "denoising_strength", "Denoising strength", minimum=0.05, maximum=1, step=0.05
                    )
                    controls["stride"] = self.slider("stride", "Stride", minimum=0.025, maximum=1, step=0.025)
                with gr.Row():
                    controls["alpha1"] = self.slider("alpha1", "Skip residual α1", maximum=10, step=0.1)
                    controls["alpha2"] = self.slider("alpha2", "Dilated sampling α2", maximum=10, step=0.1)
                    controls["alpha3"] = self.slider("alpha3", "Gaussian blur α3", maximum=10, step=0.1)
                with gr.Row():
                    controls["blur_sigma"] = self.slider("blur_sigma", "Blur sigma", minimum=0.05, maximum=5, step=0.05)
                    controls["hold_flat"] = self.slider("hold_flat", "Hold flat areas", maximum=20, step=0.5)
                    controls["view_batch_size"] = self.slider("view_batch_size", "View batch size", maximum=64, step=1)
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
                    label="Resume from",
                    placeholder="the .safetensors beside a saved phase's image; first send that image here from PNG Info",
                    elem_id=self.elem_id("resume"),
                    max_lines=1,
                )

        # Choosing a preset sets the controls, and the controls, whoever sets them, say which preset they are.
        table = json.dumps(webui.presets_table())
        shown = [controls[name] for name in webui.PRESET_SETTINGS]
        preset.input(fn=None, _js=f"(name) => ({table})[name]", inputs=[preset], outputs=shown)
        for control in shown:
            control.change(fn=None, _js=f"(...shown) => demofusionPreset({table}, shown)", inputs=shown, outputs=[preset])

        settings = [name for name in webui.ARGUMENTS if name in webui.CONFIG_FIELDS]
        scale = infotext_label(webui.CONFIG_FIELDS["scale"])
        self.infotext_fields = [PasteField(controls["enabled"], lambda d: scale in d)]
        for name in settings:
            self.infotext_fields.append(PasteField(controls[name], self.pasted(name)))
        self.infotext_fields.append(PasteField(controls["resume"], lambda d: ""))
        return [controls[name] for name in webui.ARGUMENTS]

    def slider(self, name, label, minimum=0, **kwargs):
        return gr.Slider(minimum=minimum, **self.shared(name, label), **kwargs)

    def checkbox(self, name, label):
        return gr.Checkbox(**self.shared(name, label))

    def shared(self, name, label):
        """What every control of a setting has."""
        value = getattr(webui.DemoFusionConfig.preset(webui.PRESET), name)
        help = webui.CONFIG_FIELDS[name].metadata["help"]
        return dict(value=value, label=label, elem_id=self.elem_id(name), tooltip=help)

    def pasted(self, name):
        """The value of a control for pasted parameters: as written, else the default; none without DemoFusion."""
        scale, label = (infotext_label(webui.CONFIG_FIELDS[key]) for key in ("scale", name))
        default = webui.CONFIG_FIELDS[name].default

        def value(parameters):
            if scale not in parameters:
                return None
            text = parameters.get(label)
            if text is None:
                return default
            return text == "True" if isinstance(default, bool) else type(default)(text)

        return value

    def process(self, p, *args):
        if args:
            webui.prepare(p, args)

    def process_before_every_sampling(self, p, *args, **kwargs):
        if args:
            webui.before_sampling(p, args)

    def post_sample(self, p, ps, *args):
        if args:
            webui.post_sample(p, ps, args)


if not problem:
    script_callbacks.on_cfg_denoiser(webui.on_cfg_denoiser)
    script_callbacks.on_before_ui(webui.add_plot_axes)
