"""Widgets without a browser, and in a bare one: what a page may say, what it is told, and what it does with it."""
import base64, gc, json, math, re, threading, time, weakref
import numpy as np
import pytest
from hypothesis import given, strategies as st
from page_host import HARM, PAYLOADS, PageHost
from stateset_nb.core import ConfigError, DataError, Message, ToolCall, TrainingExample
from stateset_nb.labelling import LabelQueue, fill_queue, label_events, publish_labels, standing_labels
from stateset_nb.monitoring import AdvancedDashboard, AlertManager, AlertRule
from stateset_nb.store import TrainingStore, read_preferences
from stateset_nb.trainers import CreditView, TrainingRun
from stateset_nb.widgets import (CHARTS, CurveChart, DashboardWidget, LabelWidget, LiveWidget, MetricTable, PlayedSample, RunHistory, TrainingWidget, front_files, message_field, read_history, svg_curves, thin_out, training_record)

KNOBS = {'learning_rate': 1e-4, 'temperature': 1.}

class Alert:
    def __init__(self, message='kl is 0.61', name='kl', severity='warning'): self.name, self.message, self.severity = name, message, severity

def until(true, seconds=20):
    "Wait for something."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'it did not come'
        time.sleep(.005)

def rounds(run, history, n=10**9, wait=.002):
    "A training that asks at its boundaries and does nothing else."
    import asyncio
    def fit():
        for i in range(n):
            asyncio.run(run.gate(i))
            run.take_requests()
            if run.state == 'stopped': return
            history().on_log(i + 1, {'reward': math.tanh(i / 50), 'reward_std': .1, 'kl': i / 1000})
            time.sleep(wait)
        run._to('done')
    return fit

def widget(n=10**9, wait=.002, **more):
    "A widget over such a training."
    run = TrainingRun()
    w = TrainingWidget(run, rounds(run, lambda: w.history, n, wait), **dict(knobs=KNOBS, total=n if n < 10**9 else 0) | more)
    return w

def view(text): return CreditView((text, text), (0, 1), (0., .5))

# --- without a browser

def test_a_run_is_led_by_messages():
    w = widget()
    def press(kind, **more): return w.handle({'kind': kind, **more})
    assert w.view()['state'] == 'ready' and w.view()['can_start']
    assert press('start')['ok'] and not press('start')['ok']
    until(lambda: w.history.step > 3)
    assert press('pause')['ok'] and w.view()['state'] == 'paused'
    until(lambda: w.run.step == w.history.step)
    at = w.history.step
    assert press('knob', name='learning_rate', value=2e-4)['ok'] and w.view()['knobs']['learning_rate'] == {'value': 1e-4, 'start': 1e-4, 'pending': 2e-4, 'rule': 'above 0'}
    time.sleep(.05)
    assert w.history.step == at
    press('resume')
    until(lambda: w.history.knobs)
    assert w.view()['knobs']['learning_rate']['value'] == 2e-4 and w.run.turned == [(at, 'learning_rate', 2e-4)]
    assert [(e.step, e.text) for e in w.history.events if e.kind == 'knob'] == [(at, 'learning_rate = 0.0002')]
    press('stop'); w.wait(20)
    assert w.view()['state'] == 'stopped' and w.view()['can_start'] and w.run.state == 'stopped'
    assert press('start')['ok'], 'after a stop it goes on'
    until(lambda: w.run.state == 'running')
    press('stop'); w.wait(20)

@pytest.mark.parametrize('msg', [{}, {'kind': None}, {'kind': 'nothing'}, {'kind': ['start']}, {'kind': 'knob'}, {'kind': 'knob', 'name': 'learning_rate'}, {'kind': 'knob', 'name': 7, 'value': 1}, {'kind': 'knob', 'name': 'seed', 'value': 1},
                                 {'kind': 'knob', 'name': 'learning_rate', 'value': True}, {'kind': 'knob', 'name': 'learning_rate', 'value': 'fast'}, {'kind': 'knob', 'name': 'learning_rate', 'value': -1}, {'kind': 'knob', 'name': 'learning_rate', 'value': math.nan},
                                 {'kind': 'knob', 'name': 'learning_rate', 'value': {'x': 1}}, {'kind': 'request'}, {'kind': 'request', 'what': 'coffee'}, {'kind': 'request', 'what': None}])
def test_bad_messages_are_answered_and_change_nothing(msg):
    w = widget()
    before = w.view()
    answer = w.handle(msg | {'cid': 'x'})
    assert answer['ok'] is False and answer['cid'] == 'x' and answer['error'] and w.view() == before and not w.run.pending and not w.run.asked

@given(st.dictionaries(st.text(max_size=5) | st.sampled_from(['kind', 'cid', 'name', 'value', 'what']), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=2), max_leaves=3), max_size=4))
def test_whatever_a_page_says_is_answered(msg):
    w = TrainingWidget(TrainingRun(), knobs=KNOBS)
    assert w.handle(msg)['kind'] == 'ack'

def test_a_fault_of_ours_is_told_and_logged(caplog):
    w = widget()
    w.run.pause = None
    assert 'TypeError' in w.handle({'kind': 'pause'})['error'] and "could not do 'pause'" in caplog.text

def test_a_training_that_breaks_says_so_and_can_be_asked_again():
    def broken(): raise RuntimeError('no memory left')
    w = TrainingWidget(TrainingRun(), broken)
    w.start()
    with pytest.raises(RuntimeError, match='no memory'): w.wait(20)
    v = w.view()
    assert (v['state'], v['error'], v['can_start'], w.run.state) == ('error', 'RuntimeError: no memory left', True, 'stopped') and 'no memory left' in w.record()
    with pytest.raises(ConfigError, match='no `fit`'): TrainingWidget(TrainingRun()).start()

def test_stopping_shows_until_the_boundary():
    w = TrainingWidget(TrainingRun())
    w.run.start(); w.run.stop('enough')
    assert w.view()['state'] == 'stopping'
    w.run.tell('ended')
    assert w.view()['state'] == 'stopped' and 'stopped: enough' in [e.text for e in w.history.events]

def test_many_threads_call_in():
    w = widget()
    got = []
    def work(i):
        for k in range(50): got.append(w.handle({'kind': 'knob', 'name': 'temperature', 'value': 1 + i + k / 100}))
        for k in range(50): w.history.on_alert(Alert(f'{i}-{k}'))
    ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert len(got) == 400 and all(a['ok'] for a in got) and len({e.text for e in w.history.events}) == 400

class Wire:
    "Takes what a widget sends, as a page would."
    def __init__(self, w):
        self.w, self.msgs, self.cols = w, [], {}
        w.front.send = self.send
    def send(self, msg, buffers=None): self.msgs.append((time.monotonic(), msg, [bytes(b) for b in buffers or []]))
    def deltas(self): return [(m, b) for _, m, b in self.msgs if m['kind'] == 'delta']
    def table(self, run=0):
        "The rows a page would have of a run."
        have, n = None, 0
        for m, bufs in self.deltas():
            for p, b in zip(m['parts'], bufs, strict=True):
                if p['run'] != run: continue
                got = np.frombuffer(b).reshape(len(p['keys']), -1)
                if p['fresh']: have = got
                else:
                    assert have is not None and p['i0'] == n, 'no row is missed or told twice'
                    have = np.concatenate([have, got], 1)
                n = p['n']
        return have

def test_a_page_hears_every_row_at_most_ten_times_a_second():
    w = widget(wait=0)
    wire = Wire(w)
    w.push(); w.start()
    until(lambda: len(wire.deltas()) > 8)
    w.run.stop(); w.wait(20)
    until(lambda: wire.deltas()[-1][0]['now']['step'] == w.history.step and w._timer is None)
    times = [t for t, m, _ in wire.msgs if m['kind'] == 'delta'][1:]
    assert (times[-1] - times[0]) / (len(times) - 1) > .08
    have = wire.table()
    assert have[0].tolist() == [*range(1, w.history.step + 1)] and np.allclose(have[1], np.tanh((have[0] - 1) / 50))
    assert [e['text'] for m, _ in wire.deltas() for e in m['events']][-1] == 'stopped', 'events are told once'
    w.close()

def test_what_was_told_and_then_changed_is_told_again():
    w = TrainingWidget(TrainingRun(), overlay=[RunHistory('other')])
    wire = Wire(w)
    w.history.on_log(1, {'reward': .1}); w.history.on_log(2, {'reward': .2}); w.push()
    w.history.on_run('evaluated', {'step': 2, 'metrics': {'eval/success': .5}}); w.push()
    assert wire.table()[[i for i, k in enumerate(wire.deltas()[0][0]['parts'][0]['keys']) if k == 'eval/success'][0]].tolist()[1] == .5
    w.history.on_log(1, {'reward': .7}); w.push()
    assert wire.table()[:2].tolist() == [[1.], [.7]], 'a run that was taken up again at an earlier round'
    assert [e['text'] for e in wire.deltas()[-1][0]['events']] == ['eval/success 0.5'] and wire.deltas()[-1][0]['events_from'] == 0
    w.close()

def test_a_long_history_is_thinned_for_a_new_page_and_keeps_its_spikes():
    w = TrainingWidget(TrainingRun())
    for i in range(30_000): w.history.on_log(i + 1, {'reward': 1e3 if i == 12_345 else .5})
    m, (rows,) = w._stream.take(True)
    rows = np.frombuffer(rows).reshape(len(m['parts'][0]['keys']), -1)
    assert rows.shape[1] <= 10_000 and rows[1].max() == 1e3 and m['parts'][0]['n'] == 30_000 and (rows[0, 0], rows[0, -1]) == (1, 30_000)

@given(st.integers(1, 400), st.integers(1, 4), st.integers(20, 200), st.integers(0, 2**31))
def test_thinning_keeps_ends_extremes_and_order(n, curves, limit, seed):
    rng = np.random.default_rng(seed)
    x = np.vstack([np.arange(n), rng.normal(size=(curves, n))])
    x[1:][rng.random((curves, n)) < .2] = np.nan
    thin = thin_out(x, limit)
    assert thin.shape[1] <= max(n, 0) and set(thin[0]) <= set(x[0]) and list(thin[0]) == sorted(set(thin[0]))
    assert thin[0, 0] == 0 and thin[0, -1] == n - 1
    for a, b in zip(x[1:], thin[1:]):
        if np.isfinite(a).any(): assert np.nanmin(a) == np.nanmin(b) and np.nanmax(a) == np.nanmax(b)

@given(st.lists(st.tuples(st.integers(1, 12), st.dictionaries(st.sampled_from('abc'), st.floats(-1, 1), max_size=3)), max_size=20))
def test_a_table_is_what_a_dict_of_rounds_would_be(log):
    table, plain = MetricTable(), {}
    for step, m in log:
        table.add(step, m)
        plain = {s: r for s, r in plain.items() if s <= step}
        plain[step] = plain.get(step, {}) | m
    got = table.since(0, ['a', 'b', 'c'])
    assert got[0].tolist() == sorted(plain)
    for j, k in enumerate('abc'): assert [None if math.isnan(v) else v for v in got[j + 1]] == [plain[s].get(k) for s in sorted(plain)]

def test_the_past_is_read_from_its_folder(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"schema": 1, "step": 1, "reward": 0.1}\n{"schema": 1, "step": 2, "reward": NaN, "knobs/learning_rate": 0.5}\n')
    h = read_history(tmp_path, 'old')
    assert (h.step, h.label, h.knobs, [(e.step, e.text) for e in h.events]) == (2, 'old', {'learning_rate': .5}, [(1, 'learning_rate = 0.5')])
    with pytest.raises(DataError, match='no metrics.jsonl'): read_history(tmp_path / 'x')

def test_fields_of_a_message_are_checked():
    with pytest.raises(DataError, match='reload the page'): message_field({'kind': 'a'}, 'b', str)
    with pytest.raises(DataError): message_field({'b': True}, 'b', int)
    assert message_field({'b': True}, 'b', bool) is True

def test_a_closed_widget_is_let_go():
    w = widget(); w.front; w.close()
    gone = weakref.ref(w); del w; gc.collect()
    assert gone() is None

def evil(i):
    "A widget in which everything that can come from outside is a payload."
    p = PAYLOADS[i]
    other = RunHistory(p); other.on_log(1, {'reward': .5})
    w = TrainingWidget(TrainingRun(), lambda: None, total=9, knobs=KNOBS, label=p, overlay=[other], charts=[CurveChart(p, ('reward',), p, 'reward_std'), *CHARTS], freeze_when_done=False)
    w.run.start()
    for k in range(1, 4): w.history.on_log(k, {'reward': k / 4, 'reward_std': .1})
    w.history.on_alert(Alert(p, p, p))
    w.history.samples.append(PlayedSample(3, p, ((.5, view(p)), (.1, view(p)))))
    w.history.on_run('saved', {'step': 2, 'path': f'runs/{p}'.replace('/script', '')})
    w.history.fail(RuntimeError(p))
    return w

@pytest.mark.parametrize('i', range(len(PAYLOADS)))
def test_nothing_said_becomes_markup_in_the_record(i):
    tags = set(re.findall(r'<([a-zA-Z]+)', evil(i).record()))
    assert tags <= {'div', 'b', 'svg', 'text', 'polyline', 'polygon', 'line', 'circle', 'ul', 'li', 'small', 'span', 'br', 'wbr'}

def test_a_chart_of_nothing_and_of_one_point():
    x = np.array([3.])
    assert svg_curves([]) == '' and 'circle' in svg_curves([(x, x, 'red', False)]) and 'nan' not in svg_curves([(x, x, 'red', False)], [(x, x, x * np.nan, 'red')])
    assert '<svg' not in training_record([RunHistory()])

def test_the_front_is_ours_and_one_vendored_file_as_published():
    import hashlib, stateset_nb
    from pathlib import Path
    static = Path(stateset_nb.__file__).parent / 'static'
    script, style = front_files('train')
    assert script.startswith((static / 'vendor' / 'uPlot.iife.min.js').read_text(encoding='utf-8')) and 'https://cdn' not in script and 'import(' not in script
    assert hashlib.sha256((static / 'vendor' / 'uPlot.iife.min.js').read_bytes()).hexdigest() == '19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f'
    assert 'innerHTML' not in ''.join((static / f).read_text(encoding='utf-8') for f in ('kit.js', 'train.js', 'label.js', 'monitor.js'))

# --- labelling, without a browser

def talk(i, answer, question='Where is parcel'): return TrainingExample(f'e{i}', (Message('user', f'{question} {i}?'),), Message('assistant', answer))

@pytest.fixture
def make_queue(tmp_path):
    "`make_queue(n, pairs)` gives a queue with that many things to rate, and pairs after them; asked again it is the same queue."
    opened = []
    def f(n=12, pairs=0, labeller='ann'):
        store = TrainingStore(f'sqlite:///{tmp_path}/labels.db')
        opened.append(store)
        ones, sides = [talk(i, f'It comes on day {i}.') for i in range(n)], [(talk(f'a{i}', 'Short.', 'Pair'), TrainingExample(f'b{i}', talk(f'a{i}', '', 'Pair').messages, Message('assistant', 'Long.'))) for i in range(pairs)]
        if n + pairs: store.add_many([*ones, *(e for p in sides for e in p)])
        q = LabelQueue(store, 'shop', labeller)
        fill_queue(q, [*ones, *sides], audit=0, twice=0)
        return q
    yield f
    for s in opened: s.close()

def act(w, kind, event, **more): return w.handle({'kind': kind, 'event': event, **more})

GOOD = {'item': 'e0', 'label': {'rating': 4}, 'seconds': 1.}

def test_a_label_is_saved_before_it_is_answered_and_counts_once(make_queue):
    w = LabelWidget(make_queue())
    for _ in range(3): assert act(w, 'label', 'a', **GOOD)['ok']
    assert [(e.item_id, e.label.rating, e.seconds) for e in label_events(make_queue())] == [('e0', 4, 1.)]
    assert w.view()['progress']['done'] == 1 and w.view()['items'][0]['id'] == 'e1'
    assert act(w, 'undo', 'b')['item']['id'] == 'e0' and act(w, 'undo', 'b')['item']['id'] == 'e0'
    assert act(w, 'undo', 'c')['item'] is None and w.view()['items'][0]['id'] == 'e0' and w.view()['progress']['done'] == 0

def test_undo_has_no_end_and_gives_back_what_was_said(make_queue):
    w = LabelWidget(make_queue(12))
    for i in range(12): assert act(w, *(('label', f'l{i}') if i % 3 else ('skip', f'l{i}')), **({'label': {'rating': 1 + i % 5, 'comment': f'c{i}'}, 'seconds': 1.} if i % 3 else {}), item=f'e{i}')['ok']
    assert w.view()['items'] == []
    again = LabelWidget(make_queue())     # as after a restart
    for i in reversed(range(12)):
        back = act(again, 'undo', f'u{i}')
        assert back['item']['id'] == f'e{i}' and (back['label'] or {}).get('comment') == (f'c{i}' if i % 3 else None) and again.view()['items'][0]['id'] == f'e{i}'
    assert standing_labels(make_queue()) == []

@pytest.mark.parametrize('msg', [{}, {'kind': 'label'}, {'kind': 'label', 'event': 'a'}, {'kind': 'label', **GOOD}, {'kind': 'label', 'event': '', **GOOD}, {'kind': 'label', 'event': 7, **GOOD}, {'kind': 'label', 'event': 'a' * 300, **GOOD},
    *({'kind': 'label', 'event': 'a', **GOOD, **bad} for bad in ({'item': 'nothing'}, {'item': 3}, {'item': ''}, {'seconds': -1}, {'seconds': math.inf}, {'seconds': 'long'}, {'label': None}, {'label': {}}, {'label': {'rating': 0}}, {'label': {'rating': 6}}, {'label': {'rating': True}},
      {'label': {'rating': math.nan}}, {'label': {'rating': '4'}}, {'label': {'pick': 'left'}}, {'label': {'rating': 4, 'stars': 1}}, {'label': {'rating': 4, 'aspects': {'taste': 1}}}, {'label': {'rating': 4, 'aspects': {'speed': 9}}}, {'label': {'rating': 4, 'aspects': [1]}},
      {'label': {'rating': 4, 'order': [1, 0]}}, {'label': {'rating': 4, 'comment': 'x' * 100_001}}, {'label': {'rating': 4, 'comment': 'a\0b'}}, {'label': {'rating': 4, 'comment': 5}})),
    {'kind': 'skip', 'event': 'a'}, {'kind': 'skip', 'event': 'a', 'item': 'nothing'}, {'kind': 'undo'}, {'kind': 'relabel', 'event': 'a'}])
def test_a_bad_act_is_answered_and_changes_nothing(make_queue, msg):
    w = LabelWidget(make_queue(2))
    answer = w.handle(msg | {'cid': 'x'})
    assert answer['ok'] is False and answer['cid'] == 'x' and answer['error'] and list(label_events(w.queue)) == [] and w.view()['progress']['done'] == 0

def test_sides_are_hidden_and_their_order_recorded(make_queue):
    w = LabelWidget(make_queue(0, 30), ahead=30)
    items = w.view()['items']
    shorts = [[m['text'] for m in i['responses']].index('Short.') for i in items]
    assert set(shorts) == {0, 1} and all(m.keys() == {'role', 'text', 'calls'} for i in items for m in (*i['messages'], *i['responses']))
    for k, (i, side) in enumerate(zip(items, shorts)): assert act(w, 'label', f'p{k}', item=i['id'], label={'pick': ('left', 'right', 'tie', 'both_bad')[side if k < 28 else k - 26]}, seconds=1.)['ok']
    labels = [e.label for e in standing_labels(w.queue)]
    assert [x.better for x in labels].count(0) == 28 and {x.order for x in labels} == {(0, 1), (1, 0)} and {x.pick for x in labels} == {'left', 'right', 'tie', 'both_bad'}
    publish_labels(w.queue)
    assert {(p.chosen, p.rejected) for p in read_preferences(w.queue.store)} == {('Short.', 'Long.')}

def test_a_suggestion_is_an_example_and_a_preference(make_queue):
    w = LabelWidget(make_queue(2))
    assert act(w, 'label', 'a', item='e0', label={'rating': 2, 'suggested_response': 'It is here.'}, seconds=1.)['ok']
    publish_labels(w.queue)
    assert [e.response.text for e in w.queue.store.examples() if e.source == 'human'] == ['It is here.'] and [(p.chosen, p.rejected) for p in read_preferences(w.queue.store)] == [('It is here.', 'It comes on day 0.')]

def test_drift_and_agreement_are_looked_at_now_and_then(make_queue, monkeypatch):
    import stateset_nb.widgets as room
    looks = []
    monkeypatch.setattr(room, 'label_drift', lambda q: looks.append(1) or [])
    w = LabelWidget(make_queue(40), every=10)
    for i in range(30): act(w, 'label', f'a{i}', item=f'e{i}', label={'rating': 1 + i % 5}, seconds=1.)
    until(lambda: len(looks) == 4)
    monkeypatch.undo()
    other = make_queue(40, labeller='bo')
    fill_queue(other, []), [other.label(f'e{i}', standing_labels(other)[0].label, seconds=1.) for i in range(12)]
    w.review()
    texts = [n['text'] for n in w.view()['notes']]
    assert any(t.startswith('time a label × 1.00 over the last 30') for t in texts) and any(t.startswith('agreement on 12 shared') for t in texts)
    assert all(t in w.record() for t in texts)

def test_labels_come_from_many_threads(make_queue):
    w, got = LabelWidget(make_queue(40), every=5), []
    def work(k): got.extend(act(w, 'label', f'a{k}-{i}', item=f'e{i}', label={'rating': 3}, seconds=1.)['ok'] for i in range(k, 40, 4))
    ts = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert all(got) and len(standing_labels(w.queue)) == len(got) == 40

def evil_labels(make_queue, i):
    "A widget whose talk, label and names are a payload."
    q, p = make_queue(0), PAYLOADS[i]
    q.store.add_many([TrainingExample(f'x{k}', (Message('user', p), Message('assistant', p, (ToolCall(p, p),))), Message('assistant', f'{p}{k}', (ToolCall(p, p),))) for k in range(3)])
    first, second, _ = q.store.examples()
    q = LabelQueue(q.store, p.replace('/', ''), p)
    fill_queue(q, [*q.store.examples()], audit=0, twice=0)
    w = LabelWidget(q)
    w._notes = [{'text': p, 'moved': True}]
    assert act(w, 'label', 'e', item=first.id, label={'rating': 3, 'comment': p, 'suggested_response': p}, seconds=1.)['ok']
    return w

@pytest.mark.parametrize('i', range(len(PAYLOADS)))
def test_nothing_said_becomes_markup_in_the_record_of_labels(make_queue, i):
    record = evil_labels(make_queue, i).record()
    assert set(re.findall(r'<([a-zA-Z]+)', record)) <= {'div', 'b', 'small', 'table', 'tr', 'th', 'td'}

# --- monitoring, without a browser

def board(name='shop', rule='slow', action='Read it.', metric='latency'):
    "A dashboard on which an alert fired in episode 2 and was over in episode 3."
    d = AdvancedDashboard(name, alerts=AlertManager(clock=lambda: 1e9))
    d.alerts.add_rule(AlertRule(rule, metric, 5, severity='error', action=action))
    for e, v in enumerate((.8, 1.1, 7.5, .9)): d.log_metric(metric, v, episode=e)
    for k, v in (('system/cpu', .42), ('system/gpu', .99), ('system/process_memory', 6.5e8), ('reward', math.nan)): d.log_metric(k, v)
    return d

def test_from_an_alert_to_its_conversation_to_the_queue(make_queue):
    q = make_queue(2)
    q.store.add_many([TrainingExample('2', talk(2, '').messages, Message('assistant', 'Later.'))])
    w = DashboardWidget(board(), q)
    resolved, fired = w.view()['alerts']
    assert (fired['state'], fired['step'], resolved['state'], resolved['step'], w.view()['firing']) == ('firing', 2, 'resolved', 3, 0)
    assert [m['text'] for m in w.handle({'kind': 'open', 'alert': fired['id']})['talk']['messages']] == ['Where is parcel 2?', 'Later.']
    assert [w.handle({'kind': 'ask', 'alert': fired['id']})['ok'] for _ in range(2)] == [True, True]
    assert q.next().id == '2' and q.progress().left == 3, 'sent twice, asked once'
    w.example_of = lambda a: 'e0'
    assert 'one more person' in w.handle({'kind': 'ask', 'alert': fired['id']})['said'] and q.progress().items == 3

@pytest.mark.parametrize(('msg', 'why'), [({'kind': 'open'}, 'lacks'), ({'kind': 'open', 'alert': 3}, 'expected'), ({'kind': 'ask', 'alert': 'x'}, 'no alert'), ({'kind': 'open', 'alert': 'last'}, 'no example'), ({'kind': 'buy', 'alert': 'x'}, 'unknown')])
def test_what_a_dashboard_cannot_do_is_said(make_queue, msg, why):
    w = DashboardWidget(board(), make_queue(2))
    if msg.get('alert') == 'last': msg = msg | {'alert': w.view()['alerts'][0]['id']}
    assert why in w.handle(msg)['error'] and w.queue.progress().items == 2
    bare = DashboardWidget(board())
    assert 'give queue=' in bare.handle({'kind': 'open', 'alert': 'x'})['error'] and not any(a['linked'] for a in bare.view()['alerts'])

def test_a_dashboard_looks_while_somebody_does():
    w = DashboardWidget(board(), patience=.3)
    w.rate = 50.
    seen = []
    w.front.send = lambda *a, **k: None
    w.front.observe(lambda c: seen.append(c['new']['metrics'][0]['count']), 'view')
    w._heard(w.front, {'kind': 'sync'}, [])
    w.dashboard.log_metric('latency', 1.)
    until(lambda: seen and seen[-1] == 5)
    until(lambda: w._timer is None and time.monotonic() - w._heard_at > .4)
    w.dashboard.log_metric('latency', 1.); time.sleep(.1)
    assert seen[-1] == 5
    w._heard(w.front, {'kind': 'hello'}, [])
    until(lambda: seen[-1] == 6)
    w.close()

def test_a_view_of_a_dashboard_is_json_and_its_record_is_escaped():
    for p in PAYLOADS:
        w = DashboardWidget(board(p, p, p, p))
        json.dumps(w.view(), allow_nan=False)
        assert set(re.findall(r'<([a-zA-Z]+)', w.record())) <= {'div', 'b', 'table', 'tr', 'th', 'td'}
    assert '42%' in w.record() and '620 MB' in w.record()

# --- in a bare page

@pytest.fixture
def page(chromium):
    p = chromium.new_page(viewport={'width': 1100, 'height': 800})
    p.faults = []
    p.on('pageerror', lambda e: p.faults.append(str(e)))
    p.on('console', lambda m: p.faults.append(m.text) if m.type == 'error' and 'ERR_' not in m.text else None)
    yield p
    faults = p.faults
    p.close()
    assert not faults

def data(page, **want):
    "Wait until the widget says so."
    page.wait_for_function('want => { const e = document.querySelector(".snb"); return e && Object.entries(want).every(([k, v]) => e.dataset[k] === v) }', arg={k: str(v) for k, v in want.items()})

def test_curves_are_drawn_and_follow(page):
    w = TrainingWidget(TrainingRun(), lambda: None, knobs=KNOBS, total=200)
    for i in range(1, 51): w.history.on_log(i, {'reward': i / 200, 'reward_std': .1})
    host = PageHost(page, w)
    data(page, drawn=50, state='ready')
    assert page.locator('figure:visible').count() == 1 and page.locator('canvas:visible').count() == 1, 'a metric that was never logged has no chart'
    for i in range(51, 61): w.history.on_log(i, {'reward': i / 200, 'kl': .01})
    host.flush()
    data(page, drawn=60, step=60)
    assert page.locator('figure:visible').count() == 2 and '60 / 200 rounds' in page.locator('.snb-time').inner_text()
    assert page.locator('[role=progressbar]').get_attribute('aria-valuenow') == '60'

def test_keys_and_buttons_do_the_same(page):
    w = widget()
    host = PageHost(page, w)
    page.locator('.snb').focus()
    page.keyboard.press('s'); data(page, state='running')
    until(lambda: w.history.step > 2)
    page.keyboard.press('p'); data(page, state='paused'); assert w.run.state == 'paused'
    page.keyboard.press('p'); data(page, state='running')
    page.locator('[data-act=pause]').click(); data(page, state='paused')
    page.locator('[data-act=resume]').click(); data(page, state='running')
    page.keyboard.press('x')
    w.wait(20); host.flush(); data(page, state='stopped')
    assert page.evaluate("document.querySelector('.snb').contains(document.activeElement)") and page.locator('[data-act=start]').inner_text().startswith('Go on')

def test_a_knob_is_turned_in_its_field_and_a_wrong_value_is_put_back(page):
    w = TrainingWidget(TrainingRun(), lambda: None, knobs=KNOBS)
    host = PageHost(page, w)
    field = page.locator('input[name=learning_rate]')
    field.fill('-3'); field.press('Enter')
    page.wait_for_function("document.querySelector('.snb-note').textContent.includes('must be above 0')")
    assert field.input_value() == '1e-4' and not w.run.pending
    field.fill('spx'); field.press('Tab')
    page.wait_for_function("document.querySelector('.snb-note').textContent.includes(\"'spx'\")")
    field.fill('2e-4'); field.press('Enter')
    page.wait_for_function("document.querySelector('.snb-wait').textContent === 'from the next round'")
    assert w.run.pending == {'learning_rate': 2e-4} and w.run.state == 'ready', 'keys in a field are text'
    page.keyboard.press('Escape')
    assert page.evaluate("document.activeElement.classList.contains('snb')")
    w.run.pending.clear(); w.history.on_run('knobs', {'step': 0, 'values': {'learning_rate': 2e-4}}); host.flush()
    page.wait_for_function("document.querySelector('.snb-wait').textContent === ''")

def test_runs_lie_over_each_other(page):
    old = RunHistory('yesterday')
    for i in range(1, 31): old.on_log(i, {'reward': .1})
    w = TrainingWidget(TrainingRun(), lambda: None, overlay=[old], label='today')
    for i in range(5, 16): w.history.on_log(i * 3, {'reward': .2})
    host = PageHost(page, w)
    data(page, runs=2, drawn=11)
    assert page.locator('.snb-legend').inner_text().split() == ['today', 'yesterday']
    old.on_log(31, {'reward': .3}); host.flush()
    page.wait_for_function("document.querySelector('.snb-now').textContent.split(' ').filter(Boolean).join() === '0.2,0.3'")

def test_samples_are_coloured_and_browsed(page):
    w = TrainingWidget(TrainingRun(), lambda: None)
    for k in (1, 2): w.history.samples.append(PlayedSample(k, f's{k}', ((.9, CreditView(('Hi', ' there', '!'), (0, 1, 1), (0., .8, -.4))),)))
    PageHost(page, w)
    data(page, samples=2)
    spans = page.locator('.snb-tokens span')
    assert 'Round 2' in page.locator('.snb-head').inner_text() and [spans.nth(i).get_attribute('class') for i in range(3)] == ['given', None, None]
    assert '46, 158, 91' in spans.nth(1).get_attribute('style').replace(',', ', ').replace('  ', ' ') and spans.nth(2).get_attribute('title') == 'advantage -0.400'
    page.locator('.snb').focus(); page.keyboard.press('ArrowLeft')
    page.wait_for_function("document.querySelector('.snb-head').textContent.includes('Round 1')")

def test_a_gap_is_noticed_and_mended(page):
    w = TrainingWidget(TrainingRun(), lambda: None)
    host = PageHost(page, w)
    for i in range(1, 11): w.history.on_log(i, {'reward': .1})
    w.push(); host._drain()            # a page that was asleep
    for i in range(11, 21): w.history.on_log(i, {'reward': .1})
    host.flush()
    data(page, drawn=20)
    assert page.locator('.snb-time').inner_text().startswith('20 rounds')

def test_a_kernel_that_is_busy_is_told_of(page):
    PageHost(page, TrainingWidget(TrainingRun(), lambda: None))
    data(page, waiting=0, state='ready')
    page.evaluate('() => { const send = model.send; model.send = () => {}; window.again = () => { model.send = send } }')
    page.locator('[data-act=start]').click()
    page.wait_for_selector('.snb-late:visible')
    assert 'busy' in page.locator('.snb-late').inner_text() and int(page.locator('.snb').get_attribute('data-waiting'))

def test_two_views_of_one_widget_and_one_that_goes(page):
    w = TrainingWidget(TrainingRun(), lambda: None)
    for i in range(1, 11): w.history.on_log(i, {'reward': .1})
    host = PageHost(page, w)
    page.evaluate("() => { window.second = window.mount('root2') }")
    page.wait_for_function("[...document.querySelectorAll('.snb')].length === 2 && [...document.querySelectorAll('.snb')].every(e => e.dataset.drawn === '10')")
    page.evaluate('window.second()')
    assert page.locator('.snb').count() == 1
    w.history.on_log(11, {'reward': .1}); host.flush(); data(page, drawn=11)
    page.evaluate('window.dispose()')
    assert page.evaluate("[Object.values(model.heard).flat().length, document.querySelectorAll('.snb').length]") == [0, 0]

def test_what_a_screen_reader_is_told(page):
    w = widget(100); PageHost(page, w)
    data(page, state='ready')
    said = page.locator('.snb').aria_snapshot()
    assert 'group "Training"' in said and 'button "Start s"' in said and 'progressbar "rounds done"' in said and 'textbox "learning_rate"' in said and 'button "Stop x" [disabled]' in said

def test_nothing_said_becomes_markup_on_the_page(page):
    for i, p in enumerate(PAYLOADS):
        w = evil(i)
        PageHost(page, w) if not i else page.evaluate('([out]) => { window.dispose(); model.state.view = out; window.dispose = window.mount("root") }', [json.loads(json.dumps(w.view()))])
        if i:
            m, bufs = w._stream.take(True)
            page.evaluate('out => model.take(out)', [{'msg': json.loads(json.dumps(m)), 'buffers': [base64.b64encode(b).decode() for b in bufs]}])
        data(page, drawn=3, samples=1, state='error')
        assert page.locator('.snb img, .snb script, .snb iframe, .snb a, .snb details, .snb style, .snb form').count() == 0 and p in page.locator('.snb').text_content()
        page.evaluate('html => { document.getElementById("root2").innerHTML = html }', w.record())
        assert page.locator('.snb-record img, .snb-record script, .snb-record iframe, .snb-record a').count() == 0
    page.evaluate('() => new Promise(r => setTimeout(r, 50))')
    assert page.evaluate('window.__pwn') is None and HARM in PAYLOADS[0]

# --- labelling, in a bare page

def waits(page, **want): page.wait_for_function('want => { const e = document.querySelector(".snb-label"); return e && Object.entries(want).every(([k, v]) => e.dataset[k] === v) }', arg={k: str(v) for k, v in want.items()})

def test_labels_by_keyboard(page, make_queue):
    w = LabelWidget(make_queue(3, 1))
    PageHost(page, w)
    waits(page, item='e0', done=0, left=4)
    page.locator('.snb').focus()
    page.keyboard.press('Enter')
    page.wait_for_function("document.querySelector('.snb-note').textContent.includes('Rate first')")
    for k in ('5', '4', '3', '2'): page.keyboard.press(k)
    page.keyboard.press('c'); page.keyboard.type('12s fine u'); page.keyboard.press('Escape')
    page.keyboard.press('e'); page.keyboard.type('It is here.'); page.keyboard.press('Control+Enter')
    waits(page, item='e1', done=1, pending=0, saved=1)
    assert page.locator('textarea').nth(0).input_value() == page.locator('textarea').nth(1).input_value() == ''
    page.keyboard.press('s'); waits(page, item='e2', saved=2)
    page.keyboard.press('2'); page.keyboard.press('ArrowDown'); page.keyboard.press('5'); page.keyboard.press('ArrowUp'); page.keyboard.press('ArrowUp'); page.keyboard.press('ArrowUp'); page.keyboard.press('3'); page.keyboard.press('Enter')
    waits(page, saved=3, done=2, left=1)
    assert page.locator('.snb-response').count() == 2 and page.locator('.snb-conversation').inner_text().split('\n')[0] == 'user'
    page.keyboard.press('b'); page.keyboard.press('ArrowRight'); page.keyboard.press('Enter')
    waits(page, saved=4, done=3, left=0, item='')
    assert 'Nothing is left' in page.locator('.snb-conversation').inner_text()
    first, pair, third = sorted(standing_labels(w.queue), key=lambda e: {'e0': 0, 'e2': 2}.get(e.item_id, 1))
    assert first.label.to_dict() | {'rating': 5, 'comment': '12s fine u', 'suggested_response': 'It is here.', 'aspects': {'tool_selection': 4, 'response_quality': 3, 'speed': 2}} == first.label.to_dict() and 0 < first.seconds < 60
    assert pair.label.pick == 'right' and third.label.rating == 3 and third.label.aspects == {'response_quality': 5}

def test_undo_by_key_brings_back_what_was_said(page, make_queue):
    w = LabelWidget(make_queue(3))
    PageHost(page, w)
    waits(page, item='e0'); page.locator('.snb').focus()
    page.keyboard.press('u'); page.wait_for_function("document.querySelector('.snb-note').textContent.includes('nothing to take back')")
    for k in ('4', 'Enter', '2', 'Enter', 's'): page.keyboard.press(k)
    waits(page, item='', pending=0)
    for item in ('e2', 'e1', 'e0'): page.keyboard.press('u'); waits(page, item=item, pending=0)
    assert page.locator('[data-choice=rating-4]').get_attribute('aria-checked') == 'true' and standing_labels(w.queue) == []
    page.locator('[data-choice=rating-1]').click(); page.locator('[data-act=label]').click()
    waits(page, item='e1', done=1)
    assert page.evaluate("document.activeElement.classList.contains('snb')") and [e.label.rating for e in standing_labels(w.queue)] == [1]

def test_a_lost_answer_is_asked_for_again_and_an_act_that_failed_comes_back(page, make_queue):
    w = LabelWidget(make_queue(3), retry_s=.2)
    PageHost(page, w)
    waits(page, item='e0', waiting=0)
    page.evaluate('() => { const take = model.take.bind(model); window.lost = 0; model.take = out => { if (out.some(o => o.msg?.of === "label") && window.lost++ < 2) return; take(out) } }')
    page.locator('.snb').focus(); page.keyboard.press('4'); page.keyboard.press('Enter')
    waits(page, item='e1', pending=0, saved=1, waiting=0)
    assert page.evaluate('window.lost') >= 3 and len(list(label_events(w.queue))) == 1
    said = w.queue.label
    def full(*a, **k): raise DataError('the disk is full')
    w.queue.label = full
    page.keyboard.press('5'); page.keyboard.press('Enter')
    page.wait_for_function("document.querySelector('.snb-note').textContent.includes('the disk is full')")
    waits(page, item='e1', pending=0, done=1)
    assert page.locator('[data-choice=rating-5]').get_attribute('aria-checked') == 'true'
    w.queue.label = said
    page.keyboard.press('Enter'); waits(page, done=2, item='e2')

def test_two_views_of_a_label_widget(page, make_queue):
    w = LabelWidget(make_queue(2))
    PageHost(page, w)
    page.evaluate("() => { window.second = window.mount('root2') }")
    page.locator('.snb').first.focus(); page.keyboard.press('3'); page.keyboard.press('Enter')
    page.wait_for_function("[...document.querySelectorAll('.snb')].every(e => e.dataset.item === 'e1' && e.dataset.done === '1')")
    page.evaluate('() => { window.dispose(); window.second() }')
    assert page.evaluate("[Object.values(model.heard).flat().length, document.querySelectorAll('.snb').length]") == [0, 0]

def test_what_a_screen_reader_is_told_of_labels(page, make_queue):
    PageHost(page, LabelWidget(make_queue(2)))
    waits(page, item='e0')
    said = page.locator('.snb').aria_snapshot()
    assert all(x in said for x in ('group "Label responses"', 'radiogroup "overall"', 'radio "5"', 'textbox "comment"', 'button "Save Enter"', 'progressbar "labelled"'))

def test_nothing_said_becomes_markup_in_the_label_widget(page, make_queue, tmp_path):
    host = None
    for i, p in enumerate(PAYLOADS):
        w = evil_labels(lambda n, i=i: LabelQueue(TrainingStore(f'sqlite:///{tmp_path}/{i}.db')), i)
        if host is None: host = PageHost(page, w)
        else: host.swap(w)
        waits(page, done=1)
        assert page.locator('.snb :is(img, script, iframe, a, details, style, form)').count() == 0 and page.locator('.snb').text_content().count(p) >= 4
        page.evaluate('html => { document.getElementById("root2").innerHTML = html }', w.record())
        assert page.locator('.snb-record :is(img, script, iframe, a)').count() == 0
    page.evaluate('() => new Promise(r => setTimeout(r, 50))')
    assert page.evaluate('window.__pwn') is None

# --- monitoring, in a bare page

def watches(page, **want): page.wait_for_function('want => { const e = document.querySelector(".snb-monitor"); return e && Object.entries(want).every(([k, v]) => e.dataset[k] === v) }', arg={k: str(v) for k, v in want.items()})

def test_an_alert_is_followed_by_keyboard(page, make_queue):
    q = make_queue(2)
    q.store.add_many([TrainingExample('2', talk(2, '').messages, Message('assistant', 'Later.'))])
    w = DashboardWidget(board(), q)
    host = PageHost(page, w)
    watches(page, alerts=2, firing=0)
    assert page.locator('.snb-metrics tbody tr').count() == int(page.locator('.snb').get_attribute('data-metrics')) and page.locator('.snb-spark').count() >= 1 and page.locator('[role=meter]').count() == 2
    page.locator('.snb').focus()
    for k in ('ArrowDown', 'ArrowDown', 'Enter'): page.keyboard.press(k)
    watches(page, open=2)
    assert page.locator('.snb-about').inner_text().endswith('Later.')
    page.keyboard.press('q'); watches(page, asked=1)
    assert q.next().id == '2' and 'in the queue shop' in page.locator('.snb-note').inner_text()
    w.dashboard.log_metric('latency', 9., episode=4); host.flush()
    watches(page, alerts=3, firing=1)
    assert page.locator('.snb-alerts .here').inner_text().find('#2') > 0, 'the chosen one stays chosen'
    page.keyboard.press('x'); watches(page, open='')
    page.locator('.snb-alerts li').first.click()
    page.wait_for_function("document.querySelector('.snb-note').textContent.includes('no example')")

def test_nothing_said_becomes_markup_in_the_dashboard(page, make_queue):
    q, host = make_queue(1), None
    for i, p in enumerate(PAYLOADS):
        q.store.add_many([TrainingExample(f'p{i}', (Message('user', p),), Message('assistant', p + str(i)))])
        w = DashboardWidget(board(p, p, p, p), q, lambda a, i=i: f'p{i}')
        if host is None: host = PageHost(page, w)
        else: host.swap(w)
        watches(page, alerts=2)
        page.locator('.snb-alerts li').first.click(); watches(page, open=f'p{i}')
        assert page.locator('.snb :is(img, script, iframe, a, details, style, form)').count() == 0 and page.locator('.snb').text_content().count(p) >= 5
        page.evaluate('html => { document.getElementById("root2").innerHTML = html }', w.record())
        assert page.locator('.snb-record :is(img, script, iframe, a)').count() == 0
    page.evaluate('() => new Promise(r => setTimeout(r, 50))')
    assert page.evaluate('window.__pwn') is None

class Toy(LiveWidget):
    "What the next widget needs to say."
    def __init__(self): super().__init__(); self.n = 0
    def actions(self): return {'add': lambda m: setattr(self, 'n', self.n + message_field(m, 'by', int))}
    def view(self): return {'n': self.n}
    def record(self): return f'<b>{self.n}</b>'
    def files(self):
        vendor, style = front_files('train')
        kit = vendor[:vendor.index('// The training widget')]
        return kit + 'export default widget("toy", "Toy", kit => { const n = h("b"); kit.root.append(n); return { paint: v => { n.textContent = v.n }, keys: { a: () => kit.ask("add", {by: 2}) } } })', style

def test_another_widget_takes_few_lines(page):
    toy = Toy()
    PageHost(page, toy)
    page.locator('.snb-toy').focus(); page.keyboard.press('a'); page.keyboard.press('a')
    page.wait_for_function("document.querySelector('.snb-toy b').textContent === '4'")
    assert toy.n == 4
