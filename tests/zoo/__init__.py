"""Modules as people train them, most of them written by others and left as they are, on a few small examples.

What stands here trains; whether it can be recorded and attributed is for other tests to ask. ``tests.zoo.cases`` lists
all of them and imports a package only when its case is made.
"""
