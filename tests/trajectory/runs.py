"""Runs written without any training: random gradients, followed by the optimizer itself."""

from dataclasses import dataclass

import torch

from lightning_dtda import Run
from lightning_dtda.trajectory import Manifest, ParameterLayout, RunWriter
from lightning_dtda.trajectory.example_checksums import ExampleChecksums

SHAPES = {"weight": (3, 2), "bias": (3,)}
LAYOUT = ParameterLayout(tuple(SHAPES), tuple(SHAPES.values()), (1, 1))
"""Two groups of one parameter each."""

EXAMPLES = 10
STEPS = 7
CHECKPOINTS = (0, 3, STEPS)
SHARDS = ((0, 3), (3, STEPS))


@dataclass
class Written:
    """A run on disk, and what was written into it."""

    run: Run
    thetas: list
    gradients: list


def manifest(**changes):
    fields = {
        "seed": 7,
        "configuration": {
            "dataset": {"length": EXAMPLES, "fingerprint": None},
            "training": {
                "batch_size": 2,
                "gradient_clip_val": None,
                "gradient_clip_algorithm": None,
                "precision": "32-true",
            },
            "module": {"class": "Linear"},
            "hyperparameters": {
                "lr": [0.1, 0.2],
                "momentum": [0.9, 0.0],
                "dampening": [0.0, 0.0],
                "weight_decay": [0.0, 0.01],
            },
        },
        "parameters": [{"name": name, "shape": list(shape)} for name, shape in SHAPES.items()],
        "group_lengths": list(LAYOUT.group_lengths),
        "dtype": "float32",
        "optimizer": "torch.optim.sgd.SGD",
        "options": [{"nesterov": False, "maximize": False}] * 2,
        "hyperparameters": ["lr", "momentum", "dampening", "weight_decay"],
        "gradients": "float32",
        "batches": "indices",
        "processes": 1,
        "evaluation_modules": [],
        "circumstances": {"trainer": {}, "updated_buffers": [], "transfer_hooks": {}},
        "shared": {"training": "none", "evaluation": "none", "reduction": "mean"},
        "threads": 1,
        "versions": {"torch": torch.__version__},
        "planned_steps": STEPS,
    }
    return Manifest(**{**fields, **changes})


def records(first, last, gradients):
    """The tensors of a shard: steps of two micro-batches, of two and of one example."""
    steps = last - first
    tensors = {
        "indices": torch.arange(3 * first, 3 * last) % 10,
        "micro_batch_sizes": torch.tensor([2, 1] * steps),
        "micro_batches": torch.full((steps,), 2),
        "epochs": torch.zeros(2 * steps, dtype=torch.long),
        "batch_idx": torch.arange(2 * first, 2 * last),
        "global_steps": torch.arange(first, last).repeat_interleave(2),
        "accumulate_grad_batches": torch.full((steps,), 2),
        "hyperparameters": torch.tensor([[[0.1, 0.9, 0.0, 0.0], [0.2, 0.0, 0.0, 0.01]]] * steps, dtype=torch.float64),
    }
    return tensors if gradients is None else {**tensors, "gradients": torch.stack(gradients[first:last])}


def write_run(directory, draw=0, status="complete", reason=None, with_gradients=True, **changes):
    """Write a run of ``STEPS`` steps, random by ``draw``; ``changes`` are to its manifest."""
    generator = torch.Generator().manual_seed(draw)
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    optimizer = torch.optim.SGD(
        [{"params": [parameters["weight"]], "momentum": 0.9}, {"params": [parameters["bias"]], "weight_decay": 0.01}],
        lr=0.1,
    )
    optimizer.param_groups[1]["lr"] = 0.2
    directory.mkdir(parents=True)
    writer = RunWriter(directory, manifest(**changes))
    thetas, gradients = [LAYOUT.flatten(parameters.values())], []
    writer.add_examples(ExampleChecksums(EXAMPLES, 1, torch.arange(EXAMPLES) ** 20))
    writer.add_checkpoint(0, checkpoint(parameters, optimizer))
    for first, last in SHARDS:
        for _ in range(first, last):
            gradients.append(torch.randn(LAYOUT.size, generator=generator))
            for name, gradient in LAYOUT.unflatten(gradients[-1]).items():
                parameters[name].grad = gradient
            optimizer.step()
            thetas.append(LAYOUT.flatten(parameters.values()))
        writer.add_shard(first, last, records(first, last, gradients if with_gradients else None))
        writer.add_checkpoint(last, checkpoint(parameters, optimizer))
    writer.close(status, reason)
    return Written(Run(directory), thetas, gradients)


def checkpoint(parameters, optimizer):
    tensors = {f"parameters.{name}": parameter.clone() for name, parameter in parameters.items()}
    state = optimizer.state.get(parameters["weight"], {})
    if state:
        tensors["state.0.momentum_buffer"] = state["momentum_buffer"].flatten().clone()
    return tensors
