// The training widget: buttons, progress, curves of one or several runs, knobs, what happened, what was said.
const MARKS = { knob: "#d9822b", alert: "#c0392b" };
const STATES = { ready: "ready", running: "running", paused: "paused", stopping: "stopping …", stopped: "stopped", done: "done", error: "failed" };

function buttons(kit) {                              // [element, paint(view)]
  const make = (name, text, picture, key, kind, more) => {
    const b = h("button", { "data-act": name, title: `key ${key}`, onclick: () => { kit.ask(kind, more); kit.root.focus({ preventScroll: true }); } }, icon(picture), text, h("kbd", {}, key));
    return b;
  };
  const b = { start: make("start", "Start", "play", "s", "start"), pause: make("pause", "Pause", "pause", "p", "pause"), resume: make("resume", "Resume", "play", "p", "resume"),
    stop: make("stop", "Stop", "stop", "x", "stop"), checkpoint: make("checkpoint", "Checkpoint", "save", "c", "request", { what: "checkpoint" }), evaluate: make("evaluate", "Evaluate", "measure", "e", "request", { what: "evaluate" }) };
  for (const k of ["start", "resume"]) b[k].classList.add("main");
  const paint = v => {
    b.start.hidden = !v.can_start; b.start.childNodes[1].textContent = v.state === "stopped" || v.state === "error" ? "Go on" : "Start";
    b.pause.hidden = v.state !== "running"; b.resume.hidden = v.state !== "paused"; b.stop.disabled = !["running", "paused"].includes(v.state);
    for (const k of ["checkpoint", "evaluate"]) { b[k].hidden = !v.requests.includes(k); b[k].disabled = !["running", "paused"].includes(v.state); b[k].classList.toggle("wait", v.asked.includes(k)); }
  };
  const press = k => () => { if (!b[k].hidden && !b[k].disabled) b[k].click(); };
  const keys = { s: press("start"), p: () => { (b.pause.hidden ? b.resume : b.pause).click(); }, x: press("stop"), c: press("checkpoint"), e: press("evaluate") };
  return { element: h("div", { class: "snb-buttons" }, Object.values(b)), paint, keys };
}

function knobs(kit) {
  const box = h("div", { class: "snb-knobs", role: "group", "aria-label": "knobs" }), rows = {};
  const row = (name, k) => {
    const lo = k.start / 10, hi = k.start * 10, at = v => 500 + 500 * Math.log10(v / k.start), of = p => k.start * 10 ** ((p - 500) / 500);
    const slide = h("input", { type: "range", min: 0, max: 1000, "aria-label": `${name}, from ${short(lo)} to ${short(hi)}` }), field = h("input", { type: "text", inputmode: "decimal", size: 8, "aria-label": name, name });
    const wait = h("span", { class: "snb-wait" });
    const show = v => { slide.value = at(v); field.value = short(v); };
    const put = async value => { const r = await kit.ask("knob", { name, value }); if (!r.ok) show(rows[name].value); };
    slide.addEventListener("input", () => { field.value = short(of(+slide.value)); });
    slide.addEventListener("change", () => put(+of(+slide.value).toPrecision(3)));
    field.addEventListener("change", () => put(field.value.trim() === "" || isNaN(field.value) ? field.value : +field.value));
    box.append(h("label", {}, name), slide, field, wait);
    return { show, wait, value: k.value, fields: [slide, field] };
  };
  return { element: box, paint(v) {
    box.hidden = !Object.keys(v.knobs).length;
    for (const [name, k] of Object.entries(v.knobs)) {
      const r = rows[name] ??= row(name, k);
      r.value = k.pending ?? k.value; r.wait.textContent = k.pending == null ? "" : "from the next round";
      if (!r.fields.includes(document.activeElement)) r.show(r.value);
    }
  } };
}

function happened() {                                // the log of events, newest first
  const list = h("ol", { class: "snb-events snb-text", "aria-label": "what happened", tabindex: -1 });
  return { element: list, set(events) {
    list.replaceChildren(...events.slice(-80).reverse().map(e => h("li", { class: `${e.kind} ${e.level}` }, h("span", { class: "snb-step" }, `#${e.step}`), " ", e.text)));
    list.hidden = !events.length;
  } };
}

function talks(kit) {                                // sample conversations, token by token
  let all = [], at = -1;
  const title = h("span"), body = h("div", { class: "snb-talk snb-text" });
  const turn = d => { at = Math.min(all.length - 1, Math.max(0, (at < 0 ? all.length - 1 : at) + d)); if (at === all.length - 1) at = -1; paint(); };
  const [older, newer] = [["left", -1], ["right", 1]].map(([k, d]) => h("button", { title: d < 0 ? "older (←)" : "newer (→)", "aria-label": d < 0 ? "older" : "newer", onclick: () => turn(d) }, icon(k)));
  const element = h("section", { class: "snb-samples", "aria-label": "sample conversations", hidden: true }, h("div", { class: "snb-head" }, title, older, newer), body);
  const tint = (a, top) => `background:rgba(${a > 0 ? "46,158,91" : a < 0 ? "214,69,65" : "128,128,128"},${(.10 + .5 * Math.abs(a) / top).toFixed(2)})`;
  function paint() {
    element.hidden = !all.length;
    if (!all.length) return;
    const s = all.at(at), i = all.indexOf(s), top = Math.max(1e-9, ...s.episodes.flatMap(e => e.advantages.map(Math.abs)));
    title.textContent = `Round ${s.step} · ${s.scenario}`; older.disabled = i <= 0; newer.disabled = at < 0;
    body.replaceChildren(...s.episodes.map(e => h("div", { class: "snb-episode" }, h("div", { class: "snb-reward" }, `reward ${e.reward.toFixed(2)}`),
      h("div", { class: "snb-tokens" }, e.tokens.map((t, k) => e.mask[k] ? h("span", { style: tint(e.advantages[k], top), title: `advantage ${e.advantages[k].toFixed(3)}` }, t) : h("span", { class: "given" }, t))))));
    kit.root.dataset.samples = all.length;
  }
  return { element, keys: { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1) }, set(samples) { all = samples; paint(); } };
}

export default widget("train", "Training", kit => {
  const { root } = kit, B = buttons(kit), K = knobs(kit), E = happened(), T = talks(kit);
  const state = h("span", { class: "snb-state", role: "status" }), fill = h("div"), bar = h("div", { class: "snb-bar", role: "progressbar", "aria-label": "rounds done" }, fill), time = h("span", { class: "snb-time" });
  const legend = h("div", { class: "snb-legend", hidden: true }), plots = h("div", { class: "snb-charts" });
  root.append(h("div", { class: "snb-top" }, state, B.element, h("div", { class: "snb-progress" }, bar, time)), legend, plots, h("div", { class: "snb-below" }, K.element, E.element), T.element);
  let runs = [], charts = [], made = "", events = [], samples = [], now = { step: 0, elapsed: 0, first: 0 }, due = false;

  function make(v) {                                 // charts follow from what is to be drawn; made anew only when that changes
    const plan = JSON.stringify([v.charts, v.runs]);
    if (plan === made) return;
    made = plan;
    for (const c of charts) c.chart.destroy();
    charts = v.charts.map(c => {
      const lines = v.runs.flatMap((r, i) => [...c.keys.map((k, j) => ({ key: k, run: i, label: k, colour: COLOURS[i % COLOURS.length], dots: j > 0, dash: j > 0 ? [3, 3] : undefined })),
        ...(c.band ? [1, -1].map(sign => ({ key: c.keys[0], band: c.band, sign, run: i, hidden: true, colour: COLOURS[i % COLOURS.length] })) : [])]);
      const bands = lines.flatMap((l, i) => l.sign === 1 ? [[i, i + 1]] : []);
      return { lines, chart: new Chart(plots, { title: c.title, unit: c.unit, lines, bands, group: `snb-${v.id}`, marks: () => events.filter(e => MARKS[e.kind]).map(e => ({ x: e.step, colour: MARKS[e.kind] })) }) };
    });
    legend.hidden = v.runs.length < 2;
    legend.replaceChildren(...v.runs.map((r, i) => h("span", {}, h("i", { style: `background:${COLOURS[i % COLOURS.length]}` }), r)));
  }
  function table(lines, i) {                         // [x, y, ...] of one run
    const r = runs[i], col = k => r.cols[r.keys.indexOf(k)];
    return [r.cols[0], ...lines.filter(l => l.run === i).map(l => l.sign ? col(l.key).map((v, j) => v == null || col(l.band)[j] == null ? null : v + l.sign * col(l.band)[j]) : col(l.key))];
  }
  function draw() {
    due = false;
    if (document.hidden || !runs[0]) return;
    for (const c of charts) { const t = runs.map((_, i) => table(c.lines, i)); c.chart.set(t.length > 1 ? uPlot.join(t) : t[0]); }
    root.dataset.drawn = runs[0].cols[0].length; root.dataset.runs = runs.length;
  }
  const later = () => { if (!due) { due = true; requestAnimationFrame(draw); } };
  document.addEventListener("visibilitychange", later);
  function paint(v) {
    const n = now.step - now.first, rate = n / now.elapsed, left = (v.total - now.step) / rate;
    make(v); B.paint(v); K.paint(v);
    state.textContent = v.state === "running" && !now.step ? "starting …" : STATES[v.state]; state.className = `snb-state ${v.state}`;
    fill.style.width = v.total ? `${Math.min(100, 100 * now.step / v.total)}%` : "0"; bar.setAttribute("aria-valuenow", now.step); bar.setAttribute("aria-valuemax", v.total);
    time.textContent = `${now.step}${v.total ? " / " + v.total : ""} rounds` + (n > 0 && now.elapsed > 0 ? ` · ${rate >= 1 ? short(rate) + "/s" : short(1 / rate) + " s each"} · ${clock(now.elapsed)}` : "")
      + (v.total && n > 0 && ["running", "paused"].includes(v.state) ? ` · ${clock(left)} left` : "");
    if (v.error) kit.tell(v.error, true);
    Object.assign(root.dataset, { state: v.state, step: now.step, events: events.length });
  }
  function message(m, buffers) {
    if (m.kind !== "delta") return;
    let lost = false;
    m.parts.forEach((p, i) => {
      const got = floats(buffers[i]), w = got.length / p.keys.length, cols = p.keys.map((_, k) => Array.from(got.subarray(k * w, (k + 1) * w), v => Number.isNaN(v) ? null : v));
      const r = runs[p.run];
      if (p.fresh) runs[p.run] = { keys: p.keys, have: p.n, cols };
      else if (!r || p.i0 > r.have) lost = true;
      else { cols.forEach((c, k) => { for (const v of c.slice(r.have - p.i0)) r.cols[k].push(v); }); r.have = p.n; }
    });
    if (m.events_from === 0) events = []; 
    if (m.events_from > events.length) lost = true; else events = [...events.slice(0, m.events_from), ...m.events];
    samples = [...(m.fresh ? [] : samples), ...m.samples].slice(-8);
    if (lost || runs.some(r => r && r.cols[0].length > 20000)) { kit.ask("sync"); return; }
    now = m.now;
    E.set(events); if (m.fresh || m.samples.length) T.set(samples);
    paint(kit.view()); later();
  }
  return { paint, message, keys: { ...B.keys, ...T.keys }, theme: () => charts.forEach(c => c.chart.redraw()), destroy() { document.removeEventListener("visibilitychange", later); for (const c of charts) c.chart.destroy(); } };
});
