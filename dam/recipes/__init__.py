"""Recipes of `dam train`, a YAML file each, and how one is read."""
