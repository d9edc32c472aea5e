"""A pytest plugin for the test suites of others: vTPMs, guests with one, moves, and faults.

docs/testing.md shows what there is. Nothing of vtpmd itself imports it.
"""
