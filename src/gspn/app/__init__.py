"""The page of ``gspn app``: look inside models and draw with them, in a browser; needs ``pip install 'gspn[app]'``.

``page.py`` puts the tabs together and serves them; each other module but ``models.py`` and ``components.py`` is a tab.
"""
