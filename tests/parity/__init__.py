"""The original averaged models of mmengine and mmagic beside ours, on the same weights.

Needs both: ``pip install -e '.[test,peers]'`` and ``pip install --no-deps mmagic==1.2.0``.
``python -m tests.parity.table`` prints what is equal to the bit and how far the rest is off.
"""
