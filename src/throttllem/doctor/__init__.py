"""What may be done with the GPUs of this machine, what is locked and by whom, and putting it back."""
