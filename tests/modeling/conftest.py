"""Puts this directory on the path: tests in directories below import the helpers in it."""
