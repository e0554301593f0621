"""Calibration: exact windows, one still scale for siblings, and maps to people's word that only rise."""
import asyncio, json, math, pickle, statistics
from fractions import Fraction
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from stateset_nb import calibration
from stateset_nb.calibration import (METHODS, AdaptiveRewardScaler, CalibratedRewardFunction, CalibratedSum, DriftAlarm, LabelCalibration, MultiRewardCalibrator, PreferenceWeights, Reliability,
                                     RewardNormalizer, calibrate_to_labels, conformal_band, fit_weights, learn_weights, noise_floors, normalize_groups, reliability)
from stateset_nb.core import ConfigError, DataError, Message, NotTrained, Preference, Scenario, demo_conversations
from stateset_nb.rewards import HelpfulnessReward, RewardFunction, RewardResult, check_reward, create_customer_service_reward, reward_function

value = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False).map(lambda x: round(x, 6))
some = st.lists(value, min_size=2, max_size=60)
each_method = pytest.mark.parametrize('method', METHODS)

def soon(awaitable): return asyncio.run(awaitable)
def rng(seed=0): return np.random.default_rng(seed)
def spread_out(values): return np.std(values) > 1e-3

# ---- properties

@each_method
@settings(max_examples=150, deadline=None)
@given(some, value, value, st.booleans())
def test_more_is_never_less_and_equal_is_equal(method, values, a, b, clip):
    n = RewardNormalizer(method, 2., 3., (-1., 4.) if clip else None).fit(values)
    low, high = n.normalize(min(a, b)), n.normalize(max(a, b))
    assert low <= high and n.normalize(a) == n.normalize(float(str(a)))
    assert not clip or -1 <= low <= high <= 4

@each_method
@settings(max_examples=100, deadline=None)
@given(some, st.randoms(use_true_random=False), value)
def test_order_of_arrival_is_nothing_after_fit(method, values, chance, x):
    mixed = list(values); chance.shuffle(mixed)
    a, b = RewardNormalizer(method).fit(values), RewardNormalizer(method).fit(mixed)
    assert a.stats == b.stats and a.normalize(x) == b.normalize(x)

@each_method
@settings(max_examples=150, deadline=None)
@given(some, value, st.floats(1e-3, 1e3), st.floats(-1e4, 1e4))
def test_scale_and_offset_of_the_raw_reward_are_nothing(method, values, x, scale, shift):
    if not spread_out(values): return
    plain, moved = RewardNormalizer(method).fit(values), RewardNormalizer(method).fit([scale * v + shift for v in values])
    if method == 'percentile':   # ranks: ask about values of the sample, whose order rounding could only tie
        xs = np.unique(values)
        if np.diff(xs).min(initial=1) * scale < 1e-6: return
        assert [plain.normalize(v) for v in xs] == [moved.normalize(scale * v + shift) for v in xs]
    else: assert moved.normalize(scale * x + shift) == pytest.approx(plain.normalize(x), rel=1e-4, abs=1e-4)

@each_method
@settings(max_examples=60, deadline=None)
@given(some, some, value)
def test_saved_and_loaded_is_the_same(method, values, more, x):
    n = RewardNormalizer(method, -1., .5, (-9., 9.), buffer_size=20).fit(values)
    again, copied = RewardNormalizer.from_dict(json.loads(json.dumps(n.to_dict()))), pickle.loads(pickle.dumps(n))
    for _ in range(2):
        assert n.normalize(x) == again.normalize(x) == copied.normalize(x) and n.stats == again.stats == copied.stats
        for o in (n, again, copied): o.update(more)

@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(value, st.sampled_from([1e8, 1e8 + .1, -1e9, 1e100, 1e-30, 0., -0.])), min_size=1, max_size=80), st.integers(2, 12), st.integers(1, 7))
def test_a_window_is_exact_however_it_came_about(values, size, step):
    n = RewardNormalizer(buffer_size=size)
    for i in range(0, len(values), step): n.update(values[i:i + step])
    last = values[-size:]
    fresh = RewardNormalizer().fit(last)
    assert n.values == last and n.stats == fresh.stats
    mean = sum(map(Fraction, last)) / len(last)
    assert n.stats.mean == float(mean)
    assert n.stats.std == pytest.approx(math.sqrt(float(sum((Fraction(v) - mean) ** 2 for v in last) / len(last))), rel=1e-12)
    assert (n.stats.low, n.stats.high) == (min(last), max(last))
    assert n.stats.median == pytest.approx(statistics.median(last), rel=1e-12, abs=1e-12)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 3))
def test_siblings_with_equal_rewards_stay_equal_to_the_bit(history, rounds):
    @reward_function(name='echo')
    def echo(turns): return float(turns[-1].text)
    def talk(x): return [Message('user', 'Hi'), Message('assistant', repr(x))]
    async def go():
        f = CalibratedRewardFunction(echo, auto_calibrate=True)
        for _ in range(rounds + 1):
            singly = [(await f.compute_reward(talk(x))).reward for x in [*history, .3, *history, .3]]
            half = len(singly) // 2
            assert singly[:half] == singly[half:]
            f.update()
    soon(go())

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=6, max_size=60), st.lists(st.floats(-1, 2), min_size=2, max_size=20), st.sampled_from(['platt', 'linear', 'isotonic']))
def test_a_map_to_labels_never_falls(pairs, xs, method):
    x, y = np.array([p[0] for p in pairs]), np.array([float(p[1]) for p in pairs])
    if np.ptp(y) == 0 or np.std(x) <= 1e-6: return
    m = calibrate_to_labels(x, y, method=method)
    out = [m.normalize(v) for v in sorted(xs)]
    assert all(a <= b for a, b in zip(out, out[1:])) and all(0 <= v <= 1 for v in out)
    assert LabelCalibration.from_dict(json.loads(json.dumps(m.to_dict()))) == m

@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(0, .5))
def test_groups_are_centred_and_agreement_is_exactly_nothing(groups, floor):
    z = normalize_groups(np.array(groups)[..., None], floor)
    assert abs(z.sum(1)).max() < 1e-6
    for g, row in zip(groups, z[..., 0]):
        if len(set(g)) == 1: assert not row.any()
        assert all((a == b) <= (u == v) for a, u in zip(g, row) for b, v in zip(g, row))

# ---- the edge table

NORMAL = rng(1).normal(.5, .1, 1000)

@each_method
def test_a_constant_reward_is_the_target_and_says_so(method):
    for c in (0., .1, 1e8, -3.):
        n = RewardNormalizer(method, target_mean=7.).fit([c] * 999)
        assert n.stats.constant and n.stats.std < 1e-6 and n.normalize(c) == n.normalize(c + 5) == 7
    noisy = RewardNormalizer(method).fit(.3 + 1e-17 * rng().normal(size=99) + np.tile([0, 5e-17], 50)[:99])
    assert noisy.stats.constant and noisy.normalize(.3) == 0

def test_one_outlier_blinds_only_what_looks_at_the_ends():
    def sees(method):
        n = RewardNormalizer(method).fit([*NORMAL, 1e3])
        return n.normalize(.6) - n.normalize(.4)
    assert sees('z_score') < .01 > sees('min_max') and sees('robust_range') > 1.8 and sees('percentile') > 1.8

def test_two_samples_one_sample_none():
    assert [RewardNormalizer().fit([.2, .6]).normalize(x) for x in (.2, .6)] == pytest.approx([-1, 1])
    assert RewardNormalizer().fit([.2]).normalize(.9) == 0
    with pytest.raises(DataError, match='no rewards to fit'): RewardNormalizer().fit([])
    with pytest.raises(NotTrained): RewardNormalizer().update([]).normalize(.1)

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_no_number_is_refused_before_it_enters(bad):
    n = RewardNormalizer().fit(NORMAL)
    before = n.to_dict()
    for ask in (lambda: n.fit([.1, bad]), lambda: n.update([.1, bad]), lambda: n.normalize(bad)):
        with pytest.raises(DataError, match='expected a finite number'): ask()
    assert n.to_dict() == before

@each_method
def test_two_modes_stay_apart(method):
    n = RewardNormalizer(method).fit([0.] * 50 + [1.] * 50)
    assert n.normalize(0.) == pytest.approx(-n.normalize(1.)) and n.normalize(1.) > .5

@each_method
def test_a_rare_success_still_counts(method):
    n = RewardNormalizer(method).fit([0.] * 97 + [1.] * 3)
    assert n.normalize(1.) > n.normalize(0.) + .5

@each_method
def test_an_offset_of_a_hundred_million_is_nothing(method):
    n, far = RewardNormalizer(method).fit(NORMAL), RewardNormalizer(method).fit(NORMAL + 1e8)
    for x in (.3, .5, .7): assert far.normalize(1e8 + x) == pytest.approx(n.normalize(x), abs=.01)
    assert not far.stats.constant and far.stats.std == pytest.approx(NORMAL.std(), rel=1e-6)

@each_method
def test_a_spike_that_left_has_never_been(method):
    n = RewardNormalizer(method, buffer_size=300).update([1e9]).update([-1e100]).update(NORMAL[:300])
    assert n.stats == RewardNormalizer(method).fit(NORMAL[:300]).stats

def test_after_a_drift_the_window_is_at_home_again():
    n, since = RewardNormalizer(buffer_size=500).update(rng().normal(0, 1, 5000)), 0
    live = rng(1).normal(2, 1, 3000)
    while abs(np.mean([n.normalize(x) for x in live[-500:]])) > .2: n.update(live[since:since + 20]); since += 20
    assert since <= 500

def test_mean_and_spread_are_the_targets():
    for method, near in (('z_score', 1e-9), ('percentile', .01), ('robust_range', .1)):
        n = RewardNormalizer(method, 50., 10.).fit(NORMAL)
        out = [n.normalize(x) for x in NORMAL]
        assert np.mean(out) == pytest.approx(50, abs=10 * near) and np.std(out) == pytest.approx(10, rel=near)
    n = RewardNormalizer('min_max', .5, .5).fit(NORMAL)
    assert [n.normalize(NORMAL.min()), n.normalize(NORMAL.max())] == pytest.approx([0, 1])

def test_ties_share_a_middle_rank():
    n = RewardNormalizer('percentile', .5, math.sqrt(1 / 12)).fit([1., 2, 2, 2, 3])
    assert [n.normalize(x) for x in (0, 1, 2, 2.5, 3, 4)] == pytest.approx([0, .1, .5, .8, .9, 1])

@pytest.mark.parametrize('wish, says', [({'method': 'z'}, 'method'), ({'target_std': 0}, 'target_std'), ({'target_mean': math.nan}, 'target_mean'), ({'clip_range': (1, 2)}, 'clip_range'),
                                        ({'buffer_size': 1}, 'buffer_size'), ({'buffer_size': 2.5}, 'buffer_size'), ({'buffer_size': True}, 'buffer_size')])
def test_wishes_out_of_range_are_refused_by_name(wish, says):
    with pytest.raises(ConfigError, match=says): RewardNormalizer(**wish)

@pytest.mark.parametrize('change, says', [({'schema': 2}, 'schema'), ({'meen': 1}, 'meen'), ({'values': [None]}, 'rewards.0.=None'), ({'method': 'z'}, 'method')])
def test_a_file_that_is_not_ours_is_refused(tmp_path, change, says):
    f = tmp_path / 'n.json'
    f.write_text(json.dumps(RewardNormalizer().fit([1., 2]).to_dict() | change))
    with pytest.raises((DataError, ConfigError), match=says): RewardNormalizer.load(f)
    for text in ('', '[1]', '{}', 'x'):
        f.write_text(text)
        with pytest.raises(DataError): RewardNormalizer.load(f)

# ---- the scaler

@pytest.mark.parametrize('std, mean, batch', [(.01, 5, 1), (1, 0, 8), (200, -1e4, 8), (.1, 1e8, 64)])
def test_the_scaler_arrives_and_stays(std, mean, batch):
    scaler, live = AdaptiveRewardScaler(target_std=2., target_mean=1.), rng().normal(mean, std, (4000 // batch, batch))
    path = [scaler.adapt_scale(b) for b in live]
    late = [s * std / 2 for s in path[len(path) // 2:]]
    assert max(late) < 1.15 and min(late) > .87 and not scaler.get_stats()['at_bound']
    out = [scaler.normalize(x) for x in live[-500:].ravel()]
    assert np.std(out) == pytest.approx(2, rel=.1) and np.mean(out) == pytest.approx(1, abs=.4)

def test_the_scaler_arrives_soon():
    scaler, live = AdaptiveRewardScaler(target_std=2.), rng(3).choice([-1., 1.], 500)
    n = next(i for i, x in enumerate(live, 1) if abs(scaler.adapt_scale([x]) / 2 - 1) < .05)
    assert n < 120

def test_the_scaler_does_not_run_away_on_a_constant_and_goes_on_when_loaded(tmp_path):
    scaler = AdaptiveRewardScaler()
    for _ in range(2000): scaler.adapt_scale([.7])
    assert scaler.scale == 1 and scaler.get_stats()['constant']
    scaler.adapt_scale(NORMAL[:50])
    again = AdaptiveRewardScaler.load(scaler.save(tmp_path / 's.json'))
    assert [o.adapt_scale(NORMAL[50:60]) for o in (scaler, again)] == [scaler.scale] * 2 and scaler.get_stats() == again.get_stats()

# ---- calibrated rewards

cast = demo_conversations()

def test_calibrated_rewards_keep_the_contract():
    report = soon(MultiRewardCalibrator([create_customer_service_reward(), HelpfulnessReward()]).calibrate(cast))
    assert report.names == ('customer_service', 'helpfulness')
    calibrator = MultiRewardCalibrator([create_customer_service_reward(), HelpfulnessReward()], 'percentile')
    soon(calibrator.calibrate(cast))
    for f in (calibrator.get_calibrated_functions(True)[1], calibrator.combine([2, 1], gates=['customer_service'])):
        assert soon(check_reward(f)).ok
    assert pickle.loads(pickle.dumps(calibrator.combine())).weights == {'customer_service': .5, 'helpfulness': .5}

def test_a_gate_closes_and_never_lifts():
    def giving(v, name): return reward_function(lambda turns: v[turns[-1].text], name=name)
    good, safe = giving({'a': .9, 'b': .1, 'c': .5}, 'good'), giving({'a': 1., 'b': 1., 'c': 0.}, 'safe')
    parts = [CalibratedRewardFunction(f, RewardNormalizer().fit([.2, .8])) for f in (good, safe)]
    talks = [[Message('user', 'q'), Message('assistant', x)] for x in 'abc']
    def rewards(**kw): return [r.reward for r in soon(CalibratedSum(parts, {'good': 1, 'safe': 0}, **kw).compute_rewards(talks))]
    plain, gated = rewards(), rewards(gates=['safe'], lowest=-1.)
    assert gated[0] == plain[0] and gated[1] == plain[1] < -1 and gated[2] == -1 < plain[2]

def test_an_error_keeps_the_name_of_its_reward():
    @reward_function(name='broken')
    def broken(turns): return float('nan')
    f = CalibratedRewardFunction(broken, RewardNormalizer().fit(NORMAL))
    with pytest.raises(DataError, match="reward 'broken'"): soon(f.compute_reward(cast[0].messages))

def test_weights_find_taste_and_draw_together_when_votes_are_few():
    taste = np.array([.9, 1, 1.1, 1, 1])
    def vote(n, seed):
        d = rng(seed).normal(size=(n, 5))
        return d * np.where(rng(seed + 1).random(n) < 1 / (1 + np.exp(-1.5 * d @ taste)), 1, -1)[:, None]
    few = fit_weights(vote(20, 0), np.zeros((20, 5)), resamples=20)
    assert np.ptp(few.weights) < .15   # drawn towards equal
    many = fit_weights(vote(800, 2), np.zeros((800, 5)))
    assert np.allclose(many.weights, .2, atol=.05) and all(a < t / 5 < b for a, b, t in zip(many.low, many.high, taste))

def test_a_weight_below_nothing_is_asked_about():
    d = rng().normal(size=(300, 2))
    d *= np.where(rng(1).random(300) < 1 / (1 + np.exp(-3 * (d @ [1, -1]))), 1, -1)[:, None]
    w = fit_weights(d, np.zeros((300, 2)), ['customer_service', 'helpfulness'])
    assert w.disliked == ('helpfulness',) and w.high[1] < 0
    calibrator = MultiRewardCalibrator([create_customer_service_reward(), HelpfulnessReward()])
    soon(calibrator.calibrate(cast))
    with pytest.raises(ConfigError, match='helpfulness .* would be punished'): calibrator.combine(w)
    assert calibrator.combine(w, allow_negative=True).weights['helpfulness'] < 0
    assert PreferenceWeights.from_dict(json.loads(json.dumps(w.to_dict()))) == w

def test_weights_are_learnt_from_preferences():
    calibrator = MultiRewardCalibrator([HelpfulnessReward(), create_customer_service_reward()])
    soon(calibrator.calibrate(cast))
    pairs = [Preference(c.messages[0].text, c.messages[1].text, 'Whatever.', group=c.id) for c in cast[:3] for _ in range(4)]
    assert not soon(learn_weights(calibrator.get_calibrated_functions(), pairs)).disliked

# ---- people

def test_auto_takes_two_parameters_below_200_labels_and_compares_above():
    x = rng().uniform(size=1000)
    y = (rng(1).random(1000) < np.where(x < .5, .1, .9)) * 1.
    assert calibrate_to_labels(x[:199], y[:199]).method == 'platt' and not calibrate_to_labels(x[:199], y[:199]).losses
    assert calibrate_to_labels(x, y).method == 'isotonic'
    y = (rng(2).random(1000) < 1 / (1 + np.exp(-(6 * x - 3)))) * 1.
    assert calibrate_to_labels(x, y).method == 'platt'
    assert calibrate_to_labels(x, x ** 8).method == 'isotonic' and calibrate_to_labels(x[:50], x[:50] / 2).method == 'linear'

def test_platt_is_the_maximum_of_the_likelihood():
    import statsmodels.api as sm
    x = rng().uniform(size=3000)
    y = (rng(1).random(3000) < 1 / (1 + np.exp(-(4 * x - 3)))) * 1.
    m, ref = calibrate_to_labels(x, y, method='platt'), sm.Logit(y, sm.add_constant(x)).fit(disp=0).params
    assert (m.intercept, m.slope) == pytest.approx(tuple(ref), abs=.02)   # the labels are moved inwards a little
    assert calibrate_to_labels([0, .1, .9, 1, 1], [0, 0, 1, 1, 1]).slope < 1e4

def test_a_score_upside_down_says_nothing():
    x = rng().uniform(size=400)
    for m in ('platt', 'isotonic', 'linear'): assert calibrate_to_labels(x, (x < .5) * 1., method=m).spread < 2e-3

def test_folds_keep_conversations_whole():
    fold = calibration._folds([f'c{i // 7}' for i in range(100)], 100, 5, 0)
    assert all(len(set(fold[i:i + 7])) == 1 for i in range(0, 98, 7)) and len(set(fold)) == 5

def test_siblings_are_rarely_tied_on_the_staircase():
    x = rng().uniform(size=200)
    m = calibrate_to_labels(x, (rng(1).random(200) < x) * 1., method='isotonic')
    inside = rng(2).uniform(x.min(), x.max(), 200)
    assert len({m.normalize(v) for v in inside}) == 200

@pytest.mark.parametrize('n', [9, 20, 50, 200])
def test_the_band_holds_as_often_as_it_says(n):
    e = rng(n).standard_t(3, size=(1500, n + 1))
    hit = np.mean([abs(r[-1]) <= conformal_band(r[:-1], np.zeros(n)).half_width for r in e])
    assert .88 < hit < .96

def test_turns_of_one_talk_count_once():
    "Twenty conversations of ten turns, alike inside: the next conversation's turn lies within."
    def talks(r, n): return (r.normal(size=(n, 1)) + .3 * r.normal(size=(n, 10))).ravel()
    groups, hit = np.repeat(np.arange(20), 10), []
    for seed in range(600):
        r = rng(seed)
        half = conformal_band(talks(r, 20), np.zeros(200), groups).half_width
        hit.append(np.mean(abs(talks(r, 1)) <= half))
    assert .88 < np.mean(hit) < .96
    assert conformal_band(np.ones(80), np.zeros(80), np.repeat(np.arange(8), 10)).half_width is None

def test_a_reliable_score_shows_no_more_than_chance():
    errors = []
    for seed in range(40):
        p = rng(seed).uniform(size=300)
        r = reliability(p, (rng(seed + 999).random(300) < p) * 1.)
        errors.append(r.ece / r.chance)
    assert .85 < np.mean(errors) < 1.15
    assert Reliability.from_dict(json.loads(json.dumps(r.to_dict()))) == r
    with pytest.raises(DataError, match='outside 0..1'): reliability([2.], [1.])

def test_the_alarm_is_quiet_at_rest_and_rings_at_half_a_spread():
    alarm = DriftAlarm(rng().normal(size=1000), window=50)
    assert np.mean([r.drifted for r in alarm.update(rng(1).normal(size=20_000))]) < .03
    assert .5 < np.mean([r.drifted for r in alarm.update(rng(2).normal(.5, 1, 20_000))])
    with pytest.raises(DataError): alarm.update([math.nan])
    with pytest.raises(DataError, match='at least 20'): DriftAlarm([1., 2.])

# ---- the trainers

@pytest.mark.parametrize('floors', [0., .5, [.2, .3, 4.]])
def test_it_is_the_gdpo_of_the_trainers(floors):
    import torch
    from stateset_nb.grpo import gdpo_advantages, group_advantages
    x, w = rng().normal(size=(6, 8, 3)) * [1, .1, 10], np.array([.5, .3, .2])
    s = (normalize_groups(x, floors) * w).sum(-1)
    assert np.allclose(s / (s.std(ddof=1) + 1e-4), gdpo_advantages(torch.tensor(x), torch.tensor(w), floors), atol=1e-9)
    assert np.allclose(normalize_groups(x)[..., 0], group_advantages(torch.tensor(x[..., 0])), atol=1e-9)

def test_a_trainer_divides_each_part_by_its_own_floor():
    "From the calibrated sum through the episode to the advantages: value, weight and floor of each part arrive."
    import torch
    from stateset_nb.agents import Agent, AgentConfig, StubBackend
    from stateset_nb.core import TrajectoryGroup
    from stateset_nb.environments import ConversationEnvironment, rollout
    from stateset_nb.grpo import gdpo_advantages
    from stateset_nb.rewards import reward_function
    from stateset_nb.trainers import TrainingConfig, credit
    def fitted(name, f, sd): return CalibratedRewardFunction(reward_function(f, name=name), RewardNormalizer('z_score').fit([.5 - sd, .5, .5 + sd]))
    parts = [fitted('long', lambda turns: min(1., len(turns[-1].text) / 40), .25), fitted('noise', lambda turns: .5 + 1e-3 * (len(turns[-1].text) % 3), .1)]
    total = CalibratedSum(parts, [3., 1.])
    ts = []
    for i, said in enumerate(('Yes.', 'Yes, it is.', 'Yes, that is so, dear customer.', 'No!')):
        agent = Agent(AgentConfig('stub'), StubBackend([said]))
        ts.append(asyncio.run(rollout(agent, ConversationEnvironment(), Scenario('s', (Message('user', 'Is it?'),)), 0, reward_fn=total, sample=i)))
    assert not [t.error for t in ts if t.error]
    made = [t.info['rewards'] for t in ts]
    assert all(set(m) == {'environment', 'long', 'noise'} for m in made) and made[0]['noise'][2] == pytest.approx(noise_floors(parts)[1]) and made[0]['long'][1] == 3 * made[0]['noise'][1]
    assert all(sum(v * w for v, w, *_ in m.values()) == pytest.approx(t.reward) for m, t in zip(made, ts))
    got = [float(a[0]) for a in credit([TrajectoryGroup('s', tuple(ts))], TrainingConfig(multi_objective_aggregation='normalize_then_sum'))[0]]
    x = torch.tensor([[[m[k][0] for k in ('long', 'noise')] for m in made]], dtype=torch.float64)
    w = [made[0][k][1] for k in ('long', 'noise')]
    assert got == pytest.approx(gdpo_advantages(x, w, noise_floors(parts))[0].tolist(), abs=1e-9) and got != pytest.approx(gdpo_advantages(x, w)[0].tolist(), abs=1e-3)

def test_noise_is_kept_small_by_the_floor():
    f = [CalibratedRewardFunction(HelpfulnessReward(), RewardNormalizer().fit(NORMAL)), CalibratedRewardFunction(HelpfulnessReward(), AdaptiveRewardScaler(2.))]
    assert list(noise_floors(f, .1)) == [.1, .2]
    x = np.stack([rng(0).normal(size=(200, 8)), 1e-3 * rng(1).normal(size=(200, 8))], -1)
    def share(z): return np.corrcoef(z.sum(-1).ravel(), z[..., 1].ravel())[0, 1]
    assert share(normalize_groups(x)) > .6 and abs(share(normalize_groups(x, .1))) < .1
    lost = x.copy(); lost[0, 0] = np.nan
    assert not normalize_groups(lost)[0, 0].any() and np.isfinite(normalize_groups(lost)).all()

class Letters(RewardFunction):
    name = 'letters'
    async def compute_reward(self, turns, context=None): return RewardResult(min(1, len(turns[-1].text) / 40))

class Vowels(RewardFunction):
    name = 'vowels'
    async def compute_reward(self, turns, context=None): return RewardResult(.5, reward=100. + sum(c in 'aeiou' for c in turns[-1].text))

@pytest.mark.parametrize('auto', [False, True])
def test_a_trainer_takes_it_as_it_is_and_logs_raw_and_calibrated(auto, tmp_path):
    from stateset_nb.agents import Agent, AgentConfig, PolicyBackend
    from stateset_nb.environments import ConversationEnvironment
    from stateset_nb.policy import TinyConfig, load_policy, save_policy, tiny_policy
    from stateset_nb.trainers import MultiTurnGRPOTrainer, TrainingConfig
    start = save_policy(tiny_policy(cast, 0, TinyConfig(20, hidden_size=16, layers=1), cache=False), tmp_path / 'p')
    env = ConversationEnvironment([Scenario(c.id, c.messages[:1]) for c in cast])
    calibrator = MultiRewardCalibrator([Letters(), Vowels()])
    if auto: reward = CalibratedSum([CalibratedRewardFunction(r, calibrator.normalizers[r.name], auto_calibrate=True) for r in calibrator.rewards])
    else: soon(calibrator.calibrate(cast)); reward = calibrator.combine()
    frozen = {n: s.to_dict() for n, s in calibrator.normalizers.items()}
    seen = []
    async def go():
        t = MultiTurnGRPOTrainer(Agent(AgentConfig('tiny'), PolicyBackend(load_policy(start, 'cpu'))), env, reward, TrainingConfig(num_episodes=3, prompts_per_step=3, num_generations=4, max_completion_length=10, max_turns=1),
                                 callbacks=[reward], output_dir=tmp_path / 'run')
        return [m async for m in t.steps()]
    metrics = soon(go())
    for m in metrics:
        for n in ('letters', 'vowels'): seen.append([m[f'rewards/{n}{k}/mean'] for k in ('', '/raw', '/calibrated')])
        assert m['reward'] == pytest.approx(.5 * m['rewards/letters/calibrated/mean'] + .5 * m['rewards/vowels/calibrated/mean'])
        assert m['rewards/vowels/mean'] == .5 and m['rewards/vowels/raw/mean'] >= 100
    assert (metrics[0]['rewards/vowels/calibrated/mean'] == metrics[0]['rewards/vowels/raw/mean']) == auto   # the first round of auto is raw, all of it
    assert abs(metrics[1]['rewards/vowels/calibrated/mean']) < 20
    assert auto or {n: s.to_dict() for n, s in calibrator.normalizers.items()} == frozen
    assert not auto or calibrator.normalizers['letters'].stats.n == 36
    for line in (tmp_path / 'run' / 'trajectories.jsonl').read_text().splitlines():
        d = json.loads(line)
        assert {'letters', 'letters/raw', 'letters/calibrated', 'calibrated_sum'} <= d['components'].keys()
