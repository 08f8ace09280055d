"""Measures how close `mace ping` comes to ping on the host with nothing tracing: the paper's evaluation, in a lab.

A *cell* is one combination of pace, flooding containers, load, container runtime, source and far end. A *repetition* of
a cell runs these blocks, and the middle three, which belong together, and the others in random order:

    ┌ ping on the host ──► `mace ping` in the container ──► ping on the host ┐   the truth stands on both sides
    └ untraced             traced, corrected                untraced         ┘
    ping in the container, untraced · ping on the host, traced · beside a load: ping on the host, starved

    plan ──► lab, load, floods ──► measuring: one repetition ──► results: one line of a file ──► figures ──► pictures

The repetitions of all cells are mixed, so that a machine that changes during a run changes for all cells. A finished
repetition is a line of the results file, with which an interrupted run continues.
"""
