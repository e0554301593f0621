"""Properties of the statistics: what must hold for any two agents on any scenarios."""
import itertools, math
import numpy as np, pytest
from hypothesis import assume, example, given, settings, strategies as st
from scipy.stats import binomtest, ttest_rel
from statsmodels.stats.multitest import multipletests
from stateset_nb.core import ConfigError, DataError, StateSetError
from stateset_nb.stats import (VERDICTS, PairedComparison, alpha_interval, cohen_kappa, compare_paired, holm, holm_adjust, krippendorff_alpha, mean_interval, paired_interval,
                               plot_comparisons, scenarios_needed, success_interval, wilson_interval)

binary = st.integers(0, 1)
share = st.integers(0, 100).map(lambda x: x / 100)

@st.composite
def two_agents(draw, value=binary):
    n, k = draw(st.integers(2, 30)), draw(st.integers(1, 4))
    side = st.lists(st.lists(value, min_size=k, max_size=k), min_size=n, max_size=n)
    names = [f's{i}' for i in range(n)]
    return dict(zip(names, draw(side))), dict(zip(names, draw(side)))

anything = st.one_of(two_agents(), two_agents(share))
margins = st.sampled_from([.01, .05, .2, .9])

@given(anything, margins)
def test_swapping_the_agents_mirrors_everything(ab, margin):
    a, b = ab
    x, y = compare_paired(a, b, margin=margin), compare_paired(b, a, margin=margin)
    mirror = {'better': 'worse', 'worse': 'better'}
    if x.verdict in mirror: assert y.verdict == mirror[x.verdict]
    else: assert y.verdict not in mirror
    assert (y.difference, y.low, y.high, y.p_value) == (-x.difference, -x.high, -x.low, x.p_value)

@given(two_agents(st.integers(1, 50).map(float)), margins)
def test_swapping_inverts_a_ratio(ab, margin):
    x, y = (compare_paired(p, q, margin=margin, scale='ratio', higher_is_better=False) for p, q in (ab, ab[::-1]))
    assert 1 + y.difference == pytest.approx(1 / (1 + x.difference))
    assert 1 + y.high == pytest.approx(1 / (1 + x.low))
    assert (x.verdict == 'better') == (y.verdict == 'worse')

@given(two_agents(st.integers(1, 50).map(float)), st.floats(.01, 100))
def test_a_ratio_knows_no_unit(ab, factor):
    a, b = ab
    scaled = [{k: [factor * x for x in v] for k, v in side.items()} for side in ab]
    x, y = compare_paired(a, b, scale='ratio'), compare_paired(*scaled, scale='ratio')
    assert [y.difference, y.low, y.high] == pytest.approx([x.difference, x.low, x.high], abs=1e-9)

@given(two_agents(), margins)
def test_lower_is_better_is_the_same_question_about_failures(ab, margin):
    fails = [{k: [1 - x for x in v] for k, v in side.items()} for side in ab]
    x, y = compare_paired(*ab, margin=margin), compare_paired(*fails, margin=margin, higher_is_better=False)
    assert (x.verdict, x.n_more, x.within_margin) == (y.verdict, y.n_more, y.within_margin)

@given(anything, st.randoms())
def test_the_order_of_scenarios_does_not_matter(ab, random):
    a, b = ab
    names = list(a); random.shuffle(names)
    assert compare_paired({k: a[k] for k in names}, {k: b[k] for k in reversed(names)}) == compare_paired(a, b)

@given(anything, margins, st.sampled_from([.8, .95, .99]))
def test_the_interval_holds_the_estimate_and_the_verdict_follows_from_it(ab, margin, confidence):
    c = compare_paired(*ab, margin=margin, confidence=confidence)
    assert c.low <= c.difference <= c.high and c.low <= c.bound <= c.difference
    assert c.difference == pytest.approx(c.after - c.before)
    assert c.verdict in VERDICTS
    assert (c.verdict == 'better') == (c.low > 0) and (c.verdict == 'worse') == (c.high < 0)
    assert (c.verdict == 'not_worse') == (c.low <= 0 <= c.high and c.bound > -margin)
    assert c.within_margin == (c.bound > -margin)
    assert (c.n_more > 0) == (c.verdict == 'inconclusive')
    assert c.metric in c.sentence() and 'nan' not in c.sentence()
    assert PairedComparison.from_dict(c.to_dict()) == c

@given(anything)
def test_a_wider_margin_never_takes_a_pass_away(ab):
    small, large = (compare_paired(*ab, margin=m) for m in (.05, .2))
    assert large.within_margin >= small.within_margin
    assert (small.low, small.high) == (large.low, large.high)

@given(st.lists(st.floats(-1, 1), min_size=3, max_size=30))
def test_without_a_guard_it_is_the_paired_t_test(d):
    assume(np.std(d) > 1e-6)
    i, book = paired_interval(d), ttest_rel(d, np.zeros(len(d)))
    assert float(i.p_value) == pytest.approx(book.pvalue, abs=1e-9)
    assert [float(i.low), float(i.high)] == pytest.approx(list(book.confidence_interval()), abs=1e-9)

@given(st.lists(st.sampled_from([-1., 0., 1.]), min_size=2, max_size=40), st.floats(.1, 1))
def test_few_changes_never_give_a_sure_verdict_for_nothing(d, guard):
    i = paired_interval(d, guard)
    assert i.high > i.low and 0 <= i.p_value <= 1

@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_wilson(kn):
    k, n = kn
    i, book = wilson_interval(k, n), binomtest(k, n).proportion_ci(method='wilson')
    assert [i.low, i.high] == pytest.approx([book.low, book.high], abs=1e-9)
    assert 0 <= i.low <= i.value <= i.high <= 1

@given(st.lists(st.lists(binary, min_size=1, max_size=6), min_size=1, max_size=30))
def test_more_trials_of_the_same_scenarios_never_pretend_to_be_more_scenarios(outcomes):
    i = success_interval(outcomes)
    assert 0 <= i.low <= i.value <= i.high <= 1 and i.n == len(outcomes)
    once = wilson_interval(i.value * len(outcomes), len(outcomes))
    tries = sum(map(len, outcomes))
    every = wilson_interval(i.value * tries, tries)
    assert every.high - every.low - 1e-9 <= i.high - i.low <= once.high - once.low + 1e-9

@given(st.floats(0, 1), st.floats(.01, .5), st.floats(0, 1))
def test_the_number_of_scenarios_falls_with_the_change_and_rises_with_power(sd, change, guard):
    n = scenarios_needed(sd, change, guard)
    assert n >= scenarios_needed(sd, 2 * change, guard) and n <= scenarios_needed(sd, change, guard, power=.95)
    assert n >= scenarios_needed(sd, change, guard, one_sided=True) and n >= scenarios_needed(sd, change)

@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_holm(p):
    assert holm_adjust(p) == pytest.approx(multipletests(p, method='holm')[1], abs=1e-12)
    assert (holm_adjust(p) >= np.array(p)).all()

@settings(max_examples=50)
@given(st.lists(anything, min_size=1, max_size=4))
def test_correction_only_takes_verdicts_back(pairs):
    alone = [compare_paired(*p) for p in pairs]
    together = holm(alone)
    for a, t in zip(alone, together):
        assert t.verdict == a.verdict or (a.verdict in ('better', 'worse') and t.verdict == ('not_worse' if a.within_margin else 'inconclusive'))
        assert (t.n_more > 0) == (t.verdict == 'inconclusive')
    assert holm(alone[:1])[0].verdict == alone[0].verdict

@pytest.mark.parametrize('before, after, kw', [
    ({'a': 1, 'b': 0}, {'a': 1, 'c': 0}, {}), ({'a': 1}, {'a': 1}, {}), ({}, {}, {}),
    ({'a': float('nan'), 'b': 0}, {'a': 1, 'b': 0}, {}), ({'a': [], 'b': 0}, {'a': 1, 'b': 0}, {}),
    ({'a': 'yes', 'b': 0}, {'a': 1, 'b': 0}, {}), ({'a': [[1]], 'b': 0}, {'a': 1, 'b': 0}, {}), ({'a': 2, 'b': 0}, {'a': 1, 'b': 0}, {}),
    ({'a': 0, 'b': 1}, {'a': 1, 'b': 1}, {'scale': 'ratio'})])
def test_bad_data_is_refused(before, after, kw):
    with pytest.raises(DataError): compare_paired(before, after, **kw)

@pytest.mark.parametrize('kw', [{'margin': 0}, {'margin': -.1}, {'confidence': 95}, {'scale': 'percent'}])
def test_bad_settings_are_refused(kw):
    with pytest.raises(ConfigError): compare_paired({'a': 1, 'b': 0}, {'a': 1, 'b': 0}, **kw)

@given(st.lists(st.one_of(st.floats(), st.integers(-3, 3)), max_size=5))
def test_a_mean_is_an_interval_or_our_error(values):
    assume(all(abs(v) < 1e100 or v != v or abs(v) == float('inf') for v in values))
    try: i = mean_interval(values)
    except StateSetError: return
    assert i.low <= i.value <= i.high

def test_what_is_shown_is_escaped():
    c = compare_paired({'a': 1, 'b': 0}, {'a': 1, 'b': 0}, metric='<script>')
    assert '<script>' not in c._repr_html_() and '&lt;script&gt;' in c._repr_html_()

def test_a_plot_in_one_unit_shows_the_unit_and_many_count_in_margins():
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    a, b = {'a': 1, 'b': 0, 'c': 1}, {'a': 1, 'b': 1, 'c': 0}
    rate = compare_paired(a, b)
    ratio = compare_paired({'a': 1, 'b': 2}, {'a': 2, 'b': 2}, 'latency', scale='ratio', higher_is_better=False)
    assert 'points' in rate.plot().get_xlabel() and '%' in ratio.plot().get_xlabel()
    assert 'margins' in plot_comparisons([rate, ratio]).get_xlabel()
    with pytest.raises(DataError): plot_comparisons([])
    plt.close('all')

# ---- agreement

ratings = st.lists(st.lists(st.integers(1, 5) | st.none(), min_size=3, max_size=3), min_size=2, max_size=15)

@given(ratings, st.sampled_from(['nominal', 'interval']), st.randoms())
@example([[1, 1, None], [2, 2, 2]], 'interval', None)
def test_alpha_is_what_its_definition_says(table, level, rnd):
    units = [[v for v in r if v is not None] for r in table]
    units = [u for u in units if len(u) > 1]
    far = (lambda a, b: float(a != b)) if level == 'nominal' else (lambda a, b: (a - b) ** 2)
    every = [v for u in units for v in u]
    seen = sum(sum(far(a, b) for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units)
    chance = sum(far(a, b) for a, b in itertools.permutations(every, 2))
    found = krippendorff_alpha(table, level)
    if chance == 0: assert math.isnan(found)
    else:
        assert found == pytest.approx(1 - (len(every) - 1) * seen / chance)
        if rnd is not None: rnd.shuffle(table)
        assert krippendorff_alpha([r[::-1] for r in table], level) == pytest.approx(found)

@given(ratings, st.sampled_from(['nominal', 'ordinal', 'interval']), st.integers(0, 9))
def test_the_interval_of_alpha_holds_its_value_and_says_so_where_nothing_is_known(table, level, seed):
    i, value = alpha_interval(table, level, draws=20, seed=seed), krippendorff_alpha(table, level)
    if math.isnan(value): assert math.isnan(i.value) and (i.low, i.high) == (-1, 1)
    else: assert i.value == value and i.low <= value <= i.high
    assert i.n == sum(sum(v is not None for v in r) > 1 for r in table)

@given(st.lists(st.tuples(share, share), min_size=1, max_size=20), st.booleans())
@example([(.1, .1)] * 3, True)   # rounding gives .1, .1, .1 a variance above 0
def test_kappa_is_what_its_definition_says(pairs, quadratic):
    x, y = map(list, zip(*pairs))
    bad = (lambda a, b: (a - b) ** 2) if quadratic else (lambda a, b: float(a != b))
    seen, chance = (math.fsum(bad(a, b) for a, b in ab) for ab in (pairs * len(x), itertools.product(x, y)))
    found = cohen_kappa(x, y, quadratic)
    if chance == 0: assert math.isnan(found)
    else: assert found == pytest.approx(1 - seen / chance, abs=1e-9) == cohen_kappa(y, x, quadratic)
