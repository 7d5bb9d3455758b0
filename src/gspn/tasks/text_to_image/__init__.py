"""Text to image, with a package for each step: ``train`` a UNet, ``distill`` GSPN into it, ``sample`` images at any
size, and ``evaluate`` them.

Example:
    Sample with the shipped pipeline and adapter, then at four times the size::

        from gspn.tasks.text_to_image.sample import sample

        model, adapter = "gspn_text_to_image.emoji", "gspn_adapter.emoji"
        sample(model, "grinning cat", adapter=adapter, output="samples")
        sample(model, "grinning cat", adapter=adapter, output="large", height=256, width=256, upscale=True)
"""
