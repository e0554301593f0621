"""The widgets in a real JupyterLab, by a real browser: what a person does, from the first round or label to the saved notebook."""
import os, time
from pathlib import Path
import pytest
from lab_host import Lab, ask, begin, ready, run_all, save
from page_host import PAYLOADS

SHOTS = os.environ.get('WIDGET_SHOTS')  # a folder for pictures, to be looked at
SLOW = '''import math, time
from stateset_nb.core import run_sync
from stateset_nb.trainers import TrainingRun
from stateset_nb.widgets import *
run = TrainingRun()
def fit(n=10**6):
    if run.state == 'ready': run.start()
    for i in range(w.history.step, n):
        run_sync(run.gate(i)); run.take_requests()
        if run.state == 'stopped': return
        end = time.perf_counter() + .02
        while time.perf_counter() < end: pass      # a step that holds the processor
        w.history.on_log(i + 1, {'reward': math.tanh(i / 50), 'reward_std': .1, 'kl': i / 1000, 'learning_rate': w.history.knobs.get('learning_rate', 1e-4)})
    run._to('done')
w = TrainingWidget(run, fit, total=10**6, knobs={'learning_rate': 1e-4})'''
REAL = '''import os; os.environ['TOKENIZERS_PARALLELISM'] = 'false'
from stateset_nb import (Agent, AgentConfig, ConversationEnvironment, PolicyBackend, Scenario, SingleTurnGRPOTrainer, TrainingConfig, demo_conversations,
                         last_checkpoint, reward_function, tiny_policy, watch_training)
policy = tiny_policy(demo_conversations(), seed=0)
@reward_function
def brief(turns, context=None) -> float:
    "Short answers are good."
    return max(0., 1 - len(turns[-1].text) / 120)
async def evaluate(agent): return {'success': .5}
desk = ConversationEnvironment([Scenario(c.id, c.messages[:1]) for c in demo_conversations()])
trainer = SingleTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(policy)), desk, brief, TrainingConfig(num_episodes=100000, prompts_per_step=2, num_generations=4, max_completion_length=16, temperature=2., learning_rate=1e-4),
                                output_dir='run', evaluate=evaluate)
w = watch_training(trainer)'''

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    try: import jupyterlab
    except ImportError: pytest.fail("jupyterlab is not here: pip install -e '.[widgets]'")
    assert jupyterlab.__version__ >= '4'
    with Lab(tmp_path_factory.mktemp('lab')) as s: yield s

@pytest.fixture
def book(lab, chromium, request):
    "`book(cell, ...)` opens a new notebook, runs it and gives the page; nothing but this machine may be asked for anything."
    context, refused = chromium.new_context(viewport={'width': 1300, 'height': 1000}), []
    def guard(route):
        u = route.request.url
        if '://127.0.0.1' in u or u.startswith(('data:', 'blob:')): route.continue_()
        else: refused.append(u); route.abort()
    context.route('**/*', guard)
    page = context.new_page()
    page.name = f'{request.node.name}.ipynb'
    def go(*cells, wait=True):
        lab.write(page.name, *cells)
        lab.open(page, page.name)
        run_all(page) if wait else page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        return page
    yield go
    if SHOTS and page.url.startswith('http'): page.screenshot(path=Path(SHOTS)/f'{request.node.name}.png')
    context.close()
    lab.end_kernels()
    assert not refused, 'a widget fetched something'

def data(page, seconds=30, **want):
    "Wait until the widget says so; a number is a least value."
    page.wait_for_function('''want => { const e = document.querySelector('.snb'); return e && Object.entries(want).every(([k, v]) => typeof v === 'number' ? +e.dataset[k] >= v : (e.dataset[k] ?? '').startsWith(v)) }''', arg=want, timeout=seconds * 1000)

def shot(page, name):
    if SHOTS: page.locator('.snb, .snb-record').first.screenshot(path=Path(SHOTS)/f'{name}.png')

def press(page, act): page.locator(f'[data-act={act}]').click()

def theme(page, name): page.evaluate("async name => { await window.jupyterapp.commands.execute('apputils:change-theme', {theme: name}) }", name)

def test_a_real_training_is_led_by_hand(book, lab):
    "Start, pause, ask for a checkpoint and an evaluation in the pause, turn a knob, go on, stop; then the record stands in the saved notebook."
    page = book(REAL, 'w')
    data(page, state='ready')
    press(page, 'start'); data(page, 60, state='running', drawn=3, samples=1)
    page.locator('.snb').focus(); page.keyboard.press('p'); data(page, state='paused')
    page.wait_for_function("document.querySelectorAll('.jp-Cell').length === 2")
    press(page, 'checkpoint'); press(page, 'evaluate')
    page.wait_for_function("['saved checkpoint', 'eval/success 0.5'].every(t => document.querySelector('.snb-events').textContent.includes(t))")
    at = int(ask(page, 'print(trainer.step)'))
    assert (lab.books/'run'/f'checkpoint-{at}'/'trainer.json').is_file() and ask(page, 'print(trainer.step)') == str(at)
    field = page.locator('input[name=learning_rate]')
    field.fill('3e-4'); field.press('Enter'); page.keyboard.press('Escape')
    page.wait_for_function("document.querySelector('.snb-wait').textContent !== ''")
    press(page, 'resume'); data(page, state='running', step=at + 3)
    assert ask(page, "print(trainer.settings.learning_rate, w.history.table.columns['knobs/learning_rate'][trainer.run.turned[0][0]], trainer.run.turned)") == f"0.0003 0.0003 [({at}, 'learning_rate', 0.0003)]"
    shot(page, 'real_light')
    theme(page, 'JupyterLab Dark'); page.wait_for_function("document.body.dataset.jpThemeLight === 'false'"); shot(page, 'real_dark')
    press(page, 'stop'); data(page, state='stopped')
    ask(page, 'w.freeze()'); page.wait_for_selector('.snb-record'); assert page.locator('.snb').count() == 0
    shot(page, 'record_dark'); theme(page, 'JupyterLab Light')
    save(page)
    out, = lab.saved(page.name)['cells'][1]['outputs']
    assert set(out['data']) == {'text/html', 'text/plain'} and 'learning_rate = 0.0003' in ''.join(out['data']['text/html'])
    assert int(ask(page, 'print(trainer.step)')) >= at + 3 and 'checkpoint-' in ask(page, 'print(last_checkpoint("run"))')

def test_the_notebook_stays_free_and_a_reload_finds_the_run(book, lab):
    "While a step that holds the processor runs, cells run and the page is reloaded; the run goes on, and its history is whole. At the end stands the record."
    page = book(SLOW, 'w')
    press(page, 'start'); data(page, state='running', step=5)
    began = time.monotonic()
    assert ask(page, 'print(6 * 7)') == '42' and time.monotonic() - began < 5
    save(page)
    page.reload(wait_until='domcontentloaded'); ready(page)
    data(page, 60, state='running', drawn=10)
    field = page.locator('input[name=learning_rate]')
    field.fill('-1'); field.press('Enter'); page.wait_for_function("document.querySelector('.snb-note').textContent.includes('above 0')")
    page.keyboard.press('Escape'); page.keyboard.press('x'); data(page, state='stopped')
    page.wait_for_function("(d => d.drawn === d.step)(document.querySelector('.snb').dataset)")  # the curves begin at the first round
    assert ask(page, 'print(run.state, w.history.step == len(w.history.table.steps))') == 'stopped True'
    ask(page, 'import functools; w._worker.fit = functools.partial(fit, w.history.step + 20)')
    press(page, 'start'); data(page, state='done')
    page.evaluate("async () => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1; await window.jupyterapp.commands.execute('notebook:run-cell') }")
    page.wait_for_selector('.snb-record'); save(page)
    out, = lab.saved(page.name)['cells'][1]['outputs']
    assert set(out['data']) == {'text/html', 'text/plain'} and 'done' in ''.join(out['data']['text/html']), 'what is done leaves its record'
    shot(page, 'record_light')

def test_a_cell_that_blocks_the_kernel_is_steered_and_stopped(book):
    "The widget is shown by one cell and the next one trains: the page's first words come when the kernel is busy already. Then once more, when they have met."
    page = book(SLOW, 'w', 'import threading; threading.Timer(60, run.stop).start(); fit()', wait=False)
    data(page, 40, thread='subshell', drawn=10, state='running')
    press(page, 'pause'); data(page, state='paused')
    field = page.locator('input[name=learning_rate]')
    field.fill('2e-4'); field.press('Enter')
    page.wait_for_function("document.querySelector('.snb-wait').textContent !== ''")
    press(page, 'resume'); data(page, state='running')
    page.wait_for_function("document.querySelector('.snb-events').textContent.includes('learning_rate = 0.0002')")
    press(page, 'stop'); data(page, 10, state='stopped')
    assert page.locator('.snb-late').is_hidden() and ask(page, 'print(run.state)') == 'stopped'
    at = int(page.locator('.snb').get_attribute('data-step'))
    begin(page, 'run.start(); fit()'); data(page, state='running', step=at + 5)
    assert page.evaluate('window.__over') is None, 'the cell is at it'
    press(page, 'stop'); data(page, 10, state='stopped')
    page.wait_for_function('window.__over', timeout=10_000)
    ask(page, 'run.start(); fit(w.history.step + 3)')
    page.wait_for_selector('.snb-record'); assert page.locator('.snb').count() == 0, 'what is done leaves its record by itself'

LABELS = """from stateset_nb.core import Message, TrainingExample
from stateset_nb.labelling import LabelQueue, fill_queue, standing_labels
from stateset_nb.store import TrainingStore
from stateset_nb.widgets import LabelWidget
store = TrainingStore('sqlite:///labels.db')
ones = [TrainingExample(f'e{i:02}', (Message('user', f'Where is parcel {i}?'),), Message('assistant', f'It left our store on day {i}, and should be with you in two days.')) for i in range(14)]
two = (TrainingExample('p1', (Message('user', 'May I send it back?'),), Message('assistant', 'Yes, within 30 days. The label is in your parcel.')), TrainingExample('p2', (Message('user', 'May I send it back?'),), Message('assistant', 'Returns are possible.')))
store.add_many([*ones, *two])
queue = LabelQueue(store, 'shop', 'ann')
fill_queue(queue, [*ones, two], audit=0, twice=0)
w = LabelWidget(queue)"""

def test_ten_labels_by_keyboard_are_in_the_database(book, lab):
    "Ten items by keyboard; a reload, a kernel restart and a cell that blocks lose nothing; at the end stands the record."
    from stateset_nb.labelling import LabelQueue, standing_labels
    from stateset_nb.store import TrainingStore
    page = book(LABELS, 'w')
    data(page, item='e00', thread='subshell', waiting='0')
    page.locator('.snb').click(position={'x': 5, 'y': 5})
    for i in range(10):
        data(page, item=f'e{i:02}')
        for k in (str(1 + i % 5), str(1 + i % 3)): page.keyboard.press(k)
        if i == 3:
            page.keyboard.press('c'); page.keyboard.type('bx dd <b>'); page.keyboard.press('Control+Enter')
        else: page.keyboard.press('Enter')
    data(page, done='10', pending='0', item='e10')
    page.wait_for_selector('.snb-seen:visible'); shot(page, 'labels')
    assert page.locator('.jp-Notebook .jp-Cell').count() == 2, 'no key reached the notebook'
    with TrainingStore(f'sqlite:///{lab.books}/labels.db') as store:
        found = standing_labels(LabelQueue(store, 'shop', 'ann'))
        assert [(e.item_id, e.label.rating, e.label.aspects) for e in found] == [(f'e{i:02}', 1 + i % 5, {'tool_selection': 1 + i % 3}) for i in range(10)] and found[3].label.comment == 'bx dd <b>'
        save(page); page.reload(wait_until='domcontentloaded'); ready(page)
        data(page, 60, item='e10', done='10', waiting='0', thread='subshell')
        page.locator('.snb').focus(); page.keyboard.press('4'); page.keyboard.press('Enter'); data(page, done='11', item='e11', pending='0')
        begin(page, "import time\nfor _ in range(3000): time.sleep(.02)")   # a minute
        page.locator('.snb').focus(); page.keyboard.press('2'); page.keyboard.press('Enter'); data(page, 10, done='12', item='e12', pending='0')
        assert page.evaluate('window.__over') is None, 'the cell is at it'
        assert len(standing_labels(LabelQueue(store, 'shop', 'ann'))) == 12
        page.evaluate("async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext; await s.session.kernel.restart() }"); ready(page)
        page.locator('.snb').focus(); page.keyboard.press('1'); page.keyboard.press('Enter'); page.keyboard.press('s')   # nobody is there to take them
        run_all(page)
        data(page, 60, item='p1', done='13', pending='0')
        page.locator('.snb').focus(); page.keyboard.press('u'); data(page, item='e13', pending='0'); page.keyboard.press('u'); data(page, item='e12', done='12', pending='0')
        page.wait_for_function("document.querySelector('[data-choice=rating-1]').getAttribute('aria-checked') === 'true'")
        for k in ('Enter', '3', 'Enter'): page.keyboard.press(k)
        data(page, done='14', pending='0'); assert page.locator('.snb-responses.two .snb-response').count() == 2
        page.keyboard.press('ArrowLeft'); shot(page, 'labels_pair'); page.keyboard.press('Enter'); data(page, done='15', left='0')
        assert len(standing_labels(LabelQueue(store, 'shop', 'ann'))) == 15
    ask(page, 'w.freeze()'); page.wait_for_selector('.snb-record'); shot(page, 'labels_record'); save(page)
    out, = lab.saved(page.name)['cells'][1]['outputs']
    assert set(out['data']) == {'text/html', 'text/plain'} and '15 done' in ''.join(out['data']['text/html'])

WATCH = LABELS + """
from stateset_nb.monitoring import AdvancedDashboard, AlertManager, AlertRule
from stateset_nb.widgets import DashboardWidget
alerts = AlertManager(); alerts.add_rule(AlertRule('slow', 'api.latency_seconds', 5, severity='error', action='Read what was asked.'))
board = AdvancedDashboard('shop', alerts=alerts, system_metrics=True).start_monitoring()
store.add_many([TrainingExample('2', (Message('user', 'Where is my money?'),), Message('assistant', 'One moment.'))])
w = DashboardWidget(board, queue)"""

def test_from_a_live_alert_to_the_labelling_queue(book, lab):
    "Numbers come while the page looks; an alert is opened and put into the queue by keyboard; the record stays."
    page = book(WATCH, 'w')
    page.wait_for_function("document.querySelectorAll('.snb-gauge [role=meter]').length >= 2", timeout=30_000)   # nobody asked: the kernel told of the machine by itself
    ask(page, 'for e, v in enumerate((.8, 1.1, 7.5)): board.log_metric("api.latency_seconds", v, episode=e)')
    data(page, firing='1', alerts='1')
    page.locator('.snb').focus()
    for k in ('ArrowDown', 'Enter'): page.keyboard.press(k)
    data(page, open='2'); shot(page, 'dashboard')
    page.keyboard.press('q'); data(page, asked='1')
    assert ask(page, 'print([i.id for i in queue.upcoming(2)])').count("'2'") == 1 and page.locator('.jp-Notebook .jp-Cell').count() == 2
    ask(page, 'board.stop_monitoring(); w.freeze()'); page.wait_for_selector('.snb-record'); shot(page, 'dashboard_record'); save(page)
    out, = lab.saved(page.name)['cells'][1]['outputs']
    assert set(out['data']) == {'text/html', 'text/plain'} and 'slow' in ''.join(out['data']['text/html'])

EVIL = SLOW + '''
from stateset_nb.trainers import CreditView
faces, payloads = [], %r
for p in payloads:
    class Alert: name = message = severity = p
    v = CreditView((p, p), (0, 1), (0., .5))
    other = RunHistory(p); other.on_log(1, {'reward': .5})
    w = TrainingWidget(TrainingRun(), lambda: None, total=9, knobs={'learning_rate': 1.}, label=p, overlay=[other], charts=[CurveChart(p, ('reward',), p), *CHARTS])
    for k in (1, 2, 3): w.history.on_log(k, {'reward': k / 4})
    w.history.on_alert(Alert); w.history.samples.append(PlayedSample(3, p, ((.5, v), (.1, v)))); w.history.fail(RuntimeError(p))
    faces.append(w)
from stateset_nb.core import Message, ToolCall, TrainingExample
from stateset_nb.labelling import LabelQueue, fill_queue
from stateset_nb.monitoring import AdvancedDashboard, AlertManager, AlertRule
from stateset_nb.store import TrainingStore
store, board = TrainingStore('sqlite:///evil.db'), AdvancedDashboard('shop')
store.add_many([TrainingExample(f'x{k}', tuple(Message(r, p, (ToolCall(p, p),) if r == 'assistant' else ()) for p in payloads for r in ('user', 'assistant')), Message('assistant', f'{p}{k}')) for k, p in enumerate(payloads)])
queue = LabelQueue(store, 'shop', payloads[0]); fill_queue(queue, [*store.examples()], audit=0, twice=0)
for p in payloads: board.alerts.add_rule(AlertRule(p, p, 0, severity='error', action=p)); board.log_metric(p, 1., episode=1)
faces += [LabelWidget(queue), DashboardWidget(board, queue, lambda a: 'x0')]''' % (PAYLOADS,)

def test_nothing_said_runs_in_the_browser(book):
    "The table of payloads, through the live widget and through its record."
    page = book(EVIL, 'for f in faces: f.show()')
    n = len(PAYLOADS)
    page.wait_for_function(f"document.querySelectorAll('.snb[data-drawn=\"3\"][data-samples=\"1\"]').length === {n}", timeout=60_000)
    page.wait_for_selector('.snb-monitor[data-alerts="%d"]' % n); page.wait_for_selector('.snb-label[data-left="%d"]' % n)
    page.locator('.snb-alerts li').first.click(); page.wait_for_selector('.snb-monitor[data-open=x0]')
    styled = "([one, display]) => getComputedStyle(document.querySelector(one)).display === display"   # each kind keeps its own style beside the others
    assert all(page.evaluate(styled, x) for x in (['.snb-train .snb-below', 'flex'], ['.snb-label .snb-row', 'flex'], ['.snb-monitor .snb-below', 'grid']))
    for kind in ('train', 'label', 'monitor'):
        said = ' '.join(page.locator(f'.snb-{kind}').all_text_contents()); assert all(p in said for p in PAYLOADS)
    page.locator('.snb-label').focus()
    for k in ('3', 'c', '<', 'i', 'Control+Enter'): page.keyboard.press(k)
    page.wait_for_selector('.snb-label[data-done="1"]')
    assert page.locator('.snb :is(img, script, iframe, a, details, style)').count() == 0
    ask(page, 'for f in faces: f.freeze()')
    page.wait_for_function(f"document.querySelectorAll('.snb-record').length === {n + 2}", timeout=30_000)
    assert page.locator('.snb-record :is(img, script, iframe, a, details, style)').count() == 0
    page.evaluate('() => new Promise(r => setTimeout(r, 100))')
    assert page.evaluate('window.__pwn') is None
