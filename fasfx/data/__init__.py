"""Texts shipped with the package."""
