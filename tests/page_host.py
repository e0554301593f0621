"""A real widget in a bare browser page: the Python object and its own script, without Jupyter, kernel or port."""
import base64, json

HARM = 'window.__pwn=1'
PAYLOADS = [f'<img src=x onerror="{HARM}">', f'<script>{HARM}</script>', f'<svg onload="{HARM}">', f'"><img src=x onerror={HARM}>', f"' onmouseover='{HARM}' autofocus onfocus='{HARM}", f'<iframe srcdoc="<script>parent.{HARM}</script>">',
            f'<a href="javascript:{HARM}">link</a>', f'<details open ontoggle="{HARM}">', f'<style>@import "javascript:{HARM}"</style>', f'</textarea></div><img src=x onerror="{HARM}">', f'<math><mtext></form><form><mglyph><style></math><img src onerror={HARM}>',
            f'[link](javascript:{HARM}) ![x](x" onerror="{HARM}) $\\href{{javascript:{HARM}}}{{x}}$']  # what a conversation may hold; none of it may run

PAGE = """<!doctype html><meta charset=utf-8><style>BODY</style><style>%s</style><body><div id=root></div><div id=root2></div><script type=module>
const dec = b => new DataView(Uint8Array.from(atob(b), c => c.charCodeAt(0)).buffer);
class Model {
  constructor(state) { this.state = state; this.heard = {}; }
  get(k) { return this.state[k]; }
  on(names, f) { for (const n of names.split(" ")) (this.heard[n] ??= []).push(f); }
  off(names, f) { for (const n of names.split(" ")) this.heard[n] = (this.heard[n] ?? []).filter(g => g !== f); }
  fire(n, ...a) { for (const f of this.heard[n] ?? []) f(...a); }
  take(out) { for (const o of out) if (o.view) { this.state.view = o.view; this.fire("change:view"); } else this.fire("msg:custom", o.msg, o.buffers.map(dec)); }
  send(m) { window.toPython(JSON.parse(JSON.stringify(m))).then(out => this.take(out)); }
}
window.boot = async (script, state) => {
  const face = (await import(URL.createObjectURL(new Blob([script], {type: "text/javascript"})))).default;
  window.model = new Model(state);
  window.mount = id => face.render({model: window.model, el: document.getElementById(id)});
  window.dispose = window.mount("root");
};
</script>"""

class PageHost:
    "`PageHost(page, widget)` shows it; `flush()` hands over what the kernel would have sent by itself."
    def __init__(self, page, widget, body='body{margin:12px;font-family:sans-serif}'):
        self.page, self.out = page, []
        self._listen(widget)
        page.expose_function('toPython', self._heard)
        page.set_content(PAGE.replace('BODY', body).replace('%s', widget.files()[1], 1))
        page.wait_for_function('() => !!window.boot')
        page.evaluate('([script, state]) => window.boot(script, state)', [widget.files()[0], {'view': json.loads(json.dumps(widget.front.view))}])

    def _listen(self, widget):
        self.widget, front = widget, widget.front
        front.send = lambda msg, buffers=None: self.out.append({'msg': msg, 'buffers': [base64.b64encode(b).decode() for b in buffers or []]})
        front.observe(lambda change: self.out.append({'view': change['new']}), 'view')

    def swap(self, widget):
        "Another widget of the same kind in its place."
        self.widget.close()
        self._listen(widget)
        self.page.evaluate('view => { window.dispose(); model.state.view = view; window.dispose = window.mount("root") }', json.loads(json.dumps(widget.front.view)))

    def _heard(self, msg):
        self.widget._heard(self.widget.front, msg, [])
        self.widget.push()
        return self._drain()

    def _drain(self):
        out, self.out = self.out, []
        return json.loads(json.dumps(out))

    def flush(self):
        self.widget.push()
        self.page.evaluate('out => window.model.take(out)', self._drain())
