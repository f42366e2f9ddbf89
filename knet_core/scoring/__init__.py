"""Scores of result files of any origin; what they hold is checked, and torch is not needed."""
