"""Measures encoders and classifiers: accuracy on data sets, k-NN, logistic regression, features and reconstructions."""
