"""The part of responses and gradients outside the range of the curvature, which influence functions miss."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature
from lightning_dtda.estimators.curvatures.spectrum import Spectrum, fit_spectrum
from lightning_dtda.estimators.estimator import Question
from lightning_dtda.estimators.forward import forward_sweep
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT, resolve_removals
from lightning_dtda.replay import Measurement, Replay, query_examples, resolve_measurement, training_examples
from lightning_dtda.trajectory import Run
from lightning_dtda.units import GIB

Data = LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any]


def range_share(
    run: Run,
    module: LightningModule,
    data: Data,
    queries: DataLoader[Any] | Dataset[Any],
    measurement: str | Measurement,
    curvature: Curvature,
    step: int | None = None,
    *,
    memory_budget: float = 1.0,
) -> Tensor:
    r"""Return the share of the measurement's gradient that lies in the range of the curvature.

    .. math:: \frac{\lVert P\, \nabla m_q(\theta_t) \rVert^2}{\lVert \nabla m_q(\theta_t) \rVert^2}, \qquad
        P = \sum_{|\lambda_i| > c\, |\lambda|_{\max}} u_i u_i^\top

    with eigenvalues :math:`\lambda_i` and eigenvectors :math:`u_i` of the curvature at :math:`\theta_t`, and its
    cut-off c (its argument ``cutoff``, if it has one). If the share is 1, responses outside the range
    (:func:`null_space_response`) do not change m, and influence functions with the pseudo-inverse miss nothing
    (Mlodozeniec et al., arXiv 2506.12965, theorem 2 and figure 3).

    Args:
        run: A recorded run.
        module: The LightningModule that was trained.
        data: Training data, as for :func:`~lightning_dtda.attribute`.
        queries: The Q queries.
        measurement: m: ``"loss"``, ``"margin"``, ``"prediction"``, or a callable ``(module, batch) -> (B,)``.
        curvature: Curvature whose ``fit`` returns a :class:`~lightning_dtda.estimators.Spectrum`; its damping is
            ignored.
        step: Step t; ``None`` for the end of training.
        memory_budget: Memory budget in GiB.

    Returns:
        Shares between 0 and 1 ``(queries,)``; ``nan`` if the gradient is zero.

    Raises:
        AttributionError: If the curvature has no spectrum, the step is out of range, or the measurement cannot be
            differentiated.
        ReplayError: If the module or the data differ from those of the training.
    """
    replay, step = _open(run, module, data, step)
    spectrum = _fit(curvature, replay, step, memory_budget)
    examples = query_examples(queries, replay.examples)
    question = Question(
        module,
        replay.examples,
        examples,
        resolve_measurement(measurement)[1],
        replay.device,
        resolve_removals(LEAVE_ONE_OUT, replay.examples),
        step,
    )
    # gradients, projections, and a temporary of the same size for each
    size = max(1, int(memory_budget * GIB / 2 / (4 * replay.layout.size * replay.dtype.itemsize)))
    shares = []
    for numbers in torch.arange(len(examples)).split(size):
        gradients = question.measure_with_gradients(replay, numbers.tolist())[1][0]
        shares.append(spectrum.project(gradients).square().sum(1) / gradients.square().sum(1))
    return torch.cat(shares)


def null_space_response(
    run: Run,
    module: LightningModule,
    data: Data,
    curvature: Curvature,
    removals: Any = LEAVE_ONE_OUT,
    step: int | None = None,
    *,
    memory_budget: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Return the part of the parameters' unrolled responses that lies outside the range of the curvature.

    .. math:: r^{NS}_k = r^{UD}_k - P\, r^{UD}_k, \qquad r^{UD}_k = -\sum_{n \in S_k} \frac{d \theta_t}{d w_n}

    with P as in :func:`range_share`, and the responses of unrolled differentiation, computed in forward mode. Influence
    functions miss this part (Mlodozeniec et al., arXiv 2506.12965, theorem 2 and figure 3).

    Args:
        run: A recorded run.
        module: The LightningModule that was trained.
        data: Training data, as for :func:`~lightning_dtda.attribute`.
        curvature: Curvature whose ``fit`` returns a :class:`~lightning_dtda.estimators.Spectrum`; its damping is
            ignored.
        removals: K removals, as for :func:`~lightning_dtda.attribute`. All are computed at once, which takes K P
            numbers, and K P more for each of the optimizer's states.
        step: Step t; ``None`` for the end of training.
        memory_budget: Memory budget of the curvature in GiB.

    Returns:
        The part outside the range :math:`r^{NS}` and the whole :math:`r^{UD}`, ``(removals, P)`` each: predicted
        changes of the parameters when the examples are removed.

    Raises:
        AttributionError: If the curvature has no spectrum, or the step or the removals are invalid.
        ReplayError: If the module or the data differ from those of the training, or the responses are not finite.
    """
    replay, step = _open(run, module, data, step)
    spectrum = _fit(curvature, replay, step, memory_budget)
    membership = resolve_removals(removals, replay.examples).membership(replay.dtype, replay.device)
    (position,) = forward_sweep(replay, membership, (step,))
    responses = position.tangents.theta[0]
    return responses - spectrum.project(responses), responses


def _open(run: Run, module: LightningModule, data: Data, step: int | None) -> tuple[Replay, int]:
    """Return the run's replay, checked against its record, and the step t."""
    step = run.steps if step is None else step
    if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= run.steps:
        raise AttributionError(
            f"There is no step {step!r} in {run.path}. Give 1 to {run.steps}, or None for the end of training."
        )
    replay = Replay([run], module, training_examples(data), device=module.device)
    replay.check_step(step - 1)
    return replay, step


def _fit(curvature: Curvature, replay: Replay, step: int, memory_budget: float) -> Spectrum:
    objective = Objective(replay, step, memory=memory_budget * GIB / 2)
    return fit_spectrum(curvature, objective, "so there is no range to project onto")
