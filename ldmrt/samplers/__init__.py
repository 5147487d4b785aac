"""Samplers as tables of coefficients: `registry` knows their names, `make` their tables, each family has a file."""
