"""The demo, ``python -m specdec.demo``: one model, real prompts, three ways to generate, one text.

Nothing else in the library imports it; it uses the library only through its front door. Read next: ``__main__.py``.
"""
