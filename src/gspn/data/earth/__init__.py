"""The Earth, built on demand from files of other packages: a satellite image with land, climates and elevation."""
