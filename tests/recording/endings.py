"""Ways for a training to end at a given step."""

import lightning.pytorch as pl


class Stop(pl.Callback):
    """Calls ``how`` once the given number of optimizer steps is taken."""

    def __init__(self, step, how):
        self.step = step
        self.how = how

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.how(trainer)


def fail(trainer):
    raise ValueError("the loss is not finite")
