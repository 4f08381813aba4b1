"""Weights held in another form: packed for the processor, quantised for a draft, a head of fewer tokens.

A pass over one token reads every weight once, so its time is bytes by bandwidth. ``packed.py`` reads the same
bytes faster and serves target and draft alike; ``quantized.py`` and ``head.py`` read fewer bytes, which changes
the scores, and are therefore for drafts only: verification makes up for any draft. Knows nothing of rounds.
Read next: ``packed.py``.
"""
