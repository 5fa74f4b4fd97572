"""Tests of all queries in one pass: the same as one by one, as the attribution's own methods, and as SciPy's."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dtda.reporting import certainty
from lightning_dtda.reporting.certainty import FDR
from lightning_dtda.reporting.facts import without_repeated_warnings
from lightning_dtda.statistics.differences import Mean, Quantile, resolve_difference
from tests.reporting.attributions import EXAMPLES, GROUPS, make_attribution

ROUNDING = {"rtol": 1e-9, "atol": 1e-12}
"""Sums are made in another order; the spread is a difference of logarithms."""


def each_tested(attribution, difference):
    """Tests of one difference."""
    return (tests for (tests,) in certainty.each_tested(attribution, [difference]))


DIFFERENCES = ["mean", "spread", "variance", "wasserstein", Mean("median"), Quantile(0.9)]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda each: getattr(each, "name", each))
def test_all_queries_are_tested_as_each_on_its_own_and_as_the_methods_say(difference):
    attribution = make_attribution()
    found = list(each_tested(attribution, difference))
    assert len(found) == len(attribution.queries)
    for position, tests in enumerate(found):
        alone = attribution.select([position])
        expected = certainty.tested(alone, difference)
        for part in ("influence", "standard_error", "p_values", "q_values", "interval"):
            torch.testing.assert_close(getattr(tests, part), getattr(expected, part), equal_nan=True, **ROUNDING)
        assert (tests.silence is None) == (expected.silence is None)
        torch.testing.assert_close(tests.influence, alone.influence(difference)[0], **ROUNDING)
        torch.testing.assert_close(tests.standard_error, alone.standard_error(difference)[0], **ROUNDING)
        torch.testing.assert_close(tests.p_values, alone.p_values(difference)[0], **ROUNDING)
        assert torch.equal(tests.significant, alone.significant(difference, FDR)[0])
        if resolve_difference(difference).no_interval(len(alone.runs)):
            assert tests.interval.isnan().all()
        else:
            torch.testing.assert_close(tests.interval, alone.interval(difference)[:, 0], **ROUNDING)


@pytest.mark.parametrize("difference", ["mean", "spread"])
def test_what_is_known_about_the_others_does_not_depend_on_the_other_queries(difference):
    attribution = make_attribution()
    for position, tests in enumerate(each_tested(attribution, difference)):
        alone = certainty.tested(attribution.select([position]), difference).silence
        assert (tests.silence.none, tests.silence.unknown) == (alone.none, alone.unknown)
        for part in ("negligible", "found_from", "runs"):
            assert getattr(tests.silence, part) == pytest.approx(getattr(alone, part), rel=1e-6)


def test_differences_tested_together_are_as_each_on_its_own():
    attribution = make_attribution()
    together = certainty.each_tested(attribution, DIFFERENCES)
    alone = zip(*(each_tested(attribution, difference) for difference in DIFFERENCES), strict=True)
    for found, expected in zip(together, alone, strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.difference == other.difference
            torch.testing.assert_close(one.interval, other.interval, equal_nan=True, **ROUNDING)
            torch.testing.assert_close(one.q_values, other.q_values, **ROUNDING)


def test_q_values_are_scipys_and_decide_what_is_significant():
    for tests in each_tested(make_attribution(), "mean"):
        np.testing.assert_allclose(tests.q_values, stats.false_discovery_control(tests.p_values.numpy()), rtol=1e-12)
        assert torch.equal(tests.significant, tests.q_values <= FDR)
        assert 0 < tests.discoveries < EXAMPLES


def test_blocks_of_queries_are_as_large_as_fit_and_give_the_same(monkeypatch):
    attribution, blocks = make_attribution(), []
    together = [tests.p_values for tests in each_tested(attribution, "spread")]
    original = certainty.inferences

    def counted(block, *arguments, **keywords):
        blocks.append(len(block.queries))
        return original(block, *arguments, **keywords)

    monkeypatch.setattr(certainty, "inferences", counted)
    for most, expected in ((2, [2, 1]), (1, [1, 1, 1]), (3, [3])):
        monkeypatch.setattr(certainty, "_AT_ONCE", most * len(attribution.runs) * EXAMPLES + 1)
        blocks.clear()
        torch.testing.assert_close(
            [tests.p_values for tests in each_tested(attribution, "spread")], together, **ROUNDING
        )
        assert blocks == expected


def test_results_come_one_by_one():
    passed = each_tested(make_attribution(), "mean")
    assert next(passed).possible
    assert len(list(passed)) == 2


def test_influences_that_are_not_a_number_are_not_significant_and_spoil_no_other():
    attribution = make_attribution()
    whole = [tests.p_values for tests in each_tested(attribution, "spread")]
    attribution.responses[3, 1, 7] = torch.nan
    for position, tests in enumerate(each_tested(attribution, "spread")):
        spoilt = torch.arange(EXAMPLES) == 7 if position == 1 else torch.zeros(EXAMPLES, dtype=torch.bool)
        for part in (tests.influence, tests.p_values, *tests.interval):
            assert torch.equal(part.isnan(), spoilt)
        assert not tests.significant[spoilt].any()
        torch.testing.assert_close(tests.p_values[~spoilt], whole[position][~spoilt], **ROUNDING)


def test_what_is_known_about_the_others_does_not_depend_on_one_that_is_not_a_number():
    attribution = make_attribution(runs=4)
    with without_repeated_warnings():
        whole = [tests.silence for tests in each_tested(attribution, "mean")]
        attribution.responses[0, :, 5] = torch.nan
        spoilt = [tests.silence for tests in each_tested(attribution, "mean")]
    for before, after in zip(whole, spoilt, strict=True):
        assert before.unknown > 0
        assert after.unknown == before.unknown + 1
        assert after.found_from == pytest.approx(before.found_from)


def test_where_no_influence_is_a_number_nothing_can_be_found():
    attribution = make_attribution()
    attribution.responses[3, 1] = torch.nan
    for difference in ("mean", "spread"):
        silence = list(each_tested(attribution, difference))[1].silence
        assert (silence.none, silence.unknown, silence.found_from) == (0, EXAMPLES, float("inf"))


def test_a_single_run_has_a_mean_and_nothing_else():
    attribution = make_attribution(runs=1)
    with without_repeated_warnings():
        mean, spread = (next(each_tested(attribution, name)) for name in ("mean", "spread"))
    torch.testing.assert_close(mean.influence, attribution.responses[0, 0].double())
    assert mean.p_values.isnan().all()
    assert not mean.possible
    assert (mean.q_values == 1).all()
    assert mean.silence is None
    assert spread.influence.isnan().all()
    assert spread.interval.isnan().all()
    assert not spread.discoveries


def test_groups_and_kept_attributions_are_tested_the_same():
    groups = [{"name": name, "examples": [number]} for number, name in enumerate(GROUPS)]
    attribution, grouped = make_attribution(), make_attribution(removals=groups)
    kept = attribution.keep_top(3)
    for difference in ("mean", "spread", "wasserstein"):
        for full, group, few in zip(*(each_tested(a, difference) for a in (attribution, grouped, kept)), strict=True):
            assert torch.equal(group.p_values, full.p_values)
            # from figures in the precision of the responses
            torch.testing.assert_close(few.p_values, full.p_values, rtol=1e-4, atol=1e-9)
            assert torch.equal(few.significant, full.significant)
            known = ~few.influence.isnan()
            assert known.all() if difference != "wasserstein" else 0 < known.sum() < EXAMPLES
            torch.testing.assert_close(few.influence[known], full.influence[known], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(few.interval[:, known], full.interval[:, known], rtol=1e-4, atol=1e-6)
