"""The clinic: a reference application in which every clinic has a database of its own. README.md says how to run it."""
