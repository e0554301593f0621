"""What the widgets cost, in a real JupyterLab with a real browser.

    python benchmarks/widgets.py            # about three minutes; needs JupyterLab, Playwright and Chromium
    python benchmarks/widgets.py --quick    # does it run at all?

*Live chart*: CPU time of the kernel's process while a run with 10,000 rounds on the page grows by ten rounds ten times a second, less the same run without a
widget, as a share of one core; the two are interleaved. *Stop*: a training blocks the cell it runs in, with a step that holds the processor all the time; from
the click to the kernel's answer as the page sees it, and to the end of the cell. *Label*: from the keydown that saves to the page's knowledge that the label is
committed to SQLite, with a person's pause in between. Results: benchmarks/results/widgets.{json,md}.
"""
import argparse, json, os, platform, statistics, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / 'tests'))
from conftest import BROWSERS, QUIET  # noqa: E402
from lab_host import Lab, ask, begin, run_all  # noqa: E402
from stateset_nb.core import write_text  # noqa: E402

SETUP = '''import math, os, resource, threading, time
from stateset_nb.core import run_sync
from stateset_nb.trainers import TrainingRun
from stateset_nb.widgets import TrainingWidget
KEYS = ('reward', 'reward_std', 'loss', 'kl', 'entropy', 'completions/mean_length', 'success')
def row(i): return {k: math.sin(i / (50 + 9 * j)) for j, k in enumerate(KEYS)}
def cpu(): u = resource.getrusage(resource.RUSAGE_SELF); return u.ru_utime + u.ru_stime
def grow(h, seconds):
    "CPU seconds of this process while ten rounds come ten times a second."
    i, began, used = h.step, time.monotonic(), cpu()
    for k in range(round(10 * seconds)):
        for _ in range(10): i += 1; h.on_log(i, row(i))
        time.sleep(max(0, began + (k + 1) / 10 - time.monotonic()))
    return (cpu() - used) / (time.monotonic() - began)
run = TrainingRun()
def fit():
    run.start()
    i = w.history.step
    while True:
        run_sync(run.gate(i))
        if run.state == 'stopped': return
        end = time.perf_counter() + STEP
        while time.perf_counter() < end: pass
        i += 1; w.history.on_log(i, row(i))
w = TrainingWidget(run, total=10**6, knobs={'learning_rate': 1e-4}); bare = TrainingWidget(TrainingRun())
for i in range(POINTS):
    w.history.on_log(i + 1, row(i)); bare.history.on_log(i + 1, row(i))'''

LABELS = '''from stateset_nb.core import Message, TrainingExample
from stateset_nb.labelling import LabelQueue, fill_queue
from stateset_nb.store import TrainingStore
from stateset_nb.widgets import LabelWidget
store = TrainingStore('sqlite:///labels.db')
store.add_many([TrainingExample(f'e{i:05}', (Message('user', f'Where is parcel {i}? ' * 20),), Message('assistant', f'It is on its way since day {i}. ' * 20)) for i in range(ITEMS)])
queue = LabelQueue(store, 'bench', 'ann')
fill_queue(queue, [*store.examples()], audit=0, twice=0)
w = LabelWidget(queue)'''

def seen(page, **want): page.wait_for_function("want => { const e = document.querySelector('.snb'); return e && Object.entries(want).every(([k, v]) => (e.dataset[k] ?? '').startsWith(v)) }", arg=want, timeout=60_000)

def live_chart(page, points, seconds, repeats):
    "Shares of a core: with the widget on the page, and without."
    page.wait_for_function("+document.querySelector('.snb')?.dataset.drawn >= POINTS".replace('POINTS', str(points)), timeout=60_000)
    return [{'with': float(ask(page, f'print(grow(w.history, {seconds}))')), 'without': float(ask(page, f'print(grow(bare.history, {seconds}))'))} for _ in range(repeats)]

def stops(page, repeats):
    "Seconds from the click to the answer, and to the end of the cell."
    out = []
    for _ in range(repeats):
        seen(page, thread='subshell')
        page.evaluate('window.__over = undefined')
        step = int(page.get_attribute('.snb', 'data-step'))
        begin(page, 'fit()')
        page.wait_for_function("n => document.querySelector('.snb').dataset.state === 'running' && +document.querySelector('.snb').dataset.step > n", arg=step, timeout=60_000)
        out.append(page.evaluate("""() => new Promise(done => { const r = document.querySelector('.snb'), began = performance.now(), acks = +r.dataset.acks; let ack = null;
            const look = () => { const now = (performance.now() - began) / 1000; if (ack === null && +r.dataset.acks > acks) ack = now;
                if (ack !== null && window.__over) done({acknowledged: ack, cell_over: now}); else setTimeout(look, 2) };
            r.querySelector('[data-act=stop]').click(); look() })"""))
    return out

def keypresses(page, n, pause):
    "Milliseconds from the key that saves to the page's knowledge that the label is committed."
    seen(page, thread='subshell', item='e')
    page.evaluate("""() => { const root = document.querySelector('.snb'); window.took = []; let began = null, at = root.dataset.saved;
        document.addEventListener('keydown', e => { if (e.key === 'Enter') began = performance.now() }, true);
        new MutationObserver(() => { if (root.dataset.saved !== at) { at = root.dataset.saved; window.took.push(performance.now() - began) } }).observe(root, {attributes: true}) }""")
    page.locator('.snb').focus()
    for i in range(n):
        page.keyboard.press(str(1 + i % 5)); page.keyboard.press('Enter')
        page.wait_for_function('n => window.took.length === n', arg=i + 1, timeout=30_000)
        page.wait_for_timeout(1000 * pause)
    assert int(ask(page, 'print(queue.progress().done)')) == n
    return page.evaluate('window.took')

def measure(a):
    from playwright.sync_api import sync_playwright
    import anywidget, ipykernel, jupyterlab, shutil
    with tempfile.TemporaryDirectory() as tmp, Lab(tmp) as lab, sync_playwright() as p:
        b = p.chromium.launch(executable_path=next(x for x in map(shutil.which, BROWSERS) if x), args=QUIET)
        page = b.new_page(viewport={'width': 1300, 'height': 1000})
        lab.write('bench.ipynb', SETUP.replace('POINTS', str(a.points)).replace('STEP', str(a.step)), 'w')
        lab.open(page, 'bench.ipynb'); run_all(page)
        chart = live_chart(page, a.points, a.seconds, a.repeats)
        stop = stops(page, a.stops)
        lab.end_kernels()
        lab.write('labels.ipynb', LABELS.replace('ITEMS', str(a.items)), 'w')
        lab.open(page, 'labels.ipynb'); run_all(page)
        took = keypresses(page, a.labels, .3)
        b.close()
    return {'schema': 1, 'points': a.points, 'updates_per_second': 10, 'chart': chart, 'kernel_share_of_core': statistics.median(c['with'] - c['without'] for c in chart), 'step_s': a.step, 'stop': stop,
            'stop_acknowledged_s': statistics.median(s['acknowledged'] for s in stop), 'stop_acknowledged_worst_s': max(s['acknowledged'] for s in stop), 'cell_over_s': statistics.median(s['cell_over'] for s in stop),
            'items': a.items, 'label_ms': [round(t, 1) for t in took], 'label_saved_ms': statistics.median(took), 'label_saved_p90_ms': sorted(took)[int(.9 * len(took))],
            'machine': {'cpu_count': os.cpu_count(), 'platform': platform.platform(), 'load_1min': round(os.getloadavg()[0], 1)}, 'date': time.strftime('%Y-%m-%d'),
            'versions': {'python': platform.python_version(), 'jupyterlab': jupyterlab.__version__, 'ipykernel': ipykernel.__version__, 'anywidget': anywidget.__version__}}

def page_of(r):
    "The results as Markdown."
    return f'''# What the widgets cost

Measured by `python benchmarks/widgets.py` on {r["date"]}: JupyterLab {r["versions"]["jupyterlab"]}, ipykernel {r["versions"]["ipykernel"]}, headless Chromium without a GPU, {r["machine"]["cpu_count"]} cores, load {r["machine"]["load_1min"]}.

| what | demand | measured |
|---|---|---|
| kernel CPU of a live chart of {r["points"]:,} points at 10 updates/s, seven curves (median of {len(r["chart"])}, less the same run without a widget) | < 5 % of a core | {100 * r["kernel_share_of_core"]:.1f} % |
| stop in a blocking cell, from click to answer (median of {len(r["stop"])}; a step of {1000 * r["step_s"]:.0f} ms holds the processor) | < 0.5 s | {r["stop_acknowledged_s"]:.3f} s (worst {r["stop_acknowledged_worst_s"]:.3f} s) |
| the same, from click to the end of the cell | next boundary | {r["cell_over_s"]:.3f} s |
| from the key that saves a label to the page's knowledge that it is committed (median of {len(r["label_ms"])}, {r["items"]:,} items in the queue, SQLite) | < 100 ms | {r["label_saved_ms"]:.0f} ms (nine in ten below {r["label_saved_p90_ms"]:.0f} ms) |
'''

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='small, into benchmarks/results/tmp')
    p.add_argument('--points', type=int, default=10_000); p.add_argument('--step', type=float, default=.05, help='seconds a step of the blocking training takes')
    p.add_argument('--seconds', type=float, default=10.); p.add_argument('--repeats', type=int, default=3); p.add_argument('--stops', type=int, default=12)
    p.add_argument('--labels', type=int, default=60); p.add_argument('--items', type=int, default=5_000, help='in the labelling queue')
    a = p.parse_args()
    if a.quick: a.seconds, a.repeats, a.stops, a.labels, a.items = 2., 1, 2, 5, 50
    out = HERE / 'results' / ('tmp' if a.quick else '')
    r = measure(a)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'widgets.json', json.dumps(r, indent=1)); write_text(out / 'widgets.md', page_of(r))
    print(page_of(r))

if __name__ == '__main__': main()
