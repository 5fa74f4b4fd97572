"""Many trainings of one small model at once, on one device: for recording and for retraining.

A training by the Trainer, the reference, is recorded first. :mod:`~lightning_dtda.stacking.stacks` makes, checks and
sizes stacks of others like it; :mod:`~lightning_dtda.stacking.training` takes their steps, with the gradients of
:mod:`~lightning_dtda.stacking.gradient`; :mod:`~lightning_dtda.stacking.batch_orders` says which examples are in which
batch; :mod:`~lightning_dtda.stacking.size`, how many fit memory; and :mod:`~lightning_dtda.stacking.watch` refuses
Trainers whose trainings differ in their steps.
"""
