"""Source, against its equations written out with dense matrix exponentials, and against unrolled differentiation."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch.func import hessian, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import EKFAC, Diagonal, ExactHessian, GaussNewton, Hessian, Identity, Source
from lightning_dtda.estimators.segments import segment
from lightning_dtda.replay import Replay, training_examples
from tests.estimators.baselines import EXAMPLES, QUERIES, STEPS, Classifier, ask, classification, written_out

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.2),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.05, eps=1e-2),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.05, eps=1e-2, weight_decay=0.3, amsgrad=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.02, eps=1e-2, centered=True, momentum=0.5),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, lr_decay=0.1, eps=1e-2),
}


class Trained(Classifier):
    """With an optimizer of choice, and a learning rate that falls from step to step."""

    def __init__(self, optimizer="SGD", bias_rate=None):
        super().__init__()
        self.optimizer, self.bias_rate = optimizer, bias_rate

    def configure_optimizers(self):
        groups = list(self.parameters())
        if self.bias_rate is not None:
            groups = [
                {"params": [p for p in groups if p.ndim == 2]},
                {"params": [p for p in groups if p.ndim == 1], "lr": self.bias_rate},
            ]
        optimizer = OPTIMIZERS[self.optimizer](groups)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def middle(rates, first, last):
    """The step that is half of the way from the first to the last."""
    reached = [sum(rates[first:step]) + rates[step] / 2 for step in range(first, last)]
    half = sum(rates[first:last]) / 2
    return min(range(first, last), key=lambda step: abs(reached[step - first] - half))


def dense(run, starts, end, curvature=None, rates=None, matrix=None, decay=0.0):
    """The equations, with matrices written out.

    Args:
        run: A run of classifiers.
        starts: First steps of the segments.
        end: The step that is asked about.
        curvature: From parameters to their matrix; the Hessian if not given.
        rates: Of all steps; those of the classifiers if not given.
        matrix: From a step to the diagonal matrix beside the rate.
        decay: Share of the parameters that a step's rate takes away.
    """
    margins, losses = written_out(run)
    rates = [0.2 * 0.9**step for step in range(STEPS)] if rates is None else rates
    curvature = curvature or hessian(lambda theta: losses(theta).mean())
    adjoint = jacrev(margins)(run.theta_vector(end))
    total = torch.zeros(QUERIES, EXAMPLES, dtype=torch.float64)
    for first, last in reversed(list(zip(starts, [*starts[1:], end], strict=True))):
        step = middle(rates, first, last)
        theta = run.theta_vector(step)
        length = sum(rates[first:last])
        scale = torch.eye(len(theta), dtype=torch.float64) if matrix is None else torch.diag(matrix(step))
        exponent = -length * (scale @ curvature(theta) + decay * torch.eye(len(theta), dtype=torch.float64))
        # the integral of the matrix exponential, from the exponential of a block matrix
        blocks = torch.zeros(2 * len(theta), 2 * len(theta), dtype=torch.float64)
        blocks[: len(theta), : len(theta)] = exponent
        blocks[: len(theta), len(theta) :] = length * scale
        exponential = torch.linalg.matrix_exp(blocks)
        total += adjoint @ exponential[: len(theta), len(theta) :] @ jacrev(losses)(theta).T / EXAMPLES
        adjoint = adjoint @ exponential[: len(theta), : len(theta)]
    return total


def gauss_newton(run):
    """The Gauss-Newton matrix of cross entropy: Jacobians around the covariance of the predicted classes."""
    module = Classifier().eval()
    inputs = classification().tensors[0]

    def scores(theta):
        return torch.func.functional_call(module, run.layout.unflatten(theta), (inputs,))

    def matrix(theta):
        jacobian, p = jacrev(scores)(theta), scores(theta).softmax(1)
        return (
            torch.einsum("nip,nij,njq->pq", jacobian, torch.diag_embed(p) - p[:, :, None] * p[:, None], jacobian)
            / EXAMPLES
        )

    return matrix


@pytest.mark.parametrize(
    ("segments", "step", "starts"),
    [
        (1, None, [0]),
        (2, None, [0, 4]),
        (3, None, [0, 3, 6]),
        (3, 5, [0, 1, 3]),
        ([2, 7], None, [0, 2, 7]),
        pytest.param(9, None, list(range(9)), marks=pytest.mark.slow),
    ],
)
def test_responses_are_those_of_the_equations(classifiers, segments, step, starts):
    for curvature, written in ((ExactHessian(), lambda run: None), (GaussNewton(), gauss_newton)):
        found = ask(classifiers, Source(segments, curvature), step=step)
        for number, run in enumerate(classifiers):
            expected = dense(run, starts, step or STEPS, written(run))
            # rounding of eigenvectors, which the smallest eigenvalues of a Gram matrix amplify
            torch.testing.assert_close(found.responses[number], expected, rtol=1e-8, atol=1e-10)
            baseline = written_out(run)[0](run.theta_vector(step or STEPS))
            torch.testing.assert_close(found.baseline[number], baseline, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Diagonal, Identity, EKFAC])
def test_every_curvature_with_a_spectrum_can_be_taken(classifiers, make):
    curvature = make()
    found = ask(classifiers, Source(2, curvature))
    for number, run in enumerate(classifiers):
        replay = Replay([run], Classifier(), training_examples(classification()))

        def matrix(theta, run=run, replay=replay):
            from lightning_dtda.estimators.objective import Objective

            step = next(step for step in range(STEPS) if torch.equal(run.theta_vector(step), theta))
            identity = torch.eye(len(theta), dtype=torch.float64)
            return curvature.fit(Objective(replay, step, memory=1e9)).apply(lambda values: values, identity)

        torch.testing.assert_close(found.responses[number], dense(run, [0, 4], STEPS, matrix), rtol=1e-8, atol=1e-10)


def record(fit, root, module, steps=STEPS, batch_size=4, **arguments):
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(classification(), batch_size, shuffle=True)
    recorder = TrajectoryRecorder(root, checkpoint_every=arguments.pop("checkpoint_every", "all"))
    fit(module, loader, recorder, max_steps=steps, max_epochs=-1, **arguments)
    return Ensemble.open(root)


def denominators(run, name):
    """From a step to one over what its update divided by, from the state that is recorded after it."""

    def of(step):
        (state,) = run.checkpoint(step + 1).states
        if name in ("Adam", "AdamW"):
            moment = state["exp_avg_sq" if name == "Adam" else "max_exp_avg_sq"] / (1 - 0.999 ** (step + 1))
        elif name == "RMSprop":
            moment = state["square_avg"] - state["grad_avg"] ** 2
        else:
            moment = state["sum"]
        return 1 / (moment.sqrt() + 1e-2)

    return of


@pytest.mark.parametrize(
    ("name", "rate", "decay"),
    [("Adam", 0.05, 0.0), ("AdamW", 0.05, 0.3), ("RMSprop", 0.04, 0.0), ("Adagrad", 0.1, 0.0)],
)
def test_adaptive_optimizers_scale_the_gradients_entries(fit, tmp_path, name, rate, decay):
    ensemble = record(fit, tmp_path, Trained(name))
    rates = [rate * 0.9**step / (1 + (0.1 * step if name == "Adagrad" else 0)) for step in range(STEPS)]
    matrix = denominators(ensemble[0], name)
    of_hessian, of_gram = (ask(ensemble, Source(3, curvature)) for curvature in (ExactHessian(), GaussNewton()))
    arguments = {"rates": rates, "matrix": matrix, "decay": decay}
    expected = dense(ensemble[0], [0, 3, 6], STEPS, **arguments)
    torch.testing.assert_close(of_hessian.responses[0], expected, rtol=1e-8, atol=1e-9)
    expected = dense(ensemble[0], [0, 3, 6], STEPS, gauss_newton(ensemble[0]), **arguments)
    torch.testing.assert_close(of_gram.responses[0], expected, rtol=1e-8, atol=1e-9)


def test_parameter_groups_have_rates_of_their_own(fit, tmp_path):
    ensemble = record(fit, tmp_path, Trained(bias_rate=0.5))
    lengths = {name: tensor.numel() for name, tensor in ensemble[0].theta(0).items()}
    factors = torch.cat([torch.full((n,), 2.5 if "bias" in name else 1.0).double() for name, n in lengths.items()])
    expected = dense(ensemble[0], [0, 4], STEPS, matrix=lambda step: factors)
    found = ask(ensemble, Source(2, ExactHessian())).responses[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_kronecker_factors_are_refused_where_parameters_have_rates_of_their_own(fit, tmp_path):
    ensemble = record(fit, tmp_path, Trained(bias_rate=0.5))
    with pytest.raises(AttributionError, match=r"move at different rates.*Use GaussNewton"):
        ask(ensemble, Source(2, EKFAC()))


class Stationary(pl.LightningModule):
    """Linear regression; where it starts at its solution with all examples in a batch, every gradient is stationary."""

    def __init__(self, start, optimizer):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(start)
        self.optimizer = optimizer

    def forward(self, inputs):
        return self.layer(inputs).squeeze(-1)

    def training_step(self, batch, batch_idx):
        return ((self(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def regression(examples=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, 0] + torch.randn(examples, generator=generator, dtype=torch.float64))


AWAY = 1e-7
"""Distance of a start from the solution: at a gradient of zero, the recorder has no scale to compare slopes with."""


def least_squares():
    inputs, targets = regression().tensors
    return torch.linalg.lstsq(inputs, targets[:, None]).solution.T + AWAY


def descend(fit, root, start, optimizer, steps):
    """Train on all examples at once, and return what answers for an estimator."""
    pl.seed_everything(0, verbose=False)
    module, data = Stationary(start, optimizer), regression()
    fit(module, DataLoader(data, len(data)), TrajectoryRecorder(root), max_steps=steps, max_epochs=-1)
    ensemble = Ensemble.open(root)

    def answer(estimator):
        arguments = {"queries": regression(3, seed=1), "measurement": "prediction", "progress": False}
        return attribute(ensemble, module, data, estimator=estimator, **arguments).responses[0]

    return answer


@pytest.mark.parametrize("segments", [1, 3, [5, 6]])
def test_in_a_quadratic_valley_it_is_the_flow_of_the_gradient(fit, tmp_path, segments):
    start, rate, steps = least_squares(), 0.02, 40
    answer = descend(fit, tmp_path, start, lambda parameters: torch.optim.SGD(parameters, lr=rate), steps)
    inputs, targets = regression().tensors
    matrix = 2 / len(inputs) * inputs.T @ inputs
    gradients = 2 * inputs * (inputs @ start[0] - targets)[:, None] / len(inputs)
    identity = torch.eye(4, dtype=torch.float64)
    # of gradients that stay as they are, the response to a flow of length rate * steps, however it is cut
    moved = (identity - torch.linalg.matrix_exp(-rate * steps * matrix)) @ torch.linalg.solve(matrix, gradients.T)
    expected = regression(3, seed=1).tensors[0] @ moved
    found = answer(Source(segments, ExactHessian()))
    torch.testing.assert_close(found, expected, rtol=1e2 * AWAY, atol=1e1 * AWAY)
    # plain steps instead of a flow: the same derivative, with a power in place of the exponential
    power = torch.linalg.matrix_power(identity - rate * matrix, steps)
    stepped = regression(3, seed=1).tensors[0] @ (identity - power) @ torch.linalg.solve(matrix, gradients.T)
    torch.testing.assert_close(answer(UnrolledDifferentiation(horizon=None)), stepped, rtol=1e2 * AWAY, atol=1e1 * AWAY)


SMALL_STEPS = {
    "SGD": (lambda rate: lambda parameters: torch.optim.SGD(parameters, lr=rate), 1),
    "momentum": (lambda rate: lambda parameters: torch.optim.SGD(parameters, lr=rate / 2, momentum=0.5), 1),
    "Nesterov": (
        lambda rate: lambda parameters: torch.optim.SGD(parameters, lr=rate / 2, momentum=0.5, nesterov=True),
        1,
    ),
    "weight decay": (lambda rate: lambda parameters: torch.optim.SGD(parameters, lr=rate, weight_decay=0.2), "all"),
    # with a large epsilon, the second moments' own derivative, which is left out, vanishes
    "Adam": (
        lambda rate: lambda parameters: torch.optim.Adam(parameters, lr=1e6 * rate, eps=1e6, betas=(0.5, 0.999)),
        "all",
    ),
    "AdamW": (
        lambda rate: (
            lambda parameters: torch.optim.AdamW(
                parameters, lr=1e6 * rate, eps=1e6, betas=(0.5, 0.999), weight_decay=2e-7
            )
        ),
        "all",
    ),
    "RMSprop": (lambda rate: lambda parameters: torch.optim.RMSprop(parameters, lr=1e6 * rate, eps=1e6), "all"),
    "Adagrad": (lambda rate: lambda parameters: torch.optim.Adagrad(parameters, lr=1e6 * rate, eps=1e6), "all"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_STEPS)
def test_with_small_steps_it_comes_to_unrolled_differentiation(fit, tmp_path, name):
    optimizer, segments = SMALL_STEPS[name]
    # from its solution, where gradients are stationary; else from elsewhere, with a segment for each step
    start = least_squares() if segments == 1 else torch.tensor([[1.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
    distances = []
    for steps in (25, 100):
        answer = descend(fit, tmp_path / str(steps), start, optimizer(3.0 / steps), steps)
        unrolled = answer(UnrolledDifferentiation(horizon=None))
        found = answer(Source(steps if segments == "all" else segments, ExactHessian()))
        distances.append(float((found - unrolled).norm() / unrolled.norm()))
    assert distances[1] < 0.03
    # of first order in the length of the steps: a quarter, and what terms of higher order add
    assert distances[1] < 0.35 * distances[0]


def test_one_long_segment_is_an_influence_function(fit, tmp_path):
    start = torch.zeros(1, 4, dtype=torch.float64)
    answer = descend(fit, tmp_path, start, lambda parameters: torch.optim.SGD(parameters, lr=0.3), 250)
    for curvature in (ExactHessian(damping=0), GaussNewton(damping=0)):
        # what is left of the start after half of the steps is below rounding
        expected = answer(InfluenceFunctions(curvature))
        torch.testing.assert_close(answer(Source(1, curvature)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_where_there_is_no_curvature_it_goes_on_for_the_length_of_the_training(fit, tmp_path):
    start, data = torch.zeros(1, 4, dtype=torch.float64), regression(3)  # three examples for four parameters
    pl.seed_everything(0, verbose=False)
    module = Stationary(start, lambda parameters: torch.optim.SGD(parameters, lr=0.3))
    fit(module, DataLoader(data, 3), TrajectoryRecorder(tmp_path), max_steps=2000, max_epochs=-1)
    arguments = {"queries": regression(3, 1), "measurement": "prediction", "progress": False}

    def answer(estimator):
        return attribute(Ensemble.open(tmp_path), module, data, estimator=estimator, **arguments).responses

    # the gradients of the examples are in the range of the matrix, on which the inverse is that of the pseudo-inverse
    expected = answer(InfluenceFunctions(GaussNewton(damping=0)))
    torch.testing.assert_close(answer(Source(1)), expected, rtol=1e-8, atol=1e-10)


def test_groups_and_chunks_add_up(classifiers, monkeypatch):

    alone = ask(classifiers, Source())
    size = classifiers[0].layout.size
    monkeypatch.setattr(Source, "vectors", 2**29 / 8 / size)  # of 1 GiB: one query at a time
    groups = ask(classifiers, Source(), removals=[[0, 3], [7]])
    expected = torch.stack([alone.responses[..., [0, 3]].sum(-1), alone.responses[..., 7]], -1)
    torch.testing.assert_close(groups.responses, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradients", ["auto", "none"])
def test_steps_between_checkpoints_are_rebuilt(fit, tmp_path, classifiers, gradients):
    pl.seed_everything(0, verbose=False)
    recorder = TrajectoryRecorder(tmp_path / "sparse", checkpoint_every=6, gradients=gradients)
    fit(Classifier(), DataLoader(classification(), 4, shuffle=True), recorder, max_steps=STEPS, max_epochs=-1)
    found = ask(Ensemble.open(tmp_path / "sparse"), Source(2)).responses[0]
    torch.testing.assert_close(found, ask(classifiers, Source(2)).responses[0], rtol=1e-9, atol=1e-11)


def test_accumulated_gradients_count_with_what_their_losses_had(fit, tmp_path):
    # 15 examples in batches of 4: the fourth step is of one batch, which counts a third
    ensemble = record(fit, tmp_path, Classifier(), steps=3, accumulate_grad_batches=3)
    run = ensemble[0]
    assert [float(run.coefficients(step).sum()) for step in range(3)] == pytest.approx([1, 1 / 3, 1])
    rates = [0.2 * rate * share for rate, share in zip((1, 0.9, 0.81), (1, 1 / 3, 1), strict=True)]
    expected = dense(run, [0], 3, rates=rates)
    found = ask(ensemble, Source(1, ExactHessian())).responses[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_segments_in_which_nothing_moves_add_nothing(fit, tmp_path):
    class Warm(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    ensemble = record(fit, tmp_path, Warm())
    expected = dense(ensemble[0], [4], STEPS, rates=[0.0] * 4 + [0.2] * 5)
    found = ask(ensemble, Source([4], ExactHessian())).responses[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_groups_that_stand_still_while_others_move_are_refused(fit, tmp_path):
    ensemble = record(fit, tmp_path, Trained(bias_rate=0.0))
    with pytest.raises(AttributionError, match="learning rate of zero in all steps from 0 to 2"):
        ask(ensemble, Source())


def test_a_training_that_maximizes_is_refused(fit, tmp_path):
    class Maximizer(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.2, maximize=True)

    with pytest.raises(AttributionError, match=r"maximizes.*Use UnrolledDifferentiation"):
        ask(record(fit, tmp_path, Maximizer()), Source())


def test_an_optimizer_of_unknown_rate_is_refused(classifiers, monkeypatch):
    from lightning_dtda.optimizers import SGD, Update

    monkeypatch.setattr(SGD, "rate", Update.rate)
    with pytest.raises(AttributionError, match=r"SGD does not define how far .* Implement rate\(\)"):
        ask(classifiers, Source())


def test_changes_that_grow_without_bounds_are_refused(classifiers, monkeypatch):
    from lightning_dtda.estimators import source

    monkeypatch.setattr(source, "segment", lambda *arguments: replace(segment(*arguments), total=1e6))
    with pytest.raises(AttributionError, match=r"negative eigenvalues of ExactHessian, .* Use GaussNewton\(\)"):
        ask(classifiers, Source(1, ExactHessian()))
    assert bool(ask(classifiers, Source(1)).responses.isfinite().all())


@pytest.mark.parametrize("curvature", [Hessian(), GaussNewton("cg")])
def test_curvatures_without_a_spectrum_are_refused(classifiers, curvature):
    with pytest.raises(AttributionError, match=r"no spectrum, so there is no matrix exponential. Use GaussNewton"):
        ask(classifiers, Source(curvature=curvature))


def test_a_projected_curvature_is_refused(classifiers):
    with pytest.raises(AttributionError, match="Leave projection out"):
        ask(classifiers, Source(curvature=GaussNewton(projection=8)))


def test_weight_decay_in_adams_gradient_needs_the_hessian(fit, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Adam", lambda groups: torch.optim.Adam(groups, lr=0.05, weight_decay=0.1))
    ensemble = record(fit, tmp_path, Trained("Adam"))
    with pytest.raises(AttributionError, match=r"different weight decays.*ExactHessian\(\)"):
        ask(ensemble, Source())
    assert bool(ask(ensemble, Source(curvature=ExactHessian())).responses.isfinite().all())


def test_more_segments_than_steps_are_refused(classifiers):
    with pytest.raises(
        AttributionError, match=r"segments=6; .* has only 5 steps before the measurement. Give at most 5"
    ):
        ask(classifiers, Source(6), step=5)
    with pytest.raises(AttributionError, match="no segment can start at step 5"):
        ask(classifiers, Source([2, 5]), step=5)


def test_answers_are_stored_and_not_confused_with_others(classifiers, tmp_path):
    output = tmp_path / "attribution"
    found = ask(classifiers, Source([2, 5], ExactHessian()), output=output)
    again = ask(classifiers, Source((2, 5), ExactHessian()), output=output)
    torch.testing.assert_close(again.responses, found.responses, rtol=0, atol=0)
    with pytest.raises(AttributionError, match="another question"):
        ask(classifiers, Source([2, 6], ExactHessian()), output=output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segments": 0}, "give a positive number"),
        ({"segments": True}, "give a positive number"),
        ({"segments": 1.5}, "give a positive number"),
        ({"segments": [3, 3]}, "ascending"),
        ({"segments": [0, 3]}, "ascending"),
        ({"curvature": "gram"}, "is not a curvature"),
        ({"precision": "half"}, "choose"),
        ({"memory_budget": 0}, "must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(AttributionError, match=message):
        Source(**arguments)


def test_the_rates_of_a_segment_are_those_that_were_recorded(classifiers):
    replay = Replay([classifiers[0]], Classifier(), training_examples(classification()))
    found = segment(replay, 3, 6)
    assert found.total == pytest.approx(0.2 * (0.9**3 + 0.9**4 + 0.9**5), rel=1e-12)
    assert (found.first, found.last, found.middle) == (3, 6, 4)
    assert found.scale is None
    assert found.decay is None
