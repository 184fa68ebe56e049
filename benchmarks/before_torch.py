"""Imported before PyTorch by every benchmark that uses it: its threads wait as those of the command do."""

from heretic.hardware.openmp import wait_passively

wait_passively()
