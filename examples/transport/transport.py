"""Influence functions are a transport map between Boltzmann distributions (arXiv 2506.12965, theorem 3).

First by quadrature, where everything is known; then with recorded runs of Langevin dynamics, whose predicted parameters
without an example are compared with the exact distribution without it.

    python -m examples.transport.transport --runs transport/runs --output transport
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from plotly.subplots import make_subplots
from scipy.special import logsumexp

from examples.transport.double_well import EXAMPLES, SHIFT, TILT, DoubleWell, Wells, data, potential
from lightning_dtda import Ensemble, InfluenceFunctions, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import ExactHessian

BETA = 2000.0
SCALES = tuple(tenths / 10 for tenths in range(21))
COLOURS = ("#d55e00", "#0072b2")
GRID = torch.linspace(-1.6, 1.6, 200_001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


class Boltzmann:
    r"""The density :math:`\exp(-\beta L) / Z`, with all examples or without one of them, at the same divisor."""

    def __init__(self, beta, removed=None):
        values = data().double()
        kept = [n for n in range(EXAMPLES) if n != removed]
        energy = -beta * sum(potential(GRID, *values[n]) for n in kept).numpy() / EXAMPLES
        self.log = energy - logsumexp(energy) - np.log(STEP)
        self.density = np.exp(self.log)

    @property
    def wells(self):
        """Probabilities of the wells, left and right."""
        left = float(self.density[GRID < 0].sum() * STEP)
        return np.array([left, 1 - left])

    def quantiles(self, well, probabilities):
        """Return quantiles within a well."""
        inside = (GRID < 0).numpy() == (well == 0)
        cumulated = np.cumsum(self.density[inside])
        return np.interp(probabilities, cumulated / cumulated[-1], GRID[inside])


def response(removed):
    r"""Return the response of influence functions :math:`H^{-1} \nabla \ell_k / N` on the grid, and its slope.

    Between the wells, where the curvature is not positive and there is no mass, both are zero.
    """
    theta, values = GRID.clone().requires_grad_(), data().double()
    mean = sum(potential(theta, *each) for each in values) / EXAMPLES
    (slope,) = torch.autograd.grad(mean.sum(), theta, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), theta, create_graph=True)
    (gradient,) = torch.autograd.grad(potential(theta, *values[removed]).sum(), theta, create_graph=True)
    found = gradient / curvature / EXAMPLES
    (derivative,) = torch.autograd.grad(found.sum(), theta)
    inside = (curvature > 0.5).numpy()
    return np.where(inside, found.detach(), 0.0), np.where(inside, derivative, 0.0)


def divergence(before, after, removed, scale):
    r"""Return the divergence of the transported distribution from the one without the example.

    For the map :math:`T_c(\theta) = \theta + c\, r(\theta)` it is, by the change of variables,
    :math:`E_\mu[\log \mu(\theta) - \log |T_c'(\theta)| - \log \nu(T_c(\theta))]`.
    """
    moved, slope = response(removed)
    log_after = np.interp(GRID.numpy() + scale * moved, GRID.numpy(), after.log)
    terms = before.log - np.log(np.abs(1 + scale * slope)) - log_after
    return float((before.density * np.where(before.density > 1e-100, terms, 0.0)).sum() * STEP)


def between_wells(before, after):
    """Return the part of the divergence that no map within the wells takes away: that of the wells' probabilities."""
    return float((before.wells * np.log(before.wells / after.wells)).sum())


def by_quadrature(beta=BETA):
    """Return, for each removed example, the divergences by scale and the part between the wells."""
    before, rows = Boltzmann(beta), {}
    for name, removed in (("shifts the wells", SHIFT), ("tilts the wells", TILT)):
        after = Boltzmann(beta, removed)
        rows[name] = [divergence(before, after, removed, scale) for scale in SCALES], between_wells(before, after)
    return rows


def parameter(module, batch):
    """Measure the parameter ``(B,)``."""
    return module(batch[0])


def distance(samples, exact):
    """Return the distance W_2 of samples in the wells from the exact distribution in each, weighted by their number."""
    squares = []
    for well, inside in enumerate((samples < 0, samples >= 0)):
        part = np.sort(samples[inside])
        squares += list((part - exact.quantiles(well, (np.arange(len(part)) + 0.5) / len(part))) ** 2)
    return float(np.mean(squares) ** 0.5)


def by_sampling(ensemble, draws=500):
    """Return samples without the shifting example by estimator, their distances, and those of exact samples.

    The last are the 2.5 %, 50 % and 97.5 % quantiles for the same number of independent samples of the distribution
    itself, the best that any prediction can do.
    """
    exact, data_module, samples = Boltzmann(BETA, SHIFT), Wells(), {}
    data_module.setup("fit")
    for name, estimator in (
        ("influence functions", InfluenceFunctions(ExactHessian(damping=0.0))),
        ("unrolled differentiation", UnrolledDifferentiation(horizon=None)),
    ):
        queries = data_module.val_dataloader()
        attribution = attribute(
            ensemble, DoubleWell(), data_module, queries=queries, measurement=parameter, estimator=estimator
        ).trusted()  # a run that is still between the wells, where the loss is not convex, is chaotic
        samples["as trained"] = attribution.baseline[:, 0].double().numpy()
        samples[name] = attribution.predict([SHIFT])[:, 0].double().numpy()
    sizes = [int((samples["as trained"] < 0).sum()), int((samples["as trained"] >= 0).sum())]
    generator = np.random.default_rng(0)
    drawn = [
        np.concatenate([exact.quantiles(well, generator.uniform(size=size)) for well, size in enumerate(sizes)])
        for _ in range(draws)
    ]
    distances = {name: distance(values, exact) for name, values in samples.items()}
    return samples, distances, np.quantile([distance(values, exact) for values in drawn], [0.025, 0.5, 0.975])


def figure(rows, samples):
    """Draw divergences by scale, and the samples of the right well beside the exact densities."""
    plot = make_subplots(1, 2, subplot_titles=("divergence from the distribution without the example", "right well"))
    for (name, (values, floor)), dash in zip(rows.items(), ("solid", "dash"), strict=True):
        plot.add_scatter(
            x=SCALES, y=values, name=f"example {name}", line={"dash": dash, "color": "black"}, row=1, col=1
        )
        plot.add_hline(floor, line_dash="dot", line_color="grey", row=1, col=1)
    right = GRID.numpy() > 0.8
    drawn = ("all examples", "as trained", None), ("without the shifting one", "influence functions", SHIFT)
    for colour, (name, runs, removed) in zip(COLOURS, drawn, strict=True):
        exact, inside = Boltzmann(BETA, removed), samples[runs][samples[runs] > 0]
        density = exact.density[right] / exact.wells[1]
        line = {"color": colour, "dash": "solid" if removed is None else "dash"}
        plot.add_scatter(x=GRID[right][::50], y=density[::50], name=f"exact: {name}", line=line, row=1, col=2)
        bars = {"histnorm": "probability density", "opacity": 0.4, "marker": {"color": colour}, "xbins": {"size": 0.01}}
        plot.add_histogram(x=inside, name=f"runs: {runs}", **bars, row=1, col=2)
    plot.update_layout(template="plotly_white", barmode="overlay", width=1200, height=480)
    plot.update_xaxes(title_text="scale c of the map θ + c r(θ)", row=1, col=1)
    plot.update_xaxes(title_text="parameter θ", range=[0.9, 1.1], row=1, col=2)
    plot.update_yaxes(title_text="Kullback-Leibler divergence (log)", type="log", row=1, col=1)
    return plot


def main():
    """Print the figures and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="Ensemble recorded with config.yaml.")
    parser.add_argument("--output", type=Path, default=Path("transport"))
    options = parser.parse_args()
    rows = by_quadrature()
    for name, (values, floor) in rows.items():
        shown = [f"c={scale:g} {value:.6f}" for scale, value in zip(SCALES, values, strict=True)][::5]
        print(f"example that {name}: {', '.join(shown)}")
        print(f"    of which between the wells {floor:.6f}")
    samples, distances, exact = by_sampling(Ensemble.open(options.runs))
    for name, value in distances.items():
        print(f"{name}: W_2 from the exact distribution without the example {value:.5f}")
    low, middle, high = exact
    print(f"exact samples of the same number: {middle:.5f}, 95 % of them {low:.5f} to {high:.5f}")
    options.output.mkdir(parents=True, exist_ok=True)
    figure(rows, samples).write_html(options.output / "transport.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
