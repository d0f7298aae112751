"""The cost of the loss, measured against Eq. 8, its peers and the hardware's limits."""
