"""The simulator: the real consensus and the real store on virtual time, with a network and disks that fail.

`python -m tests.sim --seed 7 --scenario mixed`
"""
