"""Many trainings of one small model at once on one device, for recording and for retraining.

First, the Trainer runs one training, the reference, which is recorded. :mod:`~lightning_dtda.stacking.stacks` then
makes, checks and sizes stacks of others like it. :mod:`~lightning_dtda.stacking.training` takes their steps, with
gradients from :mod:`~lightning_dtda.stacking.gradient`. :mod:`~lightning_dtda.stacking.batch_orders` finds which
examples are in which batch, :mod:`~lightning_dtda.stacking.size` how many trainings fit in memory, and
:mod:`~lightning_dtda.stacking.watch` rejects Trainers whose trainings differ in their steps.
"""
