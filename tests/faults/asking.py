"""All that can be asked of a run, for tests of what damage does to the answers."""

from lightning_dtda import Ensemble


def everything(root):
    """All that can be asked of the only run of an ensemble."""
    [run] = Ensemble.open(root)
    steps = range(run.steps)
    return {
        "theta": [run.theta_vector(step) for step in range(run.steps + 1)],
        "gradients": [run.gradient_vector(step) for step in steps],
        "indices": [run.batch_indices(step) for step in steps],
        "coefficients": [run.coefficients(step) for step in steps],
        "hyperparameters": [run.hyperparameters(step) for step in steps],
        "states": [run.checkpoint(step).states for step in run.checkpoint_steps],
        "examples": None if run.example_checksums is None else run.example_checksums.values,
        "manifest": dict(vars(run.manifest)),
    }
