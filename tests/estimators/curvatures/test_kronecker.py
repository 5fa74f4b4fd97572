"""Kronecker factors: exact where the matrix has their structure, else against the same written out layer by layer."""

import logging
from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import EKFAC, KFAC
from lightning_dtda.estimators.curvatures import factors, kronecker
from lightning_dtda.estimators.curvatures.factors import eigen
from lightning_dtda.trajectory.storage import write_json, write_tensors
from tests.estimators.small_runs import Classifier, Regressor, close


def places(run):
    """Where each parameter lies in the flat vector."""
    found, start = {}, 0
    for name, size in zip(run.names, run.replay.layout.sizes, strict=True):
        found[name] = slice(start, start + size)
        start += size
    return found


@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_layer_with_squared_errors_is_exact(trained, vectors, curvature, bias):
    # the loss's Hessian is the same for all examples: the matrix is a Kronecker product
    run = trained(Regressor(weight_decay=0.05, network=lambda: torch.nn.Linear(4, 2, bias=bias)))
    v, dense = vectors(len(run.theta)), run.gauss_newton()
    fitted = curvature().fit(run.objective())
    identity = torch.eye(len(dense), dtype=torch.float64)
    close(fitted.solve(v, 0.1).vectors, torch.linalg.solve(dense + 0.1 * identity, v.T).T)
    close(fitted.apply(lambda values: values, v), v @ dense)
    assert fitted.mean_eigenvalue == pytest.approx(float(dense.trace()) / len(dense), rel=1e-10)


def layer_factors(run, name, number):
    """Inputs with a one for the bias ``(N, d + 1)`` and derivatives of root columns ``(N, C, d_out)`` of a layer."""
    layer, seen = run.module.net[number], []
    handle = layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    outputs = run.module(run.data.tensors[0])
    handle.remove()
    inputs, of_layer = seen[0]
    one = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    probabilities = outputs.softmax(1).detach()
    derivatives = []
    for n in range(len(outputs)):
        p = probabilities[n]
        values, basis = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        root = basis * values.clamp_min(0).sqrt() @ basis.T
        columns = [
            torch.autograd.grad((outputs[n] * column).sum(), of_layer, retain_graph=True)[0][n] for column in root
        ]
        derivatives.append(torch.stack(columns))
    return torch.cat([inputs.detach(), one], 1), torch.stack(derivatives)


@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
def test_blocks_of_a_network_are_those_written_out(trained, vectors, curvature):
    run = trained(Classifier())
    v, where = vectors(len(run.theta)), places(run)
    fitted = curvature(rescale=False).fit(run.objective())
    result = fitted.solve(v, 0.3).vectors
    for number in (0, 2):
        weight, bias = where[f"net.{number}.weight"], where[f"net.{number}.bias"]
        a, g = layer_factors(run, "net", number)
        of_inputs = a.T @ a / len(a)
        of_derivatives = torch.einsum("nci,ncj->ij", g, g) / len(a)
        values_a, basis_a = torch.linalg.eigh(of_inputs)
        values_g, basis_g = torch.linalg.eigh(of_derivatives)
        values = values_g[:, None] * values_a
        if curvature is EKFAC:
            values = torch.einsum("nci,ip,nj,jq->ncpq", g, basis_g, a, basis_a).square().sum((0, 1)) / len(a)
        matrix = torch.cat([v[:, weight].reshape(len(v), len(basis_g), -1), v[:, bias, None]], 2)
        expected = basis_g @ ((basis_g.T @ matrix @ basis_a) / (values + 0.3)) @ basis_a.T
        close(result[:, weight], expected[:, :, :-1].flatten(1))
        close(result[:, bias], expected[:, :, -1])


class Convolutional(torch.nn.Sequential):
    def __init__(self):
        nn = torch.nn
        super().__init__(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 3))


def test_other_parameters_get_the_diagonal_and_are_named(trained, vectors, caplog):
    run = trained(Classifier(network=Convolutional), shape=(1, 4, 4))
    with caplog.at_level(logging.INFO, "lightning_dtda"):
        logging.getLogger("lightning_dtda").propagate = True
        fitted = EKFAC(rescale=False).fit(run.objective())
    assert "Gauss-Newton matrix for these parameters: net.3.weight, net.3.bias." in caplog.text
    v, where = vectors(len(run.theta)), places(run)
    diagonal = run.gauss_newton().diagonal()
    result = fitted.solve(v, 0.2).vectors
    for name in ("net.3.weight", "net.3.bias"):
        close(result[:, where[name]], v[:, where[name]] / (diagonal[where[name]] + 0.2))
    # corrected eigenvalues keep the trace of each block
    assert fitted.mean_eigenvalue == pytest.approx(float(diagonal.mean()), rel=1e-8)


@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
def test_factors_are_those_of_curvlinops(trained, vectors, curvature):
    curvlinops = pytest.importorskip("curvlinops", reason="a reference that CI installs")
    nn = torch.nn
    network = lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))  # noqa: E731
    run = trained(Regressor(network=network), shape=(1, 4, 4))
    v, operators = vectors(len(run.theta)), {KFAC: "KFACLinearOperator", EKFAC: "EKFACLinearOperator"}
    module = run.module.eval()
    module.load_state_dict(run.replay.layout.unflatten(run.theta), strict=False)
    operator = getattr(curvlinops, operators[curvature])(
        *(module.net, nn.MSELoss(), list(module.parameters()), [run.data.tensors]),
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    found = curvature(rescale=False).fit(run.objective()).apply(lambda values: values, v)
    torch.testing.assert_close(found, (operator @ v.T).T, rtol=1e-9, atol=1e-12)


class OfPatches(torch.nn.Module):
    """A convolution as linear layers of the patches that it looks at, one for each group, cut out one by one."""

    def __init__(self, convolution):
        super().__init__()
        self.like = (convolution.kernel_size, convolution.stride, convolution.dilation, convolution.padding)
        groups, weight = convolution.groups, convolution.weight.detach()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(weight[0].numel(), len(weight) // groups) for _ in range(groups)
        )
        for layer, part, bias in zip(self.layers, weight.chunk(groups), convolution.bias.chunk(groups), strict=True):
            layer.weight.data, layer.bias.data = part.flatten(1).clone(), bias.detach().clone()

    def forward(self, inputs):
        sizes, strides, dilations, paddings = self.like
        padded = torch.nn.functional.pad(inputs, [size for p in reversed(paddings) for size in (p, p)])
        counts = [
            (length - dilation * (size - 1) - 1) // stride + 1
            for length, size, stride, dilation in zip(padded.shape[2:], sizes, strides, dilations, strict=True)
        ]
        patches = torch.stack(
            [
                padded[
                    (
                        ...,
                        *(
                            slice(s * at, s * at + d * (k - 1) + 1, d)
                            for at, k, s, d in zip(place, sizes, strides, dilations, strict=True)
                        ),
                    )
                ].flatten(2)
                for place in product(*map(range, counts))
            ],
            1,
        )
        parts = zip(self.layers, patches.chunk(len(self.layers), 2), strict=True)
        outputs = torch.cat([layer(part.flatten(2)) for layer, part in parts], 2)
        return outputs.mT.unflatten(2, counts)


@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
@pytest.mark.parametrize(
    ("kind", "arguments", "shape"),
    [
        ("Conv1d", {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 7)),
        ("Conv2d", {"kernel_size": (2, 3), "dilation": (2, 1), "groups": 2}, (4, 4, 5)),
        ("Conv2d", {"kernel_size": 2, "groups": 4}, (4, 3, 3)),
        ("Conv3d", {"kernel_size": (1, 2, 2), "padding": (0, 1, 0), "groups": 2}, (4, 2, 3, 3)),
    ],
)
def test_a_convolution_is_linear_layers_of_patches(trained, vectors, curvature, kind, arguments, shape):
    solved = []
    for is_convolution in (True, False):
        pl.seed_everything(5, verbose=False)

        def network(is_convolution=is_convolution):
            first = getattr(torch.nn, kind)(4, 8, **arguments)
            last = torch.nn.LazyLinear(3)
            net = torch.nn.Sequential(first, torch.nn.Tanh(), torch.nn.Flatten(), last)
            net(torch.zeros(1, *shape))
            return net if is_convolution else torch.nn.Sequential(OfPatches(first), *net[1:])

        run = trained(Classifier(network=network), root=f"runs-{is_convolution}", shape=shape)
        fitted, where, v = curvature(rescale=False).fit(run.objective()), places(run), vectors(len(run.theta))
        if is_convolution:
            first_vectors = v
            result = fitted.solve(v, 0.2).vectors
            solved.append([result[:, where[f"net.0.{name}"]] for name in ("weight", "bias")])
            convolution = where
        else:
            groups = arguments.get("groups", 1)
            for name in ("weight", "bias"):
                parts = first_vectors[:, convolution[f"net.0.{name}"]].chunk(groups, 1)
                for group, part in enumerate(parts):
                    v[:, where[f"net.0.layers.{group}.{name}"]] = part
            result = fitted.solve(v, 0.2).vectors
            names = [[f"net.0.layers.{group}.{name}" for group in range(groups)] for name in ("weight", "bias")]
            solved.append([torch.cat([result[:, where[name]] for name in of_kind], 1) for of_kind in names])
    for one, other in zip(*solved, strict=True):
        close(one, other)


def no_convergence(_matrix):
    raise torch.linalg.LinAlgError


def nan(matrix):
    return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)


@pytest.mark.parametrize("failing", [no_convergence, nan])
def test_a_singular_factor_whose_eigenvalues_do_not_converge_is_decomposed_all_the_same(monkeypatch, failing):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    matrix = (half @ half.T)[None]

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigen(matrix)
    close(vectors * values[:, None] @ vectors.mT, matrix)
    close(vectors.mT @ vectors, torch.eye(5, dtype=torch.float64)[None])


class Words(torch.nn.Module):
    """Looks up a row for each of four words, by an embedding or by a linear layer of one-hot vectors."""

    rows = 7

    def __init__(self, one_hot, padding=None):
        super().__init__()
        nn = torch.nn
        embed, self.last = nn.Embedding(self.rows, 3, padding_idx=padding), nn.Linear(3, 3)
        self.embed = nn.Linear(self.rows, 3, bias=False) if one_hot else embed
        if one_hot:
            self.embed.weight = nn.Parameter(embed.weight.detach().T.clone())
        self.one_hot = one_hot

    def forward(self, inputs):
        words = (2 * inputs).round().long().add(3).clamp(0, self.rows - 1)
        if self.one_hot:
            words = torch.nn.functional.one_hot(words, self.rows).to(inputs)
        return self.last(self.embed(words).tanh().mean(1))


class OfWords(Classifier):
    """Class weights: the loss has no root of single examples."""

    def training_step(self, batch, batch_idx):
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1], weight=weights)


@pytest.mark.parametrize("make", [Classifier, OfWords])
@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
def test_an_embedding_is_a_linear_layer_of_one_hot_vectors(trained, vectors, curvature, make):
    found = []
    for one_hot in (False, True):
        pl.seed_everything(5, verbose=False)
        run = trained(make(network=lambda one_hot=one_hot: Words(one_hot)), root=f"runs-{one_hot}", examples=29)
        fitted = curvature(rescale=False).fit(run.objective())
        where = places(run)["net.embed.weight"]
        v = vectors(len(run.theta))
        matrices = torch.randn(3, Words.rows, 3, generator=torch.Generator().manual_seed(2)).double()
        v[:, where] = (matrices.mT if one_hot else matrices).flatten(1)
        solved = fitted.solve(v, 0.2).vectors
        shape = (3, Words.rows) if one_hot else (Words.rows, 3)
        of_embedding = solved[:, where].unflatten(1, shape)
        found.append((of_embedding.mT if one_hot else of_embedding, solved[:, : where.start], fitted.mean_eigenvalue))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        close(one, other)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-10)


def test_a_row_of_padding_has_no_curvature(trained, vectors):
    run = trained(Classifier(network=lambda: Words(False, padding=3)))
    fitted = EKFAC(rescale=False).fit(run.objective())
    v, where = vectors(len(run.theta)), places(run)["net.embed.weight"]
    result = fitted.solve(v, 0.2).vectors[:, where].unflatten(1, (Words.rows, 3))
    close(result[:, 3], v[:, where].unflatten(1, (Words.rows, 3))[:, 3] / 0.2)
    # corrected eigenvalues keep the trace
    assert fitted.mean_eigenvalue == pytest.approx(float(run.gauss_newton().diagonal().mean()), rel=1e-8)


def test_an_embedding_of_positions_gets_the_diagonal(trained, caplog):
    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.last = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3)

        def forward(self, inputs):
            return self.last((inputs[..., None] * self.embed(torch.arange(4))).tanh().mean(1))

    run = trained(Classifier(network=Positions))
    with caplog.at_level(logging.INFO, "lightning_dtda"):
        EKFAC(rescale=False).fit(run.objective())
    assert "Gauss-Newton matrix for these parameters: net.embed.weight." in caplog.text


def test_a_layer_that_is_called_twice_gets_the_diagonal(trained, vectors):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, inputs):
            return self.last(self.first(self.first(inputs).tanh()))

    run = trained(Classifier(network=Twice))
    v, where = vectors(len(run.theta)), places(run)["net.first.weight"]
    result = EKFAC(rescale=False).fit(run.objective()).solve(v, 0.2).vectors
    close(result[:, where], v[:, where] / (run.gauss_newton().diagonal()[where] + 0.2))


def test_frozen_biases_have_no_part(trained, vectors):
    class Frozen(Regressor):
        def configure_optimizers(self):
            self.net.bias.requires_grad_(False)
            return torch.optim.SGD([self.net.weight], lr=0.2)

    module = Frozen(network=lambda: torch.nn.Linear(4, 2))
    module.net.bias.requires_grad_(False)
    run = trained(module)
    v, dense = vectors(8), run.gauss_newton()
    expected = torch.linalg.solve(dense + 0.1 * torch.eye(8, dtype=torch.float64), v.T).T
    close(EKFAC().fit(run.objective()).solve(v, 0.1).vectors, expected)


def test_solutions_are_as_long_as_the_true_matrix_wants_them(trained, vectors):
    run = trained(Classifier(weight_decay=0.05))
    v, dense = vectors(len(run.theta)), run.gauss_newton() + 0.01 * torch.eye(len(run.theta), dtype=torch.float64)
    plain = EKFAC(rescale=False).fit(run.objective()).solve(v, 0.01).vectors
    rescaled = EKFAC().fit(run.objective()).solve(v, 0.01).vectors
    # the minimum of <x, G x> / 2 - <v, x> along the solution
    for x, direction, vector in zip(rescaled, plain, v, strict=True):
        close(x, (vector @ direction) / (direction @ dense @ direction) * direction)
        assert abs(direction @ dense @ x - direction @ vector) < 1e-9


def test_samples_of_the_outputs_come_near_all_of_them(trained):
    run = trained(Classifier(), examples=200)
    exact, sampled = EKFAC().fit(run.objective()), EKFAC(samples=2).fit(run.objective())
    assert sampled.mean_eigenvalue == pytest.approx(exact.mean_eigenvalue, rel=0.1)
    assert sampled.mean_eigenvalue != exact.mean_eigenvalue


def test_samples_of_the_outputs_serve_other_parameters_too(trained):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.last = torch.nn.Parameter(torch.ones(4)), torch.nn.Linear(4, 3)

        def forward(self, inputs):
            return self.last(self.scale * inputs)

    run = trained(Classifier(network=Scaled), examples=400)
    where, v = places(run)["net.scale"], torch.ones(1, len(run.theta), dtype=torch.float64)
    found = 1 / EKFAC(samples=1, rescale=False).fit(run.objective()).solve(v, 1e-3).vectors[0, where] - 1e-3
    exact = run.gauss_newton().diagonal()[where]
    # a mean over 400 squares, of which each varies by about 1.5 times the mean
    torch.testing.assert_close(found, exact, rtol=0.25, atol=0)
    assert not torch.equal(found, exact)


@pytest.mark.slow
def test_samples_of_many_outputs_come_near_the_matrix(trained):
    # 30 outputs of an example, more than are written out
    run = trained(Classifier(network=lambda: torch.nn.Linear(4, 30)), examples=200)
    exact, sampled = EKFAC().fit(run.objective()), EKFAC(samples=1).fit(run.objective())
    assert sampled.mean_eigenvalue == pytest.approx(exact.mean_eigenvalue, rel=0.1)
    assert sampled.mean_eigenvalue != exact.mean_eigenvalue


@pytest.mark.parametrize(("enough", "samples"), [(1024, None), (40, 2), (10, 1)])
def test_as_many_combinations_of_the_outputs_are_taken_as_the_examples_ask_for(trained, monkeypatch, enough, samples):
    monkeypatch.setattr(factors, "_ENOUGH", enough)
    run = trained(Classifier(network=lambda: torch.nn.Linear(4, 30)), examples=20)
    by_default, given = EKFAC().fit(run.objective()), EKFAC(samples=samples).fit(run.objective())
    torch.testing.assert_close(by_default.values, given.values, rtol=0, atol=0)


def test_quadratic_forms_are_those_of_the_matrix(trained, vectors):
    run = trained(Classifier(network=lambda: torch.nn.Linear(4, 30)), examples=200)
    objective, v = run.objective(), vectors(len(run.theta))
    wanted = ((objective.gauss_newton_products(v) - objective.penalty * v) * v).sum(1)
    close(factors.quadratic_forms(factors.SampledRoot(objective, objective.layers, None, 0), v), wanted)
    # each of 200 examples' squared products has a spread of about twice its mean
    sampled = factors.quadratic_forms(factors.SampledRoot(objective, objective.layers, 20, 0), v)
    torch.testing.assert_close(sampled, wanted, rtol=0.1, atol=0)


@pytest.mark.parametrize("kept", [0, 0.5, 1])
def test_passes_have_the_same_columns_however_many_of_them_are_kept(trained, vectors, monkeypatch, kept):
    run = trained(Classifier(network=lambda: torch.nn.Linear(4, 30)), examples=200)
    objective, v = run.objective(), vectors(len(run.theta))
    monkeypatch.setattr(objective, "examples_at_once", lambda *_: 100)  # 4 batches of 50
    of_all = 200 * 30 * 2 * objective.theta.itemsize
    monkeypatch.setattr(factors, "_KEPT", kept * of_all / objective.memory)
    root = factors.SampledRoot(objective, objective.layers, 2, 0)
    first, again = factors.quadratic_forms(root, v), factors.quadratic_forms(root, v)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    monkeypatch.setattr(factors, "_KEPT", 1)
    all_kept = factors.SampledRoot(objective, objective.layers, 2, 0)
    torch.testing.assert_close(factors.quadratic_forms(all_kept, v), first, rtol=0, atol=0)


def test_factors_are_read_from_the_cache(trained, vectors, tmp_path, monkeypatch):
    run = trained(Classifier())
    v = vectors(len(run.theta))
    first = EKFAC(cache=tmp_path / "factors").fit(run.objective()).solve(v, 0.1).vectors
    monkeypatch.setattr(kronecker, "_fitted", lambda *_: pytest.fail("the factors were computed again"))
    again = EKFAC(cache=tmp_path / "factors", damping=3.0).fit(run.objective()).solve(v, 0.1).vectors
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other", [{"curvature": KFAC}, {"seed": 1}, {"step": 7}, {"damage": "cut"}, {"damage": "forged"}]
)
def test_a_cache_of_something_else_is_not_read(trained, vectors, tmp_path, other):
    run = trained(Classifier())
    v, cache = vectors(len(run.theta)), tmp_path / "factors"
    EKFAC(cache=cache).fit(run.objective())
    if "damage" in other:
        file = next(cache.glob("*.safetensors"))
        if other["damage"] == "cut":
            file.write_bytes(file.read_bytes()[:-8])
        else:  # with right checksums
            whole = load(file.read_bytes())
            tensors = {name: part[:, :-1].contiguous() if "right" in name else part for name, part in whole.items()}
            write_json(file.with_suffix(".json"), {"factors": write_tensors(file, tensors)})
    curvature = other.get("curvature", EKFAC)
    arguments = {"seed": other.get("seed", 0)}
    objective = run.objective(step=other.get("step"))
    found = curvature(cache=cache, **arguments).fit(objective).solve(v, 0.1).vectors
    torch.testing.assert_close(found, curvature(**arguments).fit(objective).solve(v, 0.1).vectors, rtol=0, atol=0)


def test_no_samples_are_refused():
    with pytest.raises(AttributionError, match='samples=0; give "auto", a positive number'):
        EKFAC(samples=0)


class OfPositions(Classifier):
    """Classifies each of two positions."""

    def training_step(self, batch, batch_idx):
        outputs = self(batch[0].unflatten(1, (2, 2)))
        return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].repeat_interleave(2))


def gauss_newton_of_positions(run):
    inputs, labels = run.data.tensors

    def outputs(theta):
        return torch.func.functional_call(
            run.module.eval(), run.replay.layout.unflatten(theta), (inputs.unflatten(1, (2, 2)),)
        ).flatten(0, 1)

    def loss(outputs):
        return torch.nn.functional.cross_entropy(outputs, labels.repeat_interleave(2))

    jacobian = torch.func.jacrev(outputs)(run.theta).flatten(0, 1)
    hessian = torch.func.hessian(loss)(outputs(run.theta)).reshape(len(jacobian), len(jacobian))
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_at_several_positions_are_those_of_one_example(trained, vectors, bias):
    nn = torch.nn
    network = lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3, bias=bias))  # noqa: E731
    run = trained(OfPositions(network=network))
    dense = gauss_newton_of_positions(run)
    fitted = EKFAC(rescale=False).fit(run.objective())
    # corrected eigenvalues keep the trace of each block
    assert fitted.mean_eigenvalue == pytest.approx(float(dense.trace()) / len(dense), rel=1e-8)
    v = vectors(len(dense))
    close(run.objective().gauss_newton_products(v), v @ dense)


class PenalisedOnce(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * sum((p**2).sum() for p in self.parameters())


def test_without_a_root_the_factors_are_those_of_the_training_labels(trained, caplog):
    run = trained(PenalisedOnce())
    with caplog.at_level(logging.INFO, "lightning_dtda"):
        fitted = EKFAC(rescale=False).fit(run.objective())
    assert "use gradients of the training labels" in caplog.text
    gradients = torch.func.jacrev(run.losses)(run.theta)
    assert fitted.mean_eigenvalue == pytest.approx(float(gradients.square().sum()) / gradients.numel(), rel=1e-8)
