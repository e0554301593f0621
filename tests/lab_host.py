"""A JupyterLab of its own on the loopback, and what a test does in it."""
import json, os, secrets, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path

SETTINGS = {'@jupyterlab/apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}, '@jupyterlab/notebook-extension/tracker': {'windowingMode': 'none'},
            '@jupyterlab/docmanager-extension/plugin': {'autosave': False}}

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Lab:
    "A server whose notebooks, settings and logs lie in one folder."
    def __init__(self, folder):
        self.folder, self.books, self.token, self.port = Path(folder), Path(folder)/'books', secrets.token_hex(16), free_port()
        self.books.mkdir()
        for k, v in SETTINGS.items():
            f = self.folder/'settings'/f'{k}.jupyterlab-settings'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(json.dumps(v))
        places = {'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_DATA_DIR': 'data', 'JUPYTER_RUNTIME_DIR': 'runtime', 'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces', 'IPYTHONDIR': 'ipython'}
        self.env = {**os.environ, **{k: str(self.folder/v) for k, v in places.items()}, 'JUPYTER_PLATFORM_DIRS': '1'}
        self.env.pop('IN_TEST', None)

    def __enter__(self):
        self.log = open(self.folder/'server.log', 'w')
        self.server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--ip=127.0.0.1', f'--port={self.port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={self.token}',
            f'--ServerApp.root_dir={self.books}', '--ServerApp.allow_root=True', '--LabApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
            '--LabApp.news_url=None', '--ServerApp.terminals_enabled=False'], stdout=self.log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        end = time.monotonic()+90
        while True:
            assert self.server.poll() is None and time.monotonic()<end, (self.folder/'server.log').read_text()[-3000:]
            try: self.api('/api/status'); return self
            except (urllib.error.URLError, ConnectionError): time.sleep(.1)

    def __exit__(self, *error):
        self.end_kernels()
        self.server.send_signal(signal.SIGTERM)
        try: self.server.wait(20)
        except subprocess.TimeoutExpired: self.server.kill(); self.server.wait()
        self.log.close()

    def api(self, path, method='GET'):
        "An answer of the server."
        r = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', method=method, headers={'Authorization': f'token {self.token}'})
        with urllib.request.urlopen(r, timeout=20) as f:
            d = f.read()
            return json.loads(d) if d else None

    def end_kernels(self):
        for s in self.api('/api/sessions'): self.api(f'/api/sessions/{s["id"]}', 'DELETE')

    def write(self, name, *cells):
        "A notebook of code cells."
        nb = {'cells': [{'cell_type': 'code', 'metadata': {}, 'source': s, 'id': f'c{i}', 'outputs': [], 'execution_count': None} for i, s in enumerate(cells)],
              'metadata': {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}, 'nbformat': 4, 'nbformat_minor': 5}
        (self.books/name).write_text(json.dumps(nb))

    def saved(self, name): return json.loads((self.books/name).read_text())

    def open(self, page, name, reset=True):
        "Show a notebook, and wait until its kernel is there."
        page.goto(f'http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}'+('&reset' if reset else ''), wait_until='domcontentloaded')
        ready(page)

KERNEL = 'window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel'

def ready(page):
    "Wait for the notebook and its kernel."
    page.wait_for_function('() => !!window.jupyterapp', timeout=60_000)
    page.evaluate('async () => { await window.jupyterapp.started; await window.jupyterapp.restored }')
    page.wait_for_selector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell', timeout=60_000)
    page.wait_for_function(f"() => {{ const k = {KERNEL}; return k && k.connectionStatus === 'connected' && k.status === 'idle' }}", timeout=60_000)

def run_all(page):
    "Run the notebook; a cell that raises fails the test."
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    wrong = page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_text_contents()
    assert not wrong, wrong[0][-1500:]

def save(page): page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")

def ask(page, code):
    "What code prints in the notebook's kernel."
    return page.evaluate("""async code => { let out = '';
        const f = %s.requestExecute({code, store_history: false});
        f.onIOPub = m => { const c = m.content; if (m.header.msg_type === 'stream') out += c.text; if (m.header.msg_type === 'error') out += c.ename + ': ' + c.evalue };
        await f.done; return out.trim() }"""%KERNEL, code)

def begin(page, code):
    "Run code in the notebook's kernel and do not wait for it."
    page.evaluate("code => { window.__cell = %s.requestExecute({code}); window.__cell.done.then(() => { window.__over = true }) }"%KERNEL, code)
