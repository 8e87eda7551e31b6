// The page: what is chosen, what is asked of the server, what is shown. Nothing is loaded from anywhere else.

const $ = (id) => document.getElementById(id);
const make = (tag, values = {}, ...inner) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...inner);
  return element;
};
const words = (name) => name.replaceAll("_", " ");
const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

// -- the server ---------------------------------------------------------------------------------------------------

// randomUUID is only there on pages of this machine or of HTTPS.
const visitor = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

class Refused extends Error {}

async function ask(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, { method: "POST", body, signal, headers: { "X-Visitor": visitor } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (answer.status === 409) throw new DOMException("overtaken", "AbortError");
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(said.error ?? `The server answered ${answer.status}.`);
  }
  return answer.headers.get("content-type").startsWith("application/json") ? answer.json() : answer.blob();
}

const post = (what, values, signal) => ask(`api/${what}`, JSON.stringify(values), signal);

function problem(error) {
  if (error && error.name === "AbortError") return;
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

// One computation of a kind on screen: a newer one aborts the older, and what it says goes to its status line.
const running = {};
async function job(kind, what, values, show) {
  running[kind]?.abort();
  const control = (running[kind] = new AbortController());
  const status = $(`${kind}-status`);
  const start = performance.now();
  const tick = () => { status.textContent = `computing … ${((performance.now() - start) / 1000).toFixed(0)} s`; };
  tick();
  const clock = setInterval(tick, 1000);
  try {
    const found = await post(what, values, control.signal);
    clearInterval(clock);
    status.textContent = "";
    problem(null);
    show(found, status);
  } catch (error) {
    clearInterval(clock);
    if (running[kind] === control) status.textContent = "";
    problem(error);
  } finally {
    clearInterval(clock);
  }
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const asBlob = (uri) => {
  const [head, data] = uri.split(",");
  return new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], { type: head.slice(5, head.indexOf(";")) });
};

// -- what is chosen -----------------------------------------------------------------------------------------------

let model;
let chosen = null; // {key, name, src}
const scales = {};
const recipe = () => ({ recipe: $("recipe").value, solver: $("solver").value });

function choose(picture) {
  chosen = picture;
  for (const button of $("strip").children) button.setAttribute("aria-pressed", button.dataset.key === picture.key);
  $("original").src = picture.src;
  if (model.autoencoder) edit();
  else $("reconstruction").removeAttribute("src");
}

const offered = (key) => ({ key, name: key, src: `api/image/${key}.png` });

function thumbnail(picture, pressed, act) {
  const image = make("img", { src: picture.src, alt: "" });
  const button = make("button", { type: "button", title: picture.name }, image);
  button.setAttribute("aria-label", `Image ${picture.name.replace("data-", "")}`);
  button.setAttribute("aria-pressed", pressed);
  button.dataset.key = picture.key;
  button.onclick = () => act(picture, button);
  return button;
}

function add(found) {
  const picture = { key: found.key, name: found.name, src: found.image };
  const strip = $("strip");
  strip.prepend(thumbnail(picture, false, choose));
  strip.scrollLeft = 0;
  while (strip.children.length > 60) strip.lastChild.remove();
  return picture;
}

async function upload(file) {
  if (!file) return;
  try {
    if (file.size > model.limits.bytes) throw new Refused(`${file.name}: too large; at most ${model.limits.bytes >> 20} MiB`);
    const found = await ask(`api/upload?name=${encodeURIComponent(file.name)}`, file);
    problem(null);
    choose(add(found));
  } catch (error) {
    problem(error);
  }
}

// -- edit ---------------------------------------------------------------------------------------------------------

// While a slider moves, previews follow one another and only the newest position waits: none is stale, none is cut off.
// When it rests, the picture is refined; whatever moves next cuts that off.
const live = { stale: false, unrefined: false, moving: false, busy: null, latest: null };

function edit(moving = false) {
  Object.assign(live, { stale: true, unrefined: true, moving });
  if (!live.busy) catchUp();
  else if (live.busy.refine || live.busy.image !== chosen.key) live.busy.control.abort();
}

function rest() {
  live.moving = false;
  if (!live.busy) catchUp();
}

async function catchUp() {
  const stage = document.querySelector("#edit .stage");
  stage.setAttribute("aria-busy", "true");
  while (live.stale || (live.unrefined && !live.moving)) {
    const refine = !live.stale;
    const image = chosen.key;
    live.stale = false;
    live.unrefined = !refine;
    live.busy = { refine, image, control: new AbortController() };
    const start = performance.now();
    try {
      const values = { image, scales, preview: !refine, ...(refine ? recipe() : {}) };
      const found = await post("edit", values, live.busy.control.signal);
      problem(null);
      if (image === chosen.key) show(found, !refine, (performance.now() - start) / 1000);
    } catch (error) {
      problem(error);
      if (error.name !== "AbortError") live.unrefined = false;
    }
  }
  live.busy = null;
  stage.setAttribute("aria-busy", "false");
}

function show(found, preview, seconds) {
  live.latest = found;
  $("original").src = found.original;
  $("reconstruction").src = $("wipe-before").src = found.reconstruction;
  $("edited").src = $("wipe-after").src = found.edit;
  const moved = Object.keys(found.attributes).map(words).join(", ");
  $("edited").alt = moved ? `Edited image: ${moved}` : "Edited image, nothing moved";
  for (const [name, row] of Object.entries(sliders)) {
    const said = found.attributes[name];
    row.arrived.replaceChildren();
    if (!said) continue;
    const share = said.asked ? Math.round((100 * said.arrived) / said.asked) : 0;
    row.arrived.append("arrived ", make("b", { textContent: `${share < 0 ? "−" : ""}${Math.abs(share)} %` }),
      ` (${signed(said.arrived, 1)} of ${signed(said.asked, 1)}), p ${said.before.toFixed(2)} → ${said.after.toFixed(2)}`);
  }
  const evaluations = found.edit_evaluations || found.evaluations;
  $("edit-status").setAttribute("aria-live", preview ? "off" : "polite");
  $("edit-status").textContent =
    `${preview ? "preview" : "refined"}: ${evaluations} evaluations, ${seconds.toFixed(2)} s, MSE ${found.mse.toExponential(1)}`;
  $("edit-status").title = `MSE of the reconstruction; ${found.recipe}`;
}

const sliders = {};
const LIMIT = 0.3;

function addSlider(name, value) {
  const id = `slider-${name}`;
  const input = make("input", { id, type: "range", min: -LIMIT, max: LIMIT, step: 0.01, value });
  const output = make("output", { textContent: signed(value, 2) });
  output.htmlFor = id;
  const arrived = make("div", { className: "arrived" });
  const put = () => {
    scales[name] = Number(input.value);
    output.textContent = signed(scales[name], 2);
  };
  input.oninput = () => { put(); edit(true); };
  input.onchange = rest;
  input.ondblclick = () => { input.value = 0; put(); edit(); };
  scales[name] = value;
  sliders[name] = { input, output, arrived };
  $("sliders").append(make("div", { className: "slider" },
    make("label", { htmlFor: id, textContent: words(name) }), output, input, arrived));
}

function reset() {
  for (const [name, row] of Object.entries(sliders)) {
    row.input.value = scales[name] = 0;
    row.output.textContent = signed(0, 2);
  }
  if (chosen) edit();
}

function wipe() {
  const at = $("wipe").value;
  $("wipe-after").style.clipPath = `inset(0 0 0 ${at}%)`;
  $("wipe-line").style.left = `${at}%`;
}

// -- interpolate --------------------------------------------------------------------------------------------------

const path = { a: null, b: null, frames: [], gif: null };

function setEnd(side) {
  path[side] = chosen;
  $(`end-${side}`).src = chosen.src;
  interpolate();
}

function interpolate() {
  if (!path.a || !path.b) return;
  path.frames = [];
  path.gif = null;
  const values = { a: path.a.key, b: path.b.key, kind: $("kind").value, frames: Number($("frames").value), ...recipe() };
  job("interpolate", "interpolate", values, (found, status) => {
    Object.assign(path, { frames: found.frames, gif: found.gif });
    const share = $("scrub").value / $("scrub").max;
    $("scrub").max = found.frames.length - 1;
    $("scrub").value = Math.round(share * $("scrub").max);
    scrub();
    status.textContent = `${found.frames.length} frames, ${found.evaluations} evaluations, ${found.seconds.toFixed(1)} s`;
  });
}

function scrub() {
  const at = Number($("scrub").value);
  if (path.frames[at]) $("between").src = path.frames[at];
  $("between-text").textContent = `${at + 1} of ${Number($("scrub").max) + 1}`;
}

// -- sample -------------------------------------------------------------------------------------------------------

const likes = new Map();

function sample() {
  const which = $("which").value;
  const values = { count: Number($("count").value), seed: Number($("seed").value), ...recipe() };
  if (which === "like") values.like = [...likes.keys()];
  else if (which) Object.assign(values, { attribute: which.slice(1), without: which[0] === "-" });
  if (which === "like" && !likes.size) return problem(new Refused("Click one or more images first."));
  job("sample", "sample", values, (found, status) => {
    const tiles = found.images.map((one, i) => {
      const image = make("img", { src: one.image, alt: "" });
      const tile = make("button", { type: "button" }, image);
      tile.setAttribute("aria-label", `Sample ${i + 1}: edit it`);
      tile.onclick = () => { choose(add(one)); if (model.autoencoder) open("edit"); };
      return tile;
    });
    $("samples").replaceChildren(...tiles);
    const rate = found.best_of ? `, the most alike of ${found.best_of} draws`
      : found.rate === null ? "" : `, ${(100 * found.rate).toFixed(0)} % of the draws accepted`;
    status.textContent = `${found.images.length} images, ${found.seconds.toFixed(1)} s${rate}`;
    $("seed").value = values.seed + 1;
  });
}

// -- look inside --------------------------------------------------------------------------------------------------

function addRow(name, found) {
  const cells = [found.evaluations, found.seconds.toFixed(2), found.mse.toExponential(2), found.ssim.toFixed(4)];
  $("compare").tBodies[0].prepend(make("tr", { title: found.recipe }, make("td", { textContent: name }),
    make("td", {}, make("img", { src: found.image, alt: `Reconstruction by ${name}` })),
    ...cells.map((text) => make("td", { textContent: text }))));
}

function measure(name, values, then) {
  job("compare", "reconstruct", { image: chosen.key, ...values }, (found) => { addRow(name, found); then?.(); });
}

function inside() {
  job("inside", "inside", { image: chosen.key, times: 8 }, (found) => {
    const rows = found.rows;
    const picture = (kind, alt) => (row) => (row[kind] ? make("img", { src: row[kind], alt: `${alt} at t = ${row.t}` }) : "–");
    const number = (key) => (row) => (row[key] === undefined ? "–" : row[key].toExponential(1));
    const lines = [
      ["t", (row) => String(row.t)], ["x_t", picture("x_t", "Noisy image")],
      ["x̂0 without G", picture("without", "Estimate without G")], ["MSE", number("without_mse")],
      ["x̂0 with G", picture("with", "Estimate with G")], ["MSE", number("with_mse")], ["G", picture("G", "G")],
      ["shift", (row) => (row.shift === undefined ? "–" : row.shift.toFixed(3))],
      ["missing", (row) => (row.missing === undefined ? "–" : row.missing.toFixed(3))],
    ];
    $("along").replaceChildren(make("tbody", {}, ...lines.map(([name, cell]) =>
      make("tr", {}, make("th", { scope: "row", textContent: name }), ...rows.map((row) => make("td", {}, cell(row)))))));
  });
}

// -- tabs and start -----------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function open(name) {
  for (const tab of tabs) {
    const here = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", here);
    tab.tabIndex = here ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !here;
  }
  $("chooser").hidden = !model.autoencoder || name === "sample";
  if (name === "interpolate" && !path.a && chosen && model.opening.length > 1) {
    path.b = offered(model.opening.findLast((key) => key !== chosen.key));
    $("end-b").src = path.b.src;
    setEnd("a");
  }
}

function recipeText() {
  const found = model.recipes.find((r) => r.name === $("recipe").value);
  const same = !found || $("solver").value === found.solver;
  $("recipe-text").textContent = same && found ? `${found.evaluations} evaluations` : "";
  $("recipe-text").title = same && found ? found.text : "";
}

function start() {
  $("model").textContent = `${model.name}: ${model.kind}, ${model.size} × ${model.size}`;
  $("missing").replaceChildren(...model.missing.map((text) => make("li", { textContent: text })));
  $("missing").hidden = !model.missing.length;
  $("recipe").append(...model.recipes.map((r) => new Option(r.name, r.name)));
  $("solver").append(...model.solvers.map((s) => new Option(s, s)));
  const fast = model.recipes.find((r) => r.name === "fast") ?? model.recipes[0];
  $("recipe").value = fast.name;
  $("solver").value = fast.solver;
  recipeText();
  const again = () => {
    recipeText();
    if (chosen && model.autoencoder && !$("edit").hidden) edit();
    if (!$("interpolate").hidden) interpolate();
  };
  $("recipe").onchange = () => { $("solver").value = model.recipes.find((r) => r.name === $("recipe").value).solver; again(); };
  $("solver").onchange = again;

  model.attributes.forEach((name, i) => addSlider(name, i ? 0 : 0.12));
  $("reset").hidden = $("about-arrived").hidden = !model.attributes.length;
  $("kind").append(...model.kinds.map((k) => new Option(k === "latent" ? "codes" : k, k)));
  $("which").append(new Option("any", ""));
  if (model.few_shot) $("which").append(new Option("like images that I click", "like"));
  if (model.latent_dpm) for (const sign of "+-") for (const name of model.attributes)
    $("which").append(new Option(`${sign === "+" ? "with" : "without"} ${words(name)}`, sign + name));
  $("draw").hidden = !model.latent_dpm;
  $("random").hidden = !model.total;

  const able = { edit: model.autoencoder, interpolate: model.autoencoder, sample: model.samples, inside: model.autoencoder };
  for (const tab of tabs) tab.disabled = !able[tab.getAttribute("aria-controls")];
  $("strip").append(...model.pictures.map((key) => thumbnail(offered(key), false, choose)));
  $("likes").append(...model.pictures.map((key) => thumbnail(offered(key), false, (picture, button) => {
    const on = !likes.has(key);
    if (on) likes.set(key, picture); else likes.delete(key);
    button.setAttribute("aria-pressed", on);
  })));
  open(model.autoencoder ? "edit" : "sample");
  wipe();
  if (model.autoencoder && model.opening.length) {
    choose(offered(model.opening[0]));
    const pressed = $("strip").querySelector("[aria-pressed=true]");
    if (pressed) $("strip").scrollLeft = pressed.offsetLeft - $("strip").clientWidth / 2;
  }
}

tabs.forEach((tab, i) => {
  tab.onclick = () => open(tab.getAttribute("aria-controls"));
  tab.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    let to = i;
    do to = (to + step + tabs.length) % tabs.length; while (tabs[to].disabled);
    tabs[to].focus();
    tabs[to].click();
  };
});
$("wipe").oninput = wipe;
$("reset").onclick = reset;
$("file").onchange = () => { upload($("file").files[0]); $("file").value = ""; };
$("random").onclick = () => choose(offered(`data-${Math.floor(Math.random() * model.total)}`));
$("draw").onclick = () => job("edit", "sample", { count: 1, seed: Math.floor(Math.random() * 2 ** 31), ...recipe() },
  (found) => choose(add(found.images[0])));
$("save-png").onclick = () => live.latest && save(asBlob(live.latest.edit), `${live.latest.name}-edit.png`);
$("save-latents").onclick = async () => {
  try {
    save(await post("latents", { image: chosen.key, scales, ...recipe() }), `${chosen.name}.safetensors`);
  } catch (error) { problem(error); }
};
$("set-a").onclick = () => setEnd("a");
$("set-b").onclick = () => setEnd("b");
$("scrub").oninput = scrub;
$("kind").onchange = $("frames").onchange = interpolate;
$("save-gif").onclick = () => path.gif && save(asBlob(path.gif), "between.gif");
$("which").onchange = () => { $("likes-box").hidden = $("which").value !== "like"; };
$("go-sample").onclick = sample;
$("go-compare").onclick = () => measure("published", { recipe: "published" }, () => measure("balanced", { recipe: "balanced" }));
$("go-recipe").onclick = () => {
  const { recipe: name, solver } = recipe();
  const own = model.recipes.find((r) => r.name === name)?.solver === solver;
  measure(own ? name : `${name}, ${solver}`, recipe());
};
$("go-inside").onclick = inside;

// Dropping works anywhere on the page.
let depth = 0;
const hover = (by) => { depth = Math.max(0, depth + by); $("drop").hidden = !depth || !model?.autoencoder; };
addEventListener("dragenter", (event) => { event.preventDefault(); hover(1); });
addEventListener("dragleave", () => hover(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); hover(-depth); if (model?.autoencoder) upload(event.dataTransfer.files[0]); });

try {
  const answer = await fetch("api/model");
  if (!answer.ok) throw new Refused(`The server answered ${answer.status}.`);
  model = await answer.json();
  start();
} catch (error) {
  $("model").textContent = "";
  problem(error);
}
