"""The web page that `app.py` starts: draw images, compare adapters, train a tuner, and manage the adapter files.

Behind the page: `backend` (the loaded base and all that the page can do), `drawing`, `grid_axes`, `training_jobs`,
`datasets`, `files`, `add_files`, `png_settings` and `queue`. In front: `layout` puts the tabs together, each
`*_tab` module is one of them, `html_parts` and `style` make what Gradio has no component for.
"""
