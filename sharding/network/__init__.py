"""Networks of switches and nodes: how they are built, who pays what, how long a transfer takes.

The alphabet of array names: S switches, C cables between switches, E endpoints (the ports of
NICs), L directed links, D neighbours of a switch, F flows, R routes of their parts, P links of a
route, K paths or choices, H hops, J cables side by side, U pairs of a switch and a target, M
nodes, I NICs and GPUs of a node, G all GPUs, T tokens of a GPU. Bytes, seconds, and bytes per
second of one direction.
"""
