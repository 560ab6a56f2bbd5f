"""From bundles to a decision: what each measures, what changed between them, one page to show.

Latencies that an emulator gave are left out everywhere: they say nothing of the device.
"""
