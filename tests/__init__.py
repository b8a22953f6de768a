"""The tests of cidfs."""
