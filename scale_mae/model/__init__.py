"""Models: the masked autoencoder and the classifier, and their masking, targets, losses and sizes."""
