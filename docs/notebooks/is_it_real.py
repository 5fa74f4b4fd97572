# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is it real?
#
# Every attribution gives a ranking, also where there is nothing to rank. Here we ask four things of one: which effects
# are more than seed noise, how many runs it takes to know, whether the numbers are computed correctly, and whether
# retraining agrees.
#
# The case is that of `lightning-dtda demo`: a small network predicts how diabetes progresses in 442 patients. A minute
# on two cores.

# %%
import lightning.pytorch as pl
import torch
from plotly import graph_objects as go

from lightning_dtda import Ensemble, TrajectoryRecorder, attribute, check, plot, record, retrain
from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
from lightning_dtda.evaluation import evaluate
from lightning_dtda.retraining import random_subsets

data = DiabetesData()
data.setup("fit")
queries = torch.utils.data.Subset(data.validation, range(12))


def make_trainer():
    return pl.Trainer(
        max_epochs=50,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


record(
    lambda: (make_trainer(), DiabetesRegressor(), DiabetesData()),
    TrajectoryRecorder("runs/diabetes"),
    24,
    stacked="auto",
    progress=False,
)
ensemble = Ensemble.open("runs/diabetes")

# %% [markdown]
# ## More than seed noise?
#
# We attribute the loss on 12 patients, and look at 8 of 24 runs first. Of 353 training patients, which move the loss on
# the first query?

# %%
attribution = attribute(ensemble, DiabetesRegressor(), data, queries=queries, progress=False)


def first(number):
    """Return the attribution of the first runs only."""
    return attribution.without_runs(attribution.runs[number:])


few = first(8)
plot.top(few, 0, "mean").show()

# %% [markdown]
# The bars are in order of size, the lines are 95 % intervals over seeds. An interval that leaves out zero is not yet a
# discovery: of 353 examples *without any effect*, about 18 would have one. `significant` controls the false discovery
# rate instead: of what it names, at most 5 % are there by chance, on average.

# %%
p_values = few.p_values("mean")[0]
print(
    f"p below 0.05: {int((p_values < 0.05).sum())} examples, "
    f"of which up to about {0.05 * 353:.0f} could be there by chance"
)
print(f"significant at a false discovery rate of 5 %: {int(few.significant('mean', fdr=0.05)[0].sum())} examples")

# %% [markdown]
# Does that hold what it promises? Take all effects on the mean away: turn the sign of each run's responses at random,
# so that they cancel over seeds. Whatever is named now is false.

# %%
generator = torch.Generator().manual_seed(0)
named = []
for _ in range(50):
    signs = torch.randint(0, 2, (8, 1, 1), generator=generator) * 2 - 1
    nothing = few.select([0])
    nothing = type(few)(nothing.baseline, nothing.responses[:] * signs, nothing.runs, nothing.queries)
    named.append(int(nothing.significant("mean", fdr=0.05).sum()))
print(f"with no effects at all, something is named in {sum(number > 0 for number in named)} of {len(named)} tries")

# %% [markdown]
# ## How many runs?
#
# More runs find more. `runs_for_significance` says beforehand how many an effect needs: a range, because its size is
# uncertain too.

# %%
counts, reliabilities, numbers = [], [], (4, 8, 16, 24)
for number in numbers:
    part = first(number)
    counts.append(float(part.significant("mean").sum(1).float().median()))
    reliabilities.append(float(part.reliability("mean").mean()))

figure = go.Figure(layout={"template": "plotly_white", "height": 380, "margin": {"t": 20}})
figure.add_scatter(x=numbers, y=counts, mode="lines+markers", line={"color": "#0072B2"})
figure.update_xaxes(title_text="recorded runs", type="log", tickvals=numbers)
figure.update_yaxes(title_text="significant examples of 353<br>(median over 12 queries)", rangemode="tozero")
figure.show()

# %%
best = int(attribution.influence("mean")[0].abs().argmax())
low, middle, high = (float(value[0, best]) for value in few.runs_for_significance("mean"))
print(f"from 8 runs: example {best} needs {low:.0f} to {high:.0f} runs, about {middle:.0f}")
print("reliability of the ranking, by runs:", {n: round(r, 2) for n, r in zip(numbers, reliabilities, strict=True)})

# %% [markdown]
# *Reliability* is the correlation that the ranking would have with that of other seeds.
#
# What of the spread over seeds? A variance needs far more runs than a mean, so fewer examples are shown to change it.

# %%
for difference in ("mean", "spread"):
    print(difference, "significant:", int(attribution.significant(difference).sum()), "of", 12 * 353)

# %% [markdown]
# ## Are the numbers right?
#
# `check` replays the runs, compares derivatives with finite differences of real retraining, and says in words what it
# found.

# %%
found = check(ensemble[:8], DiabetesRegressor(), data, queries=torch.utils.data.Subset(queries, range(3)))
for result in found.results:
    print("passed" if result.passed else "FAILED", "-", result.name, "-", result.figure)
print(f"metasmoothness {found.metasmoothness:.2f}: how linear the training is, at most 1")

# %% [markdown]
# ## Does retraining agree?
#
# The final test is a training that never saw the examples. We leave out 16 random tenths of the patients, 24 fresh
# seeds each, and ask whether the predicted order of these 16 is the real one.

# %%
truth = retrain(
    DiabetesRegressor,
    data,
    trainer=make_trainer,
    subsets=random_subsets(353, count=16, fraction_kept=0.9),
    seeds=24,
    queries=queries,
    ensemble=ensemble,
    progress=False,
)
evaluation = evaluate(attribution, truth)
for difference in ("mean", "variance"):
    score = evaluation.scores[difference]
    print(f"{difference}: {score.score:.2f} [{score.low:.2f}, {score.high:.2f}], noise allows {score.ceiling:.2f}")

# %% [markdown]
# A score of 1 is the same order, 0 is none. The *noise ceiling* is the best that any prediction can reach against 24
# noisy retrainings: compare the score with it before you compare it with 1. The picture shows one query: predicted and
# real change of the mean loss, one point for each tenth.

# %%
predicted = torch.stack([attribution.influence("mean", removed=removed)[0] for removed in truth.removed])
real = truth.influence("mean")[0]
figure = go.Figure(layout={"template": "plotly_white", "height": 420, "width": 560, "margin": {"t": 20}})
figure.add_scatter(x=predicted.tolist(), y=real.tolist(), mode="markers", marker={"color": "#0072B2", "size": 9})
limit = 1.1 * float(torch.cat([predicted, real]).abs().max())
figure.add_scatter(x=[-limit, limit], y=[-limit, limit], mode="lines", line={"color": "#999999", "dash": "dot"})
figure.update_xaxes(title_text="predicted change of the mean loss").update_yaxes(title_text="real change")
figure.update_layout(showlegend=False).show()

# %% [markdown]
# ## What to do next
#
# - Use what is real: [act on it](act_on_it.py).
# - Which estimator suits your training? `check(..., estimators=[...])` finds out: [judge whether to trust a
#   result](../trust.md).
# - The definitions: [statistics](../statistics.md).
