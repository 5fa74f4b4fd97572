import pytest

from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.facts import largest_drift, worst_diagnosis
from lightning_dtda.reporting.formatting import common_exponent, number
from lightning_dtda.reporting.rows import top_examples
from tests.reporting.attributions import make_attribution


def test_a_single_run_has_no_spread_influence():
    assert make_attribution(runs=1).available_differences == ["mean", "wasserstein"]


def test_the_largest_drift_skips_what_was_not_measured():
    drift = {"a": {"parameters": 1e-6, "gradients": None}, "b": {"parameters": 3e-6, "gradients": None}}
    attribution = make_attribution(drift=drift)
    assert largest_drift(attribution, "parameters") == 3e-6
    assert largest_drift(attribution, "gradients") is None


def test_the_worst_diagnosis_is_that_of_these_runs():
    attribution = make_attribution(chaotic=["seed-0011"])

    assert worst_diagnosis(attribution, "precision") == pytest.approx(11e-6)
    assert worst_diagnosis(attribution.trusted(), "precision") == pytest.approx(10e-6)
    assert worst_diagnosis(make_attribution(diagnosis={}), "precision") is None


def test_no_example_at_all_is_refused(attribution):
    with pytest.raises(AttributionError, match="k=0; give the number of removals to show, at least 1"):
        top_examples(attribution, 0, "mean", 0)


@pytest.mark.parametrize(
    ("largest", "exponent"), [(0.0, 0), (0.99, -3), (1.0, 0), (9999.0, 0), (10_000.0, 3), (1e-3, -3), (9.9e-4, -6)]
)
def test_a_column_shares_the_power_of_ten_of_its_largest_value(largest, exponent):
    assert common_exponent([0.0, -largest, float("nan")]) == exponent


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert number(-0.0001) == "0.000"
