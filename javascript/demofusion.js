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
    if (counts === "heunpp") return run > 1 ? 3 * run - 3 : run;
    return counts === "second" ? 2 * run - (scheduler === "KL Optimal" ? 0 : 1) : run;
}

function demofusionLeastCalls(form, {sampler, scheduler}, skipped) {
    const [counts, , , least] = form.table.samplers[sampler];
    if (sampler === "UniPC") return form.uniPcOrder;
    if (counts === "fixed" || counts === "unknown") return skipped ? 2 : 1;
    return scheduler === "KL Optimal" ? 1 : least;
}

// Halves go to the even neighbour, as Python rounds.
function demofusionRound(x) {
    const low = Math.floor(x);
    if (x - low !== 0.5) return Math.round(x);
    return low % 2 ? low + 1 : low;
}

// The base's steps, and how many of the first ones are not run: all of txt2img's, and of img2img's as its strength says.
function demofusionBaseSteps(form) {
    if (form.start === "") return [form.steps, 0];
    const strength = Math.min(form.ownStrength, 0.999);
    const steps = form.fixSteps ? (strength > 0 ? Math.floor(form.steps / strength) : 0) : form.steps;
    const encoded = form.fixSteps ? form.steps - 1 : Math.floor(strength * form.steps);
    const timesteps = ["ddim", "grid"].includes(form.table.samplers[form.sampler][0]);
    return [steps, steps - encoded - (timesteps ? 0 : 1)];
}

// A text as Python writes it where it is quoted.
function demofusionQuoted(text) {
    const sign = text.includes("'") && !text.includes('"') ? '"' : "'";
    return sign + text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll(sign, `\\${sign}`) + sign;
}

// A name as the host writes it, of those that there are, whatever its case: {name}, or {refused}.
function demofusionOneOf(text, what, known) {
    const wanted = text.trim(), same = (own) => own.toLowerCase() === wanted.toLowerCase();
    const name = known.includes(wanted) ? wanted : known.find(same);
    if (name !== undefined) return {name};
    return {refused: `there is no ${what} ${demofusionQuoted(text)}; there are: ${known.join(", ") || "none"}`};
}

// The sampler and the scheduler of the phases, in the host's names, or {refused}. A schedule's name may follow the sampler's.
function demofusionLater(form) {
    const {samplers, aliases, schedules, upscalers} = form.table.names;
    let scheduler = "", sampler = "";
    if (form.phaseScheduler) {
        const wanted = form.phaseScheduler.trim().toLowerCase();
        const found = Object.keys(schedules).find((label) => schedules[label].includes(wanted));
        const {name, refused} = demofusionOneOf(found ?? form.phaseScheduler, "schedule type", Object.keys(schedules));
        if (refused) return {refused};
        scheduler = name;
    }
    if (form.phaseSampler) {
        const wanted = form.phaseSampler.trim().toLowerCase();
        sampler = aliases[wanted];
        for (const [label, names] of Object.entries(schedules)) {
            for (const name of sampler ? [] : names) {
                if (!wanted.endsWith(` ${name}`) || !["", label].includes(scheduler)) continue;
                sampler = aliases[wanted.slice(0, -name.length - 1)];
                if (sampler) scheduler = label;
            }
        }
        const {name, refused} = sampler ? {name: sampler} : demofusionOneOf(form.phaseSampler, "sampler", samplers);
        if (refused) return {refused};
        sampler = name;
    }
    const {refused} = form.upscaler ? demofusionOneOf(form.upscaler, "upscaler", upscalers) : {};
    return refused ? {refused} : {sampler: sampler || form.sampler, scheduler: scheduler || form.scheduler};
}

// As Python writes it with three digits, below 1000: halves, which have at most four digits after the point in base two, even.
function demofusionThreeDigits(x) {
    const whole = 10 ** (2 - Math.floor(Math.log10(x)));
    return Number.isInteger(16 * x) ? demofusionRound(x * whole) / whole : Number(x.toPrecision(3));
}

// The size in latent pixels that the form names for a base or a picture of [height, width] pixels, by one side or by both:
// {final}, {} where it names none, or {refused}.
function demofusionResized(form, own) {
    const asked = form.resize, times = asked.map((side, i) => side / own[i]).filter((t) => t > 0);
    if (!times.length) return {};
    const named = ([height, width]) => `${width}x${height}`;
    const fitting = times.map((t) => own.map((side) => demofusionRound(side * t / 8) * 8));
    const size = asked.map((side, i) => side || fitting[0][i]);
    if (times.some((t) => size.some((side, i) => Math.abs(side - own[i] * t) > Math.max(8, side / 100)))) {
        const works = [...new Set(fitting.map(named))].join(" or ");
        return {refused: `${named(size)} has not the aspect of ${named(own)}; resize to ${works}, or change the aspect first`};
    }
    const largest = Math.max(...times), [low, high] = form.table.scales;
    if (!(low < largest && largest <= high)) {
        const many = `${demofusionThreeDigits(largest)} times ${named(own)}`;
        return {refused: `${named(size)} is ${many}; resize to more than once and at most ${high} times that`};
    }
    return {final: size.map((side) => Math.max(demofusionRound(side / 8), 1))};
}

// What a picture of [height, width] pixels becomes at a scale, in latent pixels.
function demofusionEnlarged(picture, scale) {
    return picture.map((length) => Math.max(Math.floor(length * scale / 8 + 0.5), 1));
}

// By which windows a picture is enlarged to a final size; sizes in latent pixels.
function demofusionWindow({picture, table}, final, side) {
    const area = final[0] * final[1], ratio = Math.sqrt(area) / side, whole = Math.max(Math.floor(ratio + 0.5), 1);
    const {fitting: [low, high], largest} = table.windows, fits = low <= ratio / whole && ratio / whole <= high;
    const window = final.map((length) => Math.ceil(length / Math.max(fits ? whole : ratio, 1) - 1e-9));
    return {
        final, window,
        smaller: area * 64 <= picture[0] * picture[1],
        atOnce: window[0] === final[0] && window[1] === final[1],
        large: ratio > largest,
    };
}

// The same for a form, or {refused}; {unknown} as long as the server has not said what the checkpoint was made for.
function demofusionFromPicture(form) {
    const [height, width] = form.picture, side = form.window / 8 || form.facts.native;
    const {final, refused} = demofusionResized(form, form.picture);
    if (refused) return {refused};
    if (!side) return {unknown: true};
    if (side < 1) return {refused: `a window of ${form.window} pixels is too small; a latent pixel is 8 pixels`};
    const made = demofusionWindow(form, final ?? demofusionEnlarged(form.picture, form.scale), side);
    const size = `${made.final[1] * 8}x${made.final[0] * 8}`;
    if (made.smaller) return {refused: `${size} is not larger than the picture, ${width}x${height}; choose a larger size`};
    if (!made.atOnce && !made.large) return {...made, begin: height * width / 64};
    const scales = Array.from({length: 140}, (_, i) => (21 + i) / 20).filter(function(scale) {
        const {smaller, atOnce, large} = demofusionWindow(form, demofusionEnlarged(form.picture, scale), side);
        return !smaller && !atOnce && !large;
    });
    if (made.atOnce) {
        const works = scales.length ? `scale ${scales[0]} is the smallest that works` : "a smaller window works";
        return {refused: `${size} is no larger than what the checkpoint draws at once; ${works}`};
    }
    const works = scales.length ? `scale ${scales.at(-1)} is the largest that works` : "a larger window works";
    return {refused: `${size} is more than ${form.table.windows.largest} times as long and wide as a window of ${side * 8}; ${works}`};
}

// Sizes (latent pixels), phases and model calls of one image, those of the base among them; {refused} where there is no such
// plan, {unknown} where what the server has not said yet is missing.
function demofusionPlan(form) {
    if (form.phaseCfg > 0 && form.phaseCfg < 1) {
        return {refused: `phase CFG scale must be 0, as the base's, or at least 1, got ${form.phaseCfg}`};
    }
    const own = {sampler: form.sampler, scheduler: form.scheduler}; // the base's
    const later = demofusionLater(form);
    if (later.refused) return later;
    const given = form.start === "Picture";
    if (given && !(form.picture[0] && form.picture[1])) return {refused: "there is no picture; drop one on the tab"};
    if (given && !(form.ownStrength > 0)) return {refused: "at denoising strength 0 nothing would be drawn; raise it"};
    const unknown = ({sampler}) => !(sampler in form.table.samplers) &&
        {refused: `the sampler ${sampler} is not one that it knows; Euler works`};
    if (unknown(later)) return unknown(later);
    const from = given ? demofusionFromPicture(form) : demofusionResized(form, [form.height, form.width]);
    if (from.refused || from.unknown) return from;
    if (!given && form.window) {
        return {refused: "a window is for a picture that is given; here it is the base's size, so set window to 0"};
    }
    if (!given && unknown(own)) return unknown(own);
    const [h, w] = from.window ?? [form.height, form.width].map((side) => Math.floor(side / 8));
    const {final} = from;
    const stride = [h, w].map((side) => Math.floor(side * form.stride + 1e-9) || 1);
    const largest = final ? Math.max(final[0] / h, final[1] / w) : form.scale;

    const scales = [];
    for (let s = 2; s < Math.ceil(largest); s++) if (!form.doubling || Number.isInteger(Math.log2(s))) scales.push(s);
    scales.push(largest);
    const phaseSteps = form.phaseSteps || Math.min(form.steps, form.mostPhaseSteps || form.steps);
    const strength = given ? form.ownStrength : form.strength;
    const skipped = phaseSteps - Math.max(demofusionRound(phaseSteps * strength), 1);
    const [baseSteps, baseSkipped] = demofusionBaseSteps(form);
    const callsOf = ({sampler, scheduler}, ...steps) => demofusionCalls(form.table.samplers[sampler], scheduler, ...steps);
    const base = given ? 0 : callsOf(own, baseSteps, baseSkipped), calls = callsOf(later, phaseSteps, skipped);
    const lacking = function(by, made, steps, skipped) {
        const least = demofusionLeastCalls(form, by, skipped), run = steps - skipped;
        if (made >= least) return null;
        const few = skipped ? `the ${run} of ${steps} steps that the denoising strength leaves` : `${run} step${run > 1 ? "s" : ""}`;
        return `${by.sampler} cannot do with ${few}; it needs ${run + least - made} at least`;
    };
    const few = given ? null : lacking(own, base, baseSteps, baseSkipped);
    if (few) return {refused: few};
    const branches = (form.phaseCfg || form.cfg) === 1 ? 1 : 2;
    const ofBase = form.cfg === 1 && !form.table.guided ? 1 : 2; // some hosts ask for both all the same
    let total = ofBase * base, height = h, width = w, phases = given ? 0 : 1;
    for (const scale of scales) {
        const before = [height, width], size = final ?
            final.map((side) => Math.max(demofusionRound(side * scale / largest), 1)) :
            [h, w].map((side) => demofusionRound(side * scale));
        if (given && size[0] * size[1] <= form.table.windows.worth * from.begin && scale !== largest) continue;
        [height, width] = size;
        phases += 1;
        if (height === before[0] && width === before[1]) {
            const asked = form.resize.some(Boolean) ? "the size to resize to" : `scale ${form.scale}`;
            return {refused: `${asked} adds no latent pixel to a base of ${w}x${h}; choose a larger one`};
        }
        const few = lacking(later, calls, phaseSteps, skipped);
        if (few) return {refused: few};
        const rows = Math.ceil((height - h) / stride[0]) + 1, columns = Math.ceil((width - w) / stride[1]) + 1;
        total += branches * calls * (rows * columns + Math.ceil(scale) ** 2);
    }
    let scale = form.scale;
    if (form.resize.some(Boolean)) {
        const sides = given ? form.picture : [form.height, form.width];
        scale = Math.min(Math.round(1e4 * Math.max(8 * height / sides[0], 8 * width / sides[1])) / 1e4, form.table.scales[1]);
    }
    const small = [height, width].map((side) => demofusionRound(side / scale));
    const known = ![later, ...given ? [] : [own]].some(({sampler}) => form.table.samplers[sampler][0] === "unknown");
    return {h, w, scale, own: small, height, width, phases, base: ofBase * base, total, given, known};
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

// The largest scale below the plan's, as its slider goes, at which the finished image has what is asked; undefined: none.
function demofusionLargest(plan, has) {
    for (let twentieths = Math.ceil(20 * plan.scale) - 1; twentieths > 20; twentieths--) {
        const [height, width] = plan.own.map((side) => demofusionRound(side * twentieths / 20));
        if (has(height, width)) return twentieths / 20;
    }
}

// That it fits; of a given picture, which may be large, with what it takes.
function demofusionNeed(form, plan) {
    if (!plan.given) return "fits in memory";
    const {pictures, latents, features, device: [where], main: [name]} = form.facts.memory;
    const each = pictures + (where === name ? latents + (features ?? 0) : 0); // what is coded in tiles shares features
    return `fits in memory, ${demofusionBytes(form.batchSize * each * plan.height * plan.width)} of ${name} for its pictures`;
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
        const scale = demofusionLargest(plan, (height, width) => lack(height, width) === null);
        return `does not fit: ${line}; ${scale ? `scale ${scale} fits` : `no scale fits, a smaller ${plan.given ? "picture" : "base"} may`}`;
    }
    // Decoded at once, or with features that fit: all that the decoder's attention is to see is there.
    const whole = (height, width) => height * width <= Math.max(plan.h * plan.w, memory.tile ** 2) ||
        memory.features * height * width < memory.device[1];
    if (memory.features === null || whole(plan.height, plan.width)) return demofusionNeed(form, plan);
    const [need, free] = [memory.features * plan.height * plan.width, memory.device[1]].map(demofusionBytes);
    const scale = demofusionLargest(plan, whole);
    return `fits, but decoding at its best takes ${need} of ${memory.device[0]}, and ${free} are free${scale ? `: scale ${scale}` : ""}`;
}

function demofusionReadout(form) {
    if (form.hires) return "cannot run: Hires. fix is on too, and only one of the two can enlarge the image; untick one of them";
    const plan = demofusionPlan(form);
    if (plan.refused) return `cannot run: ${plan.refused}`;
    if (plan.unknown) return "";
    const size = (height, width) => `${width * 8}x${height * 8}`;
    const made = plan.known ? `${plan.total.toLocaleString("en-US")} model calls` : "as many model calls as it takes";
    const said = [`from ${size(plan.h, plan.w)} to ${size(plan.height, plan.width)}`];
    if (plan.given) {
        said[0] = `from ${form.picture[1]}x${form.picture[0]} to ${size(plan.height, plan.width)}`;
        said.push(`windows of ${size(plan.h, plan.w)}`);
    }
    said.push(`${plan.phases} phase${plan.phases > 1 ? "s" : ""}`, made);
    return [...said, demofusionTime(form, plan), demofusionFits(form, plan)].filter(Boolean).join(", ");
}

// How many times the base's model calls the whole image takes, or how many it takes without a base, in words; nothing where
// that is not known.
function demofusionCost(form) {
    const plan = demofusionPlan(form);
    if (plan.refused || plan.unknown || !plan.known) return "";
    if (plan.given) return `${plan.total.toLocaleString("en-US")} model calls`;
    const times = plan.total / plan.base;
    return `${times < 10 ? Math.round(10 * times) / 10 : Math.round(times)} times the base image's model calls`;
}

// What each preset is, what it costs with all else as the form has it, and when to take it; "": what the form has itself.
function demofusionPresets(form) {
    const said = {"": ["Your own settings", demofusionCost(form)].filter(Boolean).join(": ") + "."};
    for (const [name, preset] of Object.entries(form.table.presets)) {
        const {denoising_strength: strength, stride, doubling, help: [own, when]} = preset;
        const later = {
            phaseSampler: preset.phase_sampler, phaseScheduler: preset.phase_schedule, phaseCfg: preset.phase_cfg_scale,
            phaseSteps: preset.phase_steps, mostPhaseSteps: preset.most_phase_steps,
        };
        const given = form.start === "Picture"; // where the tab's strength counts, and not the preset's
        const what = given ? `with the tab's denoising strength, ${form.ownStrength}; in txt2img it is ${strength}` : own;
        const cost = demofusionCost({...form, ...later, strength, stride, doubling});
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

// What the gallery's button asks for: the picture that is selected, and what the host knows of it. gallery: its pictures, as
// gradio has them; infos: the host's text about them. Told apart from the last click, so that a second one counts too.
function demofusionSelected(gallery, infos) {
    const index = gallery?.length ? Math.max(selected_gallery_index(), 0) : 0;
    let known = {};
    try {
        known = JSON.parse(infos);
    } catch { /* nothing is known */ }
    return JSON.stringify({
        picture: gallery?.[index] ?? null,
        infotext: known.infotexts?.[index] ?? "",
        grid: index < (known.index_of_first_image ?? 0),
        click: Date.now(),
    });
}

// It was asked for: generate, once. What this returns takes the request off the form again, when the form has been read:
// gradio 4 reads it with the click, or in the next frame if it has something to show first.
async function demofusionGenerate(tab, asked) {
    if (asked) {
        if (tab === "img2img") switch_to_img2img_tab(0); // of the tab's own picture no mask, and no batch
        gradioApp().getElementById(`${tab}_generate`).click();
        for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);
    }
    return "";
}

// The host gives every text that it knows a hint of its own, "Denoising strength" and "Resize width to" among them, and the
// innermost hint is shown: each part of a control of ours has the control's. What a list offers is left to the host.
function demofusionHints() {
    for (const {props} of gradio_config.components) {
        const control = props.webui_tooltip && props.elem_id?.startsWith("script_demofusion") &&
            gradioApp().getElementById(props.elem_id);
        if (!control) continue;
        control.title ||= props.webui_tooltip;
        for (const part of control.querySelectorAll("span, p, button, input, textarea")) {
            if (part.title !== control.title && !part.closest(".options")) part.title = control.title;
        }
    }
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

    // The form of one tab, and what it says; whether it is on.
    const drawTab = function(readout) {
        const tab = readout.dataset.tab, host = (name) => `${tab}_${name}`, table = JSON.parse(readout.dataset.table);
        const id = (name) => readout.dataset.id + name;
        const input = (id) => gradioApp().querySelector(`#${id} input[type=number], #${id} input`);
        const number = (id) => parseFloat(input(id)?.value);
        const ticked = (id) => input(id)?.checked === true;
        const choice = (id) => gradioApp().querySelector(`#${id} input[type=radio]:checked`)?.value;
        const chosen = (id) => choice(id) ?? input(id)?.value; // the host's are radio buttons or a list, as its settings say
        const named = function(name) { // "": as the base
            const text = input(id(name))?.value ?? "";
            return text.trim() && text !== table.same[name] ? text : "";
        };
        const on = gradioApp().getElementById(id("enable-visible-checkbox"))?.checked || ticked(id("enable-checkbox"));
        const start = tab === "img2img" ? choice(id("start_from")) ?? "" : "";
        const [pictureWidth, pictureHeight] = start ? currentImg2imgSourceResolution(0, 0, 1) : [0, 0];
        const form = {
            width: number(host("width")), height: number(host("height")),
            steps: number(host("steps")), cfg: number(host("cfg_scale")),
            batchSize: number(host("batch_size")) || 1, batchCount: number(host("batch_count")) || 1,
            sampler: chosen(host("sampling")), scheduler: chosen(host("scheduler")),
            hires: tab === "txt2img" && ticked("txt2img_hr-checkbox"), uniPcOrder: opts.uni_pc_order,
            scale: number(id("scale")), stride: number(id("stride")),
            phaseSteps: number(id("phase_steps")), mostPhaseSteps: number(id("most_phase_steps")),
            phaseSampler: named("phase_sampler"), phaseScheduler: named("phase_schedule"),
            phaseCfg: number(id("phase_cfg_scale")), upscaler: named("upscaler"),
            resize: [number(id("resize_height")) || 0, number(id("resize_width")) || 0],
            strength: number(id("denoising_strength")),
            doubling: ticked(id("doubling")),
            start, picture: [pictureHeight, pictureWidth], window: number(id("window")) || 0,
            ownStrength: number(host("denoising_strength")), fixSteps: opts.img2img_fix_steps,
            table, facts,
        };
        const say = (element, text) => {
            if (element && element.textContent !== text) element.textContent = text;
        };
        say(readout, on ? demofusionReadout(form) : "");
        // From a picture the tab's own denoising strength counts.
        gradioApp().getElementById(id("denoising_strength"))?.classList.toggle("demofusion-unused", start === "Picture");

        // The line below the presets is the chosen one's; each has its own as a tooltip, and as what a screen reader says.
        const said = demofusionPresets(form);
        say(gradioApp().querySelector(`#${id("preset_help")} .demofusion-preset-help`), said[choice(id("preset")) ?? ""]);
        for (const radio of gradioApp().querySelectorAll(`#${id("preset")} input[type=radio]`)) {
            for (const element of [radio, radio.closest("label")]) if (element) element.title = said[radio.value] ?? "";
        }
        return on;
    };

    const draw = function() {
        return [...gradioApp().querySelectorAll(".demofusion-readout")].map(drawTab).some(Boolean);
    };

    demofusionUpdate = function() {
        if (draw() && timer === null) timer = setTimeout(ask, Math.max(asked + EVERY - performance.now(), 0));
    };
    onUiLoaded(function() {
        for (const tab of ["#tab_txt2img", "#tab_img2img"].map((id) => gradioApp().querySelector(id))) {
            tab?.addEventListener("input", demofusionUpdate);
            tab?.addEventListener("change", demofusionUpdate); // until which two radio buttons are checked in gradio 4
        }
        // A picture that is dropped on img2img says its size when it is loaded.
        gradioApp().querySelector("#tab_img2img")?.addEventListener("load", demofusionUpdate, true);
        demofusionHints();
        demofusionUpdate();
    });
    onAfterUiUpdate(demofusionHints);
    onAfterUiUpdate(demofusionUpdate); // values that the host sets: pasted parameters, the swap button, ui-config.json
    onOptionsChanged(demofusionUpdate); // another checkpoint
}

if (typeof module !== "undefined") module.exports = {
    demofusionReadout, demofusionPreset, demofusionPresets, demofusionTold, demofusionThreeDigits, demofusionGenerate,
};
