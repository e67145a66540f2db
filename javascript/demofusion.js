// The readout beside the checkbox: what will be made, what that takes and whether it fits, as the form stands now; and
// what each preset is and costs. It counts as lib_demofusion/phases.py does, and model_calls in hosts/webui/samplers.py,
// and says that something cannot run in the words in which it will be refused; tests compare them.

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

function demofusionLeastCalls(form, [counts, , , least], skipped) {
    if (form.sampler === "UniPC") return form.uniPcOrder;
    if (counts === "fixed" || counts === "unknown") return skipped ? 2 : 1;
    return form.scheduler === "KL Optimal" ? 1 : least;
}

// Halves go to the even neighbour, as Python rounds.
function demofusionRound(x) {
    const low = Math.floor(x);
    if (x - low !== 0.5) return Math.round(x);
    return low % 2 ? low + 1 : low;
}

// Sizes (latent pixels), phases and model calls of one image, those of the base among them; {refused} where there is no such plan.
function demofusionPlan(form) {
    const h = Math.floor(form.height / 8), w = Math.floor(form.width / 8);
    const stride = [h, w].map((side) => Math.floor(side * form.stride + 1e-9) || 1);
    const sampler = form.table.samplers[form.sampler];
    if (sampler === undefined) return {refused: `the sampler ${form.sampler} is not one that it knows; Euler works`};

    const scales = [];
    for (let s = 2; s < Math.ceil(form.scale); s++) if (!form.doubling || s === 2 || s === 4) scales.push(s);
    scales.push(form.scale);
    const phaseSteps = form.phaseSteps || form.steps;
    const skipped = phaseSteps - Math.max(demofusionRound(phaseSteps * form.strength), 1);
    const base = demofusionCalls(sampler, form.scheduler, form.steps, 0);
    const calls = demofusionCalls(sampler, form.scheduler, phaseSteps, skipped);
    const lacking = function(made, steps, skipped) {
        const least = demofusionLeastCalls(form, sampler, skipped), run = steps - skipped;
        if (made >= least) return null;
        const few = skipped ? `the ${run} of ${steps} steps that the denoising strength leaves` : `${run} step${run > 1 ? "s" : ""}`;
        return `${form.sampler} cannot do with ${few}; it needs ${run + least - made} at least`;
    };
    const few = lacking(base, form.steps, 0);
    if (few) return {refused: few};
    const branches = form.cfg === 1 ? 1 : 2;
    let total = 2 * base, height = h, width = w;
    for (const scale of scales) {
        const before = [height, width];
        height = demofusionRound(h * scale);
        width = demofusionRound(w * scale);
        if (height === before[0] && width === before[1]) {
            return {refused: `scale ${form.scale} adds no latent pixel to a base of ${w}x${h}; choose a larger one`};
        }
        const few = lacking(calls, phaseSteps, skipped);
        if (few) return {refused: few};
        const rows = Math.ceil((height - h) / stride[0]) + 1, columns = Math.ceil((width - w) / stride[1]) + 1;
        total += branches * calls * (rows * columns + Math.ceil(scale) ** 2);
    }
    return {h, w, height, width, phases: scales.length + 1, base: 2 * base, total, known: sampler[0] !== "unknown"};
}

function demofusionBytes(bytes) {
    return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${demofusionRound(bytes / 2 ** 20)} MiB`;
}

function demofusionClock(seconds) {
    const whole = demofusionRound(seconds), two = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(whole / 60), hours = Math.floor(minutes / 60);
    return hours ? `${hours}:${two(minutes % 60)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

// What all images will take, by the pace of the last job: of this base size, or of the nearest and the ratio of the sizes.
function demofusionTime(form, plan) {
    const area = plan.h * plan.w, far = (other) => Math.abs(Math.log(other / area));
    const known = Object.keys(form.facts.paces ?? {}).map(Number).sort((a, b) => far(a) - far(b))[0];
    if (known === undefined || !plan.known) return "";
    const images = form.batchSize * form.batchCount;
    const time = demofusionClock(form.facts.paces[known] * area / known * plan.total * images);
    return `about ${time}${images > 1 ? ` for ${images} images` : ""}`;
}

// The largest scale below the form's, as its slider goes, at which the finished image has what is asked; undefined: none.
function demofusionLargest(form, plan, has) {
    for (let twentieths = Math.ceil(20 * form.scale) - 1; twentieths > 20; twentieths--) {
        const [height, width] = [plan.h, plan.w].map((side) => demofusionRound(side * twentieths / 20));
        if (has(height, width)) return twentieths / 20;
    }
}

// Whether it fits, and what to change if it does not; nothing where that is not known.
function demofusionFits(form, plan) {
    const memory = form.facts.memory;
    if (!memory) return "";
    const lack = function(height, width) {
        for (const [what, [where, free], each] of [
            ["latents", memory.device, memory.latents],
            ["pictures", memory.main, memory.pictures],
        ]) {
            const need = form.batchSize * each * height * width;
            if (need > free) {
                return `the ${what} of ${width * 8}x${height * 8} take ${demofusionBytes(need)} of ${where}, and ${demofusionBytes(free)} are free`;
            }
        }
        return null;
    };
    const line = lack(plan.height, plan.width);
    if (line) {
        const scale = demofusionLargest(form, plan, (height, width) => lack(height, width) === null);
        return `does not fit: ${line}; ${scale ? `scale ${scale} fits` : "no scale fits, a smaller base may"}`;
    }
    // Decoded at once, or with features that fit: all that the decoder's attention is to see is there.
    const whole = (height, width) => height * width <= Math.max(plan.h * plan.w, memory.tile ** 2) ||
        memory.features * height * width < memory.device[1];
    if (memory.features === null || whole(plan.height, plan.width)) return "fits in memory";
    const [need, free] = [memory.features * plan.height * plan.width, memory.device[1]].map(demofusionBytes);
    const scale = demofusionLargest(form, plan, whole);
    return `fits, but decoding at its best takes ${need} of ${memory.device[0]}, and ${free} are free${scale ? `: scale ${scale}` : ""}`;
}

function demofusionReadout(form) {
    if (form.hires) return "cannot run: Hires. fix is on too, and only one of the two can enlarge the image; untick one of them";
    const plan = demofusionPlan(form);
    if (plan.refused) return `cannot run: ${plan.refused}`;
    const size = (height, width) => `${width * 8}x${height * 8}`;
    const made = plan.known ? `${plan.total.toLocaleString("en-US")} model calls` : "as many model calls as it takes";
    const said = [`from ${size(plan.h, plan.w)} to ${size(plan.height, plan.width)}`, `${plan.phases} phases`, made];
    return [...said, demofusionTime(form, plan), demofusionFits(form, plan)].filter(Boolean).join(", ");
}

// How many times the base's model calls the whole image takes, in words; nothing where that is not known.
function demofusionCost(form) {
    const plan = demofusionPlan(form);
    if (plan.refused || !plan.known) return "";
    const times = plan.total / plan.base;
    return `${times < 10 ? Math.round(10 * times) / 10 : Math.round(times)} times the base image's model calls`;
}

// What each preset is, what it costs with all else as the form has it, and when to take it; "": what the form has itself.
function demofusionPresets(form) {
    const said = {"": ["Your own settings", demofusionCost(form)].filter(Boolean).join(": ") + "."};
    for (const [name, preset] of Object.entries(form.table.presets)) {
        const {phase_steps: phaseSteps, denoising_strength: strength, stride, doubling} = preset;
        const [what, when] = preset.help;
        const cost = demofusionCost({...form, phaseSteps, strength, stride, doubling});
        said[name] = `${name}: ${[what, cost].filter(Boolean).join("; ")}. ${when}.`;
    }
    return said;
}

let demofusionUpdate = () => {};

// The preset that the form's settings are; null if they are none's. The host's gradio calls it whenever one of them changes.
function demofusionPreset(presets, shown) {
    setTimeout(demofusionUpdate, 50); // when the form shows them
    return Object.keys(presets).find((name) => presets[name].every((value, i) => value === shown[i])) ?? null;
}

// What the server said last, with the paces that it said before it was started again.
function demofusionTold(facts, before, stored) {
    let paces = facts.paces;
    try {
        paces = {...JSON.parse(stored ?? "{}"), ...paces};
    } catch { /* not ours */ }
    return {...facts, paces, memory: facts.memory ?? before.memory};
}

if (typeof onUiLoaded === "function") {
    const EVERY = 5000; // milliseconds; the server is asked no more often, and only while the form changes
    let facts = {}, asked = -EVERY, timer = null;

    const ask = async function() {
        try {
            const reply = await fetch("./internal/demofusion");
            if (!reply.ok) return;
            const told = await reply.json();
            const key = `demofusion paces of ${told.checkpoint} on ${told.device}`;
            facts = demofusionTold(told, facts, localGet(key));
            if (Object.keys(told.paces).length) localSet(key, JSON.stringify(facts.paces));
        } catch (error) {
            console.warn("DemoFusion: what the server knows is not shown:", error);
        } finally {
            asked = performance.now();
            timer = null;
        }
        draw();
    };

    const draw = function() {
        const readout = gradioApp().querySelector(".demofusion-readout");
        if (!readout) return false;
        const id = (name) => readout.dataset.id + name;
        const input = (id) => gradioApp().querySelector(`#${id} input[type=number], #${id} input`);
        const number = (id) => parseFloat(input(id)?.value);
        const ticked = (id) => input(id)?.checked === true;
        const choice = (id) => gradioApp().querySelector(`#${id} input[type=radio]:checked`)?.value;
        const chosen = (id) => choice(id) ?? input(id)?.value; // the host's are radio buttons or a list, as its settings say
        const on = gradioApp().getElementById(id("enable-visible-checkbox"))?.checked || ticked(id("enable-checkbox"));
        const form = {
            width: number("txt2img_width"), height: number("txt2img_height"),
            steps: number("txt2img_steps"), cfg: number("txt2img_cfg_scale"),
            batchSize: number("txt2img_batch_size") || 1, batchCount: number("txt2img_batch_count") || 1,
            sampler: chosen("txt2img_sampling"), scheduler: chosen("txt2img_scheduler"),
            hires: ticked("txt2img_hr-checkbox"), uniPcOrder: opts.uni_pc_order,
            scale: number(id("scale")), stride: number(id("stride")),
            phaseSteps: number(id("phase_steps")), strength: number(id("denoising_strength")),
            doubling: ticked(id("doubling")),
            table: JSON.parse(readout.dataset.table), facts,
        };
        const say = (element, text) => {
            if (element && element.textContent !== text) element.textContent = text;
        };
        say(readout, on ? demofusionReadout(form) : "");

        // The line below the presets is the chosen one's; each has its own as a tooltip, and as what a screen reader says.
        const said = demofusionPresets(form);
        say(gradioApp().querySelector(".demofusion-preset-help"), said[choice(id("preset")) ?? ""]);
        for (const radio of gradioApp().querySelectorAll(`#${id("preset")} input[type=radio]`)) {
            for (const element of [radio, radio.closest("label")]) if (element) element.title = said[radio.value] ?? "";
        }
        return on;
    };

    demofusionUpdate = function() {
        if (draw() && timer === null) timer = setTimeout(ask, Math.max(asked + EVERY - performance.now(), 0));
    };
    onUiLoaded(function() {
        gradioApp().querySelector("#tab_txt2img")?.addEventListener("input", demofusionUpdate);
        demofusionUpdate();
    });
    onAfterUiUpdate(demofusionUpdate); // values that the host sets: pasted parameters, the swap button, ui-config.json
    onOptionsChanged(demofusionUpdate); // another checkpoint
}

if (typeof module !== "undefined") module.exports = {demofusionReadout, demofusionPreset, demofusionPresets, demofusionTold};
