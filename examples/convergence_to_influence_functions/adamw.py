"""To which influence functions does unrolling through Adam and AdamW converge?

Linear regression, and two linear layers, on scikit-learn's diabetes data in double precision: the distance of the
unrolled responses of all parameters from three candidates.

    python -m examples.convergence_to_influence_functions.adamw --output adamw
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pandas
import torch
from plotly.subplots import make_subplots
from sklearn.datasets import load_diabetes
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute, record

EXAMPLES, COLUMNS = 64, (1, 2, 3, 8)  # sex, body mass index, blood pressure and s5, which are hardly collinear
LINES = {
    "plain": ("distance from H⁺", "#999999", "dash"),
    "frozen": ("distance from (H + λP)⁻¹ with P held fixed", "#e69f00", "dashdot"),
    "full": ("distance from the limit with the change of P", "#0072b2", "solid"),
    "null space": ("part in the null space", "#cc79a7", "dot"),
}
MOMENTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # as shares of the steps
SETTINGS = {
    # width of the first layer, batch, decay, eps: large for batches of all, where Adam would be unstable without
    "Adam, one layer, all": (0, 64, 0.0, 0.1),
    "AdamW, one layer, all": (0, 64, 1.0, 0.1),
    "Adam, one layer, batches of 8": (0, 8, 0.0, 1e-8),
    "AdamW, one layer, batches of 8": (0, 8, 1.0, 1e-8),
    "Adam, two layers, batches of 8": (2, 8, 0.0, 1e-8),
    "AdamW, two layers, batches of 8": (2, 8, 1.0, 1e-8),
}


class Linear(pl.LightningModule):
    """One linear layer, or two without a nonlinearity between them, trained by AdamW with a cosine schedule to zero."""

    def __init__(self, width, decay, eps, steps):
        super().__init__()
        self.save_hyperparameters()
        layers = [torch.nn.Linear(len(COLUMNS), width, bias=False)] if width else []
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width or len(COLUMNS), 1, bias=False))

    def forward(self, inputs):
        """Return a prediction for each input."""
        return self.net(inputs)[:, 0]

    def training_step(self, batch, batch_idx):
        """Return half of the mean squared error."""
        inputs, targets = batch
        return 0.5 * (self(inputs) - targets).square().mean()

    def configure_optimizers(self):
        """Return AdamW; without decay it is Adam."""
        settings = {"betas": (0.9, 0.99), "eps": self.hparams.eps, "weight_decay": self.hparams.decay}
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, **settings)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def patients():
    """Return standardised columns and targets of the first patients, in double precision."""
    inputs, targets = load_diabetes(return_X_y=True)
    inputs = torch.tensor(inputs[:EXAMPLES, COLUMNS], dtype=torch.float64)
    targets = torch.tensor(targets[:EXAMPLES], dtype=torch.float64)
    return [(values - values.mean(0)) / values.std(0) for values in (inputs, targets)]


def parameter(module, batch):
    """Return the parameter whose number is the query ``(B,)``."""
    return torch.cat([each.flatten() for each in module.parameters()])[batch[0]]


def predictions(module, theta, inputs):
    """Return what the module with the parameters ``(P,)`` predicts."""
    parts = theta.split([each.numel() for each in module.parameters()])
    named = {name: part.view_as(each) for (name, each), part in zip(module.named_parameters(), parts, strict=True)}
    return functional_call(module, named, (inputs,))


def projector(module, theta):
    """Return the projector onto the range of the Gauss-Newton matrix, which is that of H at a minimum ``(P, P)``."""
    jacobian = jacrev(partial(predictions, module))(theta, patients()[0])
    return torch.linalg.pinv(jacobian) @ jacobian


def limit(module, theta, batch, candidate):
    r"""Return the responses ``(P, N)`` of a fixed point of AdamW, for one of the candidates.

    .. math:: F(\theta, w) = \bar g + \lambda P \theta = 0, \qquad P = \sqrt{E_b[g_b^2]} + \epsilon, \qquad
        r_k = \Big( \frac{\partial F}{\partial \theta} \Big)^+ \frac{\partial F}{\partial w_k}

    with the mean gradient and the second moment over batches that are drawn without replacement. ``"frozen"`` holds
    P constant, ``"plain"`` has F = mean gradient.
    """
    inputs, targets = patients()
    decay = 0.0 if candidate == "plain" else module.hparams.decay

    def moments(theta, weights):
        losses = lambda theta: 0.5 * (predictions(module, theta, inputs) - targets).square()  # noqa: E731
        gradients = weights[:, None] * jacrev(losses)(theta)
        mean = gradients.mean(0)
        second = mean.square() + gradients.var(0) * (1 / batch - 1 / EXAMPLES)
        return mean, second.sqrt() + module.hparams.eps

    weights = theta.new_ones(EXAMPLES)
    fixed = moments(theta, weights)[1]

    def stationary(theta, weights):
        mean, scale = moments(theta, weights)
        return mean + decay * (scale if candidate == "full" else fixed) * theta

    slopes, forces = jacrev(stationary, (0, 1))(theta, weights)
    # without decay, leave out directions that would be flat at the minimum, but that batch noise bends
    within = torch.eye(len(theta)).to(theta) if decay else projector(module, theta)
    return torch.linalg.pinv(within @ slopes @ within, rtol=1e-6) @ forces


def compare(setting, root, steps, seeds):
    """Yield, for each point in time and run, the distance from each candidate and the part in the null space."""
    width, batch, decay, eps = SETTINGS[setting]

    def make():
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", precision="64-true", **quiet)
        return trainer, Linear(width, decay, eps, steps), data

    data, module = (
        DataLoader(TensorDataset(*patients()), batch, shuffle=True),
        Linear(width, decay, eps, steps).double(),
    )
    record(make, TrajectoryRecorder(root / "runs"), seeds, stacked=seeds > 1, progress=False)
    ensemble = Ensemble.open(root / "runs")
    for moment in MOMENTS:
        step = round(moment * steps)
        found = attribute(
            ensemble,
            module,
            data,
            queries=TensorDataset(torch.arange(sum(each.numel() for each in module.parameters()))),
            measurement=parameter,
            estimator=UnrolledDifferentiation(horizon=None),
            step=step,
            output=root / f"step-{step}",
            progress=False,
        )
        for run, theta, unrolled in zip(found.runs, found.baseline, found.responses, strict=True):
            parts = {name: unrolled - limit(module, theta, batch, name) for name in ("plain", "frozen", "full")}
            parts["null space"] = unrolled - projector(module, theta) @ unrolled
            sizes = {name: float(part.norm() / unrolled.norm()) for name, part in parts.items()}
            yield {"setting": setting, "run": run, "step": step, **sizes}


def draw(rows):
    """Draw the distances and the part in the null space, in the mean over runs, for each setting."""
    plot = make_subplots(2, 3, subplot_titles=[*SETTINGS][::2] + [*SETTINGS][1::2], vertical_spacing=0.17)
    plot.for_each_annotation(lambda title: title.update(text=title.text.replace("all", "all in a batch")))
    for index, name in enumerate(SETTINGS):
        place = {"row": index % 2 + 1, "col": index // 2 + 1}
        for key, (label, colour, dash) in LINES.items():
            times = {}
            for row in rows:
                if row["setting"] == name and row[key] > 1e-9:  # one layer has no null space
                    times.setdefault(row["step"], []).append(row[key])
            line, means = {"color": colour, "dash": dash}, [sum(values) / len(values) for values in times.values()]
            plot.add_scatter(x=list(times), y=means, name=label, line=line, showlegend=index == 5, **place)
    plot.update_yaxes(type="log", range=[-3, 1], tickvals=[0.001, 0.01, 0.1, 1, 10])
    plot.update_yaxes(title_text="relative to the response", col=1).update_xaxes(title_text="steps", row=2)
    layout = {"template": "plotly_white", "width": 1200, "height": 640, "margin_t": 40}
    return plot.update_layout(legend={"orientation": "h", "y": -0.12}, **layout)


def main():
    """Record, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("adamw"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.WARNING)
    rows = []
    for setting in SETTINGS:
        root = options.output / setting.replace(", ", "-").replace(" ", "-")
        for row in compare(setting, root, options.steps, options.seeds):
            rows.append(row)
            print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
        pandas.DataFrame(rows).to_csv(options.output / "adamw.csv", index=False)
    draw(rows).write_html(options.output / "adamw.html", config={"displayModeBar": False})


if __name__ == "__main__":
    main()
