"""The labelling queue on SQLite and on PostgreSQL: nobody is given what somebody else has, everything can be taken back, and what was acknowledged stays."""
import itertools, json, math, signal, subprocess, sys, threading
from collections import Counter
from dataclasses import replace
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings, strategies as st

from stateset_nb import labelling as L
from stateset_nb.core import ConfigError, DataError, Message, Preference, RewardExample, TrainingExample
from stateset_nb.flywheel import read_labels
from stateset_nb.labelling import (Label, LabelEvent, LabelQueue, ask_again, export_labels, farthest_first, fill_queue, label_events, plan_labels, publish_labels, rank_queue,
                                   replay, shown_order, standing, standing_labels)
from stateset_nb.reward_model import RewardDataset
from stateset_nb.store import TrainingStore, forget_user, read_feedback

def talk(i, **kw): return TrainingExample(f't{i}', (Message('user', f'Where is order {i}?'),), Message('assistant', f'Order {i} is shipped.'), **kw)

@pytest.fixture
def store(database):
    with TrainingStore(database) as s: yield s

def queue_of(store, n=6, name='q', labeller='ann', **kw):
    "A queue of `n` talks, each asked once unless said otherwise."
    store.add_many([talk(i) for i in range(n)])
    q = LabelQueue(store, name, labeller, **{k: v for k, v in kw.items() if k in ('lease_s', 'clock', 'seed')})
    fill_queue(q, [talk(i) for i in range(n)], **({'twice': 0} | {k: v for k, v in kw.items() if k in ('twice', 'audit', 'value')}))
    return q

def check(q):
    "What the tables hold beside the log is what the log says."
    log = list(label_events(q))
    stands = standing(log)
    assert standing_labels(q) == [stands[k] for k in sorted(stands) if stands[k].kind == 'label']
    piles = replay(log)
    with q.store.reading() as c:
        kept = {(r.item_id, r.labeller): r.kind for r in c.execute(sa.select(L.STANDING).where(L._of(L.STANDING, q.name)))}
        needs = {r.item_id: r.wanted - r.need for r in c.execute(sa.select(L.ITEMS).where(L._of(L.ITEMS, q.name)))}
        counts = {r.labeller: (r.done, r.skipped) for r in c.execute(sa.select(L.PILES).where(L._of(L.PILES, q.name)))}
        tops = {r.labeller: r.top for r in c.execute(sa.select(L.PILES).where(L._of(L.PILES, q.name)))}
        numbers = {(r.labeller, r.n): r.event_id for r in c.execute(sa.select(L.EVENTS).where(L._of(L.EVENTS, q.name)))}
    assert kept == {k: e.kind for k, e in stands.items()}
    assert needs == {i: sum(k[0] == i and e.kind == 'label' for k, e in stands.items()) for i in needs}
    for who, (done, skipped) in counts.items(): assert (done, skipped) == tuple(sum(k[1] == who and e.kind == kind for k, e in stands.items()) for kind in ('label', 'skip'))
    for who, top in tops.items(): assert (numbers[who, top] if top else None) == (piles[who][-1].id if piles.get(who) else None)

# ---- the log

acts = st.lists(st.tuples(st.sampled_from(['label', 'label', 'skip', 'undo', 'undo', 'again', 'reopen']), st.sampled_from(['ann', 'ben']), st.integers(0, 1), st.integers(1, 5)), min_size=8, max_size=24)
count = itertools.count()

def do(views, sent, kind, who, i, rating):
    "One act on the queue; 'again' sends the act before it once more."
    if kind == 'again' and who in sent: kind, i, rating, key = sent[who]
    else: key = f'key-{next(count)}'
    if kind in ('again', 'reopen'): return
    q = views[who]
    if kind == 'label': q.label(f't{i}', Label(rating), key)
    elif kind == 'skip': q.skip(f't{i}', key)
    else: q.undo(key)
    sent[who] = kind, i, rating, key

@pytest.mark.parametrize('kind', ['sqlite', 'postgresql'])
def test_any_sequence_of_acts_replayed_gives_the_same_state(kind, request, tmp_path_factory):
    url = f'sqlite:///{tmp_path_factory.mktemp("log")}/s.db' if kind == 'sqlite' else request.getfixturevalue('postgres')()
    taken_back = []
    with TrainingStore(url) as first:
        @settings(max_examples=40 if kind == 'sqlite' else 15)
        @given(acts)
        def run(steps):
            name = f'q{next(count)}'
            queue_of(first, 3, name, twice=.5)
            stores = [first]
            views, sent = {who: LabelQueue(first, name, who) for who in ('ann', 'ben')}, {}
            try:
                for step in steps:
                    if step[0] == 'reopen':
                        stores.append(TrainingStore(url))
                        views = {who: LabelQueue(stores[-1], name, who) for who in views}
                    do(views, sent, *step)
                check(views['ann'])
                taken_back.append(sum(e.kind == 'undo' for e in label_events(views['ann'])))
            finally:
                for s in stores[1:]: s.close()
        run()
    assert max(taken_back) >= 3   # the sequences do take back

words = st.builds(LabelEvent, st.uuids().map(str), st.sampled_from(['ann', 'ben']), st.just('label'), st.sampled_from('xyz'), st.builds(Label, st.integers(1, 5)))
events = st.lists(words | words.map(lambda e: replace(e, kind='skip', label=None)) | words.map(lambda e: replace(e, kind='undo', label=None)), max_size=20)

@given(events, words, st.data())
def test_an_undo_is_exactly_the_reverse_of_what_it_takes_back(log, e, data):
    assert replay([*log, e, LabelEvent('undo', e.labeller, 'undo', '')]) == replay(log) | {e.labeller: replay(log).get(e.labeller, ())}
    twice = [x for x in log for _ in range(data.draw(st.integers(1, 3)))]
    assert replay(twice) == replay(log)
    assert all(LabelEvent.from_dict(json.loads(json.dumps(x.to_dict()))) == x for x in log)

def test_undo_goes_back_to_the_beginning_across_restarts(database):
    with TrainingStore(database) as s:
        q = queue_of(s, 12)
        for i in range(12): q.label(f't{i}', Label(1 + i % 5))
        for i in range(12): q.label(f't{i}', Label(5), f'second-{i}')
    back = []
    for _ in range(5):
        with TrainingStore(database) as s:
            q = LabelQueue(s, 'q', 'ann')
            back += [q.undo() for _ in range(6)]
    assert [e and e.item_id for e in back] == [f't{i}' for i in range(11, -1, -1)] * 2 + [None] * 6
    with TrainingStore(database) as s:
        q = LabelQueue(s, 'q', 'ann')
        check(q)
        assert len(list(label_events(q))) == 48 and standing_labels(q) == [] and q.progress().done == 0
        assert q.next() is not None

def test_what_was_taken_back_comes_first_and_the_last_one_before_the_others(store):
    q = queue_of(store)
    given_out = [q.next().id]
    for _ in range(3):
        q.label(given_out[-1], Label(3))
        given_out.append(q.next().id)
    for _ in range(3): q.undo()
    assert [i.id for i in q.upcoming(4)] == given_out[:4]

def test_the_undo_of_a_second_thought_brings_the_first_back(store):
    q = queue_of(store)
    for kind in (lambda: q.label('t0', Label(2)), lambda: q.skip('t0'), lambda: q.label('t0', Label(4))): kind()
    assert [(q.undo().item_id, [e.label.rating for e in standing_labels(q)]) for _ in range(3)] == [('t0', []), ('t0', [2]), ('t0', [])]
    check(q)

# ---- sending again

def test_one_act_sent_by_many_threads_at_once_counts_once(store):
    q = queue_of(store)
    views, got = [LabelQueue(store, 'q', 'ann') for _ in range(6)], []
    threads = [threading.Thread(target=lambda v=v: got.append(v.label('t1', Label(4), 'the-key'))) for v in views]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(e.at for e in got)) == 1 and len(got) == 6
    assert [e.id for e in label_events(q)] == ['the-key']
    q.undo('back')
    assert q.undo('back') == q.undo('back') and standing_labels(q) == [] and len(list(label_events(q))) == 2

@pytest.mark.parametrize('act, says', [
    (lambda q: q.label('t1', Label(3), 'key'), "'key' was used for a label of 't0' by 'ann'"), (lambda q: q.label('t0', Label(3), 'key'), 'expected a new id'),
    (lambda q: q.undo('key'), 'expected a new id'), (lambda q: q.skip('t0', 'key'), 'expected a new id'), (lambda q: LabelQueue(q.store, 'q', 'ben').label('t0', Label(4), 'key'), 'expected a new id'),
    (lambda q: q.label('lost', Label(3)), "'lost' is not in the queue"), (lambda q: q.skip('lost'), "'lost' is not in the queue"), (lambda q: q.label('t0', Label(pick='left')), 'expected a rating'),
    (lambda q: q.label('t0', Label(3), 'x' * 201), 'at most 200'), (lambda q: q.label('t0', Label(3), 'a\0'), 'without NUL'), (lambda q: q.label('t0', Label(3), seconds=math.nan), 'from 0 up'),
    (lambda q: q.label('t0', Label(3, comment='cut \ud83d')), 'half emoji'), (lambda q: fill_queue(q, [talk(99)]), 'the database refuses it'), (lambda q: LabelQueue(q.store, 'q', ''), 'expected two names'),
    (lambda q: fill_queue(q, [talk(0)], audit=3), 'try 0.2'), (lambda q: fill_queue(q, [(talk(0), talk(1))]), 'one prompt')], ids=lambda x: x if isinstance(x, str) else '')
def test_what_cannot_be_is_refused_and_leaves_nothing(store, act, says):
    q = queue_of(store)
    q.label('t0', Label(4), 'key')
    with pytest.raises((DataError, ConfigError), match=says): act(q)
    check(q)
    assert [e.id for e in label_events(q)] == ['key']

# ---- several people

WORKER = '''
import sys
from stateset_nb.labelling import Label, LabelQueue
from stateset_nb.store import TrainingStore
url, who, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
q = LabelQueue(TrainingStore(url), 'q', who)
items = q.upcoming(3)       # a page looks ahead
print('ready', flush=True); sys.stdin.readline()
for k in range(most):
    if not items: break
    print('holds', *[i.id for i in items], flush=True)
    q.label(items[0].id, Label(3), f'{who}-{k}')
    print('done', f'{who}-{k}', items[0].id, flush=True)
    items = q.upcoming(3)
'''

def workers(url, names, most=1000):
    "Processes that label, started together."
    ps = [subprocess.Popen([sys.executable, '-c', WORKER, url, who, str(most)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for who in names]
    for p in ps: assert p.stdout.readline() == 'ready\n'
    for p in ps: p.stdin.write('go\n'); p.stdin.flush()
    return ps

def test_two_labellers_in_two_processes_never_get_the_same_item(database, store):
    q = queue_of(store, 60)
    outs = [p.communicate(timeout=120)[0].split('\n') for p in workers(database, ['ann', 'ben'])]
    held = [{i for line in out if line.startswith('holds') for i in line.split()[1:]} for out in outs]
    assert not held[0] & held[1] and len(held[0] | held[1]) == 60
    assert all(held), 'both had work'
    assert Counter(e.item_id for e in label_events(q)) == {f't{i}': 1 for i in range(60)}
    check(q)

def test_what_is_asked_twice_is_asked_of_two_people(database, store):
    q = queue_of(store, 16, twice=1)
    for p in workers(database, ['ann', 'ben', 'cyd']): p.communicate(timeout=120)
    said = Counter((e.item_id, e.labeller) for e in label_events(q))
    assert set(said.values()) == {1} and Counter(i for i, _ in said) == {f't{i}': 2 for i in range(16)}
    check(q)

@pytest.mark.parametrize('after', [1, 9])
def test_a_labeller_killed_in_mid_label_loses_nothing_acknowledged(database, store, after):
    q = queue_of(store, 400)
    p, = workers(database, ['ann'])
    told = []
    while len(told) < after:
        line = p.stdout.readline()
        if line.startswith('done'): told.append(line.split()[1])
    p.send_signal(signal.SIGKILL)
    told += [line.split()[1] for line in p.communicate()[0].split('\n') if line.startswith('done') and len(line.split()) == 3]
    assert p.returncode == -signal.SIGKILL and len(told) < 400
    kept = [e.id for e in label_events(q)]
    assert kept[:len(told)] == told and len(kept) - len(told) <= 1   # at most the one that was under way
    check(q)
    again = LabelQueue(store, 'q', 'ann')
    assert again.label(again.next().id, Label(5)).label.rating == 5
    assert again.undo() and again.undo().id and len(standing_labels(again)) == len(kept) - 1

def test_leases_end_and_a_late_answer_is_kept(store):
    now = [0.]
    ann = queue_of(store, 1, lease_s=60, clock=lambda: now[0])
    ben = LabelQueue(store, 'q', 'ben', 60, clock=lambda: now[0])
    assert ann.next().id == 't0' and ben.next() is None
    now[0] = 59
    assert ann.next().id == 't0' and ben.next() is None   # looked at again, kept for longer
    now[0] = 118
    assert ben.next() is None
    now[0] = 119.5
    assert ben.next().id == 't0' and ann.next() is None
    ann.label('t0', Label(2))
    ben.label('t0', Label(3))
    assert len(standing_labels(ann)) == 2 and ann.next() is None and ben.next() is None
    check(ann)

def test_a_skipped_item_goes_to_others_and_comes_back_only_when_they_do_not_hold_it(store):
    ann = queue_of(store, 2)
    ben = LabelQueue(store, 'q', 'ben')
    first = ann.next().id
    ann.skip(first)
    assert first not in {i.id for i in ann.upcoming(2)}
    assert ben.next().id == first
    assert ann.undo().item_id == first and first not in {i.id for i in ann.upcoming(2)}
    ben.skip(first)
    assert first in {i.id for i in ann.upcoming(2)}

def test_nothing_is_lost_from_sight_however_often_the_order_changes(store):
    q = queue_of(store, 90)
    rng, seen = np.random.default_rng(0), []
    while (item := q.next()) is not None:
        seen.append(item.id)
        q.label(item.id, Label(3))
        if len(seen) % 25 == 0: rank_queue(q, {f't{i}': float(rng.random()) for i in range(90)})
    assert sorted(seen) == sorted(f't{i}' for i in range(90))
    ask_again(q, ['t7'])
    assert q.next() is None and LabelQueue(store, 'q', 'ben').next().id == 't7'

def test_a_new_order_holds_from_the_next_item_on_and_leaves_the_audit_alone(store):
    q = queue_of(store, 60, audit=.5)
    with store.reading() as c: by_chance = {r.item_id: r.rank for r in c.execute(sa.select(L.ITEMS).where(L._of(L.ITEMS, 'q', reason='audit')))}
    held = q.upcoming(4)
    best = [f't{i}' for i in range(59, -1, -1) if f't{i}' not in by_chance and f't{i}' not in {h.id for h in held}]
    assert rank_queue(LabelQueue(store, 'q', 'owner'), {i: 100. - k for k, i in enumerate(best)}) == 30
    got = [i.id for i in q.upcoming(24)]
    assert got[:4] == [h.id for h in held] and [i for i in got[4:] if i not in by_chance][:6] == best[:6]
    with store.reading() as c: assert by_chance == {r.item_id: r.rank for r in c.execute(sa.select(L.ITEMS).where(L._of(L.ITEMS, 'q', reason='audit')))}

# ---- pairs

def test_sides_are_hidden_drawn_and_recorded(store):
    answers = [(talk(i), replace(talk(i), id=f'b{i}', response=Message('assistant', f'B says {i}.'), model='secret-model')) for i in range(40)]
    store.add_many([e for pair in answers for e in pair])
    q = LabelQueue(store, 'pairs', 'ann')
    fill_queue(q, answers, twice=0)
    left = Counter()
    while (item := q.next()) is not None:
        assert 'secret' not in json.dumps(item.to_dict()) and q.item(item.id) == item
        b_left = item.responses[0].text.startswith('B')
        left[b_left] += 1
        q.label(item.id, Label(pick='left' if b_left else 'right', order=(0, 1)))   # what a page says of the order does not count
    assert 10 <= left[True] <= 30
    assert {e.label.better for e in standing_labels(q)} == {1} and {e.label.order for e in standing_labels(q)} == {(0, 1), (1, 0)}
    assert all(e.label.order == shown_order(e.item_id, 'ann') for e in standing_labels(q))

# ---- where labels go

def test_labels_go_into_the_reward_model_without_new_code(store, tmp_path):
    q = queue_of(store, 8, twice=1)
    ben = LabelQueue(store, 'q', 'ben')
    for i in range(8): q.label(f't{i}', Label(1 + i % 5)); ben.label(f't{i}', Label(1 + (i + 1) % 5))
    q.label('t3', Label(2, suggested_response='Order 3 comes on Monday.'))
    other = replace(talk(1), id='b1', response=Message('assistant', 'No idea.'))
    store.add(other)
    fill_queue(q, [(talk(1), other)])
    q.label('t1⟷b1', Label(pick='left' if shown_order('t1⟷b1', 'ann')[0] == 0 else 'right'))
    done = export_labels(q, tmp_path/'labels.jsonl')
    assert (done.ratings, done.preferences, done.suggestions, done.ties) == (8, 1, 1, 0)
    data = RewardDataset.load(tmp_path/'labels.jsonl')
    rated, chosen = [e for e in data if isinstance(e, RewardExample)], [e for e in data if isinstance(e, Preference)]
    assert [(e.scale, e.ratings, e.score) for e in rated][0] == ((1, 5), (1, 2), 1.5) and rated[0].prompt == talk(0).messages
    assert {(p.chosen, p.rejected) for p in chosen} == {('Order 1 is shipped.', 'No idea.'), ('Order 3 comes on Monday.', 'Order 3 is shipped.')}
    assert len(read_labels(str(tmp_path/'labels.jsonl'))) == 10   # what `improve --labels` calls
    assert data.notes[0]['labellers'] == ['ann', 'ben'] and {n['reason'] for n in data.notes} == {'audit', 'value'}
    first = (tmp_path/'labels.jsonl').read_bytes()
    export_labels(ben, tmp_path/'labels.jsonl')
    assert (tmp_path/'labels.jsonl').read_bytes() == first

def test_published_labels_are_feedback_and_follow_an_undo(store):
    q = queue_of(store, 3)
    q.label('t0', Label(5, aspects={'speed': 4}, comment='fine', suggested_tools=('track',)))
    q.label('t0', Label(1))
    assert publish_labels(q) == 1 and store.get('t0').labels['quality'] == 0
    q.undo()
    assert (publish_labels(q), publish_labels(q)) == (1, 0) and store.get('t0').labels['quality'] == 5
    f, = read_feedback(store)
    assert (f.aspects, f.comment, f.suggested_tools, f.labeller) == ({'speed': 4}, 'fine', ('track',), 'ann')
    q.undo()
    assert publish_labels(q) == 1 and not list(read_feedback(store)) and store.get('t0').labels.get('quality') is None

def test_who_is_forgotten_is_forgotten_here_too(store):
    store.add_many([talk(i, user=f'u{i % 2}') for i in range(4)])
    q = LabelQueue(store, 'q', 'ann')
    fill_queue(q, [talk(i) for i in range(4)], twice=0)
    for i in range(4): q.label(f't{i}', Label(3, comment=f'word {i}'))
    assert forget_user(store, 'u1') == 2
    assert {e.item_id for e in label_events(q)} == {'t0', 't2'}
    with store.reading() as c: assert 'word 1' not in str(c.execute(sa.select(L.SAID)).all())
    assert [e and e.item_id for e in (q.undo(), q.undo(), q.undo())] == ['t2', 't0', None]   # those between are passed over
    assert {i.id for i in q.upcoming(9)} == {'t0', 't2'}

def test_personal_data_in_comments_is_taken_out(store):
    q = queue_of(store, 1)
    e = q.label('t0', Label(3, comment='Call mei.davis@example.com', suggested_response='Write to mei.davis@example.com'), 'k')
    assert 'example.com' not in json.dumps(e.to_dict())
    assert q.label('t0', Label(3, comment='Call mei.davis@example.com', suggested_response='Write to mei.davis@example.com'), 'k') == e   # sent again
    with store.reading() as c: assert 'example.com' not in str(c.execute(sa.select(L.SAID)).all())

def test_talk_is_escaped_where_it_is_shown(store):
    evil = '<img src=x onerror=alert(1)><script>alert(2)</script>"\'&'
    store.add(TrainingExample('x', (Message('user', evil),), Message('assistant', evil)))
    q = LabelQueue(store, 'q', 'ann')
    fill_queue(q, [store.get('x')])
    html = q.next()._repr_html_()
    assert '<img' not in html and '<script' not in html and '&lt;img' in html

# ---- the mathematics

@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 9), st.data())
def test_the_audit_does_not_depend_on_what_is_valued(n, audit, seed, data):
    ids = [f'e{i}' for i in range(n)]
    one, two = ([data.draw(st.floats(0, 1)) for _ in ids] for _ in range(2))
    a, b = plan_labels(ids, one, None, audit, seed=seed), plan_labels(ids, two, None, audit, seed=seed)
    assert sorted(p.position for p in a) == list(range(n))
    assert [(i, p.position) for i, p in enumerate(a) if p.reason == 'audit'] == [(i, p.position) for i, p in enumerate(b) if p.reason == 'audit']
    assert sum(p.reason == 'audit' for p in a) == math.floor(n * audit + 1e-9)
    worth = [one[p.position] for p in a if p.reason == 'value']
    assert worth == sorted(worth, reverse=True)
    spread = plan_labels(ids, one, min(5, n), audit, [[v, 1] for v in two], seed)
    assert len({p.position for p in spread}) == min(5, n)

@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=20), st.integers(1, 20))
def test_each_pick_is_the_farthest_from_those_before(points, n):
    x, picked = np.array(points), farthest_first(points, n)
    assert len(set(picked)) == min(n, len(points))
    for k in range(1, len(picked)):
        far = [min(((x[i] - x[j]) ** 2).sum() for j in picked[:k]) for i in range(len(x)) if i not in picked[:k]]
        assert min(((x[picked[k]] - x[j]) ** 2).sum() for j in picked[:k]) == max(far)
