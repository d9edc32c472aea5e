"""The tests; a package so that layers share their helpers."""
