"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const make = (tag, className, text) => { const e = document.createElement(tag); if (className) e.className = className; if (text !== undefined) e.textContent = text; return e };
const K = data.answers.length - 1, N = data.names.length, CHUNK = 240;
// colours that colour-blind people can tell apart (Okabe and Ito), grey for "other"
const HUES = ["#0072b2", "#c8641b", "#00805c", "#b0568a", "#8a7000", "#3b8fc4", "#7b4fb0", "#a33b3b"];
const hue = k => k === K ? "var(--other)" : HUES[k % HUES.length];
const percent = p => p >= .9995 ? "100 %" : p < .0005 ? "0 %" : (100 * p).toFixed(p > .099 ? 0 : 1) + " %";

// the cut, by numbers with all their digits: probabilities in `data.probs` are rounded, and only shown
let threshold = data.threshold, shown = [], filter = -1, current = -1, drawn = 0;
const answer = n => threshold === null ? data.own[n] : data.score[n] >= threshold ? data.best[n] : K;
const certainty = n => threshold === null ? data.margin[n] : Math.abs(data.score[n] - threshold);

// corrections, name of a photograph -> name of an answer, are kept by this browser until they are saved
const memory = "ucdm corrections of " + data.root + " in " + location.pathname, here = new Set(data.names);
let fixed = new Map();
function recall() {
  try { fixed = new Map(JSON.parse(localStorage.getItem(memory) || "[]").filter(([name]) => here.has(name))) } catch { }
}
function keep() {
  try { localStorage.setItem(memory, JSON.stringify([...fixed])) } catch { }
  count();
}
function count() {
  const n = fixed.size;
  $("corrections").hidden = !n;
  $("number").textContent = n + (n === 1 ? " correction" : " corrections");
}
const quoted = s => /[",\n\r]/.test(s) ? '"' + s.replaceAll('"', '""') + '"' : s;
const csvText = () => ["file,label", ...[...fixed].map(([name, to]) => quoted(data.root + name) + "," + quoted(to)), ""].join("\n");
// another window of this page
addEventListener("storage", e => { if (e.key === memory) { recall(); count(); draw() } });
$("save").onclick = () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  link.download = "corrections.csv";
  link.click();
};
$("forget").onclick = () => { fixed.clear(); keep(); draw() };

// the grid: a part at a time, the next one when its end comes near
function card(n) {
  const k = answer(n), p = data.probs[n][k], c = make("button", "card");
  c.style.setProperty("--hue", hue(k));
  const img = make("img");
  img.loading = "lazy"; img.decoding = "async"; img.alt = ""; img.src = "thumbs/" + data.thumbs[n];
  img.onload = () => img.classList.toggle("small", img.naturalWidth < 72);
  const meter = make("span", "meter"), level = make("i");
  level.style.width = 100 * p + "%";
  meter.append(level);
  const text = make("span", "text"), line = make("span", "answer");
  line.append(make("span", "", data.answers[k]), make("span", "percent", percent(p)));
  text.append(line, make("span", "name", data.names[n]));
  c.append(img, meter, text);
  c.title = data.names[n];
  if (fixed.has(data.names[n])) c.append(make("span", "mark", "→ " + fixed.get(data.names[n])));
  else if (data.labels[n] >= 0) c.append(make("span", "mark", (data.labels[n] === k ? "✓ " : "✗ ") + data.answers[data.labels[n]]));
  c.onclick = () => open(n);
  return c;
}
function grow() {
  const part = document.createDocumentFragment();
  for (const n of shown.slice(drawn, drawn + CHUNK)) part.append(card(n));
  drawn = Math.min(shown.length, drawn + CHUNK);
  $("grid").append(part);
}
new IntersectionObserver(seen => { if (seen[0].isIntersecting && drawn < shown.length) grow() }, { rootMargin: "1200px" }).observe($("more"));
function draw() {
  const wanted = $("search").value.toLowerCase(), counts = new Array(K + 1).fill(0), sure = new Float64Array(N);
  const given = data.names.map((_, n) => { const k = answer(n); counts[k]++; sure[n] = certainty(n); return k });
  shown = [];
  for (let n = 0; n < N; n++) if ((filter < 0 || given[n] === filter) && data.names[n].toLowerCase().includes(wanted)) shown.push(n);
  const how = $("sort").value;
  if (how === "uncertain") shown.sort((a, b) => sure[a] - sure[b]);
  else if (how === "certain") shown.sort((a, b) => sure[b] - sure[a]);
  else if (how !== "name") shown.sort((a, b) => data.probs[b][+how] - data.probs[a][+how]);
  chips(counts);
  $("grid").replaceChildren();
  $("empty").hidden = shown.length > 0;
  drawn = 0;
  grow();
}
function chips(counts) {
  const entries = [[-1, "all", N], ...data.answers.map((name, k) => [k, name, counts[k]])];
  $("chips").replaceChildren(...entries.map(([k, name, n]) => {
    const b = make("button", k === filter ? "on" : "");
    if (k >= 0) { b.style.setProperty("--hue", hue(k)); b.append(make("span", "dot")) }
    b.append(name, make("b", "", n.toLocaleString("en")));
    b.onclick = () => { filter = k; draw() };
    return b;
  }));
}

// one photograph
function open(n) {
  current = n;
  const k = answer(n), p = data.probs[n], large = $("large");
  large.onload = () => large.classList.toggle("small", large.naturalWidth < 200);
  large.onerror = () => { large.onerror = null; large.src = "thumbs/" + data.thumbs[n] }; // a format that browsers lack
  large.src = data.links[n];
  $("file").textContent = data.names[n];
  $("facts").textContent = data.sizes[n] + " pixels; answer: " + data.answers[k];
  $("bars").replaceChildren(...data.answers.map((name, j) => {
    const row = make("div", "row"), track = make("span", "track"), i = make("i");
    row.style.setProperty("--hue", hue(j));
    i.style.width = 100 * p[j] + "%";
    track.append(i);
    row.append(make("span", "", name), track, make("span", "", percent(p[j])));
    return row;
  }));
  $("correct").replaceChildren(...data.answers.map((name, j) => {
    const b = make("button", fixed.get(data.names[n]) === name ? "on" : "", name);
    b.style.setProperty("--hue", hue(j));
    b.onclick = () => correct(j);
    return b;
  }));
  if (!$("look").open) $("look").showModal();
}
function correct(k) {
  const name = data.names[current], to = data.answers[k];
  if (fixed.get(name) === to) fixed.delete(name); else fixed.set(name, to);
  keep();
  open(current);
}
$("look").onclose = () => draw();
$("look").onclick = e => { if (e.target === $("look")) $("look").close() };
document.onkeydown = e => {
  if (!$("look").open) return;
  const at = shown.indexOf(current);
  if (e.key === "ArrowRight" && at + 1 < shown.length) open(shown[at + 1]);
  if (e.key === "ArrowLeft" && at > 0) open(shown[at - 1]);
  if (/^[1-9]$/.test(e.key) && +e.key <= K + 1) correct(+e.key - 1);
};

// controls
function cut() {
  const own = threshold === null;
  for (const r of document.getElementsByName("rule")) r.checked = (r.value === "own") === own;
  $("threshold").disabled = own;
  if (!own) $("threshold").value = threshold;
  $("value").textContent = own ? "" : threshold.toFixed(3);
  $("flag").textContent = (own ? "" : "--threshold " + threshold + (data.with_labels ? " --labels …" : "")) + (data.asked ? " --ask-generator" : ""); // all digits: the command answers as the page does
}
let waiting = 0;
const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw) };
for (const r of document.getElementsByName("rule")) r.onchange = () => { threshold = r.value === "own" ? null : +$("threshold").value; cut(); draw() };
$("threshold").oninput = () => { threshold = +$("threshold").value; cut(); soon() };
$("search").oninput = soon;
$("sort").onchange = draw;
$("zoom").oninput = () => $("grid").style.setProperty("--side", $("zoom").value + "px");
data.answers.forEach((name, k) => { const o = make("option", "", "most like " + name); o.value = k; $("sort").append(o) });
const turn = name => {
  if (!document.querySelector(`#tabs [data-tab="${CSS.escape(name)}"]`)) return;
  for (const e of document.querySelectorAll("#tabs button, .tab")) e.classList.toggle("on", (e.dataset.tab || e.id) === name);
};
for (const b of $("tabs").children) b.onclick = () => { turn(b.dataset.tab); history.replaceState(null, "", "#tab-" + b.dataset.tab) };
turn(location.hash.replace("#tab-", ""));
recall(); count(); cut(); draw();
