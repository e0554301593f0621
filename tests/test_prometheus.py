"""Prometheus and Alertmanager for real: what deployment/monitoring names is exported, its rules fire and rest, and an alert travels to a webhook and back."""
import http.server, json, re, signal, socket, subprocess, sys, threading, time, urllib.parse, urllib.request
from contextlib import contextmanager
import promql_parser, pytest, yaml
from conftest import ROOT
from stateset_nb.core import BackendError
from stateset_nb.monitoring import METRICS, AdvancedDashboard, AlertManager

PLACE = ROOT/'deployment'/'monitoring'
WHY = '`make system` installs it on Debian and Ubuntu'
VLLM = {'vllm:num_requests_running', 'vllm:num_requests_waiting', 'vllm:kv_cache_usage_perc', 'vllm:time_to_first_token_seconds_bucket'}

@pytest.fixture(scope='module')
def made():
    "The generator of the files, as a module."
    import importlib.util
    spec = importlib.util.spec_from_file_location('generate_monitoring', PLACE/'generate.py')
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def rules(): return [r for g in yaml.safe_load((PLACE/'rules.yml').read_text())['groups'] for r in g['rules']]

def panels(): return [p for p in json.loads((PLACE/'grafana-dashboard.json').read_text())['panels'] if p['type'] != 'row']

def queries(): return {**{f'rule {r["alert"]}': r['expr'] for r in rules()}, **{f'{p["title"]} {t["refId"]}': t['expr'] for p in panels() for t in p['targets']}}

def names_in(node):
    "The metrics a query reads."
    if isinstance(node, promql_parser.VectorSelector): return {node.name}
    if isinstance(node, promql_parser.MatrixSelector): return {node.vector_selector.name}
    parts = [v for k in ('lhs', 'rhs', 'expr', 'args', 'param') if k in dir(node) and (v := node.__getattribute__(k)) is not None]
    return set().union(*(names_in(p) for v in parts for p in (v if isinstance(v, list) else [v]))) if parts else set()

def log_everything(dash, i=0):
    "One value of every metric of the table."
    training = {m.key: float(i) for m in METRICS if not m.key.startswith(('api.', 'system/', 'stateset/', 'train/'))}
    dash.on_log(i, training)
    for m in METRICS:
        if m.key.startswith(('api.', 'system/')): dash.log_metric(m.key, 1., None, None, **({'gpu': '0'} if 'gpu' in m.key else {}))

class Deaf:
    def write(self, points): raise OSError('nobody is there')
    def alert(self, alert): raise OSError('nobody is there')
    def close(self): pass

def full_dashboard(**kw):
    dash = AdvancedDashboard(sinks={'deaf': Deaf()}, alerts=AlertManager(), **kw)
    dash.alerts.add_threshold('kl', 1e6, clear=.5, severity='error', name='kl_high')
    return dash

# ---- the files

def test_files_are_what_the_generator_writes(made):
    for name, text in made.files().items(): assert (PLACE/name).read_text() == text, f'{name}: run python deployment/monitoring/generate.py'

def test_the_generator_refuses_a_metric_that_does_not_exist(made):
    assert made.q('<loss> > 1') == 'grpo_train_loss > 1'
    with pytest.raises(KeyError): made.q('<lost> > 1')

def test_every_query_parses_and_reads_what_is_exported(caplog):
    dash = full_dashboard()
    log_everything(dash)
    exported = set(re.findall(r'^(\w+)[{ ]', dash.metrics_text(), re.M))
    dash.stop_monitoring(1)
    assert {m.name for m in METRICS} <= exported | {m.name for m in METRICS if m.kind == 'summary'}
    read = {k: names_in(promql_parser.parse(e)) for k, e in queries().items()}
    assert len(read) > 50 and all(read.values())
    unknown = {k: v - exported - VLLM - {'up'} for k, v in read.items() if v - exported - VLLM - {'up'}}
    assert not unknown

def test_panels_have_a_place_a_unit_and_a_legend():
    at = set()
    for p in panels():
        g = p['gridPos']
        spots = {(x, y) for x in range(g['x'], g['x']+g['w']) for y in range(g['y'], g['y']+g['h'])}
        assert not spots & at and g['x']+g['w'] <= 24
        at |= spots
        assert p['type'] == 'timeseries' and p['fieldConfig']['defaults']['unit'] and all(t['legendFormat'] for t in p['targets'])
    ids = [p['id'] for p in json.loads((PLACE/'grafana-dashboard.json').read_text())['panels']]
    assert len(ids) == len(set(ids))

def test_each_rule_has_a_firing_and_a_silent_case_and_says_what_to_do():
    cases = yaml.safe_load((PLACE/'rules_test.yml').read_text())['tests']
    for r in rules():
        mine = [t['exp_alerts'] for c in cases for t in c['alert_rule_test'] if t['alertname'] == r['alert']]
        assert len(mine) == 2 and sorted(map(bool, mine)) == [False, True], r['alert']
        assert r['annotations']['summary'] and r['annotations']['action']

def run_tool(path, *args): return subprocess.run([path, *args], cwd=PLACE, capture_output=True, text=True, timeout=60)

def test_promtool_and_amtool_accept_the_files(need):
    promtool, amtool = need('promtool', why=WHY), need('amtool', why=WHY)
    for tool, *args in ((promtool, 'check', 'rules', 'rules.yml'), (promtool, 'check', 'config', 'prometheus.yml'), (promtool, 'test', 'rules', 'rules_test.yml'), (amtool, 'check-config', 'alertmanager.yml')):
        done = run_tool(tool, *args)
        assert done.returncode == 0, done.stdout+done.stderr

def test_promtool_accepts_the_page(need):
    promtool = need('promtool', why=WHY)
    dash = AdvancedDashboard(labels={'run': 'night-7'})
    log_everything(dash)
    done = subprocess.run([promtool, 'check', 'metrics'], input=dash.metrics_text(), capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 3) and 'error' not in done.stderr.lower(), done.stderr   # 3: advice about names, such as _max

# ---- the page

def test_a_port_that_another_program_has_is_said():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        with pytest.raises(BackendError, match='another program has that port'): AdvancedDashboard(port=taken.getsockname()[1]).start_monitoring()

def test_the_page_stays_small_whatever_the_episode():
    dash = AdvancedDashboard()
    for e in range(20_000): dash.log_metric('train.loss', .5, episode=e, model='clerk')
    assert len(dash.metrics_text()) < 3000 and 'episode="' not in dash.metrics_text()
    assert 'grpo_train_episodes_total{model="clerk"} 20000.0' in dash.metrics_text() and 'grpo_train_episode{model="clerk"} 19999.0' in dash.metrics_text()

def test_the_episode_as_a_label_is_asked_for_and_bounded(caplog):
    latest, each = AdvancedDashboard(episode_label='latest'), AdvancedDashboard(episode_label='all', max_series=10)
    for e in range(50):
        latest.log_metric('train.loss', e, episode=e)
        each.log_metric('train.loss', e, episode=e)
    found = [l for l in latest.metrics_text().splitlines() if l.startswith('grpo_train_loss{')]
    assert found == ['grpo_train_loss{episode="49"} 49.0']
    assert len(re.findall('^grpo_train_loss{', each.metrics_text(), re.M)) == 8 and each.dropped_series == 42
    assert caplog.text.count('is dropped') == 1

# ---- the live stack

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

def ask(port, path, **args):
    url = f'http://127.0.0.1:{port}{path}' + (f'?{urllib.parse.urlencode(args)}' if args else '')
    try:
        with urllib.request.urlopen(url, timeout=5) as r: return r.read().decode()
    except OSError: return ''

def until(f, what, seconds=60):
    "Poll until `f` says something true."
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if res := f(): return res
        time.sleep(.1)
    pytest.fail(f'{what} did not happen within {seconds} s')

@contextmanager
def server(path, *args, ready, port):
    "A server of the test's own, on loopback; Debian's service of the same name is not touched."
    p = subprocess.Popen([path, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: p.poll() is not None or ask(port, ready), path)
        assert p.poll() is None, p.stderr.read()
        yield p
    finally:
        p.send_signal(signal.SIGTERM)
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill(); p.wait()
        p.stderr.close()

@pytest.fixture
def webhook():
    "(port, alerts that came in)."
    came = []
    class Take(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.extend(json.loads(self.rfile.read(int(self.headers['Content-Length'])))['alerts'])
            self.send_response(200); self.end_headers()
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Take) as s:
        th = threading.Thread(target=s.serve_forever); th.start()
        yield s.server_port, came
        s.shutdown(); th.join()

def test_an_alert_travels_to_a_webhook_and_is_resolved(need, tmp_path, webhook):
    prometheus, alertmanager = need('prometheus', why=WHY), need('prometheus-alertmanager', 'alertmanager', why=WHY)
    (hook, came), prom_port, am_port = webhook, free_port(), free_port()
    dash = full_dashboard(port=0, labels={'run': 'night-7'}).start_monitoring()
    config = yaml.safe_load((PLACE/'prometheus.yml').read_text())
    config['global'] = {'scrape_interval': '200ms', 'evaluation_interval': '200ms'}
    config['rule_files'] = [str(PLACE/'rules.yml')]
    config['alerting']['alertmanagers'][0]['static_configs'][0]['targets'] = [f'127.0.0.1:{am_port}']
    config['scrape_configs'][0]['static_configs'][0]['targets'] = [f'127.0.0.1:{dash.port}']
    (tmp_path/'prometheus.yml').write_text(yaml.safe_dump(config))
    routes = yaml.safe_load((PLACE/'alertmanager.yml').read_text())
    routes['route'] |= {'group_wait': '100ms', 'group_interval': '200ms'}
    routes['receivers'] = [{'name': 'chat', 'webhook_configs': [{'url': f'http://127.0.0.1:{hook}/', 'send_resolved': True}]}]
    (tmp_path/'alertmanager.yml').write_text(yaml.safe_dump(routes))
    def states(): return [(a['status'], a['labels']['alert']) for a in came if a['labels']['alertname'] == 'StatesetAlert']
    def results(query): return json.loads(ask(prom_port, '/api/v1/query', query=query) or '{"data": {"result": []}}')['data']['result']
    with (server(alertmanager, f'--config.file={tmp_path}/alertmanager.yml', f'--storage.path={tmp_path}/am', f'--web.listen-address=127.0.0.1:{am_port}', '--cluster.listen-address=', ready='/-/ready', port=am_port),
          server(prometheus, f'--config.file={tmp_path}/prometheus.yml', f'--storage.tsdb.path={tmp_path}/tsdb', f'--web.listen-address=127.0.0.1:{prom_port}', ready='/-/ready', port=prom_port) as p):
        until(lambda: [r for r in results('up{job="stateset"}') if r['value'][1] == '1'], 'the first scrape')
        steps = iter(range(20))
        def logged_and_seen():
            if (i := next(steps, None)) is not None: log_everything(dash, i)
            return i is None
        until(logged_and_seen, 'the run')
        silent = {k: e.replace('$job', 'stateset').replace('$run', '.*') for k, e in queries().items() if not k.startswith('rule ') and 'vllm:' not in e}
        def all_answer():
            for k in [k for k, e in silent.items() if results(e)]: del silent[k]
            return not silent
        until(all_answer, f'an answer to {sorted(silent)}')
        dash.alerts.observe('kl', 2e6)
        until(lambda: ('firing', 'kl_high') in states(), 'the alert')
        dash.alerts.observe('kl', .1)
        until(lambda: ('resolved', 'kl_high') in states(), 'its end')
        fired = next(a for a in came if a['labels']['alertname'] == 'StatesetAlert')
        assert fired['labels']['run'] == 'night-7' and fired['labels']['severity'] == 'error' and fired['annotations']['action']
    assert p.returncode == 0
    dash.stop_monitoring(1)

if __name__ == '__main__': sys.exit(pytest.main([__file__]))
