// The readout beside the checkbox: what will be made, and how many model calls that takes, as the form stands now.
// It counts as lib_demofusion/phases.py and model_calls in lib_demofusion/hosts/webui.py do; a test compares them.

function demofusionCalls([counts, levels, discards], scheduler, steps, skipped) {
    let run = steps - skipped;
    if (counts === "ddim" || counts === "grid") {
        const grid = skipped ? run : Math.ceil(1000 / Math.max(Math.floor(1000 / steps), 1));
        return counts === "ddim" ? grid - 1 : grid;
    }
    if (counts === "fixed" && !skipped) return steps;
    if (scheduler === "DDIM" && counts !== "unknown") {
        run = Math.ceil((levels - 1) / Math.max(Math.floor(levels / (steps + discards)), 1)) - discards - skipped;
    }
    return counts === "second" ? 2 * run - (scheduler === "KL Optimal" ? 0 : 1) : run;
}

// Halves go to the even neighbour, as Python rounds.
function demofusionRound(x) {
    const low = Math.floor(x);
    if (x - low !== 0.5) return Math.round(x);
    return low % 2 ? low + 1 : low;
}

// What decoding takes: at once up to a tile's area, then the features before the first upsampling, or a tile beside them.
function demofusionDecoding(table, area, base) {
    const tile = Math.max(base, table.tile ** 2);
    if (area <= tile) return table.whole * area;
    return Math.max(table.features * area, table.kept * area + table.whole * tile);
}

function demofusionMemory(bytes) {
    return bytes >= 2 ** 30 ? `${(demofusionRound(bytes / 2 ** 30 * 10) / 10).toFixed(1)} GiB` : `${demofusionRound(bytes / 2 ** 20)} MiB`;
}

function demofusionReadout(form) {
    if (form.hires) return "off: Hires. fix is ticked";
    const h = Math.floor(form.height / 8), w = Math.floor(form.width / 8);
    const stride = [h, w].map((side) => Math.floor(side * form.stride + 1e-9) || 1);
    const sampler = form.table.samplers[form.sampler];
    if (sampler === undefined) return `cannot run with ${form.sampler}; Euler works`;

    const scales = [];
    for (let s = 2; s < Math.ceil(form.scale); s++) if (!form.doubling || s === 2 || s === 4) scales.push(s);
    scales.push(form.scale);
    const phaseSteps = form.phaseSteps || form.steps;
    const skipped = phaseSteps - Math.max(demofusionRound(phaseSteps * form.strength), 1);
    const base = demofusionCalls(sampler, form.scheduler, form.steps, 0);
    const calls = demofusionCalls(sampler, form.scheduler, phaseSteps, skipped);
    if (base < 1 || calls < 1) return `steps: ${form.sampler} needs at least 2`;
    const branches = form.cfg === 1 ? 1 : 2;
    let total = 2 * base, height = h, width = w;
    for (const scale of scales) {
        const before = [height, width];
        height = demofusionRound(h * scale);
        width = demofusionRound(w * scale);
        if (height === before[0] && width === before[1]) return `scale: ${form.scale} adds nothing to this size`;
        const rows = Math.ceil((height - h) / stride[0]) + 1, columns = Math.ceil((width - w) / stride[1]) + 1;
        total += branches * calls * (rows * columns + Math.ceil(scale) ** 2);
    }
    const made = sampler[0] === "unknown" ? "as many model calls as it takes" : `${total.toLocaleString("en-US")} model calls`;
    const decoding = [height * width, h * w].map((area) => demofusionDecoding(form.table, area, h * w));
    const more = demofusionMemory(Math.max(form.table.latents * height * width, decoding[0] - decoding[1]));
    return `from ${w * 8}x${h * 8} to ${width * 8}x${height * 8}, ${scales.length + 1} phases, ${made}, +${more} memory`;
}

let demofusionUpdate = () => {};

// The preset that the form's settings are; null if they are none's. The host's gradio calls it whenever one of them changes.
function demofusionPreset(presets, shown) {
    setTimeout(demofusionUpdate, 50); // when the form shows them
    return Object.keys(presets).find((name) => presets[name].every((value, i) => value === shown[i])) ?? null;
}

if (typeof onUiLoaded === "function") {
    demofusionUpdate = function() {
        const readout = gradioApp().querySelector(".demofusion-readout");
        if (!readout) return;
        const input = (id) => gradioApp().querySelector(`#${id} input[type=number], #${id} input`);
        const number = (id) => parseFloat(input(id)?.value);
        const ticked = (id) => input(id)?.checked === true;
        const chosen = (id) => gradioApp().querySelector(`#${id} input[type=radio]:checked`)?.value ?? input(id)?.value;
        const text = ticked("script_demofusion_enable-visible-checkbox") || ticked("script_demofusion_enable-checkbox") ?
            demofusionReadout({
                width: number("txt2img_width"), height: number("txt2img_height"),
                steps: number("txt2img_steps"), cfg: number("txt2img_cfg_scale"),
                sampler: chosen("txt2img_sampling"), scheduler: chosen("txt2img_scheduler"),
                hires: ticked("txt2img_hr-checkbox"),
                scale: number("script_demofusion_scale"), stride: number("script_demofusion_stride"),
                phaseSteps: number("script_demofusion_phase_steps"), strength: number("script_demofusion_denoising_strength"),
                doubling: ticked("script_demofusion_doubling"),
                table: JSON.parse(readout.dataset.table),
            }) : "";
        if (readout.textContent !== text) readout.textContent = text;
    };
    onUiLoaded(function() {
        gradioApp().querySelector("#tab_txt2img")?.addEventListener("input", demofusionUpdate);
        demofusionUpdate();
    });
    onAfterUiUpdate(demofusionUpdate); // values that the host sets: pasted parameters, the swap button, ui-config.json
}

if (typeof module !== "undefined") module.exports = {demofusionReadout, demofusionPreset};
