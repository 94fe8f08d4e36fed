"""Measurements beside a bare PyTorch loop in the same run; no part of the tests. One script per question."""
