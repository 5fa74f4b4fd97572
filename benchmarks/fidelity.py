"""Do predicted shifts rank removals like real retraining? UCI Concrete, as recorded by ``examples/concrete``.

The ground truth is retrained in plain PyTorch, without lightning_dtda's replay: from each run's recorded initial
parameters, batch order and learning rates, with the weights of removed examples set to zero (removal by "reweight",
conditional on the run). Without a removal, retraining must give the same measurements as the Trainer's model, up to
rounding that grows over the training; the first figure relates this deviation to the shifts caused by removals.

    python benchmarks/fidelity.py --ensemble runs/concrete --attribution attribution/concrete --data concrete.txt
"""

import argparse
import json
import time

import torch
from scipy.stats import spearmanr
from torch.func import functional_call, grad, vmap

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import Attribution, Ensemble


def retrain(ensemble, inputs, targets, weights, queries):
    """Train all runs for each row of ``weights`` ``(K, N)``; return predictions ``(K, runs, queries)``."""
    network = ConcreteRegressor().network
    names = [name.removeprefix("network.") for name in ensemble[0].layout.names]

    def loss(parameters, x, y, w):
        return (w * (functional_call(network, parameters, (x,)).squeeze(-1) - y) ** 2).mean()

    # over removals, which share a run's batch; then over runs
    step = vmap(vmap(grad(loss), in_dims=(0, None, None, 0)))
    removals, runs = len(weights), len(ensemble)
    initial = [run.theta(0) for run in ensemble]
    parameters = {
        name: torch.stack([theta[f"network.{name}"] for theta in initial])[:, None]
        .expand(-1, removals, *initial[0][f"network.{name}"].shape)
        .clone()
        for name in names
    }
    for t in range(ensemble[0].steps):
        indices = torch.stack([run.batch_indices(t) for run in ensemble])
        rate = float(ensemble[0].learning_rates(t))
        w = weights[:, indices].transpose(0, 1)
        gradients = step(parameters, inputs[indices], targets[indices], w)
        for name, gradient in gradients.items():
            parameters[name] -= rate * gradient
    predict = vmap(vmap(lambda p: functional_call(network, p, (queries,)).squeeze(-1)))
    with torch.no_grad():
        predictions = predict(parameters).transpose(0, 1)
    assert predictions.shape == (removals, runs, len(queries))
    return predictions


def rank_correlations(predicted, actual):
    """Return Spearman's correlation over removals ``(K, ...)`` for each of the other positions."""
    predicted, actual = predicted.flatten(1).T.numpy(), actual.flatten(1).T.numpy()
    return torch.tensor([spearmanr(p, a).statistic for p, a in zip(predicted, actual, strict=True)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", required=True)
    parser.add_argument("--attribution", required=True, help="attribution of the measurement 'prediction'")
    parser.add_argument("--data", required=True)
    parser.add_argument("--removals", type=int, default=24)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    ensemble, attribution = Ensemble.open(options.ensemble), Attribution.load(options.attribution)
    assert attribution.measurement == "prediction"
    assert attribution.runs == tuple(run.name for run in ensemble)
    data = ConcreteData(options.data)
    data.setup("fit")
    inputs, targets = data.train.tensors
    queries = data.validation.tensors[0][list(attribution.queries)]

    start = time.perf_counter()
    ones = retrain(ensemble, inputs, targets, torch.ones(1, len(inputs)), queries)

    generator = torch.Generator().manual_seed(options.seed)
    size = round(options.fraction * len(inputs))
    removed = [torch.randperm(len(inputs), generator=generator)[:size] for _ in range(options.removals)]
    weights = torch.ones(options.removals, len(inputs))
    for row, indices in zip(weights, removed, strict=True):
        row[indices] = 0
    actual = retrain(ensemble, inputs, targets, weights, queries) - ones
    rounding = ((ones[0] - attribution.baseline).square().mean() / actual.square().mean()).sqrt().item()
    assert rounding < 0.1, f"retraining without removal differs from the Trainer by {rounding:.2g} of a removal's shift"
    predicted = torch.stack([attribution.predict(indices.tolist()) - attribution.baseline for indices in removed])
    result = {
        "retraining without removal against the Trainer, share of a removal's shift": rounding,
        "Spearman, mean over query and run": rank_correlations(predicted, actual).mean().item(),
        "Spearman of shifts averaged over runs, mean over queries": rank_correlations(predicted.mean(1), actual.mean(1))
        .mean()
        .item(),
        "seconds of retraining": time.perf_counter() - start,
    }
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k}: {v:.3g}" for k, v in result.items()))


if __name__ == "__main__":
    main()
