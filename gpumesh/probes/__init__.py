"""Probes of a node: its GPUs through nvidia-smi, its inference server through HTTP, its disk through df.

Each answer becomes a report. A probe never raises because of what a host does, and does not decide what is done about
it.
"""
