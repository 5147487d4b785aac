"""Measuring: how figures are taken and where they are kept."""
