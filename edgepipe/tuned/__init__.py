"""Tuning records that come with the package (``*.jsonl``, see ``edgepipe.records``)."""
