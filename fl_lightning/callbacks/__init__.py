"""Behaviours that more than one method uses, or plainly could: one file each."""
