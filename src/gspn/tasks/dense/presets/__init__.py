"""The presets that come with the package: one YAML file each, whose first comment describes it."""
