"""Plans of training and decoding on a cluster that need not be there: `plan` and `sweep`."""
