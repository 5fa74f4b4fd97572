"""Every case trains with nothing but a Trainer, and trains the same way again from the same seed."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler


def trained(case, seed=0, data=None, float64=False, **arguments):
    """The module after its training, and the loss of every step."""
    losses = []

    def note(trainer, module, outputs, batch, batch_idx):
        losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

    module, own = case.make(seed, float64=float64)
    case.trainer(case.callback(on_train_batch_end=note), **arguments).fit(module, own if data is None else data)
    return module, losses


def loader_of(data):
    return data if isinstance(data, DataLoader) else data.train_dataloader()


def test_trains_with_finite_losses(case):
    module, losses = trained(case)
    assert len(losses) >= 8
    assert np.isfinite(losses).all()
    before = dict(case.make(0)[0].named_parameters())
    moved = [name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])]
    expected = [name for name, weight in before.items() if weight.requires_grad and not name.startswith(case.unused)]
    assert moved == expected


def test_trains_the_same_again_from_the_same_seed_and_otherwise_from_another(case):
    (first, losses), (again, same), (_, others) = trained(case, 3), trained(case, 3), trained(case, 4)
    assert losses == same
    assert losses != others
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_trains_in_float64(case):
    module, losses = trained(case, float64=True, precision="64-true")
    assert all(weight.dtype == torch.float64 for weight in module.parameters())
    assert np.isfinite(losses).all()
    if not case.precision64:
        with pytest.raises(RuntimeError, match="same dtype"):
            trained(case, precision="64-true")


def test_takes_a_step_on_its_queries(case):
    queries, loader = case.queries(), loader_of(case.make(0)[1])
    assert isinstance(queries, Dataset)
    assert 0 < len(queries) < len(loader.dataset)
    rows = range(len(queries))
    if loader.batch_size is None:  # the data set is asked for whole batches
        how = {"batch_size": None, "sampler": BatchSampler(SequentialSampler(rows), len(rows), drop_last=False)}
    else:
        how = {"batch_size": len(rows)}
    steps = {"max_epochs": 1} if case.trainer_kwargs.get("max_steps") is None else {"max_steps": 1}
    _, losses = trained(case, data=DataLoader(queries, collate_fn=loader.collate_fn, **how), **steps)
    assert len(losses) == 1
    assert np.isfinite(losses).all()


def test_making_queries_draws_from_no_global_generator(case):
    torch.manual_seed(0)
    before = _generators()
    case.queries()
    assert _moved(before, _generators()) == []


def test_draws_from_the_generators_that_the_list_names(case):
    seen, inside = {}, set()

    def start(trainer, module, batch, batch_idx):
        seen["states"] = _generators()

    def end(trainer, module, outputs, batch, batch_idx):
        inside.update(_moved(seen["states"], _generators()))

    module, data = case.make(0)
    before = _generators()
    case.trainer(case.callback(on_train_batch_start=start, on_train_batch_end=end)).fit(module, data)
    # shuffling draws from torch between the steps, and so do some cases
    around = set(_moved(before, _generators())) - {"torch"}
    assert inside <= set(case.random)
    assert set(case.random) - {"torch"} == around


def _generators():
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1:3], "python": random.getstate()}


def _moved(before, after):
    def same(name):
        if name == "torch":
            return torch.equal(before[name], after[name])
        if name == "numpy":
            return before[name][1] == after[name][1] and (before[name][0] == after[name][0]).all()
        return before[name] == after[name]

    return [name for name in before if not same(name)]
