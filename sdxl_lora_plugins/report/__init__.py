"""The page that shows a run, or several side by side: one file that needs nothing else.

It shows ``NAME.run.json``. Charts are drawn by uPlot (MIT, in ``uplot/``), the page is made by
jinja2, which escapes everything: captions, prompts and file names are not ours.
"""
