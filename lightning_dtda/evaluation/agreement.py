"""Linear datamodeling score and leave-one-out correlation as torchmetrics metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation.functional.agreement import REPLICATES, agreement
from lightning_dtda.statistics.correlation import Correlation
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.samples import arrange, collect

_PLOTTED = ("score", "low", "high", "ceiling")

Result = dict[str, Tensor]

_STATES = ("predicted", "baseline", "real", "real_baseline")


class InfluenceAgreement(Metric):
    """Base class of both metrics: keeps the samples of all queries as state, and computes their correlation.

    The states have the queries first, so batches and processes can be concatenated.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(
        self,
        difference: str | Difference = "mean",
        correlation: Correlation = "pearson",
        *,
        paired: bool = False,
        replicates: int = REPLICATES,
        confidence: float = 0.95,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if correlation not in get_args(Correlation):
            raise AttributionError(f"correlation={correlation!r}; choose from {', '.join(get_args(Correlation))}.")
        self.difference = resolve_difference(difference)
        self.correlation: Correlation = correlation
        self.paired = paired
        self.replicates = replicates
        self.confidence = confidence
        self.seed = seed
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @override
    def update(self, predicted: Tensor, baseline: Tensor, real: Tensor, real_baseline: Tensor) -> None:
        """Add queries.

        Args:
            predicted: Predicted samples without each removal ``(removals, runs, queries)``.
            baseline: Samples of the same runs ``(runs, queries)``.
            real: Samples of models trained without each removal ``(removals, seeds, queries)``.
            real_baseline: Samples of models trained on everything ``(baseline seeds, queries)``.

        Raises:
            AttributionError: If shapes do not match each other or those of earlier queries, or values are not finite.
        """
        arranged = arrange(predicted, baseline, real, real_baseline)
        for name, tensor in zip(_STATES, arranged, strict=True):
            state = getattr(self, name)
            if state and state[0].shape[1:] != tensor.shape[1:]:
                raise AttributionError(
                    f"{name} has {tuple(tensor.shape[1:])} samples and removals per query, but earlier queries had "
                    f"{tuple(state[0].shape[1:])}. Use the same models for all queries."
                )
            state.append(tensor)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the score with its interval and ceiling.

        Returns:
            The same as :func:`~lightning_dtda.evaluation.functional.linear_datamodeling_score`.

        Raises:
            AttributionError: If there are too few samples, or the real influences have no order to predict.
        """
        arranged = tuple(dim_zero_cat(getattr(self, name)) for name in _STATES)
        samples = collect(arranged, self.paired)
        found, _ = agreement(samples, self.difference, self.correlation, self.replicates, self.confidence, self.seed)
        return found

    @override
    def plot(self, val: Result | Sequence[Result] | None = None, ax: Any = None) -> Any:
        """Plot the score with its interval and the noise ceiling; several results are plotted over their index.

        Args:
            val: Result of :meth:`compute` or ``forward``, or a list of results; ``None`` computes one.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        results = [self.compute() if val is None else val] if val is None or isinstance(val, dict) else val
        shown = [{name: result[name] for name in _PLOTTED} for result in results]
        return self._plot(shown[0] if len(shown) == 1 else shown, ax)


class LinearDatamodelingScore(InfluenceAgreement):
    r"""Distributional linear datamodeling score: do predictions order random removals as retraining does?

    .. math::
        \mathrm{LDS} = \frac1Q \sum_q \rho\left(
            \bigl(\Delta(X_q, \hat Y_{k,q})\bigr)_k,\; \bigl(\Delta(X'_q, Y'_{k,q})\bigr)_k \right)

    See :func:`~lightning_dtda.evaluation.functional.linear_datamodeling_score` for terms and sources. To compute
    several differences, use a ``MetricCollection``, which stores the samples once.

    Args:
        difference: ``mean`` for the usual score; ``variance``, ``wasserstein``, the import path of a class, or a
            :class:`~lightning_dtda.statistics.differences.Difference`.
        paired: Whether seed i of the real baseline is the same as seed i of the models trained without examples.
        replicates: Number of bootstrap draws; 0 skips the interval.
        confidence: Confidence level of the interval.
        seed: Seed of the bootstrap draws.
        kwargs: Keyword arguments for :class:`torchmetrics.Metric`.

    Raises:
        AttributionError: If the difference is unknown.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> effects = torch.randn(12, 1, 3, generator=generator)
        >>> baseline, real_baseline = torch.randn(5, 3, generator=generator), torch.randn(8, 3, generator=generator)
        >>> real = effects + torch.randn(12, 8, 3, generator=generator)
        >>> metric = LinearDatamodelingScore("mean")
        >>> metric.update(baseline + effects, baseline, real, real_baseline)
        >>> found = metric.compute()
        >>> print(f"{found['score']:.2f} of at most {found['ceiling']:.2f}")
        0.85 of at most 0.88
    """

    def __init__(
        self,
        difference: str | Difference = "mean",
        *,
        paired: bool = False,
        replicates: int = REPLICATES,
        confidence: float = 0.95,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            difference, "spearman", paired=paired, replicates=replicates, confidence=confidence, seed=seed, **kwargs
        )


class LeaveOneOutCorrelation(InfluenceAgreement):
    """Correlation between predicted and real influences of single examples, averaged over queries.

    See :func:`~lightning_dtda.evaluation.functional.leave_one_out_correlation`.

    Args:
        difference: As for :class:`LinearDatamodelingScore`.
        correlation: ``"pearson"`` or ``"spearman"``.
        paired: As for :class:`LinearDatamodelingScore`.
        replicates: As for :class:`LinearDatamodelingScore`.
        confidence: As for :class:`LinearDatamodelingScore`.
        seed: As for :class:`LinearDatamodelingScore`.
        kwargs: Keyword arguments for :class:`torchmetrics.Metric`.

    Raises:
        AttributionError: If the difference or the correlation is unknown.

    Example:
        >>> import torch
        >>> changes = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
        >>> metric = LeaveOneOutCorrelation()
        >>> metric.update(changes, torch.zeros(1, 1), changes.square(), torch.zeros(1, 1))
        >>> metric.compute()["score"]
        tensor(0.9897, dtype=torch.float64)
    """
