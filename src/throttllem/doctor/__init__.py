"""The doctor: which GPUs are here, what is locked, what this user may set; restores what a keeper left."""
