// The dashboard widget: what the machine does, what fires, every metric with its newest stretch, the log of alerts, and the way from an alert to a conversation and to the labelling queue.
const LINE = 96, TALL = 20;
function spark(values) {                             // the newest values as a small curve; a gap where there is none
  const s = document.createElementNS(SVG, "svg"), known = values.filter(v => v != null), lo = Math.min(...known), hi = Math.max(...known), step = LINE / Math.max(1, values.length - 1);
  s.setAttribute("viewBox", `0 0 ${LINE} ${TALL}`); s.setAttribute("class", "snb-spark"); s.setAttribute("aria-hidden", "true");
  const p = document.createElementNS(SVG, "path");
  let pen = "M";
  p.setAttribute("d", values.map((v, i) => { if (v == null) { pen = "M"; return ""; } const to = `${pen}${(i * step).toFixed(1)} ${(TALL - 2 - (TALL - 4) * (hi > lo ? (v - lo) / (hi - lo) : .5)).toFixed(1)}`; pen = "L"; return to; }).join(""));
  s.append(p);
  return s;
}
const dayTime = at => new Date(1000 * at).toLocaleTimeString([], { hour12: false });

export default widget("monitor", "Monitoring", kit => {
  const { root } = kit;
  let at = -1, open = null;
  const title = h("b"), since = h("span", { class: "snb-time" }), alarm = h("span", { class: "snb-alarm", role: "status" });
  const gauges = h("div", { class: "snb-gauges", role: "group", "aria-label": "machine" }), metrics = h("tbody"), log = h("ol", { class: "snb-alerts snb-text", "aria-label": "alerts", tabindex: -1 });
  const table = h("table", { class: "snb-metrics" }, h("thead", {}, h("tr", {}, ["metric", "", "last", "mean", "p95", "values"].map(t => h("th", {}, t)))), metrics);
  const talk = h("section", { class: "snb-about snb-text", "aria-label": "conversation", hidden: true }), help = h("div", { class: "snb-help" });
  root.append(h("div", { class: "snb-top" }, title, alarm, since), gauges, h("div", { class: "snb-below" }, h("div", { class: "snb-scroll" }, table), h("div", { class: "snb-log" }, log, help)), talk);

  const alerts = () => kit.view().alerts, linked = a => a && a.linked;
  function look(i) {                                 // the conversation of an alert
    const a = alerts()[i];
    if (!linked(a)) { if (a) kit.tell("No conversation belongs to this alert."); return; }
    kit.ask("open", { alert: a.id }).then(m => { if (m.ok) { open = { ...m.talk, alert: a.id }; show(); } });
  }
  function enqueue(id) { if (id) kit.ask("ask", { alert: id }).then(m => { if (m.ok) { kit.tell(m.said); root.dataset.asked = (+root.dataset.asked || 0) + 1; } }); }
  function show() {
    talk.hidden = !open; root.dataset.open = open?.id ?? "";
    if (!open) { talk.replaceChildren(); return; }
    const act = (name, text, key, f) => h("button", { "data-act": name, onclick: () => { f(); root.focus({ preventScroll: true }); } }, text, h("kbd", {}, key));
    const line = m => h("div", { class: `snb-said ${m.role}` }, h("small", {}, m.role), m.text && h("div", {}, m.text), m.calls.map(c => h("code", {}, c)));
    talk.replaceChildren(h("div", { class: "snb-buttons" }, h("span", { class: "snb-time" }, open.id), act("ask", "Have it labelled", "q", () => enqueue(open?.alert)), act("close", "Close", "x", close)), ...open.messages.map(line));
    talk.scrollIntoView?.({ block: "nearest" });
  }
  function close() { open = null; show(); }
  function move(d) { at = Math.max(0, Math.min(alerts().length - 1, at + d)); paint(kit.view()); log.children[at]?.scrollIntoView?.({ block: "nearest" }); }
  function row(a, i) {
    return h("li", { class: `${a.severity} ${a.state}${i === at ? " here" : ""}`, "data-alert": a.id, onclick: () => { at = i; paint(kit.view()); look(i); root.focus({ preventScroll: true }); } },
      h("span", { class: "snb-step" }, `${dayTime(a.at)}${a.step == null ? "" : ` #${a.step}`}`), " ", h("b", {}, a.state === "firing" ? a.severity : a.state), ` ${a.rule}: ${a.message}`, a.state === "firing" && a.action && h("div", { class: "snb-action" }, a.action), a.linked && h("span", { class: "snb-link" }, "conversation"));
  }
  function paint(v) {
    const chosen = alerts()[at]?.id ?? null;
    title.textContent = v.name; since.textContent = v.seconds ? `watching for ${clock(v.seconds)}` : "not started";
    alarm.textContent = v.firing ? `${v.firing} firing` : "nothing fires"; alarm.classList.toggle("bad", v.firing > 0);
    gauges.replaceChildren(...v.gauges.map(g => h("div", { class: "snb-gauge" }, h("span", {}, g.name), h("b", {}, g.text), g.share != null && h("div", { class: "snb-bar", role: "meter", "aria-label": g.name, "aria-valuenow": Math.round(100 * g.share) }, h("div", { style: `width:${Math.min(100, 100 * g.share)}%`, class: g.share > .95 ? "full" : "" })))), v.gauges.length ? h("div", { class: "snb-gpu snb-time" }, v.gpu) : "");
    metrics.replaceChildren(...v.metrics.map(m => h("tr", {}, h("th", {}, m.key), h("td", {}, spark(m.spark)), [m.last, m.mean, m.p95].map(x => h("td", {}, short(x))), h("td", {}, m.count))));
    log.replaceChildren(...v.alerts.map(row)); log.hidden = !v.alerts.length;
    help.textContent = v.alerts.length ? "↑ ↓ an alert · Enter its conversation · q have it labelled · x close" : "No alert so far.";
    Object.assign(root.dataset, { metrics: v.metrics.length, alerts: v.alerts.length, firing: v.firing, chosen: chosen ?? "" });
  }
  const ping = setInterval(() => kit.ask("hello"), 20000);   // the kernel looks only while somebody does
  return { paint: v => {                               // a new alert comes in above: stay on the one that was chosen
    const i = v.alerts.findIndex(a => a.id === root.dataset.chosen);
    if (at >= 0 && i >= 0) at = i;
    paint(v);
  }, destroy: () => clearInterval(ping), keys: { ArrowUp: () => move(-1), ArrowDown: () => move(1), Enter: () => look(at), q: () => enqueue(open ? open.alert : linked(alerts()[at]) ? alerts()[at].id : null), x: close } };
});
