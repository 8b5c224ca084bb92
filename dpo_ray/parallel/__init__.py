"""Parallelism: how a model and its work are laid out over ranks.

fsdp          device meshes, FSDP2 sharding, loading full weights into shards
tensor        tensor parallelism: layers and vocabulary split over ranks
context       context parallelism: the tokens of a row split over ranks
activations   activation checkpointing and offloading
collectives   small collectives over Python values and single tensors
"""
