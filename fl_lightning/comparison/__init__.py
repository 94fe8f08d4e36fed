"""Runs that differ in a few overrides, trained or also personalized, in one table."""
