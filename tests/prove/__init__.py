"""The proof of the promises: an oracle with eyes of its own, and everything that can go wrong, made to go wrong.

`python -m tests.prove` runs all of it and writes a report; a quick selection
runs with the tests.
"""
