"""How fast a network is on this machine, in each runtime that is installed.

Each contender is a process of its own, and they are timed in turns. In one process the thread pools
of the runtimes would compete for the cores, and a slow moment of the machine would hit one alone.
"""
