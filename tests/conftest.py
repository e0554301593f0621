"""What tests of the whole house share."""
import base64, functools, hashlib, http.server, itertools, multiprocessing, os, pwd, shutil, socket, subprocess, tarfile, tempfile, threading, time
from pathlib import Path
import pytest, torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome')
QUIET = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
         '--disable-default-apps --disable-sync --disable-domain-reliability --metrics-recording-only').split()

settings.register_profile('house', deadline=None, derandomize=True, max_examples=60)
settings.load_profile('house')

def lacking(line):
    "Skip a test with a line that says why; under CI, where nothing may be lacking, fail it."
    (pytest.fail if os.environ.get('CI')=='true' else pytest.skip)(line)

class Recorder(torch.optim.SGD):
    "Plain gradient descent that keeps each gradient."
    def __init__(self, model, lr):
        self.model, self.grads = model, []
        super().__init__(model.parameters(), lr)
    def step(self, closure=None):
        self.grads.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.model.parameters()]).clone())
        return super().step()

@pytest.fixture(scope='session')
def need():
    "`need(command, ..., why=...)` gives the path of the first command that is here, or skips the test."
    def f(*commands, why):
        for c in commands:
            if path := shutil.which(c): return path
        lacking(f'{commands[0]} is not here: {why}')
    return f

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def postgres():
    """`postgres()` gives the address of an empty schema on a PostgreSQL server that lives as long as the tests.

    Its language is English on purpose: a text that is sorted by code point must be so here too. A server refuses to be root's, so root gives it to somebody else."""
    found = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'), key=lambda f: int(f.parts[-3])) or [Path(f) for f in [shutil.which('initdb')] if f]
    if not found: lacking('PostgreSQL is not here: `make system` installs it on Debian and Ubuntu')
    bin, as_user = found[-1].resolve().parent, {}
    with tempfile.TemporaryDirectory() as tmp, socket.socket() as free:
        if os.geteuid() == 0:
            names = {u.pw_name:u for u in pwd.getpwall()}
            u = names.get('postgres') or names['nobody']
            os.chown(tmp, u.pw_uid, u.pw_gid)
            as_user = dict(user=u.pw_uid, group=u.pw_gid, extra_groups=[])
        def call(*args): subprocess.run([*map(str, args)], cwd=tmp, check=True, stdout=subprocess.DEVNULL, **as_user)
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
        free.close()
        call(bin/'initdb', '-D', f'{tmp}/d', '-U', 'test', '-A', 'trust', '-E', 'UTF8', '--locale=C', '--locale-provider=icu', '--icu-locale=en-US', '--no-sync')
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -c full_page_writes=off"
        call(bin/'pg_ctl', '-D', f'{tmp}/d', '-w', '-l', f'{tmp}/log', '-o', options, 'start')
        try:
            import psycopg
            count = itertools.count()
            def fresh():
                name = f's{next(count)}'
                with psycopg.connect(f'host=127.0.0.1 port={port} user=test dbname=postgres') as c: c.execute(f'CREATE SCHEMA {name}')
                return f'postgresql://test@127.0.0.1:{port}/postgres?options=-csearch_path%3D{name}'
            yield fresh
        finally: call(bin/'pg_ctl', '-D', f'{tmp}/d', '-m', 'immediate', 'stop')

@pytest.fixture(params=['sqlite', 'postgresql'])
def database(request, tmp_path):
    "The address of an empty database of each kind."
    return f'sqlite:///{tmp_path}/store.db' if request.param == 'sqlite' else request.getfixturevalue('postgres')()

@pytest.fixture(scope='session')
def site():
    "The folder of the built site, if it is newer than what it is built from."
    index = ROOT/'_site'/'index.html'
    if not index.exists(): lacking('the site is not built: run `make docs`')
    sources = [*(ROOT/'nbs').rglob('*.ipynb'), *(ROOT/'tools').glob('*.*'), ROOT/'mkdocs.yml', ROOT/'nbs'/'sidebar.yml']
    late = [f.name for f in sources if '.ipynb_checkpoints' not in f.parts and f.stat().st_mtime > index.stat().st_mtime]
    if late: lacking(f'the site is older than {", ".join(late[:5])}: run `make docs`')
    return index.parent

class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and says nothing."
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def served(site):
    "The address of the site on this machine's loopback."
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as s:
        th = threading.Thread(target=s.serve_forever)
        th.start()
        yield f'http://127.0.0.1:{s.server_port}/'
        s.shutdown()
        th.join()

@pytest.fixture(scope='module')  # while it is open playwright keeps an event loop in this thread, and other modules want asyncio.run
def chromium(need):
    "A headless browser."
    from playwright.sync_api import sync_playwright
    path = need(*BROWSERS, why='`make system` installs it on Debian and Ubuntu')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=QUIET)
        yield b
        b.close()

@pytest.fixture(scope='session')
def forks():
    "`forks(f, *args, seconds=None)` runs a function in a process of its own, kills it after some seconds, and gives (exit code, seconds it took)."
    ctx = multiprocessing.get_context('forkserver')  # its processes start with everything imported, and without the threads of this one
    ctx.set_forkserver_preload(['stateset_nb.flywheel', 'transformers.models.qwen3.modeling_qwen3'])
    def f(work, *args, seconds=None):
        p = ctx.Process(target=work, args=args)
        began = time.monotonic()
        p.start()
        p.join(120 if seconds is None else seconds)
        if p.is_alive(): p.kill(); p.join(60)
        return p.exitcode, time.monotonic()-began
    return f

@pytest.fixture(scope='session')
def npm_package(need):
    """`npm_package(name, version, sha512, folder)` gives a folder of a published package, fetched once into the user's cache.
    Whatever version the registry offers, only the tarball with that checksum is unpacked; workers that fetch at the same time all end with one whole folder."""
    def f(name, version, sha512, folder):
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home()/'.cache')/'stateset-nb-tokenizers'
        place = cache/f'{name.replace("/", "-")}-{version}'
        if place.is_dir(): return place
        npm = need('npm', why=f'it brings {name}')
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix='.') as tmp:
            try: subprocess.run([npm, 'pack', '--silent', '--fetch-retries=2', '--fetch-retry-mintimeout=1000', f'{name}@{version}'], cwd=tmp, check=True, capture_output=True, timeout=120)
            except (OSError, subprocess.SubprocessError): lacking(f'npm could not fetch {name}@{version}')
            tgz, = Path(tmp).glob('*.tgz')
            if base64.b64encode(hashlib.sha512(tgz.read_bytes()).digest()).decode() != sha512: pytest.fail(f'the tarball of {name}@{version} is not the one we know')
            with tarfile.open(tgz) as t:
                for m in t.getmembers():
                    if not m.isfile() or not m.name.startswith(f'package/{folder}/') or '..' in m.name: continue
                    (Path(tmp)/m.name).parent.mkdir(parents=True, exist_ok=True)
                    (Path(tmp)/m.name).write_bytes(t.extractfile(m).read())
            try: (Path(tmp)/'package'/folder).rename(place)
            except OSError:
                if not place.is_dir(): raise  # else another worker was first, with the same bytes
        return place
    return f
