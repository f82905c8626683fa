"""One module for each engine that is measured; each runs in a process and an interpreter of its own.

They know the standard library, their own engine and `benchmarks.peers.work`, so that an interpreter without this
project's environment can run them.
"""
