"""Fuzz targets for what reads a stranger's bytes; `make fuzz` runs them."""
