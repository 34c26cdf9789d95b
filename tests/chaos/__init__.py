"""Faults on real managers under load, and whether any client saw what a single copy could not have shown.

`python -m tests.chaos --managers 3 --seed 7 --seconds 120`
"""
