"""The store on SQLite and on PostgreSQL: what goes in comes out, personal data does not, and a process that dies takes nothing with it."""
import asyncio, hashlib, json, re, signal, sqlite3, subprocess, sys, threading
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, strategies as st

from stateset_nb import store as S
from stateset_nb.core import (BackendError, ConfigError, Conversation, DataError, Feedback, Message, Preference, ToolCall, TrainingExample, Trajectory, demo_conversations, write_jsonl)
from stateset_nb.store import (STEPS, ExampleFilter, ExportReport, Redactor, TrainingDataCollector, TrainingStore, add_feedback, add_preference, export_file, forget_user, ingest_file, migrate,
                               read_feedback, read_preferences, set_labels, to_dataset, to_pandas, withdraw_feedback)

def example(i='a', said='It is shipped.', **kw): return TrainingExample(i, (Message('user', 'Where is order 4712?'),), Message('assistant', said), **kw)

@pytest.fixture
def store(database):
    with TrainingStore(database) as s: yield s

# ---- what goes in comes out

words = st.text(st.characters(exclude_categories=('Cs',)), max_size=20)
names = words.filter(lambda s: '\0' not in s)
json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False) | words, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=6)
messages = st.builds(Message, st.sampled_from(['user', 'assistant', 'system', 'tool']), words, st.lists(st.builds(ToolCall, words, words, st.none() | words), max_size=2).map(tuple))
example_of = st.builds(TrainingExample, names.filter(bool), st.lists(messages, min_size=1, max_size=3).map(tuple), messages, names | st.none(), st.sampled_from(['log', 'human']),
                       st.fixed_dictionaries({}, optional={'quality': st.none() | st.floats(0, 5), 'confidence': st.floats(0, 1)}), st.fixed_dictionaries({}, optional={'latency_s': st.floats(0, 9)}),
                       context=st.dictionaries(words, json_values, max_size=2), agent=names, model=names, created_at=st.sampled_from(['2026-01-31T12:00:00+01:00', '2026-02-01']), trial=st.integers(0, 9))

def plain(v): return json.loads(json.dumps(v))

@pytest.fixture(scope='module', params=['sqlite', 'postgresql'])
def wide(request, tmp_path_factory):
    "One store for many examples, which keeps everything as it came."
    url = f'sqlite:///{tmp_path_factory.mktemp("wide")}/store.db' if request.param == 'sqlite' else request.getfixturevalue('postgres')()
    with TrainingStore(url, redactor=None) as s: yield s

@given(e=example_of)
def test_an_example_comes_back_as_it_was(wide, e):
    with wide.begin() as c: c.execute(S.EXAMPLE.delete())
    assert wide.add_many([e]) == [('added', e.id)]
    got = wide.get(e.id)
    assert plain(got.to_dict()) == plain(wide.ready(e).to_dict()) and got.created_at.endswith('+00:00')
    assert wide.add(e) == got

def test_pages_hold_every_example_once_and_in_order(store):
    ids = [f'{c}{i}' for i in range(700) for c in 'aBé_']
    for k in range(0, len(ids), 500): store.add_many([example(i, i) for i in ids[k:k+500]])
    assert [e.id for e in store.examples()] == sorted(ids) and store.count() == len(ids)  # by code point, whatever the server's language

def test_a_reader_that_stops_halfway_stops_no_writer(store):
    store.add_many([example(str(i), str(i)) for i in range(5)])
    half = store.examples()
    next(half)
    store.add(example('z', 'z'))
    assert [e.id for e in half] == ['1', '2', '3', '4']

bad_examples = {
    'quality': (dict(labels={'quality': 6.0}), 'expected 0 to 5'), 'satisfaction': (dict(labels={'satisfaction': -1.0}), 'expected 0 to 5'), 'tools': (dict(labels={'tools_correct': 2.0}), 'expected 0 to 1'),
    'nan': (dict(labels={'quality': float('nan')}), 'expected a number'), 'bool': (dict(labels={'quality': True}), 'expected a number'), 'text': (dict(metrics={'tokens': 'many'}), 'expected a number'),
    'none': (dict(metrics={'tokens': None}), 'expected a number'), 'nul': (dict(id='a\0'), 'none of them NUL'), 'long': (dict(agent='a'*600), 'at most 512'), 'number': (dict(run_id=7), 'expected text'),
    'time': (dict(created_at='soon'), 'expected a time'), 'surrogate': (dict(response=Message('assistant', 'a\ud83d')), 'cut|cannot be written|half a character'), 'object': (dict(context={'a': object()}), 'cannot be written down'),
    'infinite': (dict(context={'a': float('inf')}), 'cannot be written down'), 'half an id': (dict(id='\udc00'), 'cannot be written down'), 'kind': (dict(labels=[4]), 'expected an object'), 'talk': (dict(messages=Message('user', 'Hi')), 'of another kind')}

@pytest.mark.parametrize('fault', bad_examples)
def test_a_bad_example_is_refused_and_its_batch_with_it(wide, fault):
    change, says = bad_examples[fault]
    with wide.begin() as c: c.execute(S.EXAMPLE.delete())
    with pytest.raises(DataError, match=says): wide.add_many([example('good', 'good'), replace(example(), **change)])
    assert wide.count() == 0

# ---- labels, feedback, preferences

def test_people_outrank_the_machine_and_may_change_their_minds(store):
    store.add(example(labels={'quality': 1.0}, label_sources={'quality': 'judge'}))
    state = lambda: (store.get('a').labels['quality'], [s for s in S.LABEL_STATES if store.count(ExampleFilter(label_state=s))])
    assert state() == (1.0, ['machine'])
    for who, rating, q in (('ann', 5, 5.0), ('bob', 3, 3.75), ('ann', 1, 1.25)):
        add_feedback(store, Feedback('a', rating, labeller=who))
        assert state() == (q, ['human'])
    set_labels(store, 'a', {'quality': 2.0}, 'judge')
    assert state() == (1.25, ['human'])
    for who in ('ann', 'bob'): withdraw_feedback(store, 'a', who, f'undo-{who}'), withdraw_feedback(store, 'a', who, f'undo-{who}')
    assert state() == (2.0, ['machine']) and not list(read_feedback(store))
    assert [(f.labeller, f.revision) for f in read_feedback(store, 'a', revisions=True)] == [('ann', 1), ('ann', 2), ('ann', 3), ('bob', 1), ('bob', 2)]

def test_the_same_act_twice_is_one(store):
    store.add(example())
    f = Feedback('a', 4, labeller='ann', id='click', aspects={'speed': 5, 'tool_selection': 1}, suggested_tools=(), suggested_response='It came.', comment='ok')
    kept = add_feedback(store, f)
    assert add_feedback(store, f) == kept == next(read_feedback(store)) and kept.suggested_tools == () and kept.revision == 1
    p = Preference(example().messages, 'a', 'b', 'a', 'ann', {'shown_first': 'a'}, 'choice')
    assert add_preference(store, p) == add_preference(store, p) == next(read_preferences(store, 'ann')) and not list(read_preferences(store, 'bob'))
    assert add_preference(store, Preference('text', 'a', 'b')).id and len(list(read_preferences(store))) == 2

@pytest.mark.parametrize('f, says', [(Feedback('a', 6), 'outside its scale'), (Feedback('a', 4, aspects={'speed': 0}), 'outside its scale'), (Feedback('b', 4), 'there is no example'),
                                     (Feedback('a', 4, labeller='x\0'), 'NUL'), (Feedback('a', 4, created_at='soon'), 'expected a time'), (Feedback('a', 4, comment='\ud83d'), 'cannot be written')])
def test_bad_feedback_is_refused(store, f, says):
    store.add(example())
    with pytest.raises(DataError, match=says): add_feedback(store, f)
    assert not list(read_feedback(store))

def test_threads_lose_nothing(store):
    "Widgets answer on other threads: here eight of them rate, label and add at once."
    store.add(example(labels={'quality': 0.0}))
    errors = []
    def work(k):
        try:
            for j in range(6):
                add_feedback(store, Feedback('a', 1 + (k + j) % 5, labeller=f'p{k}'))
                store.add(example(f'{k}-{j}', f'{k}-{j}'))
                set_labels(store, 'a', {f'k{k}': float(j)}, 'rule')
        except Exception as e: errors.append(e)
    crowd = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for th in crowd: th.start()
    for th in crowd: th.join()
    assert not errors and store.count() == 49 and len(list(read_feedback(store, revisions=True))) == 48
    last = [f.score for f in read_feedback(store)]
    e = store.get('a')
    assert len(last) == 8 and e.labels['quality'] == pytest.approx(sum(last)/8*5) and all(e.labels[f'k{k}'] == 5 for k in range(8))

def test_a_customer_is_known_by_a_hash_and_can_be_forgotten(store, monkeypatch):
    store.add_many([example(str(i), str(i), user='mei_davis_8935' if i < 2 else 'ann') for i in range(3)])
    add_feedback(store, Feedback('0', 4)), add_preference(store, Preference('q', 'a', 'b', group='1'))
    users = [e.user for e in store.examples()]
    assert users[0] == users[1] != users[2] and not any('mei' in u for u in users)
    assert (forget_user(store, ''), forget_user(store, 'bob'), forget_user(store, 'mei_davis_8935')) == (0, 0, 2)
    assert store.count() == 1 and not list(read_feedback(store)) and not list(read_preferences(store))
    monkeypatch.setenv('STATESET_NB_USER_KEY', 'another key')
    with TrainingStore(store.engine.url.render_as_string(hide_password=False)) as other: assert other.ready(example(user='ann')).user != users[2]

def test_what_is_forgotten_is_no_longer_in_the_file(tmp_path):
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s:
        s.add_many([example(str(i), f'marmalade-{i}', user='mei') for i in range(50)] + [example('kept', 'kept', user='ann')])
        found = lambda: any(b'marmalade' in f.read_bytes() for f in tmp_path.iterdir())
        assert found() and forget_user(s, 'mei') == 50
        assert not found() and s.count() == 1

# ---- filters

labelled = st.builds(lambda q, c, a, h, d: dict(labels={'quality': q, 'confidence': c}, agent=a, label_sources={'quality': 'human'} if h else {}, created_at=f'2026-01-{d:02}'),
                     st.none() | st.sampled_from([0., 2.9, 3., 4., 5.]), st.none() | st.sampled_from([.5, .9]), st.sampled_from(['desk', 'sales']), st.booleans(), st.integers(1, 5))
filters = st.builds(ExampleFilter, min_quality=st.none() | st.sampled_from([3., 4.]), max_quality=st.none() | st.just(4.), min_confidence=st.none() | st.just(.9), agent=st.none() | st.just('desk'),
                    since=st.none() | st.just('2026-01-02'), until=st.none() | st.just('2026-01-04T00:00:00Z'), label_state=st.none() | st.sampled_from(S.LABEL_STATES))

def matches(e, w):
    q, c = e.labels['quality'], e.labels['confidence']
    state = 'none' if q is None else 'human' if e.label_sources.get('quality') == 'human' else 'machine'
    return ((w.min_quality is None or (q is not None and q >= w.min_quality)) and (w.max_quality is None or (q is not None and q <= w.max_quality)) and (w.min_confidence is None or (c or 0) >= w.min_confidence)
            and w.agent in (None, e.agent) and (w.since is None or e.created_at >= w.since) and (w.until is None or e.created_at < w.until) and w.label_state in (None, state))

@given(kinds=st.lists(labelled, max_size=12), where=filters)
def test_a_filter_means_what_it_says(wide, kinds, where):
    with wide.begin() as c: c.execute(S.EXAMPLE.delete())
    all_ = [wide.ready(example(str(i), str(i), **kw)) for i, kw in enumerate(kinds)]
    if all_: wide.add_many(all_)
    expected = sorted(e.id for e in all_ if matches(e, where))
    assert [e.id for e in wide.examples(where)] == expected and wide.count(where) == len(expected)

# ---- personal data

secrets_of = st.sampled_from(['mei.davis@example.com', 'MEI@mail.example.co.uk', '+49 170 1234567', '(555) 012-3456', '555-012-3456', '4111 1111 1111 1111', '5500005555555559', 'DE89 3704 0044 0532 0130 00',
                              '123-45-6789', '192.168.0.17', '28 Oak Street', '1406 Sunset Blvd, Apt 12', 'P.O. Box 411', 'Lindenstraße 12', 'sk-abcdefghijklmnop1234', 'SW1A 1AA'])
noise = st.text(st.sampled_from('abc XYZ.,;:!?"\'\n{}[]<>_1490-@+()/\\é'), max_size=30)

@given(st.lists(noise | secrets_of, min_size=1, max_size=6).map(' '.join))
def test_redaction_twice_is_redaction_once(text):
    once = Redactor().value(text)
    assert Redactor().value(once) == once

@given(noise, secrets_of, noise)
def test_what_has_a_shape_is_found_among_anything(before, secret, after):
    assert secret not in Redactor().value(f'{before}\n{secret}\n{after}')

@given(st.text(st.sampled_from('abcdefg hij.,!?\n'), max_size=60))
def test_words_stay(text): assert Redactor().value(text) == text

people = st.tuples(st.sampled_from(['Mei', 'Omar', 'Zoë', 'Will', "O'Brien"]), st.sampled_from(['Davis', 'Müller', 'de la Cruz', 'Young', 'Ng']))

@given(people, st.sampled_from([str, str.upper]), st.booleans())
def test_whom_a_tool_names_is_nowhere_in_what_is_stored(person, spell, ascii):
    first, last = person
    record = json.dumps({'name': {'first_name': first, 'last_name': last}, 'email': 'x@example.com', 'zip': '80203', 'dob': '1984-05-17', 'order': '4712'}, ensure_ascii=ascii)
    said = spell(f'{first} {last}') if first not in ('Will',) and last != 'Young' else f'{first} {last}'
    call = ToolCall('find', json.dumps({'last_name': last, 'order': '4712'}, ensure_ascii=ascii), 'c')
    e = Redactor().example(TrainingExample('a', (Message('user', f'I am {said}, born 1984-05-17, from 80203.'), Message('assistant', None, (call,)), Message('tool', record, (), 'c')),
                                           Message('assistant', f'Thank you, {first}. Order 4712 is yours.')))
    text = json.dumps(e.to_dict(), ensure_ascii=False)
    for gone in (first, last, said, '80203', '1984-05-17', 'x@example.com'): assert not re.search(rf'(?<!\w){re.escape(gone)}(?!\w)', text), (gone, text)
    kept = json.loads(e.messages[2].content)
    assert kept['order'] == '4712' and e.messages[1].tool_calls[0].parsed()['last_name'] == kept['name']['last_name']
    assert e.redacted['NAME'] >= 2 and Redactor().example(replace(e, redacted=None)).messages == e.messages

@pytest.mark.parametrize('value', ['user', 'assistant', 'content', 'role', 'function', 'tool'])
def test_a_name_that_is_a_word_of_the_format_breaks_no_message(value):
    e = Redactor().example(TrainingExample('a', (Message('user', f'I am {value}'), Message('tool', json.dumps({'first_name': value, 'user_id': value}), (), 'c')), Message('assistant', 'Hi')))
    assert [m.role for m in e.messages] == ['user', 'tool'] and set(json.loads(e.messages[1].content)) == {'first_name', 'user_id'}

@pytest.mark.parametrize('text', ['Order 4712', 'parcel 5550123456', 'tracking 1Z999AA10123456784', 'order #W2611340', 'reservation ZFA04Y', 'flight HAT069 at 06:00', 'It takes 2 days on the way', '$1,250.00', '2026-01-31',
                                  'item 8349118980, 9472539378', 'version 3.11.7', '4111 1111 1111 1112', 'the 5 minutes are over', 'gift_card_8190333', '24 hours a day', '3 of 4 tools', 'room 12 is on the 3rd floor'])
def test_what_is_no_personal_data_stays(text): assert Redactor().value(text) == text

def test_nothing_personal_reaches_the_disk(tmp_path):
    "Not in a row, an index, the log of writes or a copy."
    secret = ['mei.davis@example.com', '555-012-3456', 'Zebedee', '28 Oak Street']
    d = {'messages': [{'role': 'user', 'content': f'My name is {secret[2]}. {secret[0]} {secret[1]}', 'mail': secret[0]}, {'role': 'assistant', 'content': f'Hello {secret[2]}, still at {secret[3]}?'}],
         'customer': {'name': secret[2], 'email': secret[0]}, 'user': secret[0]}
    f = write_jsonl(tmp_path/'in'/'log.jsonl', [d])
    with TrainingStore(f'sqlite:///{tmp_path}/db/store.db') as s:
        assert ingest_file(s, f).redacted == {'NAME': 1, 'EMAIL': 1, 'PHONE': 1, 'ADDRESS': 1}
        i = next(s.examples()).id
        add_feedback(s, Feedback(i, 4, comment=f'call {secret[1]}', suggested_response=f'Write to {secret[0]}'))
        add_preference(s, Preference(f'I live at {secret[3]}', f'Mail {secret[0]}?', 'What?'))
        for g in (tmp_path/'db').iterdir(): assert not [x for x in secret if x.encode() in g.read_bytes()], g
    with TrainingStore(f'sqlite:///{tmp_path}/raw/store.db', redactor=None) as s:  # the same look finds it where nothing was taken out
        ingest_file(s, f)
        assert any(secret[0].encode() in g.read_bytes() for g in (tmp_path/'raw').iterdir())

# ---- files that come in

talk = {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]}
share = {'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello!'}]}
run = {'id': 'r', 'trace_id': 't', 'run_type': 'llm', 'inputs': {'messages': [{'type': 'human', 'content': 'Hi'}]}, 'outputs': {'generations': [[{'text': 'Hello!'}]]}}
def but(d, **kw): return json.dumps(d | kw)

BAD_LINES = [  # format, line, why it is refused
    ('openai', '{"messages": [', 'not JSON'), ('openai', '[1, 2]', 'expected a JSON object'), ('openai', b'{"messages": "\xff"}', 'not UTF-8'), ('openai', '{"messages": []}', 'no messages'),
    ('openai', '{"conversations": []}', 'no messages'), ('openai', but({}, messages=[{'role': 'user', 'content': 'Hi'}]), 'no answer'), ('openai', but({}, messages=[talk['messages'][1]]), 'nothing was said before'),
    ('openai', but({}, messages=[{'role': 'robot', 'content': 'Hi'}]), "role='robot'"), ('openai', but(talk, rating='good'), "rating='good'"), ('openai', but(talk, rating=9), 'outside its scale'),
    ('openai', but(talk, timestamp='soon'), 'expected a time'), ('openai', but(talk, tokens=float('nan')), 'expected a number'), ('openai', '{"messages": [{"role": "user", "content": "\\ud83d"}]}', 'half a character'),
    ('openai', but(talk, id='a\0b'), 'NUL'), ('openai', but({}, messages=[{'role': 'user', 'content': [{'type': 'image_url'}]}, talk['messages'][1]]), 'only text parts'),
    ('openai', '{"a": ' + '['*100000 + ']'*100000 + '}', 'cannot be read'), ('openai', but(talk, metadata={'agent': 'x'*600}), 'at most 512'), ('openai', but(talk, timestamp=1e30), 'expected seconds'),
    ('sharegpt', but({}), 'no conversations'), ('sharegpt', but({}, conversations=[{'from': 'alien', 'value': 'x'}]), "from='alien'"), ('sharegpt', but({}, conversations=['Hi']), 'expected {"from"'),
    ('sharegpt', but({}, conversations=[share['conversations'][0]]), 'no answer'), ('sharegpt', but({}, conversations=[*share['conversations'], {'from': 'function_call', 'value': 'x'}]), 'not JSON'),
    ('sharegpt', but({}, conversations=[*share['conversations'], {'from': 'function_call', 'value': '{}'}]), 'not a tool call'), ('sharegpt', but({}, conversations=[{'from': ['human'], 'value': 'x'}]), 'expected one of'),
    ('langsmith', but(run, outputs=None, error='TimeoutError'), 'the run failed: TimeoutError'), ('langsmith', but(run, outputs={}), 'outputs hold no answer'), ('langsmith', but(run, inputs={}), 'inputs hold no messages'),
    ('langsmith', but(run, inputs={'messages': [{'type': 'remove', 'content': ''}]}), "type 'remove'"), ('langsmith', but(run, inputs={'messages': [3]}), 'a message is int'),
    ('langsmith', but(run, start_time='x', end_time='y'), 'expected a time'), ('langsmith', but(run, total_cost='free'), 'total_cost'), ('langsmith', but(run, outputs={'choices': [{}]}), 'a message is NoneType'),
    ('langsmith', but(run, inputs={'messages': [{'type': 'ai', 'content': '', 'tool_calls': [7]}]}), 'no tool call'), ('langsmith', but(run, inputs={'messages': [{'type': {}, 'content': ''}]}), 'expected one of'),
    ('stateset', but({}, id='a'), 'lacks'), ('stateset', but(example().to_dict(), colour='red'), "unknown key 'colour'"), ('stateset', but(example().to_dict(), schema=2), 'upgrade'),
    ('stateset', but(example().to_dict(), labels=3), 'labels'), ('stateset', but(example().to_dict(), messages='Hi'), 'expected'), ('stateset', but(example().to_dict(), messages={'role': 'user', 'content': 'Hi'}), 'of another kind'), ('stateset', but(example().to_dict(), id=3), 'expected text')]

GOOD = {'openai': talk, 'sharegpt': share, 'langsmith': run | {'trace_id': 'good'}, 'stateset': example('good', 'good').to_dict()}

@pytest.mark.parametrize('format, line, why', BAD_LINES, ids=lambda x: repr(x)[:40] if not isinstance(x, str) else x[:30])
def test_a_bad_line_is_refused_with_its_place_and_the_rest_goes_in(tmp_path, format, line, why):
    f = tmp_path/'log.jsonl'
    f.write_bytes(b'\xef\xbb\xbf\n' + json.dumps(GOOD[format]).encode() + b'\r\n' + (line if isinstance(line, bytes) else line.encode()))
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s: r = ingest_file(s, f, format)
    assert (r.read, r.added, r.refused) == (2, 1, 1), r
    assert r.refusals[0].where == 'log.jsonl line 3' and why in r.refusals[0].why and 'line 3' not in r.refusals[0].why, r.refusals

BAD_FILES = [('', 'the file is empty'), ('\n\n', 'the file is empty'), (None, 'No such file'), ('/', 'directory'), ('[]', 'the file is empty')]

@pytest.mark.parametrize('content, why', BAD_FILES)
def test_a_file_without_anything_is_an_error(tmp_path, content, why):
    f = tmp_path/'log.jsonl'
    f.mkdir() if content == '/' else f.write_text(content) if content is not None else None
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s, pytest.raises(DataError, match=why): ingest_file(s, f)

@pytest.mark.parametrize('tail, refused, why', [('', 1, 'not JSON'), (']', 0, ''), (', {"messages": [', 1, 'not JSON'), ('] [1]', 1, 'text after the end'), (', 5]', 1, 'expected a JSON object')])
def test_a_list_is_read_as_far_as_it_can_be(tmp_path, tail, refused, why):
    f = tmp_path/'log.json'
    f.write_text('[' + ',\n'.join(json.dumps({'messages': [{'role': 'user', 'content': 'é'*70000}, {'role': 'assistant', 'content': str(i)}]}, ensure_ascii=False) for i in range(9)) + tail, encoding='utf-8')
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s: r = ingest_file(s, f)
    assert (r.added, r.refused) == (9, refused) and all(why in x.why and 'log.json line 9' == x.where for x in r.refusals), r

def test_the_same_talk_in_each_format_is_the_same_example(store, tmp_path):
    for format, d in GOOD.items():
        if format == 'stateset': continue
        for k, text in enumerate((json.dumps(d), json.dumps([d], indent=2))):
            r = ingest_file(store, (tmp_path/f'{format}{k}').write_text(text) and tmp_path/f'{format}{k}', format)
            assert (r.added, r.known + r.duplicates, r.refused) == ((1, 0, 0) if (format, k) == ('openai', 0) else (0, 1, 0)), (format, r)

def test_of_a_trace_the_last_call_of_the_model_is_taken(tmp_path):
    def at(t, **kw): return run | {'start_time': f'2026-01-31T12:00:0{t}'} | kw
    asked = [*run['inputs']['messages'], {'type': 'ai', 'content': '', 'tool_calls': [{'name': 'f', 'args': {}, 'id': 'c'}]}, {'type': 'tool', 'content': 'x', 'tool_call_id': 'c'}]
    last = at(3, id='r3', inputs={'messages': [asked]}, end_time='2026-01-31T12:00:05', total_tokens=7)
    f = write_jsonl(tmp_path/'runs.jsonl', [last, at(0, id='r1'), at(4, id='tool', run_type='tool', inputs={}, outputs={}), at(0, id='root', run_type='chain'), at(5, id='failed', outputs=None, error='x')])
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s:
        r = ingest_file(s, f, 'langsmith')
        e, = s.examples()
    assert (r.added, r.passed_over) == (1, 4) and e.id == 't' and e.tools_used == ('f',) and e.metrics == {'latency_s': 2.0, 'tokens': 7.0} and e.created_at.startswith('2026-01-31T12:00:03')

def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(S, '_LONGEST', 1000)
    f = tmp_path/'log.jsonl'
    f.write_text('{"messages": "' + 'x'*5000 + '"}\n' + json.dumps(talk))
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s: r = ingest_file(s, f)
    assert (r.added, r.refused) == (1, 1) and 'longer than' in r.refusals[0].why

# ---- a process that dies

DIES = """
import sys
from stateset_nb.store import TrainingStore, ingest_file
with TrainingStore(sys.argv[1]) as s: ingest_file(s, sys.argv[2], batch=20, on_batch=lambda r: print(r.added, flush=True))
"""

@pytest.mark.parametrize('after', [1, 4])
def test_a_killed_ingest_loses_nothing_it_acknowledged(database, tmp_path, after):
    n = 3000
    f = write_jsonl(tmp_path/'log.jsonl', [{'id': f'c{i}', 'messages': [{'role': 'user', 'content': f'Where is order {i}?'}, {'role': 'assistant', 'content': f'On day {i}.'}]} for i in range(n)])
    p = subprocess.Popen([sys.executable, '-c', DIES, database, str(f)], stdout=subprocess.PIPE, text=True)
    for _ in range(after): told = int(p.stdout.readline())
    p.send_signal(signal.SIGKILL)
    told = max([told, *map(int, p.stdout.read().split())])  # what it had said by then
    assert p.wait() == -signal.SIGKILL and told < n
    with TrainingStore(database) as s:
        there = [e.id for e in s.examples()]  # every row can be read
        assert told <= len(there) <= told + 20 and len(there) % 20 == 0 and len(set(there)) == len(there)
        if s.engine.dialect.name == 'sqlite':
            with s.reading() as c: assert c.exec_driver_sql('PRAGMA integrity_check').scalar() == 'ok'
        r = ingest_file(s, f)
        assert (r.known, r.added, s.count()) == (len(there), n - len(there), n)

def test_two_processes_fill_one_store(database, tmp_path):
    rows = [{'id': f'c{i}', 'messages': [{'role': 'user', 'content': f'Where is order {i}?'}, {'role': 'assistant', 'content': f'On day {i}.'}]} for i in range(400)]
    files = [write_jsonl(tmp_path/f'{k}.jsonl', part) for k, part in enumerate((rows[:300], rows[100:]))]
    ps = [subprocess.Popen([sys.executable, '-c', DIES, database, str(f)], stdout=subprocess.PIPE, text=True) for f in files]  # they also make its tables at once
    added = [int(p.communicate()[0].split()[-1]) for p in ps]
    assert [p.returncode for p in ps] == [0, 0] and sum(added) == 400
    with TrainingStore(database) as s: assert s.count() == 400

# ---- migrations

def shape(engine):
    i = sa.inspect(engine)
    return {t: ([(c['name'], str(c['type']), c['nullable']) for c in i.get_columns(t)], sorted((x['name'], tuple(x['column_names'])) for x in i.get_indexes(t)), i.get_pk_constraint(t)['constrained_columns']) for t in sorted(i.get_table_names())}

def test_an_old_database_is_brought_up_and_equals_a_new_one(database, tmp_path, request):
    engine = S._open_engine(database)
    migrate(engine, STEPS[:1])
    with engine.begin() as c: c.execute(S.EXAMPLE.insert(), [S._row(replace(example(), created_at='2026-01-31T00:00:00.000000+00:00'))])
    with TrainingStore(database) as s: assert [e.id for e in s.examples()] == ['a'] and s.add(example('b', 'b')).id == 'b'
    fresh = f'sqlite:///{tmp_path}/fresh.db' if engine.dialect.name == 'sqlite' else request.getfixturevalue('postgres')()
    with TrainingStore(fresh) as new:
        assert shape(engine) == shape(new.engine)
        tables = {t.name: {c.name for c in t.columns} for t in (S.EXAMPLE, S.FEEDBACK, S.PREFERENCE, S.SETTING)}
        assert {t: {c[0] for c in v[0]} for t, v in shape(new.engine).items() if t in tables} == tables
    if engine.dialect.name == 'sqlite':
        copy = sqlite3.connect(tmp_path/'store.db.store-v1.bak')
        assert copy.execute('SELECT id FROM example').fetchall() == [('a',)]
        copy.close()
    engine.dispose()

def test_a_newer_database_is_refused_and_left_alone(database):
    with TrainingStore(database) as s:
        s.add(example())
        with s.begin() as c: c.exec_driver_sql("INSERT INTO schema_version VALUES ('store', 99, 'tomorrow')")
        before = shape(s.engine)
        with pytest.raises(DataError, match='version 99 of store — this program knows version .* upgrade'): TrainingStore(database)
        assert shape(s.engine) == before and s.count() == 1

def test_a_step_that_fails_leaves_the_version_before_it(database):
    engine = S._open_engine(database)
    with pytest.raises((BackendError, DataError)): migrate(engine, [['CREATE TABLE one (id INTEGER)'], ['CREATE TABLE two (id INTEGER)', 'CREATE TABLE one (id INTEGER)']], 'room')
    assert set(shape(engine)) == {'one', 'schema_version'} and migrate(engine, [['CREATE TABLE one (id INTEGER)'], ['CREATE TABLE two (id INTEGER)']], 'room') == 2
    engine.dispose()

# ---- addresses

@pytest.mark.parametrize('url, error, says', [('labels.db', ConfigError, 'is no address'), ('sqlite://', ConfigError, 'give a file'), ('sqlite:///:memory:', ConfigError, 'give a file'), ('mysql://u:hush@h/d', ConfigError, 'is a mysql database'),
                                              ('postgresql://test:hush@127.0.0.1:1/none', BackendError, 'cannot answer'), ('sqlite:////proc/none/store.db', BackendError, 'cannot')])
def test_a_bad_address_is_an_error_without_its_password(url, error, says):
    with pytest.raises(error, match=says) as e: TrainingStore(url)
    assert 'hush' not in str(e.value)

def test_a_file_that_is_no_database_is_left_as_it_was(tmp_path):
    f = tmp_path/'note.txt'
    f.write_text('this is no database'*100)
    with pytest.raises(BackendError, match='not a database'): TrainingStore(f'sqlite:///{f}')
    assert f.read_text() == 'this is no database'*100

def test_postgres_passwords_are_not_shown(postgres):
    with TrainingStore(postgres().replace('test@', 'test:hush@')) as s: assert 'hush' not in repr(s) and 'hush' not in repr(s.engine)

# ---- what goes out

def filled(s):
    for c in demo_conversations(): s.add(TrainingExample(c.id, c.messages[:1], c.messages[1], agent='desk', created_at='2026-01-31'))
    for c in demo_conversations(): add_feedback(s, Feedback(c.id, c.rating, labeller='ann', id=f'f-{c.id}', created_at='2026-01-31'))
    call = ToolCall('look_up', '{"order": "4712"}', 'c')
    s.add(TrainingExample('tools', (Message('user', 'Where is 4712?', extra={'latency_ms': 3}), Message('assistant', None, (call,)), Message('tool', 'shipped', (), 'c')), Message('assistant', 'It is shipped.'), agent='desk',
                          labels={'quality': 4.5}, label_sources={'quality': 'judge'}, created_at='2026-01-31', context={'tools': [{'type': 'function', 'function': {'name': 'look_up'}}]}))
    add_feedback(s, Feedback('curt', 1, labeller='bob', suggested_response='Which code is it?', id='better', created_at='2026-01-31'))
    add_preference(s, Preference('Where is it?', 'Here.', 'Whatever.', id='p', created_at='2026-01-31'))
    return s

def rows_of(f): return [json.loads(x) for x in Path(f).read_text(encoding='utf-8').splitlines()]

def test_every_format_goes_out_as_its_reader_wants_it(store, tmp_path):
    filled(store)
    rows = {k: rows_of(tmp_path/k) for k in S.EXPORTS if export_file(store, tmp_path/k, k, ExampleFilter(min_quality=3.5))}
    roles = {tuple(m['role'] for m in r['messages']) for r in rows['openai']}
    assert roles == {('user', 'assistant'), ('user', 'assistant', 'tool', 'assistant')} and all(set(m) <= {'role', 'content', 'tool_calls', 'tool_call_id'} for r in rows['openai'] for m in r['messages'])
    assert [r['completion'][0]['content'] for r in rows['trl']][-1] == 'Which code is it?' and len(rows['trl']) == len(rows['openai']) == 5
    assert rows['preference'] == [{'prompt': [{'role': 'user', 'content': 'Where is it?'}], 'chosen': [{'role': 'assistant', 'content': 'Here.'}], 'rejected': [{'role': 'assistant', 'content': 'Whatever.'}]},
                                  {'prompt': [{'role': 'user', 'content': 'The discount code does not work.'}], 'chosen': [{'role': 'assistant', 'content': 'Which code is it?'}], 'rejected': [{'role': 'assistant', 'content': 'Whatever.'}]}]
    assert sum('tools' in r for r in rows['openai']) == 1 and rows['sharegpt'][-1]['conversations'][1]['from'] == 'function_call'
    export_file(store, tmp_path/'kto', 'kto')
    assert [r['label'] for r in rows_of(tmp_path/'kto')] == [False, False, True, True, False, True]  # by id: curt, invents, solved, tools, vague, then the suggestion; the two rated 4 of 5 lie between

def test_a_manifest_says_what_the_file_is(store, tmp_path):
    where = ExampleFilter(agent='desk', min_quality=4)
    r = export_file(filled(store), tmp_path/'a.jsonl', 'openai', where)
    assert ExportReport.from_dict(json.loads((tmp_path/'a.jsonl.manifest.json').read_text())) == r
    assert r.rows == len(rows_of(tmp_path/'a.jsonl')) and r.sha256 == hashlib.sha256((tmp_path/'a.jsonl').read_bytes()).hexdigest() and r.where == where

def test_both_databases_write_the_same_bytes(postgres, tmp_path):
    def digests(url):
        with TrainingStore(url) as s: return [export_file(filled(s), tmp_path/k, k).sha256 for k in S.EXPORTS]
    assert digests(f'sqlite:///{tmp_path}/store.db') == digests(postgres())

def test_our_own_format_moves_a_store(store, tmp_path):
    filled(store)
    export_file(store, tmp_path/'all.jsonl', 'stateset')
    with TrainingStore(f'sqlite:///{tmp_path}/other.db') as other:
        assert ingest_file(other, tmp_path/'all.jsonl', 'stateset').added == store.count()
        assert list(other.examples()) == list(store.examples())

def test_an_export_that_fails_leaves_the_old_file(store, tmp_path):
    f = tmp_path/'a.jsonl'
    f.write_text('old')
    with pytest.raises(DataError, match='nothing in the store matches'): export_file(store, f)
    assert f.read_text() == 'old' and [p.name for p in tmp_path.glob('*.jsonl*')] == ['a.jsonl']

@pytest.mark.parametrize('format, columns', [('openai', {'messages', 'tools'}), ('trl', {'prompt', 'completion', 'tools'}), ('preference', {'prompt', 'chosen', 'rejected'}), ('kto', {'prompt', 'completion', 'label', 'tools'})])
def test_a_dataset_lies_on_disk(tmp_path, format, columns):
    with TrainingStore(f'sqlite:///{tmp_path}/store.db') as s:
        ds = to_dataset(filled(s), tmp_path/'set', format)
        assert set(ds.column_names) == columns and ds.cache_files and ds[0][next(iter(columns - {'tools', 'label'}))]

def test_a_table_of_nothing_has_its_columns(store):
    assert {'id', 'query', 'response', 'tools_used', 'quality'} <= set(to_pandas(store).columns) and len(to_pandas(filled(store))) == 7

# ---- collecting

def test_what_an_agent_does_is_collected_while_it_runs(store):
    class Score:
        async def compute_reward(self, turns, context=None):
            if 'Whatever' in turns[-1].text: raise RuntimeError('the judge is down')
            return type('R', (), {'score': 2. if 'vague' in turns[0].text else .8})()
    collector = TrainingDataCollector(store, Score(), agent='desk', run_id='r1')
    async def go(): return await asyncio.gather(*(collector.collect(c) for c in demo_conversations()), collector.collect(Trajectory('t/0', 't', 1, messages=demo_conversations()[0].messages, info={'success': False})),
                                                collector.collect(Conversation((Message('user', 'vague'), Message('assistant', 'Hm.')))), return_exceptions=True)
    got = asyncio.run(go())
    assert [e.labels['quality'] for e in got] == [4., 4., 4., 4., None, 4., got[6].labels['quality'], None] and store.count() == 7
    assert got[4].label_sources['quality'] == 'judge failed: RuntimeError: the judge is down' and 'outside its scale' in got[7].label_sources['quality']
    assert got[0].agent == 'desk' and got[0].run_id == 'r1' and {e.id for e in got[:6]} == {c.id for c in demo_conversations()}
    with pytest.raises(DataError, match='no answer'): asyncio.run(collector.collect(Conversation((Message('user', 'Hi'),))))
    with pytest.raises(DataError, match='expected a Conversation'): asyncio.run(collector.collect({'messages': []}))
