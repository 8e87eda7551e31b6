// The page: what is chosen, what is computed, what is shown. Nothing is loaded from anywhere else.

import { Refused, asBlob, kept, offered, post, send } from "./server.js";

const $ = (id) => document.getElementById(id);
const make = (tag, values = {}, ...inner) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...inner);
  return element;
};
const words = (name) => name.replaceAll("_", " ").replace("=", ": ").replaceAll("+", " or ");
const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

// -- what is computed ----------------------------------------------------------------------------------------------

function problem(error) {
  if (error && error.name === "AbortError") return;
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

// One computation of a kind on screen: a newer one aborts the older, and what it says goes to its status line. Whether it
// was shown.
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
    return true;
  } catch (error) {
    clearInterval(clock);
    if (running[kind] === control) status.textContent = "";
    problem(error);
    return false;
  }
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const fileName = (name) => name.replace(/\.\w+$/, "").replace(/[\s/\\:*?"<>|]+/g, "-");

// -- what is chosen -----------------------------------------------------------------------------------------------

let model;
let chosen = null; // a Picture
const scales = {};
const recipe = () => ({ recipe: $("recipe").value, solver: $("solver").value });

// Most controls do something with the chosen image.
function enable(on) {
  const controls = document.querySelectorAll(":is(#edit, #interpolate, #inside) :is(button, input, select)");
  for (const control of controls) control.disabled = !on;
}

function choose(picture) {
  if (!chosen) enable(true);
  if (chosen !== picture) forget();
  chosen = picture;
  const strip = $("strip");
  if (![...strip.children].some((button) => button.picture === picture)) {
    strip.prepend(thumbnail(picture, choose));
    strip.scrollLeft = 0;
    while (strip.children.length > 60) strip.lastChild.remove();
  }
  for (const button of strip.children) {
    button.setAttribute("aria-pressed", button.picture === picture);
    button.tabIndex = button.picture === picture ? 0 : -1;
  }
  $("original").src = picture.src;
  edit();
}

function thumbnail(picture, act) {
  const image = make("img", { src: picture.src, alt: "" });
  const button = make("button", { type: "button", title: picture.name, tabIndex: -1, picture }, image);
  button.setAttribute("aria-label", `Image ${picture.name.replace("data-", "")}`);
  button.setAttribute("aria-pressed", false);
  button.onclick = () => act(picture, button);
  return button;
}

// A row of buttons is one tab stop; the arrow keys, Home and End move in it.
function rove(row, act = () => {}) {
  row.addEventListener("focusin", ({ target }) => { for (const one of row.children) one.tabIndex = one === target ? 0 : -1; });
  row.addEventListener("keydown", (event) => {
    const all = [...row.children].filter((one) => !one.disabled);
    const at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = all.at(to % all.length);
    next.focus();
    act(next);
  });
}

async function upload(file) {
  if (!file) return;
  try {
    if (file.size > model.limits.bytes) throw new Refused(`${file.name}: too large; at most ${model.limits.bytes >> 20} MiB`);
    const found = await send(file, file.name);
    problem(null);
    choose(kept(found));
    if (!$("sample").hidden) open("edit"); // where it is seen
  } catch (error) {
    problem(error);
  }
}

// -- edit ---------------------------------------------------------------------------------------------------------

// While a slider moves, previews follow one another and only the newest position waits: none is stale, none is cut off.
// When it rests, the picture is refined; whatever moves next cuts that off. Nothing is computed while it is not seen.
// ``refined``: of which image and recipe the refined reconstruction is on screen.
const live = { stale: false, unrefined: false, moving: false, busy: null, latest: null, shown: null, refined: "", done: null };

function edit(moving = false) {
  Object.assign(live, { stale: true, unrefined: true, moving });
  refresh();
}

function refresh() {
  if (!live.busy) live.done = catchUp();
  else if ((live.stale || live.unrefined) && (live.busy.refine || live.busy.image !== chosen)) live.busy.control.abort();
}

function rest() {
  if (!live.moving) return;
  live.moving = false;
  if (!live.busy) live.done = catchUp();
}

async function catchUp() {
  const stage = document.querySelector("#edit .stage");
  stage.setAttribute("aria-busy", "true");
  while (chosen && model.autoencoder && !$("edit").hidden && (live.stale || (live.unrefined && !live.moving))) {
    const refine = !live.stale;
    const image = chosen;
    const made = JSON.stringify({ image, ...recipe() });
    live.stale = false;
    live.unrefined = !refine;
    live.busy = { refine, image, control: new AbortController() };
    try {
      const values = { image, scales, preview: !refine, ...(refine ? recipe() : {}) };
      const found = await post("edit", values, live.busy.control.signal);
      problem(null);
      if (image === chosen) show(found, !refine, made);
    } catch (error) {
      problem(error);
      if (error.name === "AbortError") continue;
      live.unrefined = false;
      if (live.shown !== image) clear();
    }
  }
  live.busy = null;
  stage.setAttribute("aria-busy", "false");
}

// Nothing of another image stays beside one that could not be computed.
function clear() {
  live.latest = live.shown = null;
  live.refined = $("edit-status").textContent = "";
  for (const name of ["reconstruction", "edited", "wipe-before", "wipe-after"]) $(name).removeAttribute("src");
  for (const { arrived } of Object.values(sliders)) arrived.replaceChildren();
}

function show(found, preview, made) {
  live.latest = found;
  live.shown = chosen;
  $("original").src = found.original;
  // A preview's reconstruction is the coarser one.
  if (!preview || live.refined !== made) {
    $("reconstruction").src = $("wipe-before").src = found.reconstruction;
    live.refined = preview ? "" : made;
  }
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
  const cost = found.evaluations ? `${found.evaluations} evaluations, ${found.seconds.toFixed(2)} s` : "computed before";
  $("edit-status").setAttribute("aria-live", preview ? "off" : "polite");
  $("edit-status").textContent = preview ? `preview: ${cost}` : `refined: ${cost}, MSE ${found.mse.toExponential(1)}`;
  $("edit-status").title = `MSE of the reconstruction; ${found.recipe}`;
}

const sliders = {};

function addSlider(name, value) {
  const id = `slider-${name}`;
  const input = make("input", { id, type: "range", min: -model.reach, max: model.reach, step: 0.01, value });
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
  edit();
}

// A finger that scrolls the page may begin on a slider: the browser takes the pointer away, and the value is what it was.
let held = null;
addEventListener("pointerdown", ({ target }) => {
  held = target.type === "range" ? { target, value: target.value } : null;
}, true);
addEventListener("pointercancel", () => {
  if (!held || held.target.value === held.value) return;
  held.target.value = held.value;
  held.target.dispatchEvent(new Event("input"));
}, true);
// A slider that is let go where it was taken sends no change.
for (const kind of ["pointerup", "pointercancel", "keyup", "blur"]) addEventListener(kind, rest, true);

function wipe() {
  const at = $("wipe").value;
  $("wipe-after").style.clipPath = `inset(0 0 0 ${at}%)`;
  $("wipe-line").style.left = `${at}%`;
}

// -- interpolate --------------------------------------------------------------------------------------------------

const path = { a: null, b: null, frames: [], gif: null, made: "" };

function setEnd(side, picture = chosen) {
  path[side] = picture;
  $(`end-${side}`).src = picture.src;
  interpolate();
}

async function interpolate() {
  if (!path.a || !path.b) return;
  const values = { a: path.a, b: path.b, kind: $("kind").value, frames: Number($("frames").value), ...recipe() };
  const made = JSON.stringify(values);
  if (path.made === made) return;
  Object.assign(path, { frames: [], gif: null, made });
  $("save-gif").disabled = true;
  $("between").removeAttribute("src");
  const shown = await job("interpolate", "interpolate", values, (found, status) => {
    Object.assign(path, { frames: found.frames, gif: found.gif });
    $("save-gif").disabled = false;
    const share = $("scrub").value / $("scrub").max;
    $("scrub").max = found.frames.length - 1;
    $("scrub").value = Math.round(share * $("scrub").max);
    scrub();
    status.textContent = `${found.frames.length} frames, ${found.evaluations} evaluations, ${found.seconds.toFixed(1)} s`;
  });
  if (!shown && path.made === made) path.made = "";
}

function scrub() {
  const at = Number($("scrub").value);
  if (path.frames[at]) $("between").src = path.frames[at];
  $("between-text").textContent = `${at + 1} of ${Number($("scrub").max) + 1}`;
}

// -- sample -------------------------------------------------------------------------------------------------------

const likes = new Set();

function sample() {
  const which = $("which").value;
  const values = { count: Number($("count").value), seed: Number($("seed").value), ...recipe() };
  if (which === "like") values.like = [...likes];
  else if (which) Object.assign(values, { attribute: which.slice(1), without: which[0] === "-" });
  if (which === "like" && !likes.size) return problem(new Refused("Click one or more images first."));
  job("sample", "sample", values, (found, status) => {
    const tiles = found.images.map((one, i) => {
      const image = make("img", { src: one.image, alt: "" });
      const tile = make("button", { type: "button" }, image);
      tile.setAttribute("aria-label", `Sample ${i + 1}: edit it`);
      if (model.autoencoder) tile.onclick = () => { choose(kept(one)); open("edit"); };
      return tile;
    });
    $("samples").replaceChildren(...tiles);
    const rate = found.best_of ? `, the most alike of ${found.best_of} draws`
      : found.rate === null ? "" : `, ${(100 * found.rate).toFixed(0)} % of the draws accepted`;
    status.textContent = `${found.images.length} images of seed ${values.seed}, ${found.seconds.toFixed(1)} s${rate}`;
    $("seed").value = (values.seed + 1) % 2 ** 31;
  });
}

// -- look inside --------------------------------------------------------------------------------------------------

// What is on the tab is about one image.
function forget() {
  for (const kind of ["compare", "inside"]) running[kind]?.abort();
  $("compare").tBodies[0].replaceChildren();
  $("along").replaceChildren();
}

function addRow(name, found) {
  const cells = [found.evaluations, found.seconds.toFixed(2), found.mse.toExponential(2), found.ssim.toFixed(4)];
  $("compare").tBodies[0].prepend(make("tr", { title: found.recipe }, make("td", { textContent: name }),
    make("td", {}, make("img", { src: found.image, alt: `Reconstruction by ${name}` })),
    ...cells.map((text) => make("td", { textContent: text }))));
}

function measure(name, values, then) {
  job("compare", "reconstruct", { image: chosen, ...values }, (found) => { addRow(name, found); then?.(); });
}

function inside() {
  job("inside", "inside", { image: chosen, times: 8 }, (found) => {
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
  problem(null);
  showRecent();
}

// What is seen follows the menus; what is hidden does when it is opened.
function showRecent() {
  if (!$("edit").hidden) refresh();
  if ($("interpolate").hidden) return;
  if (!path.a && chosen) {
    const other = model.opening.findLast((key) => key !== chosen.key);
    if (other) setEnd("b", offered(other));
    setEnd("a");
  }
  interpolate();
}

function recipeText() {
  const { solver, ways } = model.recipes.find((row) => row.name === $("recipe").value);
  for (const option of $("solver").options) option.disabled = !ways[option.value];
  if (!ways[$("solver").value]) $("solver").value = solver;
  const { evaluations, text } = ways[$("solver").value];
  $("recipe-text").textContent = `${evaluations} evaluations: ${text}`;
}

// The first of the keys whose image can be read.
async function readable(keys) {
  for (const key of keys) {
    const picture = offered(key);
    if (await make("img", { src: picture.src }).decode().then(() => true, () => false)) return picture;
  }
}

async function start() {
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
    live.unrefined = true;
    showRecent();
  };
  $("recipe").onchange = () => { $("solver").value = model.recipes.find((r) => r.name === $("recipe").value).solver; again(); };
  $("solver").onchange = again;

  // The page opens with an edit that shows.
  model.attributes.forEach((name, i) => addSlider(name, i ? 0 : Math.round(75 * model.reach) / 100));
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
  $("strip").append(...model.pictures.map((key) => thumbnail(offered(key), choose)));
  $("likes").append(...model.pictures.map((key) => thumbnail(offered(key), (picture, button) => {
    if (!likes.delete(picture)) likes.add(picture);
    button.setAttribute("aria-pressed", likes.has(picture));
  })));
  for (const row of [$("strip"), $("likes")]) {
    rove(row);
    if (row.firstChild) row.firstChild.tabIndex = 0;
  }
  enable(false);
  open(model.autoencoder ? "edit" : "sample");
  wipe();
  if (!model.autoencoder) return;
  const first = await readable([...model.opening.slice(0, 1), ...model.pictures]);
  if (!first || chosen) return;
  choose(first);
  const pressed = $("strip").querySelector("[aria-pressed=true]");
  $("strip").scrollLeft = pressed.offsetLeft - $("strip").clientWidth / 2;
}

for (const tab of tabs) tab.onclick = () => open(tab.getAttribute("aria-controls"));
rove(document.querySelector("[role=tablist]"), (tab) => tab.click());
$("wipe").oninput = wipe;
$("reset").onclick = reset;
$("file").onchange = () => { upload($("file").files[0]); $("file").value = ""; };
$("random").onclick = () => choose(offered(`data-${Math.floor(Math.random() * model.total)}`));
$("draw").onclick = () => job("draw", "sample", { count: 1, seed: Math.floor(Math.random() * 2 ** 31), ...recipe() },
  (found) => choose(kept(found.images[0])));
// Not a preview: what is saved is the refined picture.
$("save-png").onclick = async () => {
  await live.done;
  if (live.latest) save(asBlob(live.latest.edit), `${fileName(live.latest.name)}-edit.png`);
};
$("save-latents").onclick = async () => {
  try {
    await live.done;
    save(await post("latents", { image: chosen, scales, ...recipe() }), `${fileName(live.latest.name)}.safetensors`);
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
  await start();
} catch (error) {
  $("model").textContent = "";
  problem(error);
}
