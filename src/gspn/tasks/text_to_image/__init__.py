"""Text to image, a package for each thing that is done: ``train`` a UNet, ``distill`` GSPN into it, ``sample`` images
at any size, and ``evaluate`` them.

Example:
    Sample with the pipeline and the adapter that come in the package, then at four times the size::

        from gspn.tasks.text_to_image.sample import sample

        model, adapter = "gspn_text_to_image.emoji64", "gspn_adapter.emoji64"
        sample(model, "grinning cat", adapter=adapter, output="samples")
        sample(model, "grinning cat", adapter=adapter, output="large", height=256, width=256, upscale=True)
"""
