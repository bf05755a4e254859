"""Probes: what a run would meet, measured before it is spent. Pure measures in their own modules, apart from plumbing.

paired, closeness, consensus, gradients, revision, errors   measures: arrays and texts in, figures out
remote, students                                            who is asked
folder, collection                                          what is kept on disk, what is still to be asked
prefix, overlap, loss, pi                                   the four probes
"""
