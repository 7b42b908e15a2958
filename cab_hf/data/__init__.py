"""Texts and images, from where they are to what a model reads."""
