"""Hostile input: whatever it is, edgepipe refuses it in one line or compiles it, and stays within
its output folder.

``mutations`` and ``protobuf`` damage values and messages, ``seeds`` has what they start from,
``kinds`` makes one input of each kind and says what edgepipe is to do with it, ``worker`` does
that under watch, ``run`` starts workers and judges: ``python -m tests.fuzz.run --inputs 20000``.
"""
