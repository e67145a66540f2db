"""DemoFusion in the AUTOMATIC1111 WebUI and in Forge; the only package that imports the host's `modules`.

    settings.py    what the form and the API say: the arguments, their values, and what a picture's infotext holds of them
    choices.py     the lists that the form offers
    samplers.py    what the method must know of the host's samplers, and how many model calls they make
    checks.py      before anything is sampled: the plan, and all refusals
    neighbours.py  other extensions beside this one
    readout.py     what the line beside the checkbox is told by the server
    plot.py        axes of the X/Y/Z plot
    units.py       the extension ControlNet: which of its units can be followed, and which are refused
    controlnet.py  and what each view sees of their control images
    second_pass.py the phases' own sampler, guidance, prompts and networks, on p while they run
    checkpoints.py and their own checkpoint
    upscalers.py   the host's upscalers
    picture.py     a given picture: what a job of img2img, or of the gallery, starts from
    gallery.py     the gallery's button
    phases.py      the phases after the base: noise, enlarging, the sampling of one
    loop.py        a job: from the base's latents through the phases to what the host decodes
    step.py        one step of a phase's sampler
    progress.py    the bar, and live previews
    decoding.py    the autoencoder in tiles
    host.py        which host it is: picks one of
    a1111.py       what only AUTOMATIC1111's WebUI does in its way, and
    forge.py       what only the hosts of Forge's kind do, under the same names
    patched_controls.py  the ControlNet that those have of their own
    sampling.py    what the host's samplers are asked for, and how, in all of them
    embedded.py    the embedded checkpoint's networks, for the tests

Phase 1 is the host's own sampling. `post_sample` runs the phases after it (`loop`). Each has a sampler of its own, made
by the host and gone with the phase, and on that sampler's denoiser hang

- a hook in front of it that gets the sampler's own x: the skip residual, Eq. 4 (`step.PhaseHooks.before_step`);
- the fused prediction in place of the model's own, put there from the host's `on_cfg_denoiser` callback at every step,
  because a refiner switch makes a new model (`step.PhaseHooks.fused`). On A1111 it stands in place of the inner model's
  `forward` (`a1111.Prediction`), on Forge it hangs on a clone of the UNet's patcher (`forge.Prediction`).

Nothing is put on the host's modules, classes or model; what a phase changes on `p` is put back when the phases end, and so
are the active networks and the checkpoint.
"""
