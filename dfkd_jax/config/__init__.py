"""Configs: the table of fields, checks, and builders of the parts of a run."""
