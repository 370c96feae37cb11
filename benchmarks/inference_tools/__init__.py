"""Inputs and baselines that the benchmarks of inference share."""
