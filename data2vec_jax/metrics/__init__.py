"""What a run measures: scalars on disk, speed, and statistics of arrays.

Nothing here knows what is trained, except `collapse`, which reads scalars of pretraining by name.
"""
