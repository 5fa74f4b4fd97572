"""A callback and a measurement that send a signal to their own process, or to all that a terminal would reach."""

import os

import lightning.pytorch as pl


def send(number, to_group=False):
    if to_group:
        os.killpg(os.getpgid(0), number)
    else:
        os.kill(os.getpid(), number)


class Signal(pl.Callback):
    """Sends a signal after a step of the training that has a seed."""

    def __init__(self, number: int, seed: int, step: int = 5, to_group: bool = False):
        self.number, self.seed, self.step, self.to_group = number, seed, step, to_group

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and int(os.environ["PL_GLOBAL_SEED"]) == self.seed:
            send(self.number, self.to_group)
