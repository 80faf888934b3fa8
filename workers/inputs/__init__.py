"""What comes from outside: checkpoints, tensors, images, networks."""
