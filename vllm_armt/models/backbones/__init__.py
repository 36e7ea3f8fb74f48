"""Backbones as grouped decoder layers; each file states one architecture."""
