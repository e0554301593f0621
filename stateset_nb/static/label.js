// The label widget: a talk, one response to rate or two to choose from, words, and what was said so far. Every act is kept here until the database has it.
const MEMORY = (() => { try { sessionStorage.getItem("snb"); return sessionStorage; } catch { return null; } })();   // a page without an origin has none
const newId = () => `${Date.now().toString(36)}-${[...crypto.getRandomValues(new Uint8Array(9))].map(b => b.toString(16).padStart(2, "0")).join("")}`;

function talkOf(messages) {                          // plain text, whatever it holds
  return messages.map(m => h("div", { class: `snb-said ${m.role}` }, h("small", {}, m.role), m.text && h("div", {}, m.text), m.calls.map(c => h("code", {}, c))));
}

// Acts in their order: the first is sent until it is answered, also after a reload, then the next. The kernel knows an act by its event, so a second sending does no harm.
class Outbox {
  constructor(kit, answered, changed) {
    Object.assign(this, { kit, answered, changed, sent: null });
    const mine = k => k.startsWith(this.place()), kept = MEMORY ? Object.keys(MEMORY).filter(mine).map(k => JSON.parse(MEMORY[k])) : [];
    this.acts = kept.sort((a, b) => a.at - b.at);
  }
  place(act) { return `snb-label:${this.kit.view().place}:${act?.event ?? ""}`; }
  add(kind, more) {
    const act = { ...more, kind, event: newId(), at: Math.max(Date.now(), (this.acts.at(-1)?.at ?? 0) + 1) };
    this.acts.push(act); MEMORY?.setItem(this.place(act), JSON.stringify(act));
    this.next();
  }
  next() {
    const act = this.acts[0];
    this.changed();
    if (act && this.sent !== act) { this.sent = act; this.send(act, 1000 * this.kit.view().retry_s); }
  }
  send(act, wait) {
    this.timer = setTimeout(() => this.send(act, Math.min(60000, 2 * wait)), wait);
    this.kit.ask(act.kind, act).then(m => {
      if (this.acts[0] !== act) return;              // the answer to its first sending, and it was sent again
      clearTimeout(this.timer); this.acts.shift(); MEMORY?.removeItem(this.place(act));
      this.answered(act, m); this.next();
    });
  }
  has(item) { return this.acts.some(a => a.item === item); }
  destroy() { clearTimeout(this.timer); }
}

// A row of choices, of which one may be taken: `values` are [value, words, key].
function choice(name, label, values, take) {
  const all = values.map(([v, text, key]) => h("button", { role: "radio", "data-choice": `${name}-${v}`, tabindex: -1, onclick: () => take(v) }, text, key && h("kbd", {}, key)));
  const element = h("div", { class: "snb-row", role: "radiogroup", "aria-label": label }, h("span", { class: "snb-name" }, label), all);
  return { element, mark(chosen, here) {
    element.classList.toggle("here", here);
    values.forEach(([v], i) => { all[i].setAttribute("aria-checked", v === chosen); all[i].classList.toggle("on", v === chosen); });
  } };
}

const SCORES = [1, 2, 3, 4, 5];
const SIDES = [["left", "left", "1 ←"], ["right", "right", "2 →"], ["tie", "as good", "3 t"], ["both_bad", "both bad", "4 b"]];
const spoken = s => s.replaceAll("_", " ");

export default widget("label", "Label responses", kit => {
  const { root } = kit, drafts = new Map(), said = new Map();   // item -> what is being said of it; item -> the act by which it was done
  let back = null, shown = null, at = 0, rows = [], choose = null, saved = 0;
  const fill = h("div"), bar = h("div", { class: "snb-bar", role: "progressbar", "aria-label": "labelled" }, fill), count = h("span", { class: "snb-time" }), notes = h("div", { class: "snb-seen" });
  const talk = h("div", { class: "snb-conversation snb-text" }), asked = h("div", { class: "snb-responses" }), control = h("div", { class: "snb-control" });
  const words = (name, label, key) => h("textarea", { name, rows: 2, placeholder: `${label} (${key})`, "aria-label": label, oninput: e => { const d = draft(); if (d) d[name] = e.target.value; } });
  const comment = words("comment", "comment", "c"), instead = words("suggested_response", "what should have been said instead", "e"), texts = h("div", { class: "snb-words" }, comment, instead);
  const tap = (name, text, key, act, main) => h("button", { "data-act": name, class: main ? "main" : "", tabindex: -1, onclick: () => { act(); root.focus({ preventScroll: true }); } }, text, h("kbd", {}, key));
  const buttons = { label: tap("label", "Save", "Enter", () => save(), true), skip: tap("skip", "Skip", "s", () => skip()), undo: tap("undo", "Undo", "u", () => undo()) };
  const help = h("div", { class: "snb-help" }), live = h("div", { class: "snb-sr", "aria-live": "polite" });
  root.append(h("div", { class: "snb-top" }, bar, count), notes, talk, asked, control, texts, h("div", { class: "snb-buttons" }, Object.values(buttons), help), live);

  const done = id => out.has(id) || (said.get(id) ?? -1) > kit.view().acts;   // the view may be older than what we did
  const current = () => {
    const items = kit.view().items, first = back && back.acts > kit.view().acts ? [back.item] : [];
    return [...first, ...items.filter(i => i.id !== first[0]?.id)].find(i => !done(i.id)) ?? null;
  };
  const draft = () => { const i = current(); if (!i) return null; if (!drafts.has(i.id)) drafts.set(i.id, { aspects: {} }); return drafts.get(i.id); };
  const tell = text => { live.textContent = text; };
  const free = () => !out.acts.some(a => a.kind === "undo");   // until it is known what comes back

  function save() {
    const i = current(), d = draft();
    if (!i || !free()) return;
    if ((i.responses.length > 1 ? d.pick : d.rating) == null) { kit.tell(i.responses.length > 1 ? "Choose first: 1, 2, 3 or 4." : "Rate first: 1 to 5."); return; }
    const label = Object.fromEntries(Object.entries(d).filter(([k, v]) => k !== "began" && (k === "aspects" ? Object.keys(v).length : v != null && v !== "")));
    kit.tell("");
    out.add("label", { item: i.id, label, seconds: (performance.now() - d.began) / 1000 });
    tell("saved, next"); root.focus({ preventScroll: true });
  }
  function skip() { const i = current(); if (i && free()) { out.add("skip", { item: i.id }); tell("skipped"); } }
  function undo() { out.add("undo", {}); tell("taken back"); }
  function take(name, value) {
    const d = draft();
    if (!d) return;
    if (name in d || name === "rating" || name === "pick") d[name] = value; else d.aspects[name] = value;
    if (choose === null) at = Math.min(rows.length - 1, rows.findIndex(r => r.name === name) + 1);
    tell(`${spoken(name)} ${spoken(String(value))}`); mark(); root.focus({ preventScroll: true });
  }
  function answered(act, m) {
    if (!m.ok) return;                               // the kit says why, and the item with its draft comes back
    root.dataset.saved = ++saved;
    if (act.item) said.set(act.item, m.acts);
    if (act.kind !== "undo") return;
    if (!m.item) { kit.tell("There is nothing to take back."); return; }
    back = { item: m.item, acts: m.acts }; said.delete(m.item.id); shown = null;
    if (m.label) drafts.set(m.item.id, { ...m.label, aspects: { ...m.label.aspects } }); else drafts.delete(m.item.id);
  }
  const out = new Outbox(kit, answered, () => paint());

  function mark() {
    const d = draft() ?? { aspects: {} };
    choose?.mark(d.pick, true);
    rows.forEach((r, k) => r.mark(k ? d.aspects[r.name] : d.rating, k === at));
    asked.querySelectorAll(".snb-response").forEach((e, k) => e.classList.toggle("on", d.pick === ["left", "right"][k]));
  }
  function show(i) {                                 // another item than before
    const two = i?.responses.length > 1, d = draft();
    if (d) d.began = performance.now();
    at = 0; rows = []; choose = null;
    talk.replaceChildren(...(i ? talkOf(i.messages) : [h("p", { class: "snb-end" }, out.acts.length ? "saving …" : "Nothing is left to label. u takes the last one back.")])); talk.scrollTop = talk.scrollHeight;
    asked.replaceChildren(...(i ? i.responses.map((r, k) => h("div", { class: "snb-response snb-text", "aria-label": two ? SIDES[k][1] : "response" }, two && h("b", {}, SIDES[k][1]), talkOf([r]))) : []));
    asked.classList.toggle("two", !!two);
    if (two) choose = choice("pick", "better", SIDES, v => take("pick", v));
    else if (i) rows = [["rating", "overall"], ...kit.view().aspects.map(a => [a, spoken(a)])].map(([name, label], k) => ({ name, ...choice(name, label, SCORES.map(n => [n, n]), v => take(name, v)) }));
    control.replaceChildren(...(two ? [choose] : rows).map(r => r.element));
    comment.value = d?.comment ?? ""; instead.value = d?.suggested_response ?? "";
    for (const e of [texts, buttons.label, buttons.skip]) e.hidden = !i;
    help.textContent = !i ? "" : two ? "1 ← left · 2 → right · 3 t as good · 4 b both bad · c comment · e better answer · Esc leaves a text, Ctrl+Enter saves from it" :
      "1–5 rate the marked row and go on · ↑ ↓ another row · c comment · e better answer · Esc leaves a text, Ctrl+Enter saves from it";
    shown = i;
  }
  function paint() {
    const v = kit.view(), p = v.progress, i = current(), waiting = out.acts.length;
    if (shown === null || i?.id !== shown?.id || !i) show(i);
    mark();
    fill.style.width = p.items ? `${100 * (p.items - p.left) / p.items}%` : "0"; bar.setAttribute("aria-valuenow", p.done); bar.setAttribute("aria-valuemax", p.done + p.left);
    count.textContent = [`${p.done} done`, p.skipped ? `${p.skipped} skipped` : "", `${p.left} left`, p.seconds == null ? "" : `${p.seconds.toFixed(1)} s each`, p.minutes_left == null ? "" : `${clock(60 * p.minutes_left)} to go`, waiting ? `saving ${waiting} …` : "saved"].filter(Boolean).join(" · ");
    notes.replaceChildren(...v.notes.map(n => h("span", { class: n.moved ? "moved" : "" }, n.text))); notes.hidden = !v.notes.length;
    Object.assign(root.dataset, { item: i?.id ?? "", done: p.done, left: p.left, pending: waiting });
  }
  const score = n => () => { if (choose) { if (n <= 4) take("pick", SIDES[n - 1][0]); } else if (rows.length) take(rows[at].name, n); };
  const pick = side => () => choose && take("pick", side), move = d => () => { at = Math.max(0, Math.min(rows.length - 1, at + d)); mark(); };
  queueMicrotask(() => out.next());                  // what a page before this one could not send
  return { paint, destroy: () => out.destroy(), keys: { ...Object.fromEntries(SCORES.map(n => [n, score(n)])), ArrowLeft: pick("left"), ArrowRight: pick("right"), t: pick("tie"), b: pick("both_bad"), ArrowUp: move(-1), ArrowDown: move(1),
    Enter: save, "Ctrl+Enter": save, s: skip, u: undo, c: () => comment.focus(), e: () => instead.focus() } };
});
