"""Configs: their fields, checks, and what is built from them."""
