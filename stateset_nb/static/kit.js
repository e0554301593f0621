// What every widget stands on: text that is never markup, questions that are answered, keys, charts.
// Read after vendor/uPlot.iife.min.js and before the widget's own file, all as one module.
const SVG = "http://www.w3.org/2000/svg";
const h = (tag, attrs = {}, ...kids) => {            // an element; children are nodes or text, so nothing said in a conversation becomes markup
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attrs)) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v === true) e.setAttribute(k, "");
    else if (v !== false && v != null) e.setAttribute(k, v);
  }
  e.append(...kids.flat().filter(k => k != null && k !== false));
  return e;
};
const ICONS = { play: "M4 2.5v11l9-5.5z", pause: "M4 2.5h3v11H4zm5 0h3v11H9z", stop: "M3 3h10v10H3z", save: "M8 2v7m-3-3 3 3 3-3M3 13h10", measure: "M3 13V8m5 5V3m5 10V6", left: "M10 3 5 8l5 5", right: "M6 3l5 5-5 5" };
const icon = name => {
  const s = document.createElementNS(SVG, "svg"), p = document.createElementNS(SVG, "path"), line = ["save", "measure", "left", "right"].includes(name);
  s.setAttribute("viewBox", "0 0 16 16"); s.setAttribute("class", line ? "snb-icon line" : "snb-icon"); s.setAttribute("aria-hidden", "true");
  p.setAttribute("d", ICONS[name]); s.append(p);
  return s;
};
const COLOURS = ["#3178c6", "#d9822b", "#2e9e5b", "#9063cd", "#c0504d", "#5f8a8b"];
const short = x => x == null || !isFinite(x) ? "–" : x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(1).replace("e+", "e").replace(".0e", "e") : String(+x.toPrecision(3));
const clock = s => {
  if (!isFinite(s)) return "–";
  const t = Math.round(s), two = n => String(n).padStart(2, "0");
  return t >= 3600 ? `${t / 3600 | 0}:${two(t % 3600 / 60 | 0)}:${two(t % 60)}` : `${t / 60 | 0}:${two(t % 60)}`;
};
const floats = b => b == null ? new Float64Array() : new Float64Array(b.buffer.slice(b.byteOffset, b.byteOffset + b.byteLength));

// A chart of curves over one x: `lines` are {label, colour, dash, dots}, `bands` are [upper, lower] numbers of lines, `marks()` are [{x, colour}].
class Chart {
  constructor(parent, { title, unit = "", lines, bands = [], marks = () => [], height = 150, group = "snb" }) {
    this.lines = lines; this.height = height; this.shown = h("span", { class: "snb-now" });
    this.area = h("div", { class: "snb-area" });
    this.box = h("figure", { class: "snb-chart", "aria-label": title, hidden: true }, h("figcaption", {}, h("b", {}, title), unit && h("span", { class: "snb-unit" }, unit), this.shown), this.area);
    parent.append(this.box);
    const ink = () => getComputedStyle(this.box).color, grid = { stroke: "rgba(128,128,128,.22)", width: 1 };
    const axis = size => ({ stroke: ink, grid, ticks: { show: false }, size, font: "11px system-ui, sans-serif", gap: 3 });
    const draw = u => {
      const { ctx, bbox } = u;
      ctx.save(); ctx.setLineDash([4, 3]); ctx.lineWidth = devicePixelRatio;
      for (const m of marks()) {
        const x = u.valToPos(m.x, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.strokeStyle = m.colour; ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      }
      ctx.restore();
    };
    this.options = { height, legend: { show: false }, cursor: { sync: { key: group }, points: { size: 5 }, drag: { x: true, y: false } }, scales: { x: { time: false }, y: { range: (u, lo, hi) => lo == null ? [0, 1] : lo === hi ? [lo - (Math.abs(lo) || 1) / 2, hi + (Math.abs(hi) || 1) / 2] : uPlot.rangeNum(lo, hi, 0.1, true) } }, padding: [6, 6, 0, 0],
      axes: [{ ...axis(22), space: 42 }, { ...axis(44), space: 26, values: (u, v) => v.map(short) }],
      bands: bands.map(b => ({ series: [b[0] + 1, b[1] + 1], fill: lines[b[0]].colour + "2e" })),
      series: [{}, ...lines.map(l => ({ stroke: l.hidden ? "transparent" : l.colour, width: l.hidden ? 0 : 1.6, dash: l.dash, spanGaps: true, points: { show: !!l.dots, size: 5, fill: l.colour } }))],
      hooks: { draw: [draw], setCursor: [u => this.say(u.cursor.idx)] } };
    this.watch = new ResizeObserver(() => this.plot && this.plot.width !== this.width() && this.plot.setSize({ width: this.width(), height }));
    this.watch.observe(this.area);
  }
  width() { return Math.max(160, Math.floor(this.area.clientWidth)); }
  set(data) {                                        // [x, y of line 0, y of line 1, ...]
    this.box.hidden = !data.slice(1).some((c, i) => !this.lines[i].hidden && c.some(v => v != null));
    if (this.box.hidden) return;
    this.data = data;
    if (this.plot) this.plot.setData(data); else this.plot = new uPlot({ ...this.options, width: this.width() }, data, this.area);
    this.say(this.plot.cursor.idx);
  }
  say(at) {                                          // the values under the cursor, or the newest
    if (!this.data) return;
    const value = c => at != null ? c[at] : c.findLast(v => v != null), x = at != null ? this.data[0][at] : null;
    this.shown.replaceChildren(...this.lines.flatMap((l, i) => l.hidden || l.dots && value(this.data[i + 1]) == null ? [] : [h("span", { style: `color:${l.colour}` }, (l.dots ? `${l.label.split("/")[0]} ` : "") + short(value(this.data[i + 1]))), " "]), x != null ? `at ${short(x)}` : "");
  }
  redraw() { if (this.plot) this.plot.redraw(false); }
  destroy() { this.watch.disconnect(); if (this.plot) this.plot.destroy(); this.box.remove(); }
}

// A widget: `build(kit)` fills kit.root and gives {paint(view), message(m, buffers), keys: {key: act}, theme(), destroy()}, each optional.
// kit: root, view(), ask(kind, {…}) -> promise of the answer, tell(text, bad), busy().
const widget = (name, label, build) => ({ render({ model, el }) {
  const off = new AbortController(), { signal } = off, me = Math.random().toString(36).slice(2, 8), waits = new Map();
  const note = h("div", { class: "snb-note", role: "status", hidden: true }), late = h("div", { class: "snb-late", hidden: true }, "The kernel is busy with a cell: this acts when it has time.");
  const root = h("div", { class: `snb snb-${name}`, tabindex: 0, role: "group", "aria-label": label, "data-widget": name, "data-lm-suppress-shortcuts": "true", "data-acks": 0, "data-waiting": 0 });
  let n = 0, wait = null, synced = false;
  const tell = (text, bad = false) => { note.textContent = text; note.hidden = !text; note.classList.toggle("bad", bad); };
  const ask = (kind, more = {}) => new Promise(done => {
    const cid = `${me}-${++n}`;
    waits.set(cid, { done, kind, event: more.event, began: performance.now() }); root.dataset.waiting = waits.size;
    wait ??= setTimeout(() => { late.hidden = false; }, 1500);
    model.send({ ...more, kind, cid });
  });
  const answered = m => {
    const w = waits.get(m.cid);
    if (!w) return;                                  // another view of this widget asked
    const greeting = k => k === "hello" || k === "sync";
    for (const [c, o] of waits) if (c === m.cid || greeting(m.of) && greeting(o.kind) || w.event && o.event === w.event) waits.delete(c);   // one greeting answered is enough: the first may lie behind a busy cell; so is one sending of an act
    Object.assign(root.dataset, { rtt: (performance.now() - w.began).toFixed(1), thread: m.thread ?? "", acks: +root.dataset.acks + 1, waiting: waits.size });
    if (!waits.size) { clearTimeout(wait); wait = null; late.hidden = true; }
    if (m.of === "sync") synced = true;
    if (!m.ok) tell(m.error, true); else if (!greeting(m.of)) tell("");
    w.done(m);
  };
  const kit = { root, tell, ask, view: () => model.get("view"), busy: () => waits.size > 0 };
  const face = build(kit);
  root.append(late, note); el.append(root);
  const heard = (m, buffers) => m.kind === "ack" ? answered(m) : face.message?.(m, buffers ?? []), changed = () => face.paint?.(kit.view());
  model.on("msg:custom", heard); model.on("change:view", changed);
  root.addEventListener("keydown", ev => {
    if (ev.isComposing || ev.metaKey || ev.altKey || ev.key === "Tab") return;
    ev.stopPropagation();                            // for hosts that listen in the bubble phase; Lumino heeds the data attribute
    const typing = ev.target.matches("textarea, select, input:not([type=range])");
    if (ev.key === "Escape") { root.focus({ preventScroll: true }); ev.preventDefault(); return; }
    if (!typing && !ev.ctrlKey && ev.target.matches("button, summary, input") && [" ", "Enter", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(ev.key)) return;
    const act = face.keys?.[(ev.ctrlKey ? "Ctrl+" : "") + ev.key];
    if (!act || (typing && !ev.ctrlKey)) return;
    ev.preventDefault(); act(ev);
  }, { signal });
  root.addEventListener("mousedown", ev => {         // a click anywhere gives the widget the keys
    if (ev.target.closest("textarea, input, select, summary, button, .u-over, .snb-text")) return;
    ev.preventDefault(); root.focus({ preventScroll: true });
  }, { signal });
  const themed = new MutationObserver(() => face.theme?.());
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class", "data-theme"] });
  changed(); ask("sync");
  let tries = 0;                                     // until the kernel answers from a thread of its own for this widget: the page's first words still go to the cells'
  const hello = setInterval(() => { if (synced && root.dataset.thread.startsWith("subshell") || ++tries > (synced ? 5 : 15)) clearInterval(hello); else ask(synced ? "hello" : "sync"); }, 400);
  return () => { clearInterval(hello); clearTimeout(wait); off.abort(); themed.disconnect(); model.off("msg:custom", heard); model.off("change:view", changed); face.destroy?.(); root.remove(); };
} });
