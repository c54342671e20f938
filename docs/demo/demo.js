// Draws or loads a digit, adds a stored perturbation, purifies it by an ONNX file with noise that is drawn here.

const SIZE = 8, PIXELS = SIZE * SIZE, CLASSES = 10, DRAWS = 10;
const byId = (id) => document.getElementById(id);
const status = byId("status");

// What is shown; tests read it. image, attacked: 64 pixels; noise: DRAWS x 64; others: probabilities
const state = { ready: false, seed: 0, label: null, busy: 0 };
window.demo = state;

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

/** Return a source of uniform numbers in [0, 1) that a whole number decides (mulberry32). */
function uniform(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** Return standard normal numbers by Box and Muller. */
function normal(count, seed) {
  const next = uniform(seed), out = new Float32Array(count);
  for (let k = 0; k < count; k += 1) {
    out[k] = Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
  }
  return out;
}

function softmax(z) {
  const most = Math.max(...z), e = z.map((v) => Math.exp(v - most)), sum = e.reduce((a, b) => a + b);
  return e.map((v) => v / sum);
}

const largest = (values) => values.indexOf(Math.max(...values));
const clip = (v) => Math.min(1, Math.max(0, v));
const rows = (values, width) =>
  Array.from({ length: values.length / width }, (_, k) => Array.from(values.slice(k * width, (k + 1) * width)));

/** Show 64 numbers in [0, 1] as dark ink on white. */
function paint(canvas, pixels, cursor = -1) {
  const context = canvas.getContext("2d"), shown = context.createImageData(SIZE, SIZE);
  pixels.forEach((v, k) => shown.data.set([...Array(3).fill(255 * (1 - clip(v))), 255], 4 * k));
  if (cursor >= 0) shown.data.set([86, 180, 233, 255], 4 * cursor);
  context.putImageData(shown, 0, 0);
}

let ort, classifier, pair, stored;

async function load() {
  try {
    ort = await import("./build/ort.wasm.bundle.min.mjs");
  } catch {
    throw new Error("onnxruntime is not there: run `make demo` in the repository, then serve this folder.");
  }
  ort.env.wasm.wasmPaths = { wasm: new URL("build/ort-wasm-simd-threaded.wasm", document.baseURI).href };
  ort.env.wasm.numThreads = 1;
  const response = await fetch("demo.json");
  if (!response.ok) throw new Error(`demo.json: ${response.status}`);
  stored = await response.json();
  classifier = await ort.InferenceSession.create("classifier.onnx");
  pair = await ort.InferenceSession.create("pair.onnx");
}

const images = (pixels, n) => new ort.Tensor("float32", pixels, [n, 1, SIZE, SIZE]);

let running = Promise.resolve();

/** Run the networks on what is shown, one call after the other, and show the answers. */
function update() {
  state.busy += 1;
  running = running.then(compute).catch((error) => say(error.message, true)).finally(() => { state.busy -= 1; });
  return running;
}

async function compute() {
  attackImage();
  const both = Float32Array.from([...state.image, ...state.attacked]);
  const { logits } = await classifier.run({ x: images(both, 2) });
  [state.clean, state.broken] = rows(logits.data, CLASSES).map(softmax);
  state.noise = normal(DRAWS * PIXELS, state.seed);
  const repeated = Float32Array.from({ length: DRAWS * PIXELS }, (_, k) => state.attacked[k % PIXELS]);
  const noise = new ort.Tensor("float32", state.noise, [1, DRAWS, 1, SIZE, SIZE]);
  const answer = await pair.run({ x: images(repeated, DRAWS), noise });
  state.purified = rows(answer.y.data, PIXELS);
  state.draws = rows(answer.logits.data, CLASSES).map(softmax);
  state.mean = state.draws[0].map((_, c) => state.draws.reduce((sum, p) => sum + p[c], 0) / DRAWS);
  show();
}

/** Add the chosen perturbation: that of the chosen digit, or of the stored digit most like what was drawn. */
function attackImage() {
  const kind = document.querySelector('input[name="attack"]:checked').value, eps = Number(byId("eps").value);
  byId("eps-shown").textContent = eps.toFixed(3);
  let digit = state.digit;
  if (digit === null) {
    const distance = stored.sixteenths.map((p) => p.reduce((sum, v, k) => sum + (v / 16 - state.image[k]) ** 2, 0));
    digit = distance.indexOf(Math.min(...distance));
  }
  state.kind = kind;
  byId("source").textContent = kind === "none" ? "" : state.digit !== null
    ? "It was made for this very image."
    : `It was made for the stored digit most like yours, a ${stored.labels[digit]}, and is only carried over.`;
  const delta = kind === "none" ? null : stored.perturbations[kind][digit];
  state.attacked = state.image.map((v, k) => Math.fround(
    delta ? clip(v + (delta[k] / stored.stored) * (eps / stored.eps)) : v));
}

function show() {
  const truth = state.label;
  paint(byId("image"), state.image);
  paint(byId("attacked"), state.attacked);
  byId("draws").replaceChildren(...state.purified.map((pixels, k) => {
    const item = document.createElement("li"), canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIZE;
    paint(canvas, pixels);
    const p = state.draws[k], c = largest(p), text = document.createElement("span");
    text.textContent = `${c}: ${(100 * p[c]).toFixed(0)} %`;
    text.className = truth !== null && c !== truth ? "wrong" : "";
    item.append(canvas, text);
    return item;
  }));
  byId("classes").replaceChildren(...Array.from({ length: CLASSES }, (_, c) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = c === truth ? `${c}, true` : c;
    row.className = c === truth ? "label" : "";
    row.append(head, ...[state.clean, state.broken, state.mean].map((p) => cell(p, c, truth)));
    return row;
  }));
  const right = state.draws.filter((p) => largest(p) === (truth ?? largest(state.clean))).length;
  const wanted = truth === null ? "the class of your image before the attack" : `the true class, ${truth}`;
  const begin = state.kind === "none" ? "Not attacked" : "Attacked";
  say(`${begin}, the classifier alone says ${largest(state.broken)}; purified, ${right} of ${DRAWS} draws say ` +
    `${wanted}${truth === null ? `, ${largest(state.clean)}` : ""}.`);
}

function cell(p, c, truth) {
  const data = document.createElement("td"), bar = document.createElement("div");
  const fill = document.createElement("i"), text = document.createElement("span");
  bar.className = `bar${c === largest(p) ? " top" : ""}${truth !== null && c !== truth ? " miss" : ""}`;
  fill.style.width = `${100 * p[c]}%`;
  text.textContent = `${(100 * p[c]).toFixed(1)} %`;
  bar.append(fill, text);
  data.append(bar);
  return data;
}

function choose(digit) {
  state.digit = digit;
  state.label = stored.labels[digit];
  state.image = stored.sixteenths[digit].map((v) => v / 16);
  return update();
}

/** Go on from what was drawn or loaded: it has no true class. */
function own(pixels) {
  state.digit = state.label = null;
  state.image = pixels;
  byId("digit").value = "";
  return update();
}

/** Darken a pixel and, by less, its neighbours. */
function ink(row, column) {
  const pixels = [...state.image];
  for (const [r, c, v] of [[0, 0, 1], [0, 1, 0.3], [0, -1, 0.3], [1, 0, 0.3], [-1, 0, 0.3]]) {
    const y = row + r, x = column + c;
    if (y >= 0 && y < SIZE && x >= 0 && x < SIZE) {
      pixels[y * SIZE + x] = v === 1 ? 1 : Math.max(pixels[y * SIZE + x], v);
    }
  }
  return own(pixels);
}

function drawByHand() {
  const canvas = byId("image");
  let last = -1, cursor = 3 * SIZE + 3;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return SIZE * Math.min(SIZE - 1, Math.max(0, Math.floor(SIZE * y))) +
      Math.min(SIZE - 1, Math.max(0, Math.floor(SIZE * x)));
  };
  const stroke = (event) => {
    const k = at(event);
    if (k !== last) ink(Math.floor((last = k) / SIZE), k % SIZE);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = -1;
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) stroke(event); });
  const moves = { ArrowUp: -SIZE, ArrowDown: SIZE, ArrowLeft: -1, ArrowRight: 1 };
  canvas.addEventListener("keydown", async (event) => {
    if (event.key === " ") await ink(Math.floor(cursor / SIZE), cursor % SIZE);
    else if (event.key in moves) {
      const to = cursor + moves[event.key], wraps = Math.abs((to % SIZE) - (cursor % SIZE)) > 1;
      if (to >= 0 && to < PIXELS && !wraps) cursor = to;
    } else return;
    event.preventDefault();
    paint(canvas, state.image, cursor);
  });
  canvas.addEventListener("blur", () => paint(canvas, state.image));
}

/** Return a loaded image in 8 x 8 grey levels, ink as 1: each is the mean of 8 x 8 pixels of a scaled copy. */
async function readImage(file) {
  const bitmap = await createImageBitmap(file), canvas = document.createElement("canvas");
  canvas.width = canvas.height = PIXELS;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, PIXELS, PIXELS);
  context.imageSmoothingQuality = "high";
  const scale = PIXELS / Math.max(bitmap.width, bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (PIXELS - w) / 2, (PIXELS - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, PIXELS, PIXELS), grey = Array(PIXELS).fill(0);
  for (let k = 0; k < PIXELS * PIXELS; k += 1) {
    const cellOf = SIZE * Math.floor(k / PIXELS / SIZE) + Math.floor((k % PIXELS) / SIZE);
    grey[cellOf] += (0.299 * data[4 * k] + 0.587 * data[4 * k + 1] + 0.114 * data[4 * k + 2]) / 255 / PIXELS;
  }
  const edge = grey.filter((_, k) => [0, SIZE - 1].includes(k % SIZE) || [0, SIZE - 1].includes(Math.floor(k / SIZE)));
  const isDark = edge.reduce((a, b) => a + b) / edge.length < 0.5; // light ink on dark ground
  return grey.map((v) => Math.fround(isDark ? v : 1 - v));
}

/** Write what the networks' cards say into the text. */
function tellFacts({ measured }) {
  const percent = (v) => `${(100 * v).toFixed(1)}\u00a0%`;
  for (const element of document.querySelectorAll("[data-fact]")) {
    const [name, key] = element.dataset.fact.split(".");
    if (name === "limits") element.textContent = measured.limits;
    else if (name === "cost") {
      element.textContent = percent(measured.trades.multiply_adds / measured.pair.multiply_adds);
    } else element.textContent = percent(measured[name][key]);
  }
}

async function start() {
  await load();
  tellFacts(stored);
  byId("digit").append(new Option("your own", ""), ...stored.labels.map((label, k) =>
    new Option(`${label} (number ${stored.numbers[k]})`, k)));
  byId("digit").addEventListener("change", (event) => {
    if (event.target.value !== "") choose(Number(event.target.value));
    else own([...state.image]);
  });
  byId("clear").addEventListener("click", () => own(Array(PIXELS).fill(0)));
  byId("file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try { await own(await readImage(file)); } catch { say(`${file.name} is no image that this browser reads.`, true); }
  });
  for (const input of document.querySelectorAll('input[name="attack"], #eps')) input.addEventListener("input", update);
  byId("seed").addEventListener("change", (event) => {
    state.seed = Math.trunc(Number(event.target.value)) >>> 0;
    event.target.value = state.seed;
    update();
  });
  byId("purify").addEventListener("click", () => {
    state.seed = (state.seed + 1) >>> 0;
    byId("seed").value = state.seed;
    update();
  });
  byId("digit").value = "3";
  await choose(3);
  drawByHand();
  byId("purify").disabled = false;
  state.ready = true;
}

start().catch((error) => say(error.message, true));
