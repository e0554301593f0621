"""Watching: exact windows, alerts that do not flap, sinks that die or hang without a training noticing, files that survive a kill, trackers, webhooks, other people's trainers."""
import asyncio, copy, http.server, json, math, os, random, signal, sqlite3, subprocess, sys, threading, time
from collections import Counter
import numpy as np
import pytest, torch
from conftest import ROOT, lacking
from hypothesis import given, strategies as st
from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
from stateset_nb.core import BackendError, ConfigError, Conversation, DataError, Message, MissingDependency, Scenario
from stateset_nb.environments import ConversationEnvironment
from stateset_nb.monitoring import (DETECTORS, LABELS, Alert, AlertManager, AlertRule, AdvancedDashboard, MetricAggregator, MetricsFile, Point, SlackWebhook, SystemMetrics, TrackerProcess,
                                    _is_public, create_production_dashboard, metric_info, read_metrics)
from stateset_nb.policy import TinyConfig, tiny_policy
from stateset_nb.rewards import reward_function
from stateset_nb.trainers import SingleTurnGRPOTrainer, TrainingConfig, TrainingRun
from stateset_nb.trl_bridge import as_hf_callback, trl_trainer

numbers = st.floats(-1e9, 1e9)
anything = st.one_of(numbers, st.sampled_from([math.nan, math.inf, -math.inf]))

def until(f, what, seconds=30):
    "Poll until `f` says something true."
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if res := f(): return res
        time.sleep(.01)
    pytest.fail(f'{what} did not happen within {seconds} s')

# ---- windows

@given(st.lists(anything, min_size=1, max_size=200), st.integers(1, 50))
def test_a_window_is_exact(values, window):
    a = MetricAggregator(window)
    a.extend('x', values[:len(values)//2])
    for v in values[len(values)//2:]: a.add('x', v)
    kept = np.array(values[-window:])
    ok = kept[np.isfinite(kept)]
    s = a.stats('x')
    assert (s.count, s.bad) == (len(ok), len(kept)-len(ok))
    if len(ok):
        want = [ok.mean(), ok.std(), ok.min(), ok.max(), *np.percentile(ok, [50, 95, 99])]
        np.testing.assert_allclose([s.mean, s.std, s.min, s.max, s.p50, s.p95, s.p99], want, rtol=1e-12, atol=1e-12*max(1, np.abs(ok).max()))
    else: assert math.isnan(s.mean) and math.isnan(s.p99)

def test_a_value_may_be_anything_that_is_a_number():
    a = MetricAggregator()
    for v in (1, True, np.float32(2), torch.tensor(3.), '4'): a.add('x', v)
    assert a.values('x').tolist() == [1, 1, 2, 3, 4]
    with pytest.raises(ValueError): a.add('x', 'many')

def test_reading_while_others_write():
    a, stop = MetricAggregator(1000), threading.Event()
    def write(k):
        while not stop.is_set(): a.add('x', k)
    threads = [threading.Thread(target=write, args=(k,)) for k in range(3)]
    for t in threads: t.start()
    until(lambda: 'x' in a.series, 'the first value')
    for _ in range(300): assert a.stats('x').max <= 2
    stop.set()
    for t in threads: t.join()

# ---- alerts

rules = st.builds(lambda limit, gap, hold, rest, below: AlertRule('r', 'x', limit, 'below' if below else 'above', clear=limit+gap if below else limit-gap, for_duration=hold, cooldown=rest, unit='points'),
                  st.floats(-1, 1), st.floats(0, 1), st.integers(0, 3), st.integers(0, 6), st.booleans())

@given(rules, st.lists(st.one_of(st.floats(-3, 3), st.just(math.nan)), max_size=60))
def test_alerts_alternate_and_keep_their_distance(rule, values):
    m = AlertManager()
    for i, v in enumerate(values): m.observe('x', v, step=i)
    states = [a.state for a in m.history]
    assert states == ['firing', 'resolved']*(len(states)//2) + ['firing']*(len(states) % 2) and not states
    m.add_rule(rule)
    for i, v in enumerate(values): m.observe('x', v, step=i)
    states, at = [a.state for a in m.history], [a.step for a in m.history]
    assert states == ['firing', 'resolved']*(len(states)//2) + ['firing']*(len(states) % 2)
    sign = -1 if rule.condition == 'below' else 1
    for a in m.history: assert sign*a.value > sign*rule.threshold if a.state == 'firing' else sign*a.value <= sign*rule.clear
    for over, again in zip(at[1::2], at[2::2]): assert again-over >= rule.cooldown
    for begun in at[::2]:   # it held for so many points before; NaN says nothing
        assert begun >= rule.for_duration and all(math.isnan(v) or sign*v > sign*rule.threshold for v in values[begun-int(rule.for_duration):begun+1])
    assert bool(m.firing) == (len(states) % 2 == 1)

def test_durations_in_seconds_follow_the_clock():
    now = [0.]
    m = AlertManager(clock=lambda: now[0])
    m.add_threshold('latency', .5, '>', for_duration=30, cooldown=100)
    said = []
    for t, v in ((0, .9), (10, .9), (29, .9), (30, .9), (40, .1), (50, .9), (90, .9), (139, .9), (140, .9)):
        now[0] = t
        said += [(a.at, a.state) for a in m.observe('latency', v)]
    assert said == [(30, 'firing'), (40, 'resolved'), (140, 'firing')]

def test_labelled_series_stand_for_themselves():
    d = AdvancedDashboard()
    d.alerts.add_threshold('api.latency_seconds', 1., name='slow')
    for model, v in (('a', 2.), ('b', .1), ('a', 2.), ('b', 3.)): d.log_metric('api.latency_seconds', v, model=model)
    assert [a.metric for a in d.alerts.history] == ['api.latency_seconds{model=a}', 'api.latency_seconds{model=b}']

def test_a_failing_callback_loses_nothing(caplog):
    took, tries = [], Counter()
    def picky(alert):
        tries[alert.value] += 1
        if tries[alert.value] < 3 or alert.value == 7.: raise OSError('the mail server is away')
        took.append(alert.value)
    seen = []
    m = AlertManager([picky, seen.append])
    m.add_threshold('x', 0, clear=0, name='r')
    for v in (5., -1., 7., -2., 9.): m.observe('x', v)
    assert m.flush(20)
    assert took == [5., -1., -2., 9.] and [a.value for a in seen] == [5., -1., 7., -2., 9.] == [a.value for a in m.history]
    assert [a.value for a in m.undelivered] == [7.] and tries[7.] == 3
    assert caplog.text.count('the mail server is away') == 1
    assert m.close()

def test_a_hanging_callback_holds_nobody():
    gate, seen = threading.Event(), []
    m = AlertManager([lambda a: gate.wait(), seen.append])
    m.add_threshold('x', 0, name='r')
    began = time.monotonic()
    for v in (1., -1.)*50: m.observe('x', v)
    until(lambda: len(seen) == 100, 'the other callback')
    assert m.close(.1) is False and time.monotonic()-began < 20
    gate.set()


def test_an_async_callback_is_awaited_also_from_a_running_loop():
    seen = []
    async def page(alert):
        await asyncio.sleep(0)
        seen.append(alert.state)
    async def go():
        m = AlertManager([page])
        m.add_threshold('x', 0)
        m.observe('x', 1.)
        await asyncio.to_thread(m.close)
    asyncio.run(go())
    assert seen == ['firing']

BAD_RULES = [dict(threshold=math.nan), dict(threshold=math.inf), dict(for_duration=-1), dict(cooldown=-1), dict(window=1), dict(severity='fatal'), dict(condition='equals'), dict(unit='rounds'), dict(clear=9.), dict(colour='red')]
@pytest.mark.parametrize('bad', BAD_RULES, ids=str)
def test_a_bad_rule_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad)).split('_')[0]): AlertManager().add_threshold(**dict(metric='x', threshold=1.) | bad)

# ---- what a dashboard takes

@given(st.text(max_size=30))
def test_every_name_becomes_one_that_prometheus_holds(name):
    import re
    for training in (False, True): assert re.fullmatch('[a-zA-Z_][a-zA-Z0-9_]*', metric_info(name, training).name)

def test_series_are_bounded_and_labels_known(caplog):
    d = AdvancedDashboard(max_series=5)
    for i in range(100): d.log_metric('latency', .1, model=f'model-{i}')
    assert len(d.aggregator.series) == 5 and d.dropped_series == 95 and caplog.text.count('is dropped') == 1
    assert 'stateset_dropped_series_total 95.0' in d.metrics_text()
    with pytest.raises(ConfigError, match='what takes many values is a value'): d.log_metric('latency', .1, user='4711')
    AdvancedDashboard(label_names=[*LABELS, 'region']).log_metric('latency', .1, region='eu')

def test_a_hung_sink_is_full_soon_and_logging_goes_on(caplog):
    gate = threading.Event()
    class Hung:
        def write(self, points): gate.wait()
        def alert(self, alert): pass
        def close(self): pass
    class Book(list):
        def write(self, points): self.extend(p.value for p in points)
        def alert(self, alert): pass
        def close(self): pass
    book = Book()
    d = AdvancedDashboard(sinks={'hung': Hung(), 'book': book})
    d._couriers['hung'].capacity = 10
    for i in range(1000): d.log_metric('x', i)
    assert d.stop_monitoring(.2) is False
    s = d.get_dashboard_summary()
    assert book == list(range(1000)) and s['sinks']['hung']['dropped'] > 900 and s['metrics']['x']['count'] == 1000 and 'hangs' in caplog.text
    gate.set()

def test_evil_names_are_escaped():
    d = AdvancedDashboard('<img src=x onerror=alert(1)>')
    d.alerts.add_threshold('<script>alert(1)</script>', 0, name='<b onclick=alert(1)>', action='<svg onload=alert(1)>')
    d.log_metric('<script>alert(1)</script>', 1., model='"}\n<u>')
    page = d._repr_html_()
    assert not [t for t in ('<img', '<script', '<b onclick', '<svg', '<u>') if t in page]
    assert '\\n<u>' in d.metrics_text()
    d.print_dashboard()

def test_a_summary_is_json():
    d = create_production_dashboard(tracker=None, port=0, system_metrics=False)
    d.on_log(1, {'loss': math.nan, 'reward': 1.})
    s = json.loads(json.dumps(d.get_dashboard_summary()))
    assert s['schema'] == 1 and [a['rule'] for a in s['alerts']['firing']] == ['not_finite'] and s['metrics']['reward']['mean'] == 1.

def test_start_and_log_may_be_awaited_and_need_not_be():
    async def go():
        d = await AdvancedDashboard(port=0).start_monitoring()
        assert await d.log_metric('x', 1.) is d
        assert d.start_monitoring() is d
        return d.stop_monitoring()
    assert asyncio.run(go())

def test_gpus_are_read_where_there_are_some(monkeypatch):
    import pynvml
    class Of:
        def __init__(self, **kw): self.__dict__ |= kw
    monkeypatch.setattr(pynvml, 'nvmlInit', lambda: None)
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetCount', lambda: 2)
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetHandleByIndex', lambda i: i)
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetMemoryInfo', lambda h: Of(used=3*2**30, total=4*2**30))
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetUtilizationRates', lambda h: Of(gpu=50+h))
    monkeypatch.setattr(pynvml, 'nvmlDeviceGetTemperature', lambda h, kind: 60+h)
    machine, d = SystemMetrics(), AdvancedDashboard()
    for name, v, labels in machine.sample(): d.log_metric(name, v, None, None, **labels)
    text = d.metrics_text()
    assert machine.gpu == '2 GPU(s)' and 'system_gpu_ratio{gpu="1"} 0.51' in text and 'system_gpu_memory_ratio{gpu="0"} 0.75' in text and 'system_gpu_temperature_celsius{gpu="1"} 61.0' in text

def test_the_room_is_light_and_knows_no_trainer():
    code = "import sys, stateset_nb.monitoring; print(sorted(m for m in sys.modules if m.startswith('stateset_nb.')), {'torch', 'prometheus_client', 'psutil', 'trackio', 'rich', 'pandas'} & set(sys.modules))"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert said == "['stateset_nb.core', 'stateset_nb.monitoring'] set()" or said == "['stateset_nb._modidx', 'stateset_nb.core', 'stateset_nb.monitoring'] set()"

def test_a_missing_extra_is_named(monkeypatch):
    import importlib.util
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'trackio' else real(n, *a))
    with pytest.raises(MissingDependency, match=r'stateset-nb\[monitor\]'): create_production_dashboard(port=0)

# ---- the metrics file

points = st.builds(Point, st.text(st.characters(codec='utf-8', categories=['L', 'N', 'P', 'S']), min_size=1, max_size=10), anything, st.floats(0, 2e9), st.one_of(st.none(), st.integers(0, 10**9)))

@given(st.lists(points, max_size=8), st.lists(points, max_size=4), st.data())
def test_a_file_that_was_cut_anywhere_goes_on(before, after, data):
    import tempfile
    with tempfile.TemporaryDirectory() as tmp:
        path = f'{tmp}/m.jsonl'
        f = MetricsFile(path); f.write(before); f.close()
        raw = open(path, 'rb').read()
        cut = data.draw(st.integers(0, len(raw)))
        open(path, 'wb').write(raw[:cut])
        whole = raw[:cut].count(b'\n')
        same = lambda a, b: repr(a) == repr(b)   # NaN too
        assert same(read_metrics(path)[0], before[:whole])
        f = MetricsFile(path); f.write(after); f.close()
        assert same(read_metrics(path)[0], before[:whole]+after)

@pytest.mark.parametrize('line, says', [('{"schema": 2, "name": "x", "value": 1, "at": 0}', 'upgrade'), ('[1]', 'line 1'), ('{"name": "x"}', 'schema'), ('{"schema": 1, "name": "x", "value": "much", "at": 0}', 'line 1'),
                                        ('{"schema": 1, "alert": {"rule": "x"}}', 'lacks'), ('nonsense', 'line 1')])
def test_a_bad_line_is_named(tmp_path, line, says):
    (tmp_path/'m.jsonl').write_text(line+'\n')
    with pytest.raises(DataError, match=says): read_metrics(tmp_path/'m.jsonl')

def test_a_file_survives_a_kill(tmp_path):
    code = f'''
import itertools, sys, time
from stateset_nb.monitoring import *
d = create_production_dashboard(tracker=None, folder={str(tmp_path)!r}, port=0, system_metrics=False)
for i in itertools.count(1):
    d.on_log(i, {{"loss": 1 / i, "reward": float(i)}})
    print(i, flush=True)
    time.sleep(.002)
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    last = next(int(l) for l in p.stdout if int(l) >= 300)
    p.kill()
    last = max([last, *(int(l) for l in p.stdout if l.endswith('\n'))])
    p.wait(); p.stdout.close()
    found = read_metrics(tmp_path/'metrics.jsonl')[0]
    steps = [q.step for q in found if q.name == 'loss']
    assert steps == list(range(1, len(steps)+1)) and steps[-1] >= last-300 and len(steps) > 30
    assert all(q.value == 1/q.step for q in found if q.name == 'loss')

def test_a_script_that_just_ends_loses_nothing(tmp_path):
    code = f'from stateset_nb.monitoring import *\nd = AdvancedDashboard(sinks={{"file": MetricsFile({str(tmp_path/"m.jsonl")!r})}})\nfor i in range(5000): d.log_metric("x", i)\n'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=60)
    assert [p.value for p in read_metrics(tmp_path/'m.jsonl')[0]] == list(range(5000))

# ---- webhooks

@pytest.fixture
def chat():
    "(address, texts that came, answers to give)."
    came, answers = [], []
    class Take(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.append((self.path, json.loads(self.rfile.read(int(self.headers['Content-Length'])))))
            self.send_response(answers.pop(0) if answers else 200)
            self.send_header('Location', '/elsewhere'); self.end_headers()
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Take) as s:
        th = threading.Thread(target=s.serve_forever); th.start()
        yield f'http://127.0.0.1:{s.server_port}/services/T0/SECRET?a=1', came, answers
        s.shutdown(); th.join()

def test_an_alert_is_sent_tried_again_and_its_address_kept_secret(chat, caplog, monkeypatch):
    url, came, answers = chat
    monkeypatch.setenv('SLACK_WEBHOOK_URL', url)
    hook = SlackWebhook(allow=['127.0.0.1'])
    answers += [500, 302, 200]
    m = AlertManager([hook])
    m.add_threshold('x', 0, name='<!channel>', severity='critical', action='Look & see.')
    m.observe('x', 1., step=3)
    assert m.close(20) and not m.undelivered
    assert [p for p, _ in came] == ['/services/T0/SECRET?a=1']*3 and came[0][1] == {'text': '*CRITICAL* &lt;!channel&gt;: x is 1 (above 0) (round 3)\nLook &amp; see.'}
    assert 'SECRET' not in caplog.text+repr(hook)+m._couriers[0].last_error and '127.0.0.1 answers' in caplog.text

@pytest.mark.parametrize('url, allow, says', [('', [], 'nobody'), ('http://hooks.example.com/SECRET', [], 'expected https'), ('ftp://127.0.0.1/SECRET', ['127.0.0.1'], 'expected https'), ('file:///etc/passwd', [], 'expected https'),
                                              ('http://127.0.0.1/SECRET', ['localhost'], 'expected https')])
def test_an_unsafe_webhook_is_refused(url, allow, says, monkeypatch):
    monkeypatch.delenv('SLACK_WEBHOOK_URL', raising=False)
    with pytest.raises(ConfigError, match=says) as e: SlackWebhook(url, allow)
    assert 'SECRET' not in str(e.value)

def test_a_name_that_leads_inside_is_refused(chat, monkeypatch):
    import socket
    url, came, _ = chat
    port = int(url.split(':')[2].split('/')[0])
    real = socket.create_connection
    monkeypatch.setattr(socket, 'create_connection', lambda at, *a, **k: real(('127.0.0.1', port), *a, **k))   # a name that resolves into our network
    with pytest.raises(BackendError, match='private address'): SlackWebhook('https://hooks.example.com/SECRET')(Alert('r', 'x', 'info', 'firing', 1., 0., 'm'))
    assert not came

@pytest.mark.parametrize('address, public', [('8.8.8.8', True), ('2001:4860:4860::8888', True), *((a, False) for a in ('127.0.0.1', '10.1.2.3', '172.16.0.1', '192.168.1.1', '169.254.169.254', '0.0.0.0', '224.0.0.1', '100.64.0.1',
                                                                                                                       '::1', 'fe80::1%eth0', 'fd00::1', '::ffff:10.0.0.1', '::'))])
def test_addresses_of_ones_own_network(address, public): assert _is_public(address) is public

# ---- trackers, each in its process

def tracked(kind, folder, kill_at=None, name='night-7'):
    "20 rounds by way of a tracker; its process is killed in the middle where asked."
    sink = TrackerProcess(kind, 'page', name, folder, timeout=60)
    d = AdvancedDashboard(sinks={kind: sink})
    d.alerts.add_threshold('loss', .9, severity='critical', name='loss_high')
    for i in range(1, 21):
        d.on_log(i, {'loss': 1/i, 'reward': i/20})
        if i == kill_at:
            until(lambda: sink.process is not None and d._couriers[kind].flush(.01), 'the first points')
            os.killpg(sink.process.pid, signal.SIGKILL); sink.process.wait()
    return d, d.stop_monitoring(90)

def test_trackio_has_every_point_and_the_alerts(tmp_path):
    d, ended = tracked('trackio', tmp_path)
    assert ended and not d.get_dashboard_summary()['sinks']['trackio']['errors']
    db = sqlite3.connect(next(tmp_path.glob('*.db')))
    try:
        rows = db.execute('select step, metrics from metrics order by step').fetchall()
        got = {s: json.loads(m) for s, m in rows}
        assert sorted(got) == list(range(1, 21)) and all(got[i]['loss'] == 1/i and got[i]['reward'] == i/20 for i in got)
        assert [(t, l) for t, l in db.execute('select title, level from alerts order by timestamp')] == [('loss_high firing', 'error'), ('loss_high resolved', 'error')]
    finally: db.close()

def test_tensorboard_has_every_point(tmp_path):
    d, ended = tracked('tensorboard', tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    acc = EventAccumulator(str(tmp_path/'page'/'night-7')); acc.Reload()
    assert ended and [(e.step, round(e.value, 5)) for e in acc.Scalars('loss')] == [(i, round(1/i, 5)) for i in range(1, 21)]

def test_wandb_has_a_run(tmp_path, monkeypatch):
    for k, v in {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'HOME': str(tmp_path), 'WANDB_DATA_DIR': str(tmp_path), 'WANDB_CACHE_DIR': str(tmp_path), 'WANDB_CONFIG_DIR': str(tmp_path)}.items(): monkeypatch.setenv(k, v)
    d, ended = tracked('wandb', tmp_path)
    assert ended and not d.get_dashboard_summary()['sinks']['wandb']['errors']
    found, = (tmp_path/'wandb').glob('offline-run-*/*.wandb')
    assert b'reward' in found.read_bytes()

def test_a_killed_tracker_is_an_error_of_its_own(tmp_path, caplog):
    d, ended = tracked('trackio', tmp_path, kill_at=10)
    assert d.get_dashboard_summary()['sinks']['trackio']['errors'] and 'has ended' in caplog.text and d.aggregator.stats('loss').count == 20

# ---- trainings

ASK, SAY = ('parcel', 'refund'), ('sent', 'paid', 'lost')

@pytest.fixture(scope='module')
def clerk():
    r = random.Random(0)
    talks = [Conversation((Message('user', a), Message('assistant', ' '.join(r.choice(SAY) for _ in range(r.choice((1, 2, 3)))))), id=f'{a}-{i}') for a in ASK for i in range(12)]
    return tiny_policy(talks, config=TinyConfig(60, 8, hidden_size=16, layers=1, max_tokens=64, short_first=0.), cache=False)

@reward_function
def paid(turns): return turns[-1].text.split().count('paid')/4

def training(clerk, callbacks=(), run=None, **kw):
    agent = Agent(AgentConfig('clerk'), PolicyBackend(copy.deepcopy(clerk)))
    env = ConversationEnvironment([Scenario(a, (Message('user', a),)) for a in ASK])
    return SingleTurnGRPOTrainer(agent, env, paid, TrainingConfig(**dict(num_episodes=8, prompts_per_step=2, num_generations=4, max_completion_length=6, learning_rate=1e-2, seed=3) | kw), callbacks=list(callbacks), run=run)

def weights(t): return b''.join(p.detach().numpy().tobytes() for p in t.agent.policy.model.parameters())

class Dies:
    "Fails from the third write on."
    n = 0
    def write(self, points):
        self.n += 1
        if self.n > 2: raise RuntimeError('the tracker crashed')
    def alert(self, alert): raise RuntimeError('the tracker crashed')
    def close(self): raise RuntimeError('the tracker crashed')

class Hangs:
    def __init__(self): self.gate = threading.Event()
    def write(self, points): self.gate.wait()
    def alert(self, alert): self.gate.wait()
    def close(self): self.gate.wait()

def rows(log): return [{k: v for k, v in m.items() if not k.startswith('time/')} for m in log]

def test_a_training_is_the_same_whoever_dies_or_hangs(clerk, tmp_path, caplog):
    async def go(t, at=None):
        log = []
        async for m in t.steps():
            log.append(m)
            if at is not None: at(len(log))
        return log
    bare = training(clerk)
    wanted = asyncio.run(go(bare))
    hung, tracker = Hangs(), TrackerProcess('trackio', 'page', 'night-7', tmp_path)
    d = AdvancedDashboard(sinks={'dies': Dies(), 'hangs': hung, 'trackio': tracker, 'file': MetricsFile(tmp_path/'m.jsonl')}, detectors=DETECTORS, port=0, system_metrics=True,
                          alerts=AlertManager([lambda a: 1/0, lambda a: hung.gate.wait()])).start_monitoring()
    d.alerts.add_threshold('reward', -1, name='always')
    def kill(i):
        if i == 4:
            until(lambda: tracker.process is not None, 'the tracker')
            os.killpg(tracker.process.pid, signal.SIGKILL); tracker.process.wait()
    watched = training(clerk, [d])
    assert rows(asyncio.run(go(watched, kill))) == rows(wanted) and weights(watched) == weights(bare)
    assert d.stop_monitoring(.3) is False
    hung.gate.set()
    s = d.get_dashboard_summary()['sinks']
    assert s['dies']['errors'] and s['trackio']['errors'] and not s['file']['errors']
    assert {p.step for p in read_metrics(tmp_path/'m.jsonl')[0] if p.name == 'reward'} == set(range(1, 9))
    assert set(wanted[0]) <= set(d.aggregator.series)

def test_a_detector_pauses_a_run_which_then_goes_on(clerk):
    run = TrainingRun()
    d = AdvancedDashboard(run=run)
    d.alerts.add_rule(AlertRule('third', 'grpo_round', 2.5, pauses=True))
    class Counts:
        def on_log(self, step, metrics): d.on_log(step, {'grpo_round': step})
    reasons = []
    run.listeners.append(lambda event, details: reasons.append((event, details)) if event == 'paused' else None)
    t = training(clerk, [Counts()], run, num_episodes=5)
    th = threading.Thread(target=t.fit); th.start()
    until(lambda: run.state == 'paused', 'the pause')
    assert t.step == 3 and 'third: grpo_round is 3' in reasons[0][1]['reason']
    run.resume(); th.join(60)
    assert run.state == 'done' and t.step == 5

def test_nothing_a_trainer_says_stops_it():
    d = AdvancedDashboard(detectors=DETECTORS, max_series=6)
    for i in range(30): d.on_log(i, {'loss': None, 'reward': 'high', 'kl': math.inf, 'entropy': np.float32(1), 'grad_norm': torch.tensor(2.), f'odd/{i}': 1., '': 0., 'é': 1})
    assert d.refused == {'loss': 'None', 'reward': "'high'"} and d.dropped_series

# ---- Hugging Face's trainers

@pytest.fixture(scope='module')
def trl():
    try:
        import trl
        trl.GRPOTrainer
    except ImportError as e: lacking(f"{e.name} is not here: `pip install -c constraints.txt '.[trl]'` tries the bridge")
    return trl

@pytest.mark.filterwarnings('ignore:.*gradient_checkpointing.*:FutureWarning', 'ignore:None of the inputs have requires_grad:UserWarning')
def test_every_key_of_trl_is_kept_and_the_training_is_the_same(trl, clerk, tmp_path):
    from transformers import PrinterCallback, TrainerCallback
    class Book(TrainerCallback):
        def __init__(self): self.rows = []
        def on_log(self, args, state, control, logs=None, **kw): self.rows.append((state.global_step, dict(logs)))
    def go(out, callbacks):
        agent, book = Agent(AgentConfig('clerk'), PolicyBackend(copy.deepcopy(clerk))), Book()
        env = ConversationEnvironment([Scenario(a, (Message('user', a),)) for a in ASK])
        config = TrainingConfig(num_episodes=3, prompts_per_step=2, num_generations=4, max_completion_length=6, learning_rate=1e-2, beta=.05)
        t = trl_trainer(agent, env, paid, config, output_dir=out, use_cpu=True, disable_tqdm=True, save_strategy='no', callbacks=[book, *callbacks])
        t.remove_callback(PrinterCallback)
        t.train()
        return b''.join(p.detach().numpy().tobytes() for p in agent.policy.model.parameters()), book.rows
    bare, _ = go(tmp_path/'a', [])
    hung = Hangs()
    d = AdvancedDashboard(sinks={'dies': Dies(), 'hangs': hung}, detectors=DETECTORS)
    seen, logged = go(tmp_path/'b', [as_hf_callback(d)])
    assert seen == bare
    keys = {k for _, row in logged for k in row}
    assert len(keys) > 20 and not d.refused
    assert keys <= set(d.aggregator.series), keys-set(d.aggregator.series)
    for k in keys:
        said = list({step: math.nan if row[k] is None else float(row[k]) for step, row in reversed(logged) if k in row}.values())[::-1]   # the last word repeats what the step said
        np.testing.assert_array_equal(d.aggregator.values(k), said, err_msg=k)
    text = d.metrics_text()
    missing = [k for k in keys if f'\n{metric_info(k, True).name}' not in text]
    assert not missing and 'grpo_kl_divergence ' in text and 'grpo_train_reward ' in text
    d.stop_monitoring(.1); hung.gate.set()

# ---- what the benchmark found

def test_the_detectors_are_those_that_were_measured():
    doc = json.loads((ROOT/'benchmarks'/'results'/'monitoring.json').read_text())
    assert {r['detector']: r['limit'] for r in doc['test']['rows']} == {d.name: d.limit for d in DETECTORS} and not set(doc['seeds']['train']) & set(doc['seeds']['test'])
    assert sum(r['seen'] for r in doc['test']['rows']) >= .95*sum(r['runs'] for r in doc['test']['rows'])
    page = (ROOT/'benchmarks'/'results'/'monitoring.md').read_text()
    assert (len(doc['test']['false_pages']) <= doc['test']['healthy_rounds']/1000) == ('goal 1: met' in page) != ('goal 1: NOT met' in page), 'the page says whether healthy runs page too often'
