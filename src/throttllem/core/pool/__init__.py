"""Several engines that serve at a time: which of them a request goes to, and how many there are of each size."""
