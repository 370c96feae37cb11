"""Sizing of a run before it is started: memory, time, disk and cost, by arithmetic and measurements."""
