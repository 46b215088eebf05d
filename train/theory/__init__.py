"""Propositions 1 and 2 and Theorem 2 of Liang & Huang (AAAI 2021): built as networks, checked and drawn."""

from .checks import Check as Check
from .checks import run as run
from .checks import table as table
